"""Token presence, p(z_i) = sum over j of A_ji: what all outputs of a layer take from token i.

Equation 2 of TL-Align (arXiv 2210.06455), read as the text before it means it: its indices would sum a row, which is
always 1. A token with p > 1 gains weight in the layer, one with p < 1 fades; a convolution treats all tokens alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlalign.analysis.blocks import column_ranges, empty_target, following, one_hot_labels, watching

# What is told of a distribution.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.inference_mode()
def token_presence(model: nn.Module, images: Tensor, memory: int = 2**26) -> list[Tensor]:
    """Presence of each token in the attention of each block, A being the mean over heads.

    Where keys are reduced or pooled, what is taken from a key is taken in equal parts from the tokens it was made of.
    Each block runs once more with one-hot labels, which it returns as the columns of A; their sums are p.

    Args:
        model: A timm model that `patch_model` can follow, patched or not; it is left as it is.
        images: (B, channels, Hi, Wi).
        memory: Bytes that these labels may take; what does not fit goes through the block in several passes.

    Returns:
        For each block (B, N), or (B, Ht, Wt) where tokens form a map. The mean over tokens is 1.

    Raises:
        NotImplementedError: If labels can't be followed through the model.
    """
    presence = []

    def watch(_: int, block: nn.Module, arguments: tuple[Any, ...], __: Any) -> None:
        *others, share = arguments
        sums = [
            # Past the hooks of the block, which led here.
            block.forward(*others, one_hot_labels(share, columns))[1].flatten(1, -2).sum(dim=1)
            for columns in column_ranges(share, memory)
        ]
        presence.append(torch.cat(sums, dim=1))

    model = following(model, residual=False)
    with watching(model, watch):
        _, aligned = model(images, target=empty_target(images, 1), collect_layers=True)
    return [each.view(share.shape[:-1]) for each, share in zip(presence, aligned.layer_shares, strict=True)]


def convolution_presence(grid: tuple[int, int], kernel: Tensor) -> Tensor:
    """The same of a depth-wise convolution, with zeros around the map: what all outputs take from each token.

    Away from the border it is the sum of the kernel's weights, for each token the same.

    Args:
        grid: Ht and Wt.
        kernel: Odd (k, k), of one channel.

    Returns:
        (Ht, Wt).
    """
    outputs = kernel.new_ones((1, 1, *grid))
    padding = (kernel.shape[0] // 2, kernel.shape[1] // 2)
    return F.conv_transpose2d(outputs, kernel[None, None], padding=padding)[0, 0]


def quantiles(presence: Tensor) -> list[float]:
    """The `QUANTILES` of presence over a few tokens."""
    return presence.cpu().double().quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


class PresenceOfLayer:
    """Distribution of presence over the tokens of many images, without keeping them.

    Moments are exact; quantiles are read off a histogram of the logarithm, within 0.5 %.

    Attributes:
        class_token: Mean presence of the class token; None without one.
    """

    _LOW, _HIGH, _BINS = -4.0, 4.0, 4000  # decades

    def __init__(self) -> None:
        self.count = self.images = 0
        self.squares = self.of_class_token = 0.0
        self.least, self.greatest = math.inf, 0.0
        self.histogram = torch.zeros(self._BINS, dtype=torch.float64)
        self.has_class_token = False

    def add(self, presence: Tensor, has_class_token: bool) -> None:
        """Takes note of the tokens (B, ...) of some images, the first of which is the class token if they have one."""
        values = presence.cpu().double().flatten(1)
        self.count += values.numel()
        self.images += len(values)
        self.squares += (values - 1).square().sum().item()
        self.least = min(self.least, values.min().item())
        self.greatest = max(self.greatest, values.max().item())
        decades = values.log10().clamp(self._LOW, self._HIGH)
        self.histogram += torch.histc(decades, self._BINS, self._LOW, self._HIGH)
        self.has_class_token = has_class_token
        if has_class_token:
            self.of_class_token += values[:, 0].sum().item()

    @property
    def class_token(self) -> float | None:
        return self.of_class_token / self.images if self.has_class_token else None

    @property
    def distance(self) -> float:
        """Root of the mean of (p - 1)^2."""
        return math.sqrt(self.squares / self.count)

    def quantile(self, part: float) -> float:
        """The value that this part of the tokens lies below; the least of all where it is in the lowest bin."""
        index = int((self.histogram.cumsum(0) < part * self.count).sum())
        if index == 0:  # of tokens that nothing attends to, too
            return self.least
        middle = 10 ** (self._LOW + (index + 0.5) * (self._HIGH - self._LOW) / self._BINS)
        return min(max(middle, self.least), self.greatest)
