"""Attention with label propagation by the native kernels of csrc/cpu: fused, for any CPU, on all of torch's threads.

`TLALIGN_CPU_ISA` forces an instruction set (avx512bf16, avx512, avx2, portable), for tests.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels import extension
from tlalign_kernels.backends.addresses import DTYPES, float_or_smaller, offsets, rows, whole

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem

_CPU = torch.device("cpu")


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CPU kernels can't do `problem`; empty if they can."""
    reasons = []
    if extension.compiled is None:
        reasons.append(extension.missing_reason)
    elif not hasattr(extension.compiled, "cpu_attention_forward"):
        reasons.append("the compiled extension was built without CPU kernels, which need gcc or clang")
    if problem.device_type != "cpu":
        reasons.append(f"device: expected cpu, got {problem.device_type}")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype: expected one of {list(DTYPES)}, got {problem.dtype}")
    if problem.windows is not None:
        reasons.append("windows: not supported")
    return reasons


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
    bias, mask = float_or_smaller(bias), float_or_smaller(mask)
    share = None if share is None else share.contiguous()
    residual = None if residual is None else residual.contiguous()
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
        _word(dropout_seed),
        whole("share", share, (batch, keys, sources), torch.float32, _CPU),
        whole("residual", residual, (batch, queries, sources), torch.float32, _CPU),
        whole("output", output, (batch, queries, heads, head_dim), query.dtype, _CPU),
        whole("share_out", share_out, (batch, queries, sources), torch.float32, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, _CPU),
        *_how(),
    )


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
    dtype = query.dtype
    grad_output = grad_output.to(dtype).transpose(1, 2)
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    computing_bias, mask = float_or_smaller(bias), float_or_smaller(mask)
    computing_grad_bias = grad_bias
    if grad_bias is not None and computing_bias.dtype != grad_bias.dtype:
        computing_grad_bias = torch.empty_like(grad_bias, dtype=computing_bias.dtype)
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
        _word(dropout_seed),
        whole("output", output, (batch, queries, heads, head_dim), dtype, _CPU),
        whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, _CPU),
        rows("grad_query", grad_query, (batch, heads, queries, head_dim), dtype, _CPU),
        rows("grad_key", grad_key, (batch, heads, keys, head_dim), dtype, _CPU),
        rows("grad_value", grad_value, (batch, heads, keys, head_dim), dtype, _CPU),
        0 if bias is None else whole("grad_bias", computing_grad_bias, bias.shape, computing_bias.dtype, _CPU),
        (1, 1) if bias is None else tuple(bias.shape[:2]),
        *_how(),
    )
    if computing_grad_bias is not grad_bias:
        grad_bias.copy_(computing_grad_bias)


def _how() -> tuple[str, int]:
    return os.environ.get("TLALIGN_CPU_ISA", ""), torch.get_num_threads()


def _word(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) % 2**64
