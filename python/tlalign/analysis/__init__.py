"""What alignment does to the labels of a model's tokens: the analyses of TL-Align (arXiv 2210.06455), and rollout."""

from tlalign.analysis.presence import convolution_presence, token_presence
from tlalign.analysis.ratios import MixedBatch, RatioFollower, mix_batches, similarity_ratio, target_rmse
from tlalign.analysis.rollout import Rollout, attention_rollout

__all__ = [
    "MixedBatch",
    "RatioFollower",
    "Rollout",
    "attention_rollout",
    "convolution_presence",
    "mix_batches",
    "similarity_ratio",
    "target_rmse",
    "token_presence",
]
