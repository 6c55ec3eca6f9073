"""Peak memory of a training step: aligned by ours, timm's model on plain CutMix, and aligned the official way.

`pytest benchmarks/test_memory.py --benchmark-only`. Each is measured in a process of its own.
"""

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
    # glibc then gives each tensor pages of its own and takes them back at once: the peak is that of what is alive,
    # without what its heap holds back, which differs by 5 % from run to run.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]),
    }

    def measure():
        peaks = {}
        for variant in models.VARIANTS:
            command = [sys.executable, "-m", "benchmarks.test_memory", variant, name, str(images)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
            peaks[variant] = int(done.stdout)
        return peaks

    peaks = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(
        level="peak memory", row=f"{name}: B={images}", ours=models.OURS, bytes=peaks, left_out={}, device=DEVICE
    )


def peak_memory(step):
    """Bytes that two steps add to the peak of this process, on the CPU; that they have on the GPU at most."""
    if DEVICE == "cuda":
        step()
        step()
        return torch.cuda.max_memory_allocated()

    def peak():
        # Not getrusage: its peak is at least that of the process that started this one.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1])

    before = peak()
    step()
    step()
    return peak() - before


if __name__ == "__main__":
    variant, name, images = sys.argv[1:]
    batch = tuple(part.to(DEVICE) for part in models.make_batch(int(images)))
    print(peak_memory(models.make_step(variant, name, batch, precise=DEVICE == "cpu")))
