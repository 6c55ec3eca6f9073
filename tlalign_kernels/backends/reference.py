"""Attention with label propagation in plain PyTorch: the specification, and the backend that runs anywhere.

It forms the attention matrix. In float64 it is the oracle of every other backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlalign_kernels.ops import Inputs, WindowInputs, unpack_qkv

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem
    from tlalign_kernels.windows import Windows

# What finite values of a bias or mask are brought to, the greatest of float16. Keys masked by it have no weight beside
# others, and a query all of whose keys are can still tell their scores apart: added to 1e9, float32 rounds them away.
_GREATEST_OFFSET = 65504.0


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the reference can't do `problem`: never, it does all that the operator's contract allows."""
    return []


def _without_autocast(launcher: Callable[..., None]) -> Callable[..., None]:
    """Autocast reaches into operators, and would turn the float32 products of a launcher into bfloat16 ones."""

    @functools.wraps(launcher)
    def launch(inputs: Inputs | WindowInputs, *tensors: Tensor | None) -> None:
        device_type = inputs[0].device.type
        if not torch.amp.is_autocast_available(device_type):  # the meta device
            return launcher(inputs, *tensors)
        with torch.autocast(device_type, enabled=False):
            return launcher(inputs, *tensors)

    return launch


@_without_autocast
def forward(
    inputs: Inputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes A.V and mean_h(A).share (TL-Align, arXiv 2210.06455) into the given tensors.

    Args:
        inputs: What attends to what, and how.
        share: (B, Nk, S), contiguous, labels of the keys, or None.
        residual: (B, Nq, S), contiguous, labels of the queries to average with, or None.
        output: Filled with (B, Nq, H, D).
        share_out: Filled with (B, Nq, S); None exactly if `share` is.
        log_sum_exp: Filled with (B, H, Nq), -inf where a query sees no key.
    """
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
    scores = _scores(query, key, bias, mask, scale)
    log_sum_exp.copy_(torch.logsumexp(scores, dim=-1))
    probabilities = _probabilities(scores, log_sum_exp)
    if share is not None:
        share_out.copy_(_propagate(probabilities, log_sum_exp, share, residual))
    output.copy_(_attended(probabilities, value, dropout_seed, dropout_p))


@_without_autocast
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
    """Computes the gradients into the given tensors; labels take no part.

    Args:
        inputs: Those of the forward.
        grad_output: (B, Nq, H, D), any strides.
        output: (B, Nq, H, D), of the forward.
        log_sum_exp: (B, H, Nq), of the forward.
        grad_query: Filled with (B, H, Nq, D), any strides but a unit last one.
        grad_key: Filled with (B, H, Nk, D).
        grad_value: Filled with (B, H, Nk, D).
        grad_bias: Filled with the shape of `bias`, or None if it is not wanted.
    """
    grads = _gradients(inputs, grad_output, output, log_sum_exp)
    for target, grad in zip((grad_query, grad_key, grad_value), grads, strict=False):
        target.copy_(grad)
    if grad_bias is not None:
        grad_bias.copy_(grads[3].sum_to_size(grad_bias.shape))


@_without_autocast
def window_forward(
    inputs: WindowInputs,
    share: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    share_out: Tensor | None,
    log_sum_exp: Tensor,
) -> None:
    """Computes attention and labels within the windows of a map into the given tensors, as timm's Swin does.

    To the scores of tokens of different regions `REGION_BIAS` is added. Padding is attended to, but has no label: that
    of a query is the sum over real j of A_ij share_j, A averaged over the heads, over the sum over real j of A_ij.

    Args:
        inputs: What attends to what, and how.
        share: (B, Ht, Wt, S), contiguous, labels of the tokens as keys, or None.
        residual: (B, Ht, Wt, S), contiguous, labels of the tokens as queries, to average with, or None.
        output: Filled with (B, Ht, Wt, H, D).
        share_out: Filled with (B, Ht, Wt, S); None exactly if `share` is.
        log_sum_exp: Filled with (B * W, H, N); what it is for queries in the padding is nobody's business.
    """
    windows = inputs.windows
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = _of_windows(inputs)
    scores = _scores(query, key, bias, mask, scale)
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
    inputs: WindowInputs,
    grad_output: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_qkv: Tensor,
    grad_pad_qkv: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Computes the gradients into the given tensors; labels take no part.

    Args:
        inputs: Those of the forward.
        grad_output: (B, Ht, Wt, H, D), any strides.
        output: (B, Ht, Wt, H, D), of the forward.
        log_sum_exp: (B * W, H, N), of the forward.
        grad_qkv: Filled with (B, Ht, Wt, 3, H, D), contiguous.
        grad_pad_qkv: Filled with (3, H, D), the sum over the padding of all windows; None exactly if there is none.
        grad_bias: Filled with the shape of `bias`, or None if it is not wanted.
    """
    windows = inputs.windows
    *grads, grad_scores = _gradients(
        _of_windows(inputs), windows.gather(grad_output), windows.gather(output), log_sum_exp
    )
    packed = torch.stack(grads, dim=2).transpose(1, 3)
    windows.scatter(packed, grad_qkv)
    if grad_pad_qkv is not None:
        padding, _ = windows.places(packed.device)
        in_order = packed.reshape(grad_qkv.shape[0], -1, *packed.shape[2:])
        grad_pad_qkv.copy_(in_order[:, padding].sum(dim=(0, 1)))
    if grad_bias is not None:
        grad_bias.copy_(grad_scores.sum_to_size(grad_bias.shape))


# What is added to the scores of tokens of different regions: a trained Swin knows this number, not minus infinity.
REGION_BIAS = -100.0


def _region_bias(windows: Windows, qkv: Tensor) -> Tensor | None:
    """REGION_BIAS where query and key lie in different regions, else 0: (B * W, 1, N, N)."""
    if not windows.has_regions():
        return None
    regions = windows.regions(qkv.device)
    differ = regions[:, :, None] != regions[:, None, :]
    return (differ * REGION_BIAS).to(torch.float32)[:, None].repeat(qkv.shape[0], 1, 1, 1)


def _of_windows(inputs: WindowInputs) -> Inputs:
    """The same with windows as images, query, key and value (B * W, H, N, D), and regions as a mask."""
    qkv, pad_qkv, bias, dropout_seed, windows, scale, dropout_p = inputs
    query, key, value = unpack_qkv(windows.gather(qkv, 0.0 if pad_qkv is None else pad_qkv))
    return Inputs(query, key, value, bias, _region_bias(windows, qkv), dropout_seed, scale, dropout_p)


def _attended(probabilities: Tensor, value: Tensor, dropout_seed: Tensor | None, dropout_p: float) -> Tensor:
    """A.V as (B, Nq, H, D)."""
    if dropout_p > 0:
        probabilities = probabilities * _dropout_factor(probabilities, dropout_seed, dropout_p)
    return (probabilities @ _computing(value)).transpose(1, 2)


def _gradients(
    inputs: Inputs, grad_output: Tensor, output: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and scores."""
    query, key, value, bias, mask, dropout_seed, scale, dropout_p = inputs
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


def within_reach(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias or mask beside whose finite values scores of a dtype keep their differences, all keys at -1e9 as at 0."""
    if offsets.dtype in (torch.bool, torch.float16) or dtype == torch.float64:
        return offsets
    return torch.where(offsets.isinf(), offsets, offsets.clamp(-_GREATEST_OFFSET, _GREATEST_OFFSET))


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    scores = _computing(query) @ _computing(key).transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + within_reach(bias, scores.dtype)
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
    mixed = total @ share.to(total.dtype) / torch.where(seeing != 0, seeing, 1)
    if residual is not None:
        mixed = torch.where(seeing != 0, (mixed + residual) / 2, residual.to(mixed.dtype))
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
