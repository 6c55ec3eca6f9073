"""Checks backends against the float64 reference on the device at hand: `python -m tlalign_kernels selftest`.

The error bound is the one of the tests: at most twice the error that plain PyTorch makes in the same precision, plus
one rounding of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tlalign_kernels.backends import BACKENDS
from tlalign_kernels.functional import attention, attention_qkv, explain

# Part of the largest value that counts as rounding: one unit in the last place, for float32 that of the sums.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-14}


@dataclass(frozen=True)
class Case:
    """One call of the operator to check: sizes and options."""

    name: str
    batch: int = 2
    heads: int = 3
    queries: int = 197
    keys: int = 197
    head_dim: int = 64
    sources: int = 1
    packed: bool = False
    residual: bool = True
    bias_scale: float = 0.0  # standard deviation; 0: no bias
    mask: str | None = None  # "causal", "rows" (some queries see no key), "additive"
    dropout_p: float = 0.0
    scale: float | None = None  # factor of the scores; None: D**-0.5


CASES = (
    Case("ViT, packed", packed=True),
    Case("ViT", sources=2),
    Case("ViT-H heads", head_dim=80, queries=50, keys=50),
    Case("windows with bias", batch=8, heads=3, queries=49, keys=49, head_dim=32, bias_scale=1.0, packed=True),
    Case("reduced keys", heads=1, queries=784, keys=49),
    Case("one token", queries=1, keys=1, head_dim=8, residual=False),
    Case("causal", queries=33, keys=33, mask="causal"),
    Case("queries that see nothing", queries=20, keys=24, mask="rows", residual=True),
    Case("bias, additive mask, dropout", queries=40, keys=40, bias_scale=1.0, mask="additive", dropout_p=0.25),
    Case("extreme scores", queries=24, keys=24, bias_scale=1e4),
    Case("dense labels", queries=65, keys=65, sources=100),
)


@dataclass(frozen=True)
class Check:
    """Result of comparing one tensor: its error, and what was allowed."""

    case: Case
    dtype: torch.dtype
    tensor: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is finite and within the bound."""
        return self.error <= self.bound


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> dict[str, Tensor | None]:
    """Random float64 inputs of a case; scores of about unit variance times 3, so that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device)

    heads, dim = case.heads, case.head_dim
    if case.packed:
        qkv = draw(case.batch, case.queries, 3, heads, dim, scale=3**0.5)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        query = draw(case.batch, case.queries, heads, dim, scale=3**0.5).transpose(1, 2)
        key = draw(case.batch, case.keys, heads, dim, scale=3**0.5).transpose(1, 2)
        value = draw(case.batch, case.keys, heads, dim).transpose(1, 2)
    share = torch.rand((case.batch, case.keys, case.sources), generator=generator, dtype=torch.float64)
    residual = torch.rand((case.batch, case.queries, case.sources), generator=generator, dtype=torch.float64)
    masks = {
        None: lambda: None,
        "causal": lambda: torch.ones(case.queries, case.keys, dtype=torch.bool).tril(),
        "rows": lambda: torch.arange(case.queries)[:, None].expand(-1, case.keys) % 3 > 0,
        "additive": lambda: -4.0 * torch.rand((case.queries, case.keys), generator=generator, dtype=torch.float64),
    }
    mask = masks[case.mask]()
    return {
        "query": query,
        "key": key,
        "value": value,
        "share": share.to(device),
        "residual": residual.to(device) if case.residual else None,
        "bias": draw(heads, case.queries, case.keys, scale=case.bias_scale) if case.bias_scale else None,
        "mask": None if mask is None else mask.to(device),
        "grad_output": draw(case.batch, case.queries, heads, dim).transpose(1, 2),
    }


def cast_inputs(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Inputs in another precision; labels in float32 unless that is float64."""
    labels = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(labels if name in ("share", "residual") else dtype)

    return {name: cast(name, tensor) for name, tensor in inputs.items()}


def run_operator(case: Case, inputs: dict[str, Tensor | None], backend: str, seed: int = 0) -> dict[str, Tensor]:
    """Output, share and gradients of the operator; `seed` is that of the dropout."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("query", "key", "value")}
    bias = None if inputs["bias"] is None else inputs["bias"].detach().requires_grad_()
    options = dict(
        residual=inputs["residual"], bias=bias, mask=inputs["mask"], scale=case.scale, dropout_p=case.dropout_p,
        backend=backend,
    )  # fmt: skip
    torch.manual_seed(seed)
    if case.packed:
        qkv = torch.stack([leaves[name] for name in ("query", "key", "value")]).permute(1, 3, 0, 2, 4)
        output, share = attention_qkv(qkv, inputs["share"], **options)
        output = output.transpose(1, 2)
    else:
        output, share = attention(*leaves.values(), inputs["share"], **options)
    return _with_gradients(output, share, leaves, bias, inputs["grad_output"])


def run_plain(case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The same by materialised attention in plain PyTorch, in the precision of the inputs; without dropout."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("query", "key", "value")}
    bias = None if inputs["bias"] is None else inputs["bias"].detach().requires_grad_()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = leaves["query"] @ leaves["key"].transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias
    mask, unseeing = inputs["mask"], None
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        unseeing = (scores == float("-inf")).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(unseeing, 0.0)
    attended = scores.softmax(dim=-1)
    if unseeing is not None:
        attended = attended.masked_fill(unseeing, 0.0)
    with torch.no_grad():
        share = attended.mean(dim=1).to(inputs["share"].dtype) @ inputs["share"]
        if inputs["residual"] is not None:
            share = (share + inputs["residual"]) / 2
            if unseeing is not None:
                share = torch.where(unseeing.all(dim=1), inputs["residual"], share)
    return _with_gradients(attended @ leaves["value"], share, leaves, bias, inputs["grad_output"])


def compare(
    case: Case, dtype: torch.dtype, backend: str, device: torch.device | str = "cpu", seed: int = 0
) -> list[Check]:
    """Compares a backend with the float64 reference, output, share and gradients.

    Args:
        case: What to run.
        dtype: Precision of query, key, value and bias.
        backend: Name of a backend.
        device: Where it runs; the reference runs on the CPU.
        seed: Of the random inputs and the dropout.

    Returns:
        A check for each tensor.
    """
    rounded = cast_inputs(make_inputs(case, "cpu", seed), dtype)
    # The oracle starts from the rounded inputs: what is measured is the error of the computation alone.
    exact = cast_inputs(rounded, torch.float64)
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in rounded.items()}
    if case.dropout_p > 0 and torch.device(device).type != "cpu":
        raise ValueError(f"device: the reference repeats the dropout of the CPU's generator only, got {device}")
    oracle = run_operator(case, exact, "reference", seed)
    given = run_operator(case, moved, backend, seed)
    # Dropout of plain PyTorch draws other numbers; its rounding errors without dropout are as large.
    plain_exact = oracle if case.dropout_p == 0 else run_plain(case, exact)
    plain = run_plain(case, moved)

    def largest(tensor: Tensor) -> float:
        return float(tensor.double().cpu().abs().max())

    # A gradient may cancel to nothing (that of the query where there is one key): what was rounded is not small.
    largest_gradient = max(largest(tensor) for name, tensor in oracle.items() if name.startswith("gradient"))

    def bound(name: str) -> float:
        scale = largest_gradient if name.startswith("gradient") else largest(oracle[name])
        return 2 * largest(plain[name].double().cpu() - plain_exact[name]) + ROUNDING[dtype] * scale

    return [
        Check(case, dtype, name, largest(given[name].double().cpu() - oracle[name]), bound(name)) for name in oracle
    ]


def selftest(device: torch.device | str) -> Iterator[tuple[str, Case, torch.dtype, list[Check] | list[str]]]:
    """Runs all cases in all precisions on every backend that can do them.

    Args:
        device: Device to test.

    Yields:
        Backend, case, precision, and its checks, or the reasons why the backend can't do it.
    """
    on_cpu = torch.device(device).type == "cpu"
    for backend in BACKENDS:
        for case in CASES:
            if case.dropout_p > 0 and not on_cpu:
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                inputs = cast_inputs(make_inputs(case, device), dtype)
                inputs.pop("grad_output")
                # Gradients are compared too, so the backend has to have them.
                inputs["query"].requires_grad_()
                reasons = explain(**inputs, dropout_p=case.dropout_p, backend=backend).reasons[backend]
                yield backend, case, dtype, reasons or compare(case, dtype, backend, device)


def _with_gradients(
    output: Tensor, share: Tensor, leaves: dict[str, Tensor], bias: Tensor | None, grad_output: Tensor
) -> dict[str, Tensor]:
    wanted = [*leaves.values()] + ([] if bias is None else [bias])
    names = [f"gradient of {name}" for name in leaves] + ([] if bias is None else ["gradient of bias"])
    gradients = torch.autograd.grad(output, wanted, grad_output)
    return {"output": output.detach(), "share": share.detach(), **dict(zip(names, gradients, strict=True))}
