"""Charts of the analyses, each narrow enough for a phone; lines differ by marker and dash as well as by colour."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from tlalign.analysis.presence import QUANTILES, PresenceOfLayer, quantiles
from tlalign.analysis.ratios import MixingRatios, TokenPaths
from tlalign.analysis.rollout import Rollout
from tlalign.analysis.subject import RANDOM

# Colours of Okabe and Ito, which most colour-blind readers tell apart.
_CUTMIX = {"color": "#7f7f7f", "linestyle": "--", "label": "CutMix"}
_TRANSMIX = {"color": "#e69f00", "linestyle": ":", "marker": "^", "label": "TransMix"}
_ALIGNED = {"color": "#0072b2", "linestyle": "-", "marker": "o", "label": "TL-Align"}
_REFERENCE = {"color": "black", "linestyle": "-.", "marker": "s", "markerfacecolor": "white", "label": "by similarity"}
_STYLES = {style["label"]: style for style in (_CUTMIX, _TRANSMIX, _ALIGNED, _REFERENCE)}
_KEPT = {"color": "#7f7f7f", "linestyle": "--", "label": "as before"}
# What matplotlib calls these quantiles of a box.
_BOX = ("whislo", "q1", "med", "q3", "whishi")
_TRAINED, _UNTRAINED = "#0072b2", "#c8c8c8"


def draw_ratio_by_layer(ratios: MixingRatios, path: Path) -> None:
    """Mean mixing ratio of the images after each layer, by each method and by similarity."""
    figure, axis = _chart()
    for name, values in image_ratios(ratios).items():
        axis.plot(np.arange(1, len(values) + 1), values, **_STYLES[name])
    axis.set(xlabel="after block", ylabel="mixing ratio, mean of the images")
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def draw_image_error(ratios: MixingRatios, path: Path) -> None:
    """How far the ratio of an image is from the reference after each layer, by each method."""
    _draw_error([(_STYLES[name], values) for name, values in image_errors(ratios).items()], path)


def draw_patch_error(ratios: MixingRatios, path: Path) -> None:
    """How far the ratio of a patch is from the reference after each layer, by each method."""
    kept = _CUTMIX | {"label": "CutMix, TransMix (labels stay)"}
    _draw_error([(kept, ratios.kept_error.nanmean(dim=0)), (_ALIGNED, ratios.aligned_error.nanmean(dim=0))], path)


def image_ratios(ratios: MixingRatios) -> dict[str, Tensor]:
    """Mean mixing ratio of the images after each layer, (L,), by each method and by similarity."""
    means = {name: values.mean(dim=0).expand(ratios.aligned.shape[1]) for name, values in _by_method(ratios).items()}
    return means | {"by similarity": ratios.reference.nanmean(dim=0)}


def image_errors(ratios: MixingRatios) -> dict[str, Tensor]:
    """Mean |ratio - reference| of the images after each layer, (L,), of each method."""
    return {name: (values - ratios.reference).abs().nanmean(dim=0) for name, values in _by_method(ratios).items()}


def draw_token_paths(image: Tensor, box: Sequence[int], paths: TokenPaths, path: Path) -> None:
    """Mixing ratio of single tokens by layer, and where in the mixed image they are.

    Args:
        image: (Hi, Wi, channels) in [0, 1], mixed.
        box: Of the partner: y0, x0, y1, x1.
        paths: The tokens.
        path: PNG file to write.
    """
    figure = Figure(figsize=(5.0, 3.9), layout="constrained")
    picture, *axes = figure.subplots(2, 2).flat
    picture.imshow(image, cmap="gray", vmin=0, vmax=1)
    y0, x0, y1, x1 = box
    picture.plot(
        np.array((x0, x1, x1, x0, x0)) - 0.5, np.array((y0, y0, y1, y1, y0)) - 0.5, color="#2166ac", linestyle="--"
    )
    picture.set(xticks=(), yticks=())
    picture.set_title("box of the partner: dashed", fontsize=10)
    height, width = image.shape[:2]
    layers = np.arange(1, paths.aligned.shape[1] + 1)
    for index, (axis, name, (y, x)) in enumerate(zip(axes, paths.names, paths.places.tolist(), strict=True)):
        at = min(max(x * width, 1), width - 2), min(max(y * height, 1), height - 2)
        label = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": "black"}
        picture.annotate(f"{index + 1}", at, ha="center", va="center", fontsize=9, bbox=label)
        axis.plot(layers, paths.kept[index], **_KEPT)
        axis.plot(layers, paths.aligned[index], **_ALIGNED)
        axis.plot(layers, paths.reference[index], **_REFERENCE)
        axis.set_title(f"token {index + 1}, {name}", fontsize=10)
        axis.set(ylim=(-0.05, 1.05))
        _tidy(axis)
    figure.supxlabel("after block", fontsize=10)
    figure.supylabel("mixing ratio", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center")
    _save(figure, path)


def draw_presence(layers: Sequence[PresenceOfLayer], convolution: Tensor, path: Path) -> None:
    """Distribution of token presence after each layer, and that of a depth-wise convolution.

    Args:
        layers: Presence in each block.
        convolution: (Ht, Wt), presence in a convolution.
        path: PNG file to write.
    """
    figure, axis = _chart(4.4)
    boxes = [dict(zip(_BOX, map(of.quantile, QUANTILES), strict=True)) for of in layers]
    boxes.append(dict(zip(_BOX, quantiles(convolution), strict=True)))
    places = [*range(1, len(layers) + 1), len(layers) + 2]
    drawn = axis.bxp(
        boxes,
        positions=places,
        widths=0.6,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": "black"},
    )
    for patch in drawn["boxes"]:
        patch.set(facecolor="#9ecae1")
    drawn["boxes"][-1].set(facecolor="#fee391", hatch="///")
    class_tokens = [(place, of.class_token) for place, of in zip(places, layers, strict=False) if of.has_class_token]
    if class_tokens:
        axis.plot(*zip(*class_tokens, strict=True), "D", color="#d55e00", markersize=6, label="class token, mean")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":", label="1: as much as it had")
    axis.set_yscale("log")
    lowest, highest = axis.get_ylim()
    lowest, highest = min(lowest, 0.8), max(highest, 1.25)
    axis.set_ylim(lowest, highest)
    # Several, whatever the range.
    digits = (1, 2, 5) if highest > 5 * lowest else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axis.yaxis.set_major_locator(FixedLocator([digit * 10.0**power for power in range(-4, 4) for digit in digits]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    step = max(1, len(layers) // 8)
    ticks = [*range(1, len(layers) + 1, step), places[-1]]
    axis.set_xticks(ticks, [*(str(tick) for tick in ticks[:-1]), "conv."])
    axis.set(xlabel="attention of block, and a depth-wise convolution", ylabel="presence p of a token (log scale)")
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def draw_rmse_by_model(rows: Sequence[tuple[str, str, float]], path: Path) -> None:
    """RMSE between original and aligned mixing ratio of models.

    Args:
        rows: Name, weights and RMSE of each; `RANDOM` weights are hatched.
        path: PNG file to write.
    """
    figure, axis = _chart(1.1 + 0.52 * len(rows))
    values = [value for *_, value in rows]
    for place, (_, weights, value) in enumerate(rows):
        is_random = weights == RANDOM
        axis.barh(
            place, value, height=0.62, color=_UNTRAINED if is_random else _TRAINED, hatch="///" if is_random else None,
            edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        axis.annotate(f" {value:.4f}", (value, place), va="center", fontsize=9)
    labels = [f"{name}\n({weights})" for name, weights, _ in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=9, parse_math=False)  # a dollar in a file's name is no formula
    axis.invert_yaxis()
    axis.set_xlim(0, max(max(values) * 1.25, 1e-6))
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel("RMSE of aligned and original ratio\n(hatched: random weights, not trained)")
    axis.grid(axis="y", visible=False)
    _save(figure, path)


def draw_training(logged: Sequence[tuple[float, float]], measured: Sequence[tuple[float, float]], path: Path) -> None:
    """How far targets move over training.

    Args:
        logged: Epoch and RMSE of the training images, from the log.
        measured: Epoch and RMSE of checkpoints, on held-out images; of random weights as epoch 0.
        path: PNG file to write.
    """
    figure, axis = _chart()
    if logged:
        # A single epoch is no line.
        marker = "o" if len(logged) == 1 else ""
        axis.plot(*zip(*logged, strict=True), color="#0072b2", marker=marker, label="log: training images")
    style = {"linestyle": "", "marker": "D", "color": "#d55e00", "markersize": 7}
    axis.plot(*zip(*measured, strict=True), **style, label="checkpoints (0: random): held-out images")
    axis.set(xlabel="epoch", ylabel="RMSE of aligned and original ratio")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def draw_rollout(images: np.ndarray, rollout: Rollout, head: str, path: Path) -> None:
    """What the head sees: how much of each token arrives there.

    Args:
        images: (B, Hi, Wi, channels) in [0, 1].
        rollout: Of these images.
        head: What it sees, such as "class token".
        path: PNG file to write.
    """
    rows, columns = rollout.grid
    seen = rollout.head[:, -rows * columns :].unflatten(1, rollout.grid).cpu() * rows * columns
    figure = Figure(figsize=(1.45 * len(images) + 1.9, 5.0), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    seen_by = textwrap.fill(f"what the {head} sees", 14)
    for axis, label in zip(axes[:, 0], ("image", seen_by, "both"), strict=True):
        axis.set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    limit = seen.max()
    smooth = F.interpolate(seen[:, None].float(), images.shape[1:3], mode="bilinear")[:, 0]
    for column, image, weights, veil in zip(axes.T, images, seen.numpy(), smooth, strict=True):
        column[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        shown = column[1].imshow(weights, cmap="viridis", vmin=0, vmax=limit)
        brightness = (veil / veil.max()).numpy()[..., None]
        column[2].imshow(image * (0.15 + 0.85 * brightness), cmap="gray", vmin=0, vmax=1)
        for axis in column:
            axis.set(xticks=(), yticks=())
    bar = figure.colorbar(shown, ax=axes[1:, :], aspect=18, pad=0.02)
    bar.set_label("weight of a token\n(1: all alike)")
    _save(figure, path)


def _by_method(ratios: MixingRatios) -> dict[str, Tensor]:
    """Ratios of the images by each method, (M, L), or (M, 1) where they are the same after each layer."""
    constants = {"CutMix": ratios.cutmix, "TransMix": ratios.transmix}
    methods = {name: values[:, None] for name, values in constants.items() if values is not None}
    return methods | {"TL-Align": ratios.aligned}


def _draw_error(lines: Sequence[tuple[dict[str, Any], Tensor]], path: Path) -> None:
    figure, axis = _chart()
    for style, values in lines:
        axis.plot(np.arange(1, len(values) + 1), values, **style)
    axis.set(xlabel="after block", ylabel="mean |ratio - by similarity|")
    # Not a number where no token differs between images; nothing is drawn there.
    axis.set_ylim(0, 1.08 * max(float(values.nan_to_num().max()) for _, values in lines) or 1)
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def _chart(height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.0, height), layout="constrained")
    axis = figure.subplots()
    _tidy(axis)
    return figure, axis


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")
