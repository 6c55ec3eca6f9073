"""PVT, the Pyramid Vision Transformer (arXiv 2102.12122), as models of timm, and how labels pass through it.

timm has its second version only. Names of parameters are those of the published checkpoints. The blocks are the ones
that Twins took over from PVT: attention to a map that a strided convolution has reduced, and an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.twins import Block, PatchEmbed
from torch import Tensor, nn

import tlalign_kernels as tlk
from tlalign_kernels.labels import pool_share
from tlalign_kernels.patch import ImageModelFollower, check_pooling, run_block

# Of the blocks and before the classifier; the others have PyTorch's own epsilon.
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PyramidVisionTransformer(nn.Module):
    """A pyramid of stages, each of which embeds the patches of the map before it; a class token joins in the last.

    Args:
        img_size: Hi and Wi that the position embeddings are learned for; for other images they are interpolated.
        patch_size: Side of a patch of the first stage; the other stages have patches of 2 x 2 tokens.
        in_chans: Channels of the images.
        num_classes: Number of classes; 0: no classifier.
        global_pool: What the classifier sees: the class token (`token`), the mean of the others (`avg`), or all (``).
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads in each stage.
        mlp_ratios: Hidden channels of the MLPs of each stage, as multiples of its channels.
        sr_ratios: By how much keys and values are reduced along each axis in each stage, 1 in the last.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embeddings.
        proj_drop_rate: Dropout after projections and in MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly over all blocks.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If keys are reduced in the last stage, an image has no patch in some stage, or there is no such
            pooling.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios: expected 1 in the last stage, where a class token joins, got {sr_ratios}")
        factory = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.num_stages = len(depths)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.grad_checkpointing = False
        self._set_global_pool(global_pool)

        drop_path_rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        size, self.map_sizes = to_2tuple(img_size), []
        for stage in range(self.num_stages):
            patch = patch_size if stage == 0 else 2
            # What is left over at the end of a map belongs to no patch.
            size = tuple(tokens // patch for tokens in size)
            if min(size) < 1:
                raise ValueError(f"img_size: expected at least a patch in each of the stages, got {img_size}")
            self.map_sizes.append(size)
            channels = in_chans if stage == 0 else embed_dims[stage - 1]
            embed = PatchEmbed(tuple(tokens * patch for tokens in size), patch, channels, embed_dims[stage], **factory)
            prefix = self.num_prefix_tokens if stage == self.num_stages - 1 else 0
            position = torch.empty(1, prefix + size[0] * size[1], embed_dims[stage], **factory)
            blocks = nn.ModuleList(
                Block(
                    embed_dims[stage],
                    num_heads[stage],
                    mlp_ratios[stage],
                    proj_drop_rate,
                    attn_drop_rate,
                    next(drop_path_rates),
                    norm_layer=_LayerNorm,
                    sr_ratio=sr_ratios[stage],
                    ws=1,
                    **factory,
                )
                for _ in range(depths[stage])
            )
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"pos_embed{stage + 1}", nn.Parameter(position))
            setattr(self, f"pos_drop{stage + 1}", nn.Dropout(pos_drop_rate))
            setattr(self, f"block{stage + 1}", blocks)
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **factory))
        self.norm = _LayerNorm(self.embed_dim, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()

        for stage in range(self.num_stages):
            trunc_normal_(getattr(self, f"pos_embed{stage + 1}"), std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        embeds, last = r"^(?:patch_embed|pos_embed)(\d+)", self.num_stages
        if coarse:
            blocks = [(r"^block(\d+)", None), (embeds, None), (r"^cls_token", (last,)), (r"^norm", (99999,))]
        else:
            blocks = [(r"^block(\d+)\.(\d+)", None), (embeds, (0,)), (r"^cls_token", (last, 0)), (r"^norm", (99999,))]
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_global_pool(global_pool)
        like = self.norm.weight
        factory = {"device": like.device, "dtype": like.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, N, channels) of the last stage, class token first, of images (B, channels, Hi, Wi)."""
        size = None
        for stage in range(self.num_stages):
            x, size = self._embed(x, size, stage)
            for block in self._blocks(stage):
                x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in ("token", "avg", ""):
            raise ValueError(f"global_pool: expected 'token', 'avg' or '', got {global_pool!r}")
        self.global_pool = global_pool

    def _blocks(self, stage: int) -> nn.ModuleList:
        return getattr(self, f"block{stage + 1}")

    def _embed(self, x: Tensor, size: tuple[int, int] | None, stage: int) -> tuple[Tensor, tuple[int, int]]:
        """Tokens that enter the blocks of a stage, and the size of their map.

        Args:
            x: Images, or tokens (B, N, channels) of the stage before.
            size: Ht and Wt of the stage before; None for images.
            stage: Number of the stage.
        """
        if size is not None:
            x = x.transpose(1, 2).unflatten(2, size)
        x, size = getattr(self, f"patch_embed{stage + 1}")(x)
        position = getattr(self, f"pos_embed{stage + 1}")
        if stage == self.num_stages - 1:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        if size != self.map_sizes[stage]:
            position = _resize_position(position, self.map_sizes[stage], size)
        return getattr(self, f"pos_drop{stage + 1}")(x + position), size


def _resize_position(position: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Interpolates position embeddings (1, N, channels) of a map; that of a class token, which comes first, stays."""
    prefix, of_map = position.tensor_split([position.shape[1] - old_size[0] * old_size[1]], dim=1)
    of_map = F.interpolate(of_map.transpose(1, 2).unflatten(2, old_size), new_size, mode="bilinear")
    return torch.cat((prefix, of_map.flatten(2).transpose(1, 2)), dim=1)


class AlignedPyramidVisionTransformer(ImageModelFollower, PyramidVisionTransformer):
    """PVT that returns the aligned target beside the logits when it is given a target."""

    untouched = ("head",)

    @classmethod
    def label_blocks(cls, model: nn.Module) -> list[nn.Module]:
        """The transformer blocks of all stages."""
        return [block for stage in range(model.num_stages) for block in model._blocks(stage)]

    @classmethod
    def check(cls, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError for a model that does not pool its tokens."""
        check_pooling(module.global_pool, "token", "avg")

    def align(self, x: Tensor, target: tlk.MixedTarget, layer_shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """As for `ModelFollower`."""
        self.check(self, "model")
        share, size = None, None
        for stage in range(self.num_stages):
            share = None if share is None else share.unflatten(1, size)
            x, size = self._embed(x, size, stage)
            patch_size = getattr(self, f"patch_embed{stage + 1}").patch_size
            if share is None:
                share = target.token_share(size, patch_size, x.dtype)
            else:
                share = pool_share(share, patch_size, partial_cells=False).flatten(1, 2)
            has_prefix = stage == self.num_stages - 1
            if has_prefix:
                share = torch.cat((target.image_share(x.dtype)[:, None], share), dim=1)
            for block in self._blocks(stage):
                x, share = run_block(block, x, size, share=share, checkpoints=self.grad_checkpointing)
                if layer_shares is not None:
                    layer_shares.append(share.detach() if has_prefix else share.detach().unflatten(1, size))
        pooled = share[:, 0] if self.global_pool == "token" else share[:, self.num_prefix_tokens :].mean(dim=1)
        return self.forward_head(self.norm(x)), pooled


tlk.register(PyramidVisionTransformer, AlignedPyramidVisionTransformer)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Interpolates the position embeddings of a checkpoint to the size of the model, as timm does when loading one.

    Raises:
        ValueError: If embeddings of another size are not those of square images, or are missing.
    """
    state_dict = state_dict.get("model", state_dict)
    for stage, size in enumerate(model.map_sizes):
        name = f"pos_embed{stage + 1}"
        if name not in state_dict:
            raise ValueError(f"{name}: expected it in the checkpoint of a PVT, got none")
        position, expected = state_dict[name], tuple(getattr(model, name).shape)
        if position.shape == expected:
            continue
        prefix = model.num_prefix_tokens if stage == model.num_stages - 1 else 0
        side = math.isqrt(position.shape[1] - prefix)
        if side**2 != position.shape[1] - prefix:
            raise ValueError(f"{name}: expected {expected} or that of square images, got {tuple(position.shape)}")
        state_dict = state_dict | {name: _resize_position(position, (side, side), size)}
    return state_dict


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PyramidVisionTransformer:
    if kwargs.get("features_only"):
        raise NotImplementedError(f"features_only: expected False for {variant}, got True")
    return build_model_with_cfg(
        PyramidVisionTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )


def _cfg(name: str) -> dict[str, Any]:
    return {
        "url": f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg(name) for name in ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")}
)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Tiny: 13.2 million parameters."""
    return _create("pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Small: 24.5 million parameters."""
    return _create("pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Medium: 44.2 million parameters."""
    return _create("pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Large: 61.4 million parameters."""
    return _create("pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
