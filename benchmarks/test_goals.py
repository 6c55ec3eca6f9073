"""The operator on a CPU at the shapes for which its kernels have goals, as a multiple of the speed of PyTorch.

`pytest benchmarks/test_goals.py --benchmark-only`. Beside it runs a product of matrices with as many multiplications as
attention cannot do without: ours reaches so much of its rate as its time is of ours.
"""

from dataclasses import dataclass

import pytest
import torch

from benchmarks import peers
from benchmarks.racing import DEVICE
from benchmarks.report import MATRIX_PRODUCT

SDPA_OR_EAGER = ("SDPA", peers.EAGER)
MATRIX_SIDE = 1024


@dataclass(frozen=True)
class Goals:
    """What the best peer's time over ours is to be; None where nothing was asked for."""

    problem: peers.Problem
    forward: float | None
    both: float

    def __str__(self) -> str:
        return str(self.problem)


def deit(heads, forward, both, dtype=torch.float32):
    return Goals(peers.Problem("DeiT", 8, heads, 197, 197, 64, dtype), forward, both)


GOALS = [
    *(deit(heads, 1.8, 1.7) for heads in (3, 6, 12)),
    deit(6, 2.0, 1.5, torch.bfloat16),
    Goals(peers.in_windows("512 windows", 8, 56, 3, 0, torch.float32), 3.5, 3.0),
    Goals(peers.Problem("few keys", 1, 8, 3136, 49, 64), None, 1.3),
    Goals(peers.Problem("many tokens", 2, 3, 4096, 4096, 64), None, 1.3),
]


def product_of_matrices(problem, backward):
    """As many multiplications as its two products of queries and keys take, in the backward five more."""
    multiplications = (7 if backward else 2) * problem.batch * problem.heads * problem.queries * problem.keys
    depth = max(1, round(multiplications * problem.head_dim / MATRIX_SIDE**2))
    left, right = (torch.randn(MATRIX_SIDE, depth).to(problem.dtype) for _ in range(2))
    return lambda: left @ right.T


@pytest.mark.skipif(DEVICE != "cpu", reason="goals of the CPU kernels")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("goals", GOALS, ids=str)
def test_goals(race, goals, backward):
    goal = goals.both if backward else goals.forward
    if goal is None:
        pytest.skip("no goal")
    runs, left_out = peers.contenders(goals.problem, DEVICE, backward, SDPA_OR_EAGER)
    peers.require_ours(runs, left_out)
    if goals.problem.windows is None:
        runs[MATRIX_PRODUCT] = product_of_matrices(goals.problem, backward)
    row = f"{goals}, forward and backward" if backward else f"{goals}, forward"
    race(runs, left_out, level="goals", row=row, goal=goal)
