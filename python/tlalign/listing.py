"""The list of runs: reads run folders, and shows what they are and how they went side by side."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tlalign.config import (
    CONFIG_FILE,
    TrainConfig,
    UsageError,
    disk_errors_as,
    field_names,
    load_config_file,
    suggestion,
    type_checker,
)
from tlalign.runs import LOG_FILE, EpochRecord, read_log, write_csv

# Headings of the columns that each list has, by their keys; configuration values that differ follow.
_COLUMNS = {
    "name": "run",
    "model": "model",
    "method": "method",
    "data": "data",
    "epochs": "epochs",
    "planned_epochs": "of",
    "best": "best\ntop-1 %",
    "last": "last\ntop-1 %",
    "ratio_change": "ratio\nchange",
    "images_per_second": "images\na second",
    "step_seconds": "seconds\na step",
    "state": "state",
}
_FORMATS = {
    "epochs": "d",
    "planned_epochs": "d",
    "best": ".2f",
    "last": ".2f",
    "ratio_change": ".4f",
    "images_per_second": ".0f",
    "step_seconds": ".4f",
}
# Columns that a narrow terminal goes without, the last one first, before values that differ.
_EXPENDABLE = ("ratio_change", "images_per_second", "step_seconds")
# Characters to which a column of texts is folded before others are left out.
_FOLDED_WIDTH = 12
# Shown in columns of their own, or no part of what a run is.
_NOT_COMPARED = {"model", "mixing", "target", "data", "epochs", "output"}


@dataclass
class Run:
    """What is found in the folder of a run.

    Attributes:
        path: The folder.
        name: Its path, below the folder that was searched if no other run is called so.
        values: What its configuration file sets.
        config: Configuration, or None if it can't be read.
        records: Rows of the log.
        problem: Why something can't be read, or nothing.
    """

    path: Path
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    config: TrainConfig | None = None
    records: list[EpochRecord] = field(default_factory=list)
    problem: str = ""

    @property
    def state(self) -> str:
        """How far the run is."""
        if self.problem:
            return f"unreadable: {self.problem}"
        if not self.records:
            return "no epoch yet"
        epoch = self.records[-1].epoch
        return "finished" if epoch >= self.config.epochs else f"unfinished, at epoch {epoch}"

    def columns(self) -> dict[str, Any]:
        """Values of the columns that each list has; None where there is none."""
        row = dict.fromkeys(_COLUMNS) | {"name": self.name, "state": self.state}
        if self.config is not None:
            row |= {"model": self.config.model, "method": self.config.method, "data": self.config.data}
            row |= {"epochs": len(self.records), "planned_epochs": self.config.epochs}
        if self.records:
            row["best"] = max(record.metric for record in self.records)
            row["last"] = self.records[-1].metric
            row["ratio_change"] = self.records[-1].ratio_change
            # Medians: the first epoch warms up.
            row["images_per_second"] = statistics.median(record.images_per_second for record in self.records)
            row["step_seconds"] = statistics.median(record.step_seconds for record in self.records)
        return row


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Finds and reads the runs in folders and the folders in them; a run that can't be read says so.

    Args:
        paths: Folders of runs, or folders that hold such.

    Raises:
        UsageError: If one is not a folder.
    """
    found = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"expected a folder of runs, got {path}, which is none")
        for name in (CONFIG_FILE, LOG_FILE):
            for file in path.rglob(name):
                below = file.parent.relative_to(path)
                found.setdefault(file.parent.resolve(), (file.parent, str(below) if below.name else str(path)))
    # Runs of one name in several folders are told apart by where they are.
    unique = len({name for _, name in found.values()}) == len(found)
    return [read_run(path, name if unique else str(path)) for path, name in sorted(found.values())]


class RunTable:
    """Runs side by side, with the configuration values in which they differ.

    Args:
        runs: The runs.
        sort: Key of the column to sort by: names rise, numbers fall, runs without one come last.

    Attributes:
        columns: Headings by their keys.
        rows: The values of each run by the same keys.
        runs: The runs, in the order of the rows.

    Raises:
        UsageError: If there is no such column.
    """

    def __init__(self, runs: Sequence[Run], sort: str = "name") -> None:
        differing = _differing_fields(runs)
        self.columns = _COLUMNS | {name: name for name in differing}
        if sort not in self.columns:
            near = suggestion(sort, self.columns)
            raise UsageError(f"sort: expected one of {', '.join(self.columns)}, got {sort}{near}")
        rows = [(run, run.columns() | {name: run.values.get(name) for name in differing}) for run in runs]
        rows.sort(key=lambda row: _sort_key(row[1][sort]))
        self.runs = [run for run, _ in rows]
        self.rows = [row for _, row in rows]

    def print(self, console: Console) -> None:
        """Prints the table, without columns that are empty and those that a narrow terminal has no room for."""
        shown = [key for key in self.columns if any(row[key] is not None for row in self.rows)]
        # Measures are at most the width that they are asked for.
        any_width = console.options.update_width(10_000)
        expendable = [key for key in shown if key not in _COLUMNS] + [key for key in _EXPENDABLE if key in shown]
        left_out = []
        while (
            expendable and console.measure(self._table(shown, _FOLDED_WIDTH), options=any_width).minimum > console.width
        ):
            left_out.insert(0, expendable.pop())
            shown.remove(left_out[0])
        console.print(self._table(shown))
        if left_out:
            console.print(f"no room for {', '.join(left_out)}: --csv FILE has all", highlight=False)

    def _table(self, shown: Sequence[str], text_width: int | None = None) -> Table:
        """The table of some columns, those of texts at most so wide."""
        table = Table(box=SIMPLE_HEAD, padding=0)
        for key in shown:
            if key in _FORMATS:
                table.add_column(self.columns[key], justify="right", no_wrap=True)
            else:
                table.add_column(self.columns[key], overflow="fold", max_width=text_width)
        for row in self.rows:
            table.add_row(*(Text(_text(key, row[key])) for key in shown))
        return table

    def save(self, path: Path) -> None:
        """Writes the table as a CSV file with all digits.

        Raises:
            UsageError: If it can't be written.
        """
        with disk_errors_as(f"csv: cannot write {path}"):
            write_csv(path, self.columns, ([row[key] for key in self.columns] for row in self.rows))

    def plot(self, path: Path) -> None:
        """Draws the curves of the runs over each other.

        Raises:
            UsageError: If there are none, or they can't be written, or the file is to be no PNG.
        """
        # Here, since it takes as long as the rest.
        from tlalign.curves import draw_comparison

        if path.suffix != ".png":
            raise UsageError(f"plot: expected a file NAME.png, got {path}")
        curves = {run.name: run.records for run in self.runs if run.records}
        if not curves:
            raise UsageError("plot: expected a run with an epoch, got none")
        with disk_errors_as(f"plot: cannot write {path}"):
            draw_comparison(curves, path)


def read_run(path: Path, name: str) -> Run:
    """Reads the folder of a run, of which some or all may be missing; what can't be read is its problem.

    Args:
        path: The folder.
        name: What to call it.
    """
    run = Run(path, name)

    def reason(error: Exception) -> str:
        """The message, without the folder, which the list says in another column."""
        return str(error).replace(f"{path}{os.sep}", "")

    try:
        run.values = load_config_file(path / CONFIG_FILE)
        run.config = TrainConfig(**vars(type_checker(TrainConfig).parse_object(run.values)))
    except argparse.ArgumentError as error:
        run.problem = f"{CONFIG_FILE} is of no run: {' '.join(str(error).split())}"
    except (UsageError, TypeError) as error:
        is_there = (path / CONFIG_FILE).exists()
        run.problem = f"{CONFIG_FILE} is of no run: {reason(error)}" if is_there else f"no {CONFIG_FILE}"
    try:
        run.records = read_log(path / LOG_FILE)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.problem = run.problem or reason(error)
    return run


def _differing_fields(runs: Sequence[Run]) -> list[str]:
    """Names of the configuration fields of which runs have different values, but for those shown anyway."""
    names = [name for name in field_names(TrainConfig) if name not in _NOT_COMPARED]
    return [name for name in names if len({repr(run.values[name]) for run in runs if name in run.values}) > 1]


def _sort_key(value: Any) -> tuple[int, float, str]:
    if value is None:
        return (2, 0.0, "")
    if isinstance(value, (int, float)):
        return (0, -value, "")
    return (1, 0.0, str(value))


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    return format(value, _FORMATS[key]) if key in _FORMATS else str(value)
