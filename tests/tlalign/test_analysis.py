"""The analyses against independent dense computations and closed forms."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition

import tlalign.models  # noqa: F401 - timm learns of PVT
from tlalign.analysis import (
    MixedBatch,
    RatioFollower,
    attention_rollout,
    convolution_presence,
    mix_batches,
    similarity_ratio,
    target_rmse,
    token_presence,
)
from tlalign.analysis.blocks import image_value, map_size
from tlalign.analysis.presence import PresenceOfLayer
from tlalign.analysis.ratios import LayerRatios, collect_ratios, token_paths
from tlalign_kernels import MixedTarget, patch_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 20
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "img_size": SIZE}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 5}
PVT = {"embed_dims": (16,), "num_heads": (2,), "mlp_ratios": (2,), "sr_ratios": (2,), "num_classes": 5}


def sharp(model):
    """A model whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv.weight", ".q.weight", ".kv.weight", "bias_table")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
    return model.eval()


def vit(**options):
    return sharp(timm.create_model("vit_tiny_patch16_224", **VIT | options))


def swin(window_size, side=SIZE):
    return sharp(timm.create_model("swin_tiny_patch4_window7_224", window_size=window_size, img_size=side, **SWIN))


def pvt(depth=2):
    return sharp(timm.create_model("pvt_v2_b0", depths=(depth,), **PVT))


def images(count=2, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def materialised(model, batch):
    """Mean over heads of the attention matrices that timm's own forward forms, block by block."""
    model, found = copy.deepcopy(model).double(), []
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if name.endswith("attn_drop"):
            module.register_forward_hook(lambda _, arguments, __: found.append(arguments[0].mean(dim=1)))
    with torch.no_grad():
        model(batch.double())
    return found


def of_windows(attention, block, size):
    """Attention matrices of a map (B, N, N) from those of its windows; padding is left out of the means."""
    height, width = size
    numbers = torch.arange(height * width).view(1, height, width, 1)
    numbers = numbers.roll((-block.shift_size[0], -block.shift_size[1]), (1, 2))
    pad = [-length % window for length, window in zip(size, block.window_size, strict=True)]
    numbers = F.pad(numbers, (0, 0, 0, pad[1], 0, pad[0]), value=-1)
    windows = window_partition(numbers, block.window_size).flatten(1)
    attention = attention.unflatten(0, (-1, len(windows)))
    dense = attention.new_zeros(len(attention), height * width, height * width)
    for window, tokens in enumerate(windows):
        real = tokens >= 0
        part = attention[:, window][:, real][:, :, real]
        part = part / part.sum(dim=2, keepdim=True)
        dense[:, tokens[real][:, None], tokens[real][None]] = part
    return dense


def merging(size):
    """Matrix by which labels of a map are merged 2 x 2; incomplete cells are means over what they have."""
    rows, columns = (torch.arange(length) // 2 for length in size)
    cells = (rows[:, None] * (columns.max() + 1) + columns).flatten()
    matrix = F.one_hot(cells).T.double()
    return matrix / matrix.sum(dim=1, keepdim=True)


def swin_matrices(model, batch):
    """Attention of each block as matrices of its map, and the merging between the stages."""
    blocks = [block for stage in model.layers for block in stage.blocks]
    sizes = [(SIZE // 2, SIZE // 2)] * 2 + [(math.ceil(SIZE / 4), math.ceil(SIZE / 4))] * 2
    found = zip(materialised(model, batch), blocks, sizes, strict=True)
    return [of_windows(attention, block, size) for attention, block, size in found], merging(sizes[0])


def rolled_out(matrix):
    return (matrix + torch.eye(matrix.shape[1])) / 2


def test_rollout_of_a_vit_is_the_product_of_the_materialised_matrices():
    model, batch = vit(reg_tokens=2, qk_norm=True), images()
    first, second, third = (rolled_out(matrix) for matrix in materialised(model, batch))
    product = third @ second @ first
    rollout = attention_rollout(model, batch)
    assert (rollout.tokens - product).abs().max() < 1e-5
    assert (rollout.head - product[:, 0]).abs().max() < 1e-5
    assert rollout.grid == (5, 5)
    assert product.std() > 0.02  # far from uniform, which any average would pass for


@pytest.mark.parametrize("window_size", [5, 4])  # 4: windows that the map does not divide into
def test_rollout_of_a_swin_is_the_product_of_the_materialised_matrices(window_size):
    model, batch = swin(window_size), images()
    attention, merge = swin_matrices(model, batch)
    first, second, third, fourth = (rolled_out(matrix) for matrix in attention)
    product = fourth @ third @ merge @ second @ first
    rollout = attention_rollout(model, batch)
    assert (rollout.tokens - product).abs().max() < 1e-5
    assert (rollout.head - product.mean(dim=1)).abs().max() < 1e-5
    assert rollout.grid == (10, 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True}),
    ],
)
def test_the_value_of_an_image_is_that_of_the_head(name, options):
    model = patch_model(sharp(timm.create_model(name, **VIT | options)))
    boxes = torch.tensor([[[0, 0, 9, 20]], [[3, 5, 17, 20]]])
    target = MixedTarget.from_boxes(torch.tensor([[0, 1], [1, 0]]), boxes, (SIZE, SIZE))
    _, aligned = model(images(), target=target, collect_layers=True)
    torch.testing.assert_close(image_value(model, aligned.layer_shares[-1]), aligned.ratio)


def test_rollout_in_several_passes_is_the_same():
    model, batch = swin(5), images()
    at_once, in_passes = attention_rollout(model, batch), attention_rollout(model, batch, memory=2 * 100 * 7 * 4)
    torch.testing.assert_close(in_passes.tokens, at_once.tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(in_passes.head, at_once.head, atol=1e-6, rtol=0)


def test_patches_need_not_be_square():
    model = sharp(timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=(8, 16), embed_dim=24, depth=1))
    assert attention_rollout(model, torch.randn(1, 3, 64, 64)).grid == (8, 4)


@pytest.mark.parametrize(("image_size", "grid"), [((128, 64), (4, 2)), ((64, 128), (2, 4))])
def test_tokens_of_a_pyramid_lie_on_its_image_as_squares(image_size, grid):
    with torch.device("meta"):
        model = timm.create_model("pvt_tiny")  # does not say how its tokens lie
    assert map_size(model, torch.zeros(1, 1 + 4 * 2, 1), image_size) == grid


def test_rollout_leaves_the_model_alone():
    model = vit(proj_drop_rate=0.5).train()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    rollout = attention_rollout(model, images())
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Nor is anything dropped, as it would be in training.
    assert torch.equal(rollout.tokens, attention_rollout(model.eval(), images()).tokens)


def test_class_token_that_joins_late_keeps_the_rest_of_its_row():
    model = sharp(timm.create_model("pvt_tiny", img_size=32, num_classes=5)).eval()
    rollout = attention_rollout(model, torch.randn(1, 3, 32, 32))
    assert rollout.tokens.shape == (1, 2, 64)
    total = rollout.tokens.sum(dim=2)
    # In two blocks a half, and then a half of a half, of the class token is kept by the residual connection.
    assert 0 < total[0, 0] <= 0.75 + 1e-6
    assert total.max() < 1


@pytest.mark.parametrize("memory", [2**26, 1])
def test_presence_is_the_column_sum_of_the_attention(memory):
    batch = images()
    model = vit()
    for found, matrix in zip(token_presence(model, batch, memory), materialised(model, batch), strict=True):
        assert (found - matrix.sum(dim=1)).abs().max() < 1e-5
    model = swin(4)
    attention, _ = swin_matrices(model, batch)
    for found, matrix in zip(token_presence(model, batch, memory), attention, strict=True):
        assert (found.flatten(1) - matrix.sum(dim=1)).abs().max() < 1e-5


def test_presence_of_tokens_behind_reduced_keys_is_that_of_their_key_in_equal_parts():
    model, batch = pvt(), images()
    # A map of 5 x 5 tokens, of which keys are made of the first 4 x 4.
    reduction = torch.zeros(4, 5, 5, dtype=torch.float64)
    for key, (row, column) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        reduction[key, row : row + 2, column : column + 2] = 1 / 4
    for found, matrix in zip(token_presence(model, batch), materialised(model, batch), strict=True):
        dense = (matrix @ reduction.flatten(1)).sum(dim=1)
        assert (found.flatten(1) - dense).abs().max() < 1e-5
        assert found.mean().item() == pytest.approx(1, abs=1e-6)


def test_presence_in_a_convolution_is_the_column_sum_of_its_matrix():
    kernel = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = torch.eye(20, dtype=torch.float64).view(20, 1, 4, 5)
    matrix = F.conv2d(inputs, kernel[None, None], padding=1).flatten(1).T  # outputs by inputs
    presence = convolution_presence((4, 5), kernel)
    torch.testing.assert_close(presence.flatten(), matrix.sum(dim=0))
    torch.testing.assert_close(presence[1:-1, 1:-1], kernel.sum().expand(2, 3))


def test_distribution_of_presence_is_that_of_all_tokens():
    values = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).exp()
    layer = PresenceOfLayer()
    for part in values.split(2):
        layer.add(part, has_class_token=True)
    assert layer.distance == pytest.approx((values - 1).square().mean().sqrt().item())
    assert layer.class_token == pytest.approx(values[:, 0].mean().item())
    assert (layer.least, layer.greatest) == pytest.approx((values.min().item(), values.max().item()))
    for part in (0.05, 0.5, 0.95):
        assert layer.quantile(part) == pytest.approx(values.quantile(part).item(), rel=0.02)
    even = PresenceOfLayer()
    even.add(torch.ones(1, 9), has_class_token=False)
    assert even.quantile(0.5) == 1


def test_tokens_that_nothing_attends_to_have_no_presence():
    values = torch.tensor([[0.0] * 36 + [1.5625] * 64])
    layer = PresenceOfLayer()
    layer.add(values, has_class_token=False)
    quantiles = [layer.quantile(part) for part in (0.05, 0.25, 0.5)]
    assert quantiles == pytest.approx([0.0, 0.0, 1.5625], rel=0.005)


def uniform(model):
    """A model whose attention is uniform: all scores are zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv", ".q.", ".kv.")):
                parameter.zero_()
    return model.eval()


def mixed_batches():
    return list(mix_batches([(images(8, seed=0), torch.arange(8) % 5)]))


def test_uniform_attention_halves_how_far_tokens_are_from_the_ratio_and_leaves_the_target():
    model = uniform(vit())
    batch, *_ = mixed_batches()
    ratio = batch.target.ratio[:, None]
    before = batch.target.token_share((5, 5), (4, 4))
    for depth, after in enumerate(RatioFollower(model)(batch).aligned, start=1):
        torch.testing.assert_close(after[:, 1:], ratio + (before - ratio) / 2**depth, atol=1e-6, rtol=0)
    assert target_rmse(model, [batch]) < 1e-6


def test_rmse_of_uniform_attention_to_reduced_keys_is_the_closed_form():
    # Keys cover the first 4 x 4 of 5 x 5 tokens. A label moves half of the way to their mean m in each of the blocks,
    # and m stays: the target goes from r to m + (r - m) / 2^depth.
    depth = 3
    model = uniform(pvt(depth))
    batches = mixed_batches()
    shares = torch.cat([target.token_share((5, 5), (4, 4)) for _, _, target in batches]).view(-1, 5, 5).double()
    change = (shares[:, :4, :4].mean(dim=(1, 2)) - shares.mean(dim=(1, 2))) * (1 - 2**-depth)
    expected = change.square().mean().sqrt().item()
    assert expected > 0.01
    assert target_rmse(model, batches) == pytest.approx(expected, abs=1e-6)
    follower = RatioFollower(model)
    collected = collect_ratios(follower.model, [(batch, follower(batch)) for batch in batches])
    assert collected.rmse == pytest.approx(expected, abs=1e-6)


def test_rmse_does_not_depend_on_how_images_are_batched():
    model, batch = vit(), mixed_batches()[0]
    boxes = batch.target.boxes
    halves = [
        MixedBatch(
            batch.images[part], batch.mixed[part],
            MixedTarget.from_boxes(batch.target.classes[part], boxes[part], (SIZE, SIZE)),
        )
        for part in (slice(0, 4), slice(4, 8))
    ]  # fmt: skip
    assert target_rmse(model, halves) == pytest.approx(target_rmse(model, [batch]), abs=1e-7)


def test_reference_of_a_token_turned_part_of_the_way_is_that_part():
    generator = torch.Generator().manual_seed(0)
    own, partner = torch.linalg.qr(torch.randn(6, 2, generator=generator)).Q.T  # orthogonal, of length 1
    for part in (0.0, 0.3, 0.5, 1.0):
        angle = torch.tensor(part * math.pi / 2)
        token = angle.cos() * own + angle.sin() * partner
        # Lengths are of no account.
        assert similarity_ratio(3 * token, own, 5 * partner).item() == pytest.approx(part, abs=1e-3)
    assert similarity_ratio(own, own, own).isnan()
    assert similarity_ratio(own, own + 1e-6 * partner, own - 1e-6 * partner).isnan()


@pytest.mark.parametrize("build", [vit, lambda: swin(4), pvt], ids=["vit", "swin", "pvt"])
def test_reference_of_images_that_are_not_mixed_is_zero_and_of_their_partners_one(build):
    model, batch = build(), images(4)
    classes = torch.tensor([[0, 1]] * 4)
    for mixed, box, expected in ((batch, (0, 0, 0, 0), 0.0), (batch.flip(0), (0, 0, SIZE, SIZE), 1.0)):
        target = MixedTarget.from_boxes(classes, torch.tensor([[box]] * 4), (SIZE, SIZE))
        ratios = RatioFollower(model)(MixedBatch(batch, mixed, target))
        for reference, aligned, kept in zip(ratios.reference, ratios.aligned, ratios.kept, strict=True):
            assert reference.shape == aligned.shape == kept.shape
            # Sums of the batch are in another order than of the images alone.
            assert (reference - expected).abs().max() < 1e-3
            assert (aligned - expected).abs().max() < 1e-5
            assert (kept - expected).abs().max() < 1e-5


def test_ratios_of_a_layer_are_those_of_the_patched_model():
    model, batch = vit(), mixed_batches()[0]
    follower = RatioFollower(model)
    ratios = follower(batch)
    _, aligned = patch_model(copy.deepcopy(model))(batch.mixed, target=batch.target)
    _, transmix = patch_model(copy.deepcopy(model), method="transmix")(batch.mixed, target=batch.target)
    collected = collect_ratios(follower.model, [(batch, ratios)])
    torch.testing.assert_close(collected.aligned[:, -1].float(), aligned.ratio[:, 0])
    torch.testing.assert_close(collected.transmix.float(), transmix.ratio[:, 0])
    torch.testing.assert_close(collected.cutmix.float(), batch.target.ratio[:, 0])
    error = (ratios.aligned[1] - ratios.reference[1]).abs()[:, 1:, 0].mean(dim=1)  # the class token left out
    torch.testing.assert_close(collected.aligned_error[:, 1].float(), error)
    assert RatioFollower(swin(5))(batch).transmix is None


@pytest.mark.parametrize("build", [vit, lambda: swin(5)], ids=["vit", "swin"])
def test_single_tokens_start_inside_on_the_border_and_outside_of_the_box(build):
    model, batch = build(), images(2)
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]] * 2), torch.tensor([[[0, 0, 12, 12]]] * 2), (SIZE, SIZE))
    mixed = batch.clone()
    mixed[..., :12, :12] = batch.flip(0)[..., :12, :12]
    batch = MixedBatch(batch, mixed, target)
    follower = RatioFollower(model)
    _, paths = token_paths(follower.model, batch, follower(batch))
    inside, _, outside = paths.kept[:, 0].tolist()
    assert (inside, outside) == (1, 0)
    assert (paths.places[1] == 12 / SIZE).all()
    # Half of a token's label after a layer is what it had before; the order of the last layers is the attention's.
    assert paths.aligned[2, 0] < 0.5 < paths.aligned[0, 0]
    assert paths.aligned[:, -1].min() > 0 and paths.aligned[:, -1].max() < 1


def test_tokens_are_those_at_their_places_in_the_image_mixed_most_evenly():
    model, batch = vit(), images(2)
    boxes = torch.tensor([[[0, 0, 20, 18]], [[4, 12, 20, 20]]])
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]] * 2), boxes, (SIZE, SIZE))
    mixed = batch.clone()
    for image, partner, (y0, x0, y1, x1) in zip(mixed, batch.flip(0), boxes[:, 0].tolist(), strict=True):
        image[:, y0:y1, x0:x1] = partner[:, y0:y1, x0:x1]
    follower = RatioFollower(model)
    ratios = follower(MixedBatch(batch, mixed, target))
    index, paths = token_paths(follower.model, MixedBatch(batch, mixed, target), ratios)
    assert index == 1
    torch.testing.assert_close(paths.places, torch.tensor([[12, 16], [9, 12], [0, 0]], dtype=torch.float64) / SIZE)
    for values, layers in zip(paths[2:], ratios[:3], strict=True):
        maps = [share[1, 1:, 0].view(5, 5) for share in layers]
        expected = torch.stack([each[[3, 2, 0], [4, 3, 0]] for each in maps], dim=1)
        torch.testing.assert_close(values, expected.double())


@pytest.mark.parametrize(
    ("grids", "places", "expected"),
    [
        ([(27, 27), (14, 14), (7, 7)], (13, 26), [(13, 26), (6, 13), (3, 6)]),
        ([(28, 14), (14, 7), (7, 4), (4, 2)], (27, 13), [(27, 13), (13, 6), (6, 3), (3, 1)]),
    ],
)
def test_a_path_goes_on_with_the_token_that_one_is_merged_into(grids, places, expected):
    size = (8 * grids[0][0], 8 * grids[0][1])
    centre = [8 * place + 4 for place in places]
    box = torch.tensor([[[centre[0] - 1, centre[1] - 1, centre[0] + 1, centre[1] + 1]]])
    batch = MixedBatch(*[torch.zeros(1, 3, *size)] * 2, MixedTarget.from_boxes(torch.tensor([[0, 1]]), box, size))
    # Each token's number in the place of its label.
    layers = [torch.arange(rows * columns).view(1, rows, columns, 1) for rows, columns in grids]
    _, paths = token_paths(torch.nn.Identity(), batch, LayerRatios(layers, layers, layers, None, None))
    assert paths.aligned[0].tolist() == [
        row * columns + column for (row, column), (_, columns) in zip(expected, grids, strict=True)
    ]


def test_gathered_ratios_and_errors_are_those_of_their_column():
    model, batch = vit(), mixed_batches()[0]
    follower = RatioFollower(model)
    ratios = follower(batch)
    collected = collect_ratios(follower.model, [(batch, ratios)])
    torch.testing.assert_close(collected.reference[:, 1].float(), ratios.reference[1][:, 0, 0])
    error = (ratios.kept[1] - ratios.reference[1]).abs()[:, 1:, 0].mean(dim=1)
    torch.testing.assert_close(collected.kept_error[:, 1].float(), error)
    # A token that does not depend on the image yet counts in no mean.
    ratios.reference[1] = ratios.reference[1].clone()
    ratios.reference[1][:, 1] = math.nan
    error = (ratios.kept[1] - ratios.reference[1]).abs()[:, 2:, 0].mean(dim=1)
    collected = collect_ratios(follower.model, [(batch, ratios)])
    torch.testing.assert_close(collected.kept_error[:, 1].float(), error)
