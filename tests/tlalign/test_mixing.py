"""What holds for every strategy; CutMix, MixUp and their switch: pixels, targets, distributions, errors."""

import copy
import functools
import importlib.util
import re

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from tlalign.mixing import (
    AttentiveCutMix,
    BlockWise,
    CutMix,
    FMix,
    MixUp,
    MixUpCutMix,
    PuzzleMix,
    RandomPatches,
    ResizeMix,
    SaliencyMix,
    TokenMix,
    draw_boxes,
)
from tlalign_kernels import mixed_binary_cross_entropy, mixed_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("batch", "pair", "elem")
HEIGHT, WIDTH = 24, 20  # not square: a mix-up of the axes shows


def in_cells(images):
    """Stands for the activation of a network: the mean of the pixels of each of 4 x 4 cells."""
    return F.adaptive_avg_pool2d(images.float().mean(1), (4, 4))


STRATEGIES = {
    "cutmix": CutMix,
    "cutmix-minmax": functools.partial(CutMix, minmax=(0.2, 0.8)),
    "mixup": MixUp,
    "mixup-cutmix": MixUpCutMix,
    "random": functools.partial(RandomPatches, 4),
    "block": functools.partial(BlockWise, 4),
    "tokenmix": functools.partial(TokenMix, 4),
    "fmix": FMix,
    "resizemix": ResizeMix,
    "saliencymix": SaliencyMix,
    "attentive-cutmix": functools.partial(AttentiveCutMix, in_cells),
    "puzzlemix": functools.partial(PuzzleMix, lambda images, classes: images.float().abs().mean(1), 50),
}
if importlib.util.find_spec("cv2") is None:
    del STRATEGIES["saliencymix"]
every_strategy = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())
# Whose pixels are the partner's or one's own.
SPATIAL = {name: make for name, make in STRATEGIES.items() if not name.startswith(("mixup", "puzzlemix"))}
# Where another draw is sure to give another mix.
DRAWN = {name: make for name, make in STRATEGIES.items() if name not in ("attentive-cutmix", "puzzlemix")}
every_spatial_strategy = pytest.mark.parametrize("make", SPATIAL.values(), ids=SPATIAL.keys())
every_drawn_strategy = pytest.mark.parametrize("make", DRAWN.values(), ids=DRAWN.keys())
every_mode = pytest.mark.parametrize("mode", MODES)


def random_batch(batch_size, dtype=torch.float32, seed=0):
    """Returns images (B, 3, HEIGHT, WIDTH) and classes (B,) of 10 classes."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(10, (batch_size,), generator=generator)


def share_map(target):
    """Returns the part of the partner in every pixel (B, Hi, Wi), as the target has it."""
    return target.token_share((HEIGHT, WIDTH), (1, 1)).reshape(-1, HEIGHT, WIDTH)


# --- Pixels and targets ------------------------------------------------------------------------------------------


@every_spatial_strategy
@every_mode
@pytest.mark.parametrize("patch_size", [(4, 4), (6, 5)])
def test_labels_of_tokens_are_the_means_of_the_masks_of_their_pixels(make, mode, patch_size):
    # Image i is filled with the number i, so that pixels tell where they come from, also resized ones.
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 1, HEIGHT, WIDTH) + 1e-3 * random_batch(6)[0][:, :1]
    strategy, ratios = make(mode=mode, seed=3), []
    grid = (HEIGHT // patch_size[0], WIDTH // patch_size[1])
    for _ in range(5):
        mixed, target = strategy(images, torch.arange(6))
        mask = ((mixed - images.flip(0)).abs() < 0.1)[:, 0].double()
        share = target.token_share(grid, patch_size, torch.float64)
        expected = F.avg_pool2d(mask, patch_size).flatten(1)[..., None]
        torch.testing.assert_close(share, expected, rtol=0, atol=1e-15)
        torch.testing.assert_close(target.ratio[:, 0].double(), mask.mean((1, 2)), rtol=0, atol=1e-7)
        assert torch.equal(target.classes, torch.stack((torch.arange(6), torch.arange(6).flip(0)), 1))
        ratios.append(target.ratio)
    assert (torch.cat(ratios) > 0).any() and (torch.cat(ratios) < 1).all()


@every_mode
@pytest.mark.parametrize("batch_size", [2, 7, 8])
@pytest.mark.parametrize("options", [{}, {"minmax": (0.2, 0.8)}, {"box_grid": 4}], ids=["alpha", "minmax", "grid"])
def test_cutmix_pixels_are_the_partner_s_in_one_box_and_one_s_own_elsewhere(mode, batch_size, options):
    images, classes = random_batch(batch_size)
    strategy = CutMix(mode=mode, seed=1, **options)
    largest = 0.0
    for _ in range(4):
        mixed, target = strategy(images, classes)
        assert torch.equal(target.classes, torch.stack((classes, classes.flip(0)), 1))
        for index in range(batch_size):
            partner = images[batch_size - 1 - index]
            foreign = (mixed[index] != images[index]).all(0)
            assert torch.equal(mixed[index], torch.where(foreign, partner, images[index]))
            rows, columns = foreign.any(1), foreign.any(0)
            assert torch.equal(foreign, rows[:, None] & columns[None, :])
            assert all((edge.diff() != 0).sum() <= 2 for edge in (rows.int(), columns.int()))
            assert target.ratio[index].item() == pytest.approx(foreign.float().mean().item(), abs=1e-6)
            assert torch.equal(share_map(target)[index], foreign.float())
        largest = max(largest, target.ratio.max().item())
    assert largest > 0


@every_mode
@pytest.mark.parametrize("batch_size", [2, 7, 8])
def test_mixup_pixels_are_the_convex_combination_of_the_target_s_ratio(mode, batch_size):
    images, classes = random_batch(batch_size, torch.float64)
    mixed, target = MixUp(mode=mode, seed=1)(images, classes)
    ratio = target.ratio.double()[:, :, None, None]
    torch.testing.assert_close(mixed, (1 - ratio) * images + ratio * images.flip(0), rtol=0, atol=1e-14)
    assert torch.equal(target.classes, torch.stack((classes, classes.flip(0)), 1))
    assert torch.equal(share_map(target), target.ratio[:, :, None].expand(-1, HEIGHT, WIDTH))


@every_mode
@pytest.mark.parametrize("batch_size", [9, 64])
def test_switch_gives_every_image_the_pixels_that_its_target_says(mode, batch_size):
    for seed in range(4):
        images, classes = random_batch(batch_size, torch.float64, seed)
        mixed, target = MixUpCutMix(mode=mode, prob=0.9, seed=seed)(images, classes)
        share = share_map(target).double()[:, None]
        torch.testing.assert_close(mixed, (1 - share) * images + share * images.flip(0), rtol=0, atol=1e-14)
        assert torch.allclose(target.ratio[:, 0], share.mean((1, 2, 3)).float(), atol=1e-6)


def test_switch_mixes_both_ways_within_one_batch():
    images, classes = random_batch(64)
    share = share_map(MixUpCutMix(mode="elem", seed=0)(images, classes)[1])
    blended = ((share > 0) & (share < 1)).any(2).any(1)
    assert 16 < blended.sum() < 48
    assert torch.equal(share[blended].amax((1, 2)), share[blended].amin((1, 2)))


@every_mode
@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dense_target_is_timm_s(mode, alpha, smoothing):
    for make in (CutMix, MixUp):
        images, classes = random_batch(8)
        target = make(alpha=alpha, mode=mode)(images, classes)[1]
        expected = timm_mixup.mixup_target(classes, 10, 1 - target.ratio, smoothing)
        torch.testing.assert_close(target.to_dense(10, smoothing=smoothing), expected, rtol=0, atol=1e-6)


def test_images_and_dense_targets_are_timm_s_where_the_draws_are_the_same(monkeypatch):
    images, classes = random_batch(8)
    mixed, target = CutMix(seed=3)(images, classes)
    inside = share_map(target)[0]
    (rows,), (columns,) = inside.any(1).nonzero(as_tuple=True), inside.any(0).nonzero(as_tuple=True)
    box = [edge.item() for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)]
    monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *args, **options: box)
    theirs = timm_mixup.Mixup(mixup_alpha=0, cutmix_alpha=1, num_classes=10)(images.clone(), classes)
    assert torch.equal(mixed, theirs[0])
    torch.testing.assert_close(target.to_dense(10, smoothing=0.1), theirs[1], rtol=0, atol=1e-6)

    mixed, target = MixUp(seed=3)(images, classes)
    monkeypatch.setattr(np.random, "beta", lambda *args, **options: 1 - target.ratio[0, 0].item())
    theirs = timm_mixup.Mixup(mixup_alpha=1, num_classes=10)(images.clone(), classes)
    torch.testing.assert_close(mixed, theirs[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(target.to_dense(10, smoothing=0.1), theirs[1], rtol=0, atol=1e-6)


@every_mode
def test_one_draw_serves_the_batch_the_pair_or_the_element(mode):
    images, classes = random_batch(12)
    for make in (CutMix, MixUp):
        target = make(mode=mode, seed=5)(images, classes)[1]
        shares = share_map(target).flatten(1)
        expected = {"batch": 1, "pair": 6, "elem": 12}[mode]
        assert len(shares.unique(dim=0)) == expected
        assert torch.equal(shares, shares.flip(0)) == (mode != "elem")


@every_strategy
@every_mode
@pytest.mark.parametrize("batch_size", [3, 9])
def test_middle_of_an_odd_batch_stays_as_it_was_with_its_own_class(make, mode, batch_size):
    for seed in range(5):
        images, classes = random_batch(batch_size)
        mixed, target = make(mode=mode, seed=seed)(images, classes)
        middle = batch_size // 2
        assert torch.equal(mixed[middle], images[middle])
        assert target.ratio[middle].item() == 0
        assert torch.equal(target.to_dense(10)[middle], torch.eye(10)[classes[middle]])
        assert mixed.shape == images.shape and target.ratio.shape == (batch_size, 1)


@every_strategy
@every_mode
def test_nothing_is_mixed_with_probability_zero(make, mode):
    images, classes = random_batch(6)
    strategy = make(mode=mode, prob=0)
    mixed, target = strategy(images, classes)
    assert torch.equal(mixed, images) and mixed is not images
    assert torch.equal(target.ratio, torch.zeros(6, 1))
    strategy.prob = 1.0
    assert (strategy(images, classes)[1].ratio > 0).any()


# Images too small for patches, for a box of part of them, and for blocks.
REFUSED = {
    (1, 1): {"random", "block", "tokenmix", "attentive-cutmix", "cutmix-minmax", "puzzlemix"},
    (1, 3): {"random", "block", "tokenmix", "attentive-cutmix", "cutmix-minmax", "puzzlemix"},
    (2, 2): {"random", "block", "tokenmix", "attentive-cutmix"},
    (4, 8): set(),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("image_size", REFUSED)
def test_tiny_images_are_mixed_or_refused(name, image_size):
    images = torch.arange(4.0)[:, None, None, None].expand(-1, 1, *image_size).contiguous()
    mix = STRATEGIES[name](mode="elem")
    if name in REFUSED[image_size]:
        arguments = "patch_size|minmax|activation|images"
        with pytest.raises(ValueError, match=rf"^({arguments}): .*{re.escape(str(image_size))}"):
            mix(images, torch.arange(4))
        return
    mixed, target = mix(images, torch.arange(4))
    part = (mixed - images) / (images.flip(0) - images)
    torch.testing.assert_close(target.ratio[:, 0], part.mean((1, 2, 3)), rtol=0, atol=1e-6)


@every_strategy
@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_layout_and_input_are_kept(make, mode, dtype):
    images, classes = random_batch(5, dtype)
    images = images.to(memory_format=torch.channels_last)
    before, classes_before = images.clone(), classes.clone()
    mixed, target = make(mode=mode)(images, classes)
    assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=torch.channels_last)
    assert target.ratio.dtype == torch.float32 and target.classes.dtype == torch.int64
    assert torch.equal(images, before) and torch.equal(classes, classes_before)
    mixed.zero_()
    assert torch.equal(images, before)


def test_half_precision_images_are_blended_by_unrounded_ratios_of_their_own():
    images = torch.stack((torch.zeros(1, 8, 8), torch.ones(1, 8, 8))).repeat(4, 1, 1, 1).bfloat16()
    mixed, target = MixUp(alpha=1.0, mode="elem", seed=1)(images, torch.arange(8))
    assert torch.equal(mixed[1::2, 0, 0, 0], (1 - target.ratio[1::2, 0]).bfloat16())
    assert torch.equal(mixed[::2, 0, 0, 0], target.ratio[::2, 0].bfloat16())


def test_half_precision_images_are_blended_by_the_unrounded_ratio():
    images, classes = torch.stack((torch.zeros(1, 8, 8), torch.ones(1, 8, 8))).bfloat16(), torch.tensor([0, 1])
    ratios = []
    for seed in range(50):
        mixed, target = MixUp(alpha=1.0, seed=seed)(images, classes)
        ratios.append(target.ratio[0, 0].item())
        assert torch.equal(mixed[1], (1 - target.ratio[1, 0]).bfloat16().expand(1, 8, 8))
    assert any(ratio != float(torch.tensor(ratio).bfloat16()) for ratio in ratios)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_cutmix_takes_integer_images(dtype):
    images = (random_batch(4)[0].abs() * 60).to(dtype)
    classes = torch.arange(4)
    for strategy in (CutMix(mode="elem"), MixUpCutMix(mixup_alpha=0, mode="elem")):
        mixed, target = strategy(images, classes)
        assert mixed.dtype == dtype
        assert torch.equal(mixed, torch.where(share_map(target)[:, None] == 1, images.flip(0), images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_strategy
@every_mode
def test_gpu_batch_is_mixed_as_on_the_cpu(make, mode):
    images, classes = random_batch(7)
    on_cpu = make(mode=mode, seed=2)(images, classes)
    mixed, target = make(mode=mode, seed=2)(images.cuda(), classes.cuda())
    assert mixed.is_cuda and target.ratio.is_cuda
    torch.testing.assert_close(mixed.cpu(), on_cpu[0], rtol=0, atol=1e-5)
    # Means over masks are summed in another order.
    torch.testing.assert_close(target.ratio.cpu(), on_cpu[1].ratio, rtol=0, atol=2e-7)


class CopiesToDevice(TorchDispatchMode):
    """Counts copies from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if function is torch.ops.aten._to_copy.default else args[1]
            self.count += source.device.type == "cpu" and result.device.type != "cpu"
        return result


def train_on(device, strategy):
    """Goes the way from pixels to gradients of logits, with the share of tokens in between."""
    images, classes = torch.randn(7, 3, HEIGHT, WIDTH, device=device), torch.zeros(7, dtype=torch.int64, device=device)
    logits = torch.randn(7, 10, device=device, requires_grad=True)

    def run():
        mixed, target = strategy(images, classes)
        share = target.token_share((HEIGHT // 4, WIDTH // 4), (4, 4))
        aligned = target.with_share((share.mean(dim=1) + target.image_share()) / 2)
        for loss in (mixed_cross_entropy, mixed_binary_cross_entropy):
            loss(logits, aligned, smoothing=0.1).backward()
        return mixed

    return run


@every_mode
@pytest.mark.parametrize("make", [CutMix, MixUp, functools.partial(MixUpCutMix, prob=0.9)])
def test_device_is_never_waited_for_and_little_is_copied_there(make, mode):
    # Tensors of the meta device have no values: what would have to wait for some raises.
    run = train_on("meta", make(mode=mode, seed=2))
    for _ in range(4):
        with CopiesToDevice() as copies:
            assert run().device.type == "meta"
        assert 1 <= copies.count <= (1 if mode == "batch" else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_mode
@pytest.mark.parametrize("make", [CutMix, MixUp, functools.partial(MixUpCutMix, prob=0.9)])
def test_gpu_is_never_waited_for(make, mode):
    run = train_on("cuda", make(mode=mode, seed=2))
    run()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Distributions -----------------------------------------------------------------------------------------------

DRAWS = {"batch": 1200, "pair": 3000, "elem": 3000}  # a call of mode batch draws once
# Bounds of a p-value at the fixed seeds. About 250 of them are compared: 1e-4 leaves room for another numpy's streams.
ACCEPT = 1e-4
REJECT = 1e-6


def observe(mix, mode):
    """Draws through the public call and reads what was drawn off pixels: image i is filled with the number i.

    Args:
        mix: Takes images and classes 0..B-1, returns mixed images and the ratios (B,) of the partners.
        mode: Mode of `mix`, to look at each draw once.

    Returns:
        Ratios (n,), whether it was mixed by a box (n,), and the boxes of these (m, 4), empty ones left out.
    """
    batch_size = {"batch": 2, "pair": 1000, "elem": 500}[mode]
    per_call = {"batch": 1, "pair": 500, "elem": 500}[mode]
    images = torch.arange(batch_size).float()[:, None, None, None].expand(-1, 1, HEIGHT, WIDTH)
    drawn = [mix(images.clone(), torch.arange(batch_size)) for _ in range(DRAWS[mode] // per_call)]
    mixed = torch.stack([mixed[:per_call, 0] for mixed, _ in drawn])
    ratios = torch.cat([ratio[:per_call] for _, ratio in drawn])
    foreign = (mixed != images[:per_call, 0]).flatten(0, 1)
    blended = foreign & (mixed != images.flip(0)[:per_call, 0]).flatten(0, 1)
    cut = ~blended.flatten(1).any(1) & foreign.flatten(1).any(1)
    rows, columns = foreign[cut].any(2).int(), foreign[cut].any(1).int()
    y0, x0 = rows.argmax(1), columns.argmax(1)
    boxes = torch.stack((y0, x0, y0 + rows.sum(1), x0 + columns.sum(1)), 1)
    return ratios.double().numpy(), cut.numpy(), boxes.numpy()


def observe_ours(strategy):
    def mix(images, classes):
        mixed, target = strategy(images, classes)
        return mixed, target.ratio[:, 0]

    return observe(mix, strategy.mode)


@functools.cache
def observe_timm(mode, seed=12, **options):
    mixup = timm_mixup.Mixup(mode=mode, label_smoothing=0, **options)

    def mix(images, classes):
        mixup.num_classes = len(classes)
        mixed, dense = mixup(images, classes)
        return mixed, dense[classes, classes.flip(0)]

    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return observe(mix, mode)
    finally:
        np.random.set_state(state)


def p_values(ours, theirs):
    """Returns p-values of the hypothesis that ratios, choices, box edges and box sides are distributed alike."""
    pairs = {}
    for name, (ratios, cut, boxes) in (("ours", ours), ("theirs", theirs)):
        edges = dict(zip(("y0", "x0", "y1", "x1"), boxes.T, strict=True))
        sides = {"height": edges["y1"] - edges["y0"], "width": edges["x1"] - edges["x0"]}
        pairs[name] = {"ratio": ratios, "unmixed": ratios == 0, "cut": cut} | edges | sides
    # The asymptotic p-value is quick, and on values with ties (pixels, yes or no) it errs on the side of a larger p.
    return {
        name: stats.ks_2samp(sample.astype(float), pairs["theirs"][name].astype(float), method="asymp").pvalue
        for name, sample in pairs["ours"].items()
        if len(sample) and len(pairs["theirs"][name])
    }


CUTMIX = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}
MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 0.0}
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


@every_mode
@pytest.mark.parametrize(
    "options",
    [
        CUTMIX,
        CUTMIX | {"cutmix_alpha": 0.4, "prob": 0.7},
        CUTMIX | {"cutmix_minmax": (0.2, 0.8)},
        MIXUP,
        MIXUP | {"mixup_alpha": 0.2, "prob": 0.5},
        BOTH | {"switch_prob": 0.3},
    ],
    ids=["cutmix", "cutmix-alpha-prob", "minmax", "mixup", "mixup-alpha-prob", "switch"],
)
def test_ratios_boxes_and_kinds_are_distributed_as_timm_s(mode, options):
    found = p_values(observe_ours(MixUpCutMix(mode=mode, seed=11, **options)), observe_timm(mode, **options))
    assert min(found.values()) > ACCEPT, found


@pytest.mark.parametrize(
    ("options", "wrong", "seen_in"),
    [
        (CUTMIX, {"cutmix_alpha": 0.7}, "ratio"),
        (CUTMIX, {"prob": 0.9}, "unmixed"),
        (CUTMIX | {"cutmix_minmax": (0.2, 0.8)}, {"cutmix_minmax": (0.2, 0.7)}, "height"),
        (CUTMIX | {"cutmix_minmax": (0.2, 0.8)}, {"cutmix_minmax": (0.3, 0.8)}, "width"),
        (MIXUP, {"mixup_alpha": 0.5}, "ratio"),
        (BOTH | {"switch_prob": 0.3}, {"switch_prob": 0.4}, "cut"),
        (CUTMIX, {"box_grid": 4}, "y0"),
    ],
)
def test_distribution_test_can_fail(options, wrong, seen_in):
    found = p_values(
        observe_ours(MixUpCutMix(mode="elem", seed=11, **(options | wrong))), observe_timm("elem", **options)
    )
    assert found[seen_in] < REJECT, found


@pytest.mark.parametrize(("make", "options"), [(CutMix, CUTMIX), (MixUp, MIXUP)], ids=["CutMix", "MixUp"])
def test_single_strategies_and_their_defaults_are_distributed_as_timm_s(make, options):
    found = p_values(observe_ours(make(mode="elem", seed=13)), observe_timm("elem", **options))
    assert min(found.values()) > ACCEPT, found


# --- The grid of the official code -------------------------------------------------------------------------------


def official_areas(cells):
    """Returns the exact distribution of the box's area, in cells of a square image, for alpha = 1: {area: probability}.

    With a uniform ratio a side has s of n cells with probability ((s + 1)^2 - s^2) / n^2; the box reaches s // 2 cells
    to either side of a centre drawn uniformly, and is cut off at the border.
    """
    areas = {}
    for side in range(cells):
        probability = (2 * side + 1) / cells**4
        lengths = [min(centre + side // 2, cells) - max(centre - side // 2, 0) for centre in range(cells)]
        for height in lengths:
            for width in lengths:
                areas[height * width] = areas.get(height * width, 0.0) + probability
    return areas


def chi_square_p(areas, expected):
    """Returns the p-value of the areas, if they come from the expected distribution."""
    counts = [(areas == area).sum() for area in expected]
    if sum(counts) < len(areas):
        return 0.0
    return stats.chisquare(counts, [probability * len(areas) for probability in expected.values()]).pvalue


def test_grid_boxes_have_the_official_code_s_distribution():
    generator = np.random.default_rng(0)
    cells, grid = 7, 16
    boxes = draw_boxes(generator, 20000, (cells * grid, cells * grid), box_grid=grid)
    assert (boxes % grid == 0).all() and (boxes >= 0).all() and (boxes <= cells * grid).all()
    sides = (boxes[:, 2:] - boxes[:, :2]) // grid
    assert chi_square_p(sides.prod(1), official_areas(cells)) > ACCEPT
    # Pixel boxes whose corners are rounded to the grid are another distribution, and the test tells them apart.
    rounded = np.rint(draw_boxes(generator, 20000, (cells * grid, cells * grid)) / grid).astype(int)
    assert chi_square_p((rounded[:, 2:] - rounded[:, :2]).prod(1), official_areas(cells)) < REJECT


@every_mode
@pytest.mark.parametrize("options", [{}, {"minmax": (0.2, 0.8)}], ids=["alpha", "minmax"])
def test_grid_gives_every_patch_to_one_image(mode, options):
    images, classes = torch.randn(8, 3, 64, 96), torch.arange(8)
    strategy = CutMix(mode=mode, box_grid=16, **options)
    ratios = torch.cat([strategy(images, classes)[1].ratio for _ in range(20)])
    share = strategy(images, classes)[1].token_share((4, 6), (16, 16))
    assert ((share == 0) | (share == 1)).all()
    torch.testing.assert_close(ratios * 24, (ratios * 24).round(), rtol=0, atol=1e-5)
    assert len(ratios.unique()) > 3


# --- Reproducibility ---------------------------------------------------------------------------------------------


def same(first, second):
    (mixed, target), (other_mixed, other_target) = first, second
    return torch.equal(mixed, other_mixed) and torch.equal(target.ratio, other_target.ratio)


@every_drawn_strategy
@every_mode
def test_same_seed_gives_the_same_batches_and_another_seed_others(make, mode):
    batch = random_batch(6)
    first, second, other = make(mode=mode, seed=4), make(mode=mode, seed=4), make(mode=mode, seed=5)
    for _ in range(5):
        mixed = first(*batch)
        assert same(mixed, second(*batch))
        assert not same(mixed, other(*batch))


@every_strategy
def test_global_random_state_is_neither_used_nor_changed(make):
    batch = random_batch(6)
    np.random.seed(0)
    torch.manual_seed(0)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    mixed = make(mode="elem", seed=4)(*batch)
    assert np.array_equal(np.random.get_state()[1], before) and torch.equal(torch.get_rng_state(), torch_before)
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(mixed, make(mode="elem", seed=4)(*batch))


@every_strategy
def test_copies_draw_alike(make):
    batch, strategy = random_batch(6), make(mode="elem", seed=4)
    strategy(*batch)
    clone = copy.deepcopy(strategy)
    assert all(same(strategy(*batch), clone(*batch)) for _ in range(3))


def test_seed_step_and_rank_each_decide_the_draws():
    batch = random_batch(6)

    def ratio(*key, strategy):
        strategy.reseed(*key)
        return strategy(*batch)[1].ratio[0, 0].item()

    strategy = MixUp()
    keys = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    ratios = [ratio(*key, strategy=strategy) for key in keys]
    assert len(set(ratios)) == len(keys)
    assert [ratio(*key, strategy=MixUp(seed=9)) for key in keys] == ratios
    assert (
        ratio(2, strategy=strategy) == ratio(2, 0, 0, strategy=strategy) == MixUp(seed=2)(*batch)[1].ratio[0, 0].item()
    )
    assert stats.kstest([ratio(0, step, strategy=MixUp(alpha=1.0)) for step in range(500)], "uniform").pvalue > ACCEPT


def mixed_ratio(strategy, keys, samples):
    """What one of a loader's workers makes of a batch of class ids: the ratio that it draws."""
    if keys is not None:
        strategy.reseed(*keys)
    return strategy(torch.zeros(len(samples), 3, 4, 4), torch.tensor(samples))[1].ratio[0, 0].item()


@pytest.mark.parametrize("persistent", [False, True])
def test_each_worker_of_a_loader_draws_what_it_is_seeded_with(persistent):
    def two_epochs(seed=0, loader_seed=0, keys=None):
        torch.manual_seed(loader_seed)
        collate = functools.partial(mixed_ratio, MixUp(alpha=1.0, seed=seed), keys)
        loader = DataLoader(range(8), 2, num_workers=2, collate_fn=collate, persistent_workers=persistent)
        return [ratio for _ in range(2) for ratio in loader]

    ratios = two_epochs()
    assert len(set(ratios)) == 8
    assert two_epochs() == ratios
    assert not set(ratios) & set(two_epochs(seed=1)) | set(ratios) & set(two_epochs(loader_seed=1))
    assert set(two_epochs(keys=(3, 5))) == {mixed_ratio(MixUp(alpha=1.0), (3, 5), [0, 1])}


def test_draws_differ_from_those_of_a_plain_generator_of_the_same_key():
    ours = MixUp(alpha=1.0, seed=3).generator.random(4)
    for key in (3, [3, 0, 0], np.random.SeedSequence(3, spawn_key=(0, 0))):
        assert not np.array_equal(ours, np.random.default_rng(key).random(4))


# --- Errors ------------------------------------------------------------------------------------------------------

IMAGES, CLASSES = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (CutMix, {"alpha": -1}, ValueError, "alpha: expected a finite number of at least 0, got -1"),
        (CutMix, {"alpha": 0}, ValueError, "alpha: expected more than 0"),
        (CutMix, {"alpha": float("nan")}, ValueError, "alpha"),
        (CutMix, {"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        (CutMix, {"alpha": True}, TypeError, "alpha"),
        (CutMix, {"minmax": (0.8, 0.2)}, ValueError, "minmax: expected .least, greatest."),
        (CutMix, {"minmax": (-0.1, 0.2)}, ValueError, "minmax"),
        (CutMix, {"minmax": (0.1, 1.2)}, ValueError, "minmax"),
        (CutMix, {"minmax": (0.1, 0.2, 0.3)}, ValueError, "minmax: expected two numbers, got 3"),
        (CutMix, {"minmax": 0.3}, TypeError, "minmax"),
        (CutMix, {"minmax": "ab"}, TypeError, "minmax"),
        (CutMix, {"minmax": ("a", "b")}, TypeError, "minmax"),
        (CutMix, {"box_grid": 0}, ValueError, "box_grid: expected at least 1, got 0"),
        (CutMix, {"box_grid": 16.0}, TypeError, "box_grid: expected None or an int, got float"),
        (MixUp, {"alpha": 0}, ValueError, "alpha: expected more than 0"),
        (MixUp, {"alpha": float("inf")}, ValueError, "alpha"),
        (MixUp, {"prob": 1.5}, ValueError, "prob: expected a number in .0, 1., got 1.5"),
        (MixUp, {"prob": float("nan")}, ValueError, "prob"),
        (MixUp, {"prob": None}, TypeError, "prob: expected a number"),
        (MixUp, {"mode": "image"}, ValueError, "mode: expected one of batch, pair, elem, got 'image'"),
        (MixUp, {"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        (MixUp, {"seed": 0.5}, TypeError, "seed: expected an int, got float"),
        (MixUpCutMix, {"mixup_alpha": -0.1}, ValueError, "mixup_alpha"),
        (MixUpCutMix, {"cutmix_alpha": -0.1}, ValueError, "cutmix_alpha"),
        (MixUpCutMix, {"cutmix_minmax": (0.5, 0.5)}, ValueError, "cutmix_minmax"),
        (MixUpCutMix, {"switch_prob": -0.1}, ValueError, "switch_prob"),
        (
            MixUpCutMix,
            {"mixup_alpha": 0, "cutmix_alpha": 0},
            ValueError,
            "mixup_alpha, cutmix_alpha: expected one of them above 0",
        ),
    ],
)
def test_bad_arguments_are_named(make, options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


@every_strategy
@pytest.mark.parametrize(
    ("images", "classes", "error", "match"),
    [
        (IMAGES.numpy(), CLASSES, TypeError, "images: expected a tensor, got ndarray"),
        (IMAGES, [0, 1, 2, 3], TypeError, "classes: expected a tensor, got list"),
        (IMAGES[0], CLASSES, ValueError, r"images: expected the shape \(B, channels, Hi, Wi\).*\(3, 8, 8\)"),
        (IMAGES[:0], CLASSES[:0], ValueError, "images"),
        (IMAGES[..., :0], CLASSES, ValueError, "images"),
        (IMAGES[:1], CLASSES[:1], ValueError, "images: expected at least 2 images"),
        (IMAGES, CLASSES.int(), TypeError, "classes: expected int64, got torch.int32"),
        (IMAGES, CLASSES.float(), TypeError, "classes: expected int64, got torch.float32"),
        (IMAGES, CLASSES[:3], ValueError, r"classes: expected the shape \(4,\).*\(3,\)"),
        (IMAGES, torch.eye(4, dtype=torch.int64), ValueError, "classes: expected the shape"),
        (IMAGES, CLASSES.to("meta"), ValueError, "classes: expected on the device of the images, cpu, got meta"),
    ],
)
def test_bad_batches_are_named(make, images, classes, error, match):
    with pytest.raises(error, match=match):
        make()(images, classes)


@pytest.mark.parametrize("strategy", [MixUp(), MixUpCutMix(), MixUpCutMix(switch_prob=1), MixUp(prob=0)])
def test_mixup_of_integer_images_is_refused(strategy):
    with pytest.raises(TypeError, match=r"images: expected a floating dtype for MixUp.*got torch.uint8"):
        strategy(IMAGES.byte(), CLASSES)


@pytest.mark.parametrize("grid", [3, 16])
def test_images_that_are_no_multiple_of_the_grid_are_refused(grid):
    with pytest.raises(
        ValueError, match=rf"box_grid: expected a divisor of the sides of the images, got {grid}.*\(8, 8\)"
    ):
        CutMix(box_grid=grid)(IMAGES, CLASSES)


@pytest.mark.parametrize("options", [{"minmax": (0.2, 0.24)}, {"minmax": (0.2, 0.4), "box_grid": 4}])
def test_limits_that_leave_no_box_are_refused(options):
    with pytest.raises(ValueError, match=r"minmax: expected limits that leave at least one length.*\(8, 8\)"):
        CutMix(**options)(IMAGES, CLASSES)


@pytest.mark.parametrize("key", [(0, -1), (0, 0, -1), (-1,)])
def test_negative_step_or_rank_is_refused(key):
    with pytest.raises(ValueError, match="expected at least 0, got -1"):
        MixUp().reseed(*key)
