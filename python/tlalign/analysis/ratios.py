"""Mixing ratio by layer, against what the tokens themselves look like (TL-Align, arXiv 2210.06455, figures 3 and 4).

The reference of a token is found without any label: how similar it is, after a layer, to the same token of the two
images before they were mixed. How that becomes a number is defined here by angles: with a between the token and that of
the image and b between it and that of the partner, the ratio is a / (a + b). It is 0 for a token as in the image, 1 for
one as in the partner, and r for one turned by r of the way between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlalign.analysis.blocks import following, image_value, map_size, prefix_of, tokens_of, watching
from tlalign.mixing import CutMix
from tlalign_kernels import MixedTarget

# Below this the two tokens that a token is compared to are one, as in a layer that does not see the images.
_SAME_ANGLE = 1e-4


class MixedBatch(NamedTuple):
    """Images, and what became of them.

    Attributes:
        images: (B, channels, Hi, Wi); the partner of each is its mirror image in the batch.
        mixed: (B, channels, Hi, Wi).
        target: What they are labelled with.
    """

    images: Tensor
    mixed: Tensor
    target: MixedTarget


def mix_batches(loader: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> Iterator[MixedBatch]:
    """Mixes batches (images, class ids) by CutMix, a box for each image; of an odd number the last is left out."""
    mixing = CutMix(mode="elem", seed=seed)
    for images, classes in loader:
        even = len(images) // 2 * 2
        if even:
            yield MixedBatch(images[:even], *mixing(images[:even], classes[:even]))


def similarity_ratio(token: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """Mixing ratio of tokens by their angles to those of the unmixed images, see above.

    Args:
        token: (..., channels), of the mixed images.
        own: (..., channels), the same token of the images.
        partner: (..., channels), the same token of their partners.

    Returns:
        (...) in [0, 1]; not a number where all three are the same.
    """
    to_own, to_partner = _angle(token, own), _angle(token, partner)
    total = to_own + to_partner
    return torch.where(total > _SAME_ANGLE, to_own / total, math.nan)


class LayerRatios(NamedTuple):
    """Ratios of the tokens of a batch after each of the L blocks.

    Attributes:
        aligned: For each block (B, N, 1) or (B, Ht, Wt, 1), by TL-Align.
        kept: The same of the label that a token has before the first block, which CutMix and TransMix take it to keep;
            merged where tokens are.
        reference: The same by similarity; not a number where a token does not depend on the image yet.
        target: (B,), the aligned target.
        transmix: (B,), the ratio by TransMix; None for models without a class token.
    """

    aligned: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    reference: list[Tensor]
    target: Tensor
    transmix: Tensor | None


class RatioFollower:
    """Follows the mixing ratio through the blocks of a model, in each way there is.

    Args:
        model: A timm model that `patch_model` can follow, patched or not; it is left as it is.
        alignment: How labels are aligned, as for `patch_model`.

    Raises:
        NotImplementedError: If labels can't be followed through the model.
    """

    def __init__(self, model: nn.Module, **alignment: Any) -> None:
        self.model = following(model, **alignment)
        self.unaligned = following(model, layers=[])
        try:
            self.transmix = following(model, method="transmix")
        except NotImplementedError:
            self.transmix = None

    @torch.inference_mode()
    def __call__(self, batch: MixedBatch) -> LayerRatios:
        """Ratios of a batch; tokens are kept for one batch of images at a time."""
        unmixed, reference = [], []

        def keep(_: int, block: nn.Module, __: tuple[Any, ...], result: Tensor) -> None:
            unmixed.append(tokens_of(block, result))

        def compare(index: int, block: nn.Module, _: tuple[Any, ...], result: tuple[Tensor, Tensor] | Tensor) -> None:
            own, unmixed[index] = unmixed[index], None
            reference.append(similarity_ratio(tokens_of(block, result), own, own.flip(0)))

        with watching(self.model, keep):
            self.model(batch.images)
        with watching(self.model, compare):
            _, aligned = self.model(batch.mixed, target=batch.target, collect_layers=True)
        _, kept = self.unaligned(batch.mixed, target=batch.target, collect_layers=True)
        transmix = None if self.transmix is None else self.transmix(batch.mixed, target=batch.target)[1].ratio[:, 0]
        # Tokens that form a map pass through the blocks of some models as a row.
        reference = [each.view(share.shape) for each, share in zip(reference, aligned.layer_shares, strict=True)]
        return LayerRatios(aligned.layer_shares, kept.layer_shares, reference, aligned.ratio[:, 0], transmix)


class MixingRatios(NamedTuple):
    """Ratios of M mixed images, layer by layer.

    Attributes:
        cutmix: (M,), what the images were mixed with.
        transmix: (M,), by TransMix; None for models without a class token.
        target: (M,), of the aligned target.
        aligned: (M, L), of the image after each layer, by TL-Align: that of the class token, else the tokens' mean.
        reference: (M, L), the same by similarity.
        aligned_error: (M, L), mean over the patches of |TL-Align - reference|.
        kept_error: (M, L), the same of labels that patches keep.
    """

    cutmix: Tensor
    transmix: Tensor | None
    target: Tensor
    aligned: Tensor
    reference: Tensor
    aligned_error: Tensor
    kept_error: Tensor

    @property
    def rmse(self) -> float:
        """Root mean square of aligned - original ratio."""
        return (self.target - self.cutmix).square().mean().sqrt().item()


def collect_ratios(model: nn.Module, batches: Iterable[tuple[MixedBatch, LayerRatios]]) -> MixingRatios:
    """Gathers the ratios of whole images, and the errors of their tokens.

    Args:
        model: The model.
        batches: Mixed images and what `RatioFollower` found of them.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in MixingRatios._fields}
    for batch, ratios in batches:
        columns["cutmix"].append(batch.target.ratio[:, 0])
        columns["target"].append(ratios.target)
        if ratios.transmix is not None:
            columns["transmix"].append(ratios.transmix)
        layers: dict[str, list[Tensor]] = {"aligned": [], "reference": [], "aligned_error": [], "kept_error": []}
        for aligned, kept, reference in zip(ratios.aligned, ratios.kept, ratios.reference, strict=True):
            layers["aligned"].append(image_value(model, aligned)[:, 0])
            layers["reference"].append(image_value(model, reference)[:, 0])
            prefix = prefix_of(model, aligned)
            for name, share in (("aligned_error", aligned), ("kept_error", kept)):
                error = (share - reference).abs().flatten(1)[:, prefix:]
                layers[name].append(error.nanmean(dim=1))
        for name, values in layers.items():
            columns[name].append(torch.stack(values, dim=1))
    return MixingRatios(
        **{name: torch.cat(values).cpu().double() if values else None for name, values in columns.items()}
    )


class TokenPaths(NamedTuple):
    """Ratios of single tokens of an image after each layer.

    Attributes:
        names: Where the tokens are, of length T.
        places: (T, 2), their y and x in the image, as parts of its height and width.
        aligned: (T, L), by TL-Align.
        kept: (T, L), as before the first layer.
        reference: (T, L), by similarity.
    """

    names: tuple[str, ...]
    places: Tensor
    aligned: Tensor
    kept: Tensor
    reference: Tensor


def token_paths(model: nn.Module, batch: MixedBatch, ratios: LayerRatios) -> tuple[int, TokenPaths]:
    """Follows tokens within, on the border of, and outside the box of the image that is mixed most evenly.

    Where tokens are merged, it goes on with the one that they became.

    Returns:
        Number of the image in the batch, and the paths of its tokens.
    """
    index = int((batch.target.ratio[:, 0] - 0.4).abs().argmin())
    size = torch.tensor(batch.images.shape[-2:], dtype=torch.float64)
    y0, x0, y1, x1 = batch.target.boxes[index, 0].tolist()
    centre = torch.tensor(((y0 + y1) / 2, (x0 + x1) / 2), dtype=torch.float64)
    corners = torch.tensor([(y, x) for y in (0.0, 1.0) for x in (0.0, 1.0)], dtype=torch.float64) * size
    outside = corners[(corners - centre).square().sum(dim=1).argmax()]
    # On the way from the centre to the corner farthest away, the border is where it leaves the box.
    half = torch.tensor(((y1 - y0) / 2, (x1 - x0) / 2), dtype=torch.float64)
    border = centre + (outside - centre) * (half / (outside - centre).abs().clamp(min=1e-9)).min().clamp(max=1)
    places = torch.stack((centre, border, outside)) / size
    paths = []
    for layers in (ratios.aligned, ratios.kept, ratios.reference):
        values, at, before = [], None, None
        for share in layers:
            grid = torch.tensor(map_size(model, share, tuple(batch.images.shape[-2:])))
            # Cells of a map that doesn't divide it are no whole part of the image.
            at = (places * grid).long() if at is None else at // (before / grid).round().long()
            at, before = at.minimum(grid - 1), grid
            shares = share[index].flatten()[prefix_of(model, share) :]
            values.append(shares[at[:, 0] * grid[1] + at[:, 1]])
        paths.append(torch.stack(values, dim=1).cpu().double())
    return index, TokenPaths(("inside the box", "on its border", "far from it"), places, *paths)


@torch.inference_mode()
def target_rmse(model: nn.Module, batches: Iterable[MixedBatch], **alignment: Any) -> float:
    """Root mean square of aligned - original mixing ratio over mixed images (figure 3), aligned as by `patch_model`."""
    model = following(model, **alignment)
    squares = [
        (model(mixed, target=target)[1].ratio - target.ratio)[:, 0].cpu().double().square()
        for _, mixed, target in batches
    ]
    return torch.cat(squares).mean().sqrt().item()


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between vectors (..., channels), in [0, pi]; of small angles more is left than by the arc cosine."""
    a, b = (F.normalize(each.float(), dim=-1) for each in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
