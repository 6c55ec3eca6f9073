"""The CPU kernels beyond what all backends are tested for: instruction sets, threads, forks, large and odd shapes."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import check_heads_may_be_permuted, check_labels_never_influence_others

import tlalign_kernels as tlk
from tlalign_kernels import extension, ops
from tlalign_kernels.backends import cpu
from tlalign_kernels.selftest import CASES, Case, compare, make_inputs, run_operator
from tlalign_kernels.windows import Windows

if not hasattr(extension.compiled, "cpu_attention_forward"):
    pytest.skip("built without CPU kernels", allow_module_level=True)


def usable(isa):
    with mock.patch.dict(os.environ, TLALIGN_CPU_ISA=isa):
        try:
            return cpu.instruction_set() == isa
        except ValueError:
            return False


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
isas = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.skipif(not usable(isa), reason="not built, or the processor lacks it"))
        for isa in ("avx512bf16", "avx512", "avx2", "portable")
    ],
)


@st.composite
def large_cases(draw):
    """Shapes beyond one block of keys, of queries, of a vector; scores up to 1e4."""
    packed = draw(st.booleans())
    queries = draw(st.integers(1, 600))
    return Case(
        "random",
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        queries=queries,
        keys=queries if packed else draw(st.integers(1, 600)),
        head_dim=draw(st.integers(8, 256)),
        sources=draw(st.sampled_from([1, 2, 8, 9, 70])),
        packed=packed,
        residual=draw(st.booleans()),
        bias_scale=draw(st.sampled_from([0.0, 1.0, 1e4])),
        mask=draw(st.sampled_from([None, "causal", "rows", "additive"])),
    )


@given(case=large_cases(), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_errors_are_within_the_bound_at_large_shapes(case, seed, dtype):
    assert [check for check in compare(case, dtype, "cpu", seed=seed) if not check.passed] == []


@given(case=large_cases(), seed=st.integers(0, 2**31))
def test_permuting_heads_leaves_labels_alone_at_large_shapes(case, seed):
    check_heads_may_be_permuted(case, "cpu", seed)


@given(case=large_cases(), seed=st.integers(0, 2**31), sources=st.sampled_from([1, 2, 8, 9, 70]))
def test_labels_never_influence_outputs_or_gradients_at_large_shapes(case, seed, sources):
    check_labels_never_influence_others(case, "cpu", seed, sources)


@st.composite
def large_windows(draw):
    """Windows beyond a block of keys, and small ones; padding, shifts and dropout.

    Not a few tokens among hundreds of padding alone: keys that are all alike are rounded alike, and errors add up. Nor
    padding and scores up to 1e4, where what a query pays to tokens may be less than the smallest number.
    """
    window = draw(st.sampled_from([(9, 1), (2, 9), (7, 7), (8, 8), (12, 12), (16, 17), (20, 20), (24, 24)]))
    windows = Windows(
        tuple(draw(st.integers(size // 2 + 1, 30)) for size in window),
        window,
        tuple(draw(st.integers(0, size - 1)) for size in window),
    )
    return Case(
        "random",
        batch=1,
        heads=draw(st.integers(1, 2)),
        head_dim=draw(st.integers(8, 80)),
        sources=draw(st.sampled_from([1, 2, 8, 9, 70])),
        residual=draw(st.booleans()),
        bias_scale=draw(st.sampled_from([0.0, 1.0] if windows.is_padded() else [0.0, 1.0, 1e4])),
        dropout_p=draw(st.sampled_from([0.0, 0.3])),
        windows=windows,
    )


@settings(max_examples=15)
@given(case=large_windows(), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_errors_are_within_the_bound_in_large_windows(case, seed, dtype):
    assert [check for check in compare(case, dtype, "cpu", seed=seed) if not check.passed] == []


def test_offsets_of_any_strides_beyond_a_block_of_keys():
    inputs = make_inputs(Case("strides", batch=1, queries=5, keys=300, head_dim=8), "cpu", torch.float32)
    del inputs["grad_output"]
    for offsets in (torch.randn(5, 1), torch.randn(3, 300, 5).transpose(1, 2), torch.randn(3, 5, 600)[..., ::2]):
        for name in ("bias", "mask"):
            ours, expected = (
                tlk.attention(**{**inputs, name: each}, backend="cpu")
                for each in (offsets, offsets.expand(3, 5, 300).contiguous())
            )
            for result, wanted in zip(ours, expected, strict=True):
                torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 60])
def test_results_that_are_too_large_for_the_caches_are_those_of_few_images(head_dim):
    case = Case("large", batch=24, heads=6, queries=240, keys=240, head_dim=head_dim, packed=True)
    inputs = make_inputs(case, "cpu", torch.float32)
    last = {name: tensor if tensor is None else tensor[-2:] for name, tensor in inputs.items()}
    of_all = run_operator(case, inputs, "cpu")
    for name, tensor in run_operator(case, last, "cpu").items():
        assert torch.equal(of_all[name][-2:], tensor), name


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_is_no_number_comes_out_where_the_definition_has_it(which):
    inputs = make_inputs(Case("nan", batch=2, queries=9, keys=9), "cpu", torch.float32)
    tensors = {name: inputs[name] for name in ("query", "key", "value")}
    tensors[which][0, 1, 3, 5] = float("nan")
    output, _ = tlk.attention(**tensors, backend="cpu")
    # Not by PyTorch's own attention, which loses them on processors with AVX-512.
    expected = (tensors["query"] @ tensors["key"].transpose(-2, -1)).softmax(dim=-1) @ tensors["value"]
    assert expected.isnan().any()
    assert torch.equal(output.isnan(), expected.isnan())


# Instruction sets


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_instruction_set_is_within_the_bound(monkeypatch, isa, dtype, case):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    assert [check for check in compare(case, dtype, "cpu") if not check.passed] == []


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [40, 700])  # in a block and in several
@pytest.mark.parametrize("size", [30, 300, 3e4, 1e5])
def test_weights_sum_to_one_however_large_the_scores(monkeypatch, isa, dtype, keys, size):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    query, key, value = torch.randn(3, 1, 2, keys, 64, generator=torch.Generator().manual_seed(0))
    leaves = [part.to(dtype).requires_grad_() for part in (query * size, key * size, value)]
    output, share = tlk.attention(*leaves, torch.ones(1, keys, 12), backend="cpu")
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-5)
    sums = gradients[2].float().sum(dim=2)  # over keys, of what queries gave them
    torch.testing.assert_close(sums, torch.full_like(sums, keys), rtol=1e-3, atol=0)


@isas
@pytest.mark.parametrize("queries", [1, 7, 16, 49, 196, 197, 198, 257, 577])
def test_each_instruction_set_at_odd_lengths(monkeypatch, isa, queries):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    case = Case("length", batch=1, heads=2, queries=queries, keys=queries, head_dim=24, packed=True)
    assert [check for check in compare(case, torch.float32, "cpu") if not check.passed] == []


@isas
@pytest.mark.parametrize("sources", [1, 3, 70])
@pytest.mark.parametrize("queries", [1, 2, 33, 34])
def test_each_instruction_set_at_a_few_queries_beyond_whole_vectors(monkeypatch, isa, queries, sources):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    case = Case(
        "few", batch=3, heads=2, queries=queries, keys=290, head_dim=20, sources=sources, bias_scale=1.0, mask="rows"
    )
    assert [check for check in compare(case, torch.float32, "cpu") if not check.passed] == []


@isas
def test_half_precision_rounds_as_torch_does(monkeypatch, isa):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    # One key: the output is the value, through float32 and back. All 2**16 words, NaNs, infinities and denormals too.
    words = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(1, 256, 1, 256)
    for dtype in (torch.bfloat16, torch.float16):
        value = words.view(dtype)
        if isa == "avx512bf16" and dtype == torch.bfloat16:
            # Its dot products take denormal numbers as 0.
            value = torch.where(value.abs() < torch.finfo(dtype).tiny, torch.zeros_like(value), value)
        zeros = torch.zeros_like(value)
        output, _ = tlk.attention(zeros, zeros, value, backend="cpu")
        assert torch.equal(output.isnan(), value.isnan())
        known = ~value.isnan()
        assert torch.equal(output[known], value[known])


@isas
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_to_nearest_and_ties_to_even(monkeypatch, isa, dtype):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    # Keys of equal weight and neighbouring numbers as values: their mean lies between, or nearer to one of them.
    words = torch.arange(0x3C00, 0x3C00 + 2048, dtype=torch.int32).view(8, 1, 1, 256)
    below, above = (some.to(torch.uint16).view(dtype) for some in (words, words + 1))
    query = torch.zeros(8, 1, 1, 256, dtype=dtype)
    for values in ((below, above), (-below, -above), (below, above, above, above), (below, below, below, above)):
        value = torch.cat(values, dim=2)
        output, _ = tlk.attention(query, torch.zeros_like(value), value, backend="cpu")
        assert torch.equal(output, value.double().mean(dim=2, keepdim=True).to(dtype))


@pytest.fixture
def flushing():
    """Denormal floats of this thread, of no other, count as 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor has no such mode")
    yield
    torch.set_flush_denormal(False)


@isas
def test_small_numbers_of_float16_are_no_denormal_floats(monkeypatch, flushing, isa):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    value = torch.arange(-0x3FF, 0x400).view(1, 1, 1, -1)[..., : 256 * 7].reshape(1, 7, 1, 256) * 2.0**-24
    zeros = torch.zeros_like(value).half()
    output, _ = tlk.attention(zeros, zeros, value.half(), backend="cpu")
    assert torch.equal(output.float() * 2.0**24, value * 2.0**24)


def test_threads_take_denormal_numbers_as_the_caller_does():
    query, key, value = torch.randn(3, 32, 4, 64, 64).unbind(0)
    value *= 1e-38
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        tlk.attention(query, key, value, backend="cpu")  # starts the threads, which begin as the caller is
        torch.set_flush_denormal(True)
        results = [tlk.attention(query, key, value, backend="cpu")[0] for _ in range(10)]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("TLALIGN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"TLALIGN_CPU_ISA: expected one of .*portable, got mmx"):
        tlk.attention(*torch.randn(3, 1, 1, 4, 8).unbind(0), backend="cpu")
    # Nor is another backend taken instead, or said to be.
    for function in (tlk.attention, tlk.explain):
        with pytest.raises(ValueError, match="got mmx"):
            function(*torch.randn(3, 1, 1, 4, 8).unbind(0))


# Threads


@pytest.mark.parametrize(
    "case",
    [
        Case("ViT", heads=3, packed=True),
        Case("windows", batch=70, queries=49, keys=49, head_dim=32, bias_scale=1.0, packed=True),
        Case("long", batch=1, heads=2, queries=700, keys=300, head_dim=16, sources=3),
        Case("dense", queries=150, keys=150, sources=40),
        Case("windows of a map", head_dim=16, bias_scale=1.0, windows=Windows((17, 30), (5, 7), (2, 3))),
        Case("padding without a bias", head_dim=40, sources=12, windows=Windows((30, 29), (4, 4), (0, 1))),
        Case("bias and mask", batch=40, heads=5, queries=33, keys=20, sources=3, bias_scale=1.0, mask="additive"),
        Case("many heads", batch=9, heads=24, head_dim=8, bias_scale=1.0, windows=Windows((7, 7), (7, 7), (0, 0))),
    ],
    ids=lambda case: case.name,
)
def test_any_number_of_threads_gives_the_same_bits(case):
    inputs = make_inputs(case, "cpu", torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run_operator(case, inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_python_threads_may_call_at_once():
    case = Case("threads", queries=100, keys=100, bias_scale=1.0)
    inputs = [make_inputs(case, "cpu", torch.float32, seed) for seed in range(4)]
    expected = [run_operator(case, each, "cpu") for each in inputs]
    results = [None] * 4

    def work(i):
        for _ in range(5):
            results[i] = run_operator(case, inputs[i], "cpu")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(result[name], wanted[name]) for name in wanted)


# Enough for several threads of ours, and in a child too little for those of torch, which would not come.
CHILD = """
import os, sys, torch, tlalign_kernels as tlk
torch.set_num_threads(2)
qkv, share = torch.randn(2, 128, 3, 3, 32), torch.rand(2, 128, 1)
torch.randn(256, 256) @ torch.randn(256, 256)
expected = tlk.attention_qkv(qkv, share, backend="cpu")[0]
"""


def run_python(script):
    return subprocess.run([sys.executable, "-c", CHILD + script], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_the_same_and_does_not_hang():
    done = run_python(
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(tlk.attention_qkv(qkv, share, backend='cpu')[0], expected) else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert done.returncode == 0, done.stderr


@needs_proc
@pytest.mark.parametrize("first", ["torch", "tlalign_kernels._C"])
def test_one_openmp_runtime_serves_torch_and_the_kernels(first):
    # Two in one process would each keep threads spinning against the other's.
    script = (
        "import re\n"
        "names = set(re.findall(r'lib[gi]?omp[0-9]*[^/ \\n]*[.]so[^ \\n]*', open('/proc/self/maps').read()))\n"
        "print(names)\n"
        "sys.exit(len(names) != 1)"
    )
    # The extension alone, without the package, which imports torch.
    path = extension.compiled.__file__
    load = f"import ctypes; ctypes.CDLL({path!r})\n" if first != "torch" else "import torch\n"
    done = subprocess.run([sys.executable, "-c", load + CHILD + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_proc
def test_few_tasks_leave_the_threads_of_torch_alive():
    done = run_python(
        "torch.set_num_threads(4)\n"
        "query, key, value = torch.randn(3, 3, 1, 100, 64).unbind(0)\n"
        "(torch.randn(1000, 1000) + 1).sum()\n"
        "tlk.attention(query, key, value, backend='cpu')\n"  # of each image one task
        "before = set(os.listdir('/proc/self/task'))\n"
        "(torch.randn(1000, 1000) + 1).sum()\n"
        "sys.exit(not set(os.listdir('/proc/self/task')) <= before)"
    )
    assert done.returncode == 0, done.stderr


@needs_proc
def test_little_work_wakes_no_threads():
    done = run_python(
        "torch.set_num_threads(4)\n"
        "before = os.listdir('/proc/self/task')\n"
        "for batch, starts in ((8, False), (512, True)):\n"
        "    tlk.attention(*torch.zeros(3, batch, 1, 8, 16).unbind(0), backend='cpu')\n"
        "    if (os.listdir('/proc/self/task') != before) != starts: sys.exit(f'{batch} images')"
    )
    assert done.returncode == 0, done.stderr


# Memory


def guarded(*shape, dtype=torch.float32):
    """A contiguous tensor in the middle of a larger one, and a check that the rest of that was left alone."""
    size, margin = torch.Size(shape).numel(), 64
    whole = torch.full((size + 2 * margin,), 7.0, dtype=dtype)

    def check():
        assert (whole[:margin] == 7).all()
        assert (whole[-margin:] == 7).all()
        assert not (whole[margin:-margin] == 7).all()

    return whole[margin:-margin].view(shape), check


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1, 8), (33, 50, 20), (49, 49, 32), (300, 290, 9)])
def test_nothing_is_written_beyond_the_results(monkeypatch, isa, dtype, queries, keys, head_dim):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    case = Case("bounds", queries=queries, keys=keys, head_dim=head_dim, sources=3, bias_scale=1.0)
    inputs = make_inputs(case, "cpu", dtype)
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    bias = inputs["bias"][None]
    output, check_output = guarded(2, queries, 3, head_dim, dtype=dtype)
    share, check_share = guarded(2, queries, 3)
    log_sum_exp, check_log_sum_exp = guarded(2, 3, queries)
    told = ops.Inputs(query, key, value, bias, None, None, head_dim**-0.5, 0.0)
    cpu.forward(told, inputs["share"], inputs["residual"], output, share, log_sum_exp)
    gradients = [guarded(*tensor.transpose(1, 2).shape, dtype=dtype) for tensor in (query, key, value)]
    grad_bias, check_grad_bias = guarded(*bias.shape, dtype=dtype)
    views = [gradient.transpose(1, 2) for gradient, _ in gradients]
    grad_output = inputs["grad_output"].transpose(1, 2)
    cpu.backward(told, grad_output, output, log_sum_exp, *views, grad_bias)
    for check in (check_output, check_share, check_log_sum_exp, check_grad_bias, *(check for _, check in gradients)):
        check()


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("windows", "head_dim"),
    [
        (Windows((1, 1), (1, 1), (0, 0)), 8),
        (Windows((5, 9), (3, 4), (1, 2)), 20),
        (Windows((14, 14), (7, 7), (3, 3)), 32),
        (Windows((9, 8), (18, 17), (4, 0)), 16),
    ],
    ids=["token", "padded", "whole", "larger than the map"],
)
def test_nothing_is_written_beyond_the_results_of_windows(monkeypatch, isa, dtype, windows, head_dim):
    monkeypatch.setenv("TLALIGN_CPU_ISA", isa)
    case = Case("bounds", sources=3, head_dim=head_dim, bias_scale=1.0, windows=windows)
    inputs = make_inputs(case, "cpu", dtype)
    qkv, pad_qkv, bias, of_map = inputs["qkv"], inputs["pad_qkv"], inputs["bias"][None], (2, *windows.map_size)
    output, check_output = guarded(*of_map, 3, head_dim, dtype=dtype)
    share, check_share = guarded(*of_map, 3)
    log_sum_exp, check_log_sum_exp = guarded(2 * windows.count(), 3, windows.tokens())
    told = ops.WindowInputs(qkv, pad_qkv, bias, None, windows, head_dim**-0.5, 0.0)
    cpu.window_forward(told, inputs["share"], inputs["residual"], output, share, log_sum_exp)
    grad_qkv, check_grad_qkv = guarded(*qkv.shape, dtype=dtype)
    grad_pad_qkv, check_grad_pad_qkv = guarded(3, 3, head_dim, dtype=dtype) if windows.is_padded() else (None, bool)
    grad_bias, check_grad_bias = guarded(*bias.shape, dtype=dtype)
    cpu.window_backward(told, inputs["grad_output"], output, log_sum_exp, grad_qkv, grad_pad_qkv, grad_bias)
    for check in (check_output, check_share, check_log_sum_exp, check_grad_qkv, check_grad_pad_qkv, check_grad_bias):
        check()


def take_table(monkeypatch, tokens, map_tokens):
    tables = cpu._Tables(tokens, None, (len(tokens), map_tokens, tokens.data_ptr(), 0))
    monkeypatch.setattr(cpu, "_tables", lambda windows: tables)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1, 2, 9], "tokens: expected numbers from -1"),
        ([0, 1, 2, -2], "tokens: expected numbers from -1"),
        ([0, 1, 2, 2], "tokens: expected no token of the map twice"),
        ([0, 1, 2, -1], "padding: expected an address"),
    ],
)
def test_a_table_of_tokens_that_is_wrong_is_refused(monkeypatch, row, message):
    take_table(monkeypatch, torch.tensor([row, [4, 5, 6, 7]], dtype=torch.int32), 8)
    qkv, options = torch.randn(1, 4, 2, 3, 2, 8), dict(window_size=(2, 2), backend="cpu")
    with pytest.raises(ValueError, match=message):
        tlk.window_attention(qkv, **options)
    take_table(monkeypatch, torch.arange(8, dtype=torch.int32).view(2, 4), 8)
    tlk.window_attention(qkv, **options)


def test_a_table_that_leaves_a_token_out_is_refused(monkeypatch):
    tokens = torch.tensor([[0, 1], [2, -1], [-1, 4]], dtype=torch.int32)
    take_table(monkeypatch, tokens, 5)
    with pytest.raises(ValueError, match="tokens: expected every token of the map"):
        tlk.window_attention(torch.randn(1, 1, 5, 3, 2, 8), window_size=(1, 2), backend="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": (2, 4, 4, 1)}, "share: expected"),
        ({"pad_qkv": (3, 8, 3)}, "pad_qkv: expected"),
        ({"bias": (1, 2, 4, 4)}, "bias: expected"),
    ],
)
def test_the_operator_of_windows_refuses_shapes_that_disagree(changes, message):
    shapes = {"qkv": (2, 3, 4, 3, 3, 8), "pad_qkv": (3, 3, 8), "share": (2, 3, 4, 1), "residual": None, "bias": None}
    tensors = [None if shape is None else torch.rand(shape) for shape in {**shapes, **changes}.values()]
    with pytest.raises(ValueError, match=message):
        torch.ops.tlalign_kernels.window_attention(*tensors, None, (2, 2), (0, 0), 1.0, 0.0, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": (2, 3, 6, 9)}, "key: expected"),
        ({"value": (2, 3, 5, 8)}, "value: expected"),
        ({"share": (2, 5, 1)}, "share: expected"),
        ({"bias": (2, 2, 4, 6)}, "bias: expected"),
    ],
)
def test_the_operator_itself_refuses_shapes_that_disagree(changes, message):
    shapes = {"query": (2, 3, 4, 8), "key": (2, 3, 6, 8), "value": (2, 3, 6, 8), "share": (2, 6, 1)}
    shapes = {**shapes, "residual": None, "bias": None, **changes}
    tensors = [None if shape is None else torch.rand(shape) for shape in shapes.values()]
    with pytest.raises(ValueError, match=message):
        torch.ops.tlalign_kernels.attention(*tensors, None, None, 1.0, 0.0, "cpu")


def test_the_operator_itself_refuses_dtypes_that_disagree():
    query, key, value = torch.rand(3, 1, 2, 4, 8).unbind(0)
    with pytest.raises(ValueError, match=r"value: expected torch.float32 .*, got torch.float16"):
        torch.ops.tlalign_kernels.attention(query, key, value.half(), *[None] * 5, 1.0, 0.0, "cpu")


def test_scratch_does_not_grow_with_the_square_of_the_length():
    # A matrix of 16384 x 16384 scores would take 1 GiB; the limit is for scratch and results together.
    script = (
        "import resource\n"
        "tlk.attention_qkv(torch.randn(1, 512, 3, 1, 16), torch.rand(1, 512, 1), backend='cpu')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "qkv = torch.randn(1, 16384, 3, 1, 16, requires_grad=True)\n"
        "tlk.attention_qkv(qkv, torch.rand(1, 16384, 1), backend='cpu')[0].sum().backward()\n"
        "sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 100_000)"
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr
