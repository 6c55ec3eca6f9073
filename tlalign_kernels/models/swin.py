"""How labels pass through timm's Swin Transformers (swin_transformer, swin_transformer_v2, swin_transformer_v2_cr).

Tokens are a map (B, Ht, Wt, channels), and their labels one of (B, Ht, Wt, S). The classes here are public: a model of
one's own can be built with them, passing `share` from block to block.
"""

from __future__ import annotations

import math
from typing import ClassVar

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

from tlalign_kernels.functional import window_attention
from tlalign_kernels.labels import MixedTarget, pool_share
from tlalign_kernels.models.plain import (
    BlockFollower,
    PostNormBlockFollower,
    UnscaledBlockFollower,
    biased_projection,
    check_image_size,
    check_patch_embed,
)
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    attention_dropout,
    check_head_dim,
    check_pooling,
    follow,
    projected_padding,
    register,
    run_block,
    run_stages,
)
from tlalign_kernels.windows import Windows


class WindowFollower(LabelFollower):
    """Base of the followers of window attentions. With a share they take the map, which is not cut into windows."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        shift: tuple[int, int] = (0, 0),
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within the windows of a map, and mixes labels with the mean of the heads.

        timm's blocks shift, pad and cut the map before the attention; with a share the attention does that, with the
        mask of the shift, by indexing.

        Args:
            x: (B, Ht, Wt, channels) with a share; (B * W, N, channels), windows, without one.
            mask: timm's mask of shifted windows; None with a share.
            shift: Tokens by which the map is rolled towards its start along each axis; of no account without a share.
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            residual: (B, Ht, Wt, S) to average the labels with, or None.

        Returns:
            The shape of `x`, with a share also the new share (B, Ht, Wt, S).

        Raises:
            ValueError: If there is a mask beside a share.
        """
        if share is None:
            return super().forward(x, mask=mask)
        if mask is not None:
            raise ValueError("mask: expected None with a share, whose windows follow from the shift, got a tensor")
        by_heads = (3, self.num_heads, -1)
        qkv, in_padding = self._project(x, by_heads)
        is_padded = Windows(tuple(x.shape[1:3]), self.window_size, shift).is_padded()
        attended, share = window_attention(
            self._compared(qkv),
            share,
            residual,
            window_size=self.window_size,
            shift=shift,
            bias=self._position_bias(),
            pad_qkv=self._compared(in_padding) if is_padded and in_padding is not None else None,
            scale=self._score_scale(),
            dropout_p=attention_dropout(self),
            backend=self.label_backend,
        )
        return self.proj_drop(self.proj(attended.flatten(3))), share

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError if weights are made by no softmax, and for heads that no backend has."""
        check_head_dim(module.qkv.out_features // (3 * module.num_heads), name)
        softmax = getattr(module, "softmax", None)
        if softmax is not None and (type(softmax) is not nn.Softmax or softmax.dim != -1):
            raise NotImplementedError(f"{name}.softmax: can't follow labels through {softmax}")

    def _project(self, x: Tensor, by_heads: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
        """The projection (B, Ht, Wt, 3, H, D), and what it is in the padding, `by_heads`, (3, H, D); None: zeros."""
        return self.qkv(x).unflatten(-1, by_heads), projected_padding(self.qkv, x, by_heads)

    def _compared(self, qkv: Tensor) -> Tensor:
        """Of a projection (..., 3, H, D) the query, key and value that attend."""
        return qkv

    def _position_bias(self) -> Tensor:
        """Relative position bias (H, N, N)."""
        raise NotImplementedError

    def _score_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.scale


class CosineWindowFollower(WindowFollower):
    """Base of the followers of cosine attention (Swin v2, arXiv 2111.09883, equation 2)."""

    def _compared(self, qkv: Tensor) -> Tensor:
        logit_scale = self.logit_scale.view(-1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
        factors = torch.stack((logit_scale, torch.ones_like(logit_scale)))
        # The gradient of a split is one copy, those of two slices are filled with zeros and added.
        query_key, value = qkv.split((2, 1), dim=-3)
        query_key = F.normalize(query_key, dim=-1) * factors
        # The factors are parameters, which autocast leaves in float32.
        return torch.cat((query_key.to(qkv.dtype), value), dim=-3)

    def _score_scale(self) -> float:
        return 1.0


class AlignedWindowAttention(WindowFollower, swin_transformer.WindowAttention):
    """timm's `WindowAttention` of Swin with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "25ecc84950d14999", "_get_rel_pos_bias": "28d9cb9d886b8363"}
    untouched = ("softmax",)

    def _position_bias(self) -> Tensor:
        return _gathered(self.relative_position_bias_table, self.relative_position_index)


class AlignedWindowAttentionV2(CosineWindowFollower, swin_transformer_v2.WindowAttention):
    """timm's `WindowAttention` of Swin v2 with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "127a2e4fdaaa7f29"}
    untouched = ("softmax", "cpb_mlp")

    def _project(self, x: Tensor, by_heads: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
        qkv, bias = biased_projection(self, x)
        if self.q_bias is not None and not self.qkv_bias_separate:
            return qkv, bias
        adapted = projected_padding(self.qkv, x, by_heads)  # by itself the projection has no bias
        if bias is None or adapted is None:
            return qkv, bias if adapted is None else adapted
        return qkv, adapted + bias

    def _position_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return _gathered(16 * torch.sigmoid(table), self.relative_position_index)


class AlignedWindowMultiHeadAttention(CosineWindowFollower, swin_transformer_v2_cr.WindowMultiHeadAttention):
    """timm's `WindowMultiHeadAttention` of Swin v2-CR with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "a86e7d6d4a438431",
        "_relative_positional_encodings": "d46e8d6e43cbd9a8",
    }
    untouched = ("meta_mlp",)

    def _position_bias(self) -> Tensor:
        return self._relative_positional_encodings().squeeze(0)


class WindowBlockFollower(BlockFollower):
    """Base of the followers of blocks of Swin Transformers."""

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Takes and returns tokens (B, Ht, Wt, channels) and, if given, their share (B, Ht, Wt, S)."""
        if share is None:
            return super().forward(x)
        return self.run_branches(x, share, None, self.shift_size)


class AlignedSwinTransformerBlock(WindowBlockFollower, UnscaledBlockFollower, swin_transformer.SwinTransformerBlock):
    """timm's pre-norm block of Swin with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "5a71b5cc50667a76",
        "_attn": "57f69f816fc89a91",
        "get_attn_mask": "e8159378f675ed97",
    }


class AlignedSwinTransformerV2Block(
    WindowBlockFollower, PostNormBlockFollower, swin_transformer_v2.SwinTransformerV2Block
):
    """timm's post-norm block of Swin v2, for labels the same as the pre-norm one."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "661532ae2eb783c7",
        "_attn": "551055f241240c05",
        "get_attn_mask": "c5b7d625c4297baf",
    }


class AlignedSwinTransformerV2CrBlock(
    WindowBlockFollower, PostNormBlockFollower, swin_transformer_v2_cr.SwinTransformerV2CrBlock
):
    """timm's post-norm block of Swin v2-CR, which some end with a norm of all that passes."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "eaa296407bc1fba7",
        "_shifted_window_attn": "615b4fa435bbf1f6",
        "get_attn_mask": "cd546d64bb5d5c14",
    }

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As for `WindowBlockFollower`."""
        if share is None:
            return super().forward(x)
        x, share = super().forward(x, share)
        return self.norm3(x), share


class MergingFollower(LabelFollower):
    """Base of the followers of patch mergings: the label of 2 x 2 merged tokens is the mean of those in the map."""

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Merges tokens (B, Ht, Wt, channels) and, if given, their share (B, Ht, Wt, S); sizes are rounded up."""
        merged = super().forward(x)
        return merged if share is None else (merged, pool_share(share, (2, 2)))


class AlignedPatchMerging(MergingFollower, swin_transformer.PatchMerging):
    """timm's `PatchMerging` of Swin."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "ffc6c1e41c5c03b8"}


class AlignedPatchMergingV2(MergingFollower, swin_transformer_v2.PatchMerging):
    """timm's `PatchMerging` of Swin v2."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "033244176497eab9"}


class AlignedPatchMergingV2Cr(MergingFollower, swin_transformer_v2_cr.PatchMerging):
    """timm's `PatchMerging` of Swin v2-CR."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "02916dc34900e954"}


class StageFollower(LabelFollower):
    """Base of the followers of stages: a merging of patches, where there is one, and blocks."""

    def forward(
        self, x: Tensor, share: Tensor | None = None, collect_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Runs the stage.

        Args:
            x: (B, Ht, Wt, channels).
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            collect_layers: Return the share after each block as well; of no account without a share.

        Returns:
            Tokens; with a share also the new one; with `collect_layers` also a tuple of those after each block.
        """
        if share is None:
            return super().forward(x)
        if isinstance(self.downsample, nn.Identity):
            x = self.downsample(x)
        else:
            x, share = follow(self.downsample, x, share=share)
        layer_shares = []
        for block in self.blocks:
            x, share = run_block(block, x, share=share, checkpoints=self.grad_checkpointing)
            if collect_layers:
                layer_shares.append(share.detach())
        return (x, share, tuple(layer_shares)) if collect_layers else (x, share)


class AlignedSwinTransformerStage(StageFollower, swin_transformer.SwinTransformerStage):
    """timm's `SwinTransformerStage`."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "10df9c423b6a4d3a"}


class AlignedSwinTransformerV2Stage(StageFollower, swin_transformer_v2.SwinTransformerV2Stage):
    """timm's `SwinTransformerV2Stage`."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "3c788a3a9b56acac"}


class AlignedSwinTransformerV2CrStage(StageFollower, swin_transformer_v2_cr.SwinTransformerV2CrStage):
    """timm's `SwinTransformerV2CrStage`, whose tokens come and go as (B, channels, Ht, Wt); labels do not."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "1398dd53c11841c7"}

    def forward(
        self, x: Tensor, share: Tensor | None = None, collect_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As for `StageFollower`, but for the tokens (B, channels, Ht, Wt)."""
        if share is None:
            return super().forward(x)
        x, *labels = super().forward(x.permute(0, 2, 3, 1), share, collect_layers)
        return x.permute(0, 3, 1, 2), *labels


class SwinFollower(ImageModelFollower):
    """Base of the followers of whole Swin Transformers, which return the aligned target beside the logits."""

    untouched = ("patch_embed", "head")

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The blocks of all stages."""
        return [block for stage in cls._stages(model) for block in stage.blocks]

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for stems that attend and for heads without a label."""
        check_patch_embed(module.patch_embed, (tl.PatchEmbed, swin_transformer_v2_cr.PatchEmbed))
        check_head(module, tl.ClassifierHead)

    def align(self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """As for `ModelFollower`."""
        check_image_size(self.patch_embed, tuple(x.shape[-2:]))
        check_head(self, tl.ClassifierHead)
        x = self.patch_embed(x)
        grid_size = self._grid_size(x)
        share = target.token_share(grid_size, self.patch_embed.patch_size, x.dtype).unflatten(1, grid_size)
        x, share = run_stages(self._stages(self), x, share, layer_shares)
        return self.forward_head(self._after_stages(x)), share.mean(dim=(1, 2))

    @staticmethod
    def _stages(model: nn.Module) -> nn.Sequential:
        return model.layers

    def _grid_size(self, x: Tensor) -> tuple[int, int]:
        """Ht and Wt of the embedded patches."""
        return x.shape[1], x.shape[2]

    def _after_stages(self, x: Tensor) -> Tensor:
        """What timm's `forward_features` does after the stages."""
        return self.norm(x)


class AlignedSwinTransformer(SwinFollower, swin_transformer.SwinTransformer):
    """timm's `SwinTransformer` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "4c1d05439e92af94",
        "forward_features": "0e921f3abae8b117",
        "forward_head": "5a8a4944934a0d25",
    }


class AlignedSwinTransformerV2(SwinFollower, swin_transformer_v2.SwinTransformerV2):
    """timm's `SwinTransformerV2` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "e94e14f14d2d9be9",
        "forward_features": "83b75c7845625c2a",
        "forward_head": "5c619f6f4c53bd47",
    }


class AlignedSwinTransformerV2Cr(SwinFollower, swin_transformer_v2_cr.SwinTransformerV2Cr):
    """timm's `SwinTransformerV2Cr` with label propagation."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "dba481f2c07a8d2d",
        "forward_features": "2ff4585bd64b4006",
        "forward_head": "c2a393e275534352",
    }

    @staticmethod
    def _stages(model: nn.Module) -> nn.Sequential:
        return model.stages

    def _grid_size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2], x.shape[3]

    def _after_stages(self, x: Tensor) -> Tensor:
        return x


def _gathered(table: Tensor, index: Tensor) -> Tensor:
    """Bias (H, N, N) from a table of relative positions; for its gradient see `functional._relative_position_bias`."""
    return F.embedding(index, table).permute(2, 0, 1)


def check_head(model: nn.Module, *classes: type[nn.Module]) -> None:
    """Raises NotImplementedError unless a model's head is of timm's `classes`, and averages the tokens of a map."""
    if type(model.head) not in classes:
        raise NotImplementedError(f"head: can't follow labels through {type(model.head).__name__}")
    check_pooling(model.head.global_pool.pool_type, "avg")


for _module_class, _follower in (
    (swin_transformer.WindowAttention, AlignedWindowAttention),
    (swin_transformer.SwinTransformerBlock, AlignedSwinTransformerBlock),
    (swin_transformer.PatchMerging, AlignedPatchMerging),
    (swin_transformer.SwinTransformerStage, AlignedSwinTransformerStage),
    (swin_transformer.SwinTransformer, AlignedSwinTransformer),
    (swin_transformer_v2.WindowAttention, AlignedWindowAttentionV2),
    (swin_transformer_v2.SwinTransformerV2Block, AlignedSwinTransformerV2Block),
    (swin_transformer_v2.PatchMerging, AlignedPatchMergingV2),
    (swin_transformer_v2.SwinTransformerV2Stage, AlignedSwinTransformerV2Stage),
    (swin_transformer_v2.SwinTransformerV2, AlignedSwinTransformerV2),
    (swin_transformer_v2_cr.WindowMultiHeadAttention, AlignedWindowMultiHeadAttention),
    (swin_transformer_v2_cr.SwinTransformerV2CrBlock, AlignedSwinTransformerV2CrBlock),
    (swin_transformer_v2_cr.PatchMerging, AlignedPatchMergingV2Cr),
    (swin_transformer_v2_cr.SwinTransformerV2CrStage, AlignedSwinTransformerV2CrStage),
    (swin_transformer_v2_cr.SwinTransformerV2Cr, AlignedSwinTransformerV2Cr),
):
    register(_module_class, _follower)
