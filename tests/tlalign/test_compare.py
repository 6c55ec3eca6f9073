"""The comparison of methods: what is trained, in which order and how often, and what the table says of it."""

import csv
import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from training import PYTHONPATH, options, tiny

from tlalign import compare
from tlalign.cli import main
from tlalign.compare import CSV_FILE, METHODS, PLOT_FILE, PRINTED_FILE, TABLE_FILE, plan_runs, start_training
from tlalign.config import CONFIG_FILE, TrainConfig, UsageError, load_recipe
from tlalign.runs import LOG_FILE, EpochRecord, RunFolder, read_log, write_log

EPOCHS = 3
ALIGNED = "cutmix+tl-align"


def plan(output, methods=("cutmix", ALIGNED), seeds=2, **values):
    common = TrainConfig(**load_recipe("digits") | {"epochs": EPOCHS, "warmup_epochs": 1} | values)
    return plan_runs(common, methods, seeds, output)


class FakeProcess:
    """Trains nothing, but leaves what a run leaves, with random numbers."""

    started: ClassVar[list["FakeProcess"]] = []
    ends_after = 1
    broken: tuple[str, ...] = ()

    def __init__(self, config, threads):
        self.config, self.threads, self.looks, self.terminated = config, threads, 0, False
        self.beside = sum(not each.ended for each in self.started)
        self.folder = RunFolder(config, resume=(Path(config.output) / CONFIG_FILE).is_file())
        self.started.append(self)

    @property
    def name(self):
        return Path(self.config.output).name

    @property
    def ended(self):
        return self.looks >= self.ends_after

    def poll(self):
        self.looks += 1
        if not self.ended:
            return None
        if self.name in self.broken:
            (self.folder.path / PRINTED_FILE).write_text(
                "epoch 1\ntlalign: error: the loss is nan; no checkpoint yet\n\n"
            )
            return 1
        write_log(self.folder.log, records(self.config))
        return 0

    def terminate(self):
        self.terminated = True

    def wait(self):
        assert self.terminated
        return 143


def records(config, epochs=EPOCHS):
    draw = np.random.default_rng(zlib.crc32(config.output.encode()))
    rows = []
    for epoch in range(1, epochs + 1):
        loss, eval_loss, lr, top1, top5, top1_ema, top5_ema, rate, data, forward, backward, change = draw.random(12)
        change = change if config.aligns else None
        memory = int(draw.integers(2**20, 2**30))
        numbers = (loss, eval_loss, lr, 90 + top1, top5, 90 + top1_ema, top5_ema, rate, data, forward, backward, change)
        rows.append(EpochRecord(epoch, 10 * epoch, *map(lambda x: x if x is None else float(x), numbers), memory))
    return rows


@pytest.fixture
def fake(monkeypatch):
    """Has runs be fake ones, and returns the class."""
    fresh = type("Fake", (FakeProcess,), {"started": []})
    monkeypatch.setattr(compare, "start_training", fresh)
    monkeypatch.setattr(compare, "_SECONDS_BETWEEN_LOOKS", 0.001)
    return fresh


def run(output, *options, methods=("cutmix", ALIGNED), seeds=2):
    arguments = ["--epochs", str(EPOCHS), "--warmup_epochs=1", "--seeds", str(seeds), *options]
    return main(["compare", "--methods", *methods, "--output", str(output), *arguments])


def names(processes):
    return [process.name for process in processes]


def log(folder) -> list[dict[str, str]]:
    with (folder / LOG_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_continue_where_the_images_are_now(tmp_path, monkeypatch):
    """The process of a run is told what may differ from the configuration in its folder."""
    (config,) = plan_runs(tiny(tmp_path, data="folder:/before"), ["cutmix"], 1, tmp_path)
    RunFolder(config)
    commands, groups = [], []

    def start(command, start_new_session, **options):
        commands.append(command)
        groups.append(start_new_session)

    monkeypatch.setattr(subprocess, "Popen", start)
    start_training(dataclasses.replace(config, data="folder:/now", workers=3), threads=1)
    assert {"--data=folder:/now", "--workers=3", "--teacher_checkpoint=null"} <= set(commands[0])
    assert groups == [True]  # Ctrl-C is for this process alone


def test_a_run_has_its_threads_unless_the_environment_says_how_many_and_keeps_what_was_printed(tmp_path, monkeypatch):
    (config,) = plan(tmp_path, ("cutmix",), 1)
    printed, threads = RunFolder(config).path / PRINTED_FILE, []
    printed.write_text("before\n")
    monkeypatch.setattr(subprocess, "Popen", lambda _, env, **__: threads.append(env["OMP_NUM_THREADS"]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    start_training(config, threads=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    start_training(config, threads=3)
    assert threads == ["3", "5"]
    assert printed.read_text() == "before\n"


def test_seeds_are_trained_one_after_the_other_with_all_methods(tmp_path):
    configs = plan(tmp_path, METHODS, 3, seed=4, lr=0.25, layers=(1,))
    named = [method + "+layers=1" * method.endswith("tl-align") for method in METHODS]
    assert [(config.seed, config.method) for config in configs] == list(itertools.product((4, 5, 6), named))
    assert [config.output for config in configs[:2]] == [str(tmp_path / "none-seed4"), str(tmp_path / "cutmix-seed4")]
    assert {config.lr for config in configs} == {0.25}
    # What only tl-align knows goes to its methods only.
    assert all((config.layers == (1,)) == (config.target == "tl-align") for config in configs)


def test_methods_may_differ_in_how_they_align(fake, tmp_path, capsys):
    methods = (ALIGNED, f"{ALIGNED}+layers=-1,0", f"{ALIGNED}+residual=false+stochastic_depth=true", "cutmix")
    whole, some, otherwise, plain = configs = plan(tmp_path / "plan", methods, 1)
    assert [config.method for config in configs] == list(methods)
    assert (whole.layers, some.layers, otherwise.layers, plain.layers) == (None, (-1, 0), None, None)
    assert (whole.residual, some.residual, otherwise.residual, plain.residual) == (True, True, False, True)
    assert (some.stochastic_depth, otherwise.stochastic_depth) == (False, True)
    # Its own option comes before the common one.
    common = plan(tmp_path / "common", (ALIGNED, f"{ALIGNED}+layers=0"), 1, layers=(1,))
    assert [config.layers for config in common] == [(1,), (0,)]
    assert run(tmp_path / "out", "--seeds=1", methods=methods) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^\| {re.escape(method)} +\|", printed, re.MULTILINE) for method in methods)
    assert (tmp_path / "out" / f"{methods[2]}-seed0" / LOG_FILE).is_file()


def test_an_option_may_be_for_some_of_the_methods_only(fake, tmp_path):
    assert run(tmp_path / "in a new folder" / "out", "--mixup_alpha=0.3", methods=("cutmix", "mixup"), seeds=1) == 0
    assert [process.config.mixup_alpha for process in fake.started] == [0.3, 0.3]


def test_the_table_is_what_the_logs_say(fake, tmp_path, capsys):
    assert run(tmp_path, methods=("none", "cutmix", ALIGNED), seeds=5) == 0
    printed = capsys.readouterr().out
    with (tmp_path / CSV_FILE).open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["none", "cutmix", ALIGNED]

    def least(method, *columns):
        logs = [log(tmp_path / f"{method}-seed{seed}") for seed in range(5)]
        return min(sum(float(row[column]) for column in columns) for rows in logs for row in rows)

    parts = ("forward_seconds", "backward_seconds")
    for method, row in rows.items():
        logs = [log(tmp_path / f"{method}-seed{seed}") for seed in range(5)]
        top1 = [float(rows[-1]["top1_ema"]) for rows in logs]
        assert row["top1"] == " ".join(map(str, top1))
        assert (row["planned"], row["finished"], row["failed"], row["errors"]) == ("5", "5", "0", "")
        expected = {
            "top1_mean": np.mean(top1),
            "top1_std": np.std(top1, ddof=1),
            "images_per_second": max(float(row["images_per_second"]) for rows in logs for row in rows),
            "step_seconds": least(method, "data_seconds", *parts),
            "compute_seconds": least(method, *parts),
            "relative_step": least(method, "data_seconds", *parts) / least("cutmix", "data_seconds", *parts),
            "relative_compute": least(method, *parts) / least("cutmix", *parts),
            "peak_memory": max(int(row["peak_memory"]) for rows in logs for row in rows),
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-12), name
        changes = [float(rows[-1]["ratio_change"]) for rows in logs if rows[-1]["ratio_change"]]
        assert (row["ratio_change"] == "") == (method != ALIGNED)
        if changes:
            assert float(row["ratio_change"]) == pytest.approx(np.mean(changes))
        line = next(line for line in printed.splitlines() if line.startswith(f"| {method} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:3] == ["5 of 5", f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}"]
        rate, memory = f"{expected['images_per_second']:.0f}", f"{expected['peak_memory'] / 2**20:.0f} MiB"
        times = [f"{expected[name]:.2f}" for name in ("relative_step", "relative_compute")]
        assert cells[3:7] == [rate, *times, memory]
    assert (tmp_path / TABLE_FILE).read_text() in printed
    assert "seeds 0 to 4. Top-1 is that of the averaged weights (EMA)" in printed
    with Image.open(tmp_path / PLOT_FILE) as picture:
        assert min(picture.size) > 200


def test_without_averages_top1_is_the_models_and_without_cutmix_nothing_is_relative(fake, tmp_path, capsys):
    fake.poll = lambda self: FakeProcess.poll(self) or _without_averages(self.folder)
    assert run(tmp_path, "--ema_decay=null", methods=("none",), seeds=1) == 0
    printed = capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / CSV_FILE).open(newline=""))
    assert row["top1"] == log(tmp_path / "none-seed0")[-1]["top1"]
    assert (row["top1_std"], row["relative_step"], row["relative_compute"]) == ("", "", "")
    assert "Top-1 is that of the model" in printed


def _without_averages(folder):
    rows = read_log(folder.log)
    for row in rows:
        row.top1_ema = row.top5_ema = None
    write_log(folder.log, rows)
    return 0


def test_finished_runs_are_not_trained_again_and_unfinished_ones_are_continued(fake, tmp_path):
    first, second, third, _ = plan(tmp_path)
    for config, epochs in ((first, EPOCHS), (second, EPOCHS - 1), (third, 0)):
        write_log(RunFolder(config).log, records(config, epochs))
    before = (tmp_path / "cutmix-seed0" / LOG_FILE).stat().st_mtime_ns
    assert run(tmp_path) == 0
    assert names(fake.started) == [f"{ALIGNED}-seed0", "cutmix-seed1", f"{ALIGNED}-seed1"]
    assert (tmp_path / "cutmix-seed0" / LOG_FILE).stat().st_mtime_ns == before
    table = (tmp_path / TABLE_FILE).read_text()
    fake.started.clear()
    assert run(tmp_path) == 0
    assert not fake.started
    assert (tmp_path / TABLE_FILE).read_text() == table
    # More seeds go on from there.
    assert run(tmp_path, seeds=3) == 0
    assert names(fake.started) == ["cutmix-seed2", f"{ALIGNED}-seed2"]


def test_so_many_run_at_a_time_and_share_the_cores(fake, tmp_path, monkeypatch):
    fake.ends_after = 3
    monkeypatch.setattr(compare, "_cores", lambda: 7)
    assert run(tmp_path, "--jobs=3") == 0
    assert [process.beside for process in fake.started] == [0, 1, 2, 0]
    assert {process.threads for process in fake.started} == {2}


def test_the_table_is_there_after_each_run(fake, tmp_path):
    there = []
    fake.poll = lambda self: there.append((tmp_path / TABLE_FILE).exists()) or FakeProcess.poll(self)
    assert run(tmp_path, methods=("cutmix",)) == 0
    assert there == [False, True]


def test_a_run_that_fails_is_in_the_table_and_the_others_go_on(fake, tmp_path, capsys):
    fake.broken = ("cutmix-seed0", f"{ALIGNED}-seed1")
    assert run(tmp_path) == 1
    assert len(fake.started) == 4
    printed = capsys.readouterr().out
    assert "1/4  cutmix seed 0  failed: the loss is nan; no checkpoint yet" in printed
    table = (tmp_path / TABLE_FILE).read_text()
    assert re.search(r"\| cutmix +\| 1 of 2, 1 failed \|", table)
    for name in ("cutmix seed 0", f"{ALIGNED} seed 1"):
        assert f"- {name} failed: the loss is nan; no checkpoint yet" in table
    # They are tried again.
    fake.started.clear()
    fake.broken = ()
    assert run(tmp_path) == 0
    assert names(fake.started) == ["cutmix-seed0", f"{ALIGNED}-seed1"]
    assert "failed" not in (tmp_path / TABLE_FILE).read_text()


def test_a_run_that_fails_after_its_last_epoch_has_failed(fake, tmp_path):
    fake.poll = lambda self: FakeProcess.poll(self) or -signal.SIGKILL
    assert run(tmp_path, methods=("cutmix",), seeds=1) == 1
    assert "- cutmix seed 0 failed: ended by SIGKILL" in (tmp_path / TABLE_FILE).read_text()


def test_a_signal_ends_the_runs_that_go_on_and_leaves_a_table(fake, tmp_path, capsys):
    fake.ends_after = 3
    sent = []

    def poll(self):
        if len(self.started) == 4 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return FakeProcess.poll(self)

    fake.poll = poll
    assert run(tmp_path, "--jobs=2") == 128 + signal.SIGTERM
    assert names(fake.started) == ["cutmix-seed0", f"{ALIGNED}-seed0", "cutmix-seed1", f"{ALIGNED}-seed1"]
    assert [process.terminated for process in fake.started] == [False, False, True, True]
    assert re.search(r"\| cutmix +\| 1 of 2 \|", (tmp_path / TABLE_FILE).read_text())
    assert "the same command goes on" in capsys.readouterr().err


def test_a_comparison_without_a_finished_run_names_no_plot(fake, tmp_path, capsys):
    output = tmp_path / "all of them"
    fake.broken = ("cutmix-seed0",)
    assert run(output, methods=("cutmix",), seeds=1) == 1
    printed = capsys.readouterr().out
    assert printed.endswith(f"table {output / TABLE_FILE}, runs: tlalign runs '{output}'\n")
    fake.broken = ()
    assert run(output, methods=("cutmix",), seeds=1) == 0
    assert f"plot {output / PLOT_FILE}, runs" in capsys.readouterr().out
    assert (output / PLOT_FILE).exists()
    # Nor is one left, of methods that the table does not show.
    fake.broken = ("random-seed0",)
    assert run(output, methods=("random",), seeds=1) == 1
    assert not (output / PLOT_FILE).exists()


def test_a_run_of_another_configuration_is_refused_before_anything_is_trained(fake, tmp_path, capsys):
    RunFolder(plan(tmp_path, lr=0.25)[-1])
    assert run(tmp_path) == 2
    assert f"lr of the run in {tmp_path / ALIGNED}-seed1 is 0.25, got 0.0015" in capsys.readouterr().err
    assert not fake.started
    # Where and how it runs may change.
    assert run(tmp_path, "--lr=0.25", "--workers=1") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "cutmixx"], "got cutmixx; did you mean cutmix?"),
        (["--methods", "cutmix+tl-aline"], "in cutmix+tl-aline, got tl-aline; did you mean tl-align?"),
        (["--methods", "none+tl-align"], "methods: expected none, got none+tl-align"),
        (["--methods", "cutmix+ratio"], "methods: expected cutmix, got cutmix+ratio"),
        (["--methods", "cutmix", "cutmix"], "methods: expected each once"),
        (["--methods", "cutmix+tl-align", "cutmix+tl-align+residual=true"], "methods: expected each once"),
        (
            ["--methods", "cutmix+layers=1"],
            "methods: cutmix+layers=1: layers, residual, stochastic_depth: expected none",
        ),
        (["--methods", "cutmix+tl-align+layer=1"], "got layer; did you mean layers?"),
        (
            ["--methods", "cutmix+tl-align+layers=all"],
            "expected blocks such as 1,3 for layers in cutmix+tl-align+layers",
        ),
        (
            ["--methods", "cutmix+tl-align+residual=0"],
            "expected true or false for residual in cutmix+tl-align+residual=0",
        ),
        (["--methods", "cutmix+tl-align+transmix"], "in cutmix+tl-align+transmix, got tl-align+transmix"),
        (["--methods", "cutmix+teacher"], "methods: cutmix+teacher: teacher_checkpoint: expected weights"),
        (["--seeds=0"], "seeds: expected at least 1, got 0"),
        (["--seeds=1.5"], "seeds: expected a whole number, got 1.5\n"),
        (["--jobs=0"], "jobs: expected at least 1, got 0"),
        (["--mixing=cutmix"], "mixing: expected none"),
        (["--target", "ratio"], "target: expected none"),
        (["--output=null"], "output: expected the folder"),
        (["--data=mnist-5k"], "recipe: the default, digits, is not made for mnist-5k"),
        (
            ["--methods", "cutmix", "cutmix+tl-align", "--mixup_alpha=0.3"],
            "mixup_alpha: expected none, for each of the methods makes no use of it, got 0.3",
        ),
        (
            ["--methods", "cutmix", "cutmix+transmix", "--layers=1"],
            "layers: expected none, for each of the methods makes no use of it, got (1,)",
        ),
        (
            ["--methods", "cutmix", "--residual=false"],
            "residual: expected none, for each of the methods makes no use of it, got False",
        ),
        (
            ["--methods", "cutmix+tl-align+layers=1+layers=0"],
            "methods: expected each option once in cutmix+tl-align+layers=1+layers=0",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, fake, tmp_path, capsys):
    assert main(["compare", "--output", str(tmp_path / "runs"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not fake.started
    assert not (tmp_path / "runs").exists()


def test_a_process_alone_trains_a_run_and_prints_into_its_folder(tmp_path):
    config = plan(tmp_path, ("random",), 1, mix_patch_size=7)[0]
    process = start_training(config, threads=1)
    with pytest.raises(UsageError, match="random-seed0 is being trained by another process"):
        start_training(config, threads=1)
    assert process.wait() == 2
    printed = (tmp_path / "random-seed0" / PRINTED_FILE).read_text()
    assert printed.splitlines()[-1].startswith("tlalign: error: mix_patch_size: expected a divisor of the 20 pixels")


def test_a_run_that_cannot_print_into_its_folder_is_an_error(tmp_path):
    config = plan(tmp_path, ("none",), 1)[0]
    (RunFolder(config).path / PRINTED_FILE).mkdir()
    with pytest.raises(UsageError, match=r"output: cannot write to .*none-seed0: "):
        start_training(config, threads=1)


def test_a_locale_without_the_characters_of_the_table_stops_nothing(tmp_path):
    code = "import sys, test_compare as t; t.compare.start_training = t.FakeProcess; sys.exit(t.run(sys.argv[1]))"
    path = os.pathsep.join((str(Path(__file__).parent), PYTHONPATH))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": path}
    arguments = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(arguments, env=os.environ | ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / TABLE_FILE).read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| cutmix ") and "\u00b1" in line)
    assert row.replace("\u00b1", "?") in done.stdout.decode("ascii")


@pytest.mark.slow
def test_real_runs_go_on_after_a_stop(tmp_path):
    # Of random patches of 5 pixels in images of 16 nothing comes.
    flags = ["--methods", "cutmix", ALIGNED, "random", *options(tmp_path, batch_size=128)]
    flags += ["--mix_patch_size=5", "--seeds=2", "--jobs=2"]
    process = subprocess.Popen([sys.executable, "-m", "tlalign", "compare", *flags], stdout=subprocess.PIPE)
    while b"top-1" not in (line := process.stdout.readline()):
        assert line, "ended without a finished run"
    process.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in a shell's background
    process.stdout.read()
    assert process.wait() == 143
    finished = [path.parent for path in tmp_path.glob("*/log.csv") if len(path.read_text().splitlines()) == 2]
    assert 1 <= len(finished) < 4
    before = {file: file.stat().st_mtime_ns for folder in finished for file in folder.rglob("*")}
    time.sleep(0.1)
    assert main(["compare", *flags]) == 1
    assert {file: file.stat().st_mtime_ns for folder in finished for file in folder.rglob("*")} == before
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / CSV_FILE).open(newline=""))}
    assert [rows[method]["finished"] for method in ("cutmix", ALIGNED, "random")] == ["2", "2", "0"]
    assert rows["random"]["failed"] == "2"
    assert "mix_patch_size: expected a divisor" in rows["random"]["errors"]
    assert main(["runs", str(tmp_path), "--csv", str(tmp_path / "runs.csv")]) == 0
    states = {row["name"]: row["state"] for row in csv.DictReader((tmp_path / "runs.csv").open(newline=""))}
    assert states == {
        f"{method}-seed{seed}": "no epoch yet" if method == "random" else "finished"
        for method in ("cutmix", ALIGNED, "random")
        for seed in (0, 1)
    }
