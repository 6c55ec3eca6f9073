"""Time of the operator on the CPU, labels on, beside PyTorch's own attention without labels.

`pytest benchmarks/test_attention.py --benchmark-only -s`. In each round ours and its peers run one after another, in
random order, so that a busy machine and what the one before left in the caches disturb all of them alike; ratios are
medians over rounds. Self-attention starts from the packed projection and ends at its gradient, as in timm's models: the
peers take views of it. Every peer's output is checked first.
"""

import random
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tlalign_kernels as tlk

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


def eager(query, key, value, attn_mask):
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ value


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.skipif(bool(tlk.backends.cpu.unsupported_reasons(
    tlk.backends.Problem("cpu", torch.float32, 1, 1, 1, 1, 8, 1, torch.float32, False, False, 0.0, False)
)), reason="the CPU kernels are not built")  # fmt: skip
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
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if shape.dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for attend in variants.values():
        for given, wanted in zip(run(attend), expected, strict=True):
            torch.testing.assert_close(given, wanted, **tolerance)

    matrix = torch.randn(PRODUCT, PRODUCT)
    times = {name: [] for name in (*variants, "product")}
    order = random.Random(0)

    def run_all():
        for name in order.sample(list(times), len(times)):
            work = (lambda: matrix @ matrix) if name == "product" else (lambda name=name: run(variants[name]))
            times[name].append(seconds(work))

    rounds = ROUNDS if shape.queries < 4096 else 5
    benchmark.pedantic(lambda: run(variants["ours"]), setup=run_all, rounds=rounds, warmup_rounds=1)
    times = {name: values[-rounds:] for name, values in times.items()}
    own = times["ours"]

    def ratio(name):
        return statistics.median(theirs / mine for theirs, mine in zip(times[name], own, strict=True))

    work = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim * (3.5 if backward else 1)
    rate = work / statistics.median(own) / 1e9
    product_rate = 2 * PRODUCT**3 / statistics.median(times["product"]) / 1e9
    peers = {name: ratio(name) for name in ("SDPA", "eager")}
    labels = 1 / ratio("ours without labels")
    benchmark.extra_info.update(
        speed_up=peers, labels=labels, gflops=rate, product_gflops=product_rate, threads=torch.get_num_threads()
    )
    print(
        f"\n{shape} {'forward + backward' if backward else 'forward'}: "
        + ", ".join(f"{value:.2f}x faster than {name}" for name, value in peers.items())
        + f"; labels {100 * (labels - 1):+.1f} %; {rate:.0f} GFLOP/s, matrix product {product_rate:.0f}"
        + f"; {torch.get_num_threads()} threads"
    )
