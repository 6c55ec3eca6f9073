"""What a mixed batch is labelled with, and the algebra by which token operations act on those labels.

Each step of the algebra is a convex combination of labels, so the label of a token stays a mixture of the same few
targets. Its state is the `share`: how much of the token comes from each extra source (TL-Align, arXiv 2210.06455,
written for shares instead of C-class vectors).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tlalign_kernels.ops import is_captured

# Mixtures are checked to sum to one within this, or within the rounding of their dtype if that is coarser: float32
# rounding of a few hundred addends stays far below it.
_SUM_TOLERANCE = 1e-4

_WITHOUT_FLOAT64 = ("mps",)


class MixedTarget:
    """The target of a batch of mixed images: whose classes, and where in the image each of them is.

    Made by one of the `from_...` constructors. Source 0 is the image itself and is implicit: shares and ratios are
    those of the S extra sources. A plain class, not a dataclass or a tuple, so that wrappers which recurse into
    containers (DDP, FSDP2's input casting) leave its dtypes alone.

    Attributes:
        classes: int64 (B, S + 1), class ids, the image's own first; None for dense labels.
        ratio: float32 (B, S) (float64 if made from float64), the part of each extra source in the whole image; None
            for dense labels.
        boxes: What `from_boxes` was given, int64 (B, S, 4); None otherwise.
        masks: What `from_masks` was given, floating (B, S, Hi, Wi); None otherwise.
        token_labels: floating (B, C, h, w), labels of the general path; None otherwise.
        image_size: (Hi, Wi) of the images that boxes or masks refer to; None otherwise.
        layer_shares: after a model was called with `collect_layers=True`, the float32 (B, N, S) share after each
            of its blocks, (B, Ht, Wt, S) where tokens form a map (C for S with dense labels); None otherwise.
    """

    def __init__(
        self,
        classes: Tensor | None = None,
        ratio: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        token_labels: Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        layer_shares: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.classes = classes
        self.ratio = ratio
        self.boxes = boxes
        self.masks = masks
        self.token_labels = token_labels
        self.image_size = image_size
        self.layer_shares = layer_shares

    @classmethod
    def from_boxes(cls, classes: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> MixedTarget:
        """Labels images of which rectangles were replaced by other images (CutMix, arXiv 1905.04899).

        Args:
            classes: int64 (B, S + 1), class ids, the image's own first.
            boxes: int64 (B, S, 4) as y0, x0, y1, x1 in pixels, half open; later sources overwrite earlier ones. Kept,
                not copied.
            image_size: (Hi, Wi) in pixels.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong or, for CPU tensors, a value out of range.
        """
        sources = _check_classes(classes)
        _check_tensor("boxes", boxes, torch.int64, (classes.shape[0], sources, 4))
        image_size = _check_image_size(image_size)
        target = cls(classes=classes, boxes=boxes, image_size=image_size)
        return target._checked()

    @classmethod
    def from_masks(cls, classes: Tensor, masks: Tensor) -> MixedTarget:
        """Labels images mixed pixel by pixel in any way.

        Args:
            classes: int64 (B, S + 1), class ids, the image's own first.
            masks: floating (B, S, Hi, Wi) in [0, 1], the part of each extra source in each pixel, at most 1 in sum.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong or, for CPU tensors, a value out of range.
        """
        sources = _check_classes(classes)
        _check_tensor("masks", masks, None, (classes.shape[0], sources, "Hi", "Wi"))
        target = cls(classes=classes, masks=masks, image_size=(masks.shape[2], masks.shape[3]))
        return target._checked()

    @classmethod
    def from_ratio(cls, classes: Tensor, ratio: Tensor) -> MixedTarget:
        """Labels images that are mixed alike everywhere (MixUp, arXiv 1710.09412).

        Args:
            classes: int64 (B, S + 1), class ids, the image's own first.
            ratio: floating (B, S) in [0, 1], the part of each extra source (1 - lambda for a pair).

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape is wrong or, for CPU tensors, a value out of range.
        """
        sources = _check_classes(classes)
        _check_tensor("ratio", ratio, None, (classes.shape[0], sources))
        return cls(classes=classes, ratio=ratio)._checked()

    @classmethod
    def from_dense(cls, token_labels: Tensor) -> MixedTarget:
        """Labels each place of the images with a distribution over all classes: the general, slower path.

        Args:
            token_labels: floating (B, C, h, w), non-negative with sum 1 over C; h and w are the token grid of the
                model or a multiple of it.

        Raises:
            TypeError: If the dtype is wrong.
            ValueError: If the shape is wrong or, for CPU tensors, a value out of range.
        """
        _check_tensor("token_labels", token_labels, None, ("B", "C", "h", "w"))
        return cls(token_labels=token_labels)._checked()

    @property
    def batch_size(self) -> int:
        """Number of images B."""
        return (self.token_labels if self.classes is None else self.classes).shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the target's tensors."""
        return (self.token_labels if self.classes is None else self.classes).device

    def __repr__(self) -> str:
        if self.classes is None:
            return f"MixedTarget(token_labels={tuple(self.token_labels.shape)}, device={self.device})"
        kind = "boxes" if self.boxes is not None else "masks" if self.masks is not None else "ratio"
        batch, sources = self.classes.shape
        return f"MixedTarget(images={batch}, extra_sources={sources - 1}, from={kind}, device={self.device})"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MixedTarget:
        """Returns the target with its tensors on `device`; dtypes stay.

        Raises:
            TypeError: If `device` is a dtype.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: expected a device, for labels keep their dtype, got {device}")
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MixedTarget:
        """Returns the target with its tensors in page-locked memory; a DataLoader with `pin_memory=True` calls it."""
        return self._moved(Tensor.pin_memory)

    def validate(self, num_classes: int | None = None) -> MixedTarget:
        """Checks the values, which synchronises with an accelerator; CPU tensors were checked when the target was made.

        Args:
            num_classes: If given, class ids must be below it and dense labels must have as many classes.

        Returns:
            The target itself.

        Raises:
            ValueError: If shares are non-finite, outside [0, 1] or not normalised, boxes lie outside the image, or a
                class id is out of range.
        """
        if self.classes is None:
            _check_distribution("token_labels", self.token_labels, exactly_one=True)
            if num_classes is not None and self.token_labels.shape[1] != num_classes:
                raise ValueError(f"token_labels: expected {num_classes} classes, got {self.token_labels.shape[1]}")
            return self
        if self.classes.numel() == 0:
            return self
        low, high = (int(limit) for limit in self.classes.aminmax())
        if low < 0 or (num_classes is not None and high >= num_classes):
            limit = "" if num_classes is None else f" and below {num_classes}"
            raise ValueError(f"classes: expected ids of at least 0{limit}, got ids from {low} to {high}")
        if self.boxes is not None:
            height, width = self.image_size
            start, end = self.boxes.unflatten(-1, (2, 2)).unbind(-2)
            inside = (start >= 0) & (start <= end) & (end <= end.new_tensor(self.image_size))
            if not bool(inside.all()):
                wrong = self.boxes[~inside.all(-1)][0].tolist()
                raise ValueError(
                    f"boxes: expected y0, x0, y1, x1 with 0 <= y0 <= y1 <= {height} and 0 <= x0 <= x1 <= {width}, "
                    f"got {wrong}"
                )
        elif self.masks is not None:
            _check_distribution("masks", self.masks, exactly_one=False)
        else:
            _check_distribution("ratio", self.ratio, exactly_one=False)
        return self

    def image_share(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Share of the whole image: the state a class, distillation or register token starts with.

        Args:
            dtype: Of the model; labels are float32, or float64 for models in float64.

        Returns:
            (B, S), or (B, C) for dense labels.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        if self.classes is None:
            return self.token_labels.to(dtype).mean(dim=(2, 3))
        if self.ratio is not None and self.ratio.dtype == dtype:
            return self.ratio
        if self.boxes is not None:
            height, width = self.image_size
            if self.boxes.shape[1] == 1:
                sides = self.boxes[..., 2:] - self.boxes[..., :2]
                return (sides.prod(dim=-1, dtype=_widest(sides.device)) / (height * width)).to(dtype)
            return self._box_masks(dtype).mean(dim=(2, 3))
        if self.masks is not None:
            return self.masks.to(dtype).mean(dim=(2, 3))
        return self.ratio.to(dtype)

    def token_share(
        self, grid_size: tuple[int, int], patch_size: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Share of each token of a grid: the mean over the pixels of the cell that the token stands for.

        A cell that reaches beyond the image (padded images) counts its real pixels only.

        Args:
            grid_size: (Ht, Wt), tokens along each axis.
            patch_size: Pixels between one token and the next, along each axis (the stride, not the receptive field).
            dtype: Of the model; labels are float32, or float64 for models in float64.

        Returns:
            (B, Ht * Wt, S), or (B, Ht * Wt, C) for dense labels.

        Raises:
            ValueError: If the grid does not lie on the image, or dense labels do not fit the grid.
        """
        rows, columns = grid_size
        dtype = torch.promote_types(dtype, torch.float32)
        if self.classes is None:
            return self._pooled_token_labels(grid_size, dtype)
        if self.boxes is None and self.masks is None:
            return self.ratio.to(dtype)[:, None, :].expand(-1, rows * columns, -1)
        for tokens, step, pixels in zip(grid_size, patch_size, self.image_size, strict=True):
            if (tokens - 1) * step >= pixels:
                raise ValueError(
                    f"grid_size: {grid_size} tokens of {tuple(patch_size)} pixels do not lie on an image of "
                    f"{self.image_size} pixels"
                )
        if self.boxes is not None and self.boxes.shape[1] == 1:
            covered = self._covered_parts(grid_size, patch_size, dtype)
            return (covered[0][..., :, None] * covered[1][..., None, :]).flatten(2).transpose(1, 2)
        masks = self.masks.to(dtype) if self.boxes is None else self._box_masks(dtype)
        pooled = F.avg_pool2d(masks, tuple(patch_size), ceil_mode=True)[..., :rows, :columns]
        return pooled.flatten(2).transpose(1, 2)

    def to_dense(self, num_classes: int, smoothing: float = 0.0) -> Tensor:
        """The target of each image as a distribution over classes, as timm's `Mixup` returns it.

        Args:
            num_classes: Number of classes C.
            smoothing: Label smoothing in [0, 1]: (1 - smoothing) * target + smoothing / C.

        Returns:
            (B, C), float32 (float64 if the target was made from float64).

        Raises:
            TypeError: If `smoothing` is no number.
            ValueError: If, on the CPU, a class id is out of range, or `smoothing` outside [0, 1].
        """
        check_smoothing(smoothing)
        if values_are_free(self.device):
            self.validate(num_classes)
        if self.classes is None:
            dense = self.image_share(self._dtype)
        else:
            weights = self.source_weights()
            dense = weights.new_zeros((self.batch_size, num_classes)).scatter_add(1, self.classes, weights)
        return dense * (1 - smoothing) + smoothing / num_classes

    def source_weights(self) -> Tensor:
        """Weights of all sources, the image's own first: (B, S + 1) of the dtype of `ratio`, rows of sum 1.

        Raises:
            ValueError: If labels are dense, which have no sources.
        """
        if self.ratio is None:
            raise ValueError("target: expected one of sources, got dense labels; see to_dense")
        extra = self.ratio if self.ratio.shape[1] == 1 else self.ratio.sum(dim=1, keepdim=True)
        return torch.cat((1 - extra, self.ratio), dim=1)

    def with_share(self, share: Tensor, layer_shares: Sequence[Tensor] | None = None) -> MixedTarget:
        """The target after a model: the same sources, mixed by the share that arrived at the head.

        Args:
            share: (B, S), or (B, C) for dense labels.
            layer_shares: The share after each block, if they were collected.

        Returns:
            A target without a place in space, whose `ratio` is `share`; for dense labels one whose `token_labels` are
            `share`, (B, C, 1, 1).

        Raises:
            TypeError: If `share` is no tensor of a floating dtype.
            ValueError: If its shape is wrong.
        """
        labels = self.token_labels if self.classes is None else self.ratio
        _check_tensor("share", share, None, tuple(labels.shape[:2]))
        layers = None if layer_shares is None else tuple(layer_shares)
        if self.classes is None:
            return MixedTarget(token_labels=share[:, :, None, None], layer_shares=layers)
        return MixedTarget(classes=self.classes, ratio=share, layer_shares=layers)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> MixedTarget:
        tensors = (self.classes, self.ratio, self.boxes, self.masks, self.token_labels)
        layers = None if self.layer_shares is None else tuple(map(move, self.layer_shares))
        return MixedTarget(*(None if t is None else move(t) for t in tensors), self.image_size, layers)

    def _checked(self) -> MixedTarget:
        for name in ("boxes", "masks", "ratio"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.device:
                raise ValueError(f"{name}: expected on the device of classes ({self.device}), got {tensor.device}")
        if values_are_free(self.device):
            self.validate()
        if self.classes is not None:
            self.ratio = self.image_share(self._dtype)
        return self

    @property
    def _dtype(self) -> torch.dtype:
        given = (self.ratio, self.masks, self.token_labels)
        return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32

    def _covered_parts(
        self, grid_size: tuple[int, int], patch_size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Part of each row and of each column of cells that the only box covers: (B, 1, Ht) and (B, 1, Wt)."""
        ends = self.boxes.unflatten(-1, (2, 2)).transpose(-1, -2)
        axes = list(zip(grid_size, patch_size, self.image_size, strict=True))
        if axes[0] == axes[1]:  # the usual case, with half of the launches
            return _covered(ends, *axes[0], dtype).unbind(-2)
        return tuple(_covered(ends[..., axis, :], *sizes, dtype) for axis, sizes in enumerate(axes))

    def _box_masks(self, dtype: torch.dtype) -> Tensor:
        """Part of each source in each pixel, (B, S, Hi, Wi): 1 where its box is and no later one lies over it."""
        inside = box_masks(self.boxes, self.image_size)
        covered_later = inside.flip(1).cumsum(1).flip(1) - inside.long() > 0
        return (inside & ~covered_later).to(dtype)

    def _pooled_token_labels(self, grid_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        given = tuple(self.token_labels.shape[2:])
        if any(have % want for have, want in zip(given, grid_size, strict=True)):
            raise ValueError(
                f"token_labels: expected a map of {tuple(grid_size)} tokens or a multiple of it, got {given}"
            )
        cell = tuple(have // want for have, want in zip(given, grid_size, strict=True))
        labels = self.token_labels.to(dtype)
        return (labels if cell == (1, 1) else F.avg_pool2d(labels, cell)).flatten(2).transpose(1, 2)


def box_masks(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Which pixels lie in each box.

    Args:
        boxes: int64 (..., 4) as y0, x0, y1, x1, half open.
        image_size: (Hi, Wi) in pixels.

    Returns:
        bool (..., Hi, Wi).
    """
    y0, x0, y1, x1 = boxes[..., None].unbind(-2)
    rows, columns = (torch.arange(pixels, device=boxes.device) for pixels in image_size)
    return ((rows >= y0) & (rows < y1))[..., :, None] & ((columns >= x0) & (columns < x1))[..., None, :]


def residual_share(share: Tensor, *mixed: Tensor) -> Tensor:
    """Label of a residual connection: the mean of the label that passed by and those of the n parallel branches.

    One attention branch gives (Y + Y^) / 2 (TL-Align), n of them (Y + sum Y^_i) / (n + 1).

    Args:
        share: (B, N, S) of the tokens that pass by.
        mixed: The (B, N, S) of each branch.

    Returns:
        (B, N, S).
    """
    return (share + sum(mixed)) / (len(mixed) + 1)


def pool_share(share: Tensor, cell: tuple[int, int], partial_cells: bool = True) -> Tensor:
    """Labels of tokens that are merged cell by cell, or pooled by a strided convolution: the mean over each cell.

    Args:
        share: (B, Ht, Wt, S), labels of a map of tokens.
        cell: Tokens of a cell along each axis: what is merged, or the stride.
        partial_cells: Whether cells that reach beyond the map become tokens too, as where the map is padded; their
            labels are means over the real tokens. False: they are dropped.

    Returns:
        (B, Ht / cell, Wt / cell, S), rounded up or down.
    """
    pooled = F.avg_pool2d(share.permute(0, 3, 1, 2), cell, ceil_mode=partial_cells)
    return pooled.permute(0, 2, 3, 1)


def gather_share(share: Tensor, indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Labels of the tokens that were kept by a token dropping such as PatchDropout; prefix tokens always stay.

    Args:
        share: (B, N, S).
        indices: int64 (B, K), kept tokens counted without the prefix.
        num_prefix_tokens: Number of tokens at the start that are always kept.

    Returns:
        (B, num_prefix_tokens + K, S).
    """
    prefix, rest = share[:, :num_prefix_tokens], share[:, num_prefix_tokens:]
    kept = rest.gather(1, indices[:, :, None].expand(-1, -1, share.shape[2]))
    return torch.cat((prefix, kept), dim=1)


def values_are_free(device: torch.device) -> bool:
    """Whether values may be looked at: on an accelerator that waits for it, and where calls are captured are none."""
    return device.type == "cpu" and not is_captured()


def check_number(name: str, value: float) -> None:
    """Raises TypeError unless a value is a number: no tensor, whose gradient would be lost."""
    if isinstance(value, (int, float)):  # among them those that dynamic compilation has symbols for, and no attributes
        return
    if isinstance(value, Tensor) or not hasattr(value, "__float__") or getattr(value, "shape", ()) != ():
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_smoothing(smoothing: float) -> None:
    """Raises TypeError or ValueError unless the label smoothing is a number in [0, 1]."""
    check_number("smoothing", smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"smoothing: expected a value in [0, 1], got {smoothing}")


def _covered(ends: Tensor, tokens: int, step: int, pixels: int, dtype: torch.dtype) -> Tensor:
    """Part of each of `tokens` cells of `step` pixels between `ends` (..., 2) along an axis: (..., tokens)."""
    # A GPU divides by a number by multiplying with its inverse: in float64, whole cells are 1 and bits those of a CPU.
    first = torch.arange(0, tokens * step, step, dtype=_widest(ends.device), device=ends.device)
    before = (ends[..., None] - first).clamp(0, step)
    covered = before[..., 1, :] - before[..., 0, :]
    return (covered / (step if tokens * step <= pixels else (pixels - first).clamp(max=step))).to(dtype)


def _widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def _check_classes(classes: Tensor) -> int:
    """Checks dtype and shape of class ids and returns the number S of extra sources."""
    _check_tensor("classes", classes, torch.int64, ("B", "S + 1"))
    if classes.shape[1] < 2:
        raise ValueError(f"classes: expected (B, S + 1) with S of at least 1, got {tuple(classes.shape)}")
    return classes.shape[1] - 1


def _check_image_size(image_size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, image_size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"image_size: expected two positive integers (Hi, Wi), got {image_size!r}")
    return height, width


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int | str, ...]) -> None:
    """Checks type, dtype (None: any floating one) and shape (a name: any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if dtype is None and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(
        not isinstance(wanted, str) and size != wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, shape))}), got {tuple(tensor.shape)}")
    if 0 in tensor.shape[2:]:
        raise ValueError(f"{name}: expected at least one pixel or token, got shape {tuple(tensor.shape)}")


def _check_distribution(name: str, values: Tensor, exactly_one: bool) -> None:
    """Checks that values are finite, not negative, and sum along dimension 1 to (at most) one."""
    if values.numel() == 0:
        return
    values = values.detach()
    total = values.sum(1, dtype=_widest(values.device))
    lowest, least, most = (float(limit) for limit in (values.min(), *total.aminmax()))
    if not math.isfinite(lowest + most):
        raise ValueError(f"{name}: expected finite values, got {int((~torch.isfinite(values)).sum())} that are not")
    if lowest < 0:
        raise ValueError(f"{name}: expected values of at least 0, got {lowest:.6g}")
    tolerance = max(_SUM_TOLERANCE, torch.finfo(values.dtype).eps)
    if most > 1 + tolerance or (exactly_one and least < 1 - tolerance):
        wanted = "1" if exactly_one else "at most 1"
        raise ValueError(f"{name}: expected sums of {wanted} along dimension 1, got {least:.6g} to {most:.6g}")
