"""What strategies share that replace pixels of the image by its partner's wherever a mask says so."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from tlalign.mixing.strategy import MixingStrategy, to_device
from tlalign_kernels.labels import MixedTarget


class MaskStrategy(MixingStrategy):
    """Strategies that replace pixels in a region of any shape; a subclass says which by `_draw`."""

    @abstractmethod
    def _draw(self, count: int, image_size: tuple[int, int]) -> np.ndarray:
        """Draws masks.

        Args:
            count: Number of draws n.
            image_size: Hi and Wi.

        Returns:
            (n, Hi, Wi) bool, the pixels that come from the partner.
        """

    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        drawn = self._draw(int(draw_index.max()) + 1, tuple(images.shape[-2:]))
        # Taken to the device as they were drawn, which may be one mask for all.
        masks = to_device(drawn, images.device)[to_device(draw_index, images.device)]
        masks = masks & to_device(chosen, images.device)[:, None, None]
        return mix_masked(images, classes, masks)


def mix_masked(images: Tensor, classes: Tensor, masks: Tensor) -> tuple[Tensor, MixedTarget]:
    """Mixes images with their mirror images by one mask each.

    Args:
        images: (B, channels, Hi, Wi).
        classes: (B, 2) int64, classes of image and partner.
        masks: (B, Hi, Wi) bool, the pixels that come from the partner.

    Returns:
        The mixed images, (B, channels, Hi, Wi), and their target.
    """
    masks = masks[:, None]
    return torch.where(masks, images.flip(0), images), MixedTarget.from_masks(classes, masks.float())
