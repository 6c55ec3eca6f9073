"""Runs by torchrun in two processes: trains pre-mixed batches under DDP and FSDP2, stops in between and continues."""

import json
import signal
import sys
from pathlib import Path

import torch
from training import FewDigits, PreMixed, became, differences, fit_and_keep_losses, quiet, resume, small

from tlalign import readers
from tlalign.config import UsageError
from tlalign.engine import Trainer, TrainingInterrupted
from tlalign.runs import RunFolder

BATCH_NORM = {"model": "resnet10t", "model_kwargs": {}, "target": "ratio"}
WAYS = {
    "ddp": {},
    "ddp, accumulated": {"accumulate": 2},
    "ddp, batch norm": BATCH_NORM,
    "fsdp": {"fsdp": True},
    "fsdp, accumulated": {"fsdp": True, "accumulate": 2, "grad_checkpointing": True},
    "fsdp, bfloat16": {"fsdp": True, "precision": "bfloat16"},
    "fsdp, batch norm": {**BATCH_NORM, "fsdp": True},
    # Of maps of one pixel oneDNN's gradients of convolutions in bfloat16 can be NaN.
    "fsdp, batch norm in bfloat16": {**BATCH_NORM, "fsdp": True, "precision": "bfloat16", "img_size": 64},
    "ddp, compiled": {"compile": True},
    "fsdp, compiled": {"fsdp": True, "compile": True},
}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    readers.Digits = FewDigits
    for name in names:
        config = small(folder / name, checkpoint_steps=2, epochs=2, **WAYS[name])
        trainer = Trainer(config)
        first = trainer.processes.first
        trainer.train_loader = PreMixed(trainer)
        losses = fit_and_keep_losses(trainer, RunFolder(config) if first else None)
        if first:
            (folder / f"{name}.json").write_text(json.dumps(losses))
        # Of sharded weights too, the checkpoint and what it is continued to are the whole.
        expected = became(trainer)

        config.output = str(folder / f"{name}, stopped")
        stopped = Trainer(config)
        stopped.train_loader = PreMixed(stopped)
        update = stopped._update

        def told_to_stop(trainer=stopped, update=update):
            update()
            # One process alone gets the signal; all must stop after the same step.
            if trainer.step == 3 and not trainer.processes.first:
                signal.raise_signal(signal.SIGTERM)

        stopped._update = told_to_stop
        try:
            stopped.fit(RunFolder(config) if first else None, quiet(stopped))
        except TrainingInterrupted:
            assert stopped.step == 3
        else:
            raise AssertionError("not stopped")
        continued = resume(config)[0]
        assert continued.step == 3
        continued.train_loader = PreMixed(continued)
        continued.fit(RunFolder(config, resume=True) if first else None, quiet(continued))
        if first:
            changed = differences(became(continued), expected)
            assert not changed, f"{name}: continued to other {changed}"
        else:
            became(continued)  # all processes gather what is sharded
    if any("fsdp" in name for name in names):
        refuse_optimizers(folder / "none")
    trainer.processes.leave()
    print(f"rank {trainer.processes.rank} passed", flush=True)


def refuse_optimizers(folder: Path) -> None:
    """Those that can't take a first step or a second one, or not be saved, are refused before there is a run."""
    # PyTorch 2.9 can do what cadopt asks for.
    for name in ("adafactor", "adafactorbv", *(["cadopt"] if torch.__version__ >= "2.10" else [])):
        try:
            Trainer(small(folder, fsdp=True, opt=name))
        except UsageError as error:
            assert f"opt: expected one that works with sharded weights (fsdp), got {name}" in str(error)
        else:
            raise AssertionError(f"{name} is taken")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
