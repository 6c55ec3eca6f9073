"""Time of the operator beside all that people would use in its place, at the shapes of DeiT, Swin and PVT.

`pytest benchmarks/test_operator.py --benchmark-only`. On the CPU most rows are float32, on a GPU bfloat16; DeiT-S has
all three precisions.
"""

import pytest
import torch

from benchmarks import peers
from benchmarks.racing import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE, IMAGES = (DTYPES[0], 1) if DEVICE == "cpu" else (DTYPES[1], 16)


def deit(name, batch, heads, tokens, dtype=DTYPE, is_compiled=False):
    return peers.Problem(name, batch * IMAGES, heads, tokens, tokens, 64, dtype, is_compiled=is_compiled)


def pvt(stage, heads, queries, keys):
    return peers.Problem(f"PVT stage {stage}", 4 * IMAGES, heads, queries, keys, 64, DTYPE)


def swin(name, side, heads, shift=0):
    return peers.in_windows(f"Swin-T {name}", 4 * IMAGES, side, heads, shift, DTYPE)


PROBLEMS = [
    deit("DeiT-T", 8, 3, 197),
    deit("DeiT-S", 8, 6, 197, is_compiled=True),
    # PyTorch's products in float16 take a hundred times as long as ours on some CPUs.
    *(deit("DeiT-S", 1, 6, 197, dtype) for dtype in DTYPES if dtype != DTYPE),
    deit("DeiT-B", 4, 12, 197),
    deit("DeiT-B at 384", 1, 12, 577),
    deit("DeiT-S at 512", 1, 6, 1025),
    swin("stage 1", 56, 3),
    swin("stage 1, shifted", 56, 3, 3),
    swin("stage 2, shifted", 28, 6, 3),
    swin("stage 3, shifted", 14, 12, 3),
    swin("stage 4", 7, 24),
    pvt(1, 1, 3136, 49),
    pvt(2, 2, 784, 49),
    pvt(3, 5, 196, 49),
    pvt(4, 8, 50, 50),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_operator(race, problem, backward):
    runs, left_out = peers.contenders(problem, DEVICE, backward)
    peers.require_ours(runs, left_out)
    level = "operator, forward and backward" if backward else "operator, forward"
    race(runs, left_out, level=level, row=str(problem))
