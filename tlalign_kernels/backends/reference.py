"""Attention with label propagation in plain PyTorch: the specification, and the backend that runs anywhere.

It forms the attention matrix. In float64 it is the oracle of every other backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels.ops import unpack_qkv

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem
    from tlalign_kernels.windows import Windows


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the reference can't do `problem`: never, it does all that the operator's contract allows."""
    return []


def _without_autocast(launcher: Callable[..., None]) -> Callable[..., None]:
    """Autocast reaches into operators, and would turn the float32 products of a launcher into bfloat16 ones."""

    @functools.wraps(launcher)
    def launch(*tensors_and_options) -> None:
        device_type = tensors_and_options[0].device.type
        if not torch.amp.is_autocast_available(device_type):  # the meta device
            return launcher(*tensors_and_options)
        with torch.autocast(device_type, enabled=False):
            return launcher(*tensors_and_options)

    return launch


@_without_autocast
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
    """Computes A.V and mean_h(A).share (TL-Align, arXiv 2210.06455) into the given tensors.

    Args:
        query: (B, H, Nq, D), any strides but a unit last one, as for key and value.
        key: (B, H, Nk, D).
        value: (B, H, Nk, D).
        share: (B, Nk, S), contiguous, labels of the keys, or None.
        residual: (B, Nq, S), contiguous, labels of the queries to average with, or None.
        bias: Added to the scores, (1 or B, 1 or H, Nq, Nk), or None.
        mask: Like `bias`; additive, or bool where True lets a query see a key; or None.
        dropout_seed: int64 (1,), needed if dropout_p > 0.
        scale: Factor of the products of queries and keys.
        dropout_p: Probability with which an attention weight is dropped from A.V; labels take part undropped.
        output: Filled with (B, Nq, H, D).
        share_out: Filled with (B, Nq, S); None exactly if `share` is.
        log_sum_exp: Filled with (B, H, Nq), -inf where a query sees no key.
    """
    scores = _scores(query, key, bias, mask, scale)
    log_sum_exp.copy_(torch.logsumexp(scores, dim=-1))
    probabilities = _probabilities(scores, log_sum_exp)
    if share is not None:
        share_out.copy_(_propagate(probabilities, log_sum_exp, share, residual))
    output.copy_(_attended(probabilities, value, dropout_seed, dropout_p))


@_without_autocast
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
    """Computes the gradients into the given tensors; labels take no part.

    Args:
        grad_output: (B, Nq, H, D), any strides.
        query: As in the forward, like all that is not named here.
        key: As in the forward.
        value: As in the forward.
        output: (B, Nq, H, D), of the forward.
        log_sum_exp: (B, H, Nq), of the forward.
        bias: As in the forward.
        mask: As in the forward.
        dropout_seed: As in the forward.
        scale: As in the forward.
        dropout_p: As in the forward.
        grad_query: Filled with (B, H, Nq, D), any strides but a unit last one.
        grad_key: Filled with (B, H, Nk, D).
        grad_value: Filled with (B, H, Nk, D).
        grad_bias: Filled with the shape of `bias`, or None if it is not wanted.
    """
    grads = _gradients(grad_output, query, key, value, output, log_sum_exp, bias, mask, dropout_seed, scale, dropout_p)
    for target, grad in zip((grad_query, grad_key, grad_value), grads, strict=False):
        target.copy_(grad)
    if grad_bias is not None:
        grad_bias.copy_(grads[3].sum_to_size(bias.shape))


@_without_autocast
def window_forward(
    qkv: Tensor,
    pad_qkv: Tensor | None,
    share: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    windows: Windows,
    scale: float,
    dropout_p: float,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes attention and labels within the windows of a map into the given tensors, as timm's Swin does.

    To the scores of tokens of different regions `REGION_BIAS` is added. Padding is attended to, but has no label: that
    of a query is the sum over real j of A_ij share_j, A averaged over the heads, over the sum over real j of A_ij.

    Args:
        qkv: (B, Ht, Wt, 3, H, D), any strides but a unit last one.
        pad_qkv: (3, H, D), contiguous, what lies in the padding; None exactly if there is none.
        share: (B, Ht, Wt, S), contiguous, labels of the tokens as keys, or None.
        residual: (B, Ht, Wt, S), contiguous, labels of the tokens as queries, to average with, or None.
        bias: Added to the scores, (1, 1 or H, N, N), or None.
        dropout_seed: As in `forward`; windows count as images, image after image.
        windows: The map and its windows.
        scale: As in `forward`.
        dropout_p: As in `forward`.
        output: Filled with (B, Ht, Wt, H, D).
        share_out: Filled with (B, Ht, Wt, S); None exactly if `share` is.
        log_sum_exp: Filled with (B * W, H, N); what it is for queries in the padding is nobody's business.
    """
    query, key, value = _window_qkv(qkv, pad_qkv, windows)
    scores = _scores(query, key, bias, _region_bias(windows, qkv), scale)
    log_sum_exp.copy_(torch.logsumexp(scores, dim=-1))
    probabilities = _probabilities(scores, log_sum_exp)
    if share is not None:
        labels = windows.gather(share)
        real = windows.gather(share.new_ones((*share.shape[:3], 1)))
        passing = None if residual is None else windows.gather(residual)
        windows.scatter(_propagate(probabilities, log_sum_exp, labels, passing, real), share_out)
    windows.scatter(_attended(probabilities, value, dropout_seed, dropout_p), output)


@_without_autocast
def window_backward(
    grad_output: Tensor,
    qkv: Tensor,
    pad_qkv: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    windows: Windows,
    scale: float,
    dropout_p: float,
    grad_qkv: Tensor,
    grad_pad_qkv: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients into the given tensors; labels take no part.

    Args:
        grad_output: (B, Ht, Wt, H, D), any strides.
        qkv: As in `window_forward`, like all that is not named here.
        pad_qkv: As in `window_forward`.
        output: (B, Ht, Wt, H, D), of the forward.
        log_sum_exp: (B * W, H, N), of the forward.
        bias: As in `window_forward`.
        dropout_seed: As in `window_forward`.
        windows: As in `window_forward`.
        scale: As in `window_forward`.
        dropout_p: As in `window_forward`.
        grad_qkv: Filled with (B, Ht, Wt, 3, H, D), contiguous.
        grad_pad_qkv: Filled with (3, H, D), the sum over the padding of all windows; None exactly if `pad_qkv` is.
        grad_bias: Filled with the shape of `bias`, or None if it is not wanted.
    """
    query, key, value = _window_qkv(qkv, pad_qkv, windows)
    *grads, grad_scores = _gradients(
        windows.gather(grad_output), query, key, value, windows.gather(output), log_sum_exp,
        bias, _region_bias(windows, qkv), dropout_seed, scale, dropout_p,
    )  # fmt: skip
    packed = torch.stack(grads, dim=2).transpose(1, 3)
    windows.scatter(packed, grad_qkv)
    if grad_pad_qkv is not None:
        is_padding = (windows.token_numbers(qkv.device) < 0).flatten()
        in_order = packed.reshape(qkv.shape[0], -1, *packed.shape[2:])
        grad_pad_qkv.copy_(in_order[:, is_padding].sum(dim=(0, 1)))
    if grad_bias is not None:
        grad_bias.copy_(grad_scores.sum_to_size(bias.shape))


# What is added to the scores of tokens of different regions: a trained Swin knows this number, not minus infinity.
REGION_BIAS = -100.0


def _region_bias(windows: Windows, qkv: Tensor) -> Tensor | None:
    """REGION_BIAS where query and key lie in different regions, else 0: (B * W, 1, N, N)."""
    if not windows.has_regions:
        return None
    regions = windows.regions(qkv.device)
    differ = regions[:, :, None] != regions[:, None, :]
    return (differ * REGION_BIAS).to(torch.float32)[:, None].repeat(qkv.shape[0], 1, 1, 1)


def _window_qkv(qkv: Tensor, pad_qkv: Tensor | None, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of all windows, (B * W, H, N, D)."""
    return unpack_qkv(windows.gather(qkv, 0.0 if pad_qkv is None else pad_qkv))


def _attended(probabilities: Tensor, value: Tensor, dropout_seed: Tensor | None, dropout_p: float) -> Tensor:
    """A.V as (B, Nq, H, D)."""
    if dropout_p > 0:
        probabilities = probabilities * _dropout_factor(probabilities, dropout_seed, dropout_p)
    return (probabilities @ _computing(value)).transpose(1, 2)


def _gradients(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and scores."""
    grad_output = _computing(grad_output).transpose(1, 2)
    probabilities = _probabilities(_scores(query, key, bias, mask, scale), log_sum_exp)
    grad_probabilities = grad_output @ _computing(value).transpose(-2, -1)
    kept = probabilities
    if dropout_p > 0:
        factor = _dropout_factor(probabilities, dropout_seed, dropout_p)
        kept, grad_probabilities = probabilities * factor, grad_probabilities * factor
    # sum_j P_ij dP_ij equals dO_i . O_i, also with dropout: the usual shortcut (FlashAttention, arXiv 2205.14135).
    row_term = (grad_output * _computing(output).transpose(1, 2)).sum(dim=-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - row_term)
    grad_query = grad_scores @ _computing(key) * scale
    grad_key = grad_scores.transpose(-2, -1) @ _computing(query) * scale
    return grad_query, grad_key, kept.transpose(-2, -1) @ grad_output, grad_scores


def _computing(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    scores = _computing(query) @ _computing(key).transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores


def _probabilities(scores: Tensor, log_sum_exp: Tensor) -> Tensor:
    # Not exp(scores - log_sum_exp), which loses digits to a log-sum-exp of large size. Queries that see no key get 0,
    # where softmax alone gives NaN.
    unseeing = (log_sum_exp == float("-inf"))[..., None]
    return scores.softmax(dim=-1).masked_fill_(unseeing, 0.0)


def _propagate(
    probabilities: Tensor, log_sum_exp: Tensor, share: Tensor, residual: Tensor | None, real: Tensor | None = None
) -> Tensor:
    """Labels (B, Nq, S) of queries; `real` (B, Nk, 1) is 0 for keys without a label."""
    total = probabilities.sum(dim=1)
    # Heads in which a query sees no key have no opinion on its label: the mean is over the others.
    seeing = (log_sum_exp != float("-inf")).sum(dim=1)[..., None]
    if real is not None:
        seeing = total @ real.to(total.dtype)
    mixed = total @ share.to(total.dtype) / torch.where(seeing > 0, seeing, 1)
    if residual is not None:
        mixed = torch.where(seeing > 0, (mixed + residual) / 2, residual.to(mixed.dtype))
    return mixed


_WORD = 0xFFFFFFFF


def _dropout_factor(probabilities: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """0 for dropped weights, 1 / (1 - p) for the others: Philox at the weight's index, so any backend can repeat it."""
    index = torch.arange(probabilities.numel(), device=probabilities.device).view_as(probabilities)
    threshold = min(round(dropout_p * 2**32), _WORD)
    return (_philox(index, seed) >= threshold).to(probabilities.dtype) / (1 - dropout_p)


def _philox(index: Tensor, seed: Tensor) -> Tensor:
    """First 32-bit word of Philox4x32-10 (Salmon et al., SC 2011) at a 64-bit counter under a 64-bit key, in int64."""
    counter = [index & _WORD, (index >> 32) & _WORD, torch.zeros_like(index), torch.zeros_like(index)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves right.
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((second >> 32) & _WORD) ^ counter[1] ^ key[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ counter[3] ^ key[1],
            first & _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return counter[0]
