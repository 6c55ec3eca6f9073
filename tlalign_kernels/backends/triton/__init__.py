"""Attention with label propagation by Triton kernels: any GPU that Triton knows, no compiler needed.

Under `TRITON_INTERPRET=1` the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

try:
    import triton

    from tlalign_kernels.backends.triton import kernels

    # Decided where the kernels are decorated: at import.
    _interpreted = triton.knobs.runtime.interpret
except ImportError as error:
    triton, _interpreted, _missing = None, False, str(error)

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOG2_E = 1.4426950408889634
# More sources than these take a pass of their own, whose cost does not grow with the number of heads.
MAX_FUSED_SOURCES = 8
# The scores of a block of queries and so many keys stay in the registers of a program.
MAX_ROW_KEYS = 256
MAX_ROW_KEYS_WITH_OFFSETS = 128
# So do the gradients of so many queries.
MAX_GRADIENT_ROWS = 208


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels can't do `problem`; empty if they can."""
    if triton is None:
        return [f"triton can't be imported: {_missing}"]
    reasons = []
    if problem.device_type != "cuda" and not (_interpreted and problem.device_type == "cpu"):
        reasons.append(f"device: expected cuda, or cpu under TRITON_INTERPRET=1, got {problem.device_type}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype: expected one of {list(_DTYPES)}, got {problem.dtype}")
    if _interpreted and problem.dtype == torch.bfloat16:
        reasons.append("dtype: Triton's interpreter has no products of bfloat16")
    return reasons


class Config(NamedTuple):
    """How a kernel is to be compiled: sizes of its tiles, warps of a program, stages of its loop's loads."""

    tiles: dict[str, int]
    warps: int
    stages: int = 1


def forward_config(
    capability: int, dtype: torch.dtype, queries: int, keys: int, head_dim: int, has_offsets: bool
) -> Config:
    """Row kernel (which has `TILES` of keys) or streaming kernel, and its tiles, for a class of shapes.

    The row kernel pads queries to 64 and keys to 16: at N = 197 the scores computed are 1.37 times those needed. What a
    program can hold without spilling registers decides the rest; a bias or mask takes some of them.
    """
    block, warps = (16, 2) if queries <= 16 else (32, 2) if queries <= 32 else (64, 4)
    if dtype == torch.float32:
        tiles = dict(BLOCK_Q=min(block, 32), TILE=32 if head_dim <= 64 else 16, TAIL=0)
        return Config(tiles, 4 if block > 16 and head_dim <= 64 else 8 if head_dim > 64 else 2)
    if head_dim <= 64 and keys <= (MAX_ROW_KEYS_WITH_OFFSETS if has_offsets else MAX_ROW_KEYS):
        return Config(dict(BLOCK_Q=block, **_row_tiles(keys)), warps)
    if has_offsets:
        return Config(dict(BLOCK_Q=block, TILE=32 if head_dim <= 128 else 16, TAIL=0), 8 if head_dim > 128 else warps)
    if head_dim <= 64:
        return Config(dict(BLOCK_Q=block, **_stream_tiles(keys, 64)), warps, 2)
    if head_dim <= 128:
        if queries > 64 and capability < 120:
            return Config(dict(BLOCK_Q=128, **_stream_tiles(keys, 32)), 8, 2)
        return Config(dict(BLOCK_Q=block, **_stream_tiles(keys, 32)), 4)
    return Config(dict(BLOCK_Q=block, **_stream_tiles(keys, 16)), 8, 2)


def _stream_tiles(keys: int, tile: int) -> dict[str, int]:
    """Whole tiles and a tail, a power of two of at least 16."""
    rest = keys % tile
    return dict(TILE=tile, TAIL=rest and max(16, triton.next_power_of_2(rest)))


def _row_tiles(tokens: int) -> dict[str, int]:
    """Tiles of 64 and one or two smaller ones, powers of two as Triton wants them, for tokens rounded up to 16."""
    rest = (tokens % 64 + 15) // 16 * 16
    tail, tail_2 = {0: (0, 0), 16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0)}[rest]
    return dict(TILE=64, TILES=tokens // 64, TAIL=tail, TAIL_2=tail_2)


def backward_config(capability: int, dtype: torch.dtype, queries: int, head_dim: int, has_offsets: bool) -> Config:
    """One program a head (which has `TILES` of queries), or blocks of queries and keys of two kernels.

    One program computes five products where two kernels need seven: at N = 197, D = 64 it executes 46 k warp
    instructions on sm_80 against 86 k, and 45 k on sm_90 against 74 k. It has to fit: dQ of 208 queries fills the
    registers, which leaves none for a bias, on sm_86, sm_89 and with float16 on sm_90 room for 16 keys at a time, and
    on sm_120 for none.
    """
    most = 64 if has_offsets or capability >= 120 else MAX_GRADIENT_ROWS
    if dtype != torch.float32 and head_dim <= 64 and queries <= most:
        is_tight = capability in (86, 89) or (capability == 90 and dtype == torch.float16)
        keys = 64 if queries <= 64 else 16 if is_tight else 32
        return Config(dict(BLOCK_K=keys, **_row_tiles(queries)), 8 if queries > 64 else 4)
    if dtype == torch.float32:
        block = 32 if head_dim <= 128 else 16
        return Config(dict(BLOCK_Q=block, BLOCK_K=block), 4 if head_dim <= 64 else 8)
    return Config(dict(BLOCK_Q=32, BLOCK_K=64 if head_dim <= 128 else 32), 4 if head_dim <= 128 else 8)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    dropout_p: float,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes A.V and mean_h(A).share into the given tensors; see `reference.forward`."""
    batch, heads, queries, head_dim = query.shape
    keys, sources = key.shape[2], 0 if share is None else share.shape[2]
    bias, mask = _readable(bias), _readable(mask)
    share = None if share is None else share.contiguous()
    residual = None if residual is None else residual.contiguous()
    fused = sources if sources <= MAX_FUSED_SOURCES else 0
    parts = 1 if query.dtype == torch.float32 else 3
    # As many columns as a power of two takes in memory; a tensor core takes at least 8.
    packed = triton.next_power_of_2(1 + fused * parts) if fused else 0
    head_share = columns = None
    with _device_of(query):
        if fused:
            head_share = query.new_empty((batch, heads, fused, queries), dtype=torch.float32)
            columns = query.new_empty((batch, keys, packed))
            kernels.pack_labels[(triton.cdiv(batch * keys, 128),)](
                share, columns, batch * keys, SOURCES=fused, PARTS=parts, COLUMNS=packed, BLOCK=128
            )
        has_offsets = bias is not None or mask is not None
        config = forward_config(_capability(query.device), query.dtype, queries, keys, head_dim, has_offsets)
        # The row kernel is made for one length: what it is padded by, and whether a load needs a mask, are constants.
        is_row = "TILES" in config.tiles
        sizes = (heads, queries, keys)
        kernel = kernels.attention_forward_row if is_row else kernels.attention_forward_stream
        row_sizes = dict(HEADS=heads, QUERIES=queries, KEYS=keys, GAP=_gap(query, key, value)) if is_row else {}
        kernel[(triton.cdiv(queries, config.tiles["BLOCK_Q"]) * batch * heads,)](
            query, key, value, columns, bias, mask, dropout_seed, output, log_sum_exp, head_share,
            *_strides(query, key, value), *_offset_strides(bias, mask),
            *(() if is_row else sizes), scale * _LOG2_E, *_dropout(dropout_p), **row_sizes,
            **_rows(query=query, key=key, value=value), **_width(head_dim), **_kinds(bias, mask),
            COLUMNS=max(8, packed), PACKED=packed, SOURCES=fused, PARTS=parts, DROPS=dropout_p > 0,
            FOLDS=scale > 0 and not has_offsets, PRECISION=_precision(query.dtype),
            **config.tiles, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if fused:
            kernels.average_heads[(triton.cdiv(queries, 64) * batch,)](
                head_share, log_sum_exp, residual, share_out, heads, queries,
                SOURCES=fused, HAS_RESIDUAL=residual is not None, MASKED=has_offsets, BLOCK=64, num_warps=2,
            )  # fmt: skip
        elif sources:
            inverse = _inverse(query, key, bias, mask, log_sum_exp, scale)
            block = 16 if query.dtype == torch.float32 and head_dim > 64 else 32
            kernels.dense_share[(triton.cdiv(queries, block) * batch,)](
                query, key, bias, mask, log_sum_exp, inverse, share, residual, share_out,
                *_strides(query, key), *_offset_strides(bias, mask),
                *sizes, sources, scale * _LOG2_E, **_rows(query=query, key=key), **_width(head_dim),
                **_kinds(bias, mask), PRECISION=_precision(query.dtype),
                NORMALISES=inverse is not None, HAS_RESIDUAL=residual is not None,
                BLOCK_Q=block, TILE=block, LABELS=32, num_warps=8,
            )  # fmt: skip


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    dropout_p: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients into the given tensors; see `reference.backward`."""
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    grad_output = grad_output.to(query.dtype).transpose(1, 2)
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    bias, mask = _readable(bias), _readable(mask)
    has_offsets = bias is not None or mask is not None
    config = backward_config(_capability(query.device), query.dtype, queries, head_dim, has_offsets)
    factor, dropout = scale * _LOG2_E, _dropout(dropout_p)
    with _device_of(query):
        inverse = _inverse(query, key, bias, mask, log_sum_exp, scale)
        is_head = "TILES" in config.tiles
        # One program a head keeps them to itself, unless the bias wants them.
        row_terms = None if is_head and grad_bias is None else torch.empty_like(log_sum_exp)
        inputs = (query, key, value, grad_output)
        constants = (bias, mask, dropout_seed, log_sum_exp, inverse)
        strides = (*_strides(*inputs), *_offset_strides(bias, mask))
        gradients = dict(grad_query=grad_query, grad_key=grad_key, grad_value=grad_value)
        how = dict(
            **_rows(query=query, key=key, value=value, grad_output=grad_output), **_width(head_dim),
            **_kinds(bias, mask), DROPS=dropout_p > 0, NORMALISES=inverse is not None,
            PRECISION=_precision(query.dtype),
        )  # fmt: skip
        if is_head:
            gap = _gap(query, key, value)
            kernels.attention_backward_head[(batch * heads,)](
                *inputs, output, *constants, row_terms, *gradients.values(),
                *strides, *_strides(*gradients.values()), scale, factor, *dropout,
                HEADS=heads, QUERIES=queries, KEYS=keys, **_rows(**gradients), **how,
                GAP=gap if gap == _gap(*gradients.values()) else 0,
                **config.tiles, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        else:
            kernels.sum_row_terms[(triton.cdiv(queries, 16) * batch * heads,)](
                grad_output, output, row_terms, *_strides(grad_output), heads, queries,
                **_rows(grad_output=grad_output), **_width(head_dim), BLOCK_Q=16, num_warps=4,
            )  # fmt: skip
            sizes = (heads, queries, keys, scale, factor, *dropout)
            how_in_blocks = dict(**how, **config.tiles, num_warps=config.warps, num_stages=config.stages)
            kernels.attention_backward_keys[(triton.cdiv(keys, config.tiles["BLOCK_K"]) * batch * heads,)](
                *inputs, *constants, row_terms, grad_key, grad_value, *strides, *_strides(grad_key, grad_value),
                *sizes, **_rows(grad_key=grad_key, grad_value=grad_value), **how_in_blocks,
            )  # fmt: skip
            kernels.attention_backward_queries[(triton.cdiv(queries, config.tiles["BLOCK_Q"]) * batch * heads,)](
                *inputs, *constants, row_terms, grad_query, *strides, *_strides(grad_query),
                *sizes, **_rows(grad_query=grad_query), **how_in_blocks,
            )  # fmt: skip
        if grad_bias is not None:
            block_q, block_k = 32, 32
            bias_images, bias_heads = grad_bias.shape[:2]
            tiles = triton.cdiv(queries, block_q) * triton.cdiv(keys, block_k) * bias_heads
            images_of_part = _images_of_part(batch, bias_images, tiles)
            parts = triton.cdiv(batch, images_of_part)
            sums = query.new_empty((parts, bias_heads, queries, keys), dtype=torch.float32)
            how.pop("BIAS")
            kernels.attention_backward_bias[(tiles * parts,)](
                *inputs, *constants, row_terms, sums, *strides,
                batch, heads, queries, keys, bias_heads, images_of_part, factor, *dropout,
                **how, BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=4 if head_dim <= 64 else 8, num_stages=1,
            )  # fmt: skip
            grad_bias.copy_(sums if bias_images == batch else sums.sum(dim=0, keepdim=True))


def _images_of_part(batch: int, bias_images: int, tiles: int) -> int:
    """Images whose gradients of a bias one program adds up: so many that about 1024 programs are at work.

    It follows from the shape alone, so that the order of the sum, and with it the bits, are the same everywhere.
    """
    return 1 if bias_images == batch else triton.cdiv(batch, max(1, min(batch, 1024 // tiles)))


def _inverse(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, log_sum_exp: Tensor, scale: float
) -> Tensor | None:
    """What makes up for the rounding of a large log-sum-exp; bfloat16 itself rounds more than that."""
    if query.dtype == torch.bfloat16:
        return None
    batch, heads, queries, head_dim = query.shape
    inverse = torch.empty_like(log_sum_exp)
    block = 32 if head_dim <= 64 else 16
    kernels.normalise[(triton.cdiv(queries, block) * batch * heads,)](
        query, key, bias, mask, log_sum_exp, inverse,
        *_strides(query, key), *_offset_strides(bias, mask), heads, queries, key.shape[2], scale * _LOG2_E,
        **_rows(query=query, key=key), **_width(head_dim), **_kinds(bias, mask), PRECISION=_precision(query.dtype),
        BLOCK_Q=block, TILE=block, num_warps=4,
    )  # fmt: skip
    return inverse


@functools.cache
def _capability(device: torch.device) -> int:
    """Compute capability such as 90; what is interpreted is taken for the oldest."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _readable(offsets: Tensor | None) -> Tensor | None:
    """A bias or mask as the kernels read it: bytes instead of bool, float32 instead of float64."""
    if offsets is None:
        return None
    if offsets.dtype == torch.bool:
        return offsets.view(torch.uint8)
    return offsets.float() if offsets.dtype == torch.float64 else offsets


def _check_extent(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Within an image and head the kernels count with 32 bits."""
    if sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) >= 2**31:
        raise NotImplementedError(f"{name}: expected less than 2**31 elements from the first to the last of a head")


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of images and heads."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _rows(**tensors: Tensor) -> dict[str, int]:
    """Strides of rows, which a model fixes: as constants they cost the kernels no multiplications."""
    for name, tensor in tensors.items():
        _check_extent(name, tensor.shape[2:], tensor.stride()[2:])
    return {f"{name.upper()}_ROW": tensor.stride(2) for name, tensor in tensors.items()}


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
        if tensor is not None:
            _check_extent("bias, mask", tensor.shape[2:], tensor.stride()[2:])
        shape, given = ((0,) * 4, (0,) * 4) if tensor is None else (tensor.shape, tensor.stride())
        strides += [0 if size == 1 else stride for size, stride in zip(shape, given, strict=True)]
    return strides


def _kinds(bias: Tensor | None, mask: Tensor | None) -> dict[str, int]:
    return {
        "BIAS": int(bias is not None),
        "MASK": 0 if mask is None else 2 if mask.dtype == torch.uint8 else 1,
    }


def _width(head_dim: int) -> dict[str, int]:
    return {"D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}


def _dropout(dropout_p: float) -> tuple[int, float]:
    """Words below the first are dropped; the second makes up for them. As the reference has it."""
    return min(round(dropout_p * 2**32), 2**32 - 1), 1 / (1 - dropout_p)


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
