"""Attention with label propagation by the native kernels of csrc/cpu: fused, for any CPU, on all of torch's threads.

`TLALIGN_CPU_ISA` forces an instruction set (avx512bf16, avx512, avx2, portable), for tests.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tlalign_kernels import extension
from tlalign_kernels.backends.addresses import (
    DTYPES,
    address,
    check,
    offsets,
    rows,
    strides_of,
    whole,
)
from tlalign_kernels.ops import Inputs, WindowInputs, unit_last_stride

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem
    from tlalign_kernels.windows import Windows

_CPU = torch.device("cpu")


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CPU kernels can't do `problem`; empty if they can."""
    reasons = []
    if extension.compiled is None:
        reasons.append(extension.missing_reason)
    elif not hasattr(extension.compiled, "cpu_attention_forward"):
        reasons.append("the compiled extension was built without CPU kernels, which need gcc 10 or clang 9, or newer")
    if problem.device_type != "cpu":
        reasons.append(f"device: expected cpu, got {problem.device_type}")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype: expected one of {list(DTYPES)}, got {problem.dtype}")
    if not reasons and not torch.compiler.is_compiling():  # a call that is compiled asks when it runs
        instruction_set()
    return reasons


def instruction_set() -> str | None:
    """Instruction set of the kernels: the best that the processor has, or the forced one; None: there are no kernels.

    Raises:
        ValueError: If `TLALIGN_CPU_ISA` names none, or one that the processor lacks; no other is taken instead.
    """
    has_kernels = hasattr(extension.compiled, "cpu_instruction_set")
    return extension.compiled.cpu_instruction_set() if has_kernels else None


def forward(
    inputs: Inputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes A.V and mean_h(A).share into the given tensors; see `reference.forward`."""
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
    batch, heads, queries, head_dim = query.shape
    keys, sources = key.shape[2], 0 if share is None else share.shape[2]
    extension.compiled.cpu_attention_forward(
        (batch, heads, queries, keys, head_dim, sources),
        DTYPES[query.dtype],
        rows("query", query, (batch, heads, queries, head_dim), query.dtype, _CPU),
        rows("key", key, (batch, heads, keys, head_dim), query.dtype, _CPU),
        rows("value", value, (batch, heads, keys, head_dim), query.dtype, _CPU),
        offsets("bias", bias, (batch, heads, queries, keys), _CPU),
        offsets("mask", mask, (batch, heads, queries, keys), _CPU),
        scale,
        dropout_p,
        _seed_bits(dropout_seed),
        None,
        whole("share", share, (batch, keys, sources), torch.float32, _CPU),
        whole("residual", residual, (batch, queries, sources), torch.float32, _CPU),
        whole("output", output, (batch, queries, heads, head_dim), query.dtype, _CPU),
        whole("share_out", share_out, (batch, queries, sources), torch.float32, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, _CPU),
        torch.get_num_threads(),
    )


def backward(
    inputs: Inputs,
    grad_output: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients into the given tensors; see `reference.backward`."""
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    dtype = query.dtype
    grad_output = unit_last_stride(grad_output.transpose(1, 2))
    extension.compiled.cpu_attention_backward(
        (batch, heads, queries, keys, head_dim, 0),
        DTYPES[dtype],
        rows("grad_output", grad_output, (batch, heads, queries, head_dim), dtype, _CPU),
        rows("query", query, (batch, heads, queries, head_dim), dtype, _CPU),
        rows("key", key, (batch, heads, keys, head_dim), dtype, _CPU),
        rows("value", value, (batch, heads, keys, head_dim), dtype, _CPU),
        offsets("bias", bias, (batch, heads, queries, keys), _CPU),
        offsets("mask", mask, (batch, heads, queries, keys), _CPU),
        scale,
        dropout_p,
        _seed_bits(dropout_seed),
        None,
        whole("output", output, (batch, queries, heads, head_dim), dtype, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, _CPU),
        rows("grad_query", grad_query, (batch, heads, queries, head_dim), dtype, _CPU),
        rows("grad_key", grad_key, (batch, heads, keys, head_dim), dtype, _CPU),
        rows("grad_value", grad_value, (batch, heads, keys, head_dim), dtype, _CPU),
        0 if bias is None else whole("grad_bias", grad_bias, bias.shape, bias.dtype, _CPU),
        (1, 1) if bias is None else tuple(bias.shape[:2]),
        0,
        torch.get_num_threads(),
    )


def window_forward(
    inputs: WindowInputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes attention and labels within windows into the given tensors; see `reference.window_forward`."""
    qkv, pad_qkv, bias, dropout_seed, windows, scale, dropout_p = inputs
    batch, heads, head_dim = qkv.shape[0], *qkv.shape[4:]
    of_map, sources = (batch, *windows.map_size), 0 if share is None else share.shape[3]
    qkv, tables = _evenly_strided(qkv), _tables(windows)
    count, tokens = windows.count(), windows.tokens()
    extension.compiled.cpu_attention_forward(
        (batch * count, heads, tokens, tokens, head_dim, sources),
        DTYPES[qkv.dtype],
        *_rows_of_map("qkv", qkv, (*of_map, 3, heads, head_dim), qkv.dtype),
        offsets("bias", bias, (batch * count, heads, tokens, tokens), _CPU),
        None,
        scale,
        dropout_p,
        _seed_bits(dropout_seed),
        (*tables.numbers, whole("pad_qkv", pad_qkv, (3, heads, head_dim), qkv.dtype, _CPU)),
        whole("share", share, (*of_map, sources), torch.float32, _CPU),
        whole("residual", residual, (*of_map, sources), torch.float32, _CPU),
        whole("output", output, (*of_map, heads, head_dim), qkv.dtype, _CPU),
        whole("share_out", share_out, (*of_map, sources), torch.float32, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch * count, heads, tokens), torch.float32, _CPU),
        torch.get_num_threads(),
    )


def window_backward(
    inputs: WindowInputs,
    grad_output: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_qkv: Tensor,
    grad_pad_qkv: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients into the given tensors; see `reference.window_backward`."""
    qkv, pad_qkv, bias, dropout_seed, windows, scale, dropout_p = inputs
    dtype, batch, heads, head_dim = qkv.dtype, qkv.shape[0], *qkv.shape[4:]
    qkv, grad_output = _evenly_strided(qkv), _evenly_strided(unit_last_stride(grad_output))
    tables, count, tokens = _tables(windows), windows.count(), windows.tokens()
    of_map, packed = (batch, *windows.map_size, heads, head_dim), (batch, *windows.map_size, 3, heads, head_dim)
    extension.compiled.cpu_attention_backward(
        (batch * count, heads, tokens, tokens, head_dim, 0),
        DTYPES[dtype],
        *_rows_of_map("grad_output", grad_output, of_map, dtype),
        *_rows_of_map("qkv", qkv, packed, dtype),
        offsets("bias", bias, (batch * count, heads, tokens, tokens), _CPU),
        None,
        scale,
        dropout_p,
        _seed_bits(dropout_seed),
        (*tables.numbers, whole("pad_qkv", pad_qkv, (3, heads, head_dim), qkv.dtype, _CPU)),
        whole("output", output, of_map, dtype, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch * count, heads, tokens), torch.float32, _CPU),
        *_rows_of_map("grad_qkv", grad_qkv, packed, dtype),
        0 if bias is None else whole("grad_bias", grad_bias, bias.shape, bias.dtype, _CPU),
        (1, 1) if bias is None else tuple(bias.shape[:2]),
        whole("grad_pad_qkv", grad_pad_qkv, (3, heads, head_dim), dtype, _CPU),
        torch.get_num_threads(),
    )


def _evenly_strided(of_map: Tensor) -> Tensor:
    """A tensor (B, Ht, Wt, ...) whose tokens are evenly strided, copied if they aren't."""
    return of_map if _map_strides(of_map.shape, of_map.stride()) is not None else of_map.contiguous()


def _rows_of_map(
    name: str, of_map: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> list[tuple[int, int, int, int]]:
    """Addresses and strides (B, H, Ht * Wt, D) of all parts of (B, Ht, Wt, parts, H, D), or of (B, Ht, Wt, H, D)."""
    check(name, of_map, shape, dtype, _CPU)
    image, token, *part, head, last = _map_strides(of_map.shape, of_map.stride())
    if last not in (0, 1):
        raise ValueError(f"{name}: expected a last stride of 1, got {last}")
    step = part[0] * of_map.element_size() if part else 0
    return [(of_map.data_ptr() + i * step, image, head, token) for i in range(shape[3] if part else 1)]


@functools.lru_cache(256)
def _map_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of (B, Ht * Wt, ...) in a tensor (B, Ht, Wt, ...), 0 along dimensions of one; None if there are none."""
    image, row, column, *others = strides_of(shape, strides)
    if shape[1] > 1 and shape[2] > 1 and row != shape[2] * column:
        return None
    return image, column or row, *others


class _Tables(NamedTuple):
    """Numbers of tokens and of regions, int32 (W, N), no regions if the windows are not shifted.

    Attributes:
        numbers: What the native code is told of them: W, tokens of the map, addresses.
    """

    tokens: Tensor
    regions: Tensor | None
    numbers: tuple[int, int, int, int]


@functools.lru_cache(maxsize=64)
def _tables(windows: Windows) -> _Tables:
    tables = (windows.token_numbers(_CPU), windows.regions(_CPU) if windows.has_regions() else None)
    tokens, regions = (None if table is None else table.to(torch.int32).contiguous() for table in tables)
    rows, columns = windows.map_size
    numbers = (windows.count(), rows * columns, tokens.data_ptr(), address(regions))
    return _Tables(tokens, regions, numbers)


def _seed_bits(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) % 2**64
