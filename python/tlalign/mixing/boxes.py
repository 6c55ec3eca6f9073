"""Strategies that blend the partner into one box: CutMix, MixUp and their switch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tlalign.mixing.strategy import (
    MixingStrategy,
    Mode,
    check_integer,
    check_not_negative,
    check_number,
    check_positive,
    check_probability,
    draw_ratios,
    to_device,
)
from tlalign_kernels.labels import MixedTarget, box_masks


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
        one_draw = not draw_index.any()
        boxes, weight = self._draw(int(draw_index.max()) + 1, image_size)
        boxes = boxes[draw_index] * chosen[:, None]
        # float32 before anything uses it: pixels and target then speak of the same number.
        weight = np.where(chosen, weight[draw_index], 1).astype(np.float32)

        if (weight == 1).all():
            placed = to_device(boxes, images.device)
            # One box for all, the usual case, costs little. An image that is its own partner is not changed by it.
            mixed = paste(images, boxes[0]) if one_draw else paste_each(images, placed)
            return mixed, MixedTarget.from_boxes(classes, placed[:, None], image_size)

        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if ((area == 0) | (area == height * width)).all():
            ratio = np.where(area == 0, np.float32(0), weight)
            placed = to_device(ratio, images.device)
            # Likewise of one ratio.
            mixed = blend(images, float(ratio[0]) if one_draw else placed)
            return mixed, MixedTarget.from_ratio(classes, placed[:, None])

        # Boxes and blends side by side: their masks are the one description that holds for both.
        inside = box_masks(to_device(boxes, images.device), image_size)[:, None]
        ratio = to_device(weight, images.device)
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
        self.alpha = check_not_negative("alpha", alpha)
        if alpha == 0 and minmax is None:
            raise ValueError("alpha: expected more than 0 unless minmax is given, got 0")
        self.minmax = check_minmax("minmax", minmax)
        self.box_grid = check_integer("box_grid", box_grid, least=1, or_none=True)

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
        self.alpha = check_positive("alpha", alpha)

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
        self.mixup_alpha = check_not_negative("mixup_alpha", mixup_alpha)
        self.cutmix_alpha = check_not_negative("cutmix_alpha", cutmix_alpha)
        self.switch_prob = check_probability("switch_prob", switch_prob)
        self.cutmix_minmax = check_minmax("cutmix_minmax", cutmix_minmax)
        self.box_grid = check_integer("box_grid", box_grid, least=1, or_none=True)
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

    Raises:
        ValueError: If the grid does not divide the image, or `minmax` leaves no length for a side.
    """
    cell = box_grid or 1
    if any(length % cell for length in image_size):
        raise ValueError(
            f"box_grid: expected a divisor of the sides of the images, got {box_grid} for images of {image_size}"
        )
    limits = np.array(image_size) // cell
    if minmax is None:
        side = box_sides(draw_ratios(generator, count, alpha), limits)
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
    return np.stack((start, stop), axis=1).clip(0, limits).reshape(count, 4) * cell


def box_sides(ratio: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Returns the sides (n, 2) int64 of boxes that take the part sqrt(ratio) (n,) of each of the `limits` (2,)."""
    return (limits * np.sqrt(ratio)[:, None]).astype(np.int64)


def whole_boxes(count: int, image_size: tuple[int, int]) -> np.ndarray:
    """Returns `count` boxes (n, 4) int64 that hold the whole image."""
    return np.tile(np.array((0, 0, *image_size), dtype=np.int64), (count, 1))


def paste(images: Tensor, box: np.ndarray) -> Tensor:
    """Returns the images with the pixels of their mirror images within one box.

    Args:
        images: (B, channels, Hi, Wi).
        box: (4,) int64: y0, x0, y1, x1, half open.

    Returns:
        (B, channels, Hi, Wi).
    """
    y0, x0, y1, x1 = box.tolist()
    mixed = images.clone()
    mixed[..., y0:y1, x0:x1] = images[..., y0:y1, x0:x1].flip(0)
    return mixed


def paste_each(images: Tensor, boxes: Tensor) -> Tensor:
    """Returns the images with the pixels of their mirror images within one box each.

    Args:
        images: (B, channels, Hi, Wi).
        boxes: (B, 4) int64: y0, x0, y1, x1, half open.

    Returns:
        (B, channels, Hi, Wi).
    """
    return torch.where(box_masks(boxes, tuple(images.shape[-2:]))[:, None], images.flip(0), images)


def blend(images: Tensor, ratio: Tensor | float) -> Tensor:
    """Returns (1 - ratio) * images + ratio * images.flip(0), exact at ratios of 0 and 1.

    Args:
        images: (B, channels, Hi, Wi), floating.
        ratio: (B,) float32, or one for all.

    Returns:
        (B, channels, Hi, Wi), in the dtype of the images.
    """
    # Half precision would round the ratio itself (to 8 bits in bfloat16) and the pixels would disagree with the label.
    dtype = torch.promote_types(images.dtype, torch.float32)
    own_weight = 1 - (ratio if isinstance(ratio, float) else ratio.to(dtype)[:, None, None, None])
    # In place, on the copy that `flip` makes: fresh memory for so many pixels costs as much as the arithmetic.
    return images.flip(0).to(dtype).lerp_(images.to(dtype), own_weight).to(images.dtype)


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
