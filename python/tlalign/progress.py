"""How far training is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Without a terminal, a line at most this often.
_LINE_SECONDS = 10.0


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
        self.console = Console() if console is None else console
        self.top1 = ""
        self.start = self.last_line = time.monotonic()
        columns = (TextColumn("{task.fields[epoch]}"), BarColumn(None), TextColumn("{task.fields[status]}"))
        # A bar takes over what is written to the terminal; a quiet console would swallow that.
        self.shows_bar = self.console.is_terminal and not self.console.quiet
        self.bar = Progress(*columns, console=self.console, expand=True, disable=not self.shows_bar)
        self.bar_task = self.bar.add_task("train", total=self.total_steps, completed=step, epoch="", status="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
