"""Each strategy's masks are distributed as its paper says, and what it cannot do is an error."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, stats

from tlalign.mixing import AttentiveCutMix, BlockWise, FMix, RandomPatches, ResizeMix, SaliencyMix, TokenMix, saliency

pytestmark = pytest.mark.usefixtures("one_thread")

ACCEPT = 1e-4  # bound of a p-value at the fixed seeds
PATCH = 2
GRID = (14, 14)  # the papers' grid of patches, in pixels as small as can be


def draw_masks(strategy, count, image_size=(GRID[0] * PATCH, GRID[1] * PATCH)):
    """Draws through the public call, in mode elem; returns the masks (n, Hi, Wi) of bool, read off the pixels."""
    strategy.mode = "elem"
    images = torch.zeros(2 * count, 1, *image_size)
    images[count:] = 1
    mixed, target = strategy(images, torch.arange(2 * count))
    masks = mixed[:count, 0].bool()
    assert torch.equal(target.masks[:count, 0].bool(), masks)
    return masks.numpy()


def in_patches(masks):
    """Masks (n, h, w) of patches; asserts that each patch is of one image."""
    cells = masks.reshape(len(masks), GRID[0], PATCH, GRID[1], PATCH)
    assert np.array_equal(cells.all((2, 4)), cells.any((2, 4)))
    return cells.any((2, 4))


def parts(masks):
    """Number of connected parts of each mask."""
    return np.array([ndimage.label(mask)[1] for mask in masks])


# --- Patches -----------------------------------------------------------------------------------------------------


def test_random_patches_are_any_subset_of_a_uniform_size():
    masks = in_patches(draw_masks(RandomPatches(PATCH, seed=1), 4000)).reshape(4000, -1)
    patches = masks.shape[1]
    sizes = masks.sum(1)
    assert sizes.max() < patches
    assert stats.chisquare(np.bincount(sizes, minlength=patches)).pvalue > ACCEPT
    # Each patch, and each pair of patches, is in a subset of given size equally often: neighbours as well.
    by_patch = masks.sum(0)
    spread = math.sqrt((sizes / patches * (1 - sizes / patches)).sum())
    assert abs(by_patch - sizes.sum() / patches).max() < 5 * spread
    together = (masks[:, :-1] & masks[:, 1:]).sum(1)
    pairs = patches - 1
    expected = pairs * sizes * (sizes - 1) / (patches * (patches - 1))
    assert abs((together - expected).mean()) < 5 * (together - expected).std() / math.sqrt(len(masks))


def test_the_ratio_of_random_patches_follows_alpha():
    for alpha in (0.2, 5):
        ratio = in_patches(draw_masks(RandomPatches(PATCH, alpha, seed=2), 2000)).mean((1, 2))
        # The part is rounded down to whole patches: 1 / 392 on average.
        assert abs(ratio.mean() + 1 / 392 - 0.5) < 5 * ratio.std() / math.sqrt(2000)
        assert ratio.std() == pytest.approx(stats.beta(alpha, alpha).std(), rel=0.06)


def test_blocks_cover_what_was_drawn_and_no_more():
    strategy = BlockWise(PATCH, seed=3)
    masks = in_patches(draw_masks(strategy, 600))
    generator = BlockWise(PATCH, seed=3).generator
    generator.random(1200)  # whether each image is mixed
    wanted = np.floor(generator.beta(1, 1, size=1200)[:600] * masks[0].size)
    short = wanted - masks.sum((1, 2))
    assert short.min() >= 0
    assert short.mean() < 2 and (short == 0).mean() > 0.4, (short.mean(), (short == 0).mean())
    assert np.unique(wanted).size > 150


def test_blocks_hang_together_and_random_patches_do_not():
    blocks = in_patches(draw_masks(BlockWise(PATCH, seed=4), 500))
    random = in_patches(draw_masks(RandomPatches(PATCH, seed=4), 500))
    assert parts(blocks).mean() < 4 < 12 < parts(random).mean()
    largest = [np.bincount(ndimage.label(mask)[0].ravel())[1:].max(initial=0) for mask in blocks]
    assert np.mean(np.array(largest) >= np.minimum(16, blocks.sum((1, 2))) / 2) > 0.95


def test_the_sides_of_a_block_have_beit_s_distribution():
    strategy = BlockWise(seed=5)
    limit = 2000
    blocks = [strategy._draw_block(16**2, 100**2, (limit, limit)) for _ in range(3000)]
    height, width = np.array([[s.stop - s.start for s in block] for block in blocks]).T
    edge = -math.log(0.3)
    assert stats.kstest(np.log(height / width), stats.uniform(-edge, 2 * edge).cdf).pvalue > ACCEPT
    assert stats.kstest(height * width, stats.uniform(16**2, 100**2 - 16**2).cdf).pvalue > ACCEPT
    start = np.array([block[0].start for block in blocks]) / (limit - height)
    assert stats.kstest(start, "uniform").pvalue > ACCEPT


def test_the_least_block_is_in_proportion_to_the_grid_unless_it_is_given():
    # Half of 14 x 14 patches in one block of at least 98, in blocks of at least 16, or of single patches.
    one, usual, single = (
        parts(in_patches(draw_masks(BlockWise(PATCH, alpha=1e6, min_patches=least, seed=6), 200)))
        for least in (98, None, 1)
    )
    assert one.mean() < usual.mean() < single.mean()


def test_tokenmix_takes_half_of_the_tokens_in_several_regions():
    masks = in_patches(draw_masks(TokenMix(PATCH, seed=7), 500))
    sizes = masks.sum((1, 2))
    assert sizes.max() <= 98 and sizes.mean() > 95
    assert (parts(masks) > 1).mean() > 0.4
    assert parts(masks).mean() < 5
    same = draw_masks(TokenMix(PATCH, min_patches=14, seed=7), 500)
    assert (in_patches(same) == masks).all()
    quarter = in_patches(draw_masks(TokenMix(PATCH, ratio=0.25, seed=7), 200)).sum((1, 2))
    assert quarter.max() <= 49 and quarter.mean() > 47


@pytest.mark.parametrize("make", [RandomPatches, BlockWise, TokenMix])
def test_every_patch_of_a_small_grid_is_reached(make):
    masks = draw_masks(make(4, seed=8), 400, (20, 20))
    assert masks.mean(0).min() > 0.2
    assert masks.mean() == pytest.approx(0.5, abs=0.1)


# --- F-Mix -------------------------------------------------------------------------------------------------------


def test_fourier_masks_have_a_uniform_ratio_and_few_parts():
    masks = draw_masks(FMix(seed=9), 1500, (32, 28))
    ratio = masks.mean((1, 2))
    assert stats.kstest(ratio, "uniform").pvalue > ACCEPT
    assert masks.mean(0).std() < 0.05  # no place is preferred
    assert parts(masks[:300]).mean() < 3
    assert parts(draw_masks(FMix(decay=0, seed=9), 50, (32, 28))).mean() > 20


def test_the_ratio_of_fourier_masks_follows_alpha():
    for alpha in (0.2, 5):
        ratio = draw_masks(FMix(alpha=alpha, seed=10), 1500, (16, 16)).mean((1, 2))
        assert ratio.std() == pytest.approx(stats.beta(alpha, alpha).std(), rel=0.06)
        assert ratio.mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(("decay", "height"), [(2.0, 32), (3.0, 32), (3.0, 64)])
def test_the_spectrum_of_fourier_masks_falls_by_its_power(decay, height):
    strategy = FMix(decay=decay, seed=11)
    power = np.mean([np.abs(np.fft.rfft2(strategy._draw_grey((height, 32)))) ** 2 for _ in range(300)], axis=0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(32)[None, :])
    inner = np.zeros_like(frequency, dtype=bool)
    inner[:, 1:-1] = True  # of the outer columns the inverse keeps half
    slope = stats.linregress(np.log(frequency[inner]), np.log(power[inner])).slope
    assert slope == pytest.approx(-2 * decay, abs=0.1)


# --- ResizeMix ---------------------------------------------------------------------------------------------------


def test_scales_and_places_of_resized_partners_are_uniform():
    boxes = ResizeMix(seed=12)._draw(5000, (3000, 2000))
    side, start = boxes[:, 2:] - boxes[:, :2], boxes[:, :2]
    assert abs(side[:, 0] - 1.5 * side[:, 1]).max() <= 1.5  # the partner keeps its shape
    assert stats.kstest(side[:, 0] / 3000, stats.uniform(0.1, 0.7).cdf).pvalue > ACCEPT
    for axis, limit in enumerate((3000, 2000)):
        assert stats.kstest(start[:, axis] / (limit - side[:, axis]), "uniform").pvalue > ACCEPT
    few = ResizeMix(scale=(0.5, 0.5), seed=12)._draw(100, (4, 4))
    assert set(few[:, 0]) == set(few[:, 1]) == {0, 1, 2}
    ratio = side.prod(1) / 6e6
    assert ratio.mean() == pytest.approx((0.8**3 - 0.1**3) / 2.1, abs=5 * ratio.std() / math.sqrt(5000))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_partner_is_pasted_resized(mode, dtype):
    images = torch.rand(5, 3, 24, 18).to(dtype)
    mixed, target = ResizeMix(mode=mode, seed=13)(images, torch.arange(5))
    for index, (y0, x0, y1, x1) in enumerate(target.boxes[:, 0].tolist()):
        expected = images[index].clone()
        if index != 2:
            size = (y1 - y0, x1 - x0)
            small = F.interpolate(images[4 - index][None].float(), size, mode="bilinear", antialias=True)
            expected[:, y0:y1, x0:x1] = small[0].to(dtype)
        torch.testing.assert_close(mixed[index], expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.01)


def test_a_partner_is_never_resized_to_nothing():
    mixed, target = ResizeMix(scale=(0.01, 0.02))(torch.rand(2, 3, 8, 8), torch.arange(2))
    assert torch.equal(target.ratio, torch.full((2, 1), 1 / 64))
    assert torch.isfinite(mixed).all()


# --- SaliencyMix -------------------------------------------------------------------------------------------------


def known_peaks(monkeypatch, peaks, image_size):
    """Makes `SaliencyMix` find given peaks (B, 2), and need no OpenCV."""
    maps = np.zeros((len(peaks), *image_size), dtype=np.float32)
    maps[np.arange(len(peaks)), peaks[:, 0], peaks[:, 1]] = 1
    monkeypatch.setattr(saliency, "_opencv", lambda: None)
    monkeypatch.setattr(saliency, "static_saliency", lambda images: maps)


def test_boxes_lie_around_the_peak_of_the_partner_with_cutmix_s_sizes(monkeypatch):
    count, image_size = 3000, (24, 20)
    peaks = np.random.default_rng(0).integers(0, image_size, size=(count, 2))
    known_peaks(monkeypatch, peaks, image_size)
    strategy = SaliencyMix(mode="elem", seed=14)
    target = strategy(torch.zeros(count, 1, *image_size), torch.arange(count))[1]
    boxes = target.boxes[:, 0].numpy()
    centre = peaks[::-1]
    assert ((boxes[:, :2] <= centre) & (centre <= boxes[:, 2:])).all()
    generator = SaliencyMix(seed=14).generator
    generator.random(count)  # whether each image is mixed
    side = (np.array(image_size) * np.sqrt(generator.beta(1, 1, size=count))[:, None]).astype(int)
    assert np.array_equal(boxes[:, :2], (centre - side // 2).clip(0))
    assert np.array_equal(boxes[:, 2:], np.minimum(centre + (side + 1) // 2, image_size))


def test_one_draw_of_mode_batch_gives_each_image_a_place_of_its_own(monkeypatch):
    # No box of this seed reaches the border, which would cut it off.
    peaks = np.array([[40, 40], [40, 60], [60, 40], [60, 60]])
    known_peaks(monkeypatch, peaks, (100, 100))
    target = SaliencyMix(seed=3)(torch.zeros(4, 1, 100, 100), torch.arange(4))[1]
    boxes = target.boxes[:, 0]
    assert len((boxes[:, 2:] - boxes[:, :2]).unique(dim=0)) == 1 and len(boxes.unique(dim=0)) == 4


def test_opencv_s_saliency_finds_what_stands_out():
    pytest.importorskip("cv2")
    places = np.array([[20, 30], [45, 50], [70, 40]])
    images = torch.full((3, 3, 96, 96), 0.3)
    for image, (row, column) in zip(images, places, strict=True):
        image[:, row - 3 : row + 3, column - 3 : column + 3] = 0.9
    images = (images - 0.45) / 0.22
    for channels in (3, 1):
        maps = saliency.static_saliency(images[:, :channels])
        assert maps.shape == (3, 96, 96) and maps.dtype == np.float32
        peaks = np.stack(np.unravel_index(maps.reshape(3, -1).argmax(1), (96, 96)), axis=1)
        # The method blurs: its peak is near the patch, not always on it.
        assert (abs(peaks - places) <= 12).all(), peaks
    assert saliency.static_saliency(torch.full((1, 3, 8, 8), 0.3)).max() == 0


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tlalign-kernels\[saliency\]'"):
        SaliencyMix()
    # OpenCV without its contributed modules has no saliency.
    monkeypatch.setitem(sys.modules, "cv2", object())
    with pytest.raises(ModuleNotFoundError, match="contributed modules"):
        SaliencyMix()


# --- Attentive CutMix --------------------------------------------------------------------------------------------


def test_the_most_active_cells_of_the_partner_are_pasted():
    activation = torch.rand(4, 7, 7)
    images = torch.randn(4, 3, 28, 28)
    mixed, target = AttentiveCutMix(lambda given: activation)(images, torch.arange(4))
    torch.testing.assert_close(target.ratio, torch.full((4, 1), 6 / 49))
    share = target.token_share((7, 7), (4, 4))[..., 0]
    for index in range(4):
        cells = activation[3 - index].flatten()
        assert set(share[index].nonzero()[:, 0].tolist()) == set(cells.topk(6).indices.tolist())
    mask = target.masks.bool()
    assert torch.equal(mixed, torch.where(mask, images.flip(0), images))


def test_cells_need_not_divide_the_image():
    target = AttentiveCutMix(lambda images: torch.rand(2, 3, 3), count=2)(torch.rand(2, 3, 20, 20), torch.arange(2))[1]
    assert set(target.masks.sum((1, 2, 3)).int().tolist()) <= {6 * 7 + 7 * 7, 2 * 49, 6 * 6 + 7 * 7, 2 * 42, 42 + 36}


# --- Errors ------------------------------------------------------------------------------------------------------

IMAGES, CLASSES = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (RandomPatches, {"patch_size": 0}, ValueError, "patch_size: expected at least 1, got 0"),
        (RandomPatches, {"patch_size": 4.0}, TypeError, "patch_size: expected an int, got float"),
        (RandomPatches, {"alpha": 0}, ValueError, "alpha: expected more than 0"),
        (BlockWise, {"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        (BlockWise, {"min_patches": 0}, ValueError, "min_patches: expected at least 1, got 0"),
        (BlockWise, {"min_patches": 2.0}, TypeError, "min_patches: expected None or an int, got float"),
        (BlockWise, {"min_aspect": 0}, ValueError, "min_aspect: expected more than 0 and at most 1, got 0"),
        (TokenMix, {"ratio": 1}, ValueError, "ratio: expected a number between 0 and 1, got 1"),
        (FMix, {"alpha": float("nan")}, ValueError, "alpha"),
        (FMix, {"decay": -1}, ValueError, "decay: expected a finite number of at least 0, got -1"),
        (ResizeMix, {"scale": 0.5}, TypeError, "scale: expected a sequence of two numbers, got float"),
        (ResizeMix, {"scale": (0.8, 0.1)}, ValueError, r"scale: expected \(least, greatest\)"),
        (ResizeMix, {"scale": (0, 0.5)}, ValueError, "scale"),
        (AttentiveCutMix, {}, TypeError, "activation: expected a callable.*got NoneType; no weights are shipped"),
        (AttentiveCutMix, {"activation": len, "count": 0}, ValueError, "count: expected at least 1, got 0"),
        (AttentiveCutMix, {"activation": len, "count": 1.5}, TypeError, "count: expected an int, got float"),
    ],
)
def test_bad_arguments_are_named(make, options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


@pytest.mark.parametrize("make", [RandomPatches, BlockWise, TokenMix])
@pytest.mark.parametrize("patch_size", [3, 8, 16])
def test_images_that_are_not_several_patches_are_refused(make, patch_size):
    with pytest.raises(ValueError, match=rf"patch_size: expected a divisor of .*, got {patch_size} for images of"):
        make(patch_size)(IMAGES, CLASSES)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((4, 16), r"activation: expected maps of shape \(4, h, w\), got \(4, 16\)"),
        ((3, 4, 4), r"activation: expected maps of shape \(4, h, w\), got \(3, 4, 4\)"),
        ((4, 9, 4), r"activation: expected at most one cell a pixel of \(8, 8\), got \(9, 4\) cells"),
        ((4, 2, 3), "count: expected fewer than the 6 cells of a map, got 6"),
    ],
)
def test_maps_of_a_wrong_size_are_refused(shape, match):
    with pytest.raises(ValueError, match=match):
        AttentiveCutMix(lambda images: torch.rand(shape))(IMAGES, CLASSES)


def test_resizing_integer_images_is_refused():
    with pytest.raises(TypeError, match="images: expected a floating dtype for ResizeMix, which averages pixels"):
        ResizeMix()(IMAGES.byte(), CLASSES)
