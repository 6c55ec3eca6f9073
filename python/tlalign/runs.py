"""The folder of a run: its configuration, its log and where its other files lie."""

from __future__ import annotations

import csv
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from timm.models import safe_model_name

from tlalign.config import CONFIG_FILE, TrainConfig, UsageError, save_config


@dataclass
class EpochRecord:
    """What an epoch gave: a row of the log.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Steps done since the start of the run.
        loss: Mean training loss.
        eval_loss: Cross entropy of the held-out images.
        lr: Learning rate at its end.
        top1: Per cent of the held-out images whose class the model gets right.
        top5: Per cent of the held-out images whose class is among the model's first five.
        top1_ema: As `top1`, of the averaged weights.
        top5_ema: As `top5`, of the averaged weights.
        images_per_second: Rate of training, evaluation left out.
        data_seconds: Mean time of a step that the process waits for images.
        forward_seconds: Mean time of a step for mixing, the model and the loss.
        backward_seconds: Mean time of a step for the gradient and the update of the weights.
        ratio_change: Mean of |aligned - original| mixing ratio.
    """

    epoch: int
    step: int
    loss: float
    eval_loss: float
    lr: float
    top1: float
    top5: float
    top1_ema: float | None
    top5_ema: float | None
    images_per_second: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    ratio_change: float | None

    @property
    def metric(self) -> float:
        """What checkpoints are ranked by: top-1 of the averaged weights, which timm prefers to load, if there are."""
        return self.top1 if self.top1_ema is None else self.top1_ema


class RunFolder:
    """A folder of its own for a new run; an existing run is never written over.

    Args:
        config: Configuration of the run, which is written into the folder.
        resume: Take the folder that holds this run already.

    Attributes:
        path: The folder.

    Raises:
        UsageError: If the folder asked for holds something already, or can't be made.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.path = _new_folder(config) if config.output is None else Path(config.output)
        if resume:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output: cannot make the folder {self.path}: {error}") from error
        if any(self.path.iterdir()):
            raise UsageError(f"output: expected a new or empty folder, but {self.path} holds files")
        save_config(config, self.path / CONFIG_FILE)
        with self.log.open("w", newline="") as file:
            csv.writer(file).writerow(field.name for field in dataclasses.fields(EpochRecord))

    @property
    def log(self) -> Path:
        """The log, a CSV file with a row for each epoch."""
        return self.path / "log.csv"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last complete epoch."""
        return self.path / "last.pth.tar"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the epoch with the best top-1."""
        return self.path / "model_best.pth.tar"

    @property
    def picture(self) -> Path:
        """Mixed images and their token labels."""
        return self.path / "token_labels.png"

    def append(self, record: EpochRecord) -> None:
        """Adds a row to the log."""
        with self.log.open("a", newline="") as file:
            csv.writer(file).writerow("" if value is None else value for value in dataclasses.astuple(record))


def _new_folder(config: TrainConfig) -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(config.model)}-{config.method}"
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder
