"""Losses against a mixture of a few classes, without a (B, C) target.

Both losses are affine in the target, and the target of image b is sum_k weight[b, k] * onehot(class[b, k]), so the
target enters through a gather of S + 1 logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tlalign_kernels.labels import MixedTarget, check_smoothing


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
        TypeError: If `logits` is no floating tensor or `target` no MixedTarget.
        ValueError: If shapes disagree, `smoothing` is out of range or, on the CPU, a class id is.
    """
    _check(logits, target, smoothing)
    logits = _at_least_float32(logits)
    per_image = torch.logsumexp(logits, dim=1) - _target_logit(logits, target, smoothing)
    return per_image.mean()


def mixed_binary_cross_entropy(logits: Tensor, target: MixedTarget, smoothing: float = 0.0) -> Tensor:
    """Mean binary cross entropy of each class against the mixture (DeiT III, arXiv 2204.07118).

    Equals `torch.nn.BCEWithLogitsLoss()(logits, target.to_dense(C, smoothing))`: a mean over images and classes.

    Args:
        logits: floating (B, C).
        target: The mixture, usually the aligned target a patched model returned.
        smoothing: Label smoothing in [0, 1].

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: If `logits` is no floating tensor or `target` no MixedTarget.
        ValueError: If shapes disagree, `smoothing` is out of range or, on the CPU, a class id is.
    """
    _check(logits, target, smoothing)
    logits = _at_least_float32(logits)
    per_image = F.softplus(logits).sum(dim=1) - _target_logit(logits, target, smoothing)
    return per_image.mean() / logits.shape[1]


def _target_logit(logits: Tensor, target: MixedTarget, smoothing: float) -> Tensor:
    """Sum over classes of (smoothed target * logit), (B,)."""
    if target.classes is None:
        mixed = (logits * target.image_share(logits.dtype)).sum(dim=1)
    else:
        mixed = (logits.gather(1, target.classes) * target.source_weights()).sum(dim=1)
    return (1 - smoothing) * mixed + smoothing * logits.mean(dim=1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


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
    # Reading class ids synchronises an accelerator and breaks a graph; on the CPU it is free.
    if target.classes is not None and target.device.type == "cpu" and not torch.compiler.is_compiling():
        highest = int(target.classes.max()) if target.classes.numel() else 0
        if highest >= logits.shape[1]:
            raise ValueError(f"target.classes: expected ids below {logits.shape[1]}, got {highest}")
