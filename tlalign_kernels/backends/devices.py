"""What is asked of a device, once."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def asked_once(ask: Callable[..., Any]) -> Callable[..., Any]:
    """A question whose answers are kept; constants to `torch.compile`, which else looks through a cache, and warns."""
    kept = functools.cache(ask)

    @torch.compiler.assume_constant_result
    @functools.wraps(ask)
    def answer(*arguments: object) -> Any:
        return kept(*arguments)

    return answer
