"""The list of runs: what it shows of good, half-written and unreadable runs, and where they differ."""

import contextlib
import csv
import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from tlalign.cli import main
from tlalign.config import CONFIG_FILE, TrainConfig, UsageError, load_recipe
from tlalign.listing import RunTable, find_runs
from tlalign.runs import LOG_FILE, EpochRecord, RunFolder, config_beside, read_log, write_log


def make_run(folder, tops, emas=None, **values):
    """Writes the folder of a run with these top-1 after its epochs."""
    config = TrainConfig(**load_recipe("digits") | {"epochs": 6, "output": str(folder)} | values)
    records = []
    for index, top1 in enumerate(tops):
        numbers = dict.fromkeys((field.name for field in dataclasses.fields(EpochRecord)), index + 1)
        numbers |= {"top1": top1, "top1_ema": None if emas is None else emas[index], "top5_ema": None}
        numbers |= {"data_seconds": 0.5 + (index == 0), "forward_seconds": 0.25, "backward_seconds": 0.125}
        change = 0.0625 + (index < len(tops) - 1)
        records.append(EpochRecord(**numbers | {"ratio_change": change if config.aligns else None}))
    write_log(RunFolder(config).log, records)


@pytest.fixture
def runs(tmp_path):
    """A folder of three runs, one in a folder of its own, and of four broken ones."""
    folder = tmp_path / "runs"
    make_run(folder / "aligned", [10, 20, 30, 40, 50, 60], [5, 15, 70, 45, 55, 0])
    make_run(folder / "plain", [10, 90], target="ratio", lr=0.25, layers=None)
    make_run(folder / "more" / "smooth", [], smoothing=0.5)
    shutil.copytree(folder / "aligned", folder / "broken-config")
    (folder / "broken-config" / CONFIG_FILE).write_text("{")
    shutil.copytree(folder / "aligned", folder / "no-config")
    (folder / "no-config" / CONFIG_FILE).unlink()
    shutil.copytree(folder / "aligned", folder / "broken-log")
    (folder / "broken-log" / LOG_FILE).write_bytes(b"\xff\xfe epoch\n")
    shutil.copytree(folder / "aligned", folder / "no-log")
    (folder / "no-log" / LOG_FILE).unlink()
    (folder / "no-run").mkdir()
    return folder


def table(runs, sort="name") -> dict[str, dict]:
    return {row["name"]: row for row in RunTable(find_runs([runs]), sort).rows}


def test_each_run_has_a_row_with_what_it_is_and_how_it_went(runs):
    rows = table(runs)
    assert len(rows) == 7
    aligned = rows["aligned"]
    assert (aligned["model"], aligned["method"], aligned["data"]) == (
        "vit_tiny_patch16_224",
        "cutmix+tl-align",
        "digits",
    )
    assert (aligned["epochs"], aligned["planned_epochs"], aligned["state"]) == (6, 6, "finished")
    # Of the averaged weights, where there are any.
    assert (aligned["best"], aligned["last"]) == (70, 0)
    assert (aligned["ratio_change"], aligned["images_per_second"], aligned["step_seconds"]) == (0.0625, 3.5, 0.875)
    plain = rows["plain"]
    assert (plain["method"], plain["epochs"], plain["state"]) == ("cutmix", 2, "unfinished, at epoch 2")
    assert (plain["best"], plain["ratio_change"]) == (90, None)
    assert rows["more/smooth"]["state"] == "no epoch yet"


def test_broken_runs_say_what_is_wrong_and_show_what_is_left(runs):
    rows = table(runs)
    assert rows["no-config"]["state"] == "unreadable: no config.yaml"
    assert "is not YAML" in rows["broken-config"]["state"]
    assert rows["broken-config"]["best"] == 70
    assert "can't decode byte 0xff" in rows["broken-log"]["state"]
    assert rows["broken-log"]["method"] == "cutmix+tl-align"
    assert rows["no-log"]["state"] == "no epoch yet"
    (runs / "broken-log" / CONFIG_FILE).unlink()
    assert table(runs)["broken-log"]["state"] == "unreadable: no config.yaml"


@pytest.mark.parametrize(
    "values",
    ["data: digits\n", "- 1\n", "lr: 1\nx: 2\n"]
    + [
        f"data: digits\nmodel: vit\n{value}\n"
        for value in ("epochs: many", "epochs: 2.5", "layers: 1", "mixing: [a, b]", "model_kwargs: text")
    ],
)
def test_a_file_that_is_no_configuration_is_unreadable(runs, values):
    (runs / "aligned" / CONFIG_FILE).write_text(values)
    row = table(runs)["aligned"]
    assert row["state"].startswith(f"unreadable: {CONFIG_FILE} is of no run: ")
    assert str(runs) not in row["state"]  # it is said in another column


def test_a_log_that_is_none_hides_no_other_run(runs):
    (runs / "plain" / LOG_FILE).write_text("x" * 200_000 + "\n")
    rows = table(runs)
    assert rows["plain"]["state"].startswith("unreadable: expected the columns epoch, ")
    assert rows["aligned"]["state"] == "finished"


def test_a_log_of_an_older_version_has_the_columns_of_its_time(runs):
    log = runs / "plain" / LOG_FILE
    lines = [line.split(",") for line in log.read_text().splitlines()]
    before = read_log(log)
    for columns, readable in ((-1, True), (-2, True), (-3, False)):
        log.write_text("".join(f"{','.join(line[:columns])}\n" for line in lines))
        if readable:
            left_out = dict.fromkeys(("ratio_shift", "ratio_rmse")[:-columns])
            assert read_log(log) == [dataclasses.replace(record, **left_out) for record in before]
        else:
            with pytest.raises(ValueError, match="expected the columns epoch, "):
                read_log(log)


def test_configuration_values_are_shown_where_they_differ_only(runs):
    columns = RunTable(find_runs([runs])).columns
    assert list(columns)[-2:] == ["smoothing", "lr"]
    rows = table(runs)
    assert [rows[name]["lr"] for name in ("aligned", "plain", "no-config")] == [1.5e-3, 0.25, None]
    assert list(RunTable(find_runs([runs / "plain"])).columns)[-1] == "state"


def test_numbers_fall_names_rise_and_runs_without_come_last(runs):
    assert next(iter(table(runs, "lr"))) == "plain"
    assert next(iter(table(runs, "best"))) == "plain"
    assert list(table(runs, "best"))[-3:] == ["broken-log", "more/smooth", "no-log"]
    assert list(table(runs, "method"))[:2] == ["plain", "aligned"]
    with pytest.raises(UsageError, match=r"sort: expected one of .*, got bets; did you mean best\?"):
        RunTable(find_runs([runs]), "bets")


def test_a_row_that_was_not_written_to_its_end_is_left_out(runs):
    log = runs / "plain" / LOG_FILE
    whole = log.read_bytes()
    for end in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        log.write_bytes(whole[:end])
        assert [record.top1 for record in read_log(log)] == [10]


def test_the_command_prints_the_table_and_writes_curves_and_csv(runs, tmp_path, capsys):
    files = tmp_path / "runs.png", tmp_path / "runs.csv"
    assert main(["runs", str(runs), "--sort=best", "--plot", str(files[0]), "--csv", str(files[1])]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.strip() for line in printed if "vit_tiny" in line]
    assert rows[0].startswith("plain ") and "90.00" in rows[0] and "unfinished, at epoch 2" in rows[0]
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows[:2]] == ["plain", "aligned"]
    assert (rows[1]["ratio_change"], rows[0]["ratio_change"]) == ("0.0625", "")
    with Image.open(files[0]) as picture:
        assert min(picture.size) > 500


def test_runs_are_listed_wherever_they_are_asked_for_and_once(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.parent)
    assert main(["runs"]) == 0
    assert "more/smooth" in capsys.readouterr().out
    assert [run.name for run in find_runs([runs / "plain", runs / "more", Path("runs/plain")])] == [
        "smooth",
        str(runs / "plain"),
    ]
    assert main(["runs", "runs/no-run"]) == 0
    assert "no runs in runs/no-run" in capsys.readouterr().out


def test_a_run_whose_name_is_no_text_keeps_it_in_the_table(tmp_path):
    make_run(tmp_path / os.fsdecode(b"run\xfc"), [10])
    RunTable(find_runs([tmp_path])).save(tmp_path / "table.csv")
    assert b"\nrun\xfc," in (tmp_path / "table.csv").read_bytes()


def test_a_name_in_brackets_is_no_markup(tmp_path, capsys):
    make_run(tmp_path / "[bold]run", [10])
    assert main(["runs", str(tmp_path)]) == 0
    assert "[bold]run " in capsys.readouterr().out


def test_runs_of_one_name_in_several_folders_are_told_apart(tmp_path, monkeypatch):
    for name in ("one/x", "two/x", "two/y"):
        make_run(tmp_path / name, [10])
    monkeypatch.chdir(tmp_path)
    runs = find_runs([Path("one"), Path("two")])
    assert [run.name for run in runs] == ["one/x", "two/x", "two/y"]
    drawn = []
    monkeypatch.setattr("tlalign.curves.draw_comparison", lambda curves, path: drawn.extend(curves))
    RunTable(runs).plot(Path("plot.png"))
    assert drawn == ["one/x", "two/x", "two/y"]
    assert [run.name for run in find_runs([Path("two")])] == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "expected a folder of runs, got nowhere"),
        (["--plto=x.png"], "did you mean plot?"),
        (["more", "--plot=x.png"], "plot: expected a run with an epoch"),
        (["plain", "--plot=x.pdf"], "plot: expected a file NAME.png, got x.pdf"),
        (["plain", "--plot=nowhere/x.png"], "plot: cannot write nowhere/x.png"),
        (["plain", "--csv=nowhere/x.csv"], "csv: cannot write nowhere/x.csv"),
        (["x" * 300], "File name too long"),
    ],
)
def test_what_cannot_be_listed_ends_with_a_message_and_code_2(runs, options, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert main(["runs", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_narrow_list_leaves_out_speeds_and_then_differing_values_but_no_name(runs):
    table = RunTable(find_runs([runs]))
    printed = {}
    for width in (80, 100, 200):
        console = Console(width=width, file=io.StringIO())
        table.print(console)
        printed[width] = " ".join(console.file.getvalue().split())
    assert all(name in printed[80] for name in ("aligned", "broken-conf", "more/smooth", "cutmix+tl-a"))
    assert "no room for smoothing, lr, ratio_change, images_per_second, step_seconds: --csv" in printed[80]
    assert "smoothing lr" in printed[100] and "no room for ratio_change, images_per_second, step_sec" in printed[100]
    assert "no room" not in printed[200]
    assert "70.00 0.00 0.0625 4 0.8750 finished" in printed[200]
    # Nor is one shown that is empty.
    console = Console(width=200, file=io.StringIO())
    RunTable(find_runs([runs / "plain"])).print(console)
    assert "seconds" in console.file.getvalue() and "ratio" not in console.file.getvalue()


def test_the_list_needs_no_torch(runs):
    code = f"import sys, tlalign.cli; tlalign.cli.main(['runs', {str(runs)!r}]); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "cutmix+tl-align" in printed


def test_a_folder_is_new_where_a_kill_left_nothing_whole(tmp_path):
    (tmp_path / "unfinished-config.yaml").touch()
    make_run(tmp_path, [10])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, LOG_FILE]
    with pytest.raises(UsageError, match=r"output: expected a new or empty folder, but .* holds files"):
        make_run(tmp_path, [20])


@pytest.mark.parametrize("output", ["run", None])
def test_a_disk_that_cannot_be_written_is_an_error_that_names_the_folder(output, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"output: .* runs?: .*No space left"):
        patch.setattr("os.fsync", full)
        make_run("run", [10], output=output)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"output: cannot make a run in file/x: .*Not a directory"):
        make_run("file/x", [10])


@pytest.mark.parametrize(
    ("code", "is_held"), [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False), (errno.EOPNOTSUPP, False)]
)
def test_a_run_is_locked_where_the_file_system_can(tmp_path, monkeypatch, code, is_held):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    make_run(tmp_path / "run", [10])
    monkeypatch.setattr("fcntl.lockf", refuse)
    folder = RunFolder(TrainConfig(**load_recipe("digits"), output=str(tmp_path / "run")), resume=True)
    held = pytest.raises(UsageError, match="is being trained by another process")
    with held if is_held else contextlib.nullcontext(), folder.locked():
        pass


def test_a_run_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    make_run(tmp_path / "run", [10])
    config = TrainConfig(**load_recipe("digits"), output=str(tmp_path / "run"))
    folder = RunFolder(config, resume=True)
    (tmp_path / "run" / "lock").mkdir()
    with pytest.raises(UsageError, match=r"output: cannot write to .*run: .*Is a directory"), folder.locked():
        pass
    monkeypatch.setattr("os.fsync", full)
    folder.update_places(config)
    with pytest.raises(UsageError, match=r"output: cannot write to .*run: .*No space left"):
        folder.update_places(dataclasses.replace(config, data="folder:images"))


def test_a_log_with_an_overlong_field_is_no_log(tmp_path):
    make_run(tmp_path / "run", [10])
    log = tmp_path / "run" / LOG_FILE
    log.write_text(log.read_text() + "9" * 200_000 + "\n")
    with pytest.raises(ValueError, match="expected numbers in"):
        read_log(log)


def test_the_folder_says_where_a_run_reads_from_wherever_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"data": "folder:~/images", "data_dir": "sets", "initial_checkpoint": "~/b/last.pth"}
    given |= {"target": "teacher", "teacher_checkpoint": "a/best.pth", "output": "run"}
    folder = RunFolder(TrainConfig(**load_recipe("digits") | given))
    written = yaml.safe_load((folder.path / CONFIG_FILE).read_text())
    assert written["data"] == f"folder:{tmp_path}/images"
    places = [written[name] for name in ("data_dir", "teacher_checkpoint", "initial_checkpoint")]
    assert places == [f"{tmp_path}/{place}" for place in ("sets", "a/best.pth", "b/last.pth")]
    # Of a run that goes on, too, but nothing else of it.
    folder.update_places(TrainConfig(**load_recipe("digits") | given | {"data_dir": "moved", "lr": 0.25}))
    assert yaml.safe_load((folder.path / CONFIG_FILE).read_text()) == written | {"data_dir": f"{tmp_path}/moved"}


@pytest.mark.parametrize("family", ["hfds", "hfids"])
def test_a_set_of_hugging_face_is_a_folder_where_there_is_one_of_its_name(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets" / "known").mkdir(parents=True)
    for name, place in {"sets/known": f"{tmp_path}/sets/known", "hub/other": "hub/other"}.items():
        config = TrainConfig(**load_recipe("digits") | {"data": f"{family}/{name}", "output": name.replace("/", "-")})
        written = yaml.safe_load((RunFolder(config).path / CONFIG_FILE).read_text())
        assert written["data"] == f"{family}/{place}"


def test_the_configuration_lies_above_the_folder_of_checkpoints(tmp_path):
    for place in ("last.pth.tar", "checkpoints/epoch-1.pth.tar"):
        assert config_beside(tmp_path / place) == tmp_path / CONFIG_FILE


def test_a_new_folder_is_named_by_time_model_and_method_and_is_no_other_run_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    names = [RunFolder(TrainConfig(**load_recipe("digits"), output=None)).path.name for _ in range(3)]
    assert names == [f"now-vit_tiny_patch16_224-cutmix+tl-align{end}" for end in ("", "-2", "-3")]
