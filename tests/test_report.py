"""The report of the benchmarks, from made-up results whose numbers are worked out here by hand."""

import json
import zipfile
from pathlib import Path

import pytest

from benchmarks import report

OURS, NONE = "ours (cpu)", "ours (cpu), no labels"


def race(level, row, seconds, left_out=None, ours=OURS, **more):
    extra = {"level": level, "row": row, "ours": ours, "seconds": seconds, "left_out": left_out or {}, **more}
    return {"extra_info": extra}


# Ratios of SDPA round by round are 2, 3 and 4; those of eager 0.5, 0.5 and 1.
FORWARD = race(
    "operator, forward",
    "DeiT-X",
    {
        OURS: [0.001, 0.002, 0.001],
        NONE: [0.0009, 0.0018, 0.0009],
        "SDPA": [0.002, 0.006, 0.004],
        "eager": [0.0005, 0.001, 0.001],
    },
    {"FlexAttention": "has no backward on the CPU", "compiled, share": "wrong: its share is off by 0.5"},
)
STEP = race(
    "training step",
    "deit_x: B=2, float32",
    {"ours": [0.9, 0.8, 1.8], "plain CutMix": [1.0, 1.0, 2.0], "official way": [1.8, 1.2, 2.7]},
    ours="ours",
)
ONEDNN_STEP = race(
    "training step, oneDNN",
    "deit_x: B=2, float32",
    {"ours": [0.4, 0.2, 0.8], "plain CutMix": [0.5, 0.5, 1.0]},
    ours="ours",
)
MEMORY = {
    "extra_info": {
        "level": "peak memory", "row": "deit_x: B=2", "ours": "ours", "left_out": {},
        "bytes": {"ours": 50_000_000, "plain CutMix": 40_000_000, "official way": 75_000_000},
    }
}  # fmt: skip
GROWTH = [race("growth with N", f"N={n}", {OURS: [n * 1e-5] * 3, "SDPA": [n * 2e-5] * 3}, value=n) for n in (50, 197)]
COUNTS = {
    "extra_info": {
        "level": "counts", "title": "Registers", "head": ["kernel", "registers"], "rows": [["forward", "128"]],
        "notes": ["None is spilled."],
    }
}  # fmt: skip
ALIEN = {"extra_info": {}}  # a benchmark that is none of ours
MACHINE = {
    "cpu": {"brand_raw": "A processor", "count": 2}, "threads": 2, "python_version": "3.11",
    "versions": {"torch": "2.9"}, "gpu": {"name": "A GPU", "driver_version": "1.2"},
}  # fmt: skip


def page_of(folder, benchmarks):
    path = folder / "results.json"
    document = {"benchmarks": benchmarks, "machine_info": MACHINE, "datetime": "2026-01-02T03:04:05"}
    path.write_text(json.dumps(document))
    return report.write([path], folder / "out").read_text()


def cells(page, start):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def section(page, title):
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("report"), [FORWARD, STEP, ONEDNN_STEP, MEMORY, *GROWTH, COUNTS, ALIEN])


def test_cells_are_medians_of_ratios_within_rounds(page):
    # Quartiles of 2, 3, 4 are 2.5 and 3.5; of 0.5, 0.5, 1: 0.5 and 0.75; of 1, 1, 2 ms: 1 and 1.5.
    of_row = cells(section(page, "Operator, forward"), "DeiT-X")
    assert of_row == ["DeiT-X", "1 ms (1 to 1.5)", "0.900", "3.00 ± 0.50", "**0.50 ± 0.12** ◀"]
    assert cells(section(page, "Peak memory of a training step"), "deit_x: B=2")[1:] == [
        "50 MB",
        "**0.800** ◀",
        "1.500",
    ]


def test_every_faster_peer_is_listed_and_no_other(page):
    listed = [line for line in section(page, "Where others are faster").splitlines() if line.startswith("- ")]
    assert listed == [
        "- Operator, forward, DeiT-X: eager 0.50 (0.50 to 0.75)",
        "- Peak memory of a training step, deit_x: B=2: plain CutMix 0.800",
    ]


def test_headline_is_computed_from_the_rows(page):
    headline = section(page, "In short")
    assert "+11.1 % of the time in the median of 1 rows" in headline  # 1 / 0.9
    assert "0.50 times as fast in the median, 0.50 to 0.50; faster in 0 of 1 rows" in headline
    # Ours over the official way: 0.5, 0.667 and 0.667; over plain CutMix: 0.9, 0.8 and 0.9.
    assert "over the official way**, in time: deit_x: B=2, float32 **0.67** (0.58 to 0.67)." in headline
    assert "over plain CutMix**, in time: deit_x: B=2, float32 **0.90** (0.85 to 0.90)." in headline
    assert "over plain CutMix**, products by oneDNN, in time: deit_x: B=2, float32 **0.80** (0.60 to 0.80)." in headline
    assert "1.24 times" in headline


def test_what_was_left_out_is_named_with_its_reason(page):
    operator = section(page, "Operator, forward")
    assert "- compiled, share: wrong: its share is off by 0.5 (all rows)" in operator
    assert "- FlexAttention: has no backward on the CPU (all rows)" in operator
    # Only what should not be is told at the top.
    (line,) = [line for line in section(page, "In short").splitlines() if "Not timed" in line]
    assert "compiled, share (Operator, forward, DeiT-X: wrong: its share is off by 0.5)" in line
    assert "FlexAttention" not in line


def test_counts_stand_apart(page):
    assert "| forward | 128 |" in section(page, "Counts, not times")
    assert "None is spilled." in section(page, "Counts, not times")


def test_the_environment_is_told(page):
    for part in ("A processor, 2 cores", "| torch | 2.9 |", "| GPU driver_version | 1.2 |", "2026-01-02"):
        assert part in page


def test_pictures_are_drawn_and_shown(page, tmp_path):
    page_of(tmp_path, [FORWARD, STEP, ONEDNN_STEP, MEMORY, *GROWTH])
    for name in ("speed.png", "growth.png", "steps.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
        assert f"({name})" in page


@pytest.mark.parametrize("benchmarks", [[FORWARD], [STEP], [ONEDNN_STEP], [MEMORY], GROWTH, [COUNTS]])
def test_levels_that_are_missing_are_left_out(tmp_path, benchmarks):
    page = page_of(tmp_path, benchmarks)
    assert section(page, "Where others are faster")
    assert ("## Training step\n" in page) == (benchmarks == [STEP])


def test_goals_are_held_against_the_best_peer_and_a_matrix_product_is_none(tmp_path):
    others = {"SDPA": [4e-3] * 3, "eager": [3e-3] * 3, "matrix product": [5e-4] * 3}
    rows = [race("goals", name, {OURS: [1e-3] * 3, **others}, goal=goal) for name, goal in (("a", 2.5), ("b", 3.5))]
    page = page_of(tmp_path, rows)
    assert cells(page, "a") == ["a", "1 ms", "2.5", "4.000", "**3.000**", "0.500"]
    assert "- **Goals of the CPU kernels** met in 1 of 2 rows: a.\n" in page
    assert "In no row." in section(page, "Where others are faster")


def test_a_race_that_ours_wins_is_not_listed(tmp_path):
    assert "In no row." in page_of(tmp_path, GROWTH)


def test_run_zips_what_there_is_even_if_the_benchmarks_fail(tmp_path, monkeypatch):
    def run(command, stdout, **options):
        stdout.write("said")
        (option,) = [part for part in command if "--benchmark-json=" in part] or [None]
        if option:
            Path(option.partition("=")[2]).write_text(
                json.dumps({"benchmarks": [STEP], "machine_info": MACHINE, "datetime": "2026-01-02T03:04:05"})
            )

    monkeypatch.setattr(report.subprocess, "run", run)
    foreign = tmp_path / "sent" / "holiday.png"
    foreign.parent.mkdir()
    foreign.touch()
    archive = report.run(tmp_path / "sent")
    assert foreign.exists() and foreign.name not in zipfile.ZipFile(archive).namelist()
    assert archive == tmp_path / "sent.zip"
    names = set(zipfile.ZipFile(archive).namelist())
    assert {"report.md", "results.json", "steps.png", "environment.txt", "benchmarks.txt"} <= names

    monkeypatch.setattr(report.subprocess, "run", lambda command, stdout, **options: stdout.write("failed"))
    with pytest.raises(SystemExit, match=r"no benchmark has a result; benchmarks.txt in .*sent\.zip says why"):
        report.run(tmp_path / "sent")  # not those of the run before
    assert {"environment.txt", "benchmarks.txt"} <= set(zipfile.ZipFile(archive).namelist())


@pytest.mark.parametrize("text", [None, "", "{}", "[]", "no JSON", '{"benchmarks": {}}'])
def test_what_is_no_result_of_a_benchmark_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"results\.json: expected the JSON of pytest-benchmark"):
        report.main([str(path)])


def test_results_that_lack_something_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"benchmarks": [{}]}')
    with pytest.raises(
        SystemExit, match=r"results\.json: expected results of these benchmarks \(KeyError\('extra_info'"
    ):
        report.main([str(tmp_path / "results.json")])


def test_bytes_and_commits_are_told():
    assert report.amount([4.68e9], "peak memory") == "4.68 GB"
    assert report.amount([4.68e8], "peak memory") == "468 MB"
    assert report.commit({"id": "0123456789abcdef", "dirty": False}) == "0123456789ab"
    assert (
        report.commit({"id": "0123456789abcdef", "dirty": True}) == "0123456789ab, with changes that are not committed"
    )


@pytest.mark.parametrize("benchmarks", [[], [ALIEN]], ids=len)
def test_a_page_of_nothing_is_refused(tmp_path, benchmarks):
    with pytest.raises(SystemExit, match="expected results of these benchmarks, got none"):
        page_of(tmp_path, benchmarks)


def test_the_command_line_wants_results_or_a_run(capsys, tmp_path):
    for arguments in ([], ["--run", "results.json"]):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert "expected either --run or JSON files" in capsys.readouterr().err
    page_of(tmp_path, [STEP])
    report.main([str(tmp_path / "results.json")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
