"""Curves of runs over their epochs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlalign.runs import EpochRecord, written_whole

# The colours of Okabe and Ito, which differ in lightness too.
_COLOURS = ("#0072b2", "#d55e00", "#000000", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v")
# Parts of a step: name, colour and pattern of its area.
_PARTS = (("data", "#f0e442", "//"), ("forward", "#56b4e9", ""), ("backward", "#0072b2", ".."))
# Lines of more epochs show no marker at each.
_MOST_MARKERS = 30


def draw_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Draws loss, top-1, learning rate, change of the mixing ratio and times of a run.

    Args:
        records: Rows of its log, at least one.
        path: PNG file to write.

    Raises:
        OSError: If it can't be written.
    """
    aligns = any(record.ratio_change is not None for record in records)
    figure = Figure(figsize=(12, 7), layout="constrained")
    rows = [["loss"] * 3 + ["top1"] * 3, ["lr"] * 2 + ["ratio"] * 2 + ["time"] * 2]
    axes = figure.subplot_mosaic(rows if aligns else [rows[0], ["lr"] * 3 + ["time"] * 3])
    _draw_lines(axes["loss"], records, {"training": "loss", "held-out": "eval_loss"})
    axes["loss"].set_ylabel("loss (nats)")
    _draw_lines(axes["top1"], records, {"model": "top1", "average (EMA)": "top1_ema"})
    axes["top1"].set_ylabel("top-1, held-out images (%)")
    _draw_lines(axes["lr"], records, {"": "lr"})
    axes["lr"].set_ylabel("learning rate")
    if aligns:
        _draw_lines(axes["ratio"], records, {"": "ratio_change"})
        axes["ratio"].set_ylabel("mean |aligned - original| mixing ratio")
    _draw_times(axes["time"], records)
    _finish(axes.values(), len(records))
    _save(figure, path)


def draw_comparison(runs: Mapping[str, Sequence[EpochRecord]], path: Path) -> None:
    """Draws top-1 and loss of several runs over each other.

    Args:
        runs: Rows of the log of each run, by its name.
        path: PNG file to write.

    Raises:
        OSError: If it can't be written.
    """
    figure = Figure(figsize=(15, 5 + 0.22 * len(runs)), layout="constrained")
    axes = figure.subplots(1, 3)
    # Numbers of colours, lines and markers without a common divisor: a combination comes again after 140 runs.
    styles = zip(itertools.cycle(_COLOURS), itertools.cycle(_LINES), itertools.cycle(_MARKERS), strict=False)
    panels = {
        "metric": "top-1, held-out images (%)",
        "loss": "training loss (nats)",
        "eval_loss": "held-out loss (nats)",
    }
    legend = {}
    for (name, records), (colour, line, marker) in zip(runs.items(), styles, strict=False):
        epochs = [record.epoch for record in records]
        # Names of folders need not be UTF-8, and between dollars would stand a formula.
        name = name.encode(errors="replace").decode().replace("$", r"\$")
        for axis, field in zip(axes, panels, strict=True):
            values = [getattr(record, field) for record in records]
            every = max(1, len(epochs) // _MOST_MARKERS)
            style = {"color": colour, "linestyle": line, "marker": marker, "markevery": every, "ms": 4}
            (handle,) = axis.plot(epochs, values, **style)
        # As labels of the lines matplotlib would hide names that begin with "_".
        legend[name] = handle
    for axis, label in zip(axes, panels.values(), strict=True):
        axis.set_ylabel(label)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, handlelength=4)
    _finish(axes, max(len(records) for records in runs.values()))
    _save(figure, path)


def draw_methods(top1: Mapping[str, Sequence[float]], relative_times: Mapping[str, float | None], path: Path) -> None:
    """Draws what methods reach with several seeds, and what they cost.

    Args:
        top1: Top-1 (per cent) of the runs of each method, by its name.
        relative_times: Time of a step without the wait for images relative to that of CutMix, by the same names; None
            where it is not known.
        path: PNG file to write.

    Raises:
        OSError: If it can't be written.
    """
    figure = Figure(figsize=(11, 1.5 + 0.4 * len(top1)), layout="constrained")
    knows_times = any(time is not None for time in relative_times.values())
    axes = figure.subplots(1, 1 + knows_times, sharey=True, width_ratios=(2, 1)[: 1 + knows_times], squeeze=False)[0]
    accuracy = axes[0]
    for row, values in enumerate(top1.values()):
        accuracy.plot(values, [row] * len(values), "o", color=_COLOURS[0], alpha=0.4, mec="none", label="a seed")
        spread = np.std(values, ddof=1) if len(values) > 1 else None
        style = {"fmt": "|", "color": _COLOURS[2], "ms": 14, "capsize": 4, "label": "mean, standard deviation"}
        accuracy.errorbar(np.mean(values), row, xerr=spread, **style)
    accuracy.set_xlabel("top-1, held-out images (%)")
    accuracy.set_yticks(range(len(top1)), list(top1))
    accuracy.set_ylim(len(top1) - 0.5, -0.5)
    for time in axes[1:]:
        for row, name in enumerate(top1):
            if relative_times[name] is not None:
                bar = time.barh(row, relative_times[name], height=0.6, color=_COLOURS[6])
                time.bar_label(bar, fmt="%.2f", label_type="center")
        time.axvline(1.0, color=_COLOURS[2], linewidth=1, zorder=0)
        time.set_xlabel("time of a step without data,\nrelative to CutMix")
    for axis in axes:
        axis.grid(alpha=0.3)
    handles, names = accuracy.get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))
    figure.legend(by_name.values(), by_name.keys(), loc="outside lower left", ncols=2)
    _save(figure, path)


def _draw_lines(axis: Axes, records: Sequence[EpochRecord], fields: Mapping[str, str]) -> None:
    marked = len(records) <= _MOST_MARKERS
    for (name, field), colour, line, marker in zip(fields.items(), _COLOURS, _LINES, _MARKERS, strict=False):
        points = [(record.epoch, getattr(record, field)) for record in records if getattr(record, field) is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True), color=colour, linestyle=line, marker=marker if marked else "", label=name
            )
    if len(fields) > 1:
        axis.legend(handlelength=4)


def _draw_times(axis: Axes, records: Sequence[EpochRecord]) -> None:
    """Stacks the parts of a step: of each epoch a column, which shows a single epoch too."""
    edges = [record.epoch - 0.5 for record in records] + [records[-1].epoch + 0.5]
    top = np.zeros(len(records))
    for name, colour, pattern in _PARTS:
        below, top = top, top + [1000 * getattr(record, f"{name}_seconds") for record in records]
        axis.stairs(top, edges, baseline=below, fill=True, facecolor=colour, hatch=pattern, label=name)
    axis.set_ylabel("mean time of a step (ms)")
    # Room for the legend.
    axis.set_ylim(0, 1.2 * top.max() or None)
    axis.legend(ncols=len(_PARTS), columnspacing=1.0, handlelength=1.5, loc="upper center")


def _finish(axes: Iterable[Axes], epochs: int) -> None:
    margin = max(0.5, 0.02 * epochs)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.set_xlim(1 - margin, epochs + margin)
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
