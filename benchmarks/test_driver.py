"""What the driver adds to a training step of deit_tiny: all that is neither forward, backward nor optimiser.

Processor time of the training process, which a busy machine disturbs little; workers read and augment the images.
`pytest benchmarks/test_driver.py --benchmark-only -s`
"""

import io
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

from tlalign.config import TrainConfig, load_recipe
from tlalign.engine import Trainer
from tlalign.log import RunLog
from tlalign.progress import TrainingProgress
from tlalign.runs import RunFolder
from tlalign.signals import StopSignals

STEPS, IMAGES = 6, 16


@pytest.fixture
def images(tmp_path):
    """Folder of an epoch's images."""
    for split, count in (("train", STEPS * IMAGES // 2), ("val", IMAGES)):
        for name in ("one", "other"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((256, 256), 64).convert("RGB").save(folder / f"{index}.jpg")
    return tmp_path / "images"


def counting(function, spent):
    """A function whose processor time is added up."""

    def counted(*arguments, **options):
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent.append(time.process_time() - start)

    return counted


def test_driver(benchmark, images, tmp_path, monkeypatch):
    values = {"data": f"folder:{images}", "num_classes": 1000, "batch_size": IMAGES, "aug_repeats": 1, "workers": 1}
    values |= {"epochs": 10, "output": str(tmp_path / "run")}
    # Of the whole process, for which the benchmarks after this one take the default.
    monkeypatch.setattr("tlalign.evaluation.keep_freed_memory", lambda: None)
    trainer = Trainer(TrainConfig(**load_recipe("deit_tiny") | values))
    spent: list[float] = []
    monkeypatch.setattr(trainer.task, "forward", counting(trainer.task.forward, spent))
    monkeypatch.setattr(torch.Tensor, "backward", counting(torch.Tensor.backward, spent))
    monkeypatch.setattr(trainer.optimizer, "step", counting(trainer.optimizer.step, spent))
    progress = TrainingProgress(10, STEPS, Console(file=io.StringIO()))
    folder, shares = RunFolder(trainer.config), []

    def epoch():
        spent.clear()
        start = time.process_time()
        trainer._train_epoch(len(shares) + 1, progress, log, None, signals)
        whole = time.process_time() - start
        shares.append(1 - sum(spent) / whole)
        trainer._totals = type(trainer._totals)()

    with RunLog(folder.path) as log, StopSignals() as signals:
        benchmark.pedantic(epoch, rounds=2, warmup_rounds=1)
    benchmark.extra_info["overhead_of_the_driver"] = shares[1:]
    print("\nof the processor time of steps the driver takes", ", ".join(f"{share:.2%}" for share in shares[1:]))
