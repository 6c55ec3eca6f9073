"""Checks backends against the float64 reference on the device at hand: `python -m tlalign_kernels selftest`.

The error bound is the one of the tests: at most twice the error that plain PyTorch makes in the same precision, plus
one rounding of the largest value and what that of the largest scores makes of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tlalign_kernels.backends import BACKENDS, explain_choice
from tlalign_kernels.functional import attention, attention_qkv, explain, window_attention, window_problem
from tlalign_kernels.windows import Windows

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
    windows: Windows | None = None  # then these give the numbers of queries and keys, and `batch` is that of the map


CASES = (
    Case("ViT, packed", packed=True),
    Case("ViT", sources=2),
    Case("ViT-H heads", head_dim=80, queries=50, keys=50),
    Case("windows with bias", batch=8, queries=49, keys=49, head_dim=32, bias_scale=1.0, packed=True),
    Case("reduced keys", heads=1, queries=784, keys=49),
    Case("one token", queries=1, keys=1, head_dim=8, residual=False),
    Case("causal", queries=33, keys=33, mask="causal"),
    Case("queries that see nothing", queries=20, keys=24, mask="rows"),
    Case("bias, additive mask, dropout", queries=40, keys=40, bias_scale=1.0, mask="additive", dropout_p=0.25),
    Case("extreme scores", queries=24, keys=24, bias_scale=1e4),
    Case("dense labels", queries=65, keys=65, sources=100),
    Case("windows of a map", head_dim=32, bias_scale=1.0, windows=Windows((14, 21), (7, 7), (0, 0))),
    Case("shifted windows", head_dim=32, bias_scale=1.0, windows=Windows((14, 21), (7, 7), (3, 3))),
    Case("padded windows", head_dim=32, bias_scale=1.0, sources=2, windows=Windows((9, 16), (7, 7), (3, 3))),
    Case("windows beyond the map", head_dim=48, windows=Windows((3, 10), (8, 4), (4, 0)), residual=False),
    Case("large windows", heads=2, batch=1, head_dim=32, bias_scale=1.0, windows=Windows((20, 16), (16, 16), (8, 8))),
    Case("dense labels in windows", heads=2, head_dim=24, sources=20, windows=Windows((10, 5), (4, 4), (2, 2))),
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

    @property
    def part(self) -> float:
        """Error as a part of the bound."""
        return self.error / self.bound if self.bound else 0.0


def make_inputs(case: Case, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """Random inputs of a case; labels in float32 unless dtype is float64."""
    return cast_inputs(draw_inputs(case, device, seed), dtype)


def draw_inputs(case: Case, device: torch.device | str, seed: int) -> dict[str, Tensor | None]:
    """Random float64 inputs of a case; scores of about unit variance times 3, so that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device)

    heads, dim = case.heads, case.head_dim
    if case.windows is not None:
        of_map, tokens = (case.batch, *case.windows.map_size), case.windows.tokens()
        query_key = draw(*of_map, 2, heads, dim, scale=3**0.5)
        labels = [torch.rand((*of_map, case.sources), generator=generator, dtype=torch.float64) for _ in range(2)]
        return {
            "qkv": torch.cat((query_key, draw(*of_map, 1, heads, dim)), dim=3),
            "share": labels[0].to(device),
            "residual": labels[1].to(device) if case.residual else None,
            "bias": draw(heads, tokens, tokens, scale=case.bias_scale) if case.bias_scale else None,
            "pad_qkv": draw(3, heads, dim) if case.windows.is_padded() else None,
            "grad_output": draw(*of_map, heads, dim),
        }
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
    leaves, bias = _leaves(inputs)
    labels = inputs["share"], inputs["residual"]
    options = dict(bias=bias, scale=case.scale, dropout_p=case.dropout_p, backend=backend)
    torch.manual_seed(seed)
    if case.windows is not None:
        output, share = window_attention(
            leaves["qkv"], *labels, window_size=case.windows.window_size, shift=case.windows.shift,
            pad_qkv=leaves.get("pad_qkv"), **options,
        )  # fmt: skip
    elif case.packed:
        qkv = torch.stack([leaves[name] for name in ("query", "key", "value")]).permute(1, 3, 0, 2, 4)
        output, share = attention_qkv(qkv, *labels, mask=inputs["mask"], **options)
        output = output.transpose(1, 2)
    else:
        output, share = attention(*leaves.values(), *labels, mask=inputs["mask"], **options)
    return _with_gradients(output, share, leaves, bias, inputs["grad_output"])


def run_plain(case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The same by materialised attention in plain PyTorch, in the precision of the inputs; without dropout."""
    leaves, bias = _leaves(inputs)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    if case.windows is not None:
        output, share = _plain_windows(case.windows, inputs, leaves, bias, scale)
        return _with_gradients(output, share, leaves, bias, inputs["grad_output"])
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


def _plain_windows(
    windows: Windows, inputs: dict[str, Tensor | None], leaves: dict[str, Tensor], bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and share by rolling, padding, cutting and putting together again, as timm does it."""
    (height, width), (rows, columns), shift = windows.window_size, windows.map_size, windows.shift
    padded = tuple(number * size for number, size in zip(windows.grid_size(), windows.window_size, strict=True))

    def cut(tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, Ht, Wt, ...) to (B, W, N, ...)."""
        tokens = tokens.roll((-shift[0], -shift[1]), (1, 2))
        filled = tokens.new_zeros((tokens.shape[0], *padded, *tokens.shape[3:]))
        if padding is not None:
            filled = filled + padding
        filled[:, :rows, :columns] = tokens
        parts = filled.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
        return parts.flatten(3, 4).flatten(1, 2)

    def join(parts: Tensor) -> Tensor:
        parts = parts.unflatten(1, windows.grid_size()).unflatten(3, (height, width)).transpose(2, 3)
        return parts.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].roll(shift, (1, 2))

    query, key, value = cut(leaves["qkv"], leaves.get("pad_qkv")).permute(3, 0, 1, 4, 2, 5).unbind(0)
    scores = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias
    if any(shift):
        # Swin's own way: numbers painted on the map.
        region = torch.zeros((1, *padded, 1), device=scores.device)
        slices = [
            [slice(0, -size), slice(-size, -by), slice(-by, None)] if by else [slice(None)]
            for size, by in zip(windows.window_size, shift, strict=True)
        ]
        for number, (down, across) in enumerate(itertools.product(*slices)):
            region[:, down, across] = number
        region = region.view(1, padded[0] // height, height, padded[1] // width, width).transpose(2, 3)
        region = region.reshape(1, windows.count(), 1, -1)
        differ = region[..., :, None] != region[..., None, :]
        scores = scores - 100.0 * differ.to(scores.dtype)
    attended = scores.softmax(dim=-1)
    with torch.no_grad():
        mean = attended.mean(dim=2).to(inputs["share"].dtype)
        share = mean @ cut(inputs["share"]) / (mean @ cut(torch.ones_like(inputs["share"][..., :1])))
        share = join(share)
        if inputs["residual"] is not None:
            share = (share + inputs["residual"]) / 2
    return join((attended @ value).transpose(2, 3)), share


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

    Raises:
        ValueError: If there is dropout and the device is not the CPU.
    """
    rounded = make_inputs(case, "cpu", dtype, seed)
    # The oracle starts from the rounded inputs: what is measured is the error of the computation alone.
    exact = cast_inputs(rounded, torch.float64)
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in rounded.items()}
    if case.dropout_p > 0 and torch.device(device).type != "cpu":
        raise ValueError(f"device: the reference repeats the dropout of the CPU's generator only, got {device}")
    oracle = run_operator(case, exact, "reference", seed)
    given = run_operator(case, moved, backend, seed)
    # Dropout of plain PyTorch draws other numbers; its rounding errors without dropout are as large.
    plain_exact = run_plain(case, exact)
    plain = run_plain(case, moved)

    def largest(tensor: Tensor) -> float:
        return float(tensor.double().cpu().abs().max())

    # A gradient may cancel to nothing (that of the query where there is one key): what was rounded is not small.
    largest_gradient = max(largest(tensor) for name, tensor in oracle.items() if name.startswith("gradient"))

    # Where the bias is large, so is the rounding of the scores themselves, in float32, whoever forms them.
    rounding = ROUNDING[dtype] + (2.0**-23 * case.bias_scale if dtype != torch.float64 else 0.0)

    def bound(name: str) -> float:
        scale = largest_gradient if name.startswith("gradient") else largest(oracle[name])
        return 2 * largest(plain[name].double().cpu() - plain_exact[name]) + rounding * scale

    return [
        Check(case, dtype, name, largest(given[name].double().cpu() - oracle[name]), bound(name)) for name in oracle
    ]


def selftest(
    device: torch.device | str,
) -> Iterator[tuple[str, Case, torch.dtype, list[Check] | list[str] | Exception]]:
    """Runs all cases in all precisions on every backend that can do them.

    Args:
        device: Device to test.

    Yields:
        Backend, case, precision, and its checks, or the reasons why the backend can't do it, or what it raised.
    """
    on_cpu = torch.device(device).type == "cpu"
    for backend in BACKENDS:
        for case in CASES:
            if case.dropout_p > 0 and not on_cpu:
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                try:
                    results = reasons_against(case, dtype, backend, device) or compare(case, dtype, backend, device)
                except Exception as error:  # a kernel that does not compile, or start: others are to be tried too
                    results = error
                yield backend, case, dtype, results


def reasons_against(case: Case, dtype: torch.dtype, backend: str, device: torch.device | str) -> list[str]:
    """Why a backend can't run a case with its gradients; empty if it can."""
    inputs = make_inputs(case, device, dtype)
    inputs.pop("grad_output")
    if case.windows is None:
        inputs["query"].requires_grad_()
        return explain(**inputs, dropout_p=case.dropout_p, backend=backend).reasons[backend]
    inputs["qkv"].requires_grad_()
    *_, problem = window_problem(
        **inputs, window_size=case.windows.window_size, shift=case.windows.shift, scale=None, dropout_p=case.dropout_p
    )
    return explain_choice(problem, backend).reasons[backend]


def _leaves(inputs: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], Tensor | None]:
    """What gradients are wanted of, and the bias, of which one is too."""
    names = ("query", "key", "value", "qkv", "pad_qkv")
    leaves = {name: inputs[name].detach().requires_grad_() for name in names if inputs.get(name) is not None}
    return leaves, None if inputs["bias"] is None else inputs["bias"].detach().requires_grad_()


def _with_gradients(
    output: Tensor, share: Tensor, leaves: dict[str, Tensor], bias: Tensor | None, grad_output: Tensor
) -> dict[str, Tensor]:
    wanted = leaves if bias is None else {**leaves, "bias": bias}
    gradients = zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad_output), strict=True)
    named = {f"gradient of {name}": gradient for name, gradient in gradients}
    return {"output": output.detach(), "share": share.detach(), **named}
