"""Turns the JSON of pytest-benchmark into one page with its pictures, or runs the benchmarks first and zips it all.

pytest benchmarks/ --benchmark-only --benchmark-json=results.json
python -m benchmarks.report results.json [counts.json] [--output FOLDER]
python -m benchmarks.report --run [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

ROOT = Path(__file__).parents[1]
COUNTS = Path(__file__).parent / "results" / "counts.json"  # made without a GPU: the same on any machine
PAPER = (
    "The paper's Table 2 has 1.24 times the training time of CutMix for TL-Align, on its GPUs and with its code: "
    "quoted, not compared."
)
STEP, ONEDNN_STEP = "training step", "training step, oneDNN"
LEVELS = {
    "operator, forward": "Operator, forward",
    "operator, forward and backward": "Operator, forward and backward",
    "goals": "Goals of the CPU kernels",
    "block": "Block, forward and backward",
    STEP: "Training step",
    ONEDNN_STEP: "Training step, products by oneDNN",
    "peak memory": "Peak memory of a training step",
    "mixing and loss": "From pixels to the loss, without a network",
    **{f"growth with {axis}": f"Growth with {name}" for axis, name in (
        ("N", "tokens"), ("B", "images"), ("C", "classes"), ("S", "sources")
    )},
}  # fmt: skip
PLAIN, FUSED, OFFICIAL = "plain CutMix", "plain CutMix, fused", "official way"
MATRIX_PRODUCT = "matrix product"  # no peer, but what bounds all of them
WRONG = ("wrong: ", "fails: ")  # how a reason to leave one out starts that should not be
PICTURES = ("speed.png", "growth.png", "steps.png")
# What `--run` writes and packs.
SENT = ("environment.txt", "benchmarks.txt", "results.json", "report.md", *PICTURES)
FASTER = "◀"  # stands beside a ratio below 1
HOW = """Each row is one race: in every round all run once, one after another, in random order. A cell has the time of
one of them over that of ours, labels on: the median over rounds of the ratio within a round, ± half the distance of its
quartiles. Above 1 ours is faster, below 1, marked {faster}, the peer; the best peer is bold. Times of ours are medians
with quartiles. Peak memory is measured once, over two steps: on a GPU with model and batch, on a CPU what comes on top.
A training step is forward, loss and backward of a mixed batch, without mixing and without the optimiser, its products
PyTorch's default ones; where `tlalign train` has PyTorch take oneDNN's, steps with these follow. On a GPU, rows of some
tens of microseconds with wide quartiles are limited by the host that launches kernels.

Before they are timed, operators are held against a float64 reference (output, labels, all gradients), blocks too (of
gradients that of the tokens), training steps in float32 on two images (logits, loss, labels, gradient of the first
weights), mixing by its loss; what is wrong or does not run is listed.

- **SDPA**, **eager**, **FlexAttention**, **FlashAttention** compute no labels at all.
- **ours**: all backends but `reference`, which keeps the attention matrix as **materialised, share** does.
- **+ column**: the share stands as a further column of V, and is averaged over the heads.
- **materialised**: the attention matrix is kept, and its mean over the heads multiplied with the share of a pair, or
  with labels of 1000 classes (where costs grow with classes, of so many), as the official code does. **compiled**: the
  same by `torch.compile`.
- **matrix product**: as many multiplications as attention cannot do without, in one product: ours reaches so much of
  its rate.
- **plain CutMix**: timm's model as it is, with the mixing ratio as target. timm's Swin attends eagerly unless it is
  told otherwise: **fused** is the same with SDPA. **official way**: timm's model with materialised attention and labels
  of 1000 classes.
"""


@dataclass(frozen=True)
class Row:
    """A race: all times by name, in seconds, round by round; for memory a number of bytes."""

    level: str
    name: str
    ours: str
    values: dict[str, list[float]]
    left_out: dict[str, str]
    value: float | None = None  # where costs grow with something, how much of it there is
    goal: float | None = None  # what the ratio of the best peer is to be

    @property
    def peers(self) -> list[str]:
        """What people would use in place of ours."""
        return [name for name in self.values if not name.startswith("ours") and name != MATRIX_PRODUCT]

    @property
    def best_peer(self) -> str | None:
        """The fastest one."""
        return min(self.peers, key=lambda name: self.ratio(name)[1], default=None)

    def ratio(self, name: str, over: str | None = None) -> tuple[float, float, float]:
        """Quartiles of the ratio to ours, or to another one, within a round."""
        pairs = zip(self.values[name], self.values[over or self.ours], strict=True)
        return quartiles([value / other for value, other in pairs])

    @property
    def faster_peers(self) -> list[str]:
        """Peers of which the median ratio is below 1."""
        return [name for name in self.peers if self.ratio(name)[1] < 1]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third one."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def read(paths: Iterable[Path]) -> tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]:
    """Races, tables of counts, and what the files say of where and when they were made."""
    rows, counts, origins = [], [], []
    for path in paths:
        document = _document(path)
        has_races = False
        for benchmark in document["benchmarks"]:
            extra = benchmark["extra_info"]
            if extra.get("level") == "counts":
                counts.append(extra)
            elif "level" in extra:
                values = extra.get("seconds") or {name: [bytes_] for name, bytes_ in extra["bytes"].items()}
                more = {name: extra.get(name) for name in ("value", "goal")}
                rows.append(Row(extra["level"], extra["row"], extra["ours"], values, extra["left_out"], **more))
                has_races = True
        if has_races:
            origins.append(document)
    if not rows and not counts:
        raise SystemExit(f"{', '.join(map(str, paths))}: expected results of these benchmarks, got none")
    return rows, counts, origins


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: expected the JSON of pytest-benchmark ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise SystemExit(f"{path}: expected the JSON of pytest-benchmark, got another")
    return document


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def cell(row: Row, name: str) -> str:
    """A ratio to ours with its spread, bold for the best peer, marked where a peer is faster."""
    if name not in row.values:
        return "-"
    first, median, third = row.ratio(name)
    text = f"{median:.2f} ± {(third - first) / 2:.2f}" if third > first else f"{median:.3f}"
    text = f"**{text}**" if name == row.best_peer else text
    return f"{text} {FASTER}" if name in row.faster_peers else text


def amount(values: list[float], level: str) -> str:
    """Median and quartiles in milliseconds or seconds, or in MB or GB."""
    if level == "peak memory":
        factor, unit = (1e-6, "MB") if min(values) < 1e9 else (1e-9, "GB")
    else:
        factor, unit = (1e3, "ms") if min(values) < 1 else (1, "s")
    first, median, third = (f"{factor * value:.3g}" for value in quartiles(values))
    return f"{median} {unit}" + (f" ({first} to {third})" if first != third else "")


def columns(rows: list[Row]) -> list[str]:
    """All names but ours, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row.values if name != row.ours))


def level_table(rows: list[Row]) -> str:
    names = columns(rows)
    body = []
    for row in rows:
        goal = [] if row.goal is None else [f"{row.goal:g}"]
        cells = [cell(row, name) for name in names]
        body.append([row.name, amount(row.values[row.ours], row.level), *goal, *cells])
    ours = rows[0].ours if len({row.ours for row in rows}) == 1 else "ours"
    return table(["", ours, *([] if rows[0].goal is None else ["goal of the best peer"]), *names], body)


def left_out(rows: list[Row]) -> str:
    """What did not take part, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.left_out.items():
            reasons.setdefault((name, reason), []).append(row.name)
    lines = []
    for (name, reason), where in reasons.items():
        places = "all rows" if len(where) == len(rows) else f"{len(where)} rows" if len(where) > 3 else "; ".join(where)
        lines.append(f"- {name}: {reason} ({places})")
    return "Left out:\n\n" + "\n".join(lines) + "\n" if lines else ""


def faster_list(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for name in row.faster_peers:
            first, median, third = row.ratio(name)
            spread = f"({first:.2f} to {third:.2f})" + (", within the spread" if third >= 1 else "")
            numbers = f"{median:.3f}" if first == third else f"{median:.2f} {spread}"
            lines.append(f"- {LEVELS.get(row.level, row.level)}, {row.name}: {name} {numbers}")
    return "\n".join(lines) + "\n" if lines else "In no row.\n"


def headline(rows: list[Row]) -> str:
    """What the page is asked for first, computed from its rows."""
    lines = []
    labels = [
        row.ratio(row.ours, f"{row.ours}, no labels")[1]
        for row in rows
        if row.level.startswith("operator") and f"{row.ours}, no labels" in row.values
    ]
    if labels:
        percent = [100 * (ratio - 1) for ratio in labels]
        lines.append(
            f"- **Labels on against off**, our own operator: {statistics.median(percent):+.1f} % of the time in the "
            f"median of {len(percent)} rows, {min(percent):+.1f} to {max(percent):+.1f} %."
        )
    for level in ("operator, forward", "operator, forward and backward"):
        of_level = [row for row in rows if row.level == level and row.peers]
        if of_level:
            best = [row.ratio(row.best_peer)[1] for row in of_level]
            lines.append(
                f"- **{LEVELS[level]}**, labels on, against the best peer of each row: {statistics.median(best):.2f} "
                f"times as fast in the median, {min(best):.2f} to {max(best):.2f}; faster in "
                f"{sum(ratio > 1 for ratio in best)} of {len(best)} rows."
            )
    goals = [row for row in rows if row.goal is not None and row.peers]
    if goals:
        met = [row.name for row in goals if row.ratio(row.best_peer)[1] >= row.goal]
        lines.append(
            f"- **Goals of the CPU kernels** met in {len(met)} of {len(goals)} rows: {'; '.join(met) or 'none'}."
        )
    blamed = [
        f"{name} ({LEVELS.get(row.level, row.level)}, {row.name}: {reason})"
        for row in rows
        for name, reason in row.left_out.items()
        if reason.startswith(WRONG)
    ]
    if blamed:
        lines.append(f"- **Not timed, as it is wrong or fails**: {'; '.join(blamed)}.")
    steps = [row for row in rows if row.level in (STEP, ONEDNN_STEP)]
    for level, products in ((STEP, ""), (ONEDNN_STEP, ", products by oneDNN")):
        for peer, title in ((OFFICIAL, "the official way"), (PLAIN, PLAIN), (FUSED, FUSED)):
            found = [
                "{0} **{2:.2f}** ({1:.2f} to {3:.2f})".format(row.name, *row.ratio(row.ours, peer))
                for row in steps
                if row.level == level and peer in row.values
            ]
            if found:
                lines.append(f"- **A training step of ours over {title}**{products}, in time: {'; '.join(found)}.")
    if steps:
        lines.append(f"- {PAPER}")
    return "".join(f"{line}\n" for line in lines)


def summary(rows: list[Row]) -> str:
    """A row for each shape of the operator: against SDPA and against the best peer."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.level.startswith("operator") and row.peers:
            by_name.setdefault(row.name, {})[row.level] = row
    if not by_name:
        return ""
    head, body = [""], []
    for direction in ("forward", "forward and backward"):
        head += [f"{direction}: SDPA", "SDPA + column", "official way", "best peer"]
    for name, levels in by_name.items():
        line = [name]
        for direction in ("forward", "forward and backward"):
            row = levels.get(f"operator, {direction}")
            for peer in ("SDPA", "SDPA + column", "materialised, classes"):
                line.append(f"{row.ratio(peer)[1]:.2f}" if row and peer in row.values else "-")
            best = row and row.ratio(row.best_peer)[1]
            line.append(f"**{best:.2f}** {row.best_peer}{f' {FASTER}' if best < 1 else ''}" if row else "-")
        body.append(line)
    return table(head, body)


def commit(info: dict[str, Any]) -> str:
    return info.get("id", "?")[:12] + (", with changes that are not committed" if info.get("dirty") else "")


def environment(origins: list[dict[str, Any]]) -> str:
    lines = []
    for document in origins:
        machine = document["machine_info"]
        cpu = machine.get("cpu", {})
        about = {
            "date": document["datetime"][:10],
            "commit": commit(document.get("commit_info", {})),
            "CPU": f"{cpu.get('brand_raw', '?')}, {cpu.get('count', '?')} cores, {machine.get('cpu_capability', '?')}",
            "threads": machine.get("threads", "?"),
            "Python": machine.get("python_version", "?"),
            **machine.get("versions", {}),
            **{f"GPU {name}": value for name, value in machine.get("gpu", {}).items()},
        }
        lines.append(table(["", ""], [[name, value] for name, value in about.items()]))
    return "\n".join(lines)


def write(paths: list[Path], output: Path) -> Path:
    """Writes `report.md` and its pictures into a folder."""
    rows, counts, origins = read(paths)
    output.mkdir(parents=True, exist_ok=True)
    pictures = draw(rows, output)
    parts = ["# Benchmarks\n", environment(origins)]
    if lines := headline(rows):
        parts += ["## In short\n", lines]
    parts += [f"![{title}]({path.name})\n" for title, path in pictures.items()]
    parts += [summary(rows), "## How to read the tables\n", HOW.format(faster=FASTER)]
    for level in dict.fromkeys([*LEVELS, *(row.level for row in rows)]):
        of_level = [row for row in rows if row.level == level]
        if of_level:
            parts += [f"## {LEVELS.get(level, level)}\n", level_table(of_level), left_out(of_level)]
    parts += [
        "## Where others are faster\n",
        "Their part of the time (memory: of the bytes) of ours, with quartiles.\n",
        faster_list(rows),
    ]
    if counts:
        parts += [
            "## Counts, not times\n",
            "Of compiled code, made without a GPU: what it holds, executes and moves.\n",
        ]
    for each in counts:
        parts += [f"### {each['title']}\n", table(each["head"], each["rows"]), *(f"{note}\n" for note in each["notes"])]
    page = output / "report.md"
    page.write_text("\n".join(part for part in parts if part))
    return page


def draw(rows: list[Row], output: Path) -> dict[str, Path]:
    """Draws what there are rows for; returns the pictures by title."""
    drawn = {}
    pictures = (
        ("Time of each peer over ours", ("operator, ", "block"), draw_ratios),
        ("How cost grows", ("growth",), draw_growth),
        ("Time and memory of a training step", (STEP, "peak memory"), draw_steps),
    )
    for name, (title, of_levels, draw_them) in zip(PICTURES, pictures, strict=True):
        of_picture = [row for row in rows if row.level.startswith(of_levels)]
        if of_picture:
            draw_them(of_picture).savefig(output / name, dpi=120)
            drawn[title] = output / name
    return drawn


def draw_ratios(rows: list[Row]) -> Figure:
    """A point for each peer of each row, left of the line where the peer is faster."""
    levels = list(dict.fromkeys(row.level for row in rows))
    heights = [sum(row.level == level for row in rows) for level in levels]
    figure = Figure(figsize=(11, 1.6 + 0.3 * sum(heights) + 0.5 * len(levels)), layout="constrained")
    axes = figure.subplots(len(levels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    styles = {
        name: dict(color=f"C{index % 10}", marker="osD^vPX<>*ph8d"[index % 14])
        for index, name in enumerate(dict.fromkeys(name for row in rows for name in row.peers))
    }
    for axis, level in zip(axes, levels, strict=True):
        of_level = [row for row in rows if row.level == level][::-1]
        for height, row in enumerate(of_level):
            for index, name in enumerate(row.peers):
                first, median, third = row.ratio(name)
                # A little apart, or one would hide another.
                y = height + 0.5 * (0.5 - (index + 0.5) / len(row.peers))
                axis.plot([first, third], [y, y], color=styles[name]["color"], linewidth=1)
                axis.plot(median, y, markersize=5, **styles[name])
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(of_level)), [row.name for row in of_level], fontsize=8)
        axis.set_ylim(-0.6, len(of_level) - 0.4)
        axis.set_title(LEVELS.get(level, level), fontsize=10, loc="left")
        axis.set_xscale("log")
        axis.grid(alpha=0.3, which="both", axis="x")
    low, high = axes[-1].get_xlim()
    for axis in axes:
        axis.set_xlim(min(low, 0.8), high)
        axis.axvspan(axis.get_xlim()[0], 1, color="red", alpha=0.08, linewidth=0)
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if min(low, 0.8) <= tick <= high]
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("time of the peer over that of ours, labels on (red: the peer is faster)")
    for name, style in styles.items():
        axes[0].plot([], [], linestyle="", label=name, **style)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
    return figure


def draw_growth(rows: list[Row]) -> Figure:
    """Time against what grows, both on logarithmic axes."""
    levels = list(dict.fromkeys(row.level for row in rows))
    figure = Figure(figsize=(11, 4.2 * -(-len(levels) // 2) + 0.6), layout="constrained")
    axes = figure.subplots(-(-len(levels) // 2), 2, squeeze=False).flat
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    for axis, level in zip(axes, levels, strict=False):
        of_level = sorted((row for row in rows if row.level == level), key=lambda row: row.value)
        for index, name in enumerate(names):
            points = [(row.value, 1e3 * statistics.median(row.values[name])) for row in of_level if name in row.values]
            style = dict(color="black", linewidth=2) if name == of_level[0].ours else dict(color=f"C{index}")
            axis.loglog(*zip(*points, strict=True), marker="osD^vPX"[index % 7], markersize=5, label=name, **style)
        axis.set_xticks([row.value for row in of_level], [f"{row.value:g}" for row in of_level])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_title(LEVELS.get(level, level), fontsize=10, loc="left")
        axis.set(xlabel=level.rpartition(" ")[2], ylabel="ms, forward and backward")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    for axis in figure.axes[len(levels) :]:
        axis.set_axis_off()
    return figure


def draw_steps(rows: list[Row]) -> Figure:
    """Bars over plain CutMix, which is 1."""
    levels = list(dict.fromkeys(row.level for row in rows))
    figure = Figure(figsize=(max(11, 5 * len(levels)), 4), layout="constrained")
    axes = figure.subplots(1, len(levels), squeeze=False)[0]
    for axis, level in zip(axes, levels, strict=True):
        of_level = [row for row in rows if row.level == level and PLAIN in row.values]
        names = [name for name in columns(of_level) if name != PLAIN]
        names = [of_level[0].ours, *names] if of_level else []
        for index, name in enumerate(names):
            found = [(place, row.ratio(name, PLAIN)) for place, row in enumerate(of_level) if name in row.values]
            for place, (first, median, third) in found:
                x = place + 0.27 * (index - (len(names) - 1) / 2)
                errors = [[median - first], [third - median]]
                label = name if place == found[0][0] else None
                axis.bar(x, median, 0.25, yerr=errors, capsize=3, color=f"C{index}", label=label)
                box = dict(facecolor="white", edgecolor="none", pad=0.5, alpha=0.8)
                axis.text(x, third + 0.02, f"{median:.2f}", ha="center", va="bottom", fontsize=9, bbox=box)
        axis.axhline(1, color="black", linewidth=1)
        # A model's name without its sizes, and the batch.
        names = [
            "\n".join((row.name.partition(":")[0].partition("_patch")[0], *row.name.rpartition(": ")[2].split(", ")))
            for row in of_level
        ]
        axis.set_xticks(range(len(of_level)), names, fontsize=8)
        axis.set_title(f"{LEVELS.get(level, level)} (plain CutMix = 1)", fontsize=10, loc="left")
        axis.margins(y=0.12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    return figure


def run(output: Path) -> Path:
    """Runs the benchmarks on the device that is there and zips their report, with all that tells what it is of.

    Raises:
        SystemExit: If no benchmark has a result.
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.json"
    # Of an earlier run: the archive is to hold nothing else than this one's.
    for name in SENT:
        (output / name).unlink(missing_ok=True)
    for name, command in {
        "environment.txt": ["-m", "tlalign_kernels"],
        "benchmarks.txt": ["-m", "pytest", "benchmarks/", "--benchmark-only", f"--benchmark-json={results}"],
    }.items():
        with (output / name).open("w") as log:
            print(f"writing {output / name} ...", flush=True)
            # One that fails costs its own part of the report, no more.
            subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    if results.exists():
        write([results, *([COUNTS] if COUNTS.exists() else [])], output)
    archive = output.with_name(f"{output.name}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in SENT:
            if (output / name).exists():
                packed.write(output / name, name)
    if not results.exists():
        raise SystemExit(f"no benchmark has a result; benchmarks.txt in {archive} says why")
    return archive


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON that pytest-benchmark wrote")
    parser.add_argument("--run", action="store_true", help="run the benchmarks first, and zip the folder")
    parser.add_argument("--output", type=Path, help="folder; by default that of the first JSON, or benchmark-report")
    chosen = parser.parse_args(arguments)
    if chosen.run == bool(chosen.results):
        parser.error("expected either --run or JSON files")
    if chosen.run:
        print(run(chosen.output or Path("benchmark-report")))
    else:
        try:
            print(write(chosen.results, chosen.output or chosen.results[0].parent))
        except (KeyError, TypeError) as error:
            files = ", ".join(map(str, chosen.results))
            raise SystemExit(f"{files}: expected results of these benchmarks ({error!r})") from error


if __name__ == "__main__":
    main()
