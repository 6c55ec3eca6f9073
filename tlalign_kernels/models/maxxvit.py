"""How labels pass through timm's MaxViT and CoAtNet (maxxvit), which convolve and attend by turns.

Tokens are a map (B, channels, Ht, Wt), and their labels one of (B, Ht, Wt, S). A convolution, whatever its kernel,
counts as mixing of channels; where it or a pooling, by maximum too (coatnet_rmlp_1_rw), makes one token of a cell of
2 x 2, that has the mean of their labels.
"""

from __future__ import annotations

from typing import ClassVar

import timm.layers as tl
import torch
from timm.models import maxxvit
from torch import Tensor, nn

from tlalign_kernels.functional import attention_qkv, window_attention
from tlalign_kernels.labels import MixedTarget, pool_share
from tlalign_kernels.models.plain import BlockFollower
from tlalign_kernels.models.pvt_v2 import check_convolution
from tlalign_kernels.models.swin import check_head
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    attention_options,
    check_head_dim,
    follow,
    register,
    run_block,
    run_stages,
)

_NORMS = (tl.LayerNorm2d, tl.RmsNorm2d, nn.BatchNorm2d)
# Names of what attends in a block of MaxViT.
_PARTS = ("attn_block", "attn_grid", "attn")


def merge_share(share: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, Ht, Wt, S) of a map before a stride of 1 or 2, of the map of another `size` after it."""
    before = tuple(share.shape[1:3])
    if before == tuple(size):
        return share
    # Some strides round up, others down, as kernel and padding will have it.
    return pool_share(share, (2, 2), partial_cells=any(2 * new > old for new, old in zip(size, before, strict=True)))


class MapAttentionFollower(LabelFollower):
    """Base of the followers of attentions. With a share they take the map, which is not cut into partitions.

    Attributes:
        channels_first: Whether tokens are (B, channels, Ht, Wt) in the place of (B, Ht, Wt, channels).
    """

    channels_first: ClassVar[bool] = False

    def forward(
        self,
        x: Tensor,
        shared_rel_pos: Tensor | None = None,
        partition_size: tuple[int, int] | None = None,
        is_grid: bool = False,
        share: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends to all of a map or within its partitions, and mixes labels with the mean of the heads.

        Args:
            x: A map of tokens, see `channels_first`; without a share what timm's own forward takes.
            shared_rel_pos: (H, N, N) or (1, H, N, N), added to the scores where the attention has no bias of its own.
            partition_size: Tokens of a partition along each axis; None: all of the map. Of no account without a share.
            is_grid: Whether a partition has tokens of a grid over all of the map, at equal distances, in the place of
                neighbours; likewise.
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            residual: (B, Ht, Wt, S) to average the labels with, or None.

        Returns:
            The layout of `x`, with a share also the new share (B, Ht, Wt, S).

        Raises:
            ValueError: If partitions do not fit the map, or the bias not the partitions.
        """
        if share is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        x = x.permute(0, 2, 3, 1) if self.channels_first else x
        size = tuple(x.shape[1:3])
        partition_size = size if partition_size is None else tuple(partition_size)
        self._check_map(size, partition_size)
        if is_grid:
            # Its partitions are windows of a map that has the same tokens in another order.
            apart = tuple(tokens // number for tokens, number in zip(size, partition_size, strict=True))
            x, share = (_exchange(tensor, partition_size, apart) for tensor in (x, share))
            residual = None if residual is None else _exchange(residual, partition_size, apart)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        x, share = self._attend(x, partition_size, None if bias is None else bias.flatten(0, -3), share, residual)
        if is_grid:
            x, share = (_exchange(tensor, apart, partition_size) for tensor in (x, share))
        return (x.permute(0, 3, 1, 2) if self.channels_first else x), share

    def _attend(
        self, x: Tensor, window_size: tuple[int, int], bias: Tensor | None, share: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attends within windows of a map (B, Ht, Wt, channels), with a bias (H, N, N)."""
        by_heads = (self.num_heads, 3, self.dim_head) if self.head_first else (3, self.num_heads, self.dim_head)
        qkv = self._project(self.qkv, x).unflatten(3, by_heads)
        qkv = qkv.transpose(3, 4) if self.head_first else qkv
        options = {**attention_options(self), "bias": bias}
        size = tuple(x.shape[1:3])
        if window_size == size:
            # It needs no places of tokens, which takes up to a tenth off the time on a CPU.
            flat = (share.flatten(1, 2), None if residual is None else residual.flatten(1, 2))
            attended, share = (
                tensor.unflatten(1, size) for tensor in attention_qkv(qkv.flatten(1, 2), *flat, **options)
            )
        else:
            attended, share = window_attention(qkv, share, residual, window_size=window_size, **options)
        return self.proj_drop(self._project(self.proj, attended.flatten(3))), share

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a projection makes of tokens (B, Ht, Wt, channels)."""
        return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.channels_first else layer(x)

    def _check_map(self, size: tuple[int, int], partition_size: tuple[int, int]) -> None:
        if any(tokens % number for tokens, number in zip(size, partition_size, strict=True)):
            raise ValueError(f"images: expected maps that partitions of {partition_size} tokens divide, got {size}")
        if self.rel_pos is not None and tuple(self.rel_pos.window_size) != partition_size:
            raise ValueError(
                f"images: expected {tuple(self.rel_pos.window_size)} tokens to attend to each other, as the biases of "
                f"relative positions have, got {partition_size}; make the model for this image size"
            )

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads that no backend has."""
        check_head_dim(module.dim_head, name)


def _exchange(tensor: Tensor, outer: tuple[int, int], inner: tuple[int, int]) -> Tensor:
    """A map (B, outer * inner, outer * inner, C) as one of (B, inner * outer, inner * outer, C)."""
    parts = tensor.unflatten(2, (outer[1], inner[1])).unflatten(1, (outer[0], inner[0]))
    return parts.permute(0, 2, 1, 4, 3, 5).flatten(3, 4).flatten(1, 2)


class AlignedAttentionCl(MapAttentionFollower, maxxvit.AttentionCl):
    """timm's attention of tokens (B, Ht, Wt, channels)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "4213588190ad491f"}
    untouched = ("rel_pos",)


class AlignedAttention2d(MapAttentionFollower, maxxvit.Attention2d):
    """timm's attention of tokens (B, channels, Ht, Wt)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "254089d4c16b56d9"}
    untouched = ("qkv", "rel_pos", "proj")
    channels_first = True

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for projections of more than a token, and for heads that no backend has."""
        super().check(module, name)
        for projection in ("qkv", "proj"):
            check_convolution(getattr(module, projection), f"{name}.{projection}", overlap=False)


class PartitionFollower(BlockFollower):
    """Base of the followers of blocks that attend within partitions of a map."""

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Takes and returns tokens, and if it is given their share (B, Ht, Wt, S)."""
        if share is None:
            return super().forward(x)
        return self.run_branches(x, share, None, self.partition_size, not self.partition_block)


class AlignedPartitionAttentionCl(PartitionFollower, maxxvit.PartitionAttentionCl):
    """timm's block of MaxViT, of tokens (B, Ht, Wt, channels)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "771ab7973a85ed4c", "_partition_attn": "2a2f7a607443ba2b"}


class ChannelsFirstFollower(LabelFollower):
    """Base of the followers of blocks of tokens (B, channels, Ht, Wt), whose other layers are made for such."""

    untouched = ("shortcut", "norm1", "ls1", "norm2", "mlp", "ls2")

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for layers that may mix tokens."""
        norm1 = getattr(module.norm1, "norm", module.norm1)
        for part, layer, classes in (
            ("norm1", norm1, _NORMS), ("norm2", module.norm2, _NORMS), ("mlp", module.mlp, (tl.ConvMlp,))
        ):  # fmt: skip
            if type(layer) not in classes:
                raise NotImplementedError(f"{name}.{part}: can't follow labels through {type(layer).__name__}")


class AlignedPartitionAttention2d(ChannelsFirstFollower, PartitionFollower, maxxvit.PartitionAttention2d):
    """timm's block of MaxViT, of tokens (B, channels, Ht, Wt)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "d835464ad6fe3fa5", "_partition_attn": "88d5487653850377"}


class AlignedParallelPartitionAttention(LabelFollower, maxxvit.ParallelPartitionAttention):
    """timm's block that attends within both kinds of partitions at once: their heads count alike."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "d835464ad6fe3fa5", "_partition_attn": "67966ba3e7259670"}

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Takes and returns tokens (B, Ht, Wt, channels), and if it is given their share (B, Ht, Wt, S)."""
        if share is None:
            return super().forward(x)
        normalised, residual = self.norm1(x), share if self.label_residual else None
        options = {"partition_size": self.partition_size, "share": share, "residual": residual}
        windows, of_windows = follow(self.attn_block, normalised, **options)
        grid, of_grid = follow(self.attn_grid, normalised, is_grid=True, **options)
        attended, mixed = self.ls1(torch.cat((windows, grid), dim=-1)), (of_windows + of_grid) / 2
        attended, share = self.drop_attention(self.drop_path1, attended, mixed, share)
        x = x + attended
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), share


class AlignedTransformerBlock2d(ChannelsFirstFollower, maxxvit.TransformerBlock2d):
    """timm's block of CoAtNet, which attends to all of a map and may pool it before."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "47d56ce9d04b30b1"}

    def forward(
        self, x: Tensor, shared_rel_pos: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends to all of a map.

        Args:
            x: (B, channels, Ht, Wt).
            shared_rel_pos: As for `AlignedAttention2d`.
            share: (B, Ht', Wt', S), of the map as it was pooled (`pooled_size`), or None to run timm's own forward.

        Returns:
            (B, channels, Ht', Wt'), with a share also the new share.
        """
        if share is None:
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        residual = share if self.label_residual else None
        attended, mixed = follow(self.attn, self.norm1(x), shared_rel_pos, share=share, residual=residual)
        attended, share = self.drop_attention(self.drop_path1, self.ls1(attended), mixed, share)
        x = self.shortcut(x) + attended
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), share


def pooled_size(block: nn.Module, x: Tensor) -> tuple[int, int]:
    """Ht and Wt of what timm's `TransformerBlock2d` makes of x (B, channels, Ht, Wt)."""
    pooling = block.shortcut
    return tuple((pooling.pool(x[:1, :1]) if isinstance(pooling, maxxvit.Downsample2d) else x).shape[2:])


class ConvolutionFollower(LabelFollower):
    """Base of the followers of convolutional blocks."""

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Takes and returns tokens (B, channels, Ht, Wt), and if it is given their share (B, Ht, Wt, S)."""
        convolved = super().forward(x)
        return convolved if share is None else (convolved, merge_share(share, convolved.shape[2:]))


class AlignedMbConvBlock(ConvolutionFollower, maxxvit.MbConvBlock):
    """timm's `MbConvBlock`."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "762d14b59de350eb"}
    untouched = (
        "shortcut", "pre_norm", "down", "conv1_1x1", "norm1", "conv2_kxk", "se_early", "norm2", "se", "conv3_1x1"
    )  # fmt: skip


class AlignedConvNeXtBlock(ConvolutionFollower, maxxvit.ConvNeXtBlock):
    """timm's `ConvNeXtBlock`."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "324aae760b8c3015"}
    untouched = ("shortcut", "down", "conv_dw", "norm", "mlp", "ls")


class AlignedMaxxVitBlock(LabelFollower, maxxvit.MaxxVitBlock):
    """timm's block of MaxViT: a convolution, attention within windows, and within grids."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "667bd8081911086e"}

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Convolves a map, and attends within its partitions.

        Args:
            x: (B, channels, Ht, Wt).
            share: (B, Ht, Wt, S), or None to run timm's own forward.

        Returns:
            (B, channels, Ht', Wt'), with a share also the new share (B, Ht', Wt', S), and that after each attention.
        """
        if share is None:
            return super().forward(x)
        x, share = follow(self.conv, x, share)
        x = x if self.nchw_attn else x.permute(0, 2, 3, 1)
        layer_shares = []
        for partitions in (self.attn_block, self.attn_grid):
            if partitions is not None:
                x, share = run_block(partitions, x, share=share)
                layer_shares.append(share)
        return x if self.nchw_attn else x.permute(0, 3, 1, 2), share, *layer_shares


class AlignedParallelMaxxVitBlock(LabelFollower, maxxvit.ParallelMaxxVitBlock):
    """timm's block with convolutions, and attention within windows and grids at once."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "b5dee84411933b0d"}

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Arguments and result as for `AlignedMaxxVitBlock`."""
        if share is None:
            return super().forward(x)
        for convolution in self.conv if isinstance(self.conv, nn.Sequential) else (self.conv,):
            x, share = follow(convolution, x, share)
        x, share = run_block(self.attn, x.permute(0, 2, 3, 1), share=share)
        return x.permute(0, 3, 1, 2), share, share


class AlignedMaxxVitStage(LabelFollower, maxxvit.MaxxVitStage):
    """timm's stage: convolutional blocks and such that attend."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "4214325dc99a2233"}

    def forward(
        self, x: Tensor, share: Tensor | None = None, collect_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Runs the blocks on a map of tokens.

        Args:
            x: (B, channels, Ht, Wt).
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            collect_layers: Return the share after each attention as well; of no account without a share.

        Returns:
            Tokens; with a share also the new one; with `collect_layers` also a tuple of those after each attention.
        """
        if share is None:
            return super().forward(x)
        layer_shares = []
        for block in self.blocks:
            if _is_transformer(block):
                share = merge_share(share, pooled_size(block, x))
                x, share = run_block(block, x, None, share=share, checkpoints=self.grad_checkpointing)
                of_block = (share,)
            else:
                x, share, *of_block = run_block(block, x, share=share, checkpoints=self.grad_checkpointing)
            layer_shares.extend(each.detach() for each in of_block)
        return (x, share, tuple(layer_shares)) if collect_layers else (x, share)


class AlignedStem(LabelFollower, maxxvit.Stem):
    """timm's `Stem`: a token for each cell of 2 x 2 pixels (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "a299d3e269d6b75e"}
    untouched = ("conv1", "norm1", "conv2")


class AlignedMaxxVit(ImageModelFollower, maxxvit.MaxxVit):
    """timm's `MaxxVit` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "dba481f2c07a8d2d",
        "forward_features": "cf6b608762f2a25c",
        "forward_head": "7cfc4053920d2d03",
    }
    untouched = ("norm", "head")

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """CoAtNet's blocks that attend; of one of MaxViT those of its windows and of its grids."""
        labelled = []
        for block in (block for stage in model.stages for block in stage.blocks):
            parts = (block,) if _is_transformer(block) else (getattr(block, name, None) for name in _PARTS)
            labelled += [part for part in parts if part is not None]
        return labelled

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads without a label."""
        check_head(module, tl.ClassifierHead, tl.NormMlpClassifierHead)

    def align(self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """As for `ModelFollower`."""
        self.check(self, "model")
        x = self.stem(x)
        size = tuple(x.shape[2:])
        share = target.token_share(size, (2, 2), x.dtype).unflatten(1, size)
        x, share = run_stages(self.stages, x, share, layer_shares)
        return self.forward_head(self.norm(x)), share.mean(dim=(1, 2))


def _is_transformer(block: nn.Module) -> bool:
    """Whether a block, which may be in a wrapper of its own, is a `TransformerBlock2d`."""
    return hasattr(block, "attn") and hasattr(block, "shortcut")


for _module_class, _follower in (
    (maxxvit.AttentionCl, AlignedAttentionCl),
    (maxxvit.Attention2d, AlignedAttention2d),
    (maxxvit.PartitionAttentionCl, AlignedPartitionAttentionCl),
    (maxxvit.PartitionAttention2d, AlignedPartitionAttention2d),
    (maxxvit.ParallelPartitionAttention, AlignedParallelPartitionAttention),
    (maxxvit.TransformerBlock2d, AlignedTransformerBlock2d),
    (maxxvit.MbConvBlock, AlignedMbConvBlock),
    (maxxvit.ConvNeXtBlock, AlignedConvNeXtBlock),
    (maxxvit.MaxxVitBlock, AlignedMaxxVitBlock),
    (maxxvit.ParallelMaxxVitBlock, AlignedParallelMaxxVitBlock),
    (maxxvit.MaxxVitStage, AlignedMaxxVitStage),
    (maxxvit.Stem, AlignedStem),
    (maxxvit.MaxxVit, AlignedMaxxVit),
):
    register(_module_class, _follower)
