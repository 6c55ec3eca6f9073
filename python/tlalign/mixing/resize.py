"""ResizeMix: the whole partner, made small, is pasted into the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tlalign.mixing.strategy import MixingStrategy, Mode, check_number, to_device
from tlalign_kernels.labels import MixedTarget


class ResizeMix(MixingStrategy):
    """ResizeMix: the partner is resized and pasted at a random place (arXiv 2012.11101).

    Both sides of the partner are scaled by one number drawn uniformly; the place is drawn uniformly from where it
    fits. The ratio is the area that was pasted. Pixels are averaged when an image shrinks.

    Args:
        scale: Limits (least, greatest) of the scale; (0.1, 0.8) in the paper.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        seed: As in `MixingStrategy`.
    """

    averages_pixels = True

    def __init__(
        self, scale: Sequence[float] = (0.1, 0.8), prob: float = 1.0, mode: Mode = "batch", seed: int = 0
    ) -> None:
        super().__init__(prob, mode, seed)
        if not isinstance(scale, Sequence) or isinstance(scale, str):
            raise TypeError(f"scale: expected a sequence of two numbers, got {type(scale).__name__}")
        for number in scale:
            check_number("scale", number)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected (least, greatest) with 0 < least <= greatest <= 1, got {tuple(scale)}")
        self.scale = (float(scale[0]), float(scale[1]))

    def origins(self, target: MixedTarget, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As for every strategy; a pixel in the box shows what lies around its centre in the partner."""
        own, _ = super().origins(target, image_size)
        y0, x0, y1, x1 = target.boxes[:, 0].unbind(1)
        rows, columns = _origins(y0, y1, image_size[0]), _origins(x0, x1, image_size[1])
        return own, (rows[:, :, None] * image_size[1] + columns[:, None, :]).flatten(1)

    def visible_parts(self, maps: Tensor, target: MixedTarget, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As for every strategy; of a partner that was pasted all is seen."""
        own, _ = super().visible_parts(maps, target, image_size)
        return own, (target.ratio[:, 0] > 0).to(own.dtype)

    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        image_size = tuple(images.shape[-2:])
        drawn = self._draw(int(draw_index.max()) + 1, image_size)
        mixed = images.clone()
        for draw, (y0, x0, y1, x1) in enumerate(drawn.tolist()):
            members = np.flatnonzero((draw_index == draw) & chosen)
            if members.size:
                partners = to_device(len(images) - 1 - members, images.device)
                members = to_device(members, images.device)
                mixed[members, :, y0:y1, x0:x1] = _resize(images[partners], (y1 - y0, x1 - x0))
        boxes = to_device(np.where(chosen[:, None], drawn[draw_index], 0), images.device)
        return mixed, MixedTarget.from_boxes(classes, boxes[:, None], image_size)

    def _draw(self, count: int, image_size: tuple[int, int]) -> np.ndarray:
        """Draws boxes (n, 4) int64 (y0, x0, y1, x1, half open), of one pixel at least."""
        limits = np.array(image_size)
        scale = self.generator.uniform(*self.scale, size=(count, 1))
        side = np.maximum(np.rint(limits * scale), 1).astype(np.int64)
        start = self.generator.integers(0, limits - side + 1)
        return np.concatenate((start, start + side), axis=1)


def _origins(start: Tensor, end: Tensor, pixels: int) -> Tensor:
    """Where in a side each pixel came from, (B, pixels), when all of it was resized to `start` to `end`, (B,) each."""
    place = torch.arange(pixels, device=start.device) - start[:, None]
    size = (end - start).clamp(min=1)[:, None]
    return ((2 * place + 1) * pixels // (2 * size)).clamp(0, pixels - 1)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (B, channels, Hi, Wi) bilinearly over the area of each new pixel."""
    # Half precision would round the weights, and is not known to the CPU's kernel.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", antialias=True).to(images.dtype)
