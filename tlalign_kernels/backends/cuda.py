"""Attention with label propagation by the native kernels of csrc/cuda, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels import extension
from tlalign_kernels.backends.addresses import DTYPES, float_or_smaller, offsets, rows, whole
from tlalign_kernels.backends.bias_sums import images_of_sum

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem

_DTYPES = (torch.bfloat16, torch.float16)
# The native functions; tests put a recorder in their place.
_native = extension.compiled


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CUDA kernels can't do `problem`; empty if they can."""
    if _native is None:
        return [extension.missing_reason]
    if not hasattr(_native, "cuda_attention_forward"):
        return ["the compiled extension was built without CUDA kernels, which need nvcc"]
    reasons = []
    if problem.device_type != "cuda":
        reasons.append(f"device: expected cuda, got {problem.device_type}")
    elif torch.cuda.get_device_capability() < (8, 0):
        reasons.append(f"device: expected compute capability 8.0 or newer, got {torch.cuda.get_device_capability()}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype: expected one of {list(_DTYPES)}, got {problem.dtype}")
    if problem.head_dim not in _native.CUDA_HEAD_DIMS:
        reasons.append(f"head dimension: expected one of {_native.CUDA_HEAD_DIMS}, got {problem.head_dim}")
    if problem.sources > _native.CUDA_MAX_SOURCES:
        reasons.append(f"labels: expected at most {_native.CUDA_MAX_SOURCES} sources, got {problem.sources}")
    if problem.dropout_p > 0:
        reasons.append("dropout_p: expected 0, there is no dropout")
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
    device, dtype = query.device, query.dtype
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    bias, mask = float_or_smaller(bias), float_or_smaller(mask)
    share = None if share is None else share.contiguous()
    residual = None if residual is None else residual.contiguous()
    parts = head_share = None
    if sources:
        parts = query.new_empty((batch, *_native.cuda_parts(keys, sources)))
        head_share = query.new_empty((batch, heads, sources, queries), dtype=torch.float32)
    with _current(device):
        _native.cuda_attention_forward(
            *_problem(query, key, value, sources, bias, mask, scale),
            whole("share", share, (batch, keys, sources), torch.float32, device),
            whole("residual", residual, (batch, queries, sources), torch.float32, device),
            0 if parts is None else parts.data_ptr(),
            0 if head_share is None else head_share.data_ptr(),
            whole("output", output, (batch, queries, heads, head_dim), dtype, device),
            whole("share_out", share_out, (batch, queries, sources), torch.float32, device),
            whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, device),
            torch.cuda.current_stream().cuda_stream,
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
    device, dtype = query.device, query.dtype
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    grad_output = _aligned(grad_output.to(dtype).transpose(1, 2))
    bias, mask = float_or_smaller(bias), float_or_smaller(mask)
    of_queries, of_keys = (batch, heads, queries, head_dim), (batch, heads, keys, head_dim)
    row_terms = query.new_empty((batch, heads, *_native.cuda_row_terms(queries, DTYPES[dtype])), dtype=torch.float32)
    bias_sums, bias_heads, images = None, 0, 0
    if grad_bias is not None:
        bias_images, bias_heads = grad_bias.shape[:2]
        images = images_of_sum(batch, bias_images, -(-queries // 64) * -(-keys // 64) * bias_heads)
        bias_sums = query.new_empty((-(-batch // images), bias_heads, queries, keys), dtype=torch.float32)
    with _current(device):
        _native.cuda_attention_backward(
            *_problem(query, key, value, 0, bias, mask, scale),
            rows("grad_output", grad_output, of_queries, dtype, device),
            whole("output", output, (batch, queries, heads, head_dim), dtype, device),
            whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, device),
            row_terms.data_ptr(),
            rows("grad_query", grad_query, of_queries, dtype, device),
            rows("grad_key", grad_key, of_keys, dtype, device),
            rows("grad_value", grad_value, of_keys, dtype, device),
            0 if bias_sums is None else bias_sums.data_ptr(),
            bias_heads,
            images,
            torch.cuda.current_stream().cuda_stream,
        )
    if grad_bias is not None:
        grad_bias.copy_(bias_sums if bias_images == batch else bias_sums.sum(dim=0, keepdim=True))


def _problem(
    query: Tensor, key: Tensor, value: Tensor, sources: int, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple:
    """What both directions are told first."""
    batch, heads, queries, head_dim = query.shape
    keys, device, dtype = key.shape[2], query.device, query.dtype
    return (
        (batch, heads, queries, keys, head_dim, sources),
        DTYPES[dtype],
        rows("query", query, (batch, heads, queries, head_dim), dtype, device),
        rows("key", key, (batch, heads, keys, head_dim), dtype, device),
        rows("value", value, (batch, heads, keys, head_dim), dtype, device),
        offsets("bias", bias, (batch, heads, queries, keys), device),
        offsets("mask", mask, (batch, heads, queries, keys), device),
        scale,
    )


def _current(device: torch.device) -> torch.cuda.device:
    """CUDA launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device)


def _aligned(tensor: Tensor) -> Tensor:
    """Kernels copy 16 bytes at a time: a tensor whose rows begin elsewhere, or have gaps, is copied, once."""
    chunk = 16 // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    is_aligned = tensor.data_ptr() % 16 == 0 and all(stride % chunk == 0 for stride in strides[:-1])
    return tensor if is_aligned and tensor.stride(-1) == 1 else tensor.contiguous()
