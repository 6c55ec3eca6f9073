"""Signals that ask a process to stop, noted so that it can do so in its own time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """Context in which the first SIGINT or SIGTERM is noted, so that a step can end; a second acts as it would.

    One that the process ignores (of a shell's background, or by `trap`) it goes on to ignore.

    Attributes:
        number: The signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self.before[number])
