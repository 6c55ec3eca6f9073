"""The CUDA kernels without a GPU: their code for sm_80, launched as a call would, executed by ptxvm."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tlalign_kernels as tlk
from tlalign_kernels import extension
from tlalign_kernels.backends import Problem, cuda
from tlalign_kernels.selftest import ROUNDING, Case, cast_inputs, make_inputs

# It brings along what disassembles.
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
import triton_offline

executed = pytest.mark.skipif(
    shutil.which("nvcc") is None or not triton_offline.PTXVM.exists(), reason="needs nvcc and ptxvm"
)
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


def run(case, inputs, backend, scale=None):
    options = dict(residual=inputs["residual"], bias=inputs["bias"], mask=inputs["mask"], scale=scale, backend=backend)
    tensors = [inputs[name] for name in ("query", "key", "value")]
    if not case.packed:
        return tlk.attention(*tensors, inputs["share"], **options)
    qkv = torch.stack(tensors).permute(1, 3, 0, 2, 4).contiguous()
    output, share = tlk.attention_qkv(qkv, inputs["share"], **options)
    return output.transpose(1, 2), share


def plain(inputs, scale):
    """Materialised attention in the precision of the inputs."""
    scores = inputs["query"] @ inputs["key"].transpose(-2, -1) * (scale or inputs["query"].shape[-1] ** -0.5)
    scores = scores if inputs["bias"] is None else scores + inputs["bias"]
    if inputs["mask"] is not None:
        is_bool = inputs["mask"].dtype == torch.bool
        scores = scores.masked_fill(~inputs["mask"], -torch.inf) if is_bool else scores + inputs["mask"]
    unseeing = (scores == -torch.inf).all(-1, keepdim=True)
    attended = scores.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)
    return attended.to(inputs["value"].dtype) @ inputs["value"]


def check(monkeypatch, case, dtype, scale=None, change=lambda inputs: None, note=lambda launch: None):
    import cuda_offline

    kernels = []

    def execute(launch, tensors):
        kernels.append(launch.kernel)
        note(launch)
        cuda_offline.execute(launch, tensors)

    rounded = cast_inputs(make_inputs(case, "cpu"), dtype)
    change(rounded)
    exact = cast_inputs(rounded, torch.float64)
    expected, expected_share = run(case, exact, "reference", scale)
    with monkeypatch.context() as patch:
        cuda_offline.record(patch, execute)
        output, share = run(case, rounded, "cuda", scale)
    error = (plain(rounded, scale).double() - expected).abs().max()
    bound = 2 * error + ROUNDING[dtype] * expected.abs().max()
    assert (output.double() - expected).abs().max() <= bound
    # Labels come from probabilities of 16 bits, divided by the sum of the same.
    assert share is None or (share.double() - expected_share).abs().max() <= ROUNDING[dtype]
    assert any("attention_forward" in kernel for kernel in kernels)


ONE = Case("one", batch=1, heads=1)


@executed
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("queries", "keys"), [(49, 49), (70, 130), (20, 300)])
def test_head_dims_are_within_the_bound(monkeypatch, dtype, head_dim, queries, keys):
    check(monkeypatch, replace(ONE, queries=queries, keys=keys, head_dim=head_dim), dtype)


@executed
@pytest.mark.parametrize(
    "tokens", [1, 15, 16, 17, 32, 33, 49, 64, 65, 128, 129, 192, 193, 196, 197, 198, 208, 209, 257, 577]
)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_lengths_are_within_the_bound(monkeypatch, tokens, head_dim):
    check(monkeypatch, replace(ONE, queries=tokens, keys=tokens, head_dim=head_dim, packed=True), BFLOAT16)


@executed
@pytest.mark.parametrize("keys", [50, 100, 300])
@pytest.mark.parametrize("sources", [1, 2, 3, 8])
@pytest.mark.parametrize("residual", [True, False])
def test_sources_are_within_the_bound(monkeypatch, keys, sources, residual):
    case = Case("sources", batch=2, heads=2, queries=20, keys=keys, head_dim=32, sources=sources, residual=residual)
    check(monkeypatch, case, FLOAT16)


@executed
@pytest.mark.parametrize("keys", [20, 40])
def test_blocks_take_heads_in_turn(monkeypatch, keys):
    # So many images that a block has two heads, but the last of an image one.
    launches = []
    check(monkeypatch, Case("turns", 820, 5, 20, keys, 32, sources=2), BFLOAT16, note=launches.append)
    assert [launch.grid[0] for launch in launches if "attention_forward" in launch.kernel] == [820 * 3]


@executed
@pytest.mark.parametrize("keys", [40, 130])
@pytest.mark.parametrize("mask", [None, "causal", "rows", "additive"])
@pytest.mark.parametrize("bias_scale", [0.0, 1.0])
@pytest.mark.parametrize("sources", [1, 3])
def test_bias_and_mask_are_within_the_bound(monkeypatch, keys, mask, bias_scale, sources):
    case = Case("offsets", 1, 2, 40, keys, 32, sources, bias_scale=bias_scale, mask=mask)
    check(monkeypatch, case, BFLOAT16)


@executed
def test_a_bias_and_mask_of_each_image_and_head(monkeypatch):
    def change(inputs):
        inputs["bias"] = torch.randn(2, 3, 20, 20)
        inputs["mask"] = torch.rand(2, 1, 20, 20) > 0.3

    check(monkeypatch, Case("each", 2, 3, 20, 20, 32), BFLOAT16, change=change)


@executed
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("keys", [40, 130])
def test_scales_of_any_sign(monkeypatch, scale, keys):
    check(monkeypatch, replace(ONE, queries=40, keys=keys, head_dim=32), FLOAT16, scale)


@executed
def test_extreme_scores(monkeypatch):
    # All scores of a query may be far below zero: keys that pad the last tile must not take part in the maximum.
    def change(inputs):
        inputs["key"] = inputs["query"][:, :, :1].expand(-1, -1, 20, -1) * -20.0

    check(monkeypatch, replace(ONE, queries=20, keys=20, head_dim=32), BFLOAT16, change=change)


@executed
def test_rows_that_begin_between_16_bytes_are_copied(monkeypatch):
    def change(inputs):
        inputs["query"] = torch.cat([inputs["query"], inputs["query"][..., :1]], -1)[..., 1:]

    check(monkeypatch, replace(ONE, queries=20, keys=20, head_dim=32), BFLOAT16, change=change)


@executed
def test_no_labels(monkeypatch):
    def change(inputs):
        inputs["share"] = inputs["residual"] = None

    check(monkeypatch, replace(ONE, queries=30, keys=50, head_dim=32), BFLOAT16, change=change)


needs_kernels = pytest.mark.skipif(
    not hasattr(extension.compiled, "cuda_attention_forward"), reason="built without CUDA kernels"
)


@needs_kernels
def test_what_is_not_supported_is_said():
    problem = Problem("cpu", torch.float32, 1, 1, 1, 1, 40, 9, torch.float32, False, False, 0.5, True)
    reasons = "; ".join(cuda.unsupported_reasons(problem))
    for word in ("device: expected cuda", "dtype", "head dimension", "at most 8 sources", "dropout", "no backward yet"):
        assert word in reasons


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sizes=(1, 1, 4, 4, 40, 0)), "D: expected a head dimension that the CUDA kernels have, got 40"),
        (dict(sizes=(1, 1, 0, 4, 32, 0)), "Nq: expected at least 1"),
        (dict(sizes=(1, 1, 4, 4, 32, 9)), "S: expected at most 8 sources"),
        (dict(sizes=(2**31, 1, 4, 4, 32, 0)), "B: expected at least 1 and less than"),
        (dict(dtype="float32"), "query: expected bfloat16 or float16"),
        (dict(query=(8, 128, 32, 32)), "query: expected rows that begin at multiples of 16 bytes"),
        (dict(query=(16, 128, 32, 33)), "query: expected rows that begin at multiples of 16 bytes"),
        (dict(query=(0, 128, 32, 32)), "query: expected an address, got 0"),
    ],
)
def test_native_code_checks_its_arguments(change, message):
    rows = (16, 128, 32, 32)
    arguments = dict(sizes=(1, 1, 4, 4, 32, 0), dtype="float16", query=rows, key=rows, value=rows, bias=None, mask=None)
    arguments |= dict(scale=1.0, share=0, residual=0, parts=0, head_share=0, output=16, share_out=0, log_sum_exp=16)
    with pytest.raises(ValueError, match=message):
        extension.compiled.cuda_attention_forward(*{**arguments, **change}.values(), 0)


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_error_of_cuda_names_the_kernel_and_its_shape():
    rows = (16, 128, 32, 32)
    with pytest.raises(RuntimeError, match="attention_forward with B, H, Nq, Nk, D, S = 1, 1, 4, 4, 32, 0: "):
        extension.compiled.cuda_attention_forward(
            (1, 1, 4, 4, 32, 0), "float16", rows, rows, rows, None, None, 1.0, 0, 0, 0, 0, 16, 0, 16, 0
        )  # fmt: skip


@needs_kernels
def test_no_kernel_spills():
    usage = triton_offline.resource_usage(extension.compiled.__file__)
    assert len(usage) > 100
    assert [name for name, resources in usage if resources["STACK"] or resources["LOCAL"]] == []
