"""How labels pass through timm's PiT, a plain transformer that pools the map of its patches between stages."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import pit
from torch import Tensor, nn

from tlalign_kernels.labels import MixedTarget, pool_share
from tlalign_kernels.models.pvt_v2 import check_convolution, stride_of
from tlalign_kernels.patch import (
    ImageModelFollower,
    LabelFollower,
    check_pooling,
    follow,
    register,
    run_block,
    run_stages,
)

# A class token, and a distillation token where there is one, that run beside the map (B, channels, Ht, Wt).
Tokens = tuple[Tensor, Tensor]


class AlignedConvEmbedding(LabelFollower, pit.ConvEmbedding):
    """timm's embedding of patches that overlap (no `share` is given)."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "c88a2b881fe94a15"}
    untouched = ("conv",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError unless each patch is a whole number of strides, and none is padded."""
        conv, patch_size = module.conv, tuple(module.patch_size)
        if type(conv) is not nn.Conv2d:
            raise NotImplementedError(f"{name}.conv: can't follow labels through {type(conv).__name__}")
        is_whole = all(pixels % step == 0 for pixels, step in zip(patch_size, conv.stride, strict=True))
        if not is_whole or (conv.kernel_size, conv.padding, conv.dilation) != (patch_size, (0, 0), (1, 1)):
            raise NotImplementedError(
                f"{name}.conv: labels are defined for patches of {patch_size} that are whole strides, without padding, "
                f"got a kernel of {conv.kernel_size}, stride {conv.stride}, padding {conv.padding}, dilation "
                f"{conv.dilation}"
            )


class AlignedPooling(LabelFollower, pit.Pooling):
    """timm's strided depth-wise convolution: the label of a token is the mean over the cell of the stride."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "16d1bf9ca08b61cc"}
    untouched = ("conv",)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError unless there is a token for each cell, also for those at the end of the map."""
        check_convolution(module.conv, f"{name}.conv", overlap=True)

    def forward(self, x: Tensor, cls_token: Tensor, share: Tensor | None = None) -> Tokens | tuple[Tokens, Tensor]:
        """Pools a map (B, channels, Ht, Wt), projects the tokens beside it, and pools the map's labels.

        Args:
            x: (B, channels, Ht, Wt).
            cls_token: (B, 1 or 2, channels).
            share: (B, Ht, Wt, S), or None to run timm's own forward.

        Returns:
            The map and the tokens; with a share also the new share of the map.
        """
        pooled = super().forward(x, cls_token)
        return pooled if share is None else (pooled, pool_share(share, stride_of(self.conv)))


class AlignedTransformer(LabelFollower, pit.Transformer):
    """timm's stage: a pooling but in the first, and blocks."""

    mirrors: ClassVar[dict[str, str]] = {"forward": "591d4f01f0611278"}

    def forward(
        self, x: Tokens, share: Tensor | None = None, collect_layers: bool = False
    ) -> Tokens | tuple[Tokens, Tensor] | tuple[Tokens, Tensor, tuple[Tensor, ...]]:
        """Runs the blocks on the tokens beside the map, and on those of it.

        Args:
            x: The map (B, channels, Ht, Wt) and the tokens beside it (B, 1 or 2, channels).
            share: (B, N, S), these tokens first, or None to run timm's own forward.
            collect_layers: Return the share after each block as well; of no account without a share.

        Returns:
            As `x`; with a share also the new share; with `collect_layers` also a tuple of those after each block.
        """
        if share is None:
            return super().forward(x)
        x, beside = x
        prefix = beside.shape[1]
        if self.pool is not None:
            of_map = share[:, prefix:].unflatten(1, x.shape[2:])
            (x, beside), of_map = follow(self.pool, x, beside, of_map)
            share = torch.cat((share[:, :prefix], of_map.flatten(1, 2)), dim=1)
        size, layer_shares = x.shape[2:], []
        tokens = self.norm(torch.cat((beside, x.flatten(2).transpose(1, 2)), dim=1))
        for block in self.blocks:
            tokens, share = run_block(block, tokens, None, False, share=share)
            if collect_layers:
                layer_shares.append(share.detach())
        x = tokens[:, prefix:].transpose(1, 2).unflatten(2, size), tokens[:, :prefix]
        return (x, share, tuple(layer_shares)) if collect_layers else (x, share)


class AlignedPoolingVisionTransformer(ImageModelFollower, pit.PoolingVisionTransformer):
    """timm's `PoolingVisionTransformer` that returns the aligned target beside the logits when it is given one.

    The label of a distilled model is the mean of both tokens', as its logits are; in distilled training it is a pair.
    """

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "b6a6653831a7fb8a",
        "forward_features": "cde260712b1f9883",
        "forward_head": "95b9510baaa81437",
    }
    untouched = ("head", "head_dist")

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The transformer blocks of all stages."""
        return [block for stage in model.transformers for block in stage.blocks]

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for a model without a head."""
        check_pooling(module.global_pool, "token")

    @classmethod
    def check_transmix(cls, model: nn.Module) -> None:
        """Raises NotImplementedError: what a patch of the last stage was made of is not the patch alone."""
        raise NotImplementedError(
            "method: TransMix is not defined for patches that are pooled between blocks, as PiT's"
        )

    def align(
        self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """As for `ModelFollower`; raises ValueError for images of other sizes than the position embeddings are for."""
        self.check(self, "model")
        share = self._first_share(target, tuple(x.shape[2:]), x.dtype)
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        tokens = x, self.cls_token.expand(x.shape[0], -1, -1)
        tokens, share = run_stages(self.transformers, tokens, share, layer_shares)
        logits = self.forward_head(self.norm(tokens[1]))
        if isinstance(logits, tuple):
            return logits, (share[:, 0], share[:, 1])
        return logits, share[:, : self.num_tokens].mean(dim=1)

    def _first_share(self, target: MixedTarget, image_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Share (B, N, S) of the tokens beside the map and of the patches: the mean over all pixels of a patch."""
        patch_size, step = to_2tuple(self.patch_embed.patch_size), stride_of(self.patch_embed.conv)
        sizes = zip(image_size, patch_size, step, strict=True)
        grid_size = tuple((pixels - patch) // stride + 1 for pixels, patch, stride in sizes)
        if grid_size != tuple(self.pos_embed.shape[2:]):
            raise ValueError(f"images: expected {tuple(self.patch_embed.img_size)} pixels, got {image_size}")
        strides = tuple(patch // stride for patch, stride in zip(patch_size, step, strict=True))
        cells = tuple(tokens + more - 1 for tokens, more in zip(grid_size, strides, strict=True))
        of_cells = target.token_share(cells, step, dtype).unflatten(1, cells).permute(0, 3, 1, 2)
        patches = F.avg_pool2d(of_cells, strides, stride=1).flatten(2).transpose(1, 2)
        return torch.cat((target.image_share(patches.dtype)[:, None].expand(-1, self.num_tokens, -1), patches), dim=1)


register(pit.ConvEmbedding, AlignedConvEmbedding)
register(pit.Pooling, AlignedPooling)
register(pit.Transformer, AlignedTransformer)
register(pit.SequentialTuple, None)
register(pit.PoolingVisionTransformer, AlignedPoolingVisionTransformer)
