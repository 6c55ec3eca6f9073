"""Time of a training step: aligned by ours, timm's model on plain CutMix, and aligned the official way.

`pytest benchmarks/test_training_step.py --benchmark-only`. On the CPU in float32, on a GPU under bfloat16 autocast. The
official way and the patched models are compared with the float64 reference first, in float32 on two images. Where
`tlalign train` has PyTorch multiply by oneDNN, steps are timed so as well.
"""

import pytest

from benchmarks import models
from benchmarks.racing import DEVICE
from benchmarks.report import ONEDNN_STEP, STEP
from tlalign.evaluation import take_fast_products


@pytest.fixture(params=[STEP, ONEDNN_STEP], ids=["default", "onednn"])
def level(request, default_products):
    """The table of the report, with PyTorch set as it says."""
    if request.param == ONEDNN_STEP and (DEVICE != "cpu" or not take_fast_products()):
        pytest.skip("PyTorch multiplies as `tlalign train` has it do")
    return request.param


@pytest.mark.parametrize("name", models.MODELS)
def test_training_step(race, name, level):
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
    race(runs, wrong, level=level, row=f"{name}: B={images}, {dtype}", worth=worth)
