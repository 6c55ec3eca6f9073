"""How labels pass through timm's Twins, which attend within windows and to a reduced map by turns."""

from __future__ import annotations

from typing import ClassVar

from timm.models import twins
from torch import Tensor, nn

from tlalign_kernels.functional import window_attention
from tlalign_kernels.labels import MixedTarget, pool_share
from tlalign_kernels.models.plain import UnscaledBlockFollower
from tlalign_kernels.models.pvt_v2 import attend_to_reduced, check_convolution, stride_of
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    attention_options,
    check_head_dim,
    check_pooling,
    projected_padding,
    register,
    run_block,
)
from tlalign_kernels.windows import Windows


class AlignedLocallyGroupedAttn(LabelFollower, twins.LocallyGroupedAttn):
    """timm's attention within windows that are neither shifted nor biased; padding is attended to, without a label."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "06ac705f2065c1d3"}

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads that no backend has."""
        check_head_dim(module.dim // module.num_heads, name)

    def forward(
        self, x: Tensor, size: tuple[int, int], share: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within windows, and mixes labels with the mean of the heads.

        Args:
            x: (B, N, channels).
            size: Ht and Wt of the map that the tokens form.
            share: (B, N, S), or None to run timm's own forward.
            residual: (B, N, S) to average the labels with, or None.

        Returns:
            (B, N, channels), with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x, size)
        heads = (3, self.num_heads, self.dim // self.num_heads)
        windows = Windows(size, (self.ws, self.ws), (0, 0))
        attended, share = window_attention(
            self.qkv(x).unflatten(2, heads).unflatten(1, size),
            share.unflatten(1, size),
            None if residual is None else residual.unflatten(1, size),
            window_size=windows.window_size,
            # timm pads with zeros before the projection, which makes its bias of them.
            pad_qkv=projected_padding(self.qkv, x, heads) if windows.is_padded() else None,
            **attention_options(self),
        )
        return self.proj_drop(self.proj(attended.reshape(x.shape))), share.flatten(1, 2)


class AlignedGlobalSubSampleAttn(LabelFollower, twins.GlobalSubSampleAttn):
    """timm's attention to reduced keys and values: their labels are means over the cell that a key was made of."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "daa38e9fe4cd4c4e"}
    untouched = ("sr",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError if another module than timm's reduces keys, and for heads that no backend has."""
        check_head_dim(module.dim // module.num_heads, name)
        if module.sr is not None:
            check_convolution(module.sr, f"{name}.sr", overlap=False)

    def forward(
        self, x: Tensor, size: tuple[int, int], share: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedLocallyGroupedAttn`; without a reduction the tokens need form no map."""
        if share is None:
            return super().forward(x, size)
        reduced = x
        if self.sr is not None:
            reduced = self.norm(self.sr(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))
            share = pool_share(share.unflatten(1, size), stride_of(self.sr), partial_cells=False).flatten(1, 2)
        return attend_to_reduced(self, x, reduced, share, residual)


class AlignedBlock(UnscaledBlockFollower, twins.Block):
    """timm's `Block`: labels go through the attention and its residual, the MLP leaves them as they are."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "12dc1f99b71f21f6"}

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for the plain attention, which timm's block can be built with but not run."""
        if not isinstance(module.attn, (twins.LocallyGroupedAttn, twins.GlobalSubSampleAttn)):
            raise NotImplementedError(f"{name}.attn: can't follow labels through {type(module.attn).__name__}")

    def forward(self, x: Tensor, size: tuple[int, int], share: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and result as for `AlignedLocallyGroupedAttn`."""
        if share is None:
            return super().forward(x, size)
        return self.run_branches(x, share, size)


class AlignedPosConv(LabelFollower, twins.PosConv):
    """timm's positional encoding by a depth-wise convolution: labels stay as they are (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "6fe5445cb993d4dc"}
    untouched = ("proj",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError if the encoding thins out the tokens."""
        if module.stride != 1:
            raise NotImplementedError(f"{name}: can't follow labels through a stride of {module.stride}")


class AlignedPatchEmbed(LabelFollower, twins.PatchEmbed):
    """timm's patch embedding without overlap: the label of a patch is the mean over what it was made of."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "b65a00b7ec7f0b98"}
    untouched = ("proj",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError unless patches are cells."""
        check_convolution(module.proj, f"{name}.proj", overlap=False)

    def forward(
        self, x: Tensor, share: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]] | tuple[Tensor, tuple[int, int], Tensor]:
        """Embeds the patches of a map, and merges its labels.

        Args:
            x: (B, channels, Ht, Wt).
            share: (B, Ht, Wt, S), or None to run timm's own forward.

        Returns:
            (B, N, channels) and the size of the new map, with a share also the new share (B, N, S).
        """
        if share is None:
            return super().forward(x)
        return *super().forward(x), pool_share(share, self.patch_size, partial_cells=False).flatten(1, 2)


class AlignedTwins(ImageModelFollower, twins.Twins):
    """timm's `Twins` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "b6a6653831a7fb8a",
        "forward_features": "bb594dec872da403",
        "forward_head": "55fa15eef6e03e8d",
    }
    untouched = ("head",)

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The transformer blocks of all stages."""
        return [block for blocks in model.blocks for block in blocks]

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for a model that does not pool its tokens."""
        check_pooling(module.global_pool, "avg")

    def align(self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """As for `ModelFollower`."""
        self.check(self, "model")
        share = None
        for embed, drop, blocks, encode in zip(
            self.patch_embeds, self.pos_drops, self.blocks, self.pos_block, strict=False
        ):
            if share is None:
                x, size = embed(x)
                share = target.token_share(size, embed.patch_size, x.dtype)
            else:
                x, size, share = embed(x.transpose(1, 2).unflatten(2, size), share.unflatten(1, size))
            x = drop(x)
            for index, block in enumerate(blocks):
                x, share = run_block(block, x, size, share=share)
                if index == 0:
                    x = encode(x, size)
                if layer_shares is not None:
                    layer_shares.append(share.detach().unflatten(1, size))
        return self.forward_head(self.norm(x)), share.mean(dim=1)


register(twins.LocallyGroupedAttn, AlignedLocallyGroupedAttn)
register(twins.GlobalSubSampleAttn, AlignedGlobalSubSampleAttn)
register(twins.Block, AlignedBlock)
register(twins.PosConv, AlignedPosConv)
register(twins.PatchEmbed, AlignedPatchEmbed)
register(twins.Twins, AlignedTwins)
