"""SaliencyMix: the box of CutMix around the most salient pixel of the partner."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tlalign.mixing.boxes import box_sides, paste_each
from tlalign.mixing.strategy import MixingStrategy, Mode, check_positive, draw_ratios, to_device
from tlalign_kernels.labels import MixedTarget


class SaliencyMix(MixingStrategy):
    """SaliencyMix: a box around the partner's most salient pixel replaces the same box of the image (arXiv 2006.01791).

    Saliency is OpenCV's fine-grained static one (Montabone and Soto 2010), as in the paper. It is computed on the CPU,
    for each image of the batch, at about 15 ms for 224 x 224 pixels. Each box has its own place; its size, cut off at
    the border, is that of a draw. (The authors' code takes the box of one image for the whole batch.)

    Args:
        alpha: The ratio meant for the box is Beta(alpha, alpha); > 0. The paper takes 1, a uniform ratio.
        prob: As in `MixingStrategy`. The authors mix half of the batches of CIFAR.
        mode: As in `MixingStrategy`, for the sizes of boxes.
        seed: As in `MixingStrategy`.

    Raises:
        ModuleNotFoundError: If OpenCV with its contributed modules is not installed.
    """

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, mode: Mode = "batch", seed: int = 0) -> None:
        super().__init__(prob, mode, seed)
        self.alpha = check_positive("alpha", alpha)
        _opencv()

    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        image_size = tuple(images.shape[-2:])
        limits = np.array(image_size)
        side = box_sides(draw_ratios(self.generator, int(draw_index.max()) + 1, self.alpha), limits)[draw_index]
        centre = np.zeros((len(images), 2), dtype=np.int64)
        if chosen.any():
            peaks = static_saliency(images).reshape(len(images), -1).argmax(axis=1)
            centre = np.stack(np.unravel_index(peaks[::-1], image_size), axis=1)
        start, stop = centre - side // 2, centre + (side + 1) // 2
        boxes = np.concatenate((start.clip(0, limits), stop.clip(0, limits)), axis=1)
        boxes = to_device(np.where(chosen[:, None], boxes, 0), images.device)
        return paste_each(images, boxes), MixedTarget.from_boxes(classes, boxes[:, None], image_size)


def static_saliency(images: Tensor) -> np.ndarray:
    """Computes OpenCV's fine-grained static saliency of each image.

    Args:
        images: (B, channels, Hi, Wi), normalised in any way: each image is stretched to 8 bits over its own range.
            Three channels are taken as red, green and blue; of another number the mean is.

    Returns:
        (B, Hi, Wi) float32.
    """
    detector = _opencv().saliency.StaticSaliencyFineGrained_create()
    pixels = images.detach().float()
    pixels = pixels.flip(1) if pixels.shape[1] == 3 else pixels.mean(dim=1, keepdim=True)  # OpenCV has blue first
    low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
    stretched = (255 * (pixels - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)).round()
    eight_bits = stretched.byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.stack([detector.computeSaliency(np.ascontiguousarray(image))[1] for image in eight_bits])


def _opencv() -> ModuleType:
    try:
        import cv2
    except ModuleNotFoundError:
        cv2 = None
    if not hasattr(cv2, "saliency"):
        raise ModuleNotFoundError(
            "SaliencyMix needs OpenCV with its contributed modules: pip install 'tlalign-kernels[saliency]'"
        )
    return cv2
