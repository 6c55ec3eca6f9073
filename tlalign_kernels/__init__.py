"""Fused attention with token-label alignment for vision transformers."""

from tlalign_kernels import models
from tlalign_kernels.extension import VERSION as __version__
from tlalign_kernels.functional import attention, attention_qkv, explain, window_attention
from tlalign_kernels.labels import MixedTarget
from tlalign_kernels.losses import mixed_binary_cross_entropy, mixed_cross_entropy
from tlalign_kernels.patch import LabelFollower, ModelFollower, patch_model, register, unpatch_model
from tlalign_kernels.tuning import Choice, tune

__all__ = [
    "Choice",
    "LabelFollower",
    "MixedTarget",
    "ModelFollower",
    "__version__",
    "attention",
    "attention_qkv",
    "explain",
    "mixed_binary_cross_entropy",
    "mixed_cross_entropy",
    "models",
    "patch_model",
    "register",
    "tune",
    "unpatch_model",
    "window_attention",
]
