"""How the operator's cost grows with tokens, images, classes and sources, forward and backward.

`pytest benchmarks/test_growth.py --benchmark-only`. Each row changes one number of DeiT-T's attention.
"""

import dataclasses

import pytest
import torch

from benchmarks import peers
from benchmarks.racing import DEVICE

IMAGES = 1 if DEVICE == "cpu" else 16
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
BASE = peers.Problem("DeiT-T", 4 * IMAGES, 3, 197, 197, 64, DTYPE)


def change(**numbers):
    return dataclasses.replace(BASE, **numbers)


PROBLEMS = [
    *(("N", n, change(batch=IMAGES, queries=n, keys=n)) for n in (50, 197, 577, 1025, 2049)),
    *(("B", batch * IMAGES, change(batch=batch * IMAGES)) for batch in (1, 2, 4, 8, 16)),
    *(("C", classes, change(classes=classes)) for classes in (10, 100, 1000, 10000)),
    *(("S", sources, change(sources=sources)) for sources in (1, 2, 4, 8)),
]
PEERS = ("SDPA", "SDPA + column", "materialised, share", "materialised, classes")


@pytest.mark.parametrize(("axis", "value", "problem"), PROBLEMS, ids=[f"{axis}={x}" for axis, x, _ in PROBLEMS])
def test_growth(race, axis, value, problem):
    runs, left_out = peers.contenders(problem, DEVICE, True, PEERS)
    peers.require_ours(runs, left_out)
    race(runs, left_out, level=f"growth with {axis}", row=f"{axis}={value}", value=value)
