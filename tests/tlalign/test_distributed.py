"""Several processes train what one would, and one that is killed costs nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import PYTHONPATH, FewDigits, PreMixed, fit_and_keep_losses, options, small

from tlalign.cli import main
from tlalign.config import EvalConfig, field_names, load_config_file
from tlalign.engine import Trainer
from tlalign.evaluation import evaluate_checkpoint
from tlalign.runs import RunFolder, read_log

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    monkeypatch.setattr("tlalign.readers.Digits", FewDigits)


def torchrun(*arguments: object, restarts: int = 0) -> str:
    """Runs a script in two processes; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}", *map(str, arguments)]
    environment = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    # Without it processes that start again can meet in the store of those before, and wait for ever.
    environment = os.environ | environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "ways",
    [
        ["ddp", "fsdp, accumulated", "ddp, batch norm"],
        pytest.param(["ddp, accumulated", "fsdp"], marks=pytest.mark.slow),
        pytest.param(["ddp, compiled", "fsdp, compiled", "fsdp, bfloat16"], marks=pytest.mark.slow),
        pytest.param(["fsdp, batch norm", "fsdp, batch norm in bfloat16"], marks=pytest.mark.slow),
    ],
    ids=["plain", "the other way round", "compiled and bfloat16", "sharded batch norms"],
)
def test_two_processes_learn_what_one_does_and_continue_when_stopped(tmp_path, ways):
    printed = torchrun(SUPPORT / "distributed_training.py", tmp_path, *ways)
    for rank in (0, 1):
        assert f"rank {rank} passed" in printed
    trainer = Trainer(small(tmp_path / "one", epochs=2))
    trainer.train_loader = PreMixed(trainer)
    expected = fit_and_keep_losses(trainer, RunFolder(trainer.config))
    assert min(expected) != max(expected)
    for file in (tmp_path / f"{way}.json" for way in ways):
        if "batch norm" in file.stem:
            # Statistics are each process's own; those that are evaluated are those of the checkpoint.
            *_, record = read_log(tmp_path / file.stem / "log.csv")
            values = load_config_file(tmp_path / file.stem / "config.yaml")
            values = {name: value for name, value in values.items() if name in field_names(EvalConfig)}
            kept = evaluate_checkpoint(tmp_path / file.stem / "last.pth.tar", EvalConfig(**values))
            rounding = 0.01 if "bfloat16" in file.stem else 1e-5
            if "bfloat16" not in file.stem:
                assert (kept["model"]["top1"], kept["EMA"]["top1"]) == (record.top1, record.top1_ema)
            assert kept["model"]["loss"] == pytest.approx(record.eval_loss, rel=rounding)
            continue
        if "bfloat16" in file.stem:
            assert json.loads(file.read_text()) == pytest.approx(expected, rel=0.02)
            continue
        assert json.loads(file.read_text()) == pytest.approx(expected, rel=1e-5), file.stem
        # Adam makes much of small differences in small gradients (a key's bias has nothing but rounding): here 10 steps
        # of about 1e-3 each.
        tolerance = {"rtol": 1e-4, "atol": 1e-4 if "compiled" in file.stem else 1e-5}
        checkpoint = torch.load(tmp_path / file.stem / "last.pth.tar", weights_only=False)
        for key, of in (("state_dict", trainer.model), ("state_dict_ema", trainer.task.trainable_module_ema.module)):
            torch.testing.assert_close(checkpoint[key], of.state_dict(), **tolerance, msg=file.stem)
        # Held out are 21 images, of which each process has 11: one is evaluated twice, and counted once.
        for record, one in zip(read_log(tmp_path / file.stem / "log.csv"), trainer.records, strict=True):
            assert (record.top1, record.top1_ema) == (one.top1, one.top1_ema)
            assert record.eval_loss == pytest.approx(one.eval_loss, rel=1e-5)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_changes_nothing(tmp_path):
    arguments = [*options(tmp_path, checkpoint_steps=3, epochs=2), "--resume=auto"]
    printed = torchrun(
        SUPPORT / "mortal.py", 4, tmp_path / "whole", tmp_path / "killed", "train", *arguments, restarts=2
    )
    assert "continued after step 3" in printed
    assert "continued after step 10" in printed  # the whole one, which had come to its end
    whole, killed = (torch.load(tmp_path / name / "last.pth.tar", weights_only=False) for name in ("whole", "killed"))
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(value, killed[key][name]) for name, value in whole[key].items())
    assert [record.epoch for record in read_log(tmp_path / "killed" / "log.csv")] == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["--fsdp=true"], "fsdp: expected several processes (torchrun"),
        (["--accumulate=3"], "batch_size: expected a multiple of 3"),
    ],
)
def test_what_one_process_cannot_do_is_said(tmp_path, capsys, values, message):
    assert main(["train", *options(tmp_path / "run"), *values]) == 2
    assert message in capsys.readouterr().err
