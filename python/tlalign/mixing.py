"""Mixing of a batch: each strategy takes images and classes and returns the mixed images and their `MixedTarget`.

A strategy is a callable, `mixed_images, target = strategy(images, classes)`. It draws from a generator of its own and
so never from numpy's or torch's global state: `seed=` and `reseed(seed, step, rank)` decide everything it does. The
partner of an image is its mirror in the batch (`images.flip(0)`), as in `timm.data.Mixup`, whose parameters and
distributions are kept. Two of timm's parameters are missing on purpose: `correct_lam=False` would label a box cut off
by the border with the area it was meant to have, but a token's label is the share of each image in the token's
pixels, so that the ratio has to be the area that was really pasted; and `label_smoothing` and `num_classes` belong to
the loss (or to `MixedTarget.to_dense`), since a `MixedTarget` needs neither.

Letters in shapes: B images in the batch, C channels here, Hi x Wi pixels, n draws.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tlalign_kernels.labels import MixedTarget, box_masks

Mode = Literal["batch", "pair", "elem"]
MODES = ("batch", "pair", "elem")

# Added to the seed, so that another generator made of the same seed, step and rank (augmentation, say) is independent.
_STREAM = int.from_bytes(b"mix", "big")


class MixingStrategy(ABC):
    """What all strategies share: arguments, their generator, who is mixed with whom, and checks of the input.

    A subclass implements `_mix` (or `_draw` of `BoxStrategy`) and draws from `self.generator` only.

    Args:
        prob: Probability that a draw mixes at all. May be set between calls, such as to 0 for the last epochs.
        mode: What one draw is for: the whole `batch`, a `pair` (image i and its mirror image B - 1 - i, which swap
            the same region), or one image (`elem`).
        seed: Seed of the generator, see `reseed`.
    """

    averages_pixels = False  # whether it needs images of a floating dtype

    def __init__(self, prob: float = 1.0, mode: Mode = "batch", seed: int = 0) -> None:
        check_probability("prob", prob)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.prob = float(prob)
        self.mode = mode
        self.reseed(seed)

    def reseed(self, seed: int, step: int = 0, rank: int = 0) -> None:
        """Starts the generator anew; what follows depends on these three numbers only.

        Called with the step and the rank before each batch, it makes a resumed run repeat without any saved state and
        gives each rank draws of its own.

        Args:
            seed: Seed of the run, >= 0.
            step: Number of the batch, >= 0.
            rank: Rank of the process, >= 0.
        """
        for name, value in (("seed", seed), ("step", step), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        # A spawn key, not more entropy: numpy pads entropy with zeros, so that seeds [1] and [1, 0] would be the same.
        sequence = np.random.SeedSequence(int(seed), spawn_key=(_STREAM, int(step), int(rank)))
        self.generator = np.random.Generator(np.random.PCG64(sequence))

    def __call__(self, images: Tensor, classes: Tensor) -> tuple[Tensor, MixedTarget]:
        """Mixes each image with its mirror image in the batch.

        In an odd batch the image in the middle is its own partner: it stays as it is, with a mixing ratio of 0.

        Args:
            images: (B, C, Hi, Wi) with B >= 2, on any device; not modified. MixUp needs a floating dtype.
            classes: (B,) int64, on the device of the images.

        Returns:
            The mixed images, of the same shape and dtype, and their target with classes (B, 2), own class first, and
            ratio (B, 1), the part of the partner in each mixed image.
        """
        check_batch(images, classes, self.averages_pixels)
        batch_size = len(images)
        own = np.arange(batch_size)
        partner = batch_size - 1 - own
        draw_index = {"batch": np.zeros_like(own), "pair": np.minimum(own, partner), "elem": own}[self.mode]
        chosen = self.generator.random(draw_index.max() + 1) < self.prob
        chosen = chosen[draw_index] & (own != partner)
        pairs = torch.stack((classes, classes.flip(0)), dim=1)
        return self._mix(images, pairs, draw_index, chosen)

    @abstractmethod
    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        """Mixes images with their partners, `images.flip(0)`.

        Args:
            images: (B, C, Hi, Wi); not to be modified.
            classes: (B, 2) int64, classes of image and partner.
            draw_index: (B,) int64, which draw each image takes; there are max + 1 of them.
            chosen: (B,) bool, which images are mixed at all; never one that is its own partner.

        Returns:
            As `__call__`.
        """


class BoxStrategy(MixingStrategy):
    """Strategies that blend the partner into a box: CutMix (full strength) and MixUp (whole image).

    A subclass says what it draws by `_draw`; pixels and target follow from it here.
    """

    @abstractmethod
    def _draw(self, count: int, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Draws boxes and what part of the pixels in them comes from the partner.

        Args:
            count: Number of draws n.
            image_size: Hi and Wi.

        Returns:
            Boxes (n, 4) int64 (y0, x0, y1, x1, half open) and weights (n,) float in [0, 1].
        """

    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        height, width = image_size = tuple(images.shape[-2:])
        boxes, weight = self._draw(int(draw_index.max()) + 1, image_size)
        boxes = np.where(chosen[:, None], boxes[draw_index], 0)
        # float32 before anything uses it: pixels and target then speak of the same number.
        weight = np.where(chosen, weight[draw_index], 1).astype(np.float32)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        device = images.device

        if (weight == 1).all():
            if draw_index.any():
                boxes = torch.from_numpy(boxes).to(device)
                mixed = torch.where(box_masks(boxes, image_size)[:, None], images.flip(0), images)
            else:
                # One box for all, the usual case, costs little. An image that is its own partner is not changed by it.
                mixed = paste(images, boxes[0])
                boxes = torch.from_numpy(boxes).to(device)
            return mixed, MixedTarget.from_boxes(classes, boxes[:, None], image_size)

        if np.isin(area, (0, height * width)).all():
            ratio = torch.from_numpy(np.where(area == 0, np.float32(0), weight)).to(device)
            return blend(images, ratio), MixedTarget.from_ratio(classes, ratio[:, None])

        # Boxes and blends side by side: their masks are the one description that holds for both.
        inside = box_masks(torch.from_numpy(boxes).to(device), image_size)[:, None]
        ratio = torch.from_numpy(weight).to(device)
        mixed = torch.where(inside, blend(images, ratio), images)
        return mixed, MixedTarget.from_masks(classes, inside * ratio[:, None, None, None])


class CutMix(BoxStrategy):
    """CutMix: a box of the image is replaced by the same box of its partner (arXiv 1905.04899).

    The box need not lie on the patch grid: a patch with pixels of both images gets its fraction. With `box_grid=16`
    it does, as in the official code of TL-Align, see `draw_boxes`.

    Args:
        alpha: The ratio meant for the box is Beta(alpha, alpha); > 0. The paper takes 1 on ImageNet, a uniform ratio.
        minmax: Limits (least, greatest) of a box's sides as parts of the image's, in place of `alpha`, for boxes that
            need not be square (timm's `cutmix_minmax`).
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        box_grid: Side in pixels of the cells that boxes consist of; None for boxes of any pixels.
        seed: As in `MixingStrategy`.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        mode: Mode = "batch",
        box_grid: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(prob, mode, seed)
        check_alpha("alpha", alpha)
        if alpha == 0 and minmax is None:
            raise ValueError("alpha: expected more than 0 unless minmax is given, got 0")
        self.alpha = float(alpha)
        self.minmax = check_minmax("minmax", minmax)
        self.box_grid = check_box_grid(box_grid)

    def _draw(self, count: int, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        boxes = draw_boxes(self.generator, count, image_size, self.alpha, self.minmax, self.box_grid)
        return boxes, np.ones(count)


class MixUp(BoxStrategy):
    """MixUp: every pixel becomes (1 - ratio) of the image's own and ratio of its partner's (arXiv 1710.09412).

    Args:
        alpha: The ratio is Beta(alpha, alpha); > 0. 0.8 is DeiT's; the paper finds 0.1 to 0.4 best on ImageNet.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        seed: As in `MixingStrategy`.
    """

    averages_pixels = True

    def __init__(self, alpha: float = 0.8, prob: float = 1.0, mode: Mode = "batch", seed: int = 0) -> None:
        super().__init__(prob, mode, seed)
        check_alpha("alpha", alpha)
        if alpha == 0:
            raise ValueError("alpha: expected more than 0, got 0")
        self.alpha = float(alpha)

    def _draw(self, count: int, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return whole_boxes(count, image_size), draw_ratios(self.generator, count, self.alpha)


class MixUpCutMix(BoxStrategy):
    """MixUp or CutMix by the toss of a coin for each draw, with the parameters and distributions of `timm.data.Mixup`.

    Args:
        mixup_alpha: `alpha` of `MixUp`; 0 for CutMix alone.
        cutmix_alpha: `alpha` of `CutMix`; 0 (without `cutmix_minmax`) for MixUp alone.
        cutmix_minmax: `minmax` of `CutMix`, in place of `cutmix_alpha`.
        prob: As in `MixingStrategy`.
        switch_prob: Probability of CutMix where both are on.
        mode: As in `MixingStrategy`. In `pair` and `elem` one batch holds images of both kinds.
        box_grid: As in `CutMix`.
        seed: As in `MixingStrategy`.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Mode = "batch",
        box_grid: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(prob, mode, seed)
        check_alpha("mixup_alpha", mixup_alpha)
        check_alpha("cutmix_alpha", cutmix_alpha)
        check_probability("switch_prob", switch_prob)
        self.mixup_alpha = float(mixup_alpha)
        self.cutmix_alpha = float(cutmix_alpha)
        self.cutmix_minmax = check_minmax("cutmix_minmax", cutmix_minmax)
        self.box_grid = check_box_grid(box_grid)
        self.switch_prob = float(switch_prob)
        self.averages_pixels = self.mixup_alpha > 0
        self.cuts_boxes = self.cutmix_alpha > 0 or self.cutmix_minmax is not None
        if not (self.averages_pixels or self.cuts_boxes):
            raise ValueError("mixup_alpha, cutmix_alpha: expected one of them above 0, or cutmix_minmax, got 0 and 0")

    def _draw(self, count: int, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        boxes, weight = whole_boxes(count, image_size), np.ones(count)
        cut = np.full(count, self.cuts_boxes)
        if self.averages_pixels and self.cuts_boxes:
            cut = self.generator.random(count) < self.switch_prob
        if self.averages_pixels:
            weight = np.where(cut, 1, draw_ratios(self.generator, count, self.mixup_alpha))
        if self.cuts_boxes:
            drawn = draw_boxes(self.generator, count, image_size, self.cutmix_alpha, self.cutmix_minmax, self.box_grid)
            boxes = np.where(cut[:, None], drawn, boxes)
        return boxes, weight


def draw_ratios(generator: np.random.Generator, count: int, alpha: float) -> np.ndarray:
    """Draws mixing ratios from Beta(alpha, alpha), which is symmetric: timm's lambda has the same distribution.

    Args:
        generator: Source of randomness.
        count: Number of draws n.
        alpha: Parameter of the distribution, > 0.

    Returns:
        (n,) float64 in [0, 1].
    """
    return generator.beta(alpha, alpha, size=count)


def draw_boxes(
    generator: np.random.Generator,
    count: int,
    image_size: tuple[int, int],
    alpha: float = 1.0,
    minmax: Sequence[float] | None = None,
    box_grid: int | None = None,
) -> np.ndarray:
    """Draws boxes as timm does, or on the grid of patches as the official code of TL-Align does.

    A box takes the part sqrt(ratio) of each side of the image, ratio from Beta(alpha, alpha), around a centre drawn
    uniformly from the pixels, and is cut off at the border; with `minmax` it takes a part of each side drawn between
    these limits, at a place where it fits.

    With a grid the whole draw is made in cells of the grid (14 x 14 of them for 224 pixels and a grid of 16) and
    only then put into pixels, so that every patch is of one image. This is the official code's way, with its own
    rule for odd sides: a side of s cells reaches s // 2 cells to either side of the centre, where timm's box reaches
    one more to the right. A side of one cell therefore gives an empty box, and a ratio of 0. `minmax` on a grid
    (unknown to the official code) draws the sides in cells.

    Args:
        generator: Source of randomness.
        count: Number of draws n.
        image_size: Hi and Wi.
        alpha: Parameter of the distribution, > 0; unused with `minmax`.
        minmax: Limits (least, greatest) of the sides as parts of the image's, or None.
        box_grid: Side of a cell in pixels, or None for boxes of any pixels.

    Returns:
        (n, 4) int64: y0, x0, y1, x1, half open, within the image; a box may be empty.
    """
    cell = box_grid or 1
    if any(length % cell for length in image_size):
        raise ValueError(
            f"box_grid: expected a divisor of the sides of the images, got {box_grid} for images of {image_size}"
        )
    limits = np.array(image_size) // cell
    if minmax is None:
        side = (limits * np.sqrt(draw_ratios(generator, count, alpha))[:, None]).astype(np.int64)
        centre = generator.integers(0, limits, size=(count, 2))
        start = centre - side // 2
        stop = centre + (side + 1 if box_grid is None else side) // 2
    else:
        least, most = (limits * minmax[0]).astype(np.int64), (limits * minmax[1]).astype(np.int64)
        if (least >= most).any():
            raise ValueError(
                "minmax: expected limits that leave at least one length for each side of a box, got "
                f"{tuple(minmax)} for images of {image_size} on a grid of {cell}"
            )
        side = generator.integers(least, most, size=(count, 2))
        start = generator.integers(0, limits - side + 1)
        stop = start + side
    return np.concatenate((start.clip(0, limits), stop.clip(0, limits)), axis=1) * cell


def whole_boxes(count: int, image_size: tuple[int, int]) -> np.ndarray:
    """Returns `count` boxes (n, 4) int64 that hold the whole image."""
    return np.tile(np.array((0, 0, *image_size), dtype=np.int64), (count, 1))


def paste(images: Tensor, box: np.ndarray) -> Tensor:
    """Returns the images with the pixels of their mirror images within one box.

    Args:
        images: (B, C, Hi, Wi).
        box: (4,) int64: y0, x0, y1, x1, half open.

    Returns:
        (B, C, Hi, Wi).
    """
    y0, x0, y1, x1 = box.tolist()
    mixed = images.clone()
    mixed[..., y0:y1, x0:x1] = images[..., y0:y1, x0:x1].flip(0)
    return mixed


def blend(images: Tensor, ratio: Tensor) -> Tensor:
    """Returns (1 - ratio) * images + ratio * images.flip(0), exact at ratios of 0 and 1.

    Args:
        images: (B, C, Hi, Wi), floating.
        ratio: (B,) float32.

    Returns:
        (B, C, Hi, Wi), in the dtype of the images.
    """
    # Half precision would round the ratio itself (to 8 bits in bfloat16) and the pixels would disagree with the label.
    dtype = torch.promote_types(images.dtype, torch.float32)
    own_weight = 1 - ratio.to(dtype)[:, None, None, None]
    # In place, on the copy that `flip` makes: fresh memory for so many pixels costs as much as the arithmetic.
    return images.flip(0).to(dtype).lerp_(images.to(dtype), own_weight).to(images.dtype)


def check_batch(images: Tensor, classes: Tensor, averages_pixels: bool = False) -> None:
    """Raises unless images are (B, C, Hi, Wi) with B >= 2, of a dtype that can be mixed, and classes (B,) int64.

    Args:
        images: What was given as images.
        classes: What was given as classes.
        averages_pixels: Whether pixels of two images are averaged, which integers cannot hold.
    """
    for name, value in (("images", images), ("classes", classes)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: expected the shape (B, C, Hi, Wi), none of them 0, got {tuple(images.shape)}")
    if len(images) < 2:
        raise ValueError("images: expected at least 2 images to mix, got 1 (a loader with drop_last=True avoids it)")
    if averages_pixels and not images.is_floating_point():
        raise TypeError(f"images: expected a floating dtype for MixUp, which averages pixels, got {images.dtype}")
    if classes.dtype != torch.int64:
        raise TypeError(f"classes: expected int64, got {classes.dtype}")
    if classes.shape != images.shape[:1]:
        raise ValueError(
            f"classes: expected the shape ({len(images)},), one for each of the images, got {tuple(classes.shape)}"
        )
    if classes.device != images.device:
        raise ValueError(f"classes: expected on the device of the images, {images.device}, got {classes.device}")


def check_number(name: str, value: float) -> None:
    """Raises TypeError unless `value` is a real number, bool excluded."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_alpha(name: str, value: float) -> None:
    """Raises unless `value` is a finite number of at least 0."""
    check_number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_probability(name: str, value: float) -> None:
    """Raises unless `value` is a number in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_minmax(name: str, value: Sequence[float] | None) -> tuple[float, float] | None:
    """Returns `value` as a tuple; raises unless it is None or two numbers with 0 <= least < greatest <= 1."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected None or a sequence of two numbers, got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name}: expected two numbers, got {len(value)}")
    for number in value:
        check_number(name, number)
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"{name}: expected (least, greatest) with 0 <= least < greatest <= 1, got {tuple(value)}")
    return float(value[0]), float(value[1])


def check_box_grid(value: int | None) -> int | None:
    """Returns `value`; raises unless it is None or a positive int."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"box_grid: expected None or an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"box_grid: expected at least 1, got {value}")
    return int(value)
