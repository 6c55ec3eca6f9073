"""Attention with label propagation in plain PyTorch: the specification, and the backend that runs anywhere.

It forms the attention matrix. In float64 it is the oracle of every other backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tlalign_kernels.backends import Problem


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the reference can't do `problem`: never, it does all that the operator's contract allows."""
    return []


def _without_autocast(launcher: Callable[..., None]) -> Callable[..., None]:
    """Autocast reaches into operators, and would turn the float32 products of a launcher into bfloat16 ones."""

    @functools.wraps(launcher)
    def launch(*tensors_and_options) -> None:
        with torch.autocast(tensors_and_options[0].device.type, enabled=False):
            launcher(*tensors_and_options)

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
        share: (B, Nk, S), labels of the keys, or None.
        residual: (B, Nq, S), labels of the queries to average with, or None.
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
    if dropout_p > 0:
        probabilities = probabilities * _dropout_factor(probabilities, dropout_seed, dropout_p)
    output.copy_((probabilities @ _computing(value)).transpose(1, 2))


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
    grad_output = _computing(grad_output).transpose(1, 2)
    probabilities = _probabilities(_scores(query, key, bias, mask, scale), log_sum_exp)
    grad_probabilities = grad_output @ _computing(value).transpose(-2, -1)
    kept = probabilities
    if dropout_p > 0:
        factor = _dropout_factor(probabilities, dropout_seed, dropout_p)
        kept, grad_probabilities = probabilities * factor, grad_probabilities * factor
    grad_value.copy_(kept.transpose(-2, -1) @ grad_output)
    # sum_j P_ij dP_ij equals dO_i . O_i, also with dropout: the usual shortcut (FlashAttention, arXiv 2205.14135).
    row_term = (grad_output * _computing(output).transpose(1, 2)).sum(dim=-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - row_term)
    grad_query.copy_(grad_scores @ _computing(key) * scale)
    grad_key.copy_(grad_scores.transpose(-2, -1) @ _computing(query) * scale)
    if grad_bias is not None:
        grad_bias.copy_(grad_scores.sum_to_size(bias.shape))


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


def _propagate(probabilities: Tensor, log_sum_exp: Tensor, share: Tensor, residual: Tensor | None) -> Tensor:
    # Heads in which a query sees no key have no opinion on its label: the mean is over the others.
    seeing = (log_sum_exp != float("-inf")).sum(dim=1)[..., None]
    mixed = probabilities.sum(dim=1) @ share.to(probabilities.dtype) / seeing.clamp(min=1)
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
