"""How labels pass through timm's DaViT, which attends within windows and between channels by turns."""

from __future__ import annotations

from typing import ClassVar

import timm.layers as tl
from timm.models import checkpoint, davit
from torch import Tensor, nn

from tlalign_kernels.functional import window_attention
from tlalign_kernels.labels import MixedTarget, pool_share
from tlalign_kernels.models.pvt_v2 import check_convolution, stride_of
from tlalign_kernels.models.swin import WindowFollower, check_head
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    follow,
    projected_padding,
    register,
    run_block,
    run_stages,
)
from tlalign_kernels.windows import Windows


class AlignedWindowAttention(LabelFollower, davit.WindowAttention):
    """timm's attention within windows that are neither shifted nor biased; padding is attended to, without a label.

    With a share it takes the map, which is not cut into windows.
    """

    mirrors: ClassVar[dict[str, str]] = {"forward": "f612770d6f7651f7"}
    untouched = ("softmax",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError if weights are made by no softmax, and for heads that no backend has."""
        WindowFollower.check(module, name)

    def forward(
        self, x: Tensor, share: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within the windows of a map, and mixes labels with the mean of the heads.

        Args:
            x: (B, Ht, Wt, channels) with a share; (B * W, N, channels), windows, without one.
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            residual: (B, Ht, Wt, S) to average the labels with, or None.

        Returns:
            The shape of `x`, with a share also the new share (B, Ht, Wt, S).
        """
        if share is None:
            return super().forward(x)
        heads = (3, self.num_heads, self.dim // self.num_heads)
        windows = Windows(tuple(x.shape[1:3]), self.window_size, (0, 0))
        attended, share = window_attention(
            self.qkv(x).unflatten(3, heads),
            share,
            residual,
            window_size=self.window_size,
            # timm pads with zeros before the projection, which makes its bias of them.
            pad_qkv=projected_padding(self.qkv, x, heads) if windows.is_padded() else None,
            scale=self.scale,
            backend=self.label_backend,
        )
        return self.proj(attended.flatten(3)), share


class AlignedSpatialBlock(LabelFollower, davit.SpatialBlock):
    """timm's block of windows: labels go through the attention and its residual, all else leaves them as they are."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "7fcb4a88e81b09ae"}

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Takes and returns tokens (B, channels, Ht, Wt) and, if given, their share (B, Ht, Wt, S)."""
        if share is None:
            return super().forward(x)
        x, residual = self.cpe1(x).permute(0, 2, 3, 1), share if self.label_residual else None
        attended, mixed = follow(self.attn, self.norm1(x), share, residual)
        attended, share = self.drop_attention(self.drop_path1, attended, mixed, share)
        x = self.cpe2((x + attended).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (x + self.drop_path2(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2), share


class AlignedChannelBlock(LabelFollower, davit.ChannelBlock):
    """timm's block of attention between channels, which leaves labels as they are (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "be8e4a4f829ea1ef"}
    untouched = ("attn",)


class AlignedConvPosEnc(LabelFollower, davit.ConvPosEnc):
    """timm's positional encoding by a depth-wise convolution: labels stay as they are (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "b84bd966e06bbf61"}
    untouched = ("proj",)


class AlignedStem(LabelFollower, davit.Stem):
    """timm's `Stem`: a token stands for the cell of the stride (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "f1812f5ed0caa93d"}
    untouched = ("conv",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError unless there is a token for each cell, also for those at the end of the image."""
        check_convolution(module.conv, f"{name}.conv", overlap=True)


class AlignedDownsample(LabelFollower, davit.Downsample):
    """timm's merging of 2 x 2 tokens, with overlap or without: the label is the mean over the cell."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "23e5a51c9332ca37"}
    untouched = ("conv",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError unless there is a token for each cell, also for those at the end of the map."""
        check_convolution(module.conv, f"{name}.conv", overlap=not module.even_k)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Merges the tokens of a map (B, channels, Ht, Wt) and, if given, their share (B, Ht, Wt, S)."""
        if share is None:
            return super().forward(x)
        return super().forward(x), pool_share(share, stride_of(self.conv))


class AlignedDaVitStage(LabelFollower, davit.DaVitStage):
    """timm's stage: a merging of tokens but in the first, and pairs of blocks."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "4a7ca449f3caa54f"}

    def forward(
        self, x: Tensor, share: Tensor | None = None, collect_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Runs the blocks on a map of tokens.

        Args:
            x: (B, channels, Ht, Wt).
            share: (B, Ht, Wt, S), or None to run timm's own forward.
            collect_layers: Return the share after each block of windows as well; of no account without a share.

        Returns:
            Tokens; with a share also the new one; with `collect_layers` also a tuple of those after each such block.
        """
        if share is None:
            return super().forward(x)
        if isinstance(self.downsample, nn.Identity):
            x = self.downsample(x)
        else:
            x, share = follow(self.downsample, x, share)
        layer_shares = []
        for block in (block for blocks in self.blocks for block in blocks):
            if _mixes_channels(block):
                x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            else:
                x, share = run_block(block, x, share=share, checkpoints=self.grad_checkpointing)
                layer_shares.append(share.detach())
        return (x, share, tuple(layer_shares)) if collect_layers else (x, share)


class AlignedDaVit(ImageModelFollower, davit.DaVit):
    """timm's `DaVit` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "b6a6653831a7fb8a",
        "forward_features": "a4ddd6189bc7d0a2",
        "forward_head": "c2a393e275534352",
    }
    untouched = ("head",)

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The blocks of windows of all stages."""
        blocks = (block for stage in model.stages for blocks in stage.blocks for block in blocks)
        return [block for block in blocks if not _mixes_channels(block)]

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads without a label."""
        check_head(module, tl.ClassifierHead, tl.NormMlpClassifierHead)

    def align(self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """As for `ModelFollower`."""
        self.check(self, "model")
        x = self.stem(x)
        size = tuple(x.shape[2:])
        share = target.token_share(size, stride_of(self.stem.conv), x.dtype).unflatten(1, size)
        x, share = run_stages(self.stages, x, share, layer_shares)
        return self.forward_head(self.norm_pre(x)), share.mean(dim=(1, 2))


def _mixes_channels(block: nn.Module) -> bool:
    """Whether a block, which may be in a wrapper of its own, is a `ChannelBlock`."""
    return hasattr(block, "attn") and not hasattr(block, "window_size")


for _module_class, _follower in (
    (davit.WindowAttention, AlignedWindowAttention),
    (davit.SpatialBlock, AlignedSpatialBlock),
    (davit.ChannelBlock, AlignedChannelBlock),
    (davit.ConvPosEnc, AlignedConvPosEnc),
    (davit.Stem, AlignedStem),
    (davit.Downsample, AlignedDownsample),
    (davit.DaVitStage, AlignedDaVitStage),
    (davit.DaVit, AlignedDaVit),
    (tl.LayerNorm2d, None),
):
    register(_module_class, _follower)
