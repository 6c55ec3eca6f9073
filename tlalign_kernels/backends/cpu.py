"""Attention with label propagation by the native kernels of csrc/cpu: fused, for any CPU, on all of torch's threads.

`TLALIGN_CPU_ISA` forces an instruction set (avx512bf16, avx512, avx2, portable), for tests.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels import extension
from tlalign_kernels.backends.addresses import DTYPES, check, float_or_smaller, offsets, rows, whole
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
    return _instruction_set(os.environ.get("TLALIGN_CPU_ISA", ""))


@functools.cache
def _instruction_set(wanted: str) -> str | None:
    has_kernels = hasattr(extension.compiled, "cpu_instruction_set")
    return extension.compiled.cpu_instruction_set(wanted) if has_kernels else None


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
    bias, mask = float_or_smaller(bias), float_or_smaller(mask)
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
        *_setting(),
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
    grad_output = unit_last_stride(grad_output.to(dtype).transpose(1, 2))
    (computing_bias, computing_grad_bias), mask = _computing_biases(bias, grad_bias), float_or_smaller(mask)
    extension.compiled.cpu_attention_backward(
        (batch, heads, queries, keys, head_dim, 0),
        DTYPES[dtype],
        rows("grad_output", grad_output, (batch, heads, queries, head_dim), dtype, _CPU),
        rows("query", query, (batch, heads, queries, head_dim), dtype, _CPU),
        rows("key", key, (batch, heads, keys, head_dim), dtype, _CPU),
        rows("value", value, (batch, heads, keys, head_dim), dtype, _CPU),
        offsets("bias", computing_bias, (batch, heads, queries, keys), _CPU),
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
        0 if bias is None else whole("grad_bias", computing_grad_bias, bias.shape, computing_bias.dtype, _CPU),
        (1, 1) if bias is None else tuple(bias.shape[:2]),
        0,
        *_setting(),
    )
    if computing_grad_bias is not grad_bias:
        grad_bias.copy_(computing_grad_bias)


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
    qkv = qkv.flatten(1, 2)
    bias, tables = float_or_smaller(bias), _tables(windows)
    count, tokens = tables[0].shape
    extension.compiled.cpu_attention_forward(
        (batch * count, heads, tokens, tokens, head_dim, sources),
        DTYPES[qkv.dtype],
        *_rows_of_parts("qkv", qkv, (batch, qkv.shape[1], 3, heads, head_dim), qkv.dtype),
        offsets("bias", bias, (batch * count, heads, tokens, tokens), _CPU),
        None,
        scale,
        dropout_p,
        _seed_bits(dropout_seed),
        _windows(tables, pad_qkv, qkv),
        whole("share", share, (*of_map, sources), torch.float32, _CPU),
        whole("residual", residual, (*of_map, sources), torch.float32, _CPU),
        whole("output", output, (*of_map, heads, head_dim), qkv.dtype, _CPU),
        whole("share_out", share_out, (*of_map, sources), torch.float32, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch * count, heads, tokens), torch.float32, _CPU),
        *_setting(),
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
    qkv = qkv.flatten(1, 2)
    grad_output = unit_last_stride(grad_output.to(dtype)).flatten(1, 2).unsqueeze(2)
    grad_qkv = grad_qkv.view(batch, -1, 3, heads, head_dim)
    (computing_bias, computing_grad_bias), tables = _computing_biases(bias, grad_bias), _tables(windows)
    count, tokens = tables[0].shape
    packed = (batch, qkv.shape[1], 3, heads, head_dim)
    extension.compiled.cpu_attention_backward(
        (batch * count, heads, tokens, tokens, head_dim, 0),
        DTYPES[dtype],
        *_rows_of_parts("grad_output", grad_output, (batch, qkv.shape[1], 1, heads, head_dim), dtype),
        *_rows_of_parts("qkv", qkv, packed, dtype),
        offsets("bias", computing_bias, (batch * count, heads, tokens, tokens), _CPU),
        None,
        scale,
        dropout_p,
        _seed_bits(dropout_seed),
        _windows(tables, pad_qkv, qkv),
        whole("output", output, (batch, *windows.map_size, heads, head_dim), dtype, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch * count, heads, tokens), torch.float32, _CPU),
        *_rows_of_parts("grad_qkv", grad_qkv, packed, dtype),
        0 if bias is None else whole("grad_bias", computing_grad_bias, bias.shape, computing_bias.dtype, _CPU),
        (1, 1) if bias is None else tuple(bias.shape[:2]),
        whole("grad_pad_qkv", grad_pad_qkv, (3, heads, head_dim), dtype, _CPU),
        *_setting(),
    )
    if computing_grad_bias is not grad_bias:
        grad_bias.copy_(computing_grad_bias)


def _rows_of_parts(
    name: str, packed: Tensor, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> list[tuple[int, int, int, int]]:
    """Addresses and strides of the parts (B, H, Ht * Wt, D) of a tensor (B, Ht * Wt, parts, H, D)."""
    check(name, packed, shape, dtype, _CPU)
    batch, tokens, parts, heads, head_dim = shape
    first = rows(name, packed[:, :, 0].transpose(1, 2), (batch, heads, tokens, head_dim), dtype, _CPU)
    step = packed.stride(2) * packed.element_size()
    return [(first[0] + part * step, *first[1:]) for part in range(parts)]


def _windows(
    tables: tuple[Tensor, Tensor | None], pad_qkv: Tensor | None, qkv: Tensor
) -> tuple[int, int, int, int, int]:
    """What the native code is told of windows: their number, that of tokens in the map, addresses."""
    tokens, regions = tables
    return (
        tokens.shape[0],
        qkv.shape[1],
        whole("tokens", tokens, tokens.shape, torch.int32, _CPU),
        whole("regions", regions, tokens.shape, torch.int32, _CPU),
        whole("pad_qkv", pad_qkv, (3, *qkv.shape[3:]), qkv.dtype, _CPU),
    )


@functools.lru_cache(maxsize=64)
def _tables(windows: Windows) -> tuple[Tensor, Tensor | None]:
    """Numbers of tokens and of regions, int32 (W, N); no regions if the windows are not shifted."""
    tables = (windows.token_numbers(_CPU), windows.regions(_CPU) if windows.has_regions else None)
    tokens, regions = (None if table is None else table.to(torch.int32).contiguous() for table in tables)
    return tokens, regions


def _computing_biases(bias: Tensor | None, grad_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A bias as the native code reads it, and a tensor of the same dtype for its gradient."""
    computing_bias = float_or_smaller(bias)
    if grad_bias is not None and computing_bias.dtype != grad_bias.dtype:
        return computing_bias, torch.empty_like(grad_bias, dtype=computing_bias.dtype)
    return computing_bias, grad_bias


def _setting() -> tuple[str, int]:
    """Instruction set, empty for the best one, and number of threads."""
    return os.environ.get("TLALIGN_CPU_ISA", ""), torch.get_num_threads()


def _seed_bits(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) % 2**64
