"""How labels pass through timm's PVT v2, whose tokens form a pyramid of maps and attend to a reduced map."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from timm.models import pvt_v2
from torch import Tensor, nn

from tlalign_kernels.functional import attention
from tlalign_kernels.labels import MixedTarget, pool_share
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    attention_options,
    check_head_dim,
    check_pooling,
    follow,
    register,
    run_block,
    run_stages,
)


def attend_to_reduced(
    module: nn.Module, x: Tensor, reduced: Tensor, share: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of PVT v2 or Twins, `module`, to keys and values made of other tokens.

    Args:
        module: Has timm's `q`, `kv`, `proj` and `proj_drop`.
        x: (B, N, channels), what queries are made of.
        reduced: (B, Nk, channels), what keys and values are made of.
        share: (B, Nk, S) of these.
        residual: (B, N, S) to average the labels with, or None.

    Returns:
        (B, N, channels) and the new share (B, N, S).
    """
    heads = (module.num_heads, x.shape[2] // module.num_heads)
    query = module.q(x).unflatten(2, heads).transpose(1, 2)
    key, value = module.kv(reduced).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
    attended, share = attention(query, key, value, share, residual, **attention_options(module))
    return module.proj_drop(module.proj(attended.transpose(1, 2).flatten(2))), share


class AlignedAttention(LabelFollower, pvt_v2.Attention):
    """timm's attention to reduced keys and values: their labels are means over what a key was made of."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "7e415347d098ec7a"}
    untouched = ("pool", "sr")

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError if another module than timm's reduces keys, and for heads that no backend has."""
        check_head_dim(module.head_dim, name)
        if module.sr is not None:
            check_convolution(module.sr, f"{name}.sr", overlap=False)
        if module.pool is not None and type(module.pool) is not nn.AdaptiveAvgPool2d:
            raise NotImplementedError(f"{name}.pool: can't follow labels through {type(module.pool).__name__}")

    def forward(
        self,
        x: Tensor,
        feat_size: tuple[int, int],
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends to the reduced map, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels).
            feat_size: Ht and Wt of the map that the tokens form.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the labels with, or None.

        Returns:
            (B, N, channels), with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x, feat_size)
        reduced, share = (x, share) if self.sr is None else self._reduced(x, feat_size, share)
        return attend_to_reduced(self, x, reduced, share, residual)

    def _reduced(self, x: Tensor, feat_size: tuple[int, int], share: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, Nk, channels) that keys and values are made of, and their labels (B, Nk, S)."""
        x, share = x.transpose(1, 2).unflatten(2, feat_size), share.unflatten(1, feat_size)
        if self.pool is None:
            share = pool_share(share, stride_of(self.sr), partial_cells=False)
        else:
            x = self.pool(x)
            share = F.adaptive_avg_pool2d(share.permute(0, 3, 1, 2), self.pool.output_size).permute(0, 2, 3, 1)
        x = self.norm(self.sr(x).flatten(2).transpose(1, 2))
        return x if self.act is None else self.act(x), share.flatten(1, 2)


class AlignedBlock(LabelFollower, pvt_v2.Block):
    """timm's `Block`: labels go through the attention and its residual, the MLP leaves them as they are."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "174a3c0df608224a"}

    def forward(
        self, x: Tensor, feat_size: tuple[int, int], share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedAttention`."""
        if share is None:
            return super().forward(x, feat_size)
        residual = share if self.label_residual else None
        attended, mixed = follow(self.attn, self.norm1(x), feat_size, share, residual)
        attended, share = self.drop_attention(self.drop_path1, attended, mixed, share)
        x = x + attended
        x = x + self.drop_path2(self.mlp(self.norm2(x), feat_size))
        return x, share


class AlignedMlpWithDepthwiseConv(LabelFollower, pvt_v2.MlpWithDepthwiseConv):
    """timm's MLP of PVT v2: its depth-wise convolution counts as channel mixing, labels stay (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "fd7ac3fe51815489"}
    untouched = ("dwconv",)


class AlignedOverlapPatchEmbed(LabelFollower, pvt_v2.OverlapPatchEmbed):
    """timm's patch embedding with overlap: a token stands for the cell of the stride, not for its receptive field."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "26e8c70f06f70885"}
    untouched = ("proj",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError unless there is a token for each cell, also for those at the end of the map."""
        check_convolution(module.proj, f"{name}.proj", overlap=True)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds a map (B, channels, Ht, Wt), and merges its labels (B, Ht, Wt, S) if they are given."""
        if share is None:
            return super().forward(x)
        return super().forward(x), pool_share(share, stride_of(self.proj))


class AlignedPyramidVisionTransformerStage(LabelFollower, pvt_v2.PyramidVisionTransformerStage):
    """timm's stage: a patch embedding but in the first, and blocks."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "f1b7b46e569c24f8"}

    def forward(
        self, x: Tensor, share: Tensor | None = None, collect_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Runs the blocks on a map of tokens.

        Args:
            x: (B, channels, Ht, Wt), in a stage without a patch embedding (B, Ht, Wt, channels).
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            collect_layers: Return the share after each block as well; of no account without a share.

        Returns:
            (B, channels, Ht, Wt); with a share also the new share (B, Ht, Wt, S); with `collect_layers` also a tuple of
            those after each block.
        """
        if share is None:
            return super().forward(x)
        if self.downsample is not None:
            x, share = follow(self.downsample, x, share)
        feat_size = tuple(x.shape[1:3])
        x, share, layer_shares = x.flatten(1, 2), share.flatten(1, 2), []
        for block in self.blocks:
            x, share = run_block(block, x, feat_size, share=share, checkpoints=self.grad_checkpointing)
            if collect_layers:
                layer_shares.append(share.detach().unflatten(1, feat_size))
        x = self.norm(x).unflatten(1, feat_size).permute(0, 3, 1, 2)
        share = share.unflatten(1, feat_size)
        return (x, share, tuple(layer_shares)) if collect_layers else (x, share)


class AlignedPyramidVisionTransformerV2(ImageModelFollower, pvt_v2.PyramidVisionTransformerV2):
    """timm's `PyramidVisionTransformerV2` that returns the aligned target beside the logits when it is given one."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "b6a6653831a7fb8a",
        "forward_features": "b52752d3630ae09b",
        "forward_head": "ff2af79defa988b0",
    }
    untouched = ("head",)

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The transformer blocks of all stages."""
        return [block for stage in model.stages for block in stage.blocks]

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for a model that does not pool its tokens."""
        check_pooling(module.global_pool, "avg")

    def align(self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """As for `ModelFollower`."""
        self.check(self, "model")
        x = self.patch_embed(x)
        grid_size = tuple(x.shape[1:3])
        share = target.token_share(grid_size, stride_of(self.patch_embed.proj), x.dtype).unflatten(1, grid_size)
        x, share = run_stages(self.stages, x, share, layer_shares)
        return self.forward_head(x), share.mean(dim=(1, 2))


def check_convolution(conv: nn.Module, name: str, overlap: bool) -> None:
    """Raises NotImplementedError unless the outputs of a convolution stand for the cells of its stride.

    Args:
        conv: The module that should be such a convolution.
        name: What to call it.
        overlap: Whether its kernel is odd and padded by its half, so that there is an output for each cell; else the
            kernel is the cell, and there is one for each whole cell.
    """
    if type(conv) is not nn.Conv2d:
        raise NotImplementedError(f"{name}: can't follow labels through {type(conv).__name__}")
    if overlap:
        wanted = "odd and padded by their half"
        kernel_size = tuple(size // 2 * 2 + 1 for size in conv.kernel_size)
        padding = tuple(size // 2 for size in kernel_size)
    else:
        wanted, kernel_size, padding = "the stride, without padding", conv.stride, (0, 0)
    if (conv.kernel_size, conv.padding, conv.dilation) != (kernel_size, padding, (1, 1)):
        raise NotImplementedError(
            f"{name}: labels are defined for kernels that are {wanted}, got a kernel of {conv.kernel_size}, stride "
            f"{conv.stride}, padding {conv.padding}, dilation {conv.dilation}"
        )


def stride_of(conv: nn.Module) -> tuple[int, int]:
    """Stride of a convolution, or of the one that an adapter holds."""
    return next(module for module in conv.modules() if isinstance(module, nn.Conv2d)).stride


register(pvt_v2.Attention, AlignedAttention)
register(pvt_v2.Block, AlignedBlock)
register(pvt_v2.MlpWithDepthwiseConv, AlignedMlpWithDepthwiseConv)
register(pvt_v2.OverlapPatchEmbed, AlignedOverlapPatchEmbed)
register(pvt_v2.PyramidVisionTransformerStage, AlignedPyramidVisionTransformerStage)
register(pvt_v2.PyramidVisionTransformerV2, AlignedPyramidVisionTransformerV2)
