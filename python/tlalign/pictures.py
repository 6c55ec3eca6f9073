"""Pictures of what alignment does to the labels of mixed images."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from tlalign.mixing import draw_boxes
from tlalign_kernels import MixedTarget, patch_model
from tlalign_kernels.labels import box_masks

_OWN, _PARTNER = "#b2182b", "#2166ac"
_SHARES = LinearSegmentedColormap.from_list("shares", (_OWN, "white", _PARTNER))
_ROWS = ("image", "partner", "mixed image", "token labels\nbefore")
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
) -> None:
    """Draws a few images mixed by CutMix, and the labels of their tokens before and after alignment.

    Where a model merges tokens, their labels are drawn after the last block of each stage.

    Args:
        model: Vision transformer; it is left as it is, patched or not.
        images: Normalised images to mix, (B, channels, Hi, Wi), each with its mirror image in the batch.
        classes: int64 (B,).
        path: PNG file to write.
        mean: What the images were normalised by.
        std: What the images were normalised by.
        class_names: Names of the classes; empty for their numbers.
        columns: Number of mixed images.

    Raises:
        NotImplementedError: If labels can't be followed through the model.
        ValueError: If the batch has no two images of different classes.
    """
    model = copy.deepcopy(model).eval()
    image_size = tuple(images.shape[-2:])
    chosen, boxes = _choose(classes, image_size, columns)
    partners, images = images.flip(0)[chosen], images[chosen]
    pairs = torch.stack((classes[chosen], classes.flip(0)[chosen]), dim=1)
    mixed = torch.where(box_masks(boxes, image_size)[:, None], partners, images)
    target = MixedTarget.from_boxes(pairs, boxes[:, None], image_size)
    maps = {}
    # Aligned in no block, labels stay what they were before the first one.
    for name, layers in (("before", []), ("after", None)):
        with torch.inference_mode():
            _, aligned = patch_model(model, layers)(mixed, target=target, collect_layers=True)
        maps[name] = _last_of_each_size([_as_map(share, model, image_size) for share in aligned.layer_shares])
    shown_maps = [maps["before"][0], *maps["after"]]
    after = [f"token labels\nafter stage {stage}" for stage in range(1, len(maps["after"]) + 1)]
    rows = [*_ROWS, *(after if len(after) > 1 else ["token labels\nafter alignment"])]

    def pixels(normalised: Tensor) -> np.ndarray:
        scale, offset = (torch.tensor(value, device=images.device).view(1, -1, 1, 1) for value in (std, mean))
        return (normalised * scale + offset).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()

    figure = Figure(figsize=(1.45 * len(chosen) + 2.0, 1.5 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    for row, content, frame in zip(axes, (images, partners, mixed), (_OWN, _PARTNER, _OWN), strict=False):
        for axis, picture in zip(row, pixels(content), strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            _frame(axis, frame, 2.0)
    for axis, (y0, x0, y1, x1) in zip(axes[2], boxes.tolist(), strict=True):
        axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=_PARTNER, linewidth=2))
    for row, shares in zip(axes[3:], shown_maps, strict=True):
        for axis, share in zip(row, shares[..., 0].cpu().numpy(), strict=True):
            shown = axis.imshow(share, cmap=_SHARES, vmin=0, vmax=1)
            _frame(axis, "black", 0.6)
    if not class_names:
        class_names = [str(number) for number in range(int(classes.max()) + 1)]
    ratios = zip(target.ratio[:, 0].tolist(), aligned.ratio[:, 0].tolist(), strict=True)
    for column, (own, partner), (ratio, new_ratio) in zip(axes.T, pairs.tolist(), ratios, strict=True):
        column[0].set_title(f"{class_names[own]} + {class_names[partner]}", fontsize=11)
        column[-1].set_xlabel(f"mixing ratio {ratio:.2f}\n$\\rightarrow$ aligned {new_ratio:.2f}", fontsize=10)
    bar = figure.colorbar(shown, ax=axes[3:, :], ticks=(0, 0.5, 1), aspect=25, pad=0.02)
    bar.set_label("share of the partner")
    figure.savefig(path, dpi=150)


def _as_map(share: Tensor, model: nn.Module, image_size: tuple[int, int]) -> Tensor:
    """Labels of the tokens that stand for a place, (B, Ht, Wt, S)."""
    if share.dim() == 4:
        return share
    share = share[:, model.num_prefix_tokens :]
    tokens, aspect = share.shape[1], image_size[0] / image_size[1]
    divisors = [rows for rows in range(1, tokens + 1) if tokens % rows == 0]
    return share.unflatten(1, (min(divisors, key=lambda rows: abs(rows * rows / tokens - aspect)), -1))


def _last_of_each_size(maps: list[Tensor]) -> list[Tensor]:
    return [
        share
        for share, following in zip(maps, [*maps[1:], None], strict=True)
        if following is None or following.shape != share.shape
    ]


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


def _frame(axis: Any, colour: str, width: float) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=width)
