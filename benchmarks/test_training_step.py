"""Time of a training step: aligned by ours, timm's model on plain CutMix, and aligned the official way.

`pytest benchmarks/test_training_step.py --benchmark-only`. On the CPU in float32, on a GPU under bfloat16 autocast. The
official way and the patched models are compared with the float64 reference first, in float32 on two images.
"""

import pytest

from benchmarks import models
from benchmarks.racing import DEVICE


@pytest.mark.parametrize("name", models.MODELS)
def test_training_step(race, name):
    wrong = models.check_steps(name, DEVICE)
    assert models.OURS not in wrong, wrong
    images = models.MODELS[name] if DEVICE == "cpu" else models.GPU_IMAGES
    batch = tuple(part.to(DEVICE) for part in models.make_batch(images))
    runs = {
        variant: models.make_step(variant, name, batch, precise=DEVICE == "cpu")
        for variant in models.variants_of(name)
        if variant not in wrong
    }
    for run in runs.values():
        run()
    dtype = "float32" if DEVICE == "cpu" else "bfloat16 autocast"
    # The headline; on a CPU a step takes a second.
    worth = 40 if DEVICE == "cpu" else 10
    race(runs, wrong, level="training step", row=f"{name}: B={images}, {dtype}", worth=worth)
