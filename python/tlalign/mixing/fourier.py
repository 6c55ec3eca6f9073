"""F-Mix: masks cut out of random images of low frequencies."""

from __future__ import annotations

import math

import numpy as np

from tlalign.mixing.masks import MaskStrategy
from tlalign.mixing.strategy import Mode, check_not_negative, check_positive, draw_ratios


class FMix(MaskStrategy):
    """F-Mix: regions of any shape, in few connected parts, come from the partner (arXiv 2002.12047).

    A mask is a grey image of Gaussian noise whose spectrum falls as 1 / frequency ** decay, of which the largest
    values make up the part of the pixels that was drawn.

    Args:
        alpha: The ratio is Beta(alpha, alpha); > 0. 1 in the paper.
        decay: Power by which the spectrum falls; 3 in the paper.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        seed: As in `MixingStrategy`.
    """

    def __init__(
        self, alpha: float = 1.0, decay: float = 3.0, prob: float = 1.0, mode: Mode = "batch", seed: int = 0
    ) -> None:
        super().__init__(prob, mode, seed)
        self.alpha = check_positive("alpha", alpha)
        self.decay = check_not_negative("decay", decay)

    def _draw(self, count: int, image_size: tuple[int, int]) -> np.ndarray:
        pixels = math.prod(image_size)
        taken = np.rint(draw_ratios(self.generator, count, self.alpha) * pixels).astype(np.int64)
        masks = np.zeros((count, pixels), dtype=bool)
        for mask, number in zip(masks, taken, strict=True):
            grey = self._draw_grey(image_size).ravel()
            if number > 0:
                mask[np.argpartition(grey, pixels - number)[pixels - number :]] = True
        return masks.reshape(count, *image_size)

    def _draw_grey(self, image_size: tuple[int, int]) -> np.ndarray:
        """Draws an image (Hi, Wi) of low frequencies."""
        height, width = image_size
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
        # As in the paper, the constant has the weight of the lowest frequency; it moves no pixel above another.
        weight = np.maximum(frequency, 1 / max(image_size)) ** -self.decay
        real, imaginary = self.generator.standard_normal((2, *frequency.shape))
        return np.fft.irfft2(weight * (real + 1j * imaginary), s=image_size)
