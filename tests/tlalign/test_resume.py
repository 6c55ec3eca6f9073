"""Nothing is lost: a run that was stopped anywhere continues to the bits that it would have had."""

import contextlib
import dataclasses
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import PYTHONPATH, FewDigits, became, differences, fit, options, quiet, resume, small

from tlalign import checkpoints
from tlalign.checkpoints import CheckpointError, Checkpoints
from tlalign.cli import _has_moved, _kept, main
from tlalign.config import CONFIG_FILE, UsageError
from tlalign.engine import NonFiniteLossError, Trainer, TrainingInterrupted
from tlalign.listing import read_run
from tlalign.log import RunLog
from tlalign.runs import RunFolder, read_log, write_log

# Everything that a step draws from or keeps: dropout and dropped paths, momentum, averages, a schedule, erasing.
RANDOM = {
    "model_kwargs": {
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "proj_drop_rate": 0.1,
        "drop_path_rate": 0.2,
    },
    "epochs": 2,
    "warmup_epochs": 1,
    "random_erasing": 0.5,
    "checkpoint_steps": 2,
}


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    monkeypatch.setattr("tlalign.readers.Digits", FewDigits)


def stop_after(trainer: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    """Has the process get a signal in a step."""
    update = trainer._update

    def interrupted():
        update()
        if trainer.step == step:
            signal.raise_signal(number)

    trainer._update = interrupted


@pytest.fixture
def heeds_sigint():
    """A process in a shell's background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"precision": "float16", "accumulate": 2},
        {"opt": "sgd", "sched": "step", "ema_decay": None, "target": "ratio", "mixing": "mixup-cutmix"},
    ],
    ids=["adamw", "scaler and accumulation", "sgd without average"],
)
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(tmp_path, values):
    whole, _, _ = fit(small(tmp_path / "whole", **RANDOM | values))
    expected = became(whole)
    assert expected[".step"] == 10
    config = small(tmp_path / "stopped", **RANDOM | values)
    RunFolder(config)
    for step in range(1, 10):
        trainer, folder = resume(config)
        assert trainer.step == step - 1
        stop_after(trainer, step)
        with pytest.raises(TrainingInterrupted, match="SIGTERM"):
            trainer.fit(folder, quiet(trainer))
    trainer, folder = resume(config)
    assert len(trainer.fit(folder, quiet(trainer))) == 2
    assert differences(became(trainer), expected) == []


@pytest.mark.parametrize("step", [3, 5])
def test_progress_that_cannot_be_shown_costs_no_step_that_is_to_be_kept(tmp_path, step):
    config = small(tmp_path / "run", checkpoint_steps=3)
    trainer, folder = Trainer(config), RunFolder(config)
    progress = quiet(trainer)

    def show(epoch, done, *rest):
        if done == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    progress.step_done = show
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(folder, progress)
    assert resume(config)[0].step == step


def test_an_evaluation_that_failed_is_done_again_and_no_step(tmp_path):
    config = small(tmp_path / "run", epochs=3)
    trainer, _, _ = fit(dataclasses.replace(config, output=str(tmp_path / "whole")))
    stopped, folder = Trainer(config), RunFolder(config)
    evaluate = stopped.evaluate

    def fail(*arguments, **options):
        if len(stopped.records) == 2:
            raise OSError("cannot read an image")
        return evaluate(*arguments, **options)

    stopped.evaluate = fail
    with pytest.raises(OSError, match="cannot read an image"):
        stopped.fit(folder, quiet(stopped))
    continued, _ = resume(config)
    assert (continued.step, len(continued.records)) == (continued.total_steps, 2)
    continued.fit(folder, quiet(continued))
    assert differences(became(continued), became(trainer)) == []
    rows = folder.log.read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]


@pytest.mark.usefixtures("heeds_sigint")
@pytest.mark.parametrize("batch", [1, 2, 4], ids=["first batch", "second batch", "of the average"])
def test_an_evaluation_stops_after_a_batch_and_is_done_again(tmp_path, batch):
    config = small(tmp_path / "run", epochs=1)
    whole, _, _ = fit(dataclasses.replace(config, output=str(tmp_path / "whole")))
    stopped, folder = Trainer(config), RunFolder(config)
    batches = []

    def interrupt(module, inputs):
        if not module.training:
            batches.append(inputs)
            if len(batches) == batch:
                signal.raise_signal(signal.SIGINT)

    for model in (stopped.model, stopped.task.get_eval_model(ema=True)):
        model.register_forward_pre_hook(interrupt)
    with pytest.raises(TrainingInterrupted, match="SIGINT"):
        stopped.fit(folder, quiet(stopped))
    assert len(batches) == batch
    continued, _ = resume(config)
    assert (continued.step, len(continued.records)) == (continued.total_steps, 0)
    continued.fit(folder, quiet(continued))
    assert differences(became(continued), became(whole)) == []


@pytest.mark.usefixtures("heeds_sigint")
def test_a_run_that_is_told_to_stop_when_it_has_ended_is_finished(tmp_path):
    trainer, handler = Trainer(small(tmp_path, epochs=2)), signal.getsignal(signal.SIGINT)
    progress = quiet(trainer)
    progress.epoch_done = lambda top1: trainer.step < 10 or signal.raise_signal(signal.SIGTERM)
    assert len(trainer.fit(None, progress)) == 2
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize("epochs", [2, 3])
def test_names_of_a_checkpoint_that_a_kill_left_undone_are_given_when_the_run_continues(tmp_path, monkeypatch, epochs):
    config = small(tmp_path / "run", epochs=epochs, ema_decay=None)
    trainer, folder = Trainer(config), RunFolder(config)
    tops = iter((10.0, 90.0, 50.0))
    monkeypatch.setattr(Trainer, "evaluate", lambda self, **_: {"loss": 1.0, "top1": next(tops), "top5": 99.0})
    name_also = checkpoints._name_also

    def kill_after_the_second_epoch(file, name):
        if len(trainer.records) == 2:
            raise KeyboardInterrupt
        name_also(file, name)

    def metrics():
        files = folder.last_checkpoint, folder.best_checkpoint
        return [checkpoints.load_checkpoint(file)["metric"] for file in files]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "_name_also", kill_after_the_second_epoch)
        trainer.fit(folder, quiet(trainer))
    assert metrics() == [10.0, 10.0]
    assert main(["train", "--resume", config.output]) == 0
    assert metrics() == [90.0 if epochs == 2 else 50.0, 90.0]
    assert main(["train", "--resume", config.output]) == 0
    assert metrics() == [90.0 if epochs == 2 else 50.0, 90.0]
    assert not any(folder.path.glob("*.unfinished"))


def test_a_name_that_cannot_be_given_when_a_run_continues_is_an_error(tmp_path, capsys, monkeypatch):
    fit(small(tmp_path / "run"))

    def refuse(self, newest, best):
        raise CheckpointError("cannot name it")

    monkeypatch.setattr(Checkpoints, "give_names", refuse)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "tlalign: error: resume: cannot name it\n"


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    trainer, folder, records = fit(small(tmp_path / "run"))
    again, _ = resume(trainer.config)
    assert again.fit(folder, quiet(again)) == records


def test_a_run_whose_last_checkpoint_failed_is_not_finished_until_it_continues(tmp_path, monkeypatch):
    config = small(tmp_path / "run", checkpoint_steps=2)
    trainer, folder = Trainer(config), RunFolder(config)

    def fail(self, state, epoch, step, best=False):
        raise CheckpointError("cannot write")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        save = Checkpoints.save
        patch.setattr(Checkpoints, "save", lambda self, *values: (fail if values[2] == 5 else save)(self, *values))
        trainer.fit(folder, quiet(trainer))
    assert read_run(folder.path, "run").state == "no epoch yet"
    continued, _ = resume(config)
    assert continued.step == 4
    continued.fit(folder, quiet(continued))
    assert read_run(folder.path, "run").state == "finished"


def test_a_row_that_was_not_logged_comes_from_the_checkpoint(tmp_path, monkeypatch):
    config = small(tmp_path / "run")
    trainer, folder = Trainer(config), RunFolder(config)

    def fail(self, record, ratio_changes):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(RunLog, "epoch", fail)
        trainer.fit(folder, quiet(trainer))
    continued, _ = resume(config)
    continued.fit(folder, quiet(continued))
    assert read_log(folder.log) == trainer.records


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    config = small(tmp_path / "run", checkpoint_steps=2)
    trainer, folder = Trainer(config), RunFolder(config)
    update = trainer._update

    def break_the_fourth():
        update()
        if trainer.step == 4:
            trainer.optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    trainer._update = break_the_fourth
    with pytest.raises(NonFiniteLossError, match="weights after step 4 are not finite"):
        trainer.fit(folder, quiet(trainer))
    assert resume(config)[0].step == 2


@pytest.mark.usefixtures("heeds_sigint")
def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = small(tmp_path / "run")
    trainer, folder = Trainer(config), RunFolder(config)
    stop_after(trainer, 1, signal.SIGINT)
    assert len(trainer.fit(folder, quiet(trainer))) == config.epochs


@pytest.mark.usefixtures("heeds_sigint")
def test_a_second_signal_acts_at_once(tmp_path):
    config = small(tmp_path / "run")
    trainer, folder = Trainer(config), RunFolder(config)
    forward = trainer.task.forward

    def twice(images, classes):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return forward(images, classes)

    trainer.task.forward = twice
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(folder, quiet(trainer))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("part", ["images", "held"])
def test_a_run_goes_on_with_as_many_images_only(tmp_path, monkeypatch, part):
    config = small(tmp_path / "run", batch_size=24)  # one image less makes no step less
    fit(config)

    class Fewer(FewDigits):
        def __init__(self, train: bool) -> None:
            super().__init__(train)
            if train == (part == "images"):
                self.images, self.targets = self.images[:-1], self.targets[:-1]

    monkeypatch.setattr("tlalign.readers.Digits", Fewer)
    now = "99 and 21" if part == "images" else "100 and 20"
    message = f"resume: the run has 100 training and 21 held-out images, but there are {now} now"
    with pytest.raises(UsageError, match=message):
        resume(config)


def test_another_run_s_checkpoint_is_refused(tmp_path):
    trainer, _, _ = fit(small(tmp_path / "run"))
    state = trainer.state()
    other = Trainer(
        small(tmp_path / "other", model_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2})
    )
    with pytest.raises(ValueError, match=r"resume: the checkpoint is not of this run: .*size mismatch"):
        other.resume(state)


def test_a_configuration_edited_by_hand_is_refused(tmp_path):
    trainer, _, _ = fit(small(tmp_path / "run"))
    for name, value in {"epochs": trainer.config.epochs + 1, "lr": 1.0, "batch_size": 25, "opt_eps": 0.5}.items():
        other = Trainer(small(tmp_path / "other", **{name: value}))
        with pytest.raises(UsageError, match=f"resume: {name} of the checkpoint's run is .*, got {value}"):
            other.resume(trainer.state())
    Trainer(small(tmp_path / "moved", max_unreadable=7)).resume(trainer.state())


def test_several_processes_are_told_to_be_as_many_again(tmp_path):
    folder = RunFolder(small(tmp_path / "run"))
    folder.last_checkpoint.touch()
    command = f"tlalign train --resume {folder.path}"
    assert _kept(folder, 1).endswith(f"to continue: {command}")
    assert _kept(folder, 4).endswith(f"to continue as 4 processes again: torchrun ... -m {command}")


@pytest.mark.parametrize("step", [3, 10])  # of 10
def test_it_is_told_where_a_run_continues_as_other_processes(tmp_path, capsys, step):
    config = small(tmp_path / "run")
    trainer, folder = Trainer(config), RunFolder(config)
    stop_after(trainer, step)
    with contextlib.suppress(TrainingInterrupted):
        trainer.fit(folder, quiet(trainer))
    checkpoints = Checkpoints(folder.path)
    _, state = checkpoints.load_newest(print)
    checkpoints.save({**state, "processes": 2}, state["epoch"], state["step"])
    assert main(["train", "--resume", config.output]) == 0
    # Where all steps are done, nothing becomes other than it was.
    told = "tlalign: the run had 2 processes and has 1 now, of which each draws" in capsys.readouterr().err
    assert told == (step == 3)


def test_a_stream_continues_with_as_many_workers_only(tmp_path, capsys):
    folder = tmp_path / "run"
    RunFolder(small(folder, data="wds/", data_dir=str(tmp_path), num_classes=2, workers=1))
    assert main(["train", "--resume", str(folder), "--workers=2"]) == 2
    assert f"resume: expected the 1 workers of the run in {folder}, for they decide the" in capsys.readouterr().err


@pytest.mark.usefixtures("heeds_sigint")
def test_the_command_continues_a_stopped_run_and_reports_a_damaged_checkpoint(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "a run"
    original = Trainer._update

    def interrupted(self):
        original(self)
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        assert main(["train", *options(folder, checkpoint_steps=3), "--resume=auto"]) == 128 + signal.SIGINT
    assert f"to continue: tlalign train --resume '{folder}'\n" in capsys.readouterr().err
    newest = max((folder / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    assert main(["train", "--resume", str(folder), "--workers=0"]) == 0
    printed = capsys.readouterr()
    assert f"{newest} is damaged" in printed.err
    assert "continued after step 3" in printed.out
    assert re.search(r"^1 epoch, the last 2 of 5 steps in 0:\d\d:\d\d, on ", printed.out, re.MULTILINE)
    assert main(["train", *options(folder, checkpoint_steps=3), "--resume=auto"]) == 0
    printed = capsys.readouterr()
    assert "continued after step 5" in printed.out
    assert "processes" not in printed.err

    whole, _, _ = fit(small(tmp_path / "whole", checkpoint_steps=3))
    weights = torch.load(folder / "last.pth.tar", weights_only=False)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())


NOWHERE = ("--recipe=none", "--model=vit_tiny_patch16_224", "--data=folder:/nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume=nowhere"], "resume: expected the folder of a run, but nowhere has no config.yaml"),
        (["--resume=EMPTY"], "resume: expected data and model in EMPTY/config.yaml, got none"),
        (["--resume=auto"], "output: expected the folder of the run with --resume auto, got null"),
        (["--resume=RUN", "--recipe=digits"], "resume: expected no recipe"),
        (["--resume=RUN", "--lr=1"], "resume: lr of the run in RUN is 0.0015, got 1.0"),
        (
            ["--resume=RUN", "--output=RUN-2"],
            "output: expected none, for the run continues in its folder RUN, got RUN-2",
        ),
        (["--resume=RUN", "--output=null"], "output: expected none"),
        (["--output=RUN", "--resume=auto"], "resume: model_kwargs of the run in RUN is"),
        (
            ["--output=RUN", "--resume=auto"],
            "; it has no checkpoint: remove the folder, or give another one (--output)",
        ),
        (["--output=RUN", *NOWHERE], "output: expected a new or empty folder, but RUN holds"),
    ],
)
def test_what_cannot_be_continued_is_refused(tmp_path, capsys, arguments, message):
    folder = tmp_path / "run"
    RunFolder(small(folder))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / CONFIG_FILE).touch()

    def named(text):
        return text.replace("RUN", str(folder)).replace("EMPTY", str(empty))

    assert main(["train", *map(named, arguments)]) == 2
    assert named(message) in capsys.readouterr().err


@pytest.mark.parametrize(
    "left", ["last.pth.tar", "model_best.pth.tar", "log.csv", "checkpoints/epoch-1-step-5-0.pth.tar"]
)
def test_a_run_whose_checkpoints_are_gone_is_not_written_over(tmp_path, capsys, left):
    config = small(tmp_path / "run")
    file = RunFolder(config).path / left
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"epoch\r\n1\r\n")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(["train", "--resume", config.output]) == 2
    message = f"resume: expected a whole checkpoint in {config.output}/checkpoints, got none, though {file} says"
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path in before} == before
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_folder_of_a_run_may_move(tmp_path, monkeypatch):
    RunFolder(small(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "now")
    outputs = []
    monkeypatch.setattr("tlalign.cli._run", lambda config, resume: outputs.append(config.output) or 0)
    assert main(["train", "--resume", str(tmp_path / "now")]) == 0
    assert outputs == [str(tmp_path / "now")]


def test_a_folder_of_images_may_move(tmp_path, capsys):
    RunFolder(small(tmp_path / "run", data=f"folder:{tmp_path / 'before'}"))
    arguments = ["train", "--resume", str(tmp_path / "run"), f"--data=folder:{tmp_path / 'now'}"]
    assert main(arguments) == 2
    assert f"data: no folder {tmp_path / 'now'}; expected PATH/train/CLASS/IMAGE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "moved"),
    [
        ("folder:a/b", "folder:c/d", True),
        ("folder:a/b", "hfds/a/b", False),
        ("hfds/a/b", "hfds//c/b", True),
        ("hfds/a/b", "hfds//c/d", False),
        ("hfds/a/b", "hfids/a/b", False),
        ("torch/a", "torch/b/a", False),
    ],
)
def test_images_may_have_moved_but_are_no_others(before, now, moved):
    assert _has_moved("data", before, now) == moved


def test_a_teacher_may_move_but_not_become_another(tmp_path, capsys):
    teacher = {"target": "teacher", "teacher_model": "resnet10t"}
    config = small(tmp_path / "run", teacher_checkpoint="before/best.pth", **teacher)
    RunFolder(config)
    assert main(["train", "--resume", config.output, "--teacher_checkpoint=now/best.pth"]) == 2
    assert "teacher_checkpoint: cannot read now/best.pth" in capsys.readouterr().err
    assert main(["train", "--resume", config.output, "--teacher_checkpoint=before/last.pth"]) == 2
    assert re.search(
        r"teacher_checkpoint of the run in .* is .*/before/best\.pth, got before/last", capsys.readouterr().err
    )


def test_a_run_continues_without_the_weights_that_it_began_with(tmp_path, capsys, monkeypatch):
    path = tmp_path / "initial.pth"
    torch.save(Trainer(small(tmp_path / "before", seed=1)).model.state_dict(), path)
    config = small(tmp_path / "run", initial_checkpoint=str(path))
    expected = became(fit(dataclasses.replace(config, output=str(tmp_path / "whole")))[0])
    trainer, folder = Trainer(config), RunFolder(config)
    stop_after(trainer, 2)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(folder, quiet(trainer))
    path.unlink()
    assert main(["train", "--resume", config.output]) == 0
    continued, _ = resume(config, initialises=False)
    assert differences(became(continued), expected) == []
    # A run that has not trained yet begins with them, from wherever it is asked.
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        config = small(tmp_path / "new", initial_checkpoint=path.name)
        RunFolder(config)
    assert main(["train", "--resume", config.output]) == 2
    assert f"initial_checkpoint: cannot read {path}" in capsys.readouterr().err
    assert main(["train", "--resume", config.output, f"--initial_checkpoint=elsewhere/{path.name}"]) == 2
    assert f"initial_checkpoint: cannot read elsewhere/{path.name}" in capsys.readouterr().err


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    config = small(tmp_path / "run")
    write_log(RunFolder(config).log, [])
    assert main(["train", "--resume", config.output]) == 0
    assert "continued after step 0" in capsys.readouterr().out


def test_a_run_is_trained_by_one_process_at_a_time_and_free_when_that_is_killed(tmp_path, capsys):
    config = small(tmp_path / "run")
    folder = RunFolder(config)
    # It forks, as a process that has others load images does.
    code = """
import os, sys, time
from tlalign.config import TrainConfig
from tlalign.runs import RunFolder

with RunFolder(TrainConfig(data="digits", model="x", output=sys.argv[1]), resume=True).locked():
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, config.output], stdout=subprocess.PIPE)
    child = int(holder.stdout.readline())
    try:
        assert main(["train", "--resume", config.output]) == 2
        assert f"output: {folder.path} is being trained by another process" in capsys.readouterr().err
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # still there
        with folder.locked():
            pass
    finally:
        holder.kill()
        holder.stdout.close()
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_loses_nothing(tmp_path, kills):
    # In a process of its own, which forks: torch can be read in once for all the processes that are killed.
    killer = Path(__file__).parents[1] / "support" / "killer.py"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, killer, tmp_path, str(kills)], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"killed {kills} times" in done.stdout


def test_whatever_ends_a_run_it_says_how_it_continues(tmp_path, capsys, monkeypatch):
    folder, original = tmp_path / "run", Trainer._update

    def run_out_of_memory(self):
        original(self)
        if self.step == 4:
            raise torch.OutOfMemoryError("out of memory\nmore of it")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", run_out_of_memory)
        assert main(["train", *options(folder, checkpoint_steps=3)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "more of it" in printed
    assert printed.endswith(
        f"tlalign: error: OutOfMemoryError: out of memory; last checkpoint {folder / 'last.pth.tar'}, to continue: "
        f"tlalign train --resume {folder}\n"
    )


def test_a_full_disk_ends_a_run_that_then_continues_to_the_same_bits(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Trainer._update

    def fill(self):
        original(self)
        if self.step == 4:
            # Checkpoints are larger than that: the system's answer is an error as that of a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", fill)
        try:
            assert main(["train", *options(folder, checkpoint_steps=3), "--epochs=2", "--resume=auto"]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err
    assert "File too large" in printed and "Traceback" not in printed
    assert f"last checkpoint {folder / 'last.pth.tar'}" in printed
    assert main(["train", "--resume", str(folder)]) == 0
    whole, _, _ = fit(small(tmp_path / "whole", epochs=2))
    weights = torch.load(folder / "last.pth.tar", weights_only=False)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())
