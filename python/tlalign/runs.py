"""The folder of a run: its configuration, the rows of its log and where its other files lie."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlalign.config import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    HUGGING_FACE,
    TrainConfig,
    UsageError,
    disk_errors_as,
    load_config_file,
    save_config,
)

LAST_CHECKPOINT = "last.pth.tar"
BEST_CHECKPOINT = "model_best.pth.tar"
LOG_FILE = "log.csv"
CURVES_FILE = "curves.png"
TENSORBOARD_FOLDER = "tensorboard"
LOCK_FILE = "lock"
# What begins so was not written to its end.
_UNFINISHED = "unfinished-"


@dataclass
class EpochRecord:
    """What an epoch gave: a row of the log.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Steps done since the start of the run.
        loss: Mean training loss.
        eval_loss: Cross entropy of the held-out images.
        lr: Learning rate of its last step, the greatest of all groups of parameters.
        top1: Per cent of the held-out images whose class the model gets right.
        top5: Per cent of the held-out images whose class is among the model's first five.
        top1_ema: As `top1`, of the averaged weights.
        top5_ema: As `top5`, of the averaged weights.
        images_per_second: Rate of training, evaluation left out.
        data_seconds: Mean time of a step that the process waits for images.
        forward_seconds: Mean time of a step for mixing, the model and the loss.
        backward_seconds: Mean time of a step for the gradient and the update of the weights.
        ratio_change: Mean of |aligned - original| mixing ratio, or of |the teacher's - original|; of dense labels half
            the sum of |aligned - original| over the classes.
        peak_memory: Bytes that were in use at most since the process started: on an accelerator by tensors, on the CPU
            by the process.
        ratio_rmse: Root mean square of what `ratio_change` is the mean of.
        ratio_shift: Its mean with the sign: of aligned - original, where that has one.
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
    peak_memory: int
    # Checkpoints of older versions know nothing of these.
    ratio_rmse: float | None = None
    ratio_shift: float | None = None

    @property
    def step_seconds(self) -> float:
        """Mean time of a step."""
        return self.data_seconds + self.forward_seconds + self.backward_seconds

    @property
    def metric(self) -> float:
        """What checkpoints are ranked by: top-1 of the averaged weights, which timm prefers to load, if there are."""
        return self.top1 if self.top1_ema is None else self.top1_ema


def check_is_new(folder: Path) -> None:
    """Raises a UsageError unless a folder is empty or not there, but for files that a killed run did not write out."""
    with disk_errors_as(f"output: cannot make a run in {folder}"):
        is_new = not folder.exists() or all(file.name.startswith(_UNFINISHED) for file in folder.iterdir())
    if not is_new:
        raise UsageError(f"output: expected a new or empty folder, but {folder} holds files")


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
        if resume:
            self.path = Path(config.output)
            return
        with disk_errors_as(f"output: cannot make a run in {config.output or 'runs'}"):
            self.path = _new_folder(config) if config.output is None else Path(config.output)
            self.path.mkdir(parents=True, exist_ok=True)
            check_is_new(self.path)
            with written_whole(self.path / CONFIG_FILE) as unfinished:
                save_config(dataclasses.replace(config, **_places(config)), unfinished)

    def update_places(self, config: TrainConfig) -> None:
        """Has the configuration in the folder say where images and teacher are now: others read it, too.

        Raises:
            UsageError: If the configuration can't be read or written.
        """
        path = self.path / CONFIG_FILE
        values = load_config_file(path)
        if values == values | _places(config):
            return
        with disk_errors_as(f"output: cannot write to {self.path}"), written_whole(path) as unfinished:
            save_config(TrainConfig(**values | _places(config)), unfinished)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context in which no other process trains this run; one that is killed leaves it too.

        Raises:
            UsageError: If another process is in it, or the folder can't be written.
        """
        with disk_errors_as(f"output: cannot write to {self.path}"):
            file = (self.path / LOCK_FILE).open("ab")
        with file:
            try:
                # Not flock, which processes that load images for a killed one would still hold.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise UsageError(f"output: {self.path} is being trained by another process") from error
            except OSError:
                pass  # a file system that has no locks
            yield

    @property
    def log(self) -> Path:
        """The log, a CSV file with a row for each epoch."""
        return self.path / LOG_FILE

    @property
    def curves(self) -> Path:
        """Loss, accuracy, learning rate and times over the epochs."""
        return self.path / CURVES_FILE

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.path / LAST_CHECKPOINT

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the epoch with the best top-1."""
        return self.path / BEST_CHECKPOINT

    @property
    def picture(self) -> Path:
        """Mixed images and their token labels."""
        return self.path / "token_labels.png"


def _places(config: TrainConfig) -> dict[str, str]:
    """Where what a run reads is, from wherever it is asked."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    family, _, name = config.data.partition("/")
    places = {"data": config.data if config.folder is None else f"folder:{config.folder.absolute()}"}
    if family in HUGGING_FACE and Path(name).is_dir():
        places["data"] = f"{family}/{absolute(name)}"
    for name in ("data_dir", "teacher_checkpoint", "initial_checkpoint"):
        if (place := getattr(config, name)) is not None:
            places[name] = absolute(place)
    return places


def newest_in(folder: Path) -> str:
    """What to say of a folder that was given in the place of a checkpoint."""
    newest = folder / LAST_CHECKPOINT
    return f"; the newest checkpoint of this run is {newest}" if newest.is_file() else ""


def config_beside(checkpoint: Path) -> Path:
    """Where the configuration of a run lies, one of whose checkpoints this may be: it need not be there."""
    folder = checkpoint.parent
    return (folder.parent if folder.name == CHECKPOINTS_FOLDER else folder) / CONFIG_FILE


def write_log(path: Path, records: Sequence[EpochRecord]) -> None:
    """Writes a log of these rows, in place of one that is there already: all of it or, on an error, nothing."""
    with written_whole(path) as unfinished:
        head = [field.name for field in dataclasses.fields(EpochRecord)]
        write_csv(unfinished, head, map(dataclasses.astuple, records))


def write_csv(path: Path, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table, with all digits of its numbers and nothing for None; names of files in it need not be UTF-8."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives another path to write a file to, which takes the place of `path` at the end or, after an error, goes."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read_log(path: Path) -> list[EpochRecord]:
    """Reads the rows of a log; a last line that was not written to its end is left out.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is not a log.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    fields = {field.name: field for field in dataclasses.fields(EpochRecord)}
    rows = csv.DictReader(lines)
    # Older versions had fewer columns.
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    columns = lines[0].rstrip("\r\n").split(",") if lines else []
    if columns != list(fields)[: len(columns)] or len(columns) < len(required):
        raise ValueError(f"expected the columns {', '.join(fields)} in {path}")
    records, row = [], None
    try:
        for row in rows:
            records.append(EpochRecord(**{name: _value_of(text, fields[name].type) for name, text in row.items()}))
    except (TypeError, ValueError, KeyError, csv.Error) as error:
        raise ValueError(f"expected numbers in {path}, got {row}") from error
    return records


def _value_of(text: str, kind: str) -> float | int | None:
    if not text and "None" in kind:
        return None
    return int(text) if kind == "int" else float(text)


def _new_folder(config: TrainConfig) -> Path:
    """Makes a folder, which no run that starts at the same time takes."""
    # Here, since it takes torch along, which the list of runs does without.
    from timm.models import safe_model_name

    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(config.model)}-{config.method}"
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
