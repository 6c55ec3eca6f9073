"""What plain transformers share: prefix tokens and patches are one sequence, of one length in all blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers.hybrid_embed import HybridEmbed
from torch import Tensor, nn

from tlalign_kernels.functional import attention, attention_qkv
from tlalign_kernels.labels import MixedTarget
from tlalign_kernels.ops import unpack_qkv
from tlalign_kernels.patch import (
    LabelFollower,
    ModelFollower,
    attention_options,
    check_head_dim,
    check_pooling,
    follow,
    follows_labels,
    is_bare,
    run_block,
)

Branch = Callable[[Tensor], Tensor]


class PlainFollower(ModelFollower):
    """Base of the followers of plain transformers.

    Attributes:
        label_poolings: Values of `global_pool` for which labels are defined.
    """

    label_poolings: ClassVar[tuple[str, ...]] = ("token", "avg")
    untouched = ("patch_embed", "head")

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The transformer blocks."""
        return list(model.blocks)

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for stems that attend and for poolings without a label."""
        check_patch_embed(module.patch_embed, (tl.PatchEmbed, HybridEmbed))
        cls.check_pooling(module)

    @classmethod
    def check_pooling(cls, model: nn.Module) -> None:
        """Raises NotImplementedError for poolings without a label."""
        check_pooling(model.global_pool, *cls.label_poolings)

    @classmethod
    def check_transmix(cls, model: nn.Module) -> None:
        """Raises NotImplementedError unless the logits are those of a class token."""
        class_token = cls.class_token(model)
        if model.global_pool != "token" or class_token is None:
            raise NotImplementedError(
                f"method: TransMix needs logits of a class token, got global_pool {model.global_pool!r} "
                f"{'without' if class_token is None else 'beside'} a class token"
            )

    @classmethod
    def class_token(cls, model: nn.Module) -> Tensor | None:
        """The parameter of the class token."""
        return model.cls_token

    def align(
        self, x: Tensor, target: MixedTarget, layer_shares: list[Tensor] | None, *masks: object
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of images, and the label (B, S) that arrives at the head; that after each block is appended.

        Args:
            x: Images, (B, channels, Hi, Wi).
            target: What the images are mixed of.
            layer_shares: Where to append the share after each block, or None.
            masks: The last arguments of the blocks, before their share.

        Raises:
            ValueError: If patches do not fit the images, or TransMix's last block was taken out (timm's
                `prune_intermediate_layers`).
            NotImplementedError: If the model was changed since it was patched to what its labels can't follow.
        """
        blocks = self.label_blocks(self)
        if self.label_method == "transmix":
            self.check_transmix(self)
            if not follows_labels(blocks[-1]):
                raise ValueError("model: the last of its blocks is another than when it was patched; patch it again")
        x, share, positions = self._enter(x, target)
        for block, position in zip(blocks, positions, strict=True):
            before, marks = share, self.label_method == "transmix" and follows_labels(block)
            if marks:
                share = _mark_patches(share, self.num_prefix_tokens)
            x, share = run_block(block, x, *position, *masks, share=share, checkpoints=self.grad_checkpointing)
            if marks:
                of_patches = share[..., -1:]
                share = torch.where(of_patches > 0, share[..., :-1] / of_patches, before)
            if layer_shares is not None:
                layer_shares.append(share.detach())
        return self._aligned_head(self.norm(x), share)

    def _enter(self, images: Tensor, target: MixedTarget) -> tuple[Tensor, Tensor, list[tuple]]:
        """What enters the blocks: tokens (B, N, channels), labels (B, N, S), and what each is told of positions."""
        image_size = tuple(images.shape[-2:])
        check_image_size(self.patch_embed, image_size)
        x = self.patch_embed(images)
        grid_size = tuple(x.shape[1:3]) if x.dim() == 4 else self.patch_embed.dynamic_feat_size(image_size)
        if x.dim() == 3 and x.shape[1] != grid_size[0] * grid_size[1]:
            raise NotImplementedError(
                f"patch_embed: expected {grid_size[0]} x {grid_size[1]} patches of an image of {image_size} pixels, "
                f"got {x.shape[1]}"
            )
        step = _patch_step(self.patch_embed)
        if any(
            tokens not in (size // pixels, -(-size // pixels))
            for tokens, size, pixels in zip(grid_size, image_size, step, strict=True)
        ):
            raise NotImplementedError(
                f"patch_embed: expected tokens {step} pixels apart in an image of {image_size} pixels, got {grid_size} "
                "of them; make the model for an image size that its stem divides"
            )
        return self._embed(x, self._first_share(target, grid_size, step, x.dtype))

    def _embed(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, list[tuple]]:
        """As `_enter`. x: the embedded patches; share (B, N, S): with prefix tokens, and of all patches."""
        raise NotImplementedError

    def _first_share(
        self, target: MixedTarget, grid_size: tuple[int, int], step: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Share (B, N, S) of prefix tokens and of patches of `step` pixels, before any block."""
        patches = target.token_share(grid_size, step, dtype)
        prefix = target.image_share(dtype)[:, None, :].expand(-1, self.num_prefix_tokens, -1)
        return torch.cat((prefix, patches), dim=1)

    def _aligned_head(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and the share (B, S) of the tokens that they are computed from."""
        self.check_pooling(self)
        pooled = share[:, 0] if self.global_pool == "token" else share[:, self.num_prefix_tokens :].mean(dim=1)
        return self.forward_head(x), pooled


class PrefixPoolingFollower(PlainFollower):
    """Base of the followers of plain transformers that pool by mean or attention, with prefix tokens if asked to."""

    label_poolings = ("token", "avg", "map")

    def _aligned_head(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        if self.global_pool == "token":
            return super()._aligned_head(x, share)
        self.check_pooling(self)
        pooled = slice(0 if self.pool_include_prefix else self.num_prefix_tokens, None)
        if self.global_pool == "avg":
            return self.forward_head(x), share[:, pooled].mean(dim=1)
        x, share = follow(self.attn_pool, x[:, pooled], share=share[:, pooled])
        return self.head(self.head_drop(self.fc_norm(x))), share


class MaskedPlainFollower(PlainFollower):
    """Base of the followers of plain transformers that take attention masks."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        target: MixedTarget | None = None,
        collect_layers: bool = False,
    ) -> Tensor | tuple[Tensor, MixedTarget]:
        """Classifies images and aligns their target.

        Args:
            x: Images, (B, channels, Hi, Wi).
            attn_mask: bool (True: may be seen) or floating (added to the scores), broadcastable to (B, H, N, N), N
                counting prefix tokens.
            is_causal: Token i sees tokens 0 to i; excludes `attn_mask`.
            target: What the images are mixed of; None runs timm's own forward.
            collect_layers: Keep the share after each block in `aligned.layer_shares`.

        Returns:
            Logits (B, C), with a target also the aligned target; in distilled training a pair of each.

        Raises:
            TypeError: If `target` is no MixedTarget, or is not given by its name.
            ValueError: If `target` does not belong to the images, patches do not fit them, `collect_layers` is set
                without a target, or TransMix's last block was taken out (timm's `prune_intermediate_layers`).
            NotImplementedError: If the model was changed since it was patched to what its labels can't follow.
        """
        if isinstance(attn_mask, MixedTarget):
            raise TypeError("attn_mask: expected a tensor, got a MixedTarget; give it by its name, target=...")
        if target is None:
            if collect_layers:
                raise ValueError("collect_layers: expected False without a target, got True")
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.align_target(x, target, collect_layers, attn_mask, is_causal)


class AttentionFollower(LabelFollower):
    """Base of the followers of attentions that know the dimension of their heads."""

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for heads that no backend has."""
        check_head_dim(module.head_dim, name)


class BlockFollower(LabelFollower):
    """Base of the followers of blocks: labels go through the attention and its residual, the MLP leaves them alone."""

    def run_branches(self, x: Tensor, share: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, channels) and labels (B, N, S) after the block; `arguments`: further ones of its attention."""
        (before_attention, after_attention), (before_mlp, after_mlp) = self._around_branches()
        residual = share if self.label_residual else None
        attended, mixed = follow(self.attn, before_attention(x), *arguments, share, residual)
        attended, share = self.drop_attention(self.drop_path1, after_attention(attended), mixed, share)
        x = x + attended
        return x + self.drop_path2(after_mlp(self.mlp(before_mlp(x)))), share

    def _around_branches(self) -> tuple[tuple[Branch, Branch], tuple[Branch, Branch]]:
        """What comes before and after the attention, and before and after the MLP."""
        return (self.norm1, self.ls1), (self.norm2, self.ls2)


class UnscaledBlockFollower(BlockFollower):
    """Base of the followers of blocks that have no scales after their branches."""

    def _around_branches(self) -> tuple[tuple[Branch, Branch], tuple[Branch, Branch]]:
        return (self.norm1, _unchanged), (self.norm2, _unchanged)


class PostNormBlockFollower(BlockFollower):
    """Base of the followers of blocks that normalise what a branch adds."""

    def _around_branches(self) -> tuple[tuple[Branch, Branch], tuple[Branch, Branch]]:
        return (_unchanged, self.norm1), (_unchanged, self.norm2)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _mark_patches(share: Tensor, num_prefix_tokens: int) -> Tensor:
    """Shares (B, N, S) with a last column of ones, and zeros for prefix tokens, in all columns.

    Attention takes the last column to the part of it that goes to patches, by which the others are then divided.
    """
    patches = F.pad(share[:, num_prefix_tokens:], (0, 1), value=1.0)
    return F.pad(patches, (0, 0, num_prefix_tokens, 0))


def attend(
    module: nn.Module, qkv: Tensor, share: Tensor, residual: Tensor | None, **offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """What an attention of timm, which may normalise query and key, makes of its projection (B, N, 3, H, D).

    Args:
        module: A follower of an attention.
        qkv: As for `attention_qkv`.
        share: As for `attention_qkv`.
        residual: As for `attention_qkv`.
        offsets: `bias` and `mask` of `attention_qkv`, if there are any.

    Returns:
        (B, N, H, D) and (B, N, S).
    """
    options = {**attention_options(module), **offsets}
    if is_bare(module.q_norm, nn.Identity) and is_bare(module.k_norm, nn.Identity):
        return attention_qkv(qkv, share, residual, **options)
    query, key, value = unpack_qkv(qkv)
    attended, share = attention(module.q_norm(query), module.k_norm(key), value, share, residual, **options)
    return attended.transpose(1, 2), share


def biased_projection(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The projection (..., 3, H, D) of an attention of timm whose keys have no bias, and its bias (3, H, D) or None."""
    by_heads = (3, module.num_heads, -1)
    if module.q_bias is None:
        return module.qkv(x).unflatten(-1, by_heads), None
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if module.qkv_bias_separate:
        projected = module.qkv(x)
        projected += bias
    else:
        projected = F.linear(x, module.qkv.weight, bias)
    return projected.unflatten(-1, by_heads), bias.view(by_heads)


def project_attended(module: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What an attention of timm, which may have a gate, makes of its input (B, N, channels) and of A.V (B, N, H, D)."""
    projected = module.norm(attended.flatten(2))
    if module.gate is not None:
        projected = projected * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(projected))


def mask_options(attn_mask: Tensor | None, is_causal: bool, x: Tensor) -> dict[str, Tensor]:
    """Translates timm's mask arguments to those of the operator."""
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attn_mask: expected None with is_causal=True, got a tensor")
        tokens = x.shape[1]
        return {"mask": torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()}
    if attn_mask is None:
        return {}
    # A floating mask may be learned; as a bias it has a gradient.
    return {"mask": attn_mask} if attn_mask.dtype == torch.bool else {"bias": attn_mask}


def check_patch_embed(patch_embed: nn.Module, classes: tuple[type[nn.Module], ...], name: str = "patch_embed") -> None:
    """Raises NotImplementedError for stems of other classes, and for those that attend.

    They may convolve, since a token stands for its stride; one that attends has labels of its own.
    """
    if type(patch_embed) not in classes:
        raise NotImplementedError(f"{name}: can't follow labels through {type(patch_embed).__name__}")
    for child_name, module in patch_embed.named_modules():
        if "attn" in type(module).__name__.lower() or "attention" in type(module).__name__.lower():
            raise NotImplementedError(f"{name}.{child_name}: can't follow labels through {type(module).__name__}")


def _patch_step(patch_embed: nn.Module) -> tuple[int, int]:
    """Pixels from one patch to the next, along each axis."""
    if not isinstance(patch_embed, HybridEmbed):
        return patch_embed.feat_ratio(as_scalar=False)
    # timm's ratio is the image's size over the map's, rounded down: less than the stride, a power of two, of a backbone
    # that pads, where it was made for a size that this doesn't divide. Rounded up, it is more than half of the stride.
    steps = []
    for pixels, cells, ratio, patch in zip(
        patch_embed.img_size, patch_embed.feature_size, patch_embed.feature_ratio, patch_embed.patch_size, strict=True
    ):
        stride = 1 << (-(-pixels // cells) - 1).bit_length()
        steps.append(patch * (stride if -(-pixels // stride) == cells else ratio))
    return tuple(steps)


def check_image_size(patch_embed: nn.Module, image_size: tuple[int, int]) -> None:
    """Raises ValueError where timm's classes `PatchEmbed` assert, of which that of Swin v2-CR crops what is over."""
    if isinstance(patch_embed, HybridEmbed) or patch_embed.img_size is None:
        return
    if patch_embed.strict_img_size:
        if image_size != tuple(patch_embed.img_size):
            raise ValueError(f"images: expected {tuple(patch_embed.img_size)} pixels, got {image_size}")
    elif isinstance(patch_embed, tl.PatchEmbed) and not patch_embed.dynamic_img_pad:
        check_patches_fit(patch_embed.patch_size, image_size)


def check_patches_fit(patch_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raises ValueError unless an image is cut into whole patches."""
    if any(size % patch for size, patch in zip(image_size, patch_size, strict=True)):
        raise ValueError(f"images: expected multiples of the patches of {patch_size}, got {image_size}")
