"""The operator and what people would use in its place, behind one interface, each checked before it is timed.

Self-attention starts from the packed projection and ends at its gradient, as in timm's models; the peers take views of
it. Within windows of a map the peers also do what a Swin block does around its projection, for which ours has no need:
they roll and cut the map, and put it together again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import tlalign_kernels as tlk
from benchmarks.report import WRONG
from tlalign_kernels.backends import AUTO_ORDER, explain_choice
from tlalign_kernels.functional import window_problem
from tlalign_kernels.selftest import ROUNDING
from tlalign_kernels.windows import Windows

EAGER = "eager"  # by whose error the others are judged
WITHOUT = ", no labels"  # how the names of ours end without them
MASKED = -100.0  # what timm's Swin adds to scores across the border of a shifted map


@dataclass(frozen=True)
class Problem:
    """A call. `is_compiled`: also race what has to be compiled first, which takes seconds to a minute."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    windows: Windows | None = None  # then these give the numbers of queries and keys, and there is a bias
    sources: int = 1
    classes: int = 1000
    is_compiled: bool = False

    def __str__(self) -> str:
        sizes = f"N={self.queries}" if self.queries == self.keys else f"Nq={self.queries}, Nk={self.keys}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: B={self.batch}, H={self.heads}, {sizes}, D={self.head_dim}, {dtype}"


Run = Callable[[], dict[str, Tensor]]  # returns results by name


class Peer(NamedTuple):
    """Something to race, and the reason, if there is one, why it can't be run here."""

    run: Run | None
    reason: str = ""


def in_windows(name: str, batch: int, side: int, heads: int, shift: int, dtype: torch.dtype) -> Problem:
    """A problem of 7 x 7 windows of a map, D=32, as in Swin."""
    windows = Windows((side, side), (7, 7), (shift, shift))
    return Problem(name, batch, heads, 49, 49, 32, dtype, windows)


class Inputs:
    """Random inputs of a problem in its dtype; with `dtype` the same, rounded to the problem's, in another.

    Attributes:
        qkv: (B, N, 3, H, D), or (B, Ht, Wt, 3, H, D) of a map; None where queries and keys differ.
        query: (B, Nq, H, D) there, and `key_value` (B, Nk, 2, H, D).
        bias: (H, N, N) in windows.
        share: float32 (B, Nk, S); `residual` that of the queries. (B, Ht, Wt, S) of a map.
        labels: float32 (B, Nk, C), the same as a distribution over classes; `label_residual` that of the queries.
        grad_output: Gradient of the output, (B, Nq, H, D) or (B, Ht, Wt, H, D).
    """

    def __init__(self, problem: Problem, device: str, backward: bool, dtype: torch.dtype | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = problem.dtype if dtype is None else dtype
        share_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*sizes: int) -> Tensor:
            drawn = torch.randn(sizes, generator=generator).to(problem.dtype).to(device, dtype)
            return drawn.requires_grad_(backward)

        heads, windows = (problem.heads, problem.head_dim), problem.windows
        queries = (problem.batch, *((problem.queries,) if windows is None else windows.map_size))
        self.qkv = self.query = self.key_value = self.bias = None
        if problem.queries == problem.keys:
            self.qkv = draw(*queries, 3, *heads)
        else:
            self.query, self.key_value = draw(*queries, *heads), draw(problem.batch, problem.keys, 2, *heads)
        if windows is not None:
            self.bias = draw(problem.heads, windows.tokens(), windows.tokens())
            self.windows, sizes = windows, (*queries, problem.heads * problem.head_dim)
            self.features = torch.zeros(sizes, dtype=dtype, device=device, requires_grad=backward)
        self.grad_output = draw(*queries, *heads).detach()
        classes = torch.randint(problem.classes, (problem.batch, problem.sources + 1), generator=generator).to(device)

        def draw_labels(tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            sizes = (problem.batch, *tokens, problem.sources)
            share = (torch.rand(sizes, generator=generator) / problem.sources).to(device, share_dtype)
            weights = torch.cat((1 - share.sum(dim=-1, keepdim=True), share), dim=-1)
            dense = share.new_zeros((*weights.shape[:-1], problem.classes))
            index = classes.view(problem.batch, *(1 for _ in tokens), -1).expand_as(weights)
            return share, dense.scatter_add_(-1, index, weights)

        if self.qkv is not None:
            self.share, self.labels = self.residual, self.label_residual = draw_labels(queries[1:])
        else:
            self.share, self.labels = draw_labels((problem.keys,))
            self.residual, self.label_residual = draw_labels((problem.queries,))

    def cut_features(self) -> Tensor:
        """What peers cut of a map beside the projection: (B * W, N, H * D) of zeros."""
        return cut(self.features, self.windows)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are wanted of."""
        named = {"qkv": self.qkv, "query": self.query, "key_value": self.key_value, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, N, D); not of windows."""
        if self.qkv is not None:
            return self.qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.query.transpose(1, 2), *self.key_value.permute(2, 0, 3, 1, 4).unbind(0)


def peers(problem: Problem, device: str, backward: bool) -> dict[str, Peer]:
    """All that can do a problem or a part of it, ours first, by the name that reports have."""
    inputs = Inputs(problem, device, backward)
    found = {}
    for backend in AUTO_ORDER[device]:
        if backend == "reference":
            continue
        reason = "; ".join(_reasons_against(inputs, problem, backend))
        for labels in (True, False):
            name = f"ours ({backend})" + ("" if labels else WITHOUT)
            found[name] = Peer(_ours(inputs, problem, backend, labels), reason)
    return found | (_of_tokens(inputs, problem) if problem.windows is None else _of_windows(inputs, problem))


def contenders(
    problem: Problem, device: str, backward: bool, names: Collection[str] | None = None
) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers (of these names) that run here and are right, and of the others the reasons why they are left out."""
    if problem.is_compiled:
        torch.compiler.reset()  # there is a limit to the shapes that a function is compiled for
    exact = _exact(problem, device, backward)
    candidates = peers(problem, device, backward)
    bounds = error_bounds(candidates[EAGER].run(), exact, problem.dtype)
    runs, left_out = {}, {}
    for name, peer in candidates.items():
        if names is not None and not name.startswith("ours") and name not in names:
            continue
        # A backend that can't carry labels is of no interest without them.
        reason = left_out.get(name.removesuffix(WITHOUT)) or peer.reason or why_not(peer.run, exact, bounds)
        if reason:
            left_out[name] = reason
        else:
            runs[name] = peer.run
    return runs, left_out


def require_ours(runs: dict[str, Run], left_out: dict[str, str]) -> None:
    """Skips the benchmark where none of ours can run, and fails where none is right."""
    if next(iter(runs)).startswith("ours"):
        return
    reasons = {name: reason for name, reason in left_out.items() if name.startswith("ours")}
    assert not any(reason.startswith(WRONG) for reason in reasons.values()), reasons
    pytest.skip(str(reasons))


def why_not(run: Run, exact: dict[str, Tensor], bounds: dict[str, float]) -> str:
    """Runs a peer once; empty if it runs and its results are within the bounds of the float64 reference."""
    try:
        results = run()
    except Exception as error:  # whatever a library or a compiler raises: a row without that peer is still a row
        return f"fails: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return what_is_wrong(results, exact, bounds)


def error_bounds(eager: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """What each result may be off by: twice the error of eager PyTorch in the same dtype, and a rounding.

    An error of eager of more than 5 % of the largest value excuses no other, nor itself.
    """
    bounds = {}
    for name, wanted in exact.items():
        error = largest(eager[name].double() - wanted) if name in eager else 0.0
        bounds[name] = min(2 * error, 0.05 * largest(wanted)) + ROUNDING[dtype] * largest(wanted)
    return bounds


def what_is_wrong(results: dict[str, Tensor], exact: dict[str, Tensor], bounds: dict[str, float]) -> str:
    """Empty if all results are within the bounds of the float64 reference."""
    for name, result in results.items():
        error = largest(result.double() - exact[name])
        if not error <= bounds[name]:
            return f"wrong: its {name} is off by {error:.2g}, more than {bounds[name]:.2g}"
    return ""


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


def _exact(problem: Problem, device: str, backward: bool) -> dict[str, Tensor]:
    """Results of the reference in float64, from inputs that were rounded to the dtype of the problem."""
    inputs = Inputs(problem, device, backward, torch.float64)
    exact = _ours(inputs, problem, "reference", labels=True)()
    with torch.no_grad():
        exact["labels"] = _ours(inputs, problem, "reference", labels=True, dense=True, gradients=False)()["share"]
    if problem.windows is not None:
        exact |= {"cut_features": inputs.cut_features(), "gradient of features": torch.zeros_like(inputs.features)}
        if backward:
            exact["gradient of cut_qkv"] = cut(exact["gradient of qkv"], problem.windows)
    return exact


def _with_gradients(attend: Run, leaves: dict[str, Tensor], gradients: dict[str, Tensor]) -> Run:
    """Adds the gradients of the leaves to the results, where they are wanted, from those of some results."""
    if not next(iter(leaves.values())).requires_grad:
        return attend

    def run() -> dict[str, Tensor]:
        results = attend()
        outputs = [results[name] for name in gradients]
        found = torch.autograd.grad(outputs, list(leaves.values()), list(gradients.values()))
        return results | {f"gradient of {name}": of for name, of in zip(leaves, found, strict=True)}

    return run


def _reasons_against(inputs: Inputs, problem: Problem, backend: str) -> list[str]:
    if problem.windows is None:
        query, key, value = inputs.views()
        return tlk.explain(query, key, value, inputs.share, inputs.residual, backend=backend).reasons[backend]
    *_, asked = window_problem(
        inputs.qkv, inputs.share, inputs.share, problem.windows.window_size, problem.windows.shift, inputs.bias, None,
        None, 0.0,
    )  # fmt: skip
    return explain_choice(asked, backend).reasons[backend]


def _ours(
    inputs: Inputs, problem: Problem, backend: str, labels: bool, dense: bool = False, gradients: bool = True
) -> Run:
    carried = (inputs.labels, inputs.label_residual) if dense else (inputs.share, inputs.residual)
    carried = carried if labels else ()

    def attend() -> dict[str, Tensor]:
        if problem.windows is not None:
            output, share = tlk.window_attention(
                inputs.qkv, *carried, window_size=problem.windows.window_size, shift=problem.windows.shift,
                bias=inputs.bias, backend=backend,
            )  # fmt: skip
        elif inputs.qkv is not None:
            output, share = tlk.attention_qkv(inputs.qkv, *carried, backend=backend)
        else:
            output, share = tlk.attention(*inputs.views(), *carried, backend=backend)
            output = output.transpose(1, 2)
        return {"output": output} if share is None else {"output": output, "share": share}

    return _with_gradients(attend, inputs.leaves, {"output": inputs.grad_output}) if gradients else attend


def _eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    attention = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    return (attention @ value).transpose(1, 2), attention


def _materialised(query: Tensor, key: Tensor, value: Tensor, labels: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """What the official code does with labels (B, Nk, C), or with shares; their product as under its autocast."""
    output, attention = _eager(query, key, value)
    return output, (attention.detach().mean(dim=1) @ labels.to(attention.dtype) + residual) / 2


def _with_column(attend: Callable[..., Tensor], inputs: Inputs, padded: int, as_wide: bool) -> Run:
    """Attention of any kind with the share as columns of V, averaged over the heads.

    Columns are filled up with zeros to a multiple of `padded`; query and key too if they have to be `as_wide`.
    """

    def run() -> dict[str, Tensor]:
        query, key, value = inputs.views()
        heads, head_dim, sources = query.shape[1], query.shape[3], inputs.share.shape[-1]
        columns = inputs.share.to(value.dtype)[:, None].expand(-1, heads, -1, -1)
        more = -(-sources // padded) * padded
        columns = F.pad(columns, (0, more - sources))
        if as_wide:
            query, key = F.pad(query, (0, more)), F.pad(key, (0, more))
        output = attend(query, key, torch.cat((value, columns), dim=-1), scale=head_dim**-0.5)
        of_heads = output[..., head_dim : head_dim + sources].detach()
        share = (of_heads.to(inputs.residual.dtype).mean(dim=1) + inputs.residual) / 2
        return {"output": output[..., :head_dim].transpose(1, 2), "share": share}

    return run


def _of_tokens(inputs: Inputs, problem: Problem) -> dict[str, Peer]:
    """Peers on (B, H, N, D)."""
    on_cpu, backward = inputs.share.device.type == "cpu", next(iter(inputs.leaves.values())).requires_grad
    not_compiled = "" if problem.is_compiled else "not compiled for this row"

    def peer(attend: Run, reason: str = "") -> Peer:
        return Peer(_with_gradients(attend, inputs.leaves, {"output": inputs.grad_output}), reason)

    def output_of(attend: Callable[..., Tensor]) -> Run:
        return lambda: {"output": attend(*inputs.views()).transpose(1, 2)}

    def labels_of(name: str, attend: Callable[..., tuple[Tensor, Tensor]]) -> Run:
        labels = (inputs.share, inputs.residual) if name == "share" else (inputs.labels, inputs.label_residual)
        return lambda: dict(zip(("output", name), attend(*inputs.views(), *labels), strict=True))

    # PyTorch's fused kernels take heads of one size: any on the CPU, multiples of 8 on a GPU.
    padded = 1 if on_cpu else 8
    no_flex = not_compiled or ("has no backward on the CPU" if on_cpu and backward else "")
    # Of other shapes each time, they would be compiled for any, and be slower.
    flex, compiled = (torch.compile(function, dynamic=False) for function in (flex_attention, _materialised))
    return {
        "SDPA": peer(output_of(F.scaled_dot_product_attention)),
        EAGER: peer(lambda: {"output": _eager(*inputs.views())[0]}),
        "SDPA + column": peer(_with_column(F.scaled_dot_product_attention, inputs, padded, as_wide=True)),
        "materialised, share": peer(labels_of("share", _materialised)),
        "materialised, classes": peer(labels_of("labels", _materialised)),
        "compiled, share": peer(labels_of("share", compiled), not_compiled),
        "compiled, classes": peer(labels_of("labels", compiled), not_compiled),
        "FlexAttention": peer(output_of(flex), no_flex),
        "FlexAttention + column": peer(_with_column(flex, inputs, padded, as_wide=False), no_flex),
        "FlashAttention": peer(*_flash_attention(inputs)),
    }


def _flash_attention(inputs: Inputs) -> tuple[Run | None, str]:
    if importlib.util.find_spec("flash_attn") is None:
        return None, "not installed"
    if inputs.share.device.type != "cuda" or inputs.grad_output.dtype == torch.float32:
        return None, "16 bits on a GPU only"
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    if inputs.qkv is not None:
        return lambda: {"output": flash_attn_qkvpacked_func(inputs.qkv)}, ""
    return lambda: {"output": flash_attn_func(inputs.query, *inputs.key_value.unbind(2))}, ""


def cut(of_map: Tensor, windows: Windows) -> Tensor:
    """Cuts a map (B, Ht, Wt, ...), rolled by the shift, into windows (B * W, N, channels), as timm does."""
    (height, width), (rows, columns) = windows.grid_size(), windows.window_size
    of_map = of_map.flatten(3)
    if any(windows.shift):
        of_map = of_map.roll((-windows.shift[0], -windows.shift[1]), (1, 2))
    parts = of_map.view(len(of_map), height, rows, width, columns, -1).transpose(2, 3)
    return parts.reshape(-1, windows.tokens(), of_map.shape[-1])


def join(parts: Tensor, windows: Windows) -> Tensor:
    """The way back, to (B, Ht, Wt, channels)."""
    joined = parts.view(-1, *windows.grid_size(), *windows.window_size, parts.shape[-1]).transpose(2, 3)
    joined = joined.reshape(-1, *windows.map_size, parts.shape[-1])
    return joined.roll(windows.shift, (1, 2)) if any(windows.shift) else joined


def _of_windows(inputs: Inputs, problem: Problem) -> dict[str, Peer]:
    """Peers on windows that are cut out of a map first, which is joined afterwards.

    A Swin block cuts the map before the projection, which is wider: the peers start from a cut projection, and cut
    features beside it.
    """
    windows, heads, head_dim, labels = problem.windows, problem.heads, problem.head_dim, inputs.labels
    scale, padded = head_dim**-0.5, 1 if inputs.share.device.type == "cpu" else 8
    cut_qkv = cut(inputs.qkv.detach(), windows).requires_grad_(inputs.qkv.requires_grad)
    mask = None
    if any(windows.shift):
        regions = windows.regions().to(inputs.qkv.device)
        mask = MASKED * (regions[:, None, :, None] != regions[:, None, None, :]).to(inputs.qkv.dtype)

    def attn_mask() -> Tensor:
        """(1 or B * W, H, N, N)."""
        return inputs.bias[None] if mask is None else (inputs.bias[None] + mask).repeat(problem.batch, 1, 1, 1)

    def fused(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(query, key, value, attn_mask()),)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scores = query * scale @ key.transpose(-2, -1) + inputs.bias
        if mask is not None:
            scores = (scores.unflatten(0, (problem.batch, -1)) + mask).flatten(0, 1)
        attention = scores.softmax(dim=-1)
        return attention @ value, attention

    def with_column(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        share = cut(inputs.share, windows)[:, None].expand(-1, heads, -1, -1).to(value.dtype)
        query, key = F.pad(query, (0, padded)), F.pad(key, (0, padded))
        value = torch.cat((value, F.pad(share, (0, padded - 1))), dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask(), scale=scale)
        share = mixed[..., head_dim : head_dim + 1].detach().to(inputs.share.dtype).mean(dim=1)
        return mixed[..., :head_dim], (join(share, windows) + inputs.share) / 2

    def materialised(labels: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            output, attention = eager(query, key, value)
            mixed = attention.detach().mean(dim=1) @ cut(labels, windows).to(attention.dtype)
            return output, (join(mixed, windows) + labels) / 2

        return attend

    def peer(attend: Callable[..., tuple[Tensor, ...]], label: str | None = None) -> Peer:
        def run() -> dict[str, Tensor]:
            cut_features = inputs.cut_features()
            query, key, value = cut_qkv.view(-1, windows.tokens(), 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            output, *mixed = attend(query, key, value)
            output = join(output.transpose(1, 2).reshape(-1, windows.tokens(), heads * head_dim), windows)
            results = {"output": output.unflatten(-1, (heads, -1)), "cut_features": cut_features}
            return results | ({} if label is None else {label: mixed[0]})

        leaves = {"cut_qkv": cut_qkv, "bias": inputs.bias, "features": inputs.features}
        gradients = {"output": inputs.grad_output, "cut_features": torch.zeros_like(inputs.cut_features())}
        return Peer(_with_gradients(run, leaves, gradients))

    return {
        "SDPA": peer(fused),
        EAGER: peer(lambda *of_heads: eager(*of_heads)[:1]),
        "SDPA + column": peer(with_column, "share"),
        "materialised, share": peer(materialised(inputs.share), "share"),
        "materialised, classes": peer(materialised(labels), "labels"),
    }
