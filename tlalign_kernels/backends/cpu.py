"""Attention with label propagation by the native kernels of csrc/cpu: fused, for any CPU, on all of torch's threads.

`TLALIGN_CPU_ISA` forces an instruction set (avx512bf16, avx512, avx2, portable), for tests.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels import extension

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CPU kernels can't do `problem`; empty if they can."""
    reasons = []
    if extension.compiled is None:
        reasons.append(extension.missing_reason)
    elif not hasattr(extension.compiled, "cpu_attention_forward"):
        reasons.append("the compiled extension was built without CPU kernels, which need gcc or clang")
    if problem.device_type != "cpu":
        reasons.append(f"device: expected cpu, got {problem.device_type}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype: expected one of {list(_DTYPES)}, got {problem.dtype}")
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
    bias, mask = _float_or_smaller(bias), _float_or_smaller(mask)
    share = None if share is None else share.contiguous()
    residual = None if residual is None else residual.contiguous()
    extension.compiled.cpu_attention_forward(
        (batch, heads, queries, keys, head_dim, sources),
        _DTYPES[query.dtype],
        _rows("query", query, (batch, heads, queries, head_dim), query.dtype),
        _rows("key", key, (batch, heads, keys, head_dim), query.dtype),
        _rows("value", value, (batch, heads, keys, head_dim), query.dtype),
        _offsets("bias", bias, (batch, heads, queries, keys)),
        _offsets("mask", mask, (batch, heads, queries, keys)),
        scale,
        dropout_p,
        _word(dropout_seed),
        _whole("share", share, (batch, keys, sources), torch.float32),
        _whole("residual", residual, (batch, queries, sources), torch.float32),
        _whole("output", output, (batch, queries, heads, head_dim), query.dtype),
        _whole("share_out", share_out, (batch, queries, sources), torch.float32),
        _whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32),
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
    computing_bias, mask = _float_or_smaller(bias), _float_or_smaller(mask)
    computing_grad_bias = grad_bias
    if grad_bias is not None and computing_bias.dtype != grad_bias.dtype:
        computing_grad_bias = torch.empty_like(grad_bias, dtype=computing_bias.dtype)
    extension.compiled.cpu_attention_backward(
        (batch, heads, queries, keys, head_dim, 0),
        _DTYPES[dtype],
        _rows("grad_output", grad_output, (batch, heads, queries, head_dim), dtype),
        _rows("query", query, (batch, heads, queries, head_dim), dtype),
        _rows("key", key, (batch, heads, keys, head_dim), dtype),
        _rows("value", value, (batch, heads, keys, head_dim), dtype),
        _offsets("bias", computing_bias, (batch, heads, queries, keys)),
        _offsets("mask", mask, (batch, heads, queries, keys)),
        scale,
        dropout_p,
        _word(dropout_seed),
        _whole("output", output, (batch, queries, heads, head_dim), dtype),
        _whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32),
        _rows("grad_query", grad_query, (batch, heads, queries, head_dim), dtype),
        _rows("grad_key", grad_key, (batch, heads, keys, head_dim), dtype),
        _rows("grad_value", grad_value, (batch, heads, keys, head_dim), dtype),
        0 if bias is None else _whole("grad_bias", computing_grad_bias, bias.shape, computing_bias.dtype),
        (1, 1) if bias is None else tuple(bias.shape[:2]),
        *_how(),
    )
    if computing_grad_bias is not grad_bias:
        grad_bias.copy_(computing_grad_bias)


def _how() -> tuple[str, int]:
    return os.environ.get("TLALIGN_CPU_ISA", ""), torch.get_num_threads()


def _word(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) % 2**64


def _float_or_smaller(tensor: Tensor | None) -> Tensor | None:
    return tensor.float() if tensor is not None and tensor.dtype == torch.float64 else tensor


# Native code can't see how large a tensor is: each that it is handed is checked here.


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on the CPU, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int, int]:
    _check(name, tensor, shape, dtype)
    image, head, row, last = tensor.stride()
    if last != 1 and shape[-1] > 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {last}")
    return tensor.data_ptr(), image, head, row


def _whole(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if tensor is None:
        return 0
    _check(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _offsets(
    name: str, tensor: Tensor | None, scores: tuple[int, int, int, int]
) -> tuple[int, str, int, int, int, int] | None:
    if tensor is None:
        return None
    batch, heads, queries, keys = scores
    images, tensor_heads = tensor.shape[:2]
    _check(name, tensor, (batch if images != 1 else 1, heads if tensor_heads != 1 else 1, queries, keys), tensor.dtype)
    dtype = "bool" if tensor.dtype == torch.bool else _DTYPES[tensor.dtype]
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), dtype, *strides
