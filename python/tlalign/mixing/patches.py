"""Strategies whose masks consist of whole patches: random patches, blocks of them, and TokenMix's regions."""

from __future__ import annotations

import math

import numpy as np

from tlalign.mixing.masks import MaskStrategy
from tlalign.mixing.strategy import Mode, check_integer, check_number, check_positive, draw_ratios

# The papers' grid: 224 x 224 pixels in patches of 16.
_PATCHES = 14 * 14
# Attempts to place a block before the mask is left as it is: those of BEiT's authors.
_ATTEMPTS = 10


class RandomPatches(MaskStrategy):
    """Patches of the image, anywhere and independent of each other, are replaced by those of its partner.

    The "random" mixing of TL-Align (arXiv 2210.06455, table 7): of N patches, floor(ratio * N) drawn without
    replacement.

    Args:
        patch_size: Side of a patch in pixels; the paper's is 16, that of the model's tokens.
        alpha: The ratio is Beta(alpha, alpha); > 0. The paper takes CutMix's 1, a uniform ratio.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        seed: As in `MixingStrategy`.
    """

    def __init__(
        self, patch_size: int = 16, alpha: float = 1.0, prob: float = 1.0, mode: Mode = "batch", seed: int = 0
    ) -> None:
        super().__init__(prob, mode, seed)
        self.patch_size = check_integer("patch_size", patch_size, least=1)
        self.alpha = check_positive("alpha", alpha)

    def _draw(self, count: int, image_size: tuple[int, int]) -> np.ndarray:
        grid = patch_grid(image_size, self.patch_size)
        patches = math.prod(grid)
        taken = np.floor(draw_ratios(self.generator, count, self.alpha) * patches).astype(np.int64)
        # Ranks of random numbers: each subset of a size is equally likely.
        rank = self.generator.random((count, patches)).argsort(axis=1).argsort(axis=1)
        masks = (rank < taken[:, None]).reshape(count, *grid)
        return masks.repeat(self.patch_size, axis=1).repeat(self.patch_size, axis=2)


class BlockWise(MaskStrategy):
    """Blocks of patches are replaced by those of the partner, until they cover the part that was drawn.

    The masks are those of BEiT (arXiv 2106.08254, algorithm 1): a block has an area drawn uniformly between
    `min_patches` and what is left to cover, an aspect ratio drawn log-uniformly, and a place drawn uniformly; blocks
    may overlap. One that would cover more than is left is drawn again, ten times at most (as the authors' code does),
    so that a mask may fall a few patches short of floor(ratio * N); it never has more. What is left may be less than
    `min_patches`; the last block is then as large as that.

    Args:
        patch_size: Side of a patch in pixels; the paper's is 16, that of the model's tokens.
        alpha: The ratio is Beta(alpha, alpha); > 0. 1, a uniform ratio, is CutMix's. (BEiT masks a fixed 40 %.)
        min_patches: Least area of a block in patches; None: 16 of 196 as in the paper, the same part of other grids.
        min_aspect: Aspect ratios of blocks are from `min_aspect` to 1 / `min_aspect`; 0.3 in the paper.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        seed: As in `MixingStrategy`.
    """

    min_part = 16 / _PATCHES  # `min_patches` as a part of the grid, where it is not given

    def __init__(
        self,
        patch_size: int = 16,
        alpha: float = 1.0,
        min_patches: int | None = None,
        min_aspect: float = 0.3,
        prob: float = 1.0,
        mode: Mode = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(prob, mode, seed)
        check_number("min_aspect", min_aspect)
        if not 0 < min_aspect <= 1:
            raise ValueError(f"min_aspect: expected more than 0 and at most 1, got {min_aspect}")
        self.min_patches = check_integer("min_patches", min_patches, least=1, or_none=True)
        self.patch_size = check_integer("patch_size", patch_size, least=1)
        self.alpha = check_positive("alpha", alpha)
        self.min_aspect = float(min_aspect)

    def _draw(self, count: int, image_size: tuple[int, int]) -> np.ndarray:
        grid = patch_grid(image_size, self.patch_size)
        least = self.min_patches
        if least is None:
            least = max(1, round(self.min_part * math.prod(grid)))
        masks = np.stack([self._draw_blocks(ratio, least, grid) for ratio in self._draw_parts(count)])
        return masks.repeat(self.patch_size, axis=1).repeat(self.patch_size, axis=2)

    def _draw_parts(self, count: int) -> np.ndarray:
        """Draws which part of the patches each mask shall cover, (n,)."""
        return draw_ratios(self.generator, count, self.alpha)

    def _draw_blocks(self, ratio: float, least: int, grid: tuple[int, int]) -> np.ndarray:
        """Draws a mask of blocks, bool of the shape of the grid, that covers about the part `ratio`."""
        mask = np.zeros(grid, dtype=bool)
        left = math.floor(ratio * mask.size)
        while left > 0:
            for _ in range(_ATTEMPTS):
                block = self._draw_block(min(least, left), left, grid)
                added = mask[block].size - np.count_nonzero(mask[block])
                if 0 < added <= left:
                    mask[block] = True
                    left -= added
                    break
            else:
                break
        return mask

    def _draw_block(self, least: int, most: int, grid: tuple[int, int]) -> tuple[slice, slice]:
        """Draws a block of `least` to `most` patches, up to the rounding of its sides."""
        area = self.generator.uniform(least, most)
        aspect = math.exp(self.generator.uniform(math.log(self.min_aspect), -math.log(self.min_aspect)))
        # A block longer than the grid is cut to it.
        sides = (round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)))
        sides = [min(max(side, 1), limit) for side, limit in zip(sides, grid, strict=True)]
        starts = [int(self.generator.integers(limit - side + 1)) for side, limit in zip(sides, grid, strict=True)]
        return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


class TokenMix(BlockWise):
    """TokenMix: half of the tokens, in several regions, are replaced by those of the partner (arXiv 2207.08409).

    The regions are drawn as the blocks of `BlockWise`. The paper's targets, by activation maps of a teacher, are a
    choice of their own (`tlalign.teacher`).

    Args:
        patch_size: Side of a token in pixels; 16 in the paper.
        ratio: Part of the tokens that is replaced; 0.5 in the code of the paper's authors, the same for all images.
        min_patches: Least area of a region in tokens; None: 14 of 196 as in the paper, the same part of other grids.
        min_aspect: As in `BlockWise`, 0.3 in the paper.
        prob: As in `MixingStrategy`.
        mode: As in `MixingStrategy`.
        seed: As in `MixingStrategy`.
    """

    min_part = 14 / _PATCHES

    def __init__(
        self,
        patch_size: int = 16,
        ratio: float = 0.5,
        min_patches: int | None = None,
        min_aspect: float = 0.3,
        prob: float = 1.0,
        mode: Mode = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(patch_size, 1.0, min_patches, min_aspect, prob, mode, seed)
        check_number("ratio", ratio)
        if not 0 < ratio < 1:
            raise ValueError(f"ratio: expected a number between 0 and 1, got {ratio}")
        self.ratio = float(ratio)

    def _draw_parts(self, count: int) -> np.ndarray:
        return np.full(count, self.ratio)


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Returns the patches along each axis; raises ValueError unless they fill the image, and are two at least."""
    if any(length % patch_size for length in image_size) or image_size == (patch_size, patch_size):
        raise ValueError(
            "patch_size: expected a divisor of the sides of the images that gives two patches or more, got "
            f"{patch_size} for images of {image_size}"
        )
    return image_size[0] // patch_size, image_size[1] // patch_size
