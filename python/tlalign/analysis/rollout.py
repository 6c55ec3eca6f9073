"""Attention rollout (Abnar and Zuidema, arXiv 2005.00928) by labels, without any attention matrix.

Rollout multiplies (A + I) / 2 over the layers, A averaged over heads. That is what happens to labels, so that one-hot
labels of the tokens come out as the whole product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tlalign.analysis.blocks import blocks_of, column_ranges, empty_target, following, map_size, one_hot_labels


class Rollout(NamedTuple):
    """How much of each token that enters the first block arrives where.

    Attributes:
        tokens: float32 (B, N, Nk), in each of the N tokens after the last block. Rows sum to 1; in PVT, whose class
            token joins in the last stage, less by what is of the class token.
        head: float32 (B, Nk), in what the head sees: the class token, the mean of the tokens, or their attention pool.
        grid: Ht and Wt of the tokens that stand for a place; the others come first.
    """

    tokens: Tensor
    head: Tensor
    grid: tuple[int, int]


@torch.inference_mode()
def attention_rollout(model: nn.Module, images: Tensor, memory: int = 2**26) -> Rollout:
    """Rolls out the attention of all layers, with residual connections, patch merging and pooling.

    Tokens of a hierarchical model are those of its first stage on one side, and of its last on the other.

    Args:
        model: A timm model that `patch_model` can follow, patched or not; it is left as it is.
        images: (B, channels, Hi, Wi).
        memory: Bytes that the labels of a layer may take; what does not fit goes through the model in several passes.

    Returns:
        The rollout; float64 if the model is.

    Raises:
        NotImplementedError: If labels can't be followed through the model.
    """
    model = following(model)
    first = blocks_of(model)[0]
    _, probed = model(images, target=empty_target(images, 1), collect_layers=True)
    entering = probed.layer_shares[0]
    tokens, heads = [], []
    for columns in column_ranges(entering, memory):
        with first.register_forward_pre_hook(
            lambda _, arguments, columns=columns: (*arguments[:-1], one_hot_labels(arguments[-1], columns))
        ):
            _, aligned = model(images, target=empty_target(images, len(columns)), collect_layers=True)
        tokens.append(aligned.layer_shares[-1].flatten(1, -2))
        heads.append(aligned.ratio)
    grid = map_size(model, entering, tuple(images.shape[-2:]))
    return Rollout(torch.cat(tokens, dim=2), torch.cat(heads, dim=1), grid)
