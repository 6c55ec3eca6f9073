"""How far training is: a bar on a terminal that can draw one, else a line now and then."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Without a terminal, a line at most this often.
_LINE_SECONDS = 10.0


class OutputConsole(Console):
    """Standard output, or nothing where its reader has gone away (`| head`), which is no reason to stop."""

    def on_broken_pipe(self) -> None:
        """Shows nothing from here on; rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class TrainingProgress:
    """Context manager that shows epoch, rate, loss, top-1 and the time left.

    Args:
        epochs: Epochs of the run.
        steps_per_epoch: Steps of an epoch.
        console: Where to write to; standard output by default. Console(quiet=True) shows nothing.
        step: Steps done before, by the run that this one resumes.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, console: Console | None = None, step: int = 0) -> None:
        self.epochs = epochs
        self.total_steps = epochs * steps_per_epoch
        self.first_step = step
        self.console = OutputConsole() if console is None else console
        self.top1 = ""
        self.start = self.last_line = time.monotonic()
        columns = (TextColumn("{task.fields[epoch]}"), BarColumn(None), TextColumn("{task.fields[status]}"))
        # A bar takes over what is written to the terminal; a quiet console would swallow that.
        self.shows_bar = _can_draw(self.console) and not self.console.quiet
        self.bar = Progress(*columns, console=self.console, expand=True, disable=not self.shows_bar)
        self.bar_task = self.bar.add_task("train", total=self.total_steps, completed=step, epoch="", status="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step_done(self, epoch: int, step: int, loss: float, images_per_second: float) -> None:
        """Shows the state after a step.

        Args:
            epoch: Current epoch, from 1.
            step: Steps done since the start of the run.
            loss: Mean loss of the epoch so far.
            images_per_second: Rate of the epoch so far.
        """
        now = time.monotonic()
        seconds_per_step = (now - self.start) / (step - self.first_step)
        left = timedelta(seconds=round(seconds_per_step * (self.total_steps - step)))
        epoch_text = f"epoch {epoch}/{self.epochs}"
        status = f"{images_per_second:.0f} images/s  loss {loss:.3f}  {self.top1}{left} left"
        if self.shows_bar:
            self.bar.update(self.bar_task, completed=step, epoch=epoch_text, status=status)
        elif now - self.last_line >= _LINE_SECONDS or step == self.total_steps:
            self.last_line = now
            self.console.print(
                f"{epoch_text}  step {step}/{self.total_steps}  {status}", highlight=False, soft_wrap=True
            )

    def epoch_done(self, top1: float) -> None:
        """Takes note of the top-1 (per cent) after an epoch."""
        self.top1 = f"top-1 {top1:.1f} %  "


class ComparisonProgress:
    """Context manager that shows a line for each run that ends, and on a terminal a bar.

    Args:
        console: Where to write to; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = OutputConsole() if console is None else console
        columns = TextColumn("run {task.completed} of {task.total}"), BarColumn(None), TextColumn("{task.fields[left]}")
        self.bar = Progress(*columns, console=self.console, expand=True, disable=not _can_draw(self.console))

    def __enter__(self) -> ComparisonProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, total: int, done: int) -> None:
        """Begins to count.

        Args:
            total: Number of runs.
            done: Number of those that were finished before.
        """
        self.total, self.done, self.done_before, self.since = total, done, done, time.monotonic()
        self.bar_task = self.bar.add_task("runs", total=total, completed=done, left="")
        self.bar.start()

    def run_done(self, what: str, seconds: float) -> None:
        """Shows that a run ended.

        Args:
            what: Which, and how it went.
            seconds: Time that it took.
        """
        self.done += 1
        each = (time.monotonic() - self.since) / (self.done - self.done_before)
        left = f"{timedelta(seconds=round(each * (self.total - self.done)))} left"
        self.bar.update(self.bar_task, completed=self.done, left=left)
        line = f"{self.done}/{self.total}  {what}  in {timedelta(seconds=round(seconds))}, {left}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _can_draw(console: Console) -> bool:
    """Whether a bar can be drawn anew; on a dumb terminal rich shows it at the end only."""
    return console.is_terminal and not console.is_dumb_terminal
