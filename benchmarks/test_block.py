"""Time of a transformer block, forward and backward: aligned by ours, as timm has it, and aligned the official way.

`pytest benchmarks/test_block.py --benchmark-only`. On the CPU in float32, on a GPU in bfloat16.
"""

import pytest
import torch

from benchmarks import models
from benchmarks.racing import DEVICE

IMAGES, DTYPE = (4, torch.float32) if DEVICE == "cpu" else (64, torch.bfloat16)
BLOCKS = {
    "DeiT-T": ("deit_tiny_patch16_224:blocks.0", (197, 192)),
    "DeiT-S": ("deit_small_patch16_224:blocks.0", (197, 384)),
    "Swin-T stage 1, shifted": ("swin_tiny_patch4_window7_224:layers.0.blocks.1", (56, 56, 96)),
    "Swin-T stage 3, shifted": ("swin_tiny_patch4_window7_224:layers.2.blocks.1", (14, 14, 384)),
    "PVT-Tiny stage 1": ("pvt_tiny:block1.0", (3136, 64)),
    "PVT-Tiny stage 3": ("pvt_tiny:block3.0", (196, 320)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(race, name):
    path, shape = BLOCKS[name]
    runs, wrong = models.make_blocks(path, (IMAGES, *shape), DEVICE, DTYPE)
    assert models.OURS not in wrong, wrong
    dtype = str(DTYPE).removeprefix("torch.")
    race(runs, wrong, level="block", row=f"{name}: B={IMAGES}, {dtype}")
