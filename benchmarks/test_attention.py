"""Time of the operator on the CPU, labels on, beside PyTorch's own attention without labels.

`pytest benchmarks/test_attention.py --benchmark-only -s`. In each round ours and its peers run one after another, in
random order, so that a busy machine and what the one before left in the caches disturb all of them alike; ratios are
medians over rounds. Self-attention starts from the packed projection and ends at its gradient, as in timm's models: the
peers take views of it. Within windows of a map the peers also do what a Swin block does around its projection, for
which ours has no need: they roll and cut the map, and put it together again. Every peer's output is checked first.
"""

import random
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tlalign_kernels as tlk
from tlalign_kernels.windows import Windows

ROUNDS = 51
PRODUCT = 1024  # size of the matrix product that tells what the machine can do at the moment


@dataclass(frozen=True)
class Shape:
    """A problem; `bias` has a gradient."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    bias: bool = False

    def __str__(self):
        name = f"B={self.batch} H={self.heads} N={self.queries}"
        if self.keys != self.queries:
            name += f" Nk={self.keys}"
        return f"{name} D={self.head_dim} {str(self.dtype).removeprefix('torch.')}" + (" bias" if self.bias else "")


SHAPES = [
    Shape(8, 3, 197, 197, 64),
    Shape(8, 6, 197, 197, 64),
    Shape(8, 12, 197, 197, 64),
    Shape(512, 3, 49, 49, 32, bias=True),
    Shape(8, 6, 197, 197, 64, torch.bfloat16),
    Shape(1, 8, 3136, 49, 64),
    Shape(2, 3, 4096, 4096, 64),
]


@dataclass(frozen=True)
class Stage:
    """Windows of 7 x 7 at one stage of swin_tiny, batch 8, float32; the bias has a gradient."""

    size: int
    heads: int
    shift: int = 0

    def __str__(self):
        return f"{self.size}x{self.size} H={self.heads} D=32" + (" shifted" if self.shift else "")


STAGES = [
    Stage(56, 3),
    Stage(56, 3, 3),
    Stage(28, 6),
    Stage(28, 6, 3),
    Stage(14, 12),
    Stage(14, 12, 3),
    Stage(7, 24),
]


def eager(query, key, value, attn_mask):
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ value


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


needs_kernels = pytest.mark.skipif(bool(tlk.backends.cpu.unsupported_reasons(
    tlk.backends.Problem("cpu", torch.float32, 1, 1, 1, 1, 8, 1, torch.float32, False, False, 0.0, False)
)), reason="the CPU kernels are not built")  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark, shape, backward):
    torch.manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes).to(shape.dtype).requires_grad_(backward)

    heads = (shape.heads, shape.head_dim)
    packed = shape.queries == shape.keys
    query = key_value = qkv = bias = None
    if packed:
        qkv = draw(shape.batch, shape.queries, 3, *heads)
    else:
        query, key_value = draw(shape.batch, shape.queries, *heads), draw(shape.batch, shape.keys, 2, *heads)
    if shape.bias:
        bias = draw(shape.heads, shape.queries, shape.keys)
    share = torch.rand(shape.batch, shape.keys, 1)
    residual = torch.rand(shape.batch, shape.queries, 1)
    grad_output = torch.randn(shape.batch, shape.queries, *heads).to(shape.dtype)
    leaves = [tensor for tensor in (qkv, query, key_value, bias) if tensor is not None]

    def views():
        if packed:
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query.transpose(1, 2), *key_value.permute(2, 0, 3, 1, 4).unbind(0)

    def ours(*labels):
        if packed:
            return tlk.attention_qkv(qkv, *labels, bias=bias, backend="cpu")[0]
        return tlk.attention(*views(), *labels, bias=bias, backend="cpu")[0].transpose(1, 2)

    def run(attend):
        output = attend()
        return (output, *torch.autograd.grad(output, leaves, grad_output)) if backward else (output,)

    variants = {
        "ours": lambda: ours(share, residual),
        "ours without labels": ours,
        "SDPA": lambda: scaled_dot_product_attention(*views(), attn_mask=bias).transpose(1, 2),
        "eager": lambda: eager(*views(), bias).transpose(1, 2),
    }
    expected = run(variants["ours"])
    for attend in variants.values():
        assert_close(run(attend), expected, shape.dtype)

    work = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim * (3.5 if backward else 1)
    runs = {name: lambda attend=attend: run(attend) for name, attend in variants.items()}
    race(benchmark, f"{shape} {direction(backward)}", runs, work, ROUNDS if shape.queries < 4096 else 5)


@needs_kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_windows(benchmark, stage, backward):
    torch.manual_seed(0)
    batch, size, heads, head_dim, window, shift = 8, stage.size, stage.heads, 32, 7, stage.shift
    windows = Windows((size, size), (window, window), (shift, shift))
    tokens, grid = windows.tokens, windows.grid_size[0]

    def draw(*sizes):
        return torch.randn(sizes, requires_grad=backward)

    def cut(tensor):
        if shift:
            tensor = tensor.roll((-shift, -shift), (1, 2))
        parts = tensor.view(batch, grid, window, grid, window, -1).permute(0, 1, 3, 2, 4, 5)
        return parts.contiguous().view(-1, tokens, tensor[0, 0, 0].numel())

    def join(parts):
        joined = parts.view(batch, grid, grid, window, window, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
        joined = joined.view(batch, size, size, heads, head_dim)
        return joined.roll((shift, shift), (1, 2)) if shift else joined

    qkv, bias = draw(batch, size, size, 3, heads, head_dim), draw(heads, tokens, tokens)
    share = torch.rand(batch, size, size, 1)
    grad_output = torch.randn(batch, size, size, heads, head_dim)
    # The peers' map is cut before the projection, which is wider: that they start from, cut already.
    features, cut_qkv = draw(batch, size, size, heads * head_dim), cut(qkv.detach()).requires_grad_(backward)
    grad_cut_features = torch.randn(batch * windows.count, tokens, heads * head_dim)
    regions = windows.regions()
    mask = torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)

    def ours(*labels):
        output, _ = tlk.window_attention(
            qkv, *labels, window_size=(window, window), shift=(shift, shift), bias=bias, backend="cpu"
        )
        return (output, *torch.autograd.grad(output, (qkv, bias), grad_output)) if backward else (output,)

    def fused(query, key, value):
        attn_mask = bias[None]
        if shift:
            of_windows = mask.view(1, -1, 1, tokens, tokens).expand(batch, -1, heads, -1, -1)
            attn_mask = attn_mask + of_windows.reshape(-1, heads, tokens, tokens)
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)

    def materialised(query, key, value):
        scores = query * head_dim**-0.5 @ key.transpose(-2, -1) + bias
        if shift:
            scores = scores.view(batch, -1, heads, tokens, tokens) + mask[None, :, None]
        return scores.view(-1, heads, tokens, tokens).softmax(dim=-1) @ value

    def theirs(attend):
        cut_features = cut(features)
        query, key, value = cut_qkv.view(-1, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        output = join(attend(query, key, value).transpose(1, 2).reshape(-1, tokens, heads * head_dim))
        if not backward:
            return (output,)
        outputs, leaves = (output, cut_features), (cut_qkv, bias, features)
        grad_qkv, grad_bias, _ = torch.autograd.grad(outputs, leaves, (grad_output, grad_cut_features))
        return output, grad_qkv, grad_bias

    runs = {
        "ours": lambda: ours(share, share),
        "ours without labels": ours,
        "SDPA": lambda: theirs(fused),
        "eager": lambda: theirs(materialised),
    }
    expected = runs["ours"]()
    assert_close(runs["ours without labels"](), expected, torch.float32)
    in_windows = (expected[0], cut(expected[1]), expected[2]) if backward else expected
    for name in ("SDPA", "eager"):
        assert_close(runs[name](), in_windows, torch.float32)

    scores = batch * windows.count * heads * tokens * tokens
    work = 4 * scores * head_dim * (3.5 if backward else 1)
    race(benchmark, f"{stage} {direction(backward)}", runs, work, ROUNDS)


def direction(backward):
    return "forward + backward" if backward else "forward"


def assert_close(given, expected, dtype):
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for each, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(each, wanted, **tolerance)


def race(benchmark, title, runs, work, rounds):
    """Times ours and its peers, `work` in operations, and prints how they compare."""
    matrix = torch.randn(PRODUCT, PRODUCT)
    times = {name: [] for name in (*runs, "product")}
    order = random.Random(0)

    def run_all():
        for name in order.sample(list(times), len(times)):
            work = (lambda: matrix @ matrix) if name == "product" else runs[name]
            times[name].append(seconds(work))

    benchmark.pedantic(runs["ours"], setup=run_all, rounds=rounds, warmup_rounds=1)
    times = {name: values[-rounds:] for name, values in times.items()}
    own = times["ours"]

    def ratio(name):
        return statistics.median(theirs / mine for theirs, mine in zip(times[name], own, strict=True))

    rate = work / statistics.median(own) / 1e9
    product_rate = 2 * PRODUCT**3 / statistics.median(times["product"]) / 1e9
    peers = {name: ratio(name) for name in ("SDPA", "eager")}
    labels = 1 / ratio("ours without labels")
    benchmark.extra_info.update(
        speed_up=peers, labels=labels, gflops=rate, product_gflops=product_rate, threads=torch.get_num_threads()
    )
    print(
        f"\n{title}: "
        + ", ".join(f"{value:.2f}x faster than {name}" for name, value in peers.items())
        + f"; labels {100 * (labels - 1):+.1f} %; {rate:.0f} GFLOP/s, matrix product {product_rate:.0f}"
        + f"; {torch.get_num_threads()} threads"
    )
