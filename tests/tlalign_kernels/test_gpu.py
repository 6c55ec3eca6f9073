"""The kernels on a GPU: accuracy, and what only a GPU can show. Some of it runs under TRITON_INTERPRET=1 as well."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tlalign_kernels as tlk
from tlalign_kernels.backends import AUTO_ORDER, triton
from tlalign_kernels.selftest import CASES, Case, compare, make_inputs, run_operator

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and not triton._interpreted:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def unsupported(backend, dtype, case):
    query = torch.empty(case.batch, case.heads, case.queries, case.head_dim, device=DEVICE, dtype=dtype)
    key = query.new_empty(case.batch, case.heads, case.keys, case.head_dim)
    share = torch.empty(case.batch, case.keys, case.sources, device=DEVICE)
    return tlk.explain(query.requires_grad_(), key, key, share, backend=backend).reasons[backend]


def check(backend, dtype, case, seed):
    if reasons := unsupported(backend, dtype, case):
        pytest.skip("; ".join(reasons))
    assert [check for check in compare(case, dtype, backend, DEVICE, seed) if not check.passed] == []


backends = pytest.mark.parametrize(
    "backend",
    [
        name
        for name in AUTO_ORDER["cuda"]
        if name != "reference" and not unsupported(name, torch.float16, Case("any", head_dim=32))
    ],
)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@backends
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.dropout_p == 0], ids=lambda case: case.name)
def test_errors_are_within_the_bound(backend, dtype, case, seed):
    check(backend, dtype, case, seed)


@backends
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    tokens=st.integers(1, 300), heads=st.integers(1, 3), head_dim=st.sampled_from([16, 32, 64, 80, 96, 128, 256]),
    sources=st.integers(1, 9), packed=st.booleans(), bias=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_errors_are_within_the_bound_at_random_shapes(
    backend, dtype, tokens, heads, head_dim, sources, packed, bias, seed
):
    if dtype == torch.float32 and backend == "cuda":
        pytest.skip("dtype: the CUDA kernels have no float32")
    keys, mask = tokens if packed else 1 + tokens // 3, "rows" if bias else None
    case = Case("random", 1, heads, tokens, keys, head_dim, sources, packed, bias_scale=float(bias), mask=mask)
    assume(not unsupported(backend, dtype, case))
    check(backend, dtype, case, seed)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(49, 49), (70, 17)])
def test_heads_in_turn_are_within_the_bound(monkeypatch, dtype, queries, keys, seed):
    monkeypatch.setattr(triton, "MIN_PROGRAMS_OF_HEADS", 0)
    case = Case("heads", queries=queries, keys=keys, head_dim=32, sources=2, packed=queries == keys)
    check("triton", dtype, case, seed)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_give_the_same_bits(backend, dtype):
    case = Case("twice", queries=70, keys=70, head_dim=32, bias_scale=1.0, mask="causal", sources=3)
    if reasons := unsupported(backend, dtype, case):
        pytest.skip("; ".join(reasons))
    inputs = make_inputs(case, DEVICE, dtype)
    first, second = (run_operator(case, inputs, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@backends
def test_a_grid_beyond_65535(backend):
    images = 70_000 if ON_GPU else 3
    qkv = torch.randn(images, 4, 3, 2, 32, device=DEVICE, dtype=torch.float16)
    share = torch.rand(images, 4, 1, device=DEVICE)
    output, mixed = tlk.attention_qkv(qkv, share, share, backend=backend)
    for image in (0, images - 1):
        one = slice(image, image + 1)
        expected, expected_share = tlk.attention_qkv(qkv[one].double(), share[one], share[one], backend="reference")
        torch.testing.assert_close(output[one].double(), expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(mixed[one], expected_share.float(), atol=2e-3, rtol=0)


@backends
@needs_gpu
def test_more_elements_than_32_bits_count(backend):
    tokens, heads, head_dim = 64, 8, 64
    images = 2**31 // (tokens * 3 * heads * head_dim) + 2
    if torch.cuda.mem_get_info()[0] < 5 * images * tokens * 3 * heads * head_dim * 2:
        pytest.skip("needs 22 GB of GPU memory")
    qkv = torch.randn(images, tokens, 3, heads, head_dim, device=DEVICE, dtype=torch.float16, requires_grad=True)
    share = torch.rand(images, tokens, 1, device=DEVICE)
    output, mixed = tlk.attention_qkv(qkv, share, share, backend=backend)
    (gradient,) = torch.autograd.grad(output, qkv, torch.ones_like(output))
    last = qkv.detach()[-1:].double().requires_grad_()
    expected, expected_share = tlk.attention_qkv(last, share[-1:], share[-1:], backend="reference")
    (expected_gradient,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    torch.testing.assert_close(output[-1:].double(), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(mixed[-1:], expected_share.float(), atol=5e-3, rtol=0)
    torch.testing.assert_close(gradient[-1:].double(), expected_gradient, atol=5e-3, rtol=0)


@backends
@needs_gpu
def test_calls_are_captured_in_a_cuda_graph(backend):
    qkv = torch.randn(2, 50, 3, 2, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    share = torch.rand(2, 50, 1, device=DEVICE)

    def step():
        output, mixed = tlk.attention_qkv(qkv, share, share, backend=backend)
        return output.detach(), mixed, *torch.autograd.grad(output, qkv, torch.ones_like(output))

    # The first call on a side stream, as PyTorch's documentation of graphs has it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(tensor, known) for tensor, known in zip(captured, expected, strict=True))


@backends
@needs_gpu
def test_compiled_steps_take_the_same_kernels(backend):
    def step(qkv, share):
        output, mixed = tlk.attention_qkv(qkv * 2, share, share, backend=backend)
        return output.sin(), mixed

    qkv = torch.randn(2, 50, 3, 2, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    share = torch.rand(2, 50, 1, device=DEVICE)
    torch._dynamo.reset()
    compiled, eager = (function(qkv, share) for function in (torch.compile(step, fullgraph=True), step))
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(output.sum(), qkv)[0] for output, _ in (compiled, eager)]
    torch.testing.assert_close(*gradients)


@needs_gpu
def test_tune_times_every_configuration(monkeypatch):
    from tlalign_kernels.tuning import TUNED

    qkv = torch.randn(64, 50, 3, 2, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    share = torch.rand(64, 50, 1, device=DEVICE)
    monkeypatch.setattr(triton, "_preferred", {})
    try:
        (choice,) = tlk.tune(lambda: tlk.attention_qkv(qkv, share, share)[0].sum().backward())
    finally:
        TUNED.clear()
    assert choice.failures == {}
    assert len(choice.milliseconds) >= 5
    assert min(choice.milliseconds.values()) > 0
