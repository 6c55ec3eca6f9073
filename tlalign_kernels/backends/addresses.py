"""Tensors as native code is handed them: addresses and strides, checked, since it can't see how large a tensor is."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises a ValueError unless a tensor is what the native code takes it for."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on {device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def address(scratch: Tensor | None) -> int:
    """Where scratch lies, 0 for None."""
    return 0 if scratch is None else scratch.data_ptr()


def rows(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int, int]:
    """Address and strides of images, heads and rows of a tensor (B, H, N, D); those of one thing alone are 0."""
    check(name, tensor, shape, dtype, device)
    image, head, row, last = strides_of(tensor.shape, tensor.stride())
    if last not in (0, 1):
        raise ValueError(f"{name}: expected a last stride of 1, got {last}")
    return tensor.data_ptr(), image, head, row


def whole(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Address of a contiguous tensor, or 0 for None."""
    if tensor is None:
        return 0
    check(name, tensor, shape, dtype, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()


def offsets(
    name: str, tensor: Tensor | None, scores: tuple[int, int, int, int], device: torch.device
) -> tuple[int, str, int, int, int, int] | None:
    """Address, dtype and strides of a bias or mask (1 or B, 1 or H, Nq, Nk); strides are 0 where it is broadcast."""
    if tensor is None:
        return None
    batch, heads, queries, keys = scores
    images, tensor_heads = tensor.shape[:2]
    shape = (batch if images != 1 else 1, heads if tensor_heads != 1 else 1, queries, keys)
    check(name, tensor, shape, tensor.dtype, device)
    dtype = "bool" if tensor.dtype == torch.bool else DTYPES[tensor.dtype]
    return tensor.data_ptr(), dtype, *strides_of(tensor.shape, tensor.stride())


@functools.lru_cache(4096)  # asked for several tensors a call, and the same in each step
def strides_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, 0 along dimensions of one, where they mean nothing."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
