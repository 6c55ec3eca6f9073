"""Peak memory of a training step: aligned by ours, timm's model on plain CutMix, and aligned the official way.

`pytest benchmarks/test_memory.py --benchmark-only`. On the CPU each is measured in a process of its own.
"""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.racing import DEVICE

STATUS = Path("/proc/self/status")
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(DEVICE == "cpu" and not STATUS.exists(), reason="needs Linux's /proc to tell the peak")
@pytest.mark.parametrize("name", models.MODELS)
def test_peak_memory(benchmark, name):
    images = models.MODELS[name] // 2 if DEVICE == "cpu" else models.GPU_IMAGES
    measure = peak_on_gpu if DEVICE == "cuda" else peak_of_process

    def measure_all():
        return {variant: measure(variant, name, images) for variant in models.variants_of(name)}

    peaks = benchmark.pedantic(measure_all, rounds=1)
    benchmark.extra_info.update(
        level="peak memory", row=f"{name}: B={images}", ours=models.OURS, bytes=peaks, left_out={}
    )


def make_step(variant, name, images):
    batch = tuple(part.to(DEVICE) for part in models.make_batch(images))
    return models.make_step(variant, name, batch, precise=DEVICE == "cpu")


def peak_on_gpu(variant, name, images):
    """Bytes that model and batch, and two steps of it, have at most."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make_step(variant, name, images)
    step()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_of_process(variant, name, images):
    # glibc then gives each tensor pages of its own and takes them back at once: the peak is that of what is alive,
    # without what its heap holds back, which differs by 5 % from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.test_memory", variant, name, str(images)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    return int(done.stdout)


def peak():
    # Not getrusage: its peak is at least that of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1])


if __name__ == "__main__":
    variant, name, images = sys.argv[1:]
    step = make_step(variant, name, int(images))
    before = peak()
    step()
    step()
    print(peak() - before)
