"""Puzzle Mix: its cut and its transport are the best there are, and its target is what is seen."""

import itertools
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy import stats

from tlalign.mixing import GradientSaliency, PuzzleMix, puzzle
from tlalign.mixing.puzzle import cut_levels, move_blocks, transport

pytestmark = pytest.mark.usefixtures("one_thread")


def given(maps):
    return lambda images, classes: maps


def test_the_cut_is_the_minimum_over_all_levels():
    random = np.random.default_rng(0)
    for _ in range(30):
        rows, columns = random.integers(1, 4), random.integers(1, 3)
        cost = random.normal(size=(rows, columns, 3))
        down, right = random.uniform(0, 2, (rows - 1, columns)), random.uniform(0, 2, (rows, columns - 1))

        def energy(levels, cost=cost, down=down, right=right):
            levels = np.reshape(levels, cost.shape[:2])
            alone = np.take_along_axis(cost, levels[..., None], 2).sum()
            return alone + (down * np.diff(levels, axis=0) ** 2 / 4).sum() + (right * np.diff(levels) ** 2 / 4).sum()

        best = min(energy(levels) for levels in itertools.product(range(3), repeat=rows * columns))
        assert energy(cut_levels(cost, down, right)) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_mask_minimises_the_paper_s_objective(gamma):
    random, beta = np.random.default_rng(1), 1.2 / 16 / 2
    for _ in range(8):
        own, partner = (part / part.sum() for part in random.random((2, 2, 2)))
        ratio, down, right = random.random(), random.random((2, 2, 1, 2)), random.random((2, 2, 2, 1))
        strategy = PuzzleMix(given(None), gamma=gamma, eta=0.3)
        log_prior = stats.binom(2, ratio).logpmf(range(3))

        def seen(step, z, other):
            return sum(
                step[a, b] * (z if a else 1 - z) * (other if b else 1 - other)
                for a, b in itertools.product((0, 1), (0, 1))
            )

        def objective(z, own=own, partner=partner, log_prior=log_prior, down=down, right=right):
            prior = log_prior[np.array(z, dtype=int)].sum()
            z = np.reshape(z, (2, 2)) / 2
            total = (z * own + (1 - z) * partner).sum() - 0.3 * prior / 4
            total += beta * ((z[1:] - z[:-1]) ** 2).sum() + beta * ((z[:, 1:] - z[:, :-1]) ** 2).sum()
            total += beta * gamma * sum(seen(down[:, :, 0, k], z[0, k], z[1, k]) for k in range(2))
            return total + beta * gamma * sum(seen(right[:, :, k, 0], z[k, 0], z[k, 1]) for k in range(2))

        best = min(objective(z) for z in itertools.product(range(3), repeat=4))
        found = strategy._cut(own, partner, ratio, [down, right])
        assert objective(2 * found) == pytest.approx(best, abs=1e-6)


def test_transport_is_the_best_of_all_assignments():
    random = np.random.default_rng(2)
    for xi in (0.0, 0.1, 0.8):
        saliency, seen = random.random((2, 2)), random.random((2, 2)) > 0.4

        def shown(moves, saliency=saliency, seen=seen, xi=xi):
            places, moves = np.arange(4), np.array(moves)
            distance = (places // 2 - moves // 2) ** 2 + (places % 2 - moves % 2) ** 2
            return (saliency.ravel()[moves] * seen.ravel()).sum() - xi * distance.sum()

        best = max(shown(moves) for moves in itertools.permutations(range(4)))
        assert shown(transport(saliency, seen, xi)) == pytest.approx(best)


def test_blocks_are_moved_whole():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(move_blocks(images, torch.arange(4).expand(2, 4)), images)
    moved = move_blocks(images, torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]]))
    assert torch.equal(moved[1], images[1])
    assert torch.equal(moved[0, :, :4, :6], images[0, :, 4:, 6:])
    assert torch.equal(moved[0, :, :4, 6:], images[0, :, :4, :6])
    assert torch.equal(moved[0, :, 4:, :6], images[0, :, :4, 6:])


def test_steps_across_borders_are_those_of_the_pixels():
    # Blocks of 4 x 4 pixels, each of one value: a step is the difference of two values.
    values = torch.rand(3, 1, 4, 4)
    values[0, 0, 0, 0], values[1, 0, 2, 1] = 0, 1  # the range of all pixels
    images = values.repeat_interleave(4, 2).repeat_interleave(4, 3)
    down, right = puzzle._border_steps(images, 4)
    either = torch.stack((values, values.flip(0)))[:, :, 0].double().numpy()
    for first, second in itertools.product((0, 1), (0, 1)):
        np.testing.assert_allclose(down[first, second], abs(either[first][:, :-1] - either[second][:, 1:]), atol=1e-6)
        np.testing.assert_allclose(
            right[first, second], abs(either[first][..., :-1] - either[second][..., 1:]), atol=1e-6
        )
    # Images are normalised in any way.
    for step, moved in zip((down, right), puzzle._border_steps(images * 3 + 1, 4), strict=True):
        np.testing.assert_allclose(moved, step, atol=1e-6)
    assert not any(step.any() for step in puzzle._border_steps(torch.ones(2, 1, 8, 8), 2))


def test_a_block_need_not_be_a_multiple_of_what_is_compared():
    images = torch.rand(2, 3, 28, 28)
    for grid, side in ((2, 14), (4, 7)):
        down, right = puzzle._border_steps(images, grid)
        assert down.shape == (2, 2, 2, grid - 1, grid)
        assert right.shape == (2, 2, 2, grid, grid - 1)
        # A border of one block sees none of the pixels of others.
        changed = images.clone()
        changed[:, :, :, side:] = changed[:, :, :, side:].flip(3)
        np.testing.assert_allclose(puzzle._border_steps(changed, grid)[0][..., 0], down[..., 0], atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_labels_of_tokens_are_the_means_of_what_pixels_show(mode):
    # Blocks may be moved, but all pixels of image i are i: what is mixed says the part of the partner.
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 1, 32, 16)
    strategy = PuzzleMix(given(torch.rand(6, 32, 16)), mode=mode, seed=4)
    levels = set()
    for _ in range(6):
        mixed, target = strategy(images, torch.arange(6))
        part = ((mixed - images) / (images.flip(0) - images))[:, 0].double()
        expected = F.avg_pool2d(part, (4, 8)).flatten(1)[..., None]
        torch.testing.assert_close(target.token_share((8, 2), (4, 8), torch.float64), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(target.ratio[:, 0].double(), part.mean((1, 2)), rtol=0, atol=1e-6)
        levels |= set(target.masks.unique().tolist())
    assert levels == {0, 0.5, 1}


def test_what_is_salient_is_shown():
    maps = torch.full((2, 16, 16), 0.01)
    maps[0, :, :8] = 1
    maps[1, :, 8:] = 1
    images = torch.randn(2, 3, 16, 16)
    for seed in range(4):
        mixed, target = PuzzleMix(given(maps), eta=0.0, seed=seed)(images, torch.arange(2))
        assert torch.equal(mixed[0, :, :, :8], images[0, :, :, :8])
        assert torch.equal(mixed[0, :, :, 8:], images[1, :, :, 8:])
        assert torch.equal(target.ratio, torch.full((2, 1), 0.5))


def test_blocks_move_to_where_some_of_their_image_is_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(puzzle, "transport", lambda *given: seen.append(given[1]) or transport(*given))
    _, target = PuzzleMix(given(torch.rand(2, 16, 16)), seed=3)(torch.rand(2, 1, 16, 16), torch.arange(2))
    grid = len(seen[0])
    parts = F.avg_pool2d(target.masks, 16 // grid)[:, 0].numpy()
    assert 0.5 in parts
    for own, partner, part in zip(seen[::2], seen[1::2], parts, strict=True):
        assert (own == (part < 1)).all()
        assert (partner == (part > 0)).all()


def test_the_ratio_follows_the_prior():
    count = 80
    strategy = PuzzleMix(given(torch.rand(2 * count, 8, 8)), xi=None, mode="elem", seed=5)
    ratio = strategy(torch.rand(2 * count, 1, 8, 8), torch.zeros(2 * count, dtype=torch.int64))[1].ratio[:, 0].numpy()
    generator = PuzzleMix(given(None), seed=5).generator
    generator.random(2 * count)  # whether each image is mixed
    generator.integers(3)  # the grid
    drawn = generator.beta(1, 1, size=2 * count)
    assert stats.spearmanr(drawn, ratio).statistic > 0.9
    assert ratio.mean() == pytest.approx(0.5, abs=0.08)


def test_each_call_draws_a_grid_and_moves_blocks_of_its_own():
    strategy, grids = PuzzleMix(given(torch.rand(2, 16, 16)), seed=8), set()
    for _ in range(20):
        strategy(torch.rand(2, 1, 16, 16), torch.arange(2))
        grids.add(math.isqrt(strategy._moves[0].shape[1]))
    assert grids == {2, 4, 8, 16}


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_may_be_that_of_one_image_alone(monkeypatch, ratio):
    # As tiny an alpha draws it.
    monkeypatch.setattr(puzzle, "draw_ratios", lambda generator, count, alpha: np.full(count, ratio))
    strategy = PuzzleMix(given(torch.rand(4, 8, 8)), eta=10.0)
    _, target = strategy(torch.rand(4, 1, 8, 8), torch.arange(4))
    assert (target.ratio == ratio).all()


def test_transport_shows_more_unless_it_costs_too_much():
    images, maps = torch.rand(8, 1, 16, 16), torch.rand(8, 16, 16) ** 4

    def seen(xi):
        strategy = PuzzleMix(given(maps), beta=0.0, eta=0.0, xi=xi, mode="elem", seed=6)
        target = strategy(images, torch.arange(8))[1]
        return strategy._moves, sum(
            part.sum() for part in strategy.visible_parts(maps / maps.sum((1, 2), True), target, (16, 16))
        )

    (_, still), (free_moves, free), (dear_moves, dear) = (seen(xi) for xi in (None, 0.0, 1e3))
    assert free > still * 1.01
    torch.testing.assert_close(dear, still)
    identity = torch.arange(dear_moves[0].shape[1])
    assert all(torch.equal(move, identity.expand(8, -1)) for move in dear_moves)
    assert all(torch.equal(move.sort(dim=1).values, identity.expand(8, -1)) for move in free_moves)


def test_gradient_saliency_is_that_of_the_loss_and_leaves_the_model_as_it_was():
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_classes": 5, "drop_rate": 0.5}
    model = timm.create_model("vit_tiny_patch16_224", **options).train()
    model.blocks[0].norm1.eval()
    images, classes = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 4])
    saliency = GradientSaliency(model)
    with torch.no_grad():
        found = saliency(images, classes)
    assert torch.equal(found, saliency(images, classes))
    with model.register_forward_hook(lambda module, inputs, logits: (logits, None)):
        assert torch.equal(found, saliency(images, classes))
    assert model.training and not model.blocks[0].norm1.training and model.blocks[0].norm2.training
    assert all(parameter.grad is None for parameter in model.parameters()) and not images.requires_grad
    pixels = images.clone().requires_grad_()
    F.cross_entropy(model.eval()(pixels), classes, reduction="sum").backward()
    expected = pixels.grad.square().mean(1).sqrt()
    torch.testing.assert_close(*(each / each.sum(dim=(1, 2), keepdim=True) for each in (found, expected)))


def test_saliency_is_there_in_float16_where_the_model_is_sure():
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_classes=5)
    images, saliency = torch.randn(3, 3, 16, 16), GradientSaliency(model.eval())
    model.head.weight.data *= 1e3
    with torch.no_grad():
        logits = model(images)
    expected = saliency(images, logits.argmax(1))
    with torch.autocast("cpu", torch.float16):
        found = saliency(images, logits.argmax(1))
    found, expected = (each / each.sum(dim=(1, 2), keepdim=True) for each in (found, expected))
    # Half a pixel's mean share, if all differ by that: 16 bits leave some 1 %, and a uniform map as much as all of it.
    assert (found - expected).abs().sum(dim=(1, 2)).max() < 0.05 < (expected - 1 / 256).abs().sum(dim=(1, 2)).min()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"saliency": None}, TypeError, "saliency: expected a callable.*got NoneType"),
        ({"alpha": 0}, ValueError, "alpha: expected more than 0"),
        ({"beta": -1}, ValueError, "beta: expected a finite number of at least 0, got -1"),
        ({"gamma": 2}, ValueError, r"gamma: expected a number in \[0, 1\].*got 2"),
        ({"eta": math.inf}, ValueError, "eta"),
        ({"xi": "much"}, TypeError, "xi: expected a number, got str"),
    ],
)
def test_bad_arguments_are_named(options, error, match):
    with pytest.raises(error, match=match):
        PuzzleMix(**{"saliency": given(None), **options})


def test_images_and_maps_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"images: expected sides that are multiples of 2 for Puzzle Mix, got \(8, 5\)"
    ):
        PuzzleMix(given(None))(torch.rand(2, 3, 8, 5), torch.arange(2))
    with pytest.raises(ValueError, match=r"saliency: expected maps of shape \(2, 8, 8\), got \(2, 4, 4\)"):
        PuzzleMix(given(torch.rand(2, 4, 4)))(torch.rand(2, 3, 8, 8), torch.arange(2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_where_saliency_is_no_number_there_is_none(value):
    images, broken = torch.rand(4, 3, 8, 8), torch.rand(4, 8, 8)
    broken[1] = value
    without = broken.clone()
    without[1] = 0
    mixed, target = PuzzleMix(given(broken), seed=3)(images, torch.arange(4))
    expected, expected_target = PuzzleMix(given(without), seed=3)(images, torch.arange(4))
    assert torch.equal(mixed, expected)
    assert torch.equal(target.ratio, expected_target.ratio)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModuleNotFoundError, match=r"Puzzle Mix needs SciPy: pip install 'tlalign-kernels\[train\]'"):
        PuzzleMix(given(None))
