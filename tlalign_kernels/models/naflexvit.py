"""How labels pass through timm's NaFlexVit (naflexvit), the ViT of any image size and aspect, on batches of images."""

from __future__ import annotations

from typing import ClassVar

import timm.layers as tl
from timm.models import eva, naflexvit
from torch import Tensor, nn

from tlalign_kernels.labels import MixedTarget, gather_share
from tlalign_kernels.models.plain import PrefixPoolingFollower, check_patch_embed, check_patches_fit
from tlalign_kernels.patch import register


class AlignedNaFlexVit(PrefixPoolingFollower, naflexvit.NaFlexVit):
    """timm's `NaFlexVit` that returns the aligned target beside the logits when it is given a target."""

    mirrors: ClassVar[dict[str, str]] = {
        "forward": "d9a6be8b44abd427",
        "forward_features": "af4f618b02ee6cf6",
        "forward_head": "2800a09944c4ca18",
        "_forward_embeds": "3b9ef3cfca982703",
        "_pool": "b3ed89508c51e6c3",
    }
    untouched = ("embeds", "rope", "patch_drop", "head")

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for other embeddings than timm's, and for poolings without a label."""
        check_patch_embed(module.embeds, (naflexvit.NaFlexEmbeds,), "embeds")
        cls.check_pooling(module)

    @classmethod
    def class_token(cls, model: nn.Module) -> Tensor | None:
        """The parameter of the class token."""
        return model.embeds.cls_token

    def forward(
        self,
        x: Tensor | dict[str, Tensor],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        target: MixedTarget | None = None,
        collect_layers: bool = False,
    ) -> Tensor | tuple[Tensor, MixedTarget]:
        """Classifies images and aligns their target.

        Args:
            x: Images, (B, channels, Hi, Wi); without a target also patches, as timm takes them.
            patch_coord: Places of patches, for timm's own forward.
            patch_valid: Which patches there are, for timm's own forward.
            attn_mask: For timm's own forward.
            target: What the images are mixed of; None runs timm's own forward.
            collect_layers: Keep the share after each block in `aligned.layer_shares`.

        Returns:
            Logits (B, C), with a target also the aligned target.

        Raises:
            TypeError: If `target` is no MixedTarget, or is not given by its name.
            ValueError: If `target` does not belong to the images, patches do not fit them, `collect_layers` is set
                without a target, or TransMix's last block was taken out (timm's `prune_intermediate_layers`).
            NotImplementedError: If there is a target of patches in the place of images, or the model was changed since
                it was patched to what its labels can't follow.
        """
        if isinstance(patch_coord, MixedTarget):
            raise TypeError("patch_coord: expected a tensor, got a MixedTarget; give it by its name, target=...")
        if target is None:
            if collect_layers:
                raise ValueError("collect_layers: expected False without a target, got True")
            return super().forward(x, patch_coord, patch_valid, attn_mask)
        if not isinstance(x, Tensor) or any(given is not None for given in (patch_coord, patch_valid, attn_mask)):
            raise NotImplementedError(
                "x: expected images (B, channels, Hi, Wi) alone beside a target, got patches or a mask of them"
            )
        return self.align_target(x, target, collect_layers, None, False)  # attention without a mask, not causal

    def _enter(self, images: Tensor, target: MixedTarget) -> tuple[Tensor, Tensor, list[tuple]]:
        image_size = tuple(images.shape[-2:])
        if not self.embeds.dynamic_img_pad:
            check_patches_fit(self.embeds.patch_size, image_size)
        embedded = self._forward_embeds(images, None, None, None)
        x, rope, kept = embedded["patches"], embedded["rope_embeds"], embedded["keep_indices"]
        share = self._first_share(target, self.embeds.dynamic_feat_size(image_size), self.embeds.patch_size, x.dtype)
        if kept is not None:
            share = gather_share(share, kept, self.num_prefix_tokens)
        is_by_block = self.rope_is_mixed and rope is not None
        positions = []
        for index, block in enumerate(self.blocks):
            of_block = rope[index] if is_by_block else rope
            if is_by_block and kept is not None:
                of_block = tl.apply_keep_indices_nlc(x, of_block, kept)
            # By its attention, since the class of a block that is compiled or sharded alone is the wrapper's.
            takes_rope = isinstance(block.attn, (eva.EvaAttention, tl.AttentionRope))
            positions.append((of_block,) if takes_rope else ())
        return x, share, positions


register(naflexvit.NaFlexVit, AlignedNaFlexVit)
