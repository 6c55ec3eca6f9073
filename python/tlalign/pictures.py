"""Pictures of what alignment does to the labels of mixed images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from tlalign.analysis.blocks import following, image_value, map_size, prefix_of
from tlalign.mixing import draw_boxes
from tlalign_kernels import MixedTarget
from tlalign_kernels.labels import box_masks

_OWN, _PARTNER = "#b2182b", "#2166ac"
_SHARES = LinearSegmentedColormap.from_list("shares", (_OWN, "white", _PARTNER))
_ROWS = ("image", "partner", "mixed image", "token labels\nbefore")
_TITLE_LENGTH = 14  # letters that a column is wide
# Boxes outside of this leave too little of one image to see what happens.
_RATIO_LIMITS = (0.2, 0.6)


def draw_token_labels(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    path: Path,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
    columns: int = 5,
    layers: Sequence[int] | None = None,
    alignment: dict[str, Any] | None = None,
) -> dict[int, np.ndarray]:
    """Draws a few images mixed by CutMix, and the labels of their tokens before and after alignment.

    Red is the image, blue with a dot the partner. Below a map stands the share of the partner in the whole image: of
    the class token, else the mean over the tokens.

    Args:
        model: Vision transformer; it is left as it is, patched or not.
        images: Normalised images to mix, (B, channels, Hi, Wi), each with its mirror image in the batch.
        classes: int64 (B,).
        path: PNG file to write.
        mean: What the images were normalised by.
        std: What the images were normalised by.
        class_names: Names of the classes; empty for their numbers.
        columns: Number of mixed images.
        layers: Blocks after which labels are drawn, counted from 0, beside the last one; None: where a model merges
            tokens, the last of each stage.
        alignment: How labels are aligned, as for `patch_model`; None: in all blocks, as in the paper.

    Returns:
        The maps, shares (columns, rows, columns of a map) by the number of blocks before them.

    Raises:
        NotImplementedError: If labels can't be followed through the model.
        ValueError: If the batch has no two images of different classes.
    """
    image_size = tuple(images.shape[-2:])
    chosen, boxes = _choose(classes, image_size, columns)
    partners, images = images.flip(0)[chosen], images[chosen]
    pairs = torch.stack((classes[chosen], classes.flip(0)[chosen]), dim=1)
    mixed = torch.where(box_masks(boxes, image_size)[:, None], partners, images)
    target = MixedTarget.from_boxes(pairs, boxes[:, None], image_size)
    followed = following(model, **alignment or {})
    with torch.inference_mode():
        # Aligned in no block, labels stay what they were before the first one.
        _, before = following(model, layers=[])(mixed, target=target, collect_layers=True)
        _, aligned = followed(mixed, target=target, collect_layers=True)
    layer_names = _name_layers(aligned.layer_shares, layers)
    rows = [*_ROWS, *(f"token labels\n{name}" for name in layer_names.values())]
    shown = {0: before.layer_shares[0], **{layer + 1: aligned.layer_shares[layer] for layer in layer_names}}

    figure = Figure(figsize=(1.45 * len(chosen) + 2.0, 1.5 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    _draw_images(axes[:3], [pixels(each, mean, std) for each in (images, partners, mixed)], boxes)
    maps = {}
    for row, (blocks, share) in zip(axes[3:], shown.items(), strict=True):
        patches = share.flatten(1, -2)[:, prefix_of(followed, share) :, 0]
        maps[blocks] = patches.unflatten(1, map_size(followed, share, image_size)).cpu().numpy()
        ratios = image_value(followed, share)[:, 0].tolist()
        for axis, of_tokens, ratio in zip(row, maps[blocks], ratios, strict=True):
            colours = draw_shares(axis, of_tokens)
            axis.set_xlabel(f"{ratio:.2f}", fontsize=9, labelpad=2)
            _frame(axis, "black", 0.6)
    for axis, pair in zip(axes[0], pairs.tolist(), strict=True):
        # Names of folders need not be UTF-8, which matplotlib wants, and between dollars it would read a formula.
        names = [str(class_names[number] if class_names else number) for number in pair]
        title = (" + " if sum(map(len, names)) <= _TITLE_LENGTH else "\n+ ").join(names)
        axis.set_title(title.encode(errors="replace").decode(), fontsize=11, parse_math=False)
    ratios = torch.cat((target.ratio, aligned.ratio), dim=1).tolist()
    for axis, (ratio, new_ratio) in zip(axes[-1], ratios, strict=True):
        axis.set_xlabel(f"mixing ratio {ratio:.2f}\n$\\rightarrow$ aligned {new_ratio:.2f}", fontsize=10)
    # Of all rows, though beside those of labels only: else these would be narrower than the others.
    beside = dict(shrink=(len(rows) - 3) / len(rows), anchor=(0.0, 0.0))
    bar = figure.colorbar(colours, ax=axes, ticks=(0, 0.5, 1), aspect=25, pad=0.02, **beside)
    bar.set_label("share of the partner (dots: over a half)")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return maps


def draw_shares(axis: Axes, shares: np.ndarray) -> AxesImage:
    """Draws shares (rows, columns) that tokens have of the partner, from red to blue, with dots where over a half."""
    colours = axis.imshow(shares, cmap=_SHARES, vmin=0, vmax=1)
    # Dots say what is blue to those who see neither red nor blue.
    rows, columns = np.nonzero(shares > 0.5)
    axis.plot(columns, rows, ".", color="black", markersize=30 / max(shares.shape), markeredgewidth=0)
    return colours


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Images (B, channels, Hi, Wi) before they were normalised, (B, Hi, Wi, channels) in [0, 1]."""
    scale, offset = (torch.tensor(value).view(-1, 1, 1) for value in (std, mean))
    return (images.cpu().float() * scale + offset).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _name_layers(shares: Sequence[Tensor], layers: Sequence[int] | None) -> dict[int, str]:
    """Blocks after which labels are drawn, see `draw_token_labels`, and what is said of each."""
    last = len(shares) - 1
    if layers is None:
        ends = [index for index in range(last) if shares[index + 1].shape[1:] != shares[index].shape[1:]]
        names = {layer: f"after stage {stage}" for stage, layer in enumerate([*ends, last], start=1)}
    else:
        chosen = sorted({layer % len(shares) for layer in (*layers, -1)})
        names = {layer: f"after block {layer + 1}" for layer in chosen}
    names[last] = "after alignment" if len(names) == 1 else f"{names[last]}\n(the last)"
    return names


def _draw_images(axes: np.ndarray, contents: Sequence[np.ndarray], boxes: Tensor) -> None:
    """Draws images, partners and mixed images in three rows, with the box (y0, x0, y1, x1) of each partner."""
    frames = ((_OWN, "-"), (_PARTNER, "--"), (_OWN, "-"))
    for row, content, (colour, style) in zip(axes, contents, frames, strict=True):
        for axis, picture in zip(row, content, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            _frame(axis, colour, 2.0, style)
    for axis, (y0, x0, y1, x1) in zip(axes[2], boxes.tolist(), strict=True):
        box = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False)
        box.set(edgecolor=_PARTNER, linewidth=2, linestyle="--")
        axis.add_patch(box)


def _choose(classes: Tensor, image_size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Picks images (by index) whose partners have another class, and a box (y0, x0, y1, x1) for each."""
    different = (classes != classes.flip(0)).nonzero()[:, 0]
    # The second half of a batch has the pairs of the first half, the other way round.
    different = different[different < math.ceil(len(classes) / 2)][:count]
    if not len(different):
        raise ValueError("classes: expected two images of different classes that mirror each other in the batch")
    boxes = draw_boxes(np.random.default_rng(0), 1000, image_size)
    ratio = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / math.prod(image_size)
    visible = boxes[(ratio > _RATIO_LIMITS[0]) & (ratio < _RATIO_LIMITS[1])][: len(different)]
    return different, torch.from_numpy(visible).to(classes.device)


def _frame(axis: Any, colour: str, width: float, style: str = "-") -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=width, linestyle=style)
