"""How labels pass through timm's Eva (eva): EVA, EVA-02, DINOv3, Perception Encoder, and ViTs with rotary positions."""

from __future__ import annotations

from typing import ClassVar

import timm.layers as tl
import torch
from timm.models import eva
from torch import Tensor

from tlalign_kernels.functional import attention
from tlalign_kernels.labels import gather_share
from tlalign_kernels.models.beit import ScaledBlockFollower
from tlalign_kernels.models.plain import (
    AttentionFollower,
    BlockFollower,
    MaskedPlainFollower,
    PostNormBlockFollower,
    biased_projection,
    mask_options,
    project_attended,
)
from tlalign_kernels.patch import attention_options, follow, register


class RotaryFollower(AttentionFollower):
    """Base of the followers of attentions with rotary positions (RoFormer, arXiv 2104.09864)."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels).
            rope: Sines and cosines of the positions of patches, broadcastable to (B, H, patches, 2 * D), or None.
            attn_mask: bool (True: may be seen) or floating (added to the scores), broadcastable to (B, H, N, N).
            is_causal: Token i sees tokens 0 to i; excludes `attn_mask`.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the labels with, or None.

        Returns:
            (B, N, channels), with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        query, key, value = self._project(x)
        query, key = self._rotate(self.q_norm(query), rope, value), self._rotate(self.k_norm(key), rope, value)
        groups = self.num_heads // key.shape[2]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        attended, share = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            share,
            residual,
            **attention_options(self),
            **mask_options(attn_mask, is_causal, x),
        )
        return project_attended(self, x, attended.transpose(1, 2)), share

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query (B, N, H, D), key and value, (B, N, H, D) or with fewer heads."""
        if self.qkv is not None:
            return self._packed_projection(x).unbind(2)
        return tuple(layer(x).unflatten(2, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))

    def _packed_projection(self, x: Tensor) -> Tensor:
        """(B, N, 3, H, D)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))

    def _rotate(self, x: Tensor, rope: Tensor | None, value: Tensor) -> Tensor:
        """Rotates the patches of a query or key (B, N, H, D), which then has the dtype of the value.

        timm rotates (B, H, N, D); here tokens stay first, as the projections and their gradients lie in memory.
        """
        if rope is None:
            return x
        rope = rope[:, None] if rope.dim() == 2 else rope.transpose(-3, -2)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat((prefix, tl.apply_rot_embed_cat(patches, rope, half=self.rotate_half)), dim=1).to(value.dtype)


class AlignedEvaAttention(RotaryFollower, eva.EvaAttention):
    """timm's `EvaAttention` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "ab5e17e344c38aae"}

    def _packed_projection(self, x: Tensor) -> Tensor:
        return biased_projection(self, x)[0]


class AlignedAttentionRope(RotaryFollower, tl.AttentionRope):
    """timm's `AttentionRope` with label propagation; heads of queries may share keys and values."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "3f742ca1632dca04"}


class RotaryBlockFollower(BlockFollower):
    """Base of the followers of blocks of `Eva`."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        share: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `RotaryFollower`."""
        if share is None:
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return self.run_branches(x, share, rope, attn_mask, is_causal)


class AlignedEvaBlock(RotaryBlockFollower, ScaledBlockFollower, eva.EvaBlock):
    """timm's pre-norm `EvaBlock` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "9b96d44bdb2cb974"}


class AlignedEvaBlockPostNorm(RotaryBlockFollower, PostNormBlockFollower, eva.EvaBlockPostNorm):
    """timm's post-norm `EvaBlockPostNorm`, for labels the same as the pre-norm one."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "faead0d7f3b7dfea"}


class AlignedEva(MaskedPlainFollower, eva.Eva):
    """timm's `Eva` that returns the aligned target beside the logits when it is given a target."""

    label_poolings = ("token", "avg", "map")
    mirrors: ClassVar[dict[str, str]] = {
        "forward": "9ed6fe15bc690b49",
        "forward_features": "90770b0c066950d6",
        "forward_head": "6ffd980ee93378b8",
        "pool": "322725d8cb37a34e",
        "_pos_embed": "74d4d380a3e6973c",
    }
    untouched = (*MaskedPlainFollower.untouched, "rope", "patch_drop")

    def _embed(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, list[tuple]]:
        x, rope = eva.Eva._pos_embed(_WithoutPatchDropout(self), x)
        if self.patch_drop is not None:
            x, kept = self.patch_drop(x)
            if kept is not None:
                share = gather_share(share, kept, self.num_prefix_tokens)
                if rope is not None:
                    rope = tl.apply_keep_indices_nlc(x, rope, kept)
                    # The dimension of images comes after that of blocks, and before that of heads.
                    rope = rope.transpose(0, 1) if self.rope_mixed else rope.unsqueeze(1)
        is_by_block = self.rope_mixed and rope is not None
        positions = [(rope[index] if is_by_block else rope,) for index in range(len(self.blocks))]
        return self.norm_pre(x), share, positions

    def _aligned_head(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        if self.attn_pool is None:
            return super()._aligned_head(x, share)
        x, share = follow(self.attn_pool, x, share=share)
        return self.head(self.head_drop(self.fc_norm(x))), share


class _WithoutPatchDropout:
    """A model as if it dropped no patches, for timm's `_pos_embed`, which keeps to itself which it drops at its end."""

    patch_drop = None

    def __init__(self, model: eva.Eva) -> None:
        self.model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)


register(eva.EvaAttention, AlignedEvaAttention)
register(tl.AttentionRope, AlignedAttentionRope)
register(eva.EvaBlock, AlignedEvaBlock)
register(eva.EvaBlockPostNorm, AlignedEvaBlockPostNorm)
register(eva.Eva, AlignedEva)
