"""Races functions: in each round all of them, one after another, in random order, so that all are disturbed alike.

What disturbs is a busy machine, and on the CPU what the one before left in the caches. On a GPU each starts from a
flushed L2 cache and is timed by CUDA events. All times are kept in the JSON.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 15, 101
# More than the L2 cache of any GPU, written so often that the host is done with most launches of what follows before:
# what is timed is the GPU.
FLUSHED_BYTES, FLUSHES = 2**30, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Clock:
    """What pytest-benchmark takes for the time: it goes on by what ours takes, so that its table is that of ours."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


CLOCK = Clock()


def race(
    benchmark: Any,
    seconds: float,
    runs: dict[str, Callable],
    left_out: dict[str, str],
    *,
    level: str,
    row: str,
    worth: float = 1.0,
    **more,
) -> None:
    """Times functions that have run once already, ours first, for about so many seconds, and keeps all times.

    Args:
        benchmark: pytest-benchmark's fixture.
        seconds: Time to spend; at least `MIN_ROUNDS` rounds take place, at most `MAX_ROUNDS`.
        runs: Functions by name.
        left_out: Why others do not take part, by name.
        level: The table of the report.
        row: The row there.
        worth: How many times `seconds` to spend on it.
        more: What else the report wants to know.
    """
    order, ours = random.Random(0), next(iter(runs))
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=DEVICE) if DEVICE == "cuda" else None

    def took(run: Callable) -> float:
        if flushed is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            flushed.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    times = {name: [] for name in runs}

    def round_of_all() -> None:
        for name in order.sample(list(runs), len(runs)):
            times[name].append(took(runs[name]))
        CLOCK.now += times[ours][-1]

    start = time.perf_counter()
    round_of_all()  # warms up and tells how long a round takes
    rounds = int(worth * seconds / (time.perf_counter() - start))
    times.update({name: [] for name in runs})
    benchmark.pedantic(round_of_all, rounds=min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))
    benchmark.extra_info.update(
        level=level,
        row=row,
        ours=ours,
        seconds={name: [float(f"{value:.5g}") for value in values] for name, values in times.items()},
        left_out=left_out,
        **more,
    )
