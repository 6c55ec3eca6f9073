"""What a run writes about its progress: a CSV file, curves, and scalars and histograms for TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import histogram, scalar

from tlalign.curves import draw_curves
from tlalign.runs import CURVES_FILE, LOG_FILE, TENSORBOARD_FOLDER, EpochRecord, read_log, write_log

# Curves take about a second to draw: with short epochs, not after each one.
_SECONDS_BETWEEN_CURVES = 60.0
# Differences of two mixing ratios, in cells that are the same in all epochs.
_RATIO_CHANGE_BINS = np.linspace(-1.0, 1.0, 101)


class RunLog:
    """The log of a run folder, open for writing; one process of a run has it.

    A run that goes on from a checkpoint writes the rows up to there anew; what was logged after it disappears from the
    table and from TensorBoard. Of an epoch that was stopped between its checkpoint and its row, TensorBoard may show
    numbers twice and lack the histogram.

    Args:
        path: Folder of the run.
        records: Epochs done before.
        step: Steps done before.

    Raises:
        OSError: If the files can't be written; as in all methods.
    """

    def __init__(self, path: Path, records: Sequence[EpochRecord] = (), step: int = 0) -> None:
        self.path = path
        self.records = list(records)
        self.last_drawing = time.monotonic()
        # What a run that was killed has drawn may lack its last epochs.
        self.drawn_epochs = 0
        self.events = _EventFile(path / TENSORBOARD_FOLDER, step)
        # Likewise what it has logged, which comes after the checkpoint of an epoch.
        for record in self.records[_count_rows(path / LOG_FILE) :]:
            self._show_epoch(record)
        write_log(path / LOG_FILE, self.records)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a step for TensorBoard, under `train/`.

        Args:
            step: Steps done since the start of the run.
            values: Numbers by their names, such as loss and lr.
        """
        for name, value in values.items():
            self.events.add(step, scalar(f"train/{name}", value))
        self.events.flush()

    def epoch(self, record: EpochRecord, ratio_changes: np.ndarray | None) -> None:
        """Logs an epoch.

        Args:
            record: Its row.
            ratio_changes: Aligned minus original mixing ratio of each image, any shape, or None.
        """
        self.records.append(record)
        # Before the row, without which a run that continues shows the epoch again.
        self._show_epoch(record, ratio_changes)
        with (self.path / LOG_FILE).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(dataclasses.astuple(record))
            file.flush()
            os.fsync(file.fileno())
        if self.drawn_epochs == 0 or time.monotonic() - self.last_drawing >= _SECONDS_BETWEEN_CURVES:
            self._draw()

    def close(self) -> None:
        """Draws the curves up to the last epoch and closes the files."""
        try:
            if self.drawn_epochs < len(self.records):
                self._draw()
        finally:
            self.events.close()

    def _show_epoch(self, record: EpochRecord, ratio_changes: np.ndarray | None = None) -> None:
        for name, value in dataclasses.asdict(record).items():
            if name != "step" and value is not None:
                self.events.add(record.step, scalar(f"epoch/{name}", value))
        if ratio_changes is not None and np.size(ratio_changes):
            self.events.add(record.step, histogram("aligned minus original ratio", ratio_changes, _RATIO_CHANGE_BINS))
        self.events.flush()

    def _draw(self) -> None:
        draw_curves(self.records, self.path / CURVES_FILE)
        self.drawn_epochs = len(self.records)
        self.last_drawing = time.monotonic()


def _count_rows(path: Path) -> int:
    try:
        return len(read_log(path))
    except (OSError, ValueError):
        return 0


class _EventFile:
    """A file of TensorBoard's.

    SummaryWriter writes the same in a thread, where an error ends in a printed traceback, and is raised only at a later
    call, if at all.

    Args:
        folder: Folder to write it to.
        step: Last step that is to stay of what other files in the folder hold.
    """

    def __init__(self, folder: Path, step: int) -> None:
        resumed = folder.exists()
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("xb")
        self.writer = RecordWriter(self.file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumed:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self.flush()

    def add(self, step: int, summary: object) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    def _write(self, event: Event) -> None:
        self.writer.write(event.SerializeToString())
