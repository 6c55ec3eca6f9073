"""Mixing of a batch: each strategy takes images and classes and returns the mixed images and their `MixedTarget`.

A strategy is a callable, `mixed_images, target = strategy(images, classes)`. It draws from a generator of its own and
so never from numpy's or torch's global state: `seed=` and `reseed(seed, step, rank)` decide everything it does. The
partner of an image is its mirror in the batch (`images.flip(0)`), as in `timm.data.Mixup`, whose parameters and
distributions are kept where timm has the strategy; the others have the parameters of their papers. Three of timm's
parameters are missing on purpose: `correct_lam=False` would label a box cut off by the border with the area it was
meant to have, but a token's label is the share of each image in the token's pixels, so that the ratio has to be the
area that was really pasted; and `label_smoothing` and `num_classes` belong to the loss (or to
`MixedTarget.to_dense`), since a `MixedTarget` needs neither.

Letters in shapes: B images in the batch, Hi x Wi pixels, h x w cells of a map, n draws.
"""

from tlalign.mixing.attentive import AttentiveCutMix
from tlalign.mixing.boxes import BoxStrategy, CutMix, MixUp, MixUpCutMix, draw_boxes
from tlalign.mixing.fourier import FMix
from tlalign.mixing.masks import MaskStrategy
from tlalign.mixing.patches import BlockWise, RandomPatches, TokenMix
from tlalign.mixing.puzzle import GradientSaliency, PuzzleMix
from tlalign.mixing.resize import ResizeMix
from tlalign.mixing.saliency import SaliencyMix
from tlalign.mixing.strategy import MixingStrategy

__all__ = [
    "AttentiveCutMix",
    "BlockWise",
    "BoxStrategy",
    "CutMix",
    "FMix",
    "GradientSaliency",
    "MaskStrategy",
    "MixUp",
    "MixUpCutMix",
    "MixingStrategy",
    "PuzzleMix",
    "RandomPatches",
    "ResizeMix",
    "SaliencyMix",
    "TokenMix",
    "draw_boxes",
]
