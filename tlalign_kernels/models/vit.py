"""How labels pass through timm's VisionTransformer and its blocks (vision_transformer, deit, hybrid, vitamin).

The classes here are public: a model of one's own can be built with them, passing `share` from block to block, as in
`x, share = AlignedBlock(dim, num_heads, attn_layer=AlignedAttention)(x, share=share)`.
"""

from __future__ import annotations

from typing import ClassVar

import timm.layers as tl
import torch
from timm.layers import activations as timm_activations
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import deit, vision_transformer, vitamin
from torch import Tensor, nn

from tlalign_kernels.functional import attention
from tlalign_kernels.labels import gather_share, residual_share
from tlalign_kernels.models.plain import (
    AttentionFollower,
    BlockFollower,
    MaskedPlainFollower,
    PostNormBlockFollower,
    PrefixPoolingFollower,
    attend,
    mask_options,
    project_attended,
)
from tlalign_kernels.patch import LabelFollower, attention_options, check_head_dim, drop_path_factor, follow, register


class AlignedAttention(AttentionFollower, tl.Attention):
    """timm's `Attention` with label propagation: Y^ = mean_h(A_h) . Y (TL-Align, arXiv 2210.06455)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "37a80e0fdf45af9c"}

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels).
            attn_mask: bool (True: may be seen) or floating (added to the scores), broadcastable to (B, H, N, N).
            is_causal: Token i sees tokens 0 to i; excludes `attn_mask`.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the labels with, or None.

        Returns:
            (B, N, channels), with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        attended, share = attend(self, qkv, share, residual, **mask_options(attn_mask, is_causal, x))
        return project_attended(self, x, attended), share


class MaskedBlockFollower(BlockFollower):
    """Base of the followers of blocks of `VisionTransformer`."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedAttention`."""
        if share is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.run_branches(x, share, attn_mask, is_causal)


class AlignedBlock(MaskedBlockFollower, vision_transformer.Block):
    """timm's pre-norm `Block` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "2cb6f77c3039d89c"}


class AlignedResPostBlock(MaskedBlockFollower, PostNormBlockFollower, vision_transformer.ResPostBlock):
    """timm's post-norm `ResPostBlock`, for labels the same as the pre-norm one."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "e4c41427902a8088"}


class AlignedParallelScalingBlock(AttentionFollower, vision_transformer.ParallelScalingBlock):
    """timm's `ParallelScalingBlock`: one residual around attention and MLP, which counts as the attention's."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "19c3e45701ce1613"}

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedAttention`."""
        if share is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        batch, tokens, channels = x.shape
        x_mlp, query, key, value = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            x_mlp = x_mlp + self.mlp_bias
        heads = (batch, tokens, self.num_heads, self.head_dim)
        attended, mixed = attention(
            self.q_norm(query.view(heads)).transpose(1, 2),
            self.k_norm(key.view(heads)).transpose(1, 2),
            value.view(heads).transpose(1, 2),
            share,
            share if self.label_residual else None,
            **attention_options(self),
            **mask_options(attn_mask, is_causal, x),
        )
        attended = attended.transpose(1, 2).reshape(batch, tokens, channels)
        x_mlp = self.mlp_drop(self.mlp_act(x_mlp))
        if self.out_proj is not None:
            y = self.out_proj(torch.cat((attended, x_mlp), dim=-1))
        else:
            y = self.attn_out_proj(attended) + self.mlp_out_proj(x_mlp)
        y, share = self.drop_attention(self.drop_path, self.ls(y), mixed, share)
        return x + y, share


class AlignedParallelThingsBlock(LabelFollower, vision_transformer.ParallelThingsBlock):
    """timm's `ParallelThingsBlock`: n attentions in one residual, whose label is the mean over the n + 1 paths."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "91bf095522afd56f"}

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedAttention`."""
        if share is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        attended, mixed, kept = [], [], []
        for branch in self.attns:
            y, branch_share = follow(branch.attn, branch.norm(x), attn_mask, is_causal, share)
            y = branch.ls(y)
            if self.label_stochastic_depth:
                factor = drop_path_factor(branch.drop_path, y)
                y = y * factor
                kept.append(factor != 0)
            else:
                y = branch.drop_path(y)
            attended.append(y)
            mixed.append(branch_share)
        x = x + torch.stack(attended).sum(dim=0)
        x = x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)
        if self.label_stochastic_depth:
            return x, _share_of_kept(share, mixed, kept, self.label_residual)
        return x, residual_share(share, *mixed) if self.label_residual else sum(mixed) / len(mixed)


class AlignedAttentionPoolLatent(LabelFollower, AttentionPoolLatent):
    """timm's `AttentionPoolLatent`: the pooled label is what the latent query attends to, A.Y."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "327a3f339ba6d338"}

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError if several latents are left unpooled, and for heads that no backend has."""
        check_head_dim(module.head_dim, name)
        if module.pool not in ("token", "avg"):
            raise NotImplementedError(f"{name}: can't follow labels through pool_type {module.pool!r}")

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pools tokens (B, N, channels) to (B, channels) and, if given, their share (B, N, S) to (B, S)."""
        if share is None:
            return super().forward(x, attn_mask=attn_mask)
        batch, tokens, channels = x.shape
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        query = self.q(self.latent.expand(batch, -1, -1)).view(batch, self.latent_len, self.num_heads, self.head_dim)
        key, value = self.kv(x).view(batch, tokens, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x, share = attention(
            self.q_norm(query.transpose(1, 2)),
            self.k_norm(key),
            value,
            share,
            scale=self.scale,
            backend=self.label_backend,
            **mask_options(attn_mask, False, x),
        )
        x = self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, self.latent_len, channels)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return (x[:, 0], share[:, 0]) if self.pool == "token" else (x.mean(1), share.mean(1))


class AlignedPatchDropout(LabelFollower, tl.PatchDropout):
    """timm's `PatchDropout`: labels of the dropped tokens go with them."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "bcbf1cedc66c9293"}

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Drops tokens of x (B, N, channels) and, if given, of their share (B, N, S)."""
        if share is None:
            return super().forward(x)
        x, kept = patch_dropout_forward(x, self.prob, self.num_prefix_tokens, self.ordered, self.training)
        return x, share if kept is None else gather_share(share, kept, self.num_prefix_tokens)


class AlignedVisionTransformer(MaskedPlainFollower, PrefixPoolingFollower, vision_transformer.VisionTransformer):
    """timm's `VisionTransformer` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "baf4cb09a321c472",
        "forward_features": "00c84be8897149e5",
        "forward_head": "78a9dd72847e326c",
        "pool": "9262402a3193eba1",
        "_pos_embed": "7a2e167abcde1626",
    }

    def _embed(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, list[tuple]]:
        x = self._pos_embed(x)
        if isinstance(self.patch_drop, nn.Identity):
            x = self.patch_drop(x)
        else:
            x, share = follow(self.patch_drop, x, share)
        return self.norm_pre(x), share, [()] * len(self.blocks)


class AlignedVisionTransformerDistilled(AlignedVisionTransformer, deit.VisionTransformerDistilled):
    """timm's distilled DeiT: the label of the averaged heads is the mean of both tokens'."""

    mirrors: ClassVar[dict[str, str]] = {
        **AlignedVisionTransformer.mirrors,
        "forward_head": "53b98c13c4b33a9d",
        "_pos_embed": "d92e1033005844e1",
    }
    untouched = ("patch_embed", "head", "head_dist")

    @classmethod
    def check_transmix(cls, model: nn.Module) -> None:
        """As for `PlainFollower`; and for PatchDropout, which in timm takes the distillation token for a patch."""
        super().check_transmix(model)
        if not isinstance(model.patch_drop, nn.Identity):
            raise NotImplementedError(
                "patch_drop: expected none in a distilled model for TransMix, since it may drop the distillation "
                f"token, got {model.patch_drop}"
            )

    def _aligned_head(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.forward_head(x)
        if isinstance(logits, tuple):
            return logits, (share[:, 0], share[:, 1])
        return logits, share[:, :2].mean(dim=1)


def _share_of_kept(share: Tensor, mixed: list[Tensor], kept: list[Tensor], residual: bool) -> Tensor:
    """The mean (B, N, S) over branches that are kept (B, 1, 1), with the residual if asked for or if none is kept."""
    kept = torch.stack(kept)
    passes_by = kept.sum(dim=0) == 0 if not residual else kept.new_ones(())
    total = share * passes_by + (torch.stack(mixed) * kept).sum(dim=0)
    return total / (kept.sum(dim=0) + passes_by)


register(tl.Attention, AlignedAttention)
register(AttentionPoolLatent, AlignedAttentionPoolLatent)
register(tl.PatchDropout, AlignedPatchDropout)
register(vision_transformer.Block, AlignedBlock)
register(vision_transformer.ResPostBlock, AlignedResPostBlock)
register(vision_transformer.ParallelScalingBlock, AlignedParallelScalingBlock)
register(vision_transformer.ParallelThingsBlock, AlignedParallelThingsBlock)
register(vision_transformer.VisionTransformer, AlignedVisionTransformer)
register(deit.VisionTransformerDistilled, AlignedVisionTransformerDistilled)

for _module_class in (
    # containers
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterDict,
    # on each token alone
    nn.Identity, nn.Linear, nn.Dropout, tl.DropPath, tl.LayerScale,
    nn.LayerNorm, nn.RMSNorm, tl.LayerNorm, tl.LayerNormFp32, tl.RmsNorm, tl.RmsNormFp32,
    tl.SimpleNorm, tl.SimpleNormFp32,
    tl.Mlp, tl.GluMlp, tl.SwiGLU, vitamin.GeGluMlp,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    timm_activations.GELU, timm_activations.GELUTanh, timm_activations.QuickGELU, timm_activations.Swish,
    timm_activations.Sigmoid, timm_activations.Tanh,
):  # fmt: skip
    register(_module_class, None)
