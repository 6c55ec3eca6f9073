"""How a map of tokens is divided into windows: which token lies where, and which tokens of a window see each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """A map and its windows, as in Swin Transformers (arXiv 2103.14030, section 3.2) and as timm lays them out.

    The map is rolled by the shift, padded at its end to a multiple of the window, and cut into windows, row after row.
    Padding lies at the end of the rolled map; what is seen of each other is divided in the padded map.

    Attributes:
        map_size: Ht and Wt, tokens of the map along each axis.
        window_size: Tokens of a window along each axis.
        shift: By how many tokens the map is rolled towards its start along each axis.
    """

    map_size: tuple[int, int]
    window_size: tuple[int, int]
    shift: tuple[int, int]

    # Methods, since PyTorch 2.9 and 2.10 can't follow properties of a tuple where they compile for dynamic maps.

    def grid_size(self) -> tuple[int, int]:
        """Windows along each axis."""
        (rows, columns), (height, width) = self.map_size, self.window_size
        return -(-rows // height), -(-columns // width)

    def count(self) -> int:
        """Number of windows W."""
        rows, columns = self.grid_size()
        return rows * columns

    def tokens(self) -> int:
        """Tokens N of a window, with those of the padding."""
        return self.window_size[0] * self.window_size[1]

    def is_padded(self) -> bool:
        """Whether some windows reach beyond the map."""
        (rows, columns), (height, width) = self.map_size, self.window_size
        return rows % height != 0 or columns % width != 0

    def has_regions(self) -> bool:
        """Whether some windows hold parts of the map that are no neighbours, and don't see each other."""
        return any(self.shift)

    def token_numbers(self, device: torch.device | str = "cpu") -> Tensor:
        """Which token of the map, counted row after row, lies where in each window: int64 (W, N), -1 in the padding."""
        (rows, row_inside), (columns, column_inside) = (
            ((position + shift) % tokens, position < tokens)
            for position, tokens, shift in zip(self._positions(device), self.map_size, self.shift, strict=True)
        )
        numbers = rows[:, None] * self.map_size[1] + columns
        numbers = numbers.masked_fill(~(row_inside[:, None] & column_inside), -1)
        return self._cut(numbers)

    def regions(self, device: torch.device | str = "cpu") -> Tensor:
        """Numbers of regions, int64 (W, N): tokens of a window in different ones were brought together by the shift."""
        rows, columns = (
            (position >= len(position) - window).long() + (position >= len(position) - shift)
            for position, window, shift in zip(self._positions(device), self.window_size, self.shift, strict=True)
        )
        return self._cut(rows[:, None] * 3 + columns)

    def gather(self, tokens: Tensor, padding: Tensor | float = 0.0) -> Tensor:
        """Copies a map (B, Ht, Wt, ...) to windows (B * W, N, ...), with `padding` (...) where there is no token."""
        numbers = self.token_numbers(tokens.device)
        flat = tokens.flatten(1, 2)[:, numbers.clamp(min=0).flatten()].unflatten(1, numbers.shape)
        is_padding = (numbers < 0).view(1, *numbers.shape, *(1,) * (tokens.dim() - 3))
        filling = padding if isinstance(padding, Tensor) else tokens.new_full((), padding)
        return torch.where(is_padding, filling, flat).flatten(0, 1)

    def scatter(self, windows: Tensor, tokens: Tensor) -> None:
        """Copies windows (B * W, N, ...) to a map (B, Ht, Wt, ...); what lies in the padding is dropped."""
        _, order = self.places(tokens.device)
        tokens.copy_(windows.reshape(tokens.shape[0], -1, *windows.shape[2:])[:, order].view(tokens.shape))

    def places(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Where padding lies, and the map's tokens in their order, among those of all windows (W * N); int64."""
        numbers, tokens = self.token_numbers(device).flatten(), math.prod(self.map_size)
        # Numbers of the padding are negative. To select by them would have the host wait for a GPU.
        padding, order = numbers.argsort(stable=True).split([numbers.numel() - tokens, tokens])
        return padding, order

    def _positions(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Positions in the rolled and padded map along each axis."""
        rows, columns = (
            torch.arange(number * window, device=device)
            for number, window in zip(self.grid_size(), self.window_size, strict=True)
        )
        return rows, columns

    def _cut(self, padded_map: Tensor) -> Tensor:
        """Cuts a padded map into windows (W, N)."""
        (rows, columns), (height, width) = self.grid_size(), self.window_size
        return padded_map.view(rows, height, columns, width).transpose(1, 2).reshape(self.count(), self.tokens())
