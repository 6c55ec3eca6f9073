"""Looking into the blocks of a model that follows labels, without changing the model."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.models import davit, maxxvit
from torch import Tensor, nn

from tlalign_kernels import MixedTarget, patch_model

# Their tokens are (B, channels, Ht, Wt).
_CHANNELS_FIRST = (davit.SpatialBlock, maxxvit.TransformerBlock2d, maxxvit.PartitionAttention2d)


def following(model: nn.Module, **options: Any) -> nn.Module:
    """A copy of a model that follows labels, in evaluation mode; it shares the parameters and buffers.

    Args:
        model: A timm model, patched or not; it is left as it is.
        options: As for `patch_model`.

    Raises:
        NotImplementedError: If labels can't be followed through the model.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return patch_model(copy.deepcopy(model, shared), **options).eval()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a patched model, in the order of the forward."""
    return type(model).label_blocks(model)


@contextmanager
def watching(model: nn.Module, watch: Callable[[int, nn.Module, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Calls `watch(index, block, arguments, result)` after each block of a patched model, counted from 0."""
    with ExitStack() as hooks:
        for index, block in enumerate(blocks_of(model)):
            hooks.enter_context(block.register_forward_hook(functools.partial(watch, index)))
        yield


def tokens_of(block: nn.Module, result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Tokens (B, N, channels) or (B, Ht, Wt, channels) in the result of a block that aligns labels, or does not."""
    tokens = result if isinstance(result, Tensor) else result[0]
    return tokens.permute(0, 2, 3, 1) if isinstance(block, _CHANNELS_FIRST) else tokens


def empty_target(images: Tensor, columns: int) -> MixedTarget:
    """A target of images (B, channels, Hi, Wi) with a label of `columns` numbers for each token, all of them 0."""
    classes = torch.zeros(len(images), columns + 1, dtype=torch.int64, device=images.device)
    return MixedTarget.from_ratio(classes, torch.zeros(len(images), columns, device=images.device))


def one_hot_labels(share: Tensor, columns: range) -> Tensor:
    """Labels by which some of the tokens are told from all others.

    Args:
        share: Labels of the tokens, (B, N, S) or (B, Ht, Wt, S).
        columns: Which tokens have a class of their own.

    Returns:
        As `share`, with a class for each of the columns.
    """
    places = share.shape[1:-1]
    labels = share.new_zeros((len(share), places.numel(), len(columns)))
    index = torch.arange(len(columns), device=share.device)
    labels[:, index + columns.start, index] = 1
    return labels.view(len(share), *places, len(columns))


def column_ranges(share: Tensor, memory: int) -> Iterator[range]:
    """Ranges of tokens such that one-hot labels for those of each, in the place of `share`, fit in `memory` bytes."""
    tokens = share.shape[1:-1].numel()
    step = max(1, memory // (share.element_size() * len(share) * tokens))
    return (range(start, min(start + step, tokens)) for start in range(0, tokens, step))


def pooling_of(model: nn.Module) -> str:
    """What the head of a model sees, in timm's words; Swin v2-CR does not say that it is the mean of the tokens."""
    return getattr(model, "global_pool", "avg")


def has_class_token(model: nn.Module, share: Tensor) -> bool:
    """Whether labels (B, N, S) or (B, Ht, Wt, S) are those of a stage with a class token that the head sees."""
    return share.dim() == 3 and pooling_of(model) == "token" and prefix_of(model, share) > 0


def prefix_of(model: nn.Module, share: Tensor) -> int:
    """Number of tokens with these labels (B, N, S) or (B, Ht, Wt, S) that stand for no place in the image."""
    return prefix_tokens(model) if share.dim() == 3 else 0


def prefix_tokens(model: nn.Module) -> int:
    """Number of class, distillation and register tokens of a model."""
    return getattr(model, "num_prefix_tokens", getattr(model, "num_tokens", 0))  # the second is PiT's name


def is_distilled(model: nn.Module) -> bool:
    """Whether a model has a second head, for a distillation token, and averages both."""
    return getattr(model, "head_dist", None) is not None


def map_size(model: nn.Module, share: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    """Ht and Wt of the tokens with these labels.

    Where the model does not say it (PVT, whose stages differ), (B, N, S) lie on the image so that they are closest to
    squares.
    """
    if share.dim() == 4:
        return share.shape[1], share.shape[2]
    tokens = share.shape[1] - prefix_of(model, share)
    stem = getattr(model, "embeds", None) or getattr(model, "patch_embed", None)  # NaFlexVit's name, and all others'
    if hasattr(stem, "dynamic_feat_size"):
        rows, columns = stem.dynamic_feat_size(image_size)
        if rows * columns == tokens:
            return rows, columns
    aspect = image_size[0] / image_size[1]
    divisors = [rows for rows in range(1, tokens + 1) if tokens % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows * rows / tokens / aspect)))
    return rows, tokens // rows


def image_value(model: nn.Module, share: Tensor) -> Tensor:
    """Of labels (B, N, S) or (B, Ht, Wt, S) that of the image, (B, S): of the class token, else the tokens' mean.

    In distilled models, whose two heads are averaged, it is the mean of both tokens'. Register tokens count where the
    model's own mean has them. A head that pools by attention sees another mean. What is not a number is left out.
    """
    if has_class_token(model, share):
        return share[:, :2].nanmean(dim=1) if is_distilled(model) else share[:, 0]
    prefix = 0 if getattr(model, "pool_include_prefix", False) else prefix_of(model, share)
    return share.flatten(1, -2)[:, prefix:].nanmean(dim=1)
