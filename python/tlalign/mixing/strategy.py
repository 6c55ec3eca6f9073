"""What all mixing strategies share: arguments, their generator, who is mixed with whom, and checks of the input."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tlalign_kernels.labels import MixedTarget

Mode = Literal["batch", "pair", "elem"]

# Added to the seed, so that another generator made of the same seed, step and rank (augmentation, say) is independent.
_STREAM = int.from_bytes(b"mix", "big")


class MixingStrategy(ABC):
    """What all strategies share: arguments, their generator, who is mixed with whom, and checks of the input.

    A subclass implements `_mix` (or `_draw` of `BoxStrategy` or `MaskStrategy`) and draws from `self.generator` only.

    Args:
        prob: Probability that a draw mixes at all. May be set between calls, such as to 0 for the last epochs.
        mode: What one draw is for: the whole `batch`, a `pair` (image i and its mirror image B - 1 - i, which swap
            the same region), or one image (`elem`).
        seed: Seed of the generator, see `reseed`.

    Raises:
        TypeError: If an argument is of a wrong type, as in all strategies.
        ValueError: If one is out of range, likewise.
    """

    averages_pixels = False  # whether it needs images of a floating dtype

    def __init__(self, prob: float = 1.0, mode: Mode = "batch", seed: int = 0) -> None:
        self.prob = check_probability("prob", prob)
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        self.mode = mode
        self.reseed(seed)

    def reseed(self, seed: int, step: int = 0, rank: int = 0) -> None:
        """Starts the generator anew; what follows depends on these three numbers only.

        Called with the step and the rank before each batch, it makes a resumed run repeat without any saved state and
        gives each rank draws of its own. Where it is not called in a worker of a DataLoader, what the worker draws
        depends on its own seed, which is torch's, as well.

        Args:
            seed: Seed of the run, >= 0.
            step: Number of the batch, >= 0.
            rank: Rank of the process, >= 0.
        """
        checked = [check_integer(name, value, 0) for name, value in (("seed", seed), ("step", step), ("rank", rank))]
        # A spawn key, not more entropy: numpy pads entropy with zeros, so that seeds [1] and [1, 0] would be the same.
        self._start(*checked)

    def _start(self, seed: int, *key: int) -> None:
        sequence = np.random.SeedSequence(seed, spawn_key=(_STREAM, *key))
        self.generator = np.random.Generator(np.random.PCG64(sequence))
        self._worker_seed = _worker_seed()

    def __call__(self, images: Tensor, classes: Tensor) -> tuple[Tensor, MixedTarget]:
        """Mixes each image with its mirror image in the batch.

        In an odd batch the image in the middle is its own partner: it stays as it is, with a mixing ratio of 0.

        Args:
            images: (B, channels, Hi, Wi) with B >= 2, on any device; not modified. Strategies that average pixels
                need a floating dtype.
            classes: (B,) int64, on the device of the images.

        Returns:
            The mixed images, of the same shape and dtype, and their target with classes (B, 2), own class first, and
            ratio (B, 1), the part of the partner in each mixed image.

        Raises:
            TypeError: If an argument is no tensor or has a wrong dtype.
            ValueError: If shapes or devices disagree, there is no other image to mix with, or the strategy can't mix
                images of this size.
        """
        check_batch(images, classes, type(self).__name__ if self.averages_pixels else None)
        worker_seed = _worker_seed()
        if worker_seed is not None and worker_seed != self._worker_seed:
            # Each worker of a loader has a copy, and gets a new one in each epoch: they would all draw the same.
            self._start(worker_seed, int(self.generator.integers(2**63)))
        own = np.arange(len(images))
        partner = own[::-1]
        draw_index = {"batch": np.zeros_like(own), "pair": np.minimum(own, partner), "elem": own}[self.mode]
        chosen = self.generator.random(draw_index.max() + 1) < self.prob
        chosen = chosen[draw_index] & (own != partner)
        pairs = torch.stack((classes, classes.flip(0)), dim=1)
        return self._mix(images, pairs, draw_index, chosen)

    def origins(self, target: MixedTarget, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where in the image, and in its partner, lay what each pixel of the mixed images of the last call shows.

        Args:
            target: What the mixed images are labelled with.
            image_size: (Hi, Wi) in pixels.

        Returns:
            Numbers of pixels of the image and of its partner, int64 (B, Hi * Wi) or, if all images have the same,
            (1, Hi * Wi); any where nothing of it is seen.
        """
        pixels = torch.arange(math.prod(image_size), device=target.device)[None]
        return pixels, pixels

    def visible_parts(self, maps: Tensor, target: MixedTarget, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """How much of each image's map is seen in the mixed images of the last call.

        Args:
            maps: float32 (B, h, w) of sum 1, how something is spread over cells of equal size of each image before it
                was mixed.
            target: What the mixed images are labelled with.
            image_size: (Hi, Wi) in pixels.

        Returns:
            What is seen of the image's own map and of its partner's, (B,) each.
        """
        density = maps.flatten(1)[:, cell_of_pixel(tuple(maps.shape[1:]), image_size, maps.device)]
        density = density / density.sum(dim=1, keepdim=True)
        share = target.token_share(image_size, (1, 1))[..., 0]
        own, partner = (
            density.gather(1, origin.expand_as(density))
            for density, origin in zip((density, density.flip(0)), self.origins(target, image_size), strict=True)
        )
        return (own * (1 - share)).sum(dim=1), (partner * share).sum(dim=1)

    def shown_pixels(
        self, cells: tuple[int, int], target: MixedTarget, image_size: tuple[int, int], patches: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """What each patch of the mixed images of the last call shows of each cell of the images that were mixed.

        Args:
            cells: (h, w), cells of equal size of the images before they were mixed.
            target: What the mixed images are labelled with.
            image_size: (Hi, Wi) in pixels.
            patches: (Ht, Wt), patches of equal size of the mixed images.

        Returns:
            Pixels of the image's own cells and of its partner's, float32 (B, Ht * Wt, h * w) each; together
            they sum to the pixels of a patch.
        """
        cell = cell_of_pixel(cells, image_size, target.device)
        patch = cell_of_pixel(patches, image_size, target.device)
        share = target.token_share(image_size, (1, 1))[..., 0]
        shown = []
        for origin, weight in zip(self.origins(target, image_size), (1 - share, share), strict=True):
            counts = weight.new_zeros(len(weight), math.prod(patches) * math.prod(cells))
            place = (patch * math.prod(cells) + cell[origin]).expand_as(weight)
            shown.append(counts.scatter_add_(1, place, weight).unflatten(1, (math.prod(patches), -1)))
        return tuple(shown)

    @abstractmethod
    def _mix(
        self, images: Tensor, classes: Tensor, draw_index: np.ndarray, chosen: np.ndarray
    ) -> tuple[Tensor, MixedTarget]:
        """Mixes images with their partners, `images.flip(0)`.

        Args:
            images: (B, channels, Hi, Wi); not to be modified.
            classes: (B, 2) int64, classes of image and partner.
            draw_index: (B,) int64, which draw each image takes; there are max + 1 of them.
            chosen: (B,) bool, which images are mixed at all; never one that is its own partner.

        Returns:
            As `__call__`.
        """


def _worker_seed() -> int | None:
    """What torch has seeded this worker of a loader with, in this epoch; None in other processes."""
    worker = get_worker_info()
    return None if worker is None else worker.seed


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Takes what was drawn to a device without waiting for it: from other than pinned memory, a copy to a GPU waits."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cell_of_pixel(cells: tuple[int, int], image_size: tuple[int, int], device: torch.device) -> Tensor:
    """Finds the cell of a grid that each pixel of an image lies in.

    Args:
        cells: (h, w), of equal size up to a pixel.
        image_size: (Hi, Wi) in pixels.
        device: Device of the result.

    Returns:
        int64 (Hi * Wi,), numbers of cells row by row.
    """
    rows, columns = (
        torch.arange(pixels, device=device) * side // pixels for pixels, side in zip(image_size, cells, strict=True)
    )
    return (rows[:, None] * cells[1] + columns).flatten()


def draw_ratios(generator: np.random.Generator, count: int, alpha: float) -> np.ndarray:
    """Draws mixing ratios from Beta(alpha, alpha), which is symmetric: timm's lambda has the same distribution.

    Args:
        generator: Source of randomness.
        count: Number of draws n.
        alpha: Parameter of the distribution, > 0.

    Returns:
        (n,) float64 in [0, 1].
    """
    return generator.beta(alpha, alpha, size=count)


def check_batch(images: Tensor, classes: Tensor, averaged_by: str | None) -> None:
    """Raises unless images are (B, channels, Hi, Wi) with B >= 2, of a dtype that can be mixed, and classes (B,) int64.

    Args:
        images: What was given as images.
        classes: What was given as classes.
        averaged_by: Name of a strategy that averages pixels, which integers cannot hold; None if none does.
    """
    for name, value in (("images", images), ("classes", classes)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: expected the shape (B, channels, Hi, Wi), none of them 0, got {tuple(images.shape)}")
    if len(images) < 2:
        raise ValueError("images: expected at least 2 images to mix, got 1 (a loader with drop_last=True avoids it)")
    if averaged_by is not None and not images.is_floating_point():
        raise TypeError(
            f"images: expected a floating dtype for {averaged_by}, which averages pixels, got {images.dtype}"
        )
    if classes.dtype != torch.int64:
        raise TypeError(f"classes: expected int64, got {classes.dtype}")
    if classes.shape != images.shape[:1]:
        raise ValueError(
            f"classes: expected the shape ({len(images)},), one for each of the images, got {tuple(classes.shape)}"
        )
    if classes.device != images.device:
        raise ValueError(f"classes: expected on the device of the images, {images.device}, got {classes.device}")


def check_number(name: str, value: float) -> None:
    """Raises TypeError unless `value` is a real number, bool excluded."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_not_negative(name: str, value: float) -> float:
    """Returns `value` as a float; raises unless it is a finite number of at least 0."""
    check_number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return float(value)


def check_probability(name: str, value: float) -> float:
    """Returns `value` as a float; raises unless it is a number in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Returns `value` as a float; raises unless it is a finite number above 0."""
    check_not_negative(name, value)
    if value == 0:
        raise ValueError(f"{name}: expected more than 0, got 0")
    return float(value)


def check_integer(name: str, value: int | None, least: int, or_none: bool = False) -> int | None:
    """Returns `value` as an int; raises unless it is one of at least `least`, bool excluded, or None if it may be."""
    if or_none and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected {'None or ' if or_none else ''}an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)
