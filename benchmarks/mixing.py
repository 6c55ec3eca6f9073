"""Draws `results/mixing.png`: one example of each mixing strategy, on the two photographs that ship with scikit-learn.

Run as `python -m benchmarks.mixing`; it needs the extras `train` and `saliency`. Attentive CutMix takes the activation
of a pretrained network, and Puzzle Mix the gradient of one; none is shipped, so that contrast stands in for both here.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor

from tlalign.mixing import (
    AttentiveCutMix,
    BlockWise,
    CutMix,
    FMix,
    MixingStrategy,
    MixUp,
    PuzzleMix,
    RandomPatches,
    ResizeMix,
    SaliencyMix,
    TokenMix,
)
from tlalign.pictures import draw_shares

PICTURE = Path(__file__).parent / "results" / "mixing.png"
SIDE, PATCH = 224, 16
# Draws outside of these limits leave too little of one image to see what happens.
RATIO_LIMITS = (0.3, 0.6)
COLUMNS = 6


def photographs() -> Tensor:
    """The two photographs, (2, 3, 224, 224) in [0, 1]."""
    squares = []
    for name, left in (("flower.jpg", 150), ("china.jpg", 200)):
        image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255
        square = image[..., :, left : left + image.shape[2]]
        squares.append(F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True))
    return torch.cat(squares).clamp(0, 1)


def contrast(images: Tensor, cells: int = 7) -> Tensor:
    """Standard deviation of the pixels in each of 7 x 7 (or so many) cells, (B, 7, 7)."""
    grey = images.mean(dim=1)
    mean = F.adaptive_avg_pool2d(grey, cells)
    return (F.adaptive_avg_pool2d(grey.square(), cells) - mean.square()).clamp(min=0).sqrt()


def contrast_of_pixels(images: Tensor, classes: Tensor) -> Tensor:
    """The contrast of the 4 x 4 pixels that each pixel is one of, (B, 224, 224); classes have no part in it."""
    return F.interpolate(contrast(images, SIDE // 4)[:, None], (SIDE, SIDE))[:, 0]


def strategies() -> dict[str, MixingStrategy]:
    """All strategies by the name that is drawn, with the defaults of their papers."""
    return {
        "CutMix": CutMix(),
        "MixUp": MixUp(),
        "random patches": RandomPatches(),
        "block-wise": BlockWise(),
        "TokenMix": TokenMix(),
        "F-Mix": FMix(),
        "ResizeMix": ResizeMix(),
        "SaliencyMix": SaliencyMix(),
        "Attentive CutMix": AttentiveCutMix(contrast),
        "Puzzle Mix": PuzzleMix(contrast_of_pixels),
    }


def example(strategy: MixingStrategy, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """The first draw whose ratio is within the limits, if one is: image, token labels (14, 14) and ratio."""
    for seed in range(100):
        strategy.reseed(seed)
        mixed, target = strategy(images, torch.arange(len(images)))
        ratio = target.ratio[0, 0].item()
        if RATIO_LIMITS[0] <= ratio <= RATIO_LIMITS[1]:
            break
    share = target.token_share((SIDE // PATCH,) * 2, (PATCH, PATCH))
    return mixed[0].clamp(0, 1), share[0].view(SIDE // PATCH, SIDE // PATCH), ratio


def main() -> None:
    """Draws the picture."""
    images = photographs()
    drawn = [("image", images[0], None, None), ("partner", images[1], None, None)]
    drawn += [(name, *example(strategy, images)) for name, strategy in strategies().items()]
    rows = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(1.75 * COLUMNS, 3.85 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (name, image, share, ratio) in enumerate(drawn):
        row, column = divmod(index, COLUMNS)
        axes[2 * row, column].imshow(image.permute(1, 2, 0).numpy())
        axes[2 * row, column].set_title(name, fontsize=10)
        if share is not None:
            shown = draw_shares(axes[2 * row + 1, column], share.numpy())
            axes[2 * row + 1, column].set_title(f"mixing ratio {ratio:.2f}", fontsize=9)
    bar = figure.colorbar(shown, ax=axes, ticks=(0, 0.5, 1), aspect=40, pad=0.01)
    bar.set_label("label of a token: share of the partner (dots: over a half)")
    figure.savefig(PICTURE, dpi=100)
    print(PICTURE)


if __name__ == "__main__":
    main()
