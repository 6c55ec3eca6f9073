"""Attentive CutMix: the cells of the partner that a pretrained network finds most active."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tlalign.mixing.masks import mix_masked
from tlalign.mixing.strategy import MixingStrategy, Mode, cell_of_pixel, check_integer, to_device
from tlalign_kernels.labels import MixedTarget


class AttentiveCutMix(MixingStrategy):
    """Attentive CutMix: the most active cells of the partner replace the same cells of the image (arXiv 2003.13048).

    Nothing is drawn but whether images are mixed: each image has the mask of its partner, and all have one ratio,
    6 / 49 with the paper's network.

    Args:
        activation: Gives the activation (B, h, w) of images (B, channels, Hi, Wi) in h x w cells of equal size, from a
            pretrained network, such as `tlalign.teacher.Teacher(model).activation`; 7 x 7 in the paper (ResNet-50's
            last map).
        count: Number of cells; 6 in the paper, the best of 1 to 15.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`, for the choice of what is mixed.
        seed: As in `MixingStrategy`.

    Raises:
        TypeError: If no activation is given.
    """

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor] | None = None,
        count: int = 6,
        prob: float = 1.0,
        mode: Mode = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(prob, mode, seed)
        if not callable(activation):
            raise TypeError(
                "activation: expected a callable that gives the activation of images by a pretrained network, such as "
                f"tlalign.teacher.Teacher(model).activation, got {type(activation).__name__}; no weights are shipped"
            )
        self.activation = activation
        self.count = check_integer("count", count, least=1)

    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        image_size = tuple(images.shape[-2:])
        with torch.no_grad():
            activation = self.activation(images).flip(0)
        if activation.dim() != 3 or len(activation) != len(images):
            raise ValueError(f"activation: expected maps of shape ({len(images)}, h, w), got {tuple(activation.shape)}")
        cells = tuple(activation.shape[1:])
        if any(side > pixels for side, pixels in zip(cells, image_size, strict=True)):
            raise ValueError(f"activation: expected at most one cell a pixel of {image_size}, got {cells} cells")
        if self.count >= activation[0].numel():
            raise ValueError(f"count: expected fewer than the {activation[0].numel()} cells of a map, got {self.count}")
        flat = activation.flatten(1)
        masks = torch.zeros_like(flat, dtype=torch.bool)
        masks.scatter_(1, flat.topk(self.count, dim=1).indices, True)
        masks = masks.view(-1, *cells) & to_device(chosen, images.device)[:, None, None]
        masks = masks.flatten(1)[:, cell_of_pixel(cells, image_size, images.device)]
        return mix_masked(images, classes, masks.unflatten(1, image_size))
