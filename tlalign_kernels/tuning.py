"""Times backends, and configurations of their kernels, on what a step computes; "auto" then takes the fastest."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from tlalign_kernels.backends import BACKENDS, TUNED, Problem, auto_order, listen, problem_class
from tlalign_kernels.extension import VERSION
from tlalign_kernels.functional import attention, attention_qkv, window_attention

# Of each candidate so many runs are timed, or as many as fill so many seconds; one that is so much slower is given up.
_RUNS, _SECONDS, _HOPELESS = 30, 1.0, 10


@dataclass(frozen=True)
class Choice:
    """What `tune` found for a class of problems.

    Attributes:
        problem: The class, as text: shapes, dtype and options but for the batch.
        backend: The fastest backend.
        configuration: What its kernels' launches look like, where it had a choice.
        milliseconds: Median time of each candidate; in a forward and backward if a gradient is needed.
        failures: Why a candidate could not be run.
    """

    problem: str
    backend: str
    configuration: tuple[str, ...]
    milliseconds: dict[str, float]
    failures: dict[str, str]


def tune(step: Callable[[], object], cache: str | os.PathLike | None = None) -> list[Choice]:
    """Finds the fastest backend and kernels for the attention that a step computes; `backend="auto"` then takes them.

    `step` is run once to see what it asks for. Each class of problems (shapes and dtypes but for the batch, and
    options) is then timed with random numbers on every backend of its device that can do it, in every configuration of
    the backend's kernels, interleaved. Calls with an explicit `backend=` take part neither in the one nor in the other.

    Nothing is timed unless this is called, and the same calls give the same bits after it as long as the choices are
    the same: with a `cache` a resumed run finds those of the first. In a distributed run every process has to call it;
    rank 0 times, and all take its choices. Call it before `torch.compile`, and outside a CUDA graph.

    Args:
        step: A forward, or forward and backward, of the model or the operator, as in training. Gradients that it
            leaves are the caller's to clear; torch's random state is left as it was.
        cache: JSON file with the choices of earlier calls, which are not timed again on the same kind of device with
            the same versions; new ones are added, each as soon as it is made. None: nothing is read or written.

    Returns:
        The choice for each class of problems, in the order of their first appearance.

    Raises:
        TypeError: If `step` can't be called.
        ValueError: If `step` asks for nothing, or the cache is no such file.
        RuntimeError: If a problem can be run by no candidate, with the reasons; on other ranks whatever rank 0 raised.
        OSError: If the cache can't be read, or choices can't be added to it.
    """
    if not callable(step):
        raise TypeError(f"step: expected a function, got {type(step).__name__}")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_first = not distributed or torch.distributed.get_rank() == 0
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    problems, choices, failure = [], [], None
    try:
        with torch.random.fork_rng(devices):
            problems = _problems_of(step)
            if is_first:
                choices = _find(problems, None if cache is None else Path(cache))
    except Exception as error:
        if not (distributed and is_first):
            raise
        failure = error
    if distributed:
        # The others wait for rank 0, so whatever happened there, they have to hear of it.
        said = [choices, None if failure is None else f"{type(failure).__name__}: {failure}"]
        with _on_device_of(problems[0]) if problems else contextlib.nullcontext():
            torch.distributed.broadcast_object_list(said, src=0)
        choices, message = said
        if message is not None:
            raise failure or RuntimeError(f"tune failed on rank 0: {message}")
    found = {choice.problem: choice for choice in choices}
    for problem in problems:
        if _text(problem) not in found:
            raise RuntimeError(f"step: expected the same problems as on rank 0, got {_text(problem)} here only")
        _follow(problem, found[_text(problem)])
    return choices


def _problems_of(step: Callable[[], object]) -> list[Problem]:
    """A problem of each class that a step asks for, with a gradient if any of them needs one."""
    with listen() as heard:
        step()
    problems: dict[Problem, Problem] = {}
    for problem in heard:
        seen = problems.get(problem_class(problem))
        if seen is None or problem.needs_gradient > seen.needs_gradient:
            problems[problem_class(problem)] = problem
    if not problems:
        raise ValueError(
            "step: expected calls of attention with backend='auto', got none; patch the model, pass it a target, "
            "and tune before torch.compile"
        )
    return list(problems.values())


def _find(problems: list[Problem], cache: Path | None) -> list[Choice]:
    """Takes the choices from the cache, or makes them and adds each to it as soon as it is made."""
    environment = _environment(problems[0])
    known = {} if cache is None else _read(cache).get(environment, {})
    choices = [known.get(_text(problem)) for problem in problems]
    missing = [i for i, choice in enumerate(choices) if choice is None or _candidate(problems[i], choice) is None]
    if cache is not None and missing:
        _add(cache, environment, [])  # before anything is timed: whether it can be kept
    for i in missing:
        choices[i] = _time_all(problems[i])
        if cache is not None:
            _add(cache, environment, [choices[i]])
    return choices


def _text(problem: Problem) -> str:
    """The class of a problem; what it is timed for, a gradient or none, makes a difference to the cache."""
    fields = problem_class(problem)._asdict() | {"needs_gradient": problem.needs_gradient}
    return " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("batch", "device_index"))


def _environment(problem: Problem) -> str:
    """What a choice is good for: versions and the kind of device."""
    versions = [f"tlalign-kernels {VERSION}", f"torch {torch.__version__}"]
    try:
        versions.append(f"triton {importlib.metadata.version('triton')}")
    except importlib.metadata.PackageNotFoundError:
        versions.append("no triton")
    if problem.device_type == "cuda":
        versions.append(f"float32 as {torch.backends.cuda.matmul.fp32_precision}")
        return ", ".join([torch.cuda.get_device_name(problem.device_index), *versions])
    processor = f"{problem.device_type} {platform.machine()} {BACKENDS['cpu'].instruction_set() or 'without kernels'}"
    return ", ".join([f"{processor}, {torch.get_num_threads()} threads", *versions])


def _on_device_of(problem: Problem) -> contextlib.AbstractContextManager:
    """Makes the GPU of a problem the current one."""
    return torch.cuda.device(problem.device_index) if problem.device_type == "cuda" else contextlib.nullcontext()


def _candidates(problem: Problem) -> dict[str, tuple[str, tuple | None]]:
    """Backends and configurations that can do a problem, by a name made to be read."""
    found = {}
    for name in auto_order(problem.device_type):
        module = BACKENDS[name]
        if module.unsupported_reasons(problem):
            continue
        for configuration in module.configurations(problem) if hasattr(module, "configurations") else [None]:
            kernels = tuple(map(str, configuration or ()))
            found[_name(name, kernels)] = (name, configuration)
    return found


def _name(backend: str, kernels: tuple[str, ...]) -> str:
    return ", ".join([backend, *kernels])


def _candidate(problem: Problem, choice: Choice) -> tuple[str, tuple | None] | None:
    return _candidates(problem).get(_name(choice.backend, choice.configuration))


def _follow(problem: Problem, choice: Choice) -> None:
    candidate = _candidate(problem, choice)
    if candidate is None:
        raise RuntimeError(f"rank 0 chose what can't be run here: {_name(choice.backend, choice.configuration)}")
    backend, configuration = candidate
    if configuration is not None:
        BACKENDS[backend].prefer(problem, configuration)
    TUNED[problem_class(problem)] = backend


def _time_all(problem: Problem) -> Choice:
    """Times the candidates, and leaves the backends as they were."""
    candidates = _candidates(problem)
    with contextlib.ExitStack() as stack:
        for module in BACKENDS.values():
            if hasattr(module, "preferences_kept"):
                stack.enter_context(module.preferences_kept())
        stack.enter_context(_on_device_of(problem))
        times, failures = _time_in_turn(problem, candidates)
    if not times:
        raise RuntimeError(f"no candidate can run {_text(problem)}: {failures}")
    medians = {name: 1000 * statistics.median(measured) for name, measured in times.items()}
    backend, configuration = candidates[min(medians, key=medians.get)]
    return Choice(_text(problem), backend, tuple(map(str, configuration or ())), medians, failures)


def _time_in_turn(
    problem: Problem, candidates: dict[str, tuple[str, tuple | None]]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each candidate, or why it failed; one after the other, so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    run = _runner(problem)

    def seconds(name: str) -> float:
        backend, configuration = candidates[name]
        if configuration is not None:
            BACKENDS[backend].prefer(problem, configuration)
        # The step may have had a state of its own, which is part of the problem.
        with torch.set_grad_enabled(problem.needs_gradient), torch.autocast(problem.device_type, enabled=False):
            return _time(lambda: run(backend), problem.device_type)

    for name in candidates:
        try:
            seconds(name)  # compiles
            times[name] = [seconds(name)]
        # Whatever keeps a candidate from running, memory or a compiler, is a reason to take another; it is reported.
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    slowest = _HOPELESS * min((first for first, *_ in times.values()), default=0.0)
    for _ in range(_RUNS - 1):
        for name, measured in times.items():
            if measured[0] <= slowest and sum(measured) < _SECONDS:
                measured.append(seconds(name))
    return times, failures


def _runner(problem: Problem) -> Callable[[str], None]:
    """Runs a problem on a backend: self-attention from a packed projection, other attention from three tensors."""
    if problem.windows is not None:
        return _runner_of_windows(problem)
    batch, heads, head_dim, sources = problem.batch, problem.heads, problem.head_dim, problem.sources
    queries, keys = problem.queries, problem.keys
    draw = functools.partial(_draw, problem)
    packed = queries == keys
    shapes = [(queries, 3)] if packed else [(queries,), (keys,), (keys,)]
    inputs = [draw(batch, *shape, heads, head_dim) for shape in shapes]
    bias = draw(1, heads, queries, keys) if problem.has_bias else None
    mask = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=problem.device_type) if problem.has_mask else None
    share = draw(batch, keys, sources, dtype=problem.share_dtype) if sources else None
    residual = draw(batch, queries, sources, dtype=problem.share_dtype) if sources else None
    leaves = [*inputs, *([] if bias is None else [bias])]
    for leaf in leaves:
        leaf.requires_grad_(problem.needs_gradient)
    grad_output = draw(batch, queries, heads, head_dim)

    def run(backend: str) -> None:
        options = dict(residual=residual, bias=bias, mask=mask, dropout_p=problem.dropout_p, backend=backend)
        if packed:
            output, _ = attention_qkv(*inputs, share, **options)
        else:
            output, _ = attention(*(tensor.transpose(1, 2) for tensor in inputs), share, **options)
            output = output.transpose(1, 2)
        if problem.needs_gradient:
            torch.autograd.grad(output, leaves, grad_output)

    return run


def _runner_of_windows(problem: Problem) -> Callable[[str], None]:
    windows, heads, head_dim = problem.windows, problem.heads, problem.head_dim
    map_shape, draw = (problem.batch // windows.count(), *windows.map_size), functools.partial(_draw, problem)
    qkv = draw(*map_shape, 3, heads, head_dim)
    pad_qkv = draw(3, heads, head_dim) if windows.is_padded() else None
    bias = draw(heads, windows.tokens(), windows.tokens()) if problem.has_bias else None
    share = draw(*map_shape, problem.sources, dtype=problem.share_dtype) if problem.sources else None
    leaves = [leaf for leaf in (qkv, pad_qkv, bias) if leaf is not None]
    for leaf in leaves:
        leaf.requires_grad_(problem.needs_gradient)
    grad_output = draw(*map_shape, heads, head_dim)

    def run(backend: str) -> None:
        output, _ = window_attention(
            qkv, share, share, window_size=windows.window_size, shift=windows.shift, bias=bias, pad_qkv=pad_qkv,
            dropout_p=problem.dropout_p, backend=backend,
        )  # fmt: skip
        if problem.needs_gradient:
            torch.autograd.grad(output, leaves, grad_output)

    return run


def _draw(problem: Problem, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, dtype=dtype or problem.dtype, device=problem.device_type)


def _time(run: Callable[[], None], device_type: str) -> float:
    """Seconds that `run` takes."""
    if device_type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    # While the GPU writes this, which also empties its caches, the host gets ahead of it: what is timed is the GPU.
    torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _read(cache: Path) -> dict[str, dict[str, Choice]]:
    """Choices by environment and class of problems."""
    if not cache.exists():
        return {}
    try:
        stored = json.loads(cache.read_text())
        return {
            environment: {
                choice["problem"]: Choice(**{**choice, "configuration": tuple(choice["configuration"])})
                for choice in choices
            }
            for environment, choices in stored.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cache: expected a file that tune has written, got {cache}: {error}") from error


def _add(cache: Path, environment: str, choices: list[Choice]) -> None:
    """Adds to what the file holds now, maybe by another process; writes all of it or leaves it as it was."""
    known = _read(cache)
    known.setdefault(environment, {}).update({choice.problem: choice for choice in choices})
    text = json.dumps({place: [asdict(choice) for choice in known[place].values()] for place in known}, indent=1)
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(cache)
