"""How labels pass through timm's ViTs with biases of relative positions (vision_transformer_relpos)."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor

from tlalign_kernels.models.plain import (
    AttentionFollower,
    BlockFollower,
    PlainFollower,
    PostNormBlockFollower,
    attend,
)
from tlalign_kernels.patch import ImageModelFollower, register


class AlignedRelPosAttention(AttentionFollower, relpos.RelPosAttention):
    """timm's `RelPosAttention`, with a bias of its own or one that all blocks share."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "a38419a4d20b4ef8"}
    untouched = ("rel_pos",)

    def forward(
        self,
        x: Tensor,
        shared_rel_pos: Tensor | None = None,
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels).
            shared_rel_pos: (1, H, N, N), added to the scores where the attention has no bias of its own, or None.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the labels with, or None.

        Returns:
            (B, N, channels), with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        attended, share = attend(self, qkv, share, residual, bias=bias)
        return self.proj_drop(self.proj(attended.flatten(2))), share


class RelPosBlockFollower(BlockFollower):
    """Base of the followers of blocks of `VisionTransformerRelPos`."""

    def forward(
        self, x: Tensor, shared_rel_pos: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedRelPosAttention`."""
        if share is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        return self.run_branches(x, share, shared_rel_pos)


class AlignedRelPosBlock(RelPosBlockFollower, relpos.RelPosBlock):
    """timm's pre-norm `RelPosBlock` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "690d76ce43a08797"}


class AlignedResPostRelPosBlock(RelPosBlockFollower, PostNormBlockFollower, relpos.ResPostRelPosBlock):
    """timm's post-norm `ResPostRelPosBlock`, for labels the same as the pre-norm one."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "da5d8ed3898e7694"}


class AlignedVisionTransformerRelPos(PlainFollower, ImageModelFollower, relpos.VisionTransformerRelPos):
    """timm's `VisionTransformerRelPos` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "b6a6653831a7fb8a",
        "forward_features": "86b0ac043618f1bf",
        "forward_head": "f229f9ea53c05bce",
    }
    untouched = (*PlainFollower.untouched, "shared_rel_pos")

    def _embed(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, list[tuple]]:
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        shared_bias = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        return x, share, [(shared_bias,)] * len(self.blocks)


register(relpos.RelPosAttention, AlignedRelPosAttention)
register(relpos.RelPosBlock, AlignedRelPosBlock)
register(relpos.ResPostRelPosBlock, AlignedResPostRelPosBlock)
register(relpos.VisionTransformerRelPos, AlignedVisionTransformerRelPos)
