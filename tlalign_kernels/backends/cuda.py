"""Attention with label propagation by the native kernels of csrc/cuda, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels import extension
from tlalign_kernels.backends.addresses import DTYPES, address, offsets, rows, whole
from tlalign_kernels.backends.bias_sums import images_of_sum
from tlalign_kernels.backends.devices import asked_once
from tlalign_kernels.ops import Inputs, WindowInputs, unpack_qkv

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
        return ["the compiled extension was built without CUDA kernels, which need nvcc 12.0 or newer"]
    reasons = []
    if problem.device_type != "cuda":
        reasons.append(f"device: expected cuda, got {problem.device_type}")
    elif torch.cuda.is_initialized():  # else the tensors are fake
        if (capability := _capability(problem.device_index)) < (8, 0):
            reasons.append(f"device: expected compute capability 8.0 or newer, got {capability}")
        elif error := _launch_error(problem.device_index):
            reasons.append(f"device: expected one whose driver can run the kernels, which says: {error}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype: expected one of {list(_DTYPES)}, got {problem.dtype}")
    head_dims = _native.CUDA_HEAD_DIMS if problem.windows is None else [_native.CUDA_HEAD_DIM_OF_WINDOWS]
    if problem.head_dim not in head_dims:
        reasons.append(f"head dimension: expected one of {head_dims}, got {problem.head_dim}")
    if problem.sources > _native.CUDA_MAX_SOURCES:
        reasons.append(f"labels: expected at most {_native.CUDA_MAX_SOURCES} sources, got {problem.sources}")
    if problem.dropout_p > 0:
        reasons.append("dropout_p: expected 0, there is no dropout")
    tokens = max(problem.queries, problem.keys) if problem.windows is None else math.prod(problem.windows.map_size)
    if 3 * tokens * problem.heads * problem.head_dim >= 2**30:
        reasons.append("query, key: expected less than 2**30 elements in an image's query, key and value together")
    return reasons


def forward(
    inputs: Inputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes A.V and mean_h(A).share into the given tensors; see `reference.forward`."""
    query = inputs.query
    batch, heads, queries, head_dim = query.shape
    keys, sources = inputs.key.shape[2], 0 if share is None else share.shape[2]
    device, dtype = query.device, query.dtype
    packed_labels = query.new_empty(_native.cuda_labels(batch, keys, sources, False))
    head_share = None
    if sources:
        head_share = query.new_empty((batch, heads, sources, queries), dtype=torch.float32)
    problem, _keep = _problem(inputs, sources)
    with _current(device):
        _native.cuda_attention_forward(
            *problem,
            whole("share", share, (batch, keys, sources), torch.float32, device),
            whole("residual", residual, (batch, queries, sources), torch.float32, device),
            packed_labels.data_ptr(),
            address(head_share),
            whole("output", output, (batch, queries, heads, head_dim), dtype, device),
            whole("share_out", share_out, (batch, queries, sources), torch.float32, device),
            whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, device),
            torch.cuda.current_stream().cuda_stream,
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
    query = inputs.query
    batch, heads, queries, head_dim = query.shape
    keys = inputs.key.shape[2]
    device, dtype = query.device, query.dtype
    grad_output, output = _aligned(grad_output.transpose(1, 2)), _aligned(output)
    of_queries, of_keys = (batch, heads, queries, head_dim), (batch, heads, keys, head_dim)
    row_terms = query.new_empty((batch, heads, *_native.cuda_row_terms(queries, DTYPES[dtype])), dtype=torch.float32)
    bias_sums, bias_heads, images = None, heads, 1
    if grad_bias is not None:
        bias_images, bias_heads = grad_bias.shape[:2]
        images = images_of_sum(batch, bias_images, -(-queries // 64) * -(-keys // 64) * bias_heads)
        bias_sums = query.new_empty((-(-batch // images), bias_heads, queries, keys), dtype=torch.float32)
    problem, _keep = _problem(inputs, sources=0)
    with _current(device):
        _native.cuda_attention_backward(
            *problem,
            rows("grad_output", grad_output, of_queries, dtype, device),
            whole("output", output, (batch, queries, heads, head_dim), dtype, device),
            whole("log_sum_exp", log_sum_exp, (batch, heads, queries), torch.float32, device),
            row_terms.data_ptr(),
            rows("grad_query", grad_query, of_queries, dtype, device),
            rows("grad_key", grad_key, of_keys, dtype, device),
            rows("grad_value", grad_value, of_keys, dtype, device),
            0,
            address(bias_sums),
            bias_heads,
            images,
            torch.cuda.current_stream().cuda_stream,
        )
    if grad_bias is not None:
        grad_bias.copy_(bias_sums if bias_images == batch else bias_sums.sum(dim=0, keepdim=True))


def window_forward(
    inputs: WindowInputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes attention and labels within windows into the given tensors; see `reference.window_forward`."""
    qkv = inputs.qkv
    batch, heads, tokens = log_sum_exp.shape
    sources, device = 0 if share is None else share.shape[3], qkv.device
    of_map, labels = output.shape, (*output.shape[:3], sources)
    packed_labels = qkv.new_empty(_native.cuda_labels(batch, tokens, sources, True))
    head_share = None
    if sources:
        # Beside shares what part of the attention goes to labels.
        head_share = qkv.new_empty((batch, heads, sources + 1, tokens), dtype=torch.float32)
    problem, _keep = _window_problem(inputs, sources)
    with _current(device):
        _native.cuda_attention_forward(
            *problem,
            whole("share", share, labels, torch.float32, device),
            whole("residual", residual, labels, torch.float32, device),
            packed_labels.data_ptr(),
            address(head_share),
            whole("output", output, of_map, qkv.dtype, device),
            whole("share_out", share_out, labels, torch.float32, device),
            whole("log_sum_exp", log_sum_exp, (batch, heads, tokens), torch.float32, device),
            torch.cuda.current_stream().cuda_stream,
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
    qkv, windows = inputs.qkv, inputs.windows
    batch, heads, tokens = log_sum_exp.shape
    images, head_dim, device, dtype = qkv.shape[0], qkv.shape[5], qkv.device, qkv.dtype
    of_map = (images, heads, windows.map_size[0] * windows.map_size[1], head_dim)
    grad_output, output = _aligned(grad_output.flatten(1, 2)), _aligned(output)
    row_terms = qkv.new_empty((batch, heads, *_native.cuda_row_terms(tokens, DTYPES[dtype])), dtype=torch.float32)
    padding = grad_padding = bias_sums = None
    if grad_pad_qkv is not None:
        padding = windows.count() * tokens - of_map[2]
        grad_padding = qkv.new_empty((images, padding, 2, heads, head_dim))
    windows_of_sum = 1
    if grad_bias is not None:
        # Blocks of windows of 65 to 144 tokens have all of their scores, and a multiprocessor has one of them at once;
        # it holds many of the others, of 64 x 64 scores.
        tiles = 4 if 64 < tokens <= 144 else (-(-tokens // 64)) ** 2
        windows_of_sum = images_of_sum(batch, 1, tiles * heads, programs=4096)
        bias_sums = qkv.new_empty((-(-batch // windows_of_sum), heads, tokens, tokens), dtype=torch.float32)
    problem, _keep = _window_problem(inputs, sources=0)
    with _current(device):
        _native.cuda_attention_backward(
            *problem,
            rows("grad_output", grad_output.transpose(1, 2), of_map, dtype, device),
            whole("output", output, (images, *windows.map_size, heads, head_dim), dtype, device),
            whole("log_sum_exp", log_sum_exp, (batch, heads, tokens), torch.float32, device),
            row_terms.data_ptr(),
            *(
                rows(f"grad_{name}", view, of_map, dtype, device)
                for name, view in zip(("query", "key", "value"), unpack_qkv(grad_qkv.flatten(1, 2)), strict=True)
            ),
            address(grad_padding),
            address(bias_sums),
            heads,
            windows_of_sum,
            torch.cuda.current_stream().cuda_stream,
        )
    if grad_pad_qkv is not None:
        # Queries in the padding produce nothing.
        grad_pad_qkv[0].zero_()
        grad_pad_qkv[1:].copy_(grad_padding.sum(dim=(0, 1), dtype=torch.float32))
    if grad_bias is not None:
        grad_bias.copy_(bias_sums.sum(dim=0 if grad_bias.shape[1] == heads else (0, 1), keepdim=True))


def _window_problem(inputs: WindowInputs, sources: int) -> tuple[tuple, tuple]:
    """What both directions are told first of windows, and the tensors that have to live until they are launched."""
    qkv, pad_qkv, bias, _, windows, scale, _ = inputs
    qkv = _aligned(qkv.flatten(1, 2))
    images, tokens_of_map, _, heads, head_dim = qkv.shape
    batch, tokens, device, dtype = images * windows.count(), windows.tokens(), qkv.device, qkv.dtype
    of_map = (images, heads, tokens_of_map, head_dim)
    pad_qkv = None if pad_qkv is None else _aligned(pad_qkv)
    sizes = (batch, heads, tokens, tokens, head_dim, sources)
    bias_offsets = offsets("bias", bias, (1, heads, tokens, tokens), device)
    starts, _ = _starts(sizes, bias_offsets, None, scale, qkv, in_windows=True)
    places = qkv.new_empty((windows.count(), _native.cuda_places(tokens)), dtype=torch.int32)
    views = zip(("query", "key", "value"), unpack_qkv(qkv), strict=True)
    problem = (
        sizes,
        DTYPES[dtype],
        *(rows(name, view, of_map, dtype, device) for name, view in views),
        bias_offsets,
        None,
        scale,
        starts.data_ptr(),
        0,
        (
            (*windows.map_size, *windows.window_size, *windows.shift),
            whole("pad_qkv", pad_qkv, (3, heads, head_dim), dtype, device),
            places.data_ptr(),
        ),
    )
    return problem, (qkv, bias, pad_qkv, starts, places)


def _problem(inputs: Inputs, sources: int) -> tuple[tuple, tuple]:
    """What both directions are told first, and the tensors that have to live until they are launched."""
    query, key, value, bias, mask, _, scale, _ = inputs
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    batch, heads, queries, head_dim = query.shape
    keys, device, dtype = key.shape[2], query.device, query.dtype
    sizes = (batch, heads, queries, keys, head_dim, sources)
    bias_offsets = offsets("bias", bias, (batch, heads, queries, keys), device)
    mask_offsets = offsets("mask", mask, (batch, heads, queries, keys), device)
    starts = _starts(sizes, bias_offsets, mask_offsets, scale, query)
    problem = (
        sizes,
        DTYPES[dtype],
        rows("query", query, (batch, heads, queries, head_dim), dtype, device),
        rows("key", key, (batch, heads, keys, head_dim), dtype, device),
        rows("value", value, (batch, heads, keys, head_dim), dtype, device),
        bias_offsets,
        mask_offsets,
        scale,
        *(address(scratch) for scratch in starts),
        None,
    )
    return problem, (query, key, value, bias, mask, *starts)


def _starts(
    sizes: tuple, bias: tuple | None, mask: tuple | None, scale: float, query: Tensor, in_windows: bool = False
) -> list[Tensor | None]:
    """Scratch for a bias and a mask as products of queries and keys begin with them."""
    numbers = _native.cuda_starts(sizes, bias, mask, scale, in_windows)
    return [query.new_empty(count, dtype=torch.float32) if count else None for count in numbers]


_capability = asked_once(torch.cuda.get_device_capability)


@asked_once
def _launch_error(device_index: int | None) -> str:
    """Why a device can't run the kernels: its driver may be older than they are."""
    with torch.cuda.device(device_index):
        return _native.cuda_launch_error()


def _current(device: torch.device) -> torch.cuda.device:
    """CUDA launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device)


def _aligned(tensor: Tensor) -> Tensor:
    """Kernels copy 16 bytes at a time: a tensor whose rows begin elsewhere, have gaps or are far apart is copied."""
    if tensor.data_ptr() % 16 == 0 and _has_aligned_rows(tensor.shape, tensor.stride()):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(4096)
def _has_aligned_rows(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether rows of numbers of 16 bits lie at multiples of 16 bytes, below 2**31, from one another, without gaps."""
    *between, last = strides
    return last == 1 and all(
        stride % 8 == 0 and stride < 2**30 for size, stride in zip(shape, between, strict=False) if size > 1
    )
