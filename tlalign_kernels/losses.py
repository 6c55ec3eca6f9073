"""Losses against a mixture of a few classes, without a (B, C) target.

Both losses are affine in the target, and the target of image b is sum_k weight[b, k] * onehot(class[b, k]), so the
target enters through a gather of S + 1 values. Nothing here makes an accelerator wait, and launches are few: beside so
little arithmetic they are the cost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlalign_kernels.labels import MixedTarget, check_smoothing, values_are_free


def mixed_cross_entropy(logits: Tensor, target: MixedTarget, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy against the mixture that `target` describes.

    Equals timm's `SoftTargetCrossEntropy()(logits, target.to_dense(C, smoothing))`.

    Args:
        logits: floating (B, C).
        target: The mixture, usually the aligned target a patched model returned.
        smoothing: Label smoothing in [0, 1].

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: If `logits` is no floating tensor, `target` no MixedTarget or `smoothing` no number.
        ValueError: If shapes disagree, `smoothing` is out of range or, on the CPU, a class id is.
    """
    return _loss(logits, target, smoothing, binary=False)


def mixed_binary_cross_entropy(logits: Tensor, target: MixedTarget, smoothing: float = 0.0) -> Tensor:
    """Mean binary cross entropy of each class against the mixture, as timm's `BinaryCrossEntropy` takes it.

    Equals `torch.nn.BCEWithLogitsLoss()(logits, target.to_dense(C, smoothing))`: a mean over images and classes.
    Targets keep their ratio; in DeiT III's training (arXiv 2204.07118) each class that an image holds counts whole.

    Args:
        logits: floating (B, C).
        target: The mixture, usually the aligned target a patched model returned.
        smoothing: Label smoothing in [0, 1].

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: If `logits` is no floating tensor, `target` no MixedTarget or `smoothing` no number.
        ValueError: If shapes disagree, `smoothing` is out of range or, on the CPU, a class id is.
    """
    return _loss(logits, target, smoothing, binary=True)


def _loss(logits: Tensor, target: MixedTarget, smoothing: float, binary: bool) -> Tensor:
    _check(logits, target, smoothing)
    if target.classes is not None:
        weights = target.source_weights().to(_loss_dtype(logits)) * (smoothing - 1)
        return _MixtureLoss.apply(logits, target.classes, weights, smoothing, binary)
    logits = logits.to(_loss_dtype(logits))
    dense = target.image_share(logits.dtype).detach() * (1 - smoothing) + smoothing / logits.shape[1]
    return (F.binary_cross_entropy_with_logits if binary else F.cross_entropy)(logits, dense)


class _MixtureLoss(torch.autograd.Function):
    """Either loss; the gradient is the softmax (or sigmoid) of the logits minus the smoothed target, over the count.

    Left to autograd, the gather and the smoothing would each make a gradient of all classes of their own. `weights` are
    those of the sources times smoothing - 1.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, classes: Tensor, weights: Tensor, smoothing: float, binary: bool) -> Tensor:
        dtype = _loss_dtype(logits)
        values = logits.to(dtype) if binary else F.log_softmax(logits, dim=1, dtype=dtype)
        loss = (values.gather(1, classes) * weights).sum()
        if smoothing:
            loss = loss.sub(values.sum(), alpha=smoothing / logits.shape[1])
        if binary:
            loss = loss + F.softplus(values).sum()
        return loss / _count(logits, binary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.smoothing, ctx.binary = inputs[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, classes, weights = ctx.saved_tensors
        dtype = _loss_dtype(logits)
        result = logits.to(dtype).sigmoid() if ctx.binary else F.softmax(logits, dim=1, dtype=dtype)
        if torch.is_grad_enabled():
            result = result.clone()  # a second backward needs what is overwritten here
        if ctx.smoothing:
            result.sub_(ctx.smoothing / logits.shape[1])
        # One source after another: of two of the same class, a GPU would add the weights in any order.
        for source, weight in zip(classes.split(1, dim=1), weights.split(1, dim=1), strict=True):
            result.scatter_add_(1, source, weight)
        factor = gradient / _count(logits, ctx.binary)
        # The many gradients at once of torch.func.jacrev don't fit into the memory of one.
        result = result * factor if torch.is_grad_enabled() else result.mul_(factor)
        return result.to(logits.dtype), None, None, None, None


def _count(logits: Tensor, binary: bool) -> int:
    """What a mean is taken over: images, and with binary losses classes."""
    return logits.numel() if binary else logits.shape[0]


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check(logits: Tensor, target: MixedTarget, smoothing: float) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating tensor, got {given}")
    if not isinstance(target, MixedTarget):
        raise TypeError(f"target: expected a MixedTarget, got {type(target).__name__}")
    check_smoothing(smoothing)
    if logits.dim() != 2 or logits.shape[0] != target.batch_size:
        raise ValueError(f"logits: expected shape ({target.batch_size}, C), got {tuple(logits.shape)}")
    if logits.device != target.device:
        raise ValueError(f"target: expected on the device of logits ({logits.device}), got {target.device}")
    if target.classes is None and target.token_labels.shape[1] != logits.shape[1]:
        raise ValueError(f"logits: expected {target.token_labels.shape[1]} classes, got {logits.shape[1]}")
    if target.classes is not None and values_are_free(target.device):
        highest = int(target.classes.max()) if target.classes.numel() else 0
        if highest >= logits.shape[1]:
            raise ValueError(f"target.classes: expected ids below {logits.shape[1]}, got {highest}")
