"""How labels pass through timm's XCiT: blocks attend between channels, and only a class token at the end to tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models import cait, checkpoint, xcit
from torch import Tensor, nn

from tlalign_kernels.functional import attention
from tlalign_kernels.labels import MixedTarget
from tlalign_kernels.models.plain import PlainFollower
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    attention_options,
    check_head_dim,
    follow,
    register,
)


class AlignedClassAttn(LabelFollower, cait.ClassAttn):
    """timm's attention of the class token to all tokens."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "e8bf85de797ec9c2"}

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads that no backend has."""
        check_head_dim(module.q.out_features // module.num_heads, name)

    def forward(
        self, x: Tensor, share: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels), the class token first.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the label with, or None.

        Returns:
            (B, 1, channels), the class token; with a share also its new share (B, 1, S).
        """
        if share is None:
            return super().forward(x)
        heads = (self.num_heads, x.shape[2] // self.num_heads)
        projected = (self.q(x[:, :1]), self.k(x), self.v(x))
        views = (part.unflatten(2, heads).transpose(1, 2) for part in projected)
        residual = None if residual is None else residual[:, :1]
        attended, share = attention(*views, share, residual, **attention_options(self))
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2))), share


class AlignedClassAttentionBlock(LabelFollower, xcit.ClassAttentionBlock):
    """timm's `ClassAttentionBlock`: the class token's label goes through the attention, those of patches stay."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "f06a9977fa1a451c"}

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Takes and returns tokens (B, N, channels) and, if given, their share (B, N, S)."""
        if share is None:
            return super().forward(x)
        normalised, residual = self.norm1(x), share if self.label_residual else None
        class_token, mixed = follow(self.attn, normalised, share=share, residual=residual)
        attended = self.gamma1 * torch.cat((class_token, normalised[:, 1:]), dim=1)
        mixed = torch.cat((mixed, share[:, 1:]), dim=1)
        attended, share = self.drop_attention(self.drop_path1, attended, mixed, share)
        x = x + attended
        x = self.norm2(x) if self.tokens_norm else torch.cat((self.norm2(x[:, :1]), x[:, 1:]), dim=1)
        return x + self.drop_path2(torch.cat((self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]), dim=1)), share


class AlignedXCABlock(LabelFollower, xcit.XCABlock):
    """timm's `XCABlock`: attention between channels mixes these alone, labels stay (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "0a8b135e1e85d2ee"}
    untouched = ("attn", "local_mp")


class AlignedConvPatchEmbed(LabelFollower, xcit.ConvPatchEmbed):
    """timm's `ConvPatchEmbed`: a token stands for its stride (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "202016d37e8e9d63"}
    untouched = ("proj",)


class AlignedXcit(PlainFollower, ImageModelFollower, xcit.Xcit):
    """timm's `Xcit` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "b6a6653831a7fb8a",
        "forward_features": "5f000d922ca1bfbf",
        "forward_cls": "41a55f3acb5a74fa",
        "forward_head": "d46c466a5fc35697",
    }
    untouched = ("pos_embed", "head")

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The blocks in which the class token attends."""
        return list(model.cls_attn_blocks or ())

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for poolings without a label."""
        cls.check_pooling(module)

    def _enter(self, images: Tensor, target: MixedTarget) -> tuple[Tensor, Tensor, list[tuple]]:
        self.check_pooling(self)  # `prune_intermediate_layers` takes the class token away
        x, size = self.patch_embed(images)
        step = (self.patch_embed.patch_size,) * 2
        if self.pos_embed is not None:
            x = x + self.pos_embed(x.shape[0], *size).flatten(2).transpose(1, 2)
        x = self.pos_drop(x)
        for block in self.blocks:
            x = checkpoint(block, x, *size) if self.grad_checkpointing else block(x, *size)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x, self._first_share(target, size, step, x.dtype), [()] * len(self.cls_attn_blocks)


register(cait.ClassAttn, AlignedClassAttn)
register(xcit.ClassAttentionBlock, AlignedClassAttentionBlock)
register(xcit.XCABlock, AlignedXCABlock)
register(xcit.ConvPatchEmbed, AlignedConvPatchEmbed)
register(xcit.Xcit, AlignedXcit)
