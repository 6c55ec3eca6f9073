"""Kills runs of 30 steps at random moments, continues them, and compares what they became; run by test_resume.py."""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from training import FewDigits, became, differences, quiet, resume, tiny

from tlalign import readers
from tlalign.checkpoints import Checkpoints
from tlalign.runs import RunFolder

VALUES = {"batch_size": 10, "epochs": 3, "warmup_epochs": 1, "checkpoint_steps": 2}
RESTARTS = 10


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    readers.Digits = FewDigits
    draw = random.Random(0)
    process, _ = start(folder / "whole")
    begun = time.monotonic()
    assert os.waitpid(process, 0)[1] == 0
    duration = time.monotonic() - begun
    expected = torch.load(folder / "whole" / "became.pt", weights_only=False)
    assert expected[".step"] == 30

    killed, runs, tolds = 0, 0, 0
    while killed < kills:
        runs += 1
        run = folder / str(runs)
        for restart in range(RESTARTS):
            process, told = start(run)
            if killed < kills and restart < RESTARTS - 1:
                # A process that got nowhere would be killed again and again.
                time.sleep(draw.uniform(0.0, 0.7 * duration))
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            tolds += told()
            if status == 0:
                break
            assert status == signal.SIGKILL, f"run {runs} ended with status {status}"
            killed += 1
        changed = differences(torch.load(run / "became.pt", weights_only=False), expected)
        assert not changed, f"run {runs} became another: {changed}"
    print(f"killed {killed} times in {runs} runs, {tolds} damaged checkpoints")


def start(run: Path):
    """Starts or continues a run in a process of its own; returns its number, and what tells of damaged checkpoints."""
    reports = run.with_suffix(".reports")
    process = os.fork()
    if process == 0:
        status = 1
        with contextlib.suppress(BaseException):
            config = tiny(run, **VALUES)
            if not (run / "config.yaml").exists():
                RunFolder(config)
            trainer, folder = resume(config, lambda message: reports.open("a").write(message + "\n"))
            trainer.fit(folder, quiet(trainer))
            torch.save(became(trainer), run / "became.pt")
            assert Checkpoints(run).last.exists()
            status = 0
        os._exit(status)
    return process, lambda: len(reports.read_text().splitlines()) if reports.exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
