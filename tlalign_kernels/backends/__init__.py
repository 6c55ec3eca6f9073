"""The backends, what each can do, and the choice between them.

A backend is a module with launchers (`forward`, `backward`, `window_forward` and `window_backward`, see `reference`)
and `unsupported_reasons(problem) -> list[str]`. One whose kernels can be compiled in several ways has `configurations`,
`prefer`, `preferences_kept` and `configuration_of` as well, see `triton`. Backends never import one another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tlalign_kernels import ops
from tlalign_kernels.backends import cpu, cuda, reference, triton
from tlalign_kernels.windows import Windows

BACKENDS = {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": reference}
# Order of preference for `backend="auto"`; a device without an entry takes the reference.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

ops.LAUNCHERS.update(BACKENDS)


class Problem(NamedTuple):
    """All that the choice of a backend may depend on: shapes, dtypes, devices and options, never values.

    In windows of a map each window counts as an image, and regions as a mask.
    """

    device_type: str
    dtype: torch.dtype
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    sources: int
    share_dtype: torch.dtype | None
    has_bias: bool
    has_mask: bool
    dropout_p: float
    needs_gradient: bool
    windows: Windows | None = None
    device_index: int | None = None  # of a GPU; None: the current one


# What `tune` found, by the class of a problem: the name of a backend.
TUNED: dict[Problem, str] = {}
# Where `tune` listens, the problems for which "auto" is asked.
_listening: list[Problem] | None = None


def problem_class(problem: Problem) -> Problem:
    """Problems of one class take one choice of `tune`: the batch, the GPU and what is differentiated may differ."""
    return problem._replace(batch=0, needs_gradient=False, device_index=None)


@contextlib.contextmanager
def listen() -> Iterator[list[Problem]]:
    """Collects the problems for which "auto" is asked."""
    global _listening
    before, _listening = _listening, []
    try:
        yield _listening
    finally:
        _listening = before


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would take, and why not the others; `str()` of it is made to be read.

    Attributes:
        backend: Name of the backend, or None if the one that was asked for can't do it.
        reasons: For each backend the reasons why it can't be used; empty where it can.
        is_tuned: Whether `tune` chose the backend.
        configuration: Kernels that it launches and how they are compiled, where there is a choice.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    is_tuned: bool = False
    configuration: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}{' (by tune)' if self.is_tuned else ''}"]
        lines += [f"  launches {kernel}" for kernel in self.configuration]
        for name, reasons in self.reasons.items():
            lines.append(f"  {name}: {'usable' if not reasons else '; '.join(reasons)}")
        return "\n".join(lines)


def explain_choice(problem: Problem, backend: str) -> Explanation:
    """Says which backend a problem would take, without raising where none fits.

    Raises:
        ValueError: If `backend` is neither "auto" nor the name of a backend.
    """
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    reasons = {name: module.unsupported_reasons(problem) for name, module in BACKENDS.items()}
    candidates = _auto_candidates(problem) if backend == "auto" else (backend,)
    chosen = next((name for name in candidates if not reasons[name]), None)
    is_tuned = backend == "auto" and chosen == TUNED.get(problem_class(problem))
    module = BACKENDS.get(chosen)
    configuration = map(str, module.configuration_of(problem)) if hasattr(module, "configuration_of") else ()
    return Explanation(chosen, reasons, is_tuned, tuple(configuration))


def auto_order(device_type: str) -> tuple[str, ...]:
    """The backends of a device, in the order in which "auto" prefers them unless `tune` found otherwise."""
    return AUTO_ORDER.get(device_type, ("reference",))


def _auto_candidates(problem: Problem) -> tuple[str, ...]:
    order = auto_order(problem.device_type)
    # As a plain tuple, since PyTorch 2.9 can't look others up while it compiles.
    tuned = TUNED and TUNED.get(tuple(problem_class(problem)))
    return (tuned, *order) if tuned else order


def choose(problem: Problem, backend: str) -> str:
    """Picks the backend of a call: the one asked for, or for "auto" the first that can do it.

    Raises:
        ValueError: If `backend` is neither "auto" nor the name of a backend.
        NotImplementedError: If the backend can't do it, with the reasons; of "auto" the reference always can.
    """
    if backend == "auto" and _listening is not None:
        _listening.append(problem)
    # The common case builds no explanation: this runs at every call.
    for name in _auto_candidates(problem) if backend == "auto" else (backend,):
        if isinstance(name, str) and name in BACKENDS and not BACKENDS[name].unsupported_reasons(problem):
            return name
    explanation = explain_choice(problem, backend)  # which raises if there is no such backend
    raise NotImplementedError(f"backend {backend!r} does not support this call\n{explanation}")
