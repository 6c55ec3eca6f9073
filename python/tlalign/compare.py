"""A fair comparison of methods: trains each with several seeds under one budget, and sets the results side by side."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tlalign.config import (
    ALIGNED_TARGETS,
    CONFIG_FILE,
    MAY_CHANGE,
    MAY_MOVE,
    Mixing,
    Target,
    TrainConfig,
    UsageError,
    disk_errors_as,
    suggestion,
)
from tlalign.listing import Run, read_run
from tlalign.progress import ComparisonProgress
from tlalign.runs import RunFolder, write_csv, written_whole
from tlalign.signals import StopSignals

# What is compared unless methods are named: those of tables 2 and 7 of the TL-Align paper that need nothing else.
METHODS = (
    "none", "cutmix", "cutmix+tl-align", "mixup-cutmix", "mixup-cutmix+tl-align", "random", "random+tl-align", "block",
    "block+tl-align", "fmix", "resizemix", "cutmix+transmix",
)  # fmt: skip
# Options that may be a method's own, table 8 of the paper, and what they are in the method of the paper.
_ABLATIONS = {name: getattr(TrainConfig, name) for name in ("layers", "residual", "stochastic_depth")}
# Whose time others are measured by.
BASELINE = "cutmix"

TABLE_FILE = "table.md"
CSV_FILE = "table.csv"
PLOT_FILE = "comparison.png"
# In the folder of a run, what its process printed.
PRINTED_FILE = "printed.txt"

_SECONDS_BETWEEN_LOOKS = 0.1
_HEADINGS = (
    "method", "runs", "top-1 %", "images/s", "time of a step", "without data", "peak memory", "ratio change",
)  # fmt: skip


def plan_runs(config: TrainConfig, methods: Sequence[str], seeds: int, output: Path) -> list[TrainConfig]:
    """Configurations of all methods with all seeds, in the order to train them.

    It goes seed by seed, so that all methods have their share of what else the machine does meanwhile.

    Args:
        config: What is common to them; its options of alignment go to the methods that align layer by layer only, and
            its seed is the first.
        methods: MIXING, MIXING+TARGET, or of those that align layer by layer MIXING+TARGET+OPTION=VALUE..., with the
            options layers (such as 1,3), residual and stochastic_depth.
        seeds: Number of seeds.
        output: Folder of the comparison.

    Returns:
        Configurations, each with its own folder `output`/METHOD-seedN.

    Raises:
        UsageError: If a method is unknown, named twice, or can't be trained with the rest of the configuration.
    """
    for name, value in (("methods", len(methods)), ("seeds", seeds)):
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    of_methods = [_with_method(config, method) for method in methods]
    if len({each.method for each in of_methods}) < len(methods):
        raise UsageError(f"methods: expected each once, got {' '.join(methods)}")
    return [
        dataclasses.replace(each, seed=seed, output=str(output / f"{each.method}-seed{seed}"))
        for seed in range(config.seed, config.seed + seeds)
        for each in of_methods
    ]


def start_training(config: TrainConfig, threads: int) -> subprocess.Popen:
    """Starts or continues a run in a process of its own, which prints to a file in the run's folder.

    Args:
        config: Configuration of the run; a run in its folder must be of the same.
        threads: Threads to compute with on the CPU, unless OMP_NUM_THREADS says how many.

    Raises:
        UsageError: If the folder can't be made, or a process trains this run already.
    """
    folder = RunFolder(config, resume=(Path(config.output) / CONFIG_FILE).is_file()).path
    changing = {name: getattr(config, name) for name in (*MAY_CHANGE, *MAY_MOVE) if name != "output"}
    flags = [f"--{name}={'null' if value is None else value}" for name, value in changing.items()]
    with disk_errors_as(f"output: cannot write to {folder}"):
        printed = (folder / PRINTED_FILE).open("ab")
    with printed:
        try:
            # The process holds it as long as it lives, even when this one is killed.
            fcntl.flock(printed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"output: {folder} is being trained by another process") from error
        return subprocess.Popen(
            [sys.executable, "-m", "tlalign", "train", "--resume", str(folder), *flags],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            # Ctrl-C is for this process, which then asks the others to stop.
            start_new_session=True,
        )


@dataclasses.dataclass
class MethodResult:
    """What the finished runs of a method gave; None where there is nothing to tell.

    Attributes:
        method: Its name.
        planned: Number of runs.
        finished: Number of finished ones.
        failed: Number of runs that ended with an error.
        top1: Top-1 (per cent) of each after its last epoch; of the averaged weights (EMA) where there are any.
        top1_mean: Mean of these.
        top1_std: Sample standard deviation of these.
        images_per_second: Rate of training; this and all times are of the fastest epoch of all runs, since what else
            the machine does only slows them.
        step_seconds: Time of a step.
        compute_seconds: Time of a step without the wait for images.
        relative_step: step_seconds relative to those of CutMix.
        relative_compute: compute_seconds relative to those of CutMix.
        peak_memory: Bytes that were in use at most, in any run.
        ratio_change: Mean over runs of |aligned - original| mixing ratio in the last epoch.
        errors: Last lines of what the failed runs printed.
    """

    method: str
    planned: int
    finished: int
    failed: int
    top1: list[float]
    top1_mean: float | None = None
    top1_std: float | None = None
    images_per_second: float | None = None
    step_seconds: float | None = None
    compute_seconds: float | None = None
    relative_step: float | None = None
    relative_compute: float | None = None
    peak_memory: int | None = None
    ratio_change: float | None = None
    errors: list[str] = dataclasses.field(default_factory=list)


class Comparison:
    """Runs that differ in method and seed only, and what is known of them.

    Args:
        configs: Their configurations, in the order to train them; each names its folder.
        output: Folder of table and plot.

    Attributes:
        errors: Why runs failed, by their folders.
    """

    def __init__(self, configs: Sequence[TrainConfig], output: Path) -> None:
        self.configs = list(configs)
        self.output = output
        self.errors: dict[str, str] = {}
        self._runs = {config.output: _read(config) for config in configs}

    def train(self, jobs: int, progress: ComparisonProgress) -> int | None:
        """Trains what is not finished, and keeps the table up to date.

        Args:
            jobs: Runs at a time, which share the processor cores.
            progress: Is told of each run.

        Returns:
            None; after SIGINT or SIGTERM its number, when each run that was going on has written a checkpoint.
        """
        threads = max(1, _cores() // jobs)
        waiting = deque(config for config in self.configs if not self._is_finished(config))
        running: dict[str, tuple[TrainConfig, subprocess.Popen, float]] = {}
        progress.start(len(self.configs), len(self.configs) - len(waiting))
        with StopSignals() as signals:
            try:
                while (waiting or running) and signals.number is None:
                    while waiting and len(running) < jobs:
                        config = waiting.popleft()
                        running[config.output] = config, start_training(config, threads), time.monotonic()
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    for config, process, since in list(running.values()):
                        status = process.poll()
                        if status is not None:
                            del running[config.output]
                            progress.run_done(self._take(config, status), time.monotonic() - since)
                            self.save_table()
            finally:
                for _, process, _ in running.values():
                    process.terminate()
                for _, process, _ in running.values():
                    process.wait()
        return signals.number

    def results(self) -> list[MethodResult]:
        """What each method gave, in the order of the configurations."""
        results = [self._result(method) for method in dict.fromkeys(config.method for config in self.configs)]
        baseline = next((result for result in results if result.method == BASELINE and result.finished), None)
        for result in results:
            if baseline is not None and result.finished:
                result.relative_step = result.step_seconds / baseline.step_seconds
                result.relative_compute = result.compute_seconds / baseline.compute_seconds
        return results

    def table(self) -> str:
        """The results in Markdown."""
        config, results = self.configs[0], self.results()
        seeds = sorted({config.seed for config in self.configs})
        averaged = "the averaged weights (EMA)" if config.ema_decay is not None else "the model"
        lines = [
            f"{config.model} on {config.data}, {config.epochs} epochs of batches of {config.batch_size}, seeds "
            f"{seeds[0]} to {seeds[-1]}. Top-1 is that of {averaged} on the held-out images after the last epoch: mean "
            "and sample standard deviation over the seeds. Rate and times are those of the fastest epoch of all seeds, "
            "since what else the machine does only slows them; times are a step's, relative to CutMix. Memory is the "
            "most that was in use, on the CPU by the process.",
            "",
            *_markdown(_HEADINGS, [_cells(result) for result in results]),
        ]
        failed = [config for config in self.configs if config.output in self.errors]
        if failed:
            lines += ["", *(f"- {_name(config)} failed: {self.errors[config.output]}" for config in failed)]
        return "\n".join(lines) + "\n"

    def save_table(self) -> None:
        """Writes the results as Markdown and, with all digits, as CSV.

        Raises:
            UsageError: If they can't be written.
        """
        rows = [
            dataclasses.asdict(result) | {"top1": " ".join(map(str, result.top1)), "errors": "; ".join(result.errors)}
            for result in self.results()
        ]
        with disk_errors_as(f"output: cannot write the table to {self.output}"):
            with written_whole(self.output / TABLE_FILE) as unfinished:
                unfinished.write_text(self.table(), encoding="utf-8", errors="replace")
            with written_whole(self.output / CSV_FILE) as unfinished:
                write_csv(unfinished, rows[0].keys(), (row.values() for row in rows))

    def save_plot(self) -> bool:
        """Draws the results.

        Returns:
            Whether there are any yet.

        Raises:
            UsageError: If they can't be written.
        """
        # Here, since it takes as long as the rest.
        from tlalign.curves import draw_methods

        results = {result.method: result for result in self.results() if result.finished}
        top1 = {name: result.top1 for name, result in results.items()}
        times = {name: result.relative_compute for name, result in results.items()}
        with disk_errors_as(f"output: cannot write the plot to {self.output}"):
            if not results:  # the plot of other methods would be taken for theirs
                (self.output / PLOT_FILE).unlink(missing_ok=True)
                return False
            draw_methods(top1, times, self.output / PLOT_FILE)
        return True

    def _is_finished(self, config: TrainConfig) -> bool:
        return self._runs[config.output].state == "finished"

    def _take(self, config: TrainConfig, status: int) -> str:
        """Reads the run of a process that ended; returns what to say of it."""
        run = self._runs[config.output] = _read(config)
        if status == 0 and self._is_finished(config):
            return f"{_name(config)}  top-1 {run.records[-1].metric:.2f} %"
        self.errors[config.output] = _reason(Path(config.output), status)
        return f"{_name(config)}  failed: {self.errors[config.output]}"

    def _result(self, method: str) -> MethodResult:
        configs = [config for config in self.configs if config.method == method]
        errors = [self.errors[config.output] for config in configs if config.output in self.errors]
        finished = [self._runs[config.output].records for config in configs if self._is_finished(config)]
        top1 = [records[-1].metric for records in finished]
        result = MethodResult(method, len(configs), len(finished), len(errors), top1, errors=errors)
        if not finished:
            return result
        changes = [records[-1].ratio_change for records in finished if records[-1].ratio_change is not None]
        epochs = [record for records in finished for record in records]
        return dataclasses.replace(
            result,
            top1_mean=statistics.mean(top1),
            top1_std=statistics.stdev(top1) if len(top1) > 1 else None,
            images_per_second=max(each.images_per_second for each in epochs),
            step_seconds=min(each.step_seconds for each in epochs),
            compute_seconds=min(each.forward_seconds + each.backward_seconds for each in epochs),
            peak_memory=max(each.peak_memory for each in epochs),
            ratio_change=statistics.mean(changes) if changes else None,
        )


def _with_method(config: TrainConfig, name: str) -> TrainConfig:
    mixing, *words = name.split("+")
    assigned = [word.split("=", 1) for word in words if "=" in word]
    options = dict(assigned)
    if len(options) < len(assigned):
        raise UsageError(f"methods: expected each option once in {name}")
    # Of more than one the words together are no target.
    target = "+".join(word for word in words if "=" not in word) or "ratio"
    choices = [
        (mixing, get_args(Mixing)),
        (target, get_args(Target)),
        *((option, tuple(_ABLATIONS)) for option in options),
    ]
    for word, expected in choices:
        if word not in expected:
            near = suggestion(word, expected)
            raise UsageError(f"methods: expected one of {', '.join(expected)} in {name}, got {word}{near}")
    values: dict[str, Any] = {"mixing": mixing, "target": target}
    if target not in ALIGNED_TARGETS:
        values |= _ABLATIONS
    values |= {option: _ablation(name, option, text) for option, text in options.items()}
    try:
        config = dataclasses.replace(config, **values)
    except UsageError as error:
        raise UsageError(f"methods: {name}: {error}") from error
    plain = dataclasses.replace(config, **_ABLATIONS).method
    given = "+".join(word for word in (mixing, *words) if "=" not in word)
    if plain != given:
        raise UsageError(f"methods: expected {plain}, got {given}, which is the same")
    return config


def _ablation(method: str, option: str, text: str) -> tuple[int, ...] | bool:
    """The value of an option in the name of a method."""
    is_list = option == "layers"
    pattern, expected = (r"-?\d+(,-?\d+)*", "blocks such as 1,3") if is_list else ("true|false", "true or false")
    if not re.fullmatch(pattern, text):
        raise UsageError(f"methods: expected {expected} for {option} in {method}, got {text!r}")
    return tuple(map(int, text.split(","))) if is_list else text == "true"


def _name(config: TrainConfig) -> str:
    return f"{config.method} seed {config.seed}"


def _read(config: TrainConfig) -> Run:
    return read_run(Path(config.output), _name(config))


def _cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reason(folder: Path, status: int) -> str:
    """Why a process that trained a run ended with this status: the last line that it printed, or the signal."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = (folder / PRINTED_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")
    return last.removeprefix("tlalign: ").removeprefix("error: ")


def _cells(result: MethodResult) -> list[str]:
    """What the table shows of a method."""
    top1 = _text(result.top1_mean, ".2f") + ("" if result.top1_std is None else f" ± {result.top1_std:.2f}")
    runs = f"{result.finished} of {result.planned}" + (f", {result.failed} failed" if result.failed else "")
    memory = None if result.peak_memory is None else result.peak_memory / 2**20
    return [
        result.method,
        runs,
        top1,
        _text(result.images_per_second, ".0f"),
        _text(result.relative_step, ".2f"),
        _text(result.relative_compute, ".2f"),
        _text(memory, ".0f", " MiB"),
        _text(result.ratio_change, ".4f"),
    ]


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table that reads well as it is: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (headings, rule, *rows):
        cells = first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
