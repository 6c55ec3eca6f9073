"""Attention with label propagation by Triton kernels: GPUs that Triton knows, NVIDIA's from Ampere on; no compiler.

Under `TRITON_INTERPRET=1` the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tlalign_kernels.backends.bias_sums import images_of_sum
from tlalign_kernels.backends.devices import asked_once
from tlalign_kernels.ops import Inputs, WindowInputs, unit_last_stride, unpack_qkv

try:
    import triton

    from tlalign_kernels.backends.triton import kernels

    # Decided where the kernels are decorated: at import.
    _interpreted = triton.knobs.runtime.interpret
    _ARRANGED, _UNBOUNDED, _LOG2_E = kernels.ARRANGED.value, kernels.UNBOUNDED.value, kernels.LOG2_E.value
except Exception as error:  # an older Triton, or a broken one, has errors of many classes
    triton, _interpreted, _missing = None, False, f"{type(error).__name__}: {error}"

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem
    from tlalign_kernels.windows import Windows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products and sums as one instruction; Triton 3.9 warns where nobody says so, and 3.10 no longer does it by itself.
_FUSED = {"enable_fp_fusion": True}
# More sources than these take a pass of their own, whose cost does not grow with the number of heads.
MAX_FUSED_SOURCES = 8
# The scores of a block of queries and so many keys stay in the registers of a program.
MAX_ROW_KEYS = 256
MAX_ROW_KEYS_WITH_OFFSETS = 128
# So do the gradients of so many queries.
MAX_GRADIENT_ROWS = 208
# Shared memory holds the keys and values of so many, of heads of up to 32, and their queries pass by.
MAX_WINDOW_KEYS = 256
# Of so few keys a program takes all heads in turn, if there are enough programs to fill a GPU a few times.
MAX_KEYS_OF_HEADS = 64
MIN_PROGRAMS_OF_HEADS = 2048
# Unless a thread is granted all, the assembler takes fewer for some kernels, and spills.
ALL_REGISTERS = 255


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels can't do `problem`; empty if they can."""
    if triton is None:
        return [f"triton can't be imported: {_missing}"]
    reasons = []
    if problem.device_type != "cuda" and not (_interpreted and problem.device_type == "cpu"):
        reasons.append(f"device: expected cuda, or cpu under TRITON_INTERPRET=1, got {problem.device_type}")
    elif problem.device_type == "cuda" and torch.cuda.is_initialized():
        capability = _capability(torch.device("cuda", problem.device_index))
        if capability < 80:
            # Without the tensor cores that tiles are made for, the compiler takes minutes.
            reasons.append(f"device: expected compute capability 8.0 or newer, got {capability / 10}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype: expected one of {list(_DTYPES)}, got {problem.dtype}")
    if _interpreted and problem.dtype == torch.bfloat16:
        reasons.append("dtype: Triton's interpreter has no products of bfloat16")
    tokens = max(problem.queries, problem.keys) if problem.windows is None else math.prod(problem.windows.map_size)
    if tokens * problem.heads * problem.head_dim >= 2**31:
        reasons.append("query, key: expected less than 2**31 elements in an image, which are counted in 32 bits")
    return reasons


def _at_most(registers: int | None) -> dict[str, int]:
    """The option of a launch that limits the registers of a thread; AMD's compiler has none, not even for no limit."""
    return {} if registers is None or torch.version.hip else {"maxnreg": registers}


class Config(NamedTuple):
    """A kernel and how it is to be compiled.

    Attributes:
        kernel: Its name.
        tiles: Sizes of its tiles.
        warps: Warps of a program.
        stages: Stages of the loads in its loop.
        registers: Most registers of a thread, where the compiler by itself takes a few more than let one more program
            run, or so few that it spills.
    """

    kernel: str
    tiles: dict[str, int | tuple[int, ...]]
    warps: int
    stages: int = 1
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | tuple[int, ...]]:
        """Tiles and options of a launch."""
        return {
            **self.tiles, "num_warps": self.warps, "num_stages": self.stages, **_at_most(self.registers), **_FUSED
        }  # fmt: skip

    def __str__(self) -> str:
        shown = (f"{name}={value}" for name, value in self.options.items() if name not in _FUSED)
        return " ".join([self.kernel, *shown])


class Shape(NamedTuple):
    """What the configurations to choose from depend on; windows of a map count as images."""

    capability: int
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    head_dim: int
    has_offsets: bool
    has_mask: bool = False
    in_windows: bool = False

    @property
    def is_crowded(self) -> bool:
        """Whether offsets may take many registers; those of windows, which are always laid out, don't."""
        return self.has_offsets and not self.in_windows


# Triton's own functions for these take several microseconds a call.
def _blocks(total: int, size: int) -> int:
    """Blocks of `size` that hold `total`."""
    return -(-total // size)


def _power_of_two(number: int) -> int:
    """The least that is not smaller than a positive number."""
    return 1 << (number - 1).bit_length()


def forward_configs(shape: Shape) -> list[tuple[Config]]:
    """Kernels that can do a forward, and their tiles; the first is the default, the others are for `tune` to try.

    The row kernel pads queries to 64 and keys to 16: at N = 197 the scores computed are 1.37 times those needed. What a
    program can hold without spilling registers decides the rest; a bias or mask takes some of them. On an H100 tiles
    that are fetched ahead make up for what streaming computes more: at N = 197 (B = 128, H = 6) 52 us against 66.

    Of windows of 65 to 256 tokens one program has all queries of a head of up to 32: it reads K and V once, and pads
    queries to 32 or 64. In windows of 12 x 12 on sm_80 that is 10.5 k instructions a head, where the row kernel took
    16.3 k, and 3.8 k cycles for 7.0 k of the busiest pipe.
    """
    queries, keys, head_dim = shape.queries, shape.keys, shape.head_dim
    block, warps = (16, 2) if queries <= 16 else (32, 2) if queries <= 32 else (64, 4)
    stream = (_stream_config(shape, block, warps),)
    if shape.dtype == torch.float32 or head_dim > 64:
        return [stream]
    if shape.in_windows and 64 < keys <= MAX_WINDOW_KEYS and head_dim <= 32:
        # Two warps have a head. Of long ones few fit in the shared memory of others than sm_90 and sm_100: four do.
        block, warps = (64, 4) if keys > 208 and not _has_warp_groups(shape) else (32, 2)
        return [(Config("attention_forward_window", dict(BLOCK_Q=block, **_row_tiles(keys)), warps),), stream]
    configs = [stream] if keys > 64 else []
    if keys <= 64 and not shape.is_crowded and not _has_warp_groups(shape):
        # Warps of 32 queries read K and V from shared memory half as often as those of 16, and execute a seventh less.
        warps = 2
    if keys <= (MAX_ROW_KEYS_WITH_OFFSETS if shape.has_offsets else MAX_ROW_KEYS):
        registers = None
        if shape.capability == 90 and keys <= 208 and not shape.has_offsets:
            registers = 168  # of 65536, for three programs of 128 threads
        elif shape.capability == 100 and shape.has_offsets:
            registers = ALL_REGISTERS
        row = Config("attention_forward_row", dict(BLOCK_Q=block, **_row_tiles(keys)), warps, registers=registers)
        streams = shape.capability == 90 and queries > 64 and keys > 64 and not shape.has_offsets
        configs.insert(1 if streams else 0, (row,))
    if keys <= MAX_KEYS_OF_HEADS and not shape.is_crowded:
        tiles = dict(BLOCK_Q=block, BLOCK_K=max(16, _power_of_two(keys)))
        is_default = shape.batch * _blocks(queries, block) >= MIN_PROGRAMS_OF_HEADS
        configs.insert(0 if is_default else 1, (Config("attention_forward_heads", tiles, warps),))
    return configs


def _stream_config(shape: Shape, block: int, warps: int) -> Config:
    name, keys, head_dim = "attention_forward_stream", shape.keys, shape.head_dim
    if shape.dtype == torch.float32:
        # A factor's two parts are kept for all tiles, and take the registers of two.
        if shape.capability == 90 and head_dim <= 64 and block == 64:
            if shape.has_offsets or shape.queries <= 64:
                return Config(name, dict(BLOCK_Q=64, TILE=16 if shape.has_offsets and head_dim > 32 else 32, TAIL=0), 4)
            if head_dim <= 32:
                return Config(name, dict(BLOCK_Q=64, TILE=32, TAIL=0), 4, 3)
            return Config(name, dict(BLOCK_Q=128, TILE=64, TAIL=0), 8, 2)
        if shape.capability == 90 and head_dim <= 128 and block == 64:
            if shape.has_offsets:
                return Config(name, dict(BLOCK_Q=64, TILE=16, TAIL=0), 4)
            if shape.queries > 64:
                return Config(name, dict(BLOCK_Q=128, TILE=32, TAIL=0), 8)
        # With all registers, heads of 96 and less spill more on sm_100 and sm_120. Tiles of 8 keys would need few, and
        # a sixth more instructions; Triton 3.8 compiles them wrongly beside a mask of bytes, older Triton not at all.
        registers = None if shape.capability >= 100 and head_dim <= 96 else _registers(shape)
        # What is fetched ahead goes to shared memory directly.
        stages = 2 if shape.capability == 100 and head_dim > 64 and not shape.has_offsets else 1
        return Config(name, dict(BLOCK_Q=min(block, 32), TILE=16, TAIL=0), 2, stages, registers)
    if shape.has_offsets:
        if head_dim <= 64 and shape.queries > 64 and not shape.has_mask:
            # A bias that is laid out leaves registers to larger tiles, or to those that are fetched ahead.
            if _has_warp_groups(shape):
                return Config(name, dict(BLOCK_Q=64, TILE=64, TAIL=0), 4, 2)
            return Config(name, dict(BLOCK_Q=128, TILE=32, TAIL=0), 4)
        tiles = dict(BLOCK_Q=min(block, 64 if head_dim <= 128 else 32), TILE=32 if head_dim <= 64 else 16, TAIL=0)
        return Config(name, tiles, 8 if head_dim > 128 else warps)
    if head_dim <= 64:
        if shape.queries <= 64 or shape.capability >= 120:
            return Config(name, dict(BLOCK_Q=block, **_stream_tiles(keys, 64)), warps, 2)
        if shape.capability == 90:
            return Config(name, dict(BLOCK_Q=64, **_stream_tiles(keys, 32 if keys <= 256 else 64)), 4, 3)
        # Warps of 32 queries read K and V from shared memory half as often as those of 16.
        return Config(name, dict(BLOCK_Q=128, **_stream_tiles(keys, 64 if _has_warp_groups(shape) else 32)), 4, 2)
    if head_dim <= 128:
        if shape.queries > 64 and shape.capability == 90:
            return Config(name, dict(BLOCK_Q=64, **_stream_tiles(keys, 32)), 4, 3)
        if shape.queries > 64 and shape.capability < 120:
            return Config(name, dict(BLOCK_Q=128, **_stream_tiles(keys, 32)), 8, 2)
        return Config(name, dict(BLOCK_Q=block, **_stream_tiles(keys, 32)), 4)
    return Config(name, dict(BLOCK_Q=block, **_stream_tiles(keys, 16)), 8, 2)


def _stream_tiles(keys: int, tile: int) -> dict[str, int]:
    """Whole tiles and a tail, a power of two of at least 16."""
    rest = keys % tile
    return dict(TILE=tile, TAIL=rest and max(16, _power_of_two(rest)))


def _row_tiles(tokens: int) -> dict[str, tuple[int, ...]]:
    """Tiles of 64 and one or two smaller ones, powers of two as Triton wants them, for tokens rounded up to 16."""
    rest = (tokens % 64 + 15) // 16 * 16
    return dict(TILES=(64,) * (tokens // 64) + {0: (), 48: (32, 16)}.get(rest, (rest,)))


def _padded_keys(tiles: dict[str, int | tuple[int, ...]], keys: int) -> int:
    """The keys of all tiles of a forward together."""
    if "TILES" in tiles:
        return sum(tiles["TILES"])
    tile = tiles.get("BLOCK_K") or tiles["TILE"]
    tail = tiles.get("TAIL", 0)
    return keys // tile * tile + tail if tail else _blocks(keys, tile) * tile


def backward_configs(shape: Shape) -> list[tuple[Config, ...]]:
    """One program a head (which has `TILES` of queries), or one kernel for queries and one for keys; default first.

    One program computes five products where two kernels need seven, and reads everything once. For up to 64 queries it
    is the default. For 197 it executes the fewest instructions as well (N = 197, D = 64: 41 k warp instructions a head
    against 63 k on sm_80), but with dQ in registers only few keys fit beside, and each warp reads for them what others
    read too: the traffic of shared memory, which bounds all of these kernels, takes 41 k cycles a head on sm_80, where
    that of the two kernels takes 28 k. An H100 took 286 us, with more instructions than now, for what the two kernels
    did in 147. So it is for `tune` to try there. A bias leaves it no registers; sm_86, sm_89 and float16 on sm_90 have
    room for 16 keys, sm_120 for none. Nor have other architectures, with most lengths below 193, whose last tiles are
    larger, and heads of neither 32 nor 64. Windows of 12 x 12 with a bias have room but on sm_120: 20 k instructions
    (15 k cycles) a head of a window on sm_80 where two kernels, which pad 144 to 192, take 46 k (19 k). On sm_90 cycles
    are nearly the same (11 k and 12 k), and more warps are resident with two.
    """
    queries, head_dim = shape.queries, shape.head_dim
    split = _queries_config(shape), _keys_config(shape)
    if shape.dtype == torch.float32 or head_dim > 64 or queries > MAX_GRADIENT_ROWS:
        return [split]
    if queries <= 64:
        warps = 2 if head_dim <= 32 and not _has_warp_groups(shape) and not shape.is_crowded else 4
        head = Config("attention_backward_head", _head_tiles(shape, 64), warps)
        return [(head,), split]
    if shape.in_windows and shape.has_offsets and (queries, head_dim) == (144, 32) and shape.capability < 120:
        head = Config("attention_backward_head", _head_tiles(shape, 16 if shape.capability == 80 else 32), 4)
        return [split, (head,)] if _has_warp_groups(shape) else [(head,), split]
    if shape.has_offsets or shape.capability >= 120 or queries <= 192 or head_dim not in (32, 64):
        return [split]
    is_tight = shape.capability in (86, 89) or (shape.capability == 90 and shape.dtype == torch.float16)
    head = Config("attention_backward_head", _head_tiles(shape, 16 if is_tight else 32), 8)
    return [split, (head,)]


def _head_tiles(shape: Shape, block: int) -> dict[str, int | tuple[int, ...]]:
    """Tiles of all queries, and blocks of keys; the last one is a tail of its own where that is shorter."""
    tail = _stream_tiles(shape.keys, block)["TAIL"]
    return dict(BLOCK_K=block, TAIL_K=tail if tail < block else 0, **_row_tiles(shape.queries))


def _backward_config(
    kernel: str, block_q: int, block_k: int, warps: int, stages: int = 1, registers: int | None = None
) -> Config:
    tiles = dict(BLOCK_Q=block_q, BLOCK_K=block_k)
    return Config(f"attention_backward_{kernel}", tiles, warps, stages, registers)


def _queries_config(shape: Shape) -> Config:
    """Warps of 32 rows read from shared memory half as often as those of 16, where the registers suffice."""
    config = functools.partial(_backward_config, "queries")
    head_dim, is_short = shape.head_dim, shape.queries <= 64
    if shape.dtype == torch.float32:
        if shape.capability == 90 and head_dim <= 64:
            if is_short or shape.has_offsets:
                return config(64, 32, 4)
            return config(128, 32 if head_dim <= 32 else 64, 8)
        return config(32 if head_dim <= 32 else 16, 16, 2, registers=_registers(shape))
    if shape.has_offsets:
        if shape.in_windows and head_dim <= 32:
            return config(64, 64, 4)
        if head_dim <= 64 and shape.capability < 120 and not is_short and not shape.has_mask:
            return config(128, 32, 8 if _has_warp_groups(shape) else 4)
        if head_dim <= 64:
            return config(64, 16 if shape.capability >= 120 else 32, 4)
        if head_dim <= 96 and not _has_warp_groups(shape):
            return config(64, 16, 4, registers=ALL_REGISTERS)
        return config(64 if _has_warp_groups(shape) and head_dim <= 128 else 32, 32, 4 if head_dim <= 128 else 8)
    if head_dim > 128:
        return config(32, 32, 8)
    if shape.capability == 90:
        return config(64, 32, 4, 3 if head_dim <= 64 else 2)
    # The next tile, fetched ahead, takes more registers than most leave.
    stages = 2 if head_dim <= 32 or shape.capability == 80 else 1
    if head_dim > 64:
        return config(64, 32, 4, stages) if is_short else config(128, 32, 8)
    if _has_warp_groups(shape):
        return config(64 if is_short else 128, 64, 4)
    return config(64, 32, 2, stages) if is_short else config(128, 32, 4, stages)


def _keys_config(shape: Shape) -> Config:
    config, head_dim = functools.partial(_backward_config, "keys"), shape.head_dim
    if shape.dtype == torch.float32:
        if head_dim > 96 and shape.capability >= 100:
            # With all registers, or twice the queries on sm_120, it spills.
            return config(16 if shape.capability >= 120 else 32, 16, 4, registers=252)
        if head_dim > 64:
            return config(32, 16, 4, registers=_registers(shape))
        if shape.capability == 90:
            if shape.has_offsets and head_dim > 32:
                return config(16, 64, 4)
            return config(32, 64, 4) if head_dim <= 32 or shape.keys <= 64 else config(32, 128, 8)
        if head_dim <= 32:
            return config(16, 32, 2, registers=ALL_REGISTERS)
        return config(32, 16, 4) if shape.has_offsets else config(16, 16, 2)
    if shape.has_offsets and shape.in_windows and head_dim <= 32:
        is_tight = shape.capability >= 120 and shape.dtype == torch.float16
        return config(32 if is_tight else 64, 64, 4)
    if shape.capability == 90 and head_dim <= 128 and not shape.has_offsets:
        if head_dim > 64 or shape.keys <= 64:
            return config(32, 64, 4, 3 if head_dim <= 64 else 2)
        return config(32, 128, 8)
    # Either lacks registers for more queries at once; where it is both, smaller heads do, too.
    lacks_registers = (shape.has_offsets, shape.capability >= 120)
    if any(lacks_registers) and (32 if all(lacks_registers) else 64) < head_dim <= 96:
        return config(16, 64, 4)
    if head_dim > 64 or shape.has_offsets:
        block, warps = (64, 4) if head_dim <= 128 else (32, 8)
        return config(32, min(block, 32) if head_dim > 64 and shape.has_offsets else block, warps)
    if _has_warp_groups(shape):
        return config(32, 128, 4)
    # What is fetched ahead takes registers that float16 has not left.
    stages = 1 if shape.dtype == torch.float16 and shape.capability == 80 and head_dim > 32 else 2
    return config(32, 128 if head_dim <= 32 or shape.capability == 80 else 64, 4, stages)


def _bias_config(shape: Shape) -> Config:
    """The gradient of a bias; tiles of 64 x 64 take less than half the instructions of a score, where they fit."""
    head_dim, name = shape.head_dim, "attention_backward_bias"
    if shape.in_windows and head_dim <= 32 and shape.dtype != torch.float32:
        block = 64 if shape.capability < 120 else 32
        is_tight = shape.dtype == torch.float16 and not _has_warp_groups(shape)
        return Config(name, dict(BLOCK_Q=block, BLOCK_K=block), 8 if is_tight else 4)
    if shape.dtype == torch.float32:
        if shape.in_windows and shape.capability == 90 and head_dim <= 32:
            return Config(name, dict(BLOCK_Q=32, BLOCK_K=64), 4)
        if head_dim <= 32:
            return Config(name, dict(BLOCK_Q=16, BLOCK_K=32), 4)
        return Config(name, dict(BLOCK_Q=32, BLOCK_K=32), 4, 2, ALL_REGISTERS)
    warps = 8 if 32 < head_dim <= 64 or head_dim > 128 else 4
    return Config(name, dict(BLOCK_Q=32, BLOCK_K=32 if head_dim <= 64 else 16), warps)


def _registers(shape: Shape) -> int | None:
    return ALL_REGISTERS if _takes_narrow_blocks(shape.dtype, shape.head_dim, shape.has_offsets) else None


def _forward_width(shape: Shape) -> int:
    """Columns of a narrow block: beside a bias those of 16 spill on sm_100 and sm_120, as do wider ones that pad."""
    return 32 if shape.capability >= 100 and shape.has_offsets and shape.head_dim in (96, 128) else 16


def _takes_narrow_blocks(dtype: torch.dtype, head_dim: int, has_offsets: bool) -> bool:
    """Whether products of float32, of whose factors two parts are kept, are to leave registers for others."""
    return dtype == torch.float32 and head_dim > 32 and (head_dim > 64 or has_offsets)


def _has_warp_groups(shape: Shape) -> bool:
    """Whether tensor cores read from shared memory, so that warps need not: sm_90 and sm_100."""
    return shape.capability in (90, 100)


# What `prefer` was told, for a direction and a class of problems.
_preferred: dict[tuple, tuple[Config, ...]] = {}


def _chosen(configs: Callable[[Shape], list[tuple[Config, ...]]], shape: Shape, *others: object) -> tuple[Config, ...]:
    return (_preferred and _preferred.get(_class_of(configs, shape, *others))) or configs(shape)[0]


def _class_of(
    configs: Callable[[Shape], list[tuple[Config, ...]]],
    shape: Shape,
    heads: int,
    has_bias: bool,
    has_mask: bool,
    dropout_p: float,
    windows: Windows | None,
    sources: int,
) -> tuple:
    """All but the batch, and in a backward the labels, of which it knows nothing."""
    labels = () if configs is backward_configs else (sources,)
    return (configs, shape._replace(batch=0), heads, has_bias, has_mask, dropout_p, windows, *labels)


def _directions(problem: Problem) -> list[tuple]:
    """What `_chosen` is asked in the forward and, if needed, the backward of a problem."""
    _, dtype, batch, heads, queries, keys, head_dim, sources, _, has_bias, has_mask, dropout_p, _, windows, _ = problem
    capability = _capability(torch.device(problem.device_type, problem.device_index))
    in_windows = windows is not None
    shape = Shape(
        capability, dtype, batch, queries, keys, head_dim, has_bias or has_mask, has_mask and not in_windows, in_windows
    )
    asked = shape, heads, has_bias, has_mask, dropout_p, windows, sources
    directions = (forward_configs, backward_configs) if problem.needs_gradient else (forward_configs,)
    return [(configs, *asked) for configs in directions]


def configurations(problem: Problem) -> list[tuple[Config, ...]]:
    """What `tune` may choose from: kernels of forward and, if needed, backward; the first is the default."""
    of_each = (configs(shape) for configs, shape, *_ in _directions(problem))
    return [sum(chosen, ()) for chosen in itertools.product(*of_each)]


def prefer(problem: Problem, configuration: tuple[Config, ...]) -> None:
    """Has launches for such problems, of any batch, take this configuration from now on."""
    forward, *backward = configuration
    for direction, chosen in zip(_directions(problem), ((forward,), tuple(backward)), strict=False):
        _preferred[_class_of(*direction)] = chosen


@contextlib.contextmanager
def preferences_kept() -> Iterator[None]:
    """Context at whose end everything is preferred again that was at its start, and nothing else."""
    before = _preferred.copy()
    try:
        yield
    finally:
        _preferred.clear()
        _preferred.update(before)


def configuration_of(problem: Problem) -> tuple[Config, ...]:
    """The kernels that launches for a problem take."""
    return sum((_chosen(*direction) for direction in _directions(problem)), ())


def forward(
    inputs: Inputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
    windows: Windows | None = None,
    pad_qkv: Tensor | None = None,
) -> None:
    """Computes A.V and mean_h(A).share into the given tensors; see `reference.forward`.

    Within windows, query, key and value (B, H, Ht * Wt, D) are those of a map, as are the labels (B, Ht, Wt, S).
    """
    given = _given(inputs.bias, inputs.mask, windows)
    inputs, kinds = _readable(inputs, windows)
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
    batch, heads, queries, keys, _ = _sizes(query, key, windows)
    tokens, sources = key.shape[2], 0 if share is None else share.shape[-1]
    fused = sources if sources <= MAX_FUSED_SOURCES else 0
    parts = 1 if query.dtype == torch.float32 else 3
    has_offsets = bias is not None or mask is not None
    # A label more than there are sources: whether a key is real.
    padded = int(pad_qkv is not None)
    shape = _shape_of(query, key, has_offsets, mask is not None, windows)
    (config,) = _chosen(forward_configs, shape, heads, *given, dropout_p, windows, sources)
    grid = _blocks(queries, config.tiles["BLOCK_Q"]) * batch
    parts_row = _padded_keys(config.tiles, keys)
    strides = (*_strides(query, key, value), *_offset_strides(bias, mask))
    numbers = (_factor(scale, has_offsets), *_dropout(dropout_p))
    # The kernels for few keys are made for one length: what it is padded by, and whether a load needs a mask, are
    # constants.
    constant_sizes = dict(HEADS=heads, QUERIES=queries, KEYS=keys, GAP=_gap(query, key, value))
    how = dict(
        **_rows(query=query, key=key, value=value), **_columns(query, has_offsets, _forward_width(shape)),
        **kinds, COLUMNS=max(8, _power_of_two(1 + fused * parts + padded)), SOURCES=fused,
        PARTS=parts, PARTS_ROW=parts_row, DROPS=dropout_p > 0, FOLDS=scale > 0 and not has_offsets,
        PRECISION=_precision(), WINDOWS=windows, **config.options,
    )  # fmt: skip
    with _device_of(query):
        packed = head_share = None
        if fused:
            packed = query.new_empty((batch, fused * parts + padded, parts_row))
            block = min(256, _power_of_two(parts_row))
            kernels.pack_labels[(_blocks(parts_row, block) * batch,)](
                share, packed, keys, tokens, SOURCES=fused, PARTS=parts, PARTS_ROW=parts_row, WINDOWS=windows,
                BLOCK=block, num_warps=2, **_FUSED,
            )  # fmt: skip
        tensors = (query, key, value, pad_qkv, packed, bias, mask, dropout_seed, output, log_sum_exp)
        if config.kernel == "attention_forward_heads":
            kernels.attention_forward_heads[(grid,)](
                *tensors, residual, share_out, *strides, *numbers, HAS_RESIDUAL=residual is not None,
                **constant_sizes, **how,
            )  # fmt: skip
        else:
            if fused:
                head_share = query.new_empty((batch, heads, fused + padded, queries), dtype=torch.float32)
            if config.kernel == "attention_forward_stream":
                kernels.attention_forward_stream[(grid * heads,)](
                    *tensors, head_share, *strides, heads, queries, keys, *numbers, **how
                )
            else:
                takes_all_queries = config.kernel == "attention_forward_window"
                getattr(kernels, config.kernel)[((batch if takes_all_queries else grid) * heads,)](
                    *tensors, head_share, *strides, *numbers, **constant_sizes, **how
                )
            if fused:
                kernels.average_heads[(_blocks(queries, 64) * batch,)](
                    head_share, log_sum_exp, residual, share_out, heads, queries,
                    SOURCES=fused, HAS_RESIDUAL=residual is not None, MASKED=has_offsets, WINDOWS=windows, BLOCK=64,
                    num_warps=2, **_FUSED,
                )  # fmt: skip
        if sources > fused:
            _mix_dense_labels(inputs, kinds, share, residual, share_out, log_sum_exp, windows, pad_qkv)


def _mix_dense_labels(
    inputs: Inputs,
    kinds: dict[str, int],
    share: Tensor,
    residual: Tensor | None,
    share_out: Tensor,
    log_sum_exp: Tensor,
    windows: Windows | None,
    pad_qkv: Tensor | None,
) -> None:
    """Computes mean_h(A).share of many sources in a pass of its own; `inputs` and `kinds` are of `_readable`."""
    query, key, _, bias, mask, _, scale, _ = inputs
    batch, heads, queries, keys, _ = _sizes(query, key, windows)
    inverse = _inverse(inputs, kinds, log_sum_exp, windows, pad_qkv)
    # In float32, blocks of columns of any head pass by: three products of TF32 take many registers.
    is_float = query.dtype == torch.float32
    kernels.dense_share[(_blocks(queries, 32) * batch,)](
        query, key, pad_qkv, bias, mask, log_sum_exp, inverse, share, residual, share_out,
        *_strides(query, key), *_offset_strides(bias, mask),
        heads, queries, keys, share.shape[-1], _factor(scale, bias is not None or mask is not None),
        **_rows(query=query, key=key), **_columns(query, True),
        **kinds, PRECISION=_precision(),
        NORMALISES=inverse is not None, WINDOWS=windows, HAS_RESIDUAL=residual is not None,
        BLOCK_Q=32, TILE=32, LABELS=32, num_warps=8, num_stages=2 if is_float else 3,
        **_FUSED,
        **_at_most(ALL_REGISTERS if is_float else None),
    )  # fmt: skip


def backward(
    inputs: Inputs,
    grad_output: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor | None,
    windows: Windows | None = None,
    pad_qkv: Tensor | None = None,
    grad_pad_qkv: Tensor | None = None,
) -> None:
    """Computes the gradients into the given tensors; see `reference.backward`, and `forward` for what windows change.

    Within windows, grad_output (B, Ht * Wt, H, D) and the gradients of query, key and value are those of a map.
    """
    given = _given(inputs.bias, inputs.mask, windows)
    inputs, kinds = _readable(inputs, windows)
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
    batch, heads, queries, keys, head_dim = _sizes(query, key, windows)
    grad_output = unit_last_stride(grad_output.transpose(1, 2))
    has_offsets = bias is not None or mask is not None
    shape = _shape_of(query, key, has_offsets, mask is not None, windows)
    config, *of_keys = _chosen(backward_configs, shape, heads, *given, dropout_p, windows, 0)
    factor, dropout = _factor(scale, has_offsets), _dropout(dropout_p)
    with _device_of(query):
        inverse = _inverse(inputs, kinds, log_sum_exp, windows, pad_qkv)
        is_head = config.kernel == "attention_backward_head"
        # One program a head keeps them to itself, unless the bias wants them.
        row_terms = None if is_head and grad_bias is None else torch.empty_like(log_sum_exp)
        tensors = (query, key, value, grad_output)
        constants = (pad_qkv, bias, mask, dropout_seed, log_sum_exp, inverse)
        strides = (*_strides(*tensors), *_offset_strides(bias, mask))
        gradients = dict(grad_query=grad_query, grad_key=grad_key, grad_value=grad_value)
        pad_sums = None
        if grad_pad_qkv is not None:
            # A sum for each block of keys of each window; added below, in fixed order.
            blocks = _blocks(keys, (config if is_head else of_keys[0]).tiles["BLOCK_K"])
            pad_sums = query.new_zeros((batch * blocks, heads, 2, head_dim), dtype=torch.float32)
        how = dict(
            **_rows(query=query, key=key, value=value, grad_output=grad_output), **_columns(query, has_offsets, 32),
            **kinds, DROPS=dropout_p > 0, NORMALISES=inverse is not None,
            PRECISION=_precision(), WINDOWS=windows,
        )  # fmt: skip
        if is_head:
            gap = _gap(query, key, value)
            kernels.attention_backward_head[(batch * heads,)](
                *tensors, output, *constants, row_terms, *gradients.values(), pad_sums,
                *strides, *_strides(*gradients.values()), scale, factor, *dropout,
                HEADS=heads, QUERIES=queries, KEYS=keys, **_rows(**gradients), **how,
                GAP=gap if gap == _gap(*gradients.values()) else 0,
                **config.options,
            )  # fmt: skip
        else:
            sizes = (heads, queries, keys, scale, factor, *dropout)
            kernels.attention_backward_queries[(_blocks(queries, config.tiles["BLOCK_Q"]) * batch * heads,)](
                *tensors, output, *constants, row_terms, grad_query, *strides, *_strides(grad_query),
                *sizes, **_rows(grad_query=grad_query), **how, **config.options,
            )  # fmt: skip
            kernels.attention_backward_keys[(_blocks(keys, of_keys[0].tiles["BLOCK_K"]) * batch * heads,)](
                *tensors, *constants, row_terms, grad_key, grad_value, pad_sums, *strides,
                *_strides(grad_key, grad_value), *sizes, **_rows(grad_key=grad_key, grad_value=grad_value), **how,
                **of_keys[0].options,
            )  # fmt: skip
        if grad_pad_qkv is not None:
            # Queries in the padding have no output, and no gradient.
            grad_pad_qkv[0].zero_()
            grad_pad_qkv[1:].copy_(pad_sums.sum(dim=0).transpose(0, 1))
        if grad_bias is not None:
            # In float32 blocks of columns pass by, as for `dense_share`.
            of_bias = {**how, **_columns(query, has_offsets)}
            sums = _bias_sums(
                grad_bias.shape, shape, heads, (*tensors, *constants, row_terms), strides, (factor, *dropout), of_bias
            )
            grad_bias.copy_(sums if grad_bias.shape[0] == batch else sums.sum(dim=0, keepdim=True))


def _bias_sums(
    grad_shape: tuple[int, ...],
    shape: Shape,
    heads: int,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    numbers: tuple[float, ...],
    how: dict[str, object],
) -> Tensor:
    """Sums over images, float32 (parts, 1 or H, Nq, Nk), of which the gradient of a bias of some shape consists.

    Arguments after `heads` are those of the kernel, as `backward` hands them to its others.
    """
    config = _bias_config(shape)
    images, bias_heads = grad_shape[:2]
    tiles = _blocks(shape.queries, config.tiles["BLOCK_Q"]) * _blocks(shape.keys, config.tiles["BLOCK_K"]) * bias_heads
    images_of_part = images_of_sum(shape.batch, images, tiles)
    parts = _blocks(shape.batch, images_of_part)
    sums = tensors[0].new_empty((parts, bias_heads, shape.queries, shape.keys), dtype=torch.float32)
    kernels.attention_backward_bias[(tiles * parts,)](
        *tensors, sums, *strides, shape.batch, heads, shape.queries, shape.keys, bias_heads, images_of_part, *numbers,
        **how, **config.options,
    )  # fmt: skip
    return sums


def window_forward(
    inputs: WindowInputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes attention and labels within the windows of a map; see `reference.window_forward`.

    A map whose rows of tokens are not evenly spaced in memory is copied once.
    """
    forward(_of_map(inputs), share, residual, output, share_out, log_sum_exp, inputs.windows, inputs.pad_qkv)


def window_backward(
    inputs: WindowInputs,
    grad_output: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_qkv: Tensor,
    grad_pad_qkv: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients into the given tensors; see `reference.window_backward`, and `window_forward`."""
    backward(
        _of_map(inputs), grad_output.flatten(1, 2), output, log_sum_exp, *unpack_qkv(grad_qkv.flatten(1, 2)), grad_bias,
        inputs.windows, inputs.pad_qkv, grad_pad_qkv,
    )  # fmt: skip


def _of_map(inputs: WindowInputs) -> Inputs:
    """The same without windows, query, key and value (B, H, Ht * Wt, D)."""
    qkv, _, bias, dropout_seed, _, scale, dropout_p = inputs
    return Inputs(*unpack_qkv(qkv.flatten(1, 2)), bias, None, dropout_seed, scale, dropout_p)


def _sizes(query: Tensor, key: Tensor, windows: Windows | None) -> tuple[int, int, int, int, int]:
    """B, H, Nq, Nk and D; windows count as images."""
    batch, heads, queries, head_dim = query.shape
    if windows is None:
        return batch, heads, queries, key.shape[2], head_dim
    return batch * windows.count(), heads, windows.tokens(), windows.tokens(), head_dim


def _arranged(
    bias: Tensor | None, query: Tensor, queries: int, keys: int, row: int, windows: Windows | None
) -> Tensor | None:
    """A bias that all images share, as the kernels read it, for each kind of window; regions also if there is none."""
    has_regions = windows is not None and windows.has_regions()
    if bias is None and not has_regions:
        return None
    heads = 1 if bias is None else bias.shape[1]
    dtype = query.dtype if bias is None else bias.dtype
    arranged = query.new_empty((4 if has_regions else 1, heads, queries, row), dtype=dtype)
    block = min(1024, _power_of_two(row))
    with _device_of(query):
        kernels.arrange_bias[(arranged.numel() // row,)](
            bias, arranged, *_offset_strides(bias)[1:], heads, queries, keys, row, HAS_BIAS=bias is not None,
            WINDOWS=windows, BLOCK=block, num_warps=max(1, block // 256), **_FUSED,
        )  # fmt: skip
    return arranged


def _inverse(
    inputs: Inputs, kinds: dict[str, int], log_sum_exp: Tensor, windows: Windows | None, pad_qkv: Tensor | None
) -> Tensor | None:
    """What makes up for the rounding of a large log-sum-exp; bfloat16 itself rounds more than that."""
    query, key, _, bias, mask, _, scale, _ = inputs
    if query.dtype == torch.bfloat16:
        return None
    batch, heads, queries, keys, head_dim = _sizes(query, key, windows)
    has_offsets = bias is not None or mask is not None
    inverse = torch.empty_like(log_sum_exp)
    block = 32 if head_dim <= 64 else 16
    kernels.normalise[(_blocks(queries, block) * batch * heads,)](
        query, key, pad_qkv, bias, mask, log_sum_exp, inverse,
        *_strides(query, key), *_offset_strides(bias, mask), heads, queries, keys,
        _factor(scale, has_offsets), **_rows(query=query, key=key), **_columns(query, has_offsets),
        **kinds, PRECISION=_precision(), WINDOWS=windows, BLOCK_Q=block, TILE=block,
        num_warps=4, **_at_most(None if query.dtype == torch.float32 else ALL_REGISTERS), **_FUSED,
    )  # fmt: skip
    return inverse


def _given(bias: Tensor | None, mask: Tensor | None, windows: Windows | None) -> tuple[bool, bool]:
    """Whether there is a bias and, as regions of windows are, a mask."""
    return bias is not None, mask is not None or (windows is not None and windows.has_regions())


def _shape_of(query: Tensor, key: Tensor, has_offsets: bool, has_mask: bool, windows: Windows | None) -> Shape:
    batch, _, queries, keys, head_dim = _sizes(query, key, windows)
    capability = _capability(query.device)
    return Shape(capability, query.dtype, batch, queries, keys, head_dim, has_offsets, has_mask, windows is not None)


@asked_once
def _capability(device: torch.device) -> int:
    """Compute capability such as 90, 100 for all that have its tensor cores; what is interpreted has large tiles."""
    if torch.version.hip:
        # ROCm numbers otherwise: a MI200 says 9.0, and has neither Hopper's warp groups nor its shared memory.
        return 94
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 100 if major in (10, 11) else 10 * major + minor


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _readable(inputs: Inputs, windows: Windows | None) -> tuple[Inputs, dict[str, int]]:
    """The same with bias and mask as the kernels read them, and of which kinds these are; see `_add_offsets` there."""
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
    bias, mask = _readable_offsets(bias), _readable_offsets(mask)
    _, _, queries, keys, _ = _sizes(query, key, windows)
    # One that all images share, and queries don't. Rows of a multiple of 16 numbers begin at addresses from which a
    # thread reads several at once; beside a mask, or in float32, that takes too many registers.
    is_arranged = windows is not None or (bias is not None and bias.shape[0] == 1 and bias.stride(2) > 0)
    is_crowded = windows is None and (mask is not None or query.dtype == torch.float32)
    if is_arranged:
        bias = _arranged(bias, query, queries, keys, keys if is_crowded else -(-keys // 16) * 16, windows)
    kinds = {
        "BIAS": 0 if bias is None else _UNBOUNDED if not is_arranged else 1 if is_crowded else _ARRANGED,
        "MASK": 0 if mask is None else 2 if mask.dtype == torch.uint8 else 1,
    }
    return Inputs(query, key, value, bias, mask, dropout_seed, scale, dropout_p), kinds


def _readable_offsets(offsets: Tensor | None) -> Tensor | None:
    """Bytes instead of bool."""
    return offsets.view(torch.uint8) if offsets is not None and offsets.dtype == torch.bool else offsets


@functools.lru_cache(4096)  # asked for each tensor of a call, and for the same ones in each step
def _check_extent(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Within an image and head the kernels count with 32 bits."""
    if sum((size - 1) * stride for size, stride in zip(shape[2:], strides[2:], strict=True)) >= 2**31:
        raise NotImplementedError(f"{name}: expected less than 2**31 elements from the first to the last of a head")


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of images and heads."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _rows(**tensors: Tensor) -> dict[str, int]:
    """Strides of rows, which a model fixes: as constants they cost the kernels no multiplications."""
    rows = {}
    for name, tensor in tensors.items():
        strides = tensor.stride()
        _check_extent(name, tensor.shape, strides)
        rows[f"{name.upper()}_ROW"] = strides[2]
    return rows


def _gap(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Elements from query to key and from key to value if they are a packed projection (B, N, 3, H, D), else 0."""
    _, heads, queries, head_dim = query.shape
    gap, row = heads * head_dim, 3 * heads * head_dim
    size = query.element_size()
    is_packed = (
        key.shape == query.shape
        and query.stride() == key.stride() == value.stride() == (queries * row, head_dim, row, 1)
        and key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == gap * size
    )
    return gap if is_packed else 0


def _offset_strides(*offsets: Tensor | None) -> list[int]:
    strides = []
    for tensor in offsets:
        if tensor is None:
            strides += [0] * 4
            continue
        _check_extent("bias, mask", tensor.shape, tensor.stride())
        strides += [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return strides


def _columns(query: Tensor, has_offsets: bool, narrow: int = 16) -> dict[str, int | tuple[int, ...]]:
    """Columns of a head, and the widths of the blocks they lie in: powers of two from 16 on, or `narrow` ones."""
    head_dim = query.shape[-1]
    if _takes_narrow_blocks(query.dtype, head_dim, has_offsets):
        return {"D": head_dim, "WIDTHS": (narrow,) * _blocks(head_dim, narrow)}
    whole = max(16, _power_of_two(head_dim))
    half = whole // 2
    # Eight warps, which heads wider than 128 take, would all do the same in a narrow block.
    rest = max(64 if head_dim > 128 else 16, _power_of_two(max(1, head_dim - half)))
    return {"D": head_dim, "WIDTHS": (half, rest) if rest < half else (whole,)}


def _factor(scale: float, has_offsets: bool) -> float:
    """Of products of queries and keys; see `_unit` of the kernels."""
    return scale if has_offsets else scale * _LOG2_E


def _dropout(dropout_p: float) -> tuple[int, float]:
    """Words below the first are dropped; the second makes up for them. As the reference has it."""
    return min(round(dropout_p * 2**32), 2**32 - 1), 1 / (1 - dropout_p)


def _precision() -> str:
    """How float32 is multiplied: where there is TF32, as three products of parts that keep 22 bits between them.

    Errors stay those of float32. At N = 197, D = 64 forward and backward of a head take 272 k cycles of the busiest
    pipe on sm_80 and 155 k on sm_90, where multiplications in float32 took 659 k, by counts. One product of TF32 has
    to do if PyTorch's own products may be such.
    """
    if torch.version.hip:
        return "ieee"
    # Not `allow_tf32`, which raises where this was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
