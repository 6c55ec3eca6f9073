"""The log of a run: what is written, what is dropped when a run resumes, and what a full disk does."""

import csv
import dataclasses
import errno
import io
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import record

from tlalign import log as log_module
from tlalign.curves import draw_comparison, draw_curves, draw_methods
from tlalign.log import RunLog
from tlalign.progress import ComparisonProgress, TrainingProgress
from tlalign.runs import CURVES_FILE, LOG_FILE, TENSORBOARD_FOLDER, EpochRecord, read_log


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder / TENSORBOARD_FOLDER)).Reload()


def steps(folder, tag: str) -> list[int]:
    return [event.step for event in events(folder).Scalars(tag)]


def test_a_row_for_each_epoch_is_there_at_once_and_reads_back_to_the_last_bit(tmp_path):
    records = [record(1), record(2, top1_ema=None, top5_ema=None, ratio_change=None)]
    with RunLog(tmp_path) as log:
        assert read_log(tmp_path / LOG_FILE) == []
        for number, each in enumerate(records, start=1):
            log.epoch(each, None)
            assert read_log(tmp_path / LOG_FILE) == records[:number]
    with (tmp_path / LOG_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(EpochRecord)]
    assert rows[1]["top1_ema"] == ""


def test_tensorboard_shows_steps_epochs_and_how_ratios_changed(tmp_path):
    changes = np.array([[-0.255, 0.0], [0.013, 0.5]], dtype=np.float32)
    with RunLog(tmp_path) as log:
        log.step(3, {"loss": 1.5, "lr": 0.25})
        # Seen while the run goes on.
        assert steps(tmp_path, "train/loss") == [3]
        log.epoch(record(1, top1_ema=None), changes)
    shown = events(tmp_path)
    assert [(event.step, event.value) for event in shown.Scalars("train/lr")] == [(3, 0.25)]
    expected = {field.name for field in dataclasses.fields(EpochRecord)} - {"step", "top1_ema"}
    assert {tag for tag in shown.Tags()["scalars"] if tag.startswith("epoch/")} == {
        f"epoch/{name}" for name in expected
    }
    (event,) = shown.Scalars("epoch/top1")
    assert (event.step, event.value) == (10, pytest.approx(1 + math.pi / 10))
    (event,) = shown.Histograms("aligned minus original ratio")
    histogram = event.histogram_value
    assert event.step == 10 and histogram.num == 4
    assert (histogram.min, histogram.max) == (pytest.approx(-0.255), 0.5)
    counts = {round(limit, 2): count for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True)}
    assert {limit for limit, count in counts.items() if count} == {-0.24, 0.02, 0.52}
    assert counts[0.02] == 2


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    with RunLog(tmp_path) as log:
        for epoch in (1, 2, 3):
            for step in range(10 * epoch - 9, 10 * epoch + 1):
                log.step(step, {"loss": 0.0})
            log.epoch(record(epoch), None)
    # From a checkpoint in the second epoch.
    with RunLog(tmp_path, [record(1)], step=15) as log:
        assert read_log(tmp_path / LOG_FILE) == [record(1)]
        log.step(16, {"loss": 1.0})
        log.epoch(record(2, loss=7.0), None)
    assert read_log(tmp_path / LOG_FILE) == [record(1), record(2, loss=7.0)]
    assert steps(tmp_path, "train/loss") == list(range(1, 17))
    assert events(tmp_path).Scalars("train/loss")[-1].value == 1.0
    assert steps(tmp_path, "epoch/top1") == [10, 20]


def test_a_run_without_a_checkpoint_starts_its_log_anew(tmp_path):
    with RunLog(tmp_path) as log:
        log.step(1, {"loss": 0.0})
    with RunLog(tmp_path) as log:
        log.step(2, {"loss": 0.0})
    assert steps(tmp_path, "train/loss") == [2]


def test_what_a_killed_run_wrote_in_part_hides_nothing_that_follows(tmp_path):
    for step in (1, 2, 3):
        with RunLog(tmp_path, step=step - 1) as log:
            log.step(step, {"loss": 0.0})
            log.step(step + 1, {"loss": 0.0})
        os.truncate(log.events.file.name, os.path.getsize(log.events.file.name) - 5)
    assert steps(tmp_path, "train/loss") == [1, 2, 3]


class FullDisk(io.BytesIO):
    """A file that takes what it is given into its buffer, and has no room for it."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error_at_once_that_names_it_and_nothing_else(tmp_path, capfd):
    with pytest.raises(OSError, match="No space left"), RunLog(tmp_path) as log:
        log.events.file.close()
        log.events.writer._writer = FullDisk()
        log.step(1, {"loss": 0.0})
        pytest.fail("the step was logged")
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_ends_an_epoch_whichever_file_it_hits(tmp_path):
    for name in (LOG_FILE, f"unfinished-{CURVES_FILE}"):
        folder = tmp_path / name
        folder.mkdir()
        log = RunLog(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            log.epoch(record(1), None)
        log.events.close()


def test_a_log_that_cannot_be_rewritten_stays_as_it_was(tmp_path, monkeypatch):
    with RunLog(tmp_path) as log:
        log.epoch(record(1), None)
    before = (tmp_path / LOG_FILE).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        RunLog(tmp_path)
    assert (tmp_path / LOG_FILE).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {LOG_FILE, CURVES_FILE, TENSORBOARD_FOLDER}


def test_curves_are_drawn_after_the_first_epoch_then_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(log_module, "draw_curves", lambda records, path: drawn.append((len(records), path)))
    with RunLog(tmp_path) as log:
        for epoch in (1, 2, 3, 4):
            if epoch == 3:
                log.last_drawing -= 3600
            log.epoch(record(epoch), None)
    assert drawn == [(epochs, tmp_path / CURVES_FILE) for epochs in (1, 3, 4)]


def test_what_a_killed_run_had_not_shown_of_its_checkpoint_is_shown_when_it_continues(tmp_path):
    with RunLog(tmp_path) as log:
        log.epoch(record(1), None)
    (tmp_path / CURVES_FILE).unlink()
    # The checkpoint knows the second epoch, the log does not.
    with RunLog(tmp_path, [record(1), record(2)], step=20):
        assert steps(tmp_path, "epoch/top1") == [10, 20]
        assert not (tmp_path / CURVES_FILE).exists()
    assert (tmp_path / CURVES_FILE).exists()
    assert read_log(tmp_path / LOG_FILE) == [record(1), record(2)]
    assert steps(tmp_path, "epoch/top1") == [10, 20]


@pytest.mark.parametrize("without", [{}, {"top1_ema": None, "ratio_change": None}])
def test_curves_of_one_epoch_and_of_many_are_pictures(tmp_path, without):
    for epochs in (1, 40):
        draw_curves([record(epoch, **without) for epoch in range(1, epochs + 1)], tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            assert min(picture.size) > 500
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("times", [{"a": None, "b": None}, {"a": 1.0, "b": None}])
def test_methods_are_drawn_with_the_times_that_are_known(tmp_path, times):
    draw_methods({"a": [97.0, 98.0], "b": [96.0]}, times, tmp_path / "methods.png")
    with Image.open(tmp_path / "methods.png") as picture:
        assert picture.size[0] > 500


def test_runs_of_any_name_number_and_length_are_drawn_over_each_other(tmp_path, monkeypatch):
    runs = {f"run {number}": [record(epoch) for epoch in range(1, number + 2)] for number in range(9)}
    runs |= {name: [record(1)] for name in ("$a_{$", os.fsdecode(b"\xfc"), "a $ b", "_hidden")}
    legends, legend = [], Figure.legend

    def shown(self, handles, labels, **options):
        legends.append([*labels])
        return legend(self, handles, labels, **options)

    monkeypatch.setattr(Figure, "legend", shown)
    draw_comparison(runs, tmp_path / "runs.png")
    assert [len(legend) for legend in legends] == [13] and "_hidden" in legends[0]
    with Image.open(tmp_path / "runs.png") as picture:
        assert min(picture.size) > 500


def test_the_time_left_of_a_resumed_run_counts_the_steps_of_this_process_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written = io.StringIO()
    progress = TrainingProgress(10, 100, Console(file=written, width=200), step=900)
    now[0] += 20.0
    progress.step_done(10, 920, 1.0, 1.0)
    assert "step 920/1000" in written.getvalue()
    assert "0:01:20 left" in written.getvalue()


def test_the_time_left_of_a_comparison_counts_the_runs_that_it_trained_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written = io.StringIO()
    progress = ComparisonProgress(Console(file=written, width=200))
    progress.start(10, 6)
    now[0] += 60.0
    progress.run_done("cutmix seed 0  failed: [/b]", 50.0)
    assert written.getvalue() == "7/10  cutmix seed 0  failed: [/b]  in 0:00:50, 0:03:00 left\n"


def test_a_quiet_progress_shows_nothing_and_leaves_the_terminal_to_others():
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, quiet=True)
    streams = sys.stdout, sys.stderr
    with TrainingProgress(1, 2, console) as progress:
        progress.step_done(1, 2, 1.0, 1.0)
        progress.epoch_done(50.0)
        assert (sys.stdout, sys.stderr) == streams
    assert written.getvalue() == ""


def test_a_reader_of_the_progress_that_goes_away_ends_no_run():
    script = """
import sys
from tlalign import progress
progress._LINE_SECONDS = 0
shown = progress.TrainingProgress(1, 3)
for step in (1, 2, 3):
    shown.step_done(1, step, 0.0, 1.0)
print("the end")
sys.stderr.write("done")
"""
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"done"
    assert process.wait() == 0
