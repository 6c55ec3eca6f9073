"""Runs that tests train: small ones on the digits, their logs, and what they became."""

import dataclasses
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from tlalign.checkpoints import Checkpoints
from tlalign.config import TrainConfig, load_recipe
from tlalign.engine import Trainer
from tlalign.progress import TrainingProgress
from tlalign.readers import Digits
from tlalign.runs import EpochRecord, RunFolder
from tlalign_kernels import MixedTarget

TINY = {
    "model_kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "img_size": 16,
    "batch_size": 128,
    "epochs": 1,
    "warmup_epochs": 0,
    # Also where there is a GPU, which is asked more rarely whether to stop, and adds in another order.
    "device": "cpu",
}


# For processes that tests start. Not all of sys.path: with the folder above, this one would pass for the package.
PYTHONPATH = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


class FewDigits(Digits):
    """Few enough digits for runs whose end is all that counts: 100 to train on, 21 held out."""

    def __init__(self, train: bool) -> None:
        super().__init__(train)
        count = 100 if train else 21
        self.images, self.targets = self.images[:count], self.targets[:count]


def tiny(output: Path, **values) -> TrainConfig:
    return TrainConfig(**load_recipe("digits") | TINY | {"output": str(output)} | values)


def small(output: Path, **values) -> TrainConfig:
    """Of a run of 5 steps an epoch on `FewDigits`."""
    return tiny(output, **{"batch_size": 20} | values)


def options(folder: Path, **values) -> list[str]:
    """Flags of `tlalign train` for a `small` run."""
    values = dataclasses.asdict(small(folder, **values))
    names = (*TINY, "output", "checkpoint_steps")
    return [f"--{name}={'null' if values[name] is None else values[name]}" for name in names]


def record(epoch: int, **values) -> EpochRecord:
    """A row of an epoch of ten steps, with numbers that have no short decimal form."""
    numbers = {field.name: epoch + math.pi / 10 for field in dataclasses.fields(EpochRecord)}
    return EpochRecord(**numbers | {"epoch": epoch, "step": 10 * epoch, "peak_memory": 2**30} | values)


def quiet(trainer: Trainer) -> TrainingProgress:
    console = Console(file=io.StringIO())
    return TrainingProgress(trainer.config.epochs, trainer.steps_per_epoch, console, trainer.step)


def fit(config: TrainConfig) -> tuple[Trainer, RunFolder, list]:
    trainer, folder = Trainer(config), RunFolder(config)
    return trainer, folder, trainer.fit(folder, quiet(trainer))


def resume(config: TrainConfig, report=None, initialises: bool = True) -> tuple[Trainer, RunFolder]:
    """A trainer that continues the run in a folder, or starts it if it has no checkpoint yet."""
    trainer, folder = Trainer(config, initialises), RunFolder(config, resume=True)
    found = Checkpoints(folder.path).load_newest(report or _unexpected)
    if found is not None:
        trainer.resume(found[1])
    return trainer, folder


class PreMixed:
    """Takes the place of a trainer's loader: mixed batches, of which each process and part has its own images."""

    def __init__(self, trainer: Trainer) -> None:
        self.config, self.processes = trainer.config, trainer.processes
        self.dataset = trainer.train_loader.dataset
        self.steps = trainer.steps_per_epoch

    def __len__(self) -> int:
        return self.steps * self.config.accumulate

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, MixedTarget]]:
        parts, world_size, side = self.config.accumulate, self.processes.world_size, self.config.img_size
        for number in range(start, len(self)):
            step, part = divmod(number, parts)
            generator = torch.Generator().manual_seed(100 * epoch + step)
            images = torch.randn(self.config.batch_size, 1, side, side, generator=generator)
            classes = torch.randint(0, 10, (len(images), 2), generator=generator)
            edges = torch.randint(0, side + 1, (len(images), 4), generator=generator)
            boxes = torch.stack(
                [edges[:, :2].amin(1), edges[:, 2:].amin(1), edges[:, :2].amax(1), edges[:, 2:].amax(1)], 1
            )
            own = slice(part * world_size + self.processes.rank, None, parts * world_size)
            yield images[own], MixedTarget.from_boxes(classes[own], boxes[own][:, None], (side, side))


def fit_and_keep_losses(trainer: Trainer, folder: RunFolder | None) -> list[float]:
    """Trains, and returns the loss of each step."""
    losses, read = [], trainer._read

    def keep(*arguments):
        loss, stop = read(*arguments)
        losses.append(loss)
        return loss, stop

    trainer._read = keep
    trainer.fit(folder, quiet(trainer))
    return losses


def became(trainer: Trainer) -> dict[str, object]:
    """All that a run has become, but for times and memory: equal for equal runs."""
    state = trainer.state()
    for row in state["records"]:
        for name in [name for name in row if "second" in name or name == "peak_memory"]:
            del row[name]
    state["totals"].pop("part_seconds")
    del state["args"]
    return _flat(state)


def differences(first: dict[str, object], second: dict[str, object]) -> list[str]:
    """Names of what is not the same to the bit."""
    names = first.keys() ^ second.keys()
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        names |= set() if same else {name}
    return sorted(names)


def _flat(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {name: value}
    return {key: each for part, item in items for key, each in _flat(item, f"{name}.{part}").items()}


def _unexpected(message: str) -> None:
    raise AssertionError(message)
