"""How labels pass through timm's BEiT (beit)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from timm.models import beit
from torch import Tensor, nn

from tlalign_kernels.functional import attention_qkv
from tlalign_kernels.models.plain import BlockFollower, Branch, PlainFollower, biased_projection
from tlalign_kernels.patch import ImageModelFollower, LabelFollower, attention_options, check_head_dim, register


class AlignedBeitAttention(LabelFollower, beit.Attention):
    """timm's attention of BEiT, with biases of relative positions."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "0bcb86fe6e1f3788"}

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads that no backend has."""
        check_head_dim(module.qkv.out_features // (3 * module.num_heads), name)

    def forward(
        self,
        x: Tensor,
        shared_rel_pos_bias: Tensor | None = None,
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels).
            shared_rel_pos_bias: (H, N, N), added to the scores in all blocks, or None.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the labels with, or None.

        Returns:
            (B, N, channels), with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        qkv, _ = biased_projection(self, x)
        attended, share = attention_qkv(qkv, share, residual, bias=bias, **attention_options(self))
        return self.proj_drop(self.proj(attended.flatten(2))), share


class ScaledBlockFollower(BlockFollower):
    """Base of the followers of blocks whose branches are scaled by parameters, if they have them."""

    def _around_branches(self) -> tuple[tuple[Branch, Branch], tuple[Branch, Branch]]:
        return (self.norm1, partial(_scaled, self.gamma_1)), (self.norm2, partial(_scaled, self.gamma_2))


class AlignedBeitBlock(ScaledBlockFollower, beit.Block):
    """timm's block of BEiT with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "68d8182b8e17fe16"}

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedBeitAttention`."""
        if share is None:
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        return self.run_branches(x, share, shared_rel_pos_bias)


class AlignedBeit(PlainFollower, ImageModelFollower, beit.Beit):
    """timm's `Beit` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "4f3089d45f2599d9",
        "forward_features": "b275717e76101e5e",
        "forward_head": "354da13d4d4d2db2",
    }
    untouched = (*PlainFollower.untouched, "rel_pos_bias")

    def _embed(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, list[tuple]]:
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        shared_bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return self.pos_drop(x), share, [(shared_bias,)] * len(self.blocks)


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


register(beit.Attention, AlignedBeitAttention)
register(beit.Block, AlignedBeitBlock)
register(beit.Beit, AlignedBeit)
