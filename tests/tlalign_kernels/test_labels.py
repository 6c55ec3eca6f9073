"""MixedTarget and the label algebra against pixels, loops and timm."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlalign_kernels import MixedTarget, labels
from tlalign_kernels.labels import gather_share, residual_share


@st.composite
def boxed_images(draw, sources):
    """Image size, patch size and a batch of boxes (B, S, 4), empty and whole-image boxes included."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    patch = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    if draw(st.booleans()):  # axes that are alike are computed together
        width, patch = height, (patch[0], patch[0])

    def interval(size):
        return sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))

    boxes = []
    for _ in range(draw(st.integers(1, 3)) * sources):
        (y0, y1), (x0, x1) = interval(height), interval(width)
        boxes.append([y0, x0, y1, x1])
    return (height, width), patch, torch.tensor(boxes).view(-1, sources, 4)


def painted(boxes, size):
    """Masks (B, S, Hi, Wi) by painting the boxes over each other in order."""
    batch, sources, _ = boxes.shape
    masks = torch.zeros(batch, sources, *size, dtype=torch.float64)
    for image in range(batch):
        for source, (y0, x0, y1, x1) in enumerate(boxes[image].tolist()):
            masks[image, :, y0:y1, x0:x1] = 0
            masks[image, source, y0:y1, x0:x1] = 1
    return masks


def pooled(masks, patch):
    """Means over cells of `patch` pixels, cells at the border counting the pixels that are there: (B, tokens, S)."""
    columns = [
        masks[:, :, y : y + patch[0], x : x + patch[1]].mean(dim=(2, 3))
        for y in range(0, masks.shape[2], patch[0])
        for x in range(0, masks.shape[3], patch[1])
    ]
    return torch.stack(columns, dim=1)


def classes_of(boxes):
    return torch.arange(boxes.shape[0] * (boxes.shape[1] + 1)).view(boxes.shape[0], -1)


@pytest.mark.parametrize("sources", [1, 3])
def test_box_share_is_the_part_of_the_pixels_of_a_cell(sources):
    @given(boxed_images(sources))
    def check(problem):
        size, patch, boxes = problem
        target = MixedTarget.from_boxes(classes_of(boxes), boxes, size)
        masks = painted(boxes, size)
        grid = (-(-size[0] // patch[0]), -(-size[1] // patch[1]))
        torch.testing.assert_close(
            target.token_share(grid, patch, torch.float64), pooled(masks, patch), rtol=0, atol=1e-14
        )
        torch.testing.assert_close(target.image_share(torch.float64), masks.mean(dim=(2, 3)), rtol=0, atol=1e-14)
        torch.testing.assert_close(target.ratio, masks.mean(dim=(2, 3)).float())

    check()


@given(boxed_images(2))
def test_masks_give_the_share_that_boxes_give(problem):
    size, patch, boxes = problem
    grid = (-(-size[0] // patch[0]), -(-size[1] // patch[1]))
    by_boxes = MixedTarget.from_boxes(classes_of(boxes), boxes, size)
    by_masks = MixedTarget.from_masks(classes_of(boxes), painted(boxes, size))
    torch.testing.assert_close(
        by_masks.token_share(grid, patch, torch.float64), by_boxes.token_share(grid, patch, torch.float64)
    )
    torch.testing.assert_close(by_masks.ratio.float(), by_boxes.ratio)


def test_patch_with_both_images_gets_its_fraction():
    target = MixedTarget.from_boxes(torch.tensor([[3, 7]]), torch.tensor([[[0, 0, 8, 12]]]), (16, 16))
    assert target.token_share((2, 2), (8, 8)).flatten().tolist() == [1.0, 0.5, 0.0, 0.0]
    assert target.ratio.item() == 8 * 12 / 256


def test_ratio_is_the_share_everywhere():
    ratio = torch.tensor([[0.3], [0.8]])
    target = MixedTarget.from_ratio(torch.tensor([[0, 1], [2, 3]]), ratio)
    assert torch.equal(target.token_share((2, 3), (16, 16)), ratio[:, None].expand(-1, 6, -1))
    assert torch.equal(target.ratio, ratio)


def test_dense_labels_are_pooled_to_the_grid():
    labels = torch.rand(2, 5, 4, 6, dtype=torch.float64)
    labels /= labels.sum(1, keepdim=True)
    target = MixedTarget.from_dense(labels)
    expected = labels.view(2, 5, 2, 2, 3, 2).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(target.token_share((2, 3), (8, 8), torch.float64), expected)
    torch.testing.assert_close(target.image_share(torch.float64), labels.mean(dim=(2, 3)))
    for grid_size in ((3, 3), (2, 4)):
        with pytest.raises(ValueError, match="token_labels: expected a map of"):
            target.token_share(grid_size, (8, 8))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_to_dense_is_the_target_of_timm(smoothing):
    own = torch.randint(0, 12, (6,))
    ratio = 0.3125
    target = MixedTarget.from_ratio(torch.stack((own, own.flip(0)), 1), torch.full((6, 1), ratio))
    expected = mixup_target(own, 12, lam=1 - ratio, smoothing=smoothing)
    torch.testing.assert_close(target.to_dense(12, smoothing), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_distributions_may_be_rounded_to_16_bits(dtype):
    labels = torch.randn(2, 1000, 4, 4).mul(3).softmax(dim=1)
    dense = MixedTarget.from_dense(labels.to(dtype)).to_dense(1000)
    torch.testing.assert_close(dense, labels.mean(dim=(2, 3)), rtol=0, atol=float(torch.finfo(dtype).eps))
    MixedTarget.from_masks(torch.zeros(2, 3, dtype=torch.int64), torch.rand(2, 3, 8, 8).softmax(dim=1)[:, :2].to(dtype))
    with pytest.raises(ValueError, match="token_labels: expected sums of 1"):
        MixedTarget.from_dense(labels.to(dtype) * 1.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_labels_of_16_bits_are_averaged_in_float32(dtype):
    masks = torch.tensor([1.0, 0.0, 0.0], dtype=dtype).expand(1, 1, 3, 3)
    assert MixedTarget.from_ratio(torch.tensor([[0, 1]]), masks[:, :, 0, 0]).ratio.dtype == torch.float32
    assert MixedTarget.from_masks(torch.tensor([[0, 1]]), masks).ratio.item() == torch.tensor(1 / 3).item()
    target = MixedTarget.from_dense(torch.cat((masks, 1 - masks), dim=1))
    parts = torch.tensor([[1 / 3, 2 / 3]])
    torch.testing.assert_close(target.image_share(), parts)
    torch.testing.assert_close(target.token_share((1, 1), (16, 16)), parts[:, None])
    assert target.token_share((3, 3), (16, 16)).dtype == torch.float32


def test_dense_labels_have_no_sources():
    with pytest.raises(ValueError, match="target: expected one of sources, got dense labels"):
        MixedTarget.from_dense(torch.full((1, 4, 2, 2), 0.25)).source_weights()


def test_to_dense_adds_up_a_class_that_comes_twice():
    target = MixedTarget.from_ratio(torch.tensor([[4, 4, 1]]), torch.tensor([[0.5, 0.125]]))
    assert target.to_dense(5).tolist() == [[0.0, 0.125, 0.0, 0.0, 0.875]]


def test_residual_is_the_mean_over_all_paths():
    share, first, second = torch.rand(3, 2, 5, 1).unbind(0)
    torch.testing.assert_close(residual_share(share, first), (share + first) / 2)
    torch.testing.assert_close(residual_share(share, first, second), (share + first + second) / 3)


def test_gather_keeps_prefix_tokens_and_follows_the_kept_patches():
    share = torch.arange(12.0).view(2, 6, 1)
    kept = torch.tensor([[3, 0], [1, 2]])
    assert gather_share(share, kept, num_prefix_tokens=2)[..., 0].tolist() == [[0, 1, 5, 2], [6, 7, 9, 10]]


def test_a_ratio_has_the_precision_of_its_masks():
    masks = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    ratio = MixedTarget.from_masks(torch.zeros(2, 2, dtype=torch.int64), masks).ratio
    assert torch.equal(ratio, masks.mean(dim=(2, 3)))


def test_dense_labels_of_no_images_are_accepted():
    assert MixedTarget.from_dense(torch.zeros(0, 5, 2, 2)).to_dense(5).shape == (0, 5)


def test_dense_labels_in_float64_stay_in_it():
    labels = torch.rand(2, 5, 2, 2, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(MixedTarget.from_dense(labels).to_dense(5), labels.mean(dim=(2, 3)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_labels_are_float32_beside_fewer_bits_and_float64_where_it_is_asked_for(given):
    classes, ratio = torch.tensor([[0, 1]]), torch.full((1, 1), 0.25, dtype=given)
    for target in (
        MixedTarget.from_ratio(classes, ratio),
        MixedTarget.from_masks(classes, ratio.expand(1, 1, 4, 4)),
        MixedTarget.from_dense(torch.full((1, 4, 2, 2), 0.25, dtype=given)),
    ):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            wanted = torch.promote_types(dtype, torch.float32)
            assert target.image_share(dtype).dtype == target.token_share((2, 2), (2, 2), dtype).dtype == wanted


def test_dense_labels_are_pooled_over_cells_that_are_no_squares():
    labels = torch.rand(1, 3, 4, 6, dtype=torch.float64).softmax(dim=1)
    share = MixedTarget.from_dense(labels).token_share((2, 2), (8, 8), torch.float64)
    torch.testing.assert_close(share.unflatten(1, (2, 2)).permute(0, 3, 1, 2), F.avg_pool2d(labels, (2, 3)))


def test_a_grid_may_leave_out_the_last_cells_of_an_image():
    boxes = torch.tensor([[[0, 0, 8, 12], [4, 4, 20, 20]]])
    target = MixedTarget.from_boxes(torch.tensor([[0, 1, 2]]), boxes, (20, 20))
    whole = target.token_share((3, 3), (8, 8)).unflatten(1, (3, 3))
    assert torch.equal(target.token_share((2, 2), (8, 8)), whole[:, :2, :2].flatten(1, 2))


def test_last_cells_of_images_that_are_no_squares_count_their_real_pixels():
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[0, 0, 18, 17]]]), (20, 24))
    assert target.token_share((3, 3), (8, 8)).view(3, 3)[2].tolist() == [0.5, 0.5, 0.0625]


def test_cells_of_other_sides_may_be_as_many_along_both_axes():
    target = MixedTarget.from_boxes(torch.tensor([[0, 1]]), torch.tensor([[[0, 0, 8, 6]]]), (16, 16))
    assert target.token_share((2, 2), (8, 12)).view(2, 2).tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_values_are_not_looked_at_on_an_accelerator():
    with torch.device("meta"):
        classes = torch.zeros(2, 2, dtype=torch.int64)
        targets = (
            MixedTarget.from_boxes(classes, torch.zeros(2, 1, 4, dtype=torch.int64), (16, 16)),
            MixedTarget.from_masks(classes, torch.zeros(2, 1, 16, 16)),
            MixedTarget.from_ratio(classes, torch.zeros(2, 1)),
            MixedTarget.from_dense(torch.zeros(2, 5, 2, 2)),
        )
    assert all(target.to_dense(5).shape == (2, 5) for target in targets)


def test_moving_keeps_dtypes():
    target = MixedTarget.from_boxes(torch.tensor([[3, 7]]), torch.tensor([[[0, 0, 8, 12]]]), (16, 16)).to("meta")
    assert (target.device.type, target.classes.dtype, target.boxes.dtype) == ("meta", torch.int64, torch.int64)
    assert (target.ratio.device.type, target.ratio.dtype) == ("meta", torch.float32)


def test_loaders_pin_all_tensors(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    classes, masks = torch.tensor([[3, 7]]), torch.rand(1, 1, 8, 8)
    target = MixedTarget.from_masks(classes, masks)
    pinned = target.with_share(target.ratio, [masks]).pin_memory()
    assert pinned.classes.tolist() == [[4, 8]] and torch.equal(pinned.ratio, target.ratio + 1)
    assert torch.equal(pinned.layer_shares[0], masks + 1)
    assert torch.equal(target.pin_memory().masks, masks + 1) and target.pin_memory().image_size == (8, 8)
    assert torch.equal(
        MixedTarget.from_dense(torch.ones(1, 1, 2, 2)).pin_memory().token_labels, torch.full((1, 1, 2, 2), 2.0)
    )


def pair(**changes):
    arguments = {"classes": torch.tensor([[0, 1], [2, 3]]), **changes}
    return arguments


BAD_TARGETS = [
    ("from_ratio", pair(classes=[[0, 1]], ratio=torch.rand(1, 1)), TypeError, "classes: expected a tensor, got list"),
    ("from_ratio", pair(classes=torch.rand(2, 2), ratio=torch.rand(2, 1)), TypeError, "classes: expected torch.int64"),
    (
        "from_ratio",
        pair(classes=torch.tensor([0, 1]), ratio=torch.rand(2, 1)),
        ValueError,
        r"classes: .* \(B, S \+ 1\)",
    ),
    ("from_ratio", pair(classes=torch.tensor([[0], [1]]), ratio=torch.rand(2, 1)), ValueError, "S of at least 1"),
    ("from_ratio", pair(classes=torch.tensor([[0, -1], [0, 1]]), ratio=torch.rand(2, 1)), ValueError, "classes: .* -1"),
    ("from_ratio", pair(ratio=torch.tensor([[0], [1]])), TypeError, "ratio: expected a floating dtype"),
    ("from_ratio", pair(ratio=torch.rand(2, 2)), ValueError, r"ratio: expected shape \(2, 1\), got \(2, 2\)"),
    ("from_ratio", pair(ratio=torch.tensor([[0.5], [1.5]])), ValueError, "ratio: expected sums of at most 1"),
    ("from_ratio", pair(ratio=torch.tensor([[0.5], [-0.5]])), ValueError, "ratio: expected values of at least 0"),
    ("from_ratio", pair(ratio=torch.rand(2, 1, device="meta")), ValueError, "ratio: expected on the device of classes"),
    ("from_ratio", pair(ratio=torch.tensor([[0.5], [torch.nan]])), ValueError, "ratio: expected finite values"),
    ("from_boxes", pair(boxes=torch.zeros(2, 1, 4), image_size=(8, 8)), TypeError, "boxes: expected torch.int64"),
    ("from_boxes", pair(boxes=torch.zeros(2, 4).long(), image_size=(8, 8)), ValueError, "boxes: expected shape"),
    ("from_boxes", pair(boxes=torch.tensor([[[0, 0, 9, 4]]] * 2), image_size=(8, 8)), ValueError, "boxes: .*9, 4"),
    ("from_boxes", pair(boxes=torch.tensor([[[5, 0, 4, 4]]] * 2), image_size=(8, 8)), ValueError, "boxes: .*5, 0"),
    ("from_boxes", pair(boxes=torch.tensor([[[-1, 0, 4, 4]]] * 2), image_size=(8, 8)), ValueError, "boxes: .*-1, 0"),
    (
        "from_boxes",
        pair(boxes=torch.zeros(2, 1, 4, device="meta").long(), image_size=(8, 8)),
        ValueError,
        r"boxes: expected on the device of classes \(cpu\), got meta",
    ),
    ("from_boxes", pair(boxes=torch.zeros(2, 1, 4).long(), image_size=(8,)), ValueError, "image_size: expected two"),
    ("from_boxes", pair(boxes=torch.zeros(2, 1, 4).long(), image_size=(8, 0)), ValueError, "image_size: expected two"),
    ("from_boxes", pair(boxes=torch.zeros(2, 1, 4).long(), image_size=8), ValueError, "image_size: .*two.*got 8"),
    ("from_masks", pair(masks=torch.ones(2, 1, 4).long()), TypeError, "masks: expected a floating dtype"),
    ("from_masks", pair(masks=torch.ones(2, 2, 4, 4)), ValueError, r"masks: expected shape \(2, 1, Hi, Wi\)"),
    ("from_masks", pair(masks=torch.full((2, 1, 4, 4), 2.0)), ValueError, "masks: expected sums of at most 1"),
    ("from_masks", pair(masks=2 * torch.eye(4).expand(2, 1, 4, 4)), ValueError, "masks: expected sums of at most 1"),
    ("from_masks", pair(masks=torch.ones(2, 1, 4, 4, device="meta")), ValueError, "masks: expected on the device of"),
    ("from_masks", pair(masks=torch.full((2, 1, 4, 4), torch.inf)), ValueError, "masks: expected finite values"),
    ("from_masks", pair(masks=torch.ones(2, 1, 0, 4)), ValueError, "masks: expected at least one pixel or token"),
    ("from_dense", {"token_labels": torch.ones(2, 5, 3, 0)}, ValueError, "token_labels: expected at least one pixel"),
    ("from_dense", {"token_labels": torch.rand(2, 5)}, ValueError, "token_labels: expected shape"),
    ("from_dense", {"token_labels": torch.full((2, 5, 2, 2), 0.1)}, ValueError, "token_labels: expected sums of 1 "),
]


@pytest.mark.parametrize(("constructor", "arguments", "error", "message"), BAD_TARGETS)
def test_bad_targets_are_refused(constructor, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(MixedTarget, constructor)(**arguments)


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (0.5, TypeError, "share: expected a tensor, got float"),
        (torch.ones(2, 1, dtype=torch.int64), TypeError, "share: expected a floating dtype"),
        (torch.rand(2, 3), ValueError, r"share: expected shape \(2, 1\), got \(2, 3\)"),
        (torch.rand(3, 1), ValueError, r"share: expected shape \(2, 1\), got \(3, 1\)"),
    ],
)
def test_a_share_that_is_not_of_the_target_is_refused(share, error, message):
    target = MixedTarget.from_ratio(**pair(ratio=torch.rand(2, 1)))
    with pytest.raises(error, match=message):
        target.with_share(share)
    dense = MixedTarget.from_dense(torch.full((2, 5, 1, 1), 0.2))
    with pytest.raises(error, match=message.replace("1", "5", 1) if error is ValueError else message):
        dense.with_share(share)


def test_a_target_is_moved_to_devices_only():
    with pytest.raises(TypeError, match=r"device: expected a device, for labels keep their dtype, got torch\.float64"):
        MixedTarget.from_ratio(**pair(ratio=torch.rand(2, 1))).to(torch.float64)


def test_class_ids_are_checked_against_the_number_of_classes():
    target = MixedTarget.from_ratio(torch.tensor([[0, 9]]), torch.tensor([[0.5]]))
    assert target.validate(10) is target
    with pytest.raises(ValueError, match="classes: expected ids of at least 0 and below 9, got ids from 0 to 9"):
        target.validate(9)
    with pytest.raises(ValueError, match="below 9"):
        target.to_dense(9)
    with pytest.raises(ValueError, match="token_labels: expected 9 classes, got 5"):
        MixedTarget.from_dense(torch.full((1, 5, 2, 2), 0.2)).to_dense(9)


def test_grid_must_lie_on_the_image():
    target = MixedTarget.from_boxes(torch.tensor([[3, 7]]), torch.tensor([[[0, 0, 8, 12]]]), (16, 16))
    with pytest.raises(ValueError, match="grid_size"):
        target.token_share((4, 2), (8, 8))


def test_a_cell_has_a_pixel_at_least():
    target = MixedTarget.from_boxes(torch.tensor([[3, 7]]), torch.tensor([[[0, 0, 8, 12]]]), (16, 16))
    with pytest.raises(ValueError, match="grid_size"):
        target.token_share((3, 2), (8, 8))


def test_smoothing_is_checked():
    with pytest.raises(ValueError, match="smoothing"):
        MixedTarget.from_ratio(torch.tensor([[0, 9]]), torch.tensor([[0.5]])).to_dense(10, smoothing=1.5)


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"{func}: no float64 here")
        return result


def test_targets_need_no_float64_where_a_device_has_none(monkeypatch):
    classes, boxes = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[[3, 0, 20, 17]], [[0, 0, 0, 0]]])
    pair = torch.tensor([[0, 1, 2], [1, 2, 3]]), boxes.repeat(1, 2, 1)
    dense = torch.rand(2, 4, 5, 5).softmax(dim=1)

    def state():
        targets = (
            MixedTarget.from_boxes(classes, boxes, (30, 24)),
            MixedTarget.from_boxes(*pair, (30, 24)),
            MixedTarget.from_masks(classes, torch.rand(2, 1, 30, 24, generator=torch.Generator().manual_seed(0))),
            MixedTarget.from_ratio(classes, torch.tensor([[0.3], [0.9]])),
            MixedTarget.from_dense(dense),
        )
        return [(each.to_dense(4), each.token_share((5, 5), (7, 5))) for each in targets]

    expected = state()
    with WithoutFloat64():
        with pytest.raises(TypeError, match="no float64"):
            state()
        monkeypatch.setattr(labels, "_WITHOUT_FLOAT64", ("cpu",))
        torch.testing.assert_close(state(), expected)
