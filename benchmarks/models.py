"""Blocks and training steps three ways: timm's own on plain CutMix, aligned the official way, and aligned by ours.

The official way keeps the attention matrix and mixes labels of all classes with its mean over the heads. The official
code for Swin and PVT was never released: here theirs follow the same algebra.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.loss import SoftTargetCrossEntropy
from timm.models import swin_transformer, twins
from torch import Tensor, nn

import tlalign.models  # noqa: F401 - timm learns of PVT
import tlalign_kernels as tlk
from benchmarks.peers import cut, error_bounds, join, what_is_wrong
from benchmarks.report import FUSED, OFFICIAL, PLAIN
from tlalign_kernels.labels import pool_share
from tlalign_kernels.selftest import ROUNDING
from tlalign_kernels.windows import Windows

OURS = "ours"
# Images of a step on the CPU.
MODELS = {
    "deit_tiny_patch16_224": 16,
    "deit_small_patch16_224": 8,
    "swin_tiny_patch4_window7_224": 8,
    "pvt_tiny": 8,
}
GPU_IMAGES = 256
CLASSES, SIDE = 1000, 224
CHECKED_IMAGES = 2


def variants_of(name: str) -> tuple[str, ...]:
    """How a model is run; Swin with PyTorch's fused attention as well, which timm's does not take unless it is told."""
    return (OURS, PLAIN, FUSED, OFFICIAL) if name.startswith("swin") else (OURS, PLAIN, OFFICIAL)


class DenseLabels:
    """Labels of all tokens over all classes, (B, N, C) or (B, Ht, Wt, C), which the attentions of a model mix in turn.

    Attributes:
        of_tokens: The labels, where a forward has come to.
        of_image: (B, C), with which class tokens start.
    """

    of_tokens: Tensor
    of_image: Tensor

    def mix(self, attention: Tensor, reduction: int, windows: Windows | None) -> None:
        labels, mean = self.of_tokens, attention.detach().mean(dim=1)
        # As under the official code's autocast; labels between layers are float32.
        of_keys = labels.to(mean.dtype)
        if windows is not None:
            mixed = join(mean @ cut(of_keys, windows), windows)
        elif reduction > 1:
            mixed = mean @ self.pooled(of_keys, reduction).flatten(1, 2)
        else:
            mixed = mean @ of_keys
        self.of_tokens = (mixed + labels) / 2

    @staticmethod
    def pooled(labels: Tensor, step: int) -> Tensor:
        """Means over cells of a map, (B, Ht, Wt, C), of such a map or of its tokens."""
        if labels.dim() == 3:
            labels = labels.unflatten(1, (math.isqrt(labels.shape[1]), -1))
        return pool_share(labels, (step, step))


class Mixing(nn.Module):
    """Stands where attention weights are dropped out, and mixes labels with them."""

    def __init__(self, labels: DenseLabels, reduction: int = 1, windows: Windows | None = None) -> None:
        super().__init__()
        self.labels, self.reduction, self.windows = labels, reduction, windows

    def forward(self, attention: Tensor) -> Tensor:
        self.labels.mix(attention, self.reduction, self.windows)
        return attention


def materialise(model: nn.Module) -> DenseLabels:
    """Has timm's eager attentions mix dense labels, and merged tokens merge theirs."""
    labels = DenseLabels()

    def merge(module: nn.Module, inputs: tuple[Tensor, ...], is_last_of_pvt: bool = False) -> None:
        labels.of_tokens = labels.pooled(labels.of_tokens, 2)
        if not isinstance(module, swin_transformer.PatchMerging):
            labels.of_tokens = labels.of_tokens.flatten(1, 2)
        if is_last_of_pvt:
            labels.of_tokens = torch.cat((labels.of_image[:, None], labels.of_tokens), dim=1)

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.fused_attn, module.attn_drop = False, Mixing(labels)
        elif isinstance(module, twins.GlobalSubSampleAttn):
            module.fused_attn, module.attn_drop = False, Mixing(labels, reduction=module.sr_ratio)
        elif isinstance(module, swin_transformer.SwinTransformerBlock):
            windows = Windows(module.input_resolution, module.window_size, module.shift_size)
            module.attn.fused_attn, module.attn.attn_drop = False, Mixing(labels, windows=windows)
        elif isinstance(module, swin_transformer.PatchMerging):
            module.register_forward_pre_hook(merge)
        elif isinstance(module, twins.PatchEmbed) and not name.endswith("1"):
            module.register_forward_pre_hook(functools.partial(merge, is_last_of_pvt=name.endswith("4")))
    return labels


def make_model(name: str, variant: str, backend: str) -> nn.Module:
    """A copy of the model that all variants start from, patched or told to fuse its attention."""
    model = copy.deepcopy(_first_model(name))
    if variant == OURS:
        tlk.patch_model(model, backend=backend)
    elif variant == FUSED:
        for module in model.modules():
            if isinstance(module, swin_transformer.WindowAttention):
                module.fused_attn = True
    return model


@functools.lru_cache(maxsize=1)
def _first_model(name: str) -> nn.Module:
    """A model whose attention is not flat, as it is before training: flat, it would hide what is wrong with labels."""
    torch.manual_seed(0)
    # Stochastic depth would make every step another one.
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.weight", "q.weight", "kv.weight")):
                parameter *= 5
    return model


def make_batch(batch: int) -> tuple[Tensor, tlk.MixedTarget]:
    """Images, and the target of one box in each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    classes = torch.randint(0, CLASSES, (batch, 2), generator=generator)
    boxes = torch.tensor([[30, 40, 150, 200]]).expand(batch, 1, 4)
    return images, tlk.MixedTarget.from_boxes(classes, boxes, (SIDE, SIDE))


def dense(share: Tensor, classes: Tensor) -> Tensor:
    """Labels (B, N, C) of shares (B, N, 1)."""
    own, partner = F.one_hot(classes, CLASSES).to(share.dtype)[:, None].unbind(2)
    return (1 - share) * own + share * partner


def make_step(
    variant: str, name: str, batch: tuple[Tensor, tlk.MixedTarget], backend: str = "auto", precise: bool = True
) -> Callable[[], dict[str, Tensor]]:
    """Makes a function that runs forward, loss and backward on a batch, whose dtype and device the model takes.

    Args:
        variant: One of `variants_of`.
        name: Of the model.
        batch: Images and target.
        backend: Of our operators.
        precise: False: under bfloat16 autocast.

    Returns:
        The function, which returns the loss, the logits and the label of each image; gradients are left at the
        parameters of its `model`.
    """
    images, target = batch
    model = make_model(name, variant, backend).to(images).train()
    dense_target = target.to_dense(CLASSES)
    labels = materialise(model) if variant == OFFICIAL else None
    grid = SIDE // 16 if name.startswith("deit") else SIDE // 4

    def start_labels() -> None:
        share = target.token_share((grid, grid), (SIDE // grid, SIDE // grid), images.dtype)
        labels.of_image = dense(target.image_share(share.dtype)[:, None], target.classes)[:, 0]
        labels.of_tokens = dense(share, target.classes)
        if name.startswith("deit"):
            labels.of_tokens = torch.cat((labels.of_image[:, None], labels.of_tokens), dim=1)
        elif name.startswith("swin"):
            labels.of_tokens = labels.of_tokens.unflatten(1, (grid, grid))

    def forward() -> dict[str, Tensor]:
        if variant == OURS:
            logits, aligned = model(images, target=target)
            return {"logits": logits, "loss": tlk.mixed_cross_entropy(logits, aligned), "ratio": aligned.ratio}
        if variant != OFFICIAL:
            logits = model(images)
            return {"logits": logits, "plain loss": SoftTargetCrossEntropy()(logits, dense_target)}
        start_labels()
        logits = model(images)
        tokens = labels.of_tokens
        of_image = tokens.mean(dim=(1, 2)) if name.startswith("swin") else tokens[:, 0]
        loss = SoftTargetCrossEntropy()(logits, of_image)
        return {"logits": logits, "loss": loss, "ratio": of_image.gather(1, target.classes[:, 1:])}

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=not precise):
            results = forward()
        results["loss" if "loss" in results else "plain loss"].backward()
        return results

    step.model = model
    return step


def first_gradient(step: Callable) -> Tensor:
    """Gradient of the first weights of the model, to which all others contribute."""
    return next(p.grad for name, p in step.model.named_parameters() if name.endswith("proj.weight"))


def check_steps(name: str, device: str) -> dict[str, str]:
    """Which variants are wrong, in float32 on a few images, against the reference in float64, and by how much."""
    images, target = make_batch(CHECKED_IMAGES)
    exact, results = {}, {}
    images = images.to(device)
    target = target.to(device)
    for variant in (OURS, PLAIN):
        step = make_step(variant, name, (images.double(), target), "reference")
        exact |= step()
        exact["gradient" if variant == OURS else "plain gradient"] = first_gradient(step)
    for variant in variants_of(name):
        step = make_step(variant, name, (images, target))
        results[variant] = step()
        results[variant]["gradient" if "loss" in results[variant] else "plain gradient"] = first_gradient(step)
    bounds = error_bounds(results[PLAIN], exact, torch.float32)
    # timm's own step has no aligned labels: these may be off by a rounding, the rest by as much as its own.
    bounds |= {"ratio": ROUNDING[torch.float32], "loss": bounds["plain loss"], "gradient": bounds["plain gradient"]}
    return _reasons(results, exact, bounds)


def make_block(
    variant: str, path: str, tokens: Tensor, share: Tensor, classes: Tensor, backend: str = "auto"
) -> Callable[[], dict[str, Tensor]]:
    """Makes a function that runs forward and backward of one block.

    Args:
        variant: One of `variants_of`.
        path: Name of the model and of the block in it, separated by a colon.
        tokens: (B, N, channels) or (B, Ht, Wt, channels), with a gradient.
        share: (B, N, 1) or (B, Ht, Wt, 1).
        classes: int64 (B, 2).
        backend: Of our operators.

    Returns:
        The function, which returns the output, the share or the dense labels, and the gradient of the tokens.
    """
    name, _, inside = path.partition(":")
    block = make_model(name, variant, backend).get_submodule(inside).to(tokens).train()
    labels = materialise(block) if variant == OFFICIAL else None
    started = dense(share.flatten(1, -2), classes).view(*share.shape[:-1], CLASSES)
    size = () if not name.startswith("pvt") else ((math.isqrt(tokens.shape[1]),) * 2,)
    grad_output = torch.ones_like(tokens).cumsum(dim=-1) / tokens.shape[-1]

    def run() -> dict[str, Tensor]:
        if variant == OURS:
            output, mixed = block(tokens, *size, share=share)
            results = {"output": output, "share": mixed}
        elif variant == OFFICIAL:
            labels.of_tokens = started
            results = {"output": block(tokens, *size), "labels": labels.of_tokens}
        else:
            results = {"output": block(tokens, *size)}
        parameters = [tokens, *block.parameters()]
        return results | {"gradient": torch.autograd.grad(results["output"], parameters, grad_output)[0]}

    return run


def make_blocks(path: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[dict, dict[str, str]]:
    """All variants of a block on random tokens of a shape, and which are left out as they are wrong."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=generator).to(device, dtype)
    share = torch.rand((*shape[:-1], 1), generator=generator).to(device)
    classes = torch.randint(0, CLASSES, (shape[0], 2), generator=generator).to(device)

    def in_dtype(variant: str, of: torch.dtype, backend: str = "auto") -> Callable[[], dict[str, Tensor]]:
        labels = share.double() if of == torch.float64 else share
        return make_block(variant, path, tokens.detach().to(of).requires_grad_(), labels, classes, backend)

    runs = {variant: in_dtype(variant, dtype) for variant in variants_of(path)}
    exact = in_dtype(OURS, torch.float64, "reference")()
    exact["labels"] = dense(exact["share"].flatten(1, -2), classes).view(*share.shape[:-1], CLASSES)
    results = {variant: run() for variant, run in runs.items()}
    bounds = error_bounds(results[PLAIN], exact, dtype)
    wrong = _reasons(results, exact, bounds)
    return {variant: run for variant, run in runs.items() if variant not in wrong}, wrong


def _reasons(results: dict[str, dict[str, Tensor]], exact: dict[str, Tensor], bounds: dict[str, float]) -> dict:
    reasons = {variant: what_is_wrong(found, exact, bounds) for variant, found in results.items()}
    return {variant: reason for variant, reason in reasons.items() if reason}
