"""The Triton kernels without a GPU: interpreted, compiled for each architecture, counted, and executed by ptxvm."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tlalign_kernels as tlk
from tlalign_kernels.backends import Problem
from tlalign_kernels.backends import triton as backend
from tlalign_kernels.selftest import CASES, Case, compare, make_inputs, run_operator
from tlalign_kernels.windows import Windows

if backend.triton is None:
    pytest.skip("triton can't be imported", allow_module_level=True)
if backend._interpreted:
    pytest.skip("compiles, which TRITON_INTERPRET=1 turns off", allow_module_level=True)

import triton_offline as offline

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have
needs_ptxvm = pytest.mark.skipif(not offline.PTXVM.exists(), reason="needs ptxvm")
VERSION = tuple(map(int, backend.triton.__version__.split(".")[:2]))
of_new_triton = pytest.mark.skipif(VERSION < (3, 8), reason="older Triton compiles to more instructions and registers")


# Interpreted


@pytest.mark.minutes
@pytest.mark.skipif(VERSION < (3, 8), reason="older Triton's interpreter can't do loops with numpy 2.5")
# In parts, so that several workers share them; in float16 the compiled code is executed below.
@pytest.mark.parametrize(
    ("part", "files"),
    [
        ("errors and not float16", ("test_functional.py", "test_gpu.py")),
        ("not errors", ("test_functional.py", "test_gpu.py")),
        ("not (random or fixed_point or compiles)", ("test_windows.py",)),
        pytest.param("float16", ("test_functional.py", "test_gpu.py"), marks=pytest.mark.slow),
    ],
    ids=["errors", "others", "windows", "float16"],
)
def test_the_operators_tests_pass_under_the_interpreter(part, files):
    # In a process of its own: the kernels are interpreted or compiled from their import on.
    # Of the windows of a map the smallest are enough for it; ptxvm executes the others below. Programs are interpreted
    # in turn, so that the same bits show nothing; a task of several images is the CPU kernels', and what opcheck sees
    # is no kernel's.
    nothing_new = "repeats or same_bits or images_share or opcheck"
    chosen = f"triton and (beyond or not (windows- or map)) and not ({nothing_new}) and {part}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", chosen]
    done = subprocess.run(
        [*command, *(Path(__file__).with_name(name) for name in files)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


# Executed

EXECUTED = (
    Case("ViT", heads=2, batch=1, packed=True),
    Case("odd tokens, several sources", heads=2, batch=1, queries=33, keys=33, sources=3, packed=True),
    Case("streaming", heads=1, batch=1, queries=20, keys=330),
    Case("wide heads", heads=1, batch=1, head_dim=80, queries=70, keys=50),
    Case("two blocks of columns, and a bias", heads=1, batch=1, head_dim=72, queries=70, keys=50, bias_scale=1.0),
    Case("streaming beside a bias", heads=2, batch=1, head_dim=32, queries=70, keys=140, bias_scale=1.0),
    Case("dense labels of wide heads", heads=2, batch=1, head_dim=40, queries=20, keys=40, sources=10, mask="rows"),
    Case("two sources of 8", heads=1, batch=2, queries=5, keys=7, head_dim=9, sources=8, residual=False),
    *(case for case in CASES if case.keys <= 65 and case.queries <= 784),
)


def check_executed(monkeypatch, case, dtype, arch=80):
    """Compares with the reference what is launched on an architecture; returns the names of the kernels."""
    names = []

    def run(launch):
        names.append(launch.name)
        offline.execute(launch)

    offline.record(monkeypatch, run, arch)
    assert [check for check in compare(case, dtype, "triton") if not check.passed] == []
    assert any("forward" in name for name in names)
    assert any("backward" in name for name in names)
    return names


def executed(cases, quick):
    """Cases and types: in bfloat16, which the interpreter has not, all; in others those that take seconds are slow."""
    return [
        pytest.param(
            case,
            dtype,
            marks=[] if dtype == torch.bfloat16 or case.name in quick[dtype] else pytest.mark.slow,
            id=f"{case.name}-{dtype}",
        )
        for case in cases
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]


QUICK = {
    torch.float16: {"ViT", "odd tokens, several sources", "extreme scores", "one token", "two sources of 8"},
    torch.float32: {
        "odd tokens, several sources",
        "streaming",
        "wide heads",
        "causal",
        "one token",
        "two sources of 8",
    },
}


@needs_ptxvm
@pytest.mark.parametrize(("case", "dtype"), executed(EXECUTED, QUICK))
def test_compiled_code_is_within_the_bound(monkeypatch, case, dtype):
    check_executed(monkeypatch, case, dtype)


@needs_ptxvm
@pytest.mark.parametrize(("images", "dtype"), [(1, torch.bfloat16), (1, torch.float32), (2, torch.bfloat16)])
def test_finite_numbers_of_a_bias_count_as_65504_at_most(monkeypatch, images, dtype):
    case = Case("far", batch=2, heads=1, queries=20, keys=24, head_dim=16)
    inputs = make_inputs(case, "cpu", dtype)
    bias = torch.zeros(images, 1, 20, 24)
    bias[..., 3, :], bias[..., 4, :], bias[..., 5, 2:] = -1e9, 1e10, torch.finfo(torch.float32).min
    offline.record(monkeypatch, offline.execute)
    far, near = (run_operator(case, {**inputs, "bias": each}, "triton") for each in (bias, bias.clamp(-65504, 65504)))
    for name, tensor in far.items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, near[name])


@needs_ptxvm
def test_a_bias_in_float32_beside_bfloat16_is_not_rounded(monkeypatch):
    # To which 300 and 301 are the same.
    query, key, value = torch.zeros(3, 2, 1, 20, 16).bfloat16().unbind(0)
    share = torch.rand(2, 20, 1)
    bias = 300 + torch.rand(1, 1, 20, 20)
    offline.record(monkeypatch, offline.execute)
    _, mixed = tlk.attention(query, key, value, share, bias=bias, backend="triton")
    torch.testing.assert_close(mixed, (bias[0, 0] - 300).softmax(dim=1) @ share, atol=1e-3, rtol=0)


EXECUTED_IN_WINDOWS = (
    Case("shifted windows", batch=1, heads=1, head_dim=32, bias_scale=1.0, windows=Windows((14, 14), (7, 7), (3, 3))),
    Case("padded windows", heads=2, head_dim=40, bias_scale=1.0, sources=5, windows=Windows((5, 9), (4, 4), (1, 2))),
    Case("windows beyond the map", batch=1, heads=2, windows=Windows((3, 10), (8, 4), (4, 0)), residual=False),
    Case("windows of 144", batch=1, heads=1, head_dim=32, bias_scale=1.0, windows=Windows((13, 12), (12, 12), (6, 0))),
    Case("windows of 81", batch=1, heads=1, head_dim=40, bias_scale=1.0, windows=Windows((9, 10), (9, 9), (4, 4))),
    Case("windows of 225", batch=1, heads=1, head_dim=16, bias_scale=1.0, windows=Windows((9, 15), (15, 15), (0, 7))),
    Case("dense labels in windows", heads=2, head_dim=24, sources=20, windows=Windows((10, 5), (4, 4), (2, 2))),
    Case("dropout in windows", heads=2, head_dim=16, dropout_p=0.25, windows=Windows((5, 6), (4, 4), (0, 1))),
)
QUICK_IN_WINDOWS = {torch.float16: {"padded windows"}, torch.float32: {"dropout in windows"}}


@needs_ptxvm
@pytest.mark.parametrize(("case", "dtype"), executed(EXECUTED_IN_WINDOWS, QUICK_IN_WINDOWS))
def test_compiled_code_of_windows_is_within_the_bound(monkeypatch, case, dtype):
    check_executed(monkeypatch, case, dtype)


@needs_ptxvm
def test_one_program_has_all_gradients_of_windows_of_144(monkeypatch):
    # As on sm_89, whose last block of keys has a size of its own.
    (case,) = (case for case in EXECUTED_IN_WINDOWS if case.name == "windows of 144")
    assert "attention_backward_head" in check_executed(monkeypatch, case, torch.bfloat16, 89)


@needs_ptxvm
@pytest.mark.parametrize("sources", [1, 3])
def test_labels_keep_the_precision_of_float32_beside_bfloat16(monkeypatch, sources):
    offline.record(monkeypatch, offline.execute)
    query, key, value = torch.randn(3, 1, 2, 33, 16).bfloat16().unbind(0)
    share = torch.full((1, 33, sources), 0.71237)
    _, mixed = tlk.attention(query, key, value, share, backend="triton")
    torch.testing.assert_close(mixed, share, rtol=0, atol=1e-6)


@needs_ptxvm
@pytest.mark.parametrize("tokens", [20, 70])
def test_weights_in_float16_add_up_to_one_where_scores_are_large(monkeypatch, tokens):
    # All scores are 160000, which float32 knows to 1 / 64.
    offline.record(monkeypatch, offline.execute)
    query = torch.full((1, 1, tokens, 16), 100.0).half()
    value = torch.randn(1, 1, tokens, 16).half().requires_grad_()
    output, _ = tlk.attention(query, query, value, scale=1.0, backend="triton")
    (gradient,) = torch.autograd.grad(output, value, torch.ones_like(output))
    torch.testing.assert_close(gradient, torch.ones_like(gradient), atol=2e-3, rtol=0)


@needs_ptxvm
@pytest.mark.parametrize("tokens", [20, 70])
def test_gradients_in_bfloat16_are_as_small_and_large_as_those_of_the_output(monkeypatch, tokens):
    offline.record(monkeypatch, offline.execute)
    case = Case("scaled", batch=1, heads=1, queries=tokens, keys=tokens, head_dim=16)
    inputs = make_inputs(case, "cpu", torch.bfloat16)
    expected = run_operator(case, inputs, "triton")
    for factor in (2.0**-24, 2.0**24):
        results = run_operator(case, {**inputs, "grad_output": inputs["grad_output"] * factor}, "triton")
        for name in ("query", "key", "value"):
            assert torch.equal(results[f"gradient of {name}"], expected[f"gradient of {name}"] * factor)


@needs_ptxvm
def test_one_program_may_sum_the_gradients_that_several_images_have_for_a_bias(monkeypatch):
    monkeypatch.setattr(backend, "images_of_sum", lambda batch, bias_images, tiles: 1 if bias_images == batch else 2)
    case = Case("bias", batch=3, heads=2, queries=9, keys=11, head_dim=16, bias_scale=1.0)
    check_executed(monkeypatch, case, torch.bfloat16)
    inputs = make_inputs(case, "cpu", torch.bfloat16)
    inputs["bias"] = torch.randn(3, 2, 9, 11)
    found, wanted = (run_operator(case, inputs, name)["gradient of bias"] for name in ("triton", "reference"))
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)


@needs_ptxvm
@pytest.mark.parametrize("tokens", [1, 16, 49, 64, 65, 100, 196, 198, 257])
def test_compiled_code_at_odd_lengths(monkeypatch, tokens):
    case = Case("length", batch=1, heads=1, queries=tokens, keys=tokens, head_dim=32, packed=True)
    check_executed(monkeypatch, case, torch.bfloat16)


@needs_ptxvm
@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(49, 49), (1, 1), (70, 17)])
def test_heads_in_turn_are_right(monkeypatch, queries, keys, sources):
    monkeypatch.setattr(backend, "MIN_PROGRAMS_OF_HEADS", 0)
    case = Case("heads", queries=queries, keys=keys, head_dim=32, sources=sources, packed=queries == keys)
    assert "attention_forward_heads" in check_executed(monkeypatch, case, torch.bfloat16)


@needs_ptxvm
@pytest.mark.parametrize("bias_scale", [0.0, 1.0])
def test_heads_in_turn_are_right_in_windows(monkeypatch, bias_scale):
    monkeypatch.setattr(backend, "MIN_PROGRAMS_OF_HEADS", 0)
    windows = Windows((8, 14), (7, 7), (3, 2) if bias_scale else (0, 0))
    case = Case("heads", batch=1, head_dim=32, bias_scale=bias_scale, windows=windows)
    assert "attention_forward_heads" in check_executed(monkeypatch, case, torch.bfloat16)


@needs_ptxvm
@pytest.mark.parametrize("arch", [90, 120])
def test_tiles_of_other_architectures_are_right_beside_a_bias(monkeypatch, arch):
    case = Case("bias", heads=1, batch=2, head_dim=16, queries=70, keys=131, bias_scale=1.0)
    names = check_executed(monkeypatch, case, torch.bfloat16, arch)
    assert {"arrange_bias", "attention_forward_stream", "attention_backward_queries"} <= set(names)


@needs_ptxvm
def test_heads_in_turn_leave_out_those_in_which_a_query_sees_no_key(monkeypatch):
    monkeypatch.setattr(backend, "MIN_PROGRAMS_OF_HEADS", 0)
    names = []
    offline.record(monkeypatch, lambda launch: (names.append(launch.name), offline.execute(launch)))
    case = Case("heads", batch=1, heads=3, head_dim=16, bias_scale=1.0, windows=Windows((6, 6), (6, 6), (0, 0)))
    inputs = make_inputs(case, "cpu", torch.bfloat16)
    inputs["bias"][0, 4] = -math.inf
    inputs["bias"][:, 9] = -math.inf
    inputs["bias"][1, 12, 0] = math.nan
    found, wanted = (run_operator(case, inputs, name)["share"].view(36) for name in ("triton", "reference"))
    assert "attention_forward_heads" in names
    assert wanted[9] == inputs["residual"].view(36)[9]
    assert wanted.isnan().nonzero().tolist() == [[12]]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0, equal_nan=True)


@needs_ptxvm
def test_a_map_whose_rows_are_apart_is_right(monkeypatch):
    offline.record(monkeypatch, offline.execute)
    case = Case("part of a map", batch=2, heads=2, head_dim=16, windows=Windows((5, 6), (4, 4), (1, 0)))
    inputs = make_inputs(case, "cpu", torch.bfloat16)
    around = torch.full((2, 7, 9, *inputs["qkv"].shape[3:]), float("nan"), dtype=torch.bfloat16)
    around[:, 1:6, 2:8] = inputs["qkv"]
    apart = run_operator(case, {**inputs, "qkv": around[:, 1:6, 2:8]}, "triton")
    together = run_operator(case, inputs, "triton")
    assert all(torch.equal(apart[name], together[name]) for name in together)


def zip_configs(shape):
    """Each configuration of forward and backward once."""
    forward, backward = backend.forward_configs(shape), backend.backward_configs(shape)
    for number in range(max(len(forward), len(backward))):
        yield forward[min(number, len(forward) - 1)], backward[min(number, len(backward) - 1)]


@needs_ptxvm
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_configuration_is_right(monkeypatch, arch, dtype):
    # Other architectures take other tiles; their code for sm_80 is what can be executed.
    case = Case("tiles", batch=1, heads=1, queries=100, keys=100, packed=True)
    shape = backend.Shape(arch, dtype, 1, 100, 100, 64, False)
    for forward, backward in zip_configs(shape):
        with monkeypatch.context() as patch:
            offline.record(patch, offline.execute, arch)
            patch.setattr(backend, "forward_configs", lambda shape, chosen=forward: [chosen])
            patch.setattr(backend, "backward_configs", lambda shape, chosen=backward: [chosen])
            assert [check for check in compare(case, dtype, "triton") if not check.passed] == []


@needs_ptxvm
@pytest.mark.parametrize("arch", [80, 86])  # blocks of 32 and of 16 keys
def test_one_program_of_a_long_head_is_right(monkeypatch, arch):
    (head,) = backend.backward_configs(backend.Shape(arch, torch.bfloat16, 1, 193, 193, 32, False))[1]
    monkeypatch.setattr(backend, "backward_configs", lambda shape: [(head,)])
    case = Case("long", batch=1, heads=1, queries=193, keys=193, head_dim=32, packed=True)
    assert "attention_backward_head" in check_executed(monkeypatch, case, torch.bfloat16, arch)


@needs_ptxvm
@pytest.mark.parametrize(
    ("arch", "head_dim", "options"),
    [
        (100, 104, {}),
        pytest.param(120, 104, {}, marks=pytest.mark.slow),
        pytest.param(100, 96, {"bias_scale": 1.0}, marks=pytest.mark.slow),
        (120, 96, {"bias_scale": 1.0}),
        pytest.param(100, 104, {"bias_scale": 1.0, "mask": "causal"}, marks=pytest.mark.slow),
        pytest.param(120, 104, {"bias_scale": 1.0, "mask": "causal"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_wide_heads_of_float32_are_right(monkeypatch, arch, head_dim, options):
    # There they have other tiles than on sm_80, and some heads other blocks of columns.
    case = Case("wide", batch=1, heads=2, queries=20, keys=40, head_dim=head_dim, **options)
    check_executed(monkeypatch, case, torch.float32, arch)


@needs_ptxvm
def test_programs_beyond_65535_are_right(monkeypatch):
    offline.record(monkeypatch, lambda launch: offline.execute(launch, programs=2))
    qkv = torch.randn(70_000, 4, 3, 2, 16).bfloat16().requires_grad_()
    share = torch.rand(70_000, 4, 1)
    output, mixed = tlk.attention_qkv(qkv, share, share, backend="triton")
    (gradient,) = torch.autograd.grad(output, qkv, torch.ones_like(output))
    last = qkv.detach()[-1:].double().requires_grad_()
    expected, expected_share = tlk.attention_qkv(last, share[-1:], share[-1:], backend="reference")
    (expected_gradient,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    torch.testing.assert_close(output[-1:].double(), expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(mixed[-1:], expected_share.float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(gradient[-1:].double(), expected_gradient, atol=5e-2, rtol=0)


# Compiled


def check_compiled(launch, arch):
    compiled = launch.compile(arch)
    resources, instructions = offline.disassemble(compiled)
    opcodes = [opcode.split(".")[0] for _, opcode, _ in instructions]
    spills = opcodes.count("STL") + opcodes.count("LDL")
    assert (spills, resources["LOCAL"]) == (0, 0), f"{launch.name} spills on sm_{arch}"
    assert compiled.metadata.shared <= SHARED_MEMORY[arch] * 1024
    if "attention" in launch.name or launch.name == "dense_share":
        assert any(opcode in ("HMMA", "HGMMA", "UTCHMMA") for opcode in opcodes), f"{launch.name}: no tensor cores"


def kernels_to_compile(shape):
    """Of every configuration that may be chosen; of a newer Triton than they were chosen with, of the default."""
    # Triton 3.9 spills a few registers in backwards that only `tune` tries.
    for forward, backward in itertools.islice(zip_configs(shape), None if VERSION <= (3, 8) else 1):
        yield [config.kernel for config in (*forward, *backward)]


def every_launch(arch, tokens, head_dim, dtype, offsets=False, mask=True):
    shape = backend.Shape(arch, dtype, 1, tokens, tokens, head_dim, offsets, offsets and mask)
    for prefer in kernels_to_compile(shape):
        options = dict(prefer=prefer, offsets=offsets, mask=mask)
        yield from offline.record_packed(arch, tokens, head_dim, dtype, **options).values()


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tokens", [49, 197, 577])
def test_nothing_spills_at_head_dim_64(arch, tokens):
    for launch in every_launch(arch, tokens, 64, torch.bfloat16):
        check_compiled(launch, arch)


@of_new_triton
def test_nothing_spills_with_the_bias_of_a_vit():
    for launch in every_launch(80, 197, 64, torch.bfloat16, offsets=True, mask=False):
        check_compiled(launch, 80)


@of_new_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("offsets", "mask"), [(False, False), (True, False), (True, True)], ids=["plain", "bias", "bias and mask"]
)
def test_nothing_spills(arch, head_dim, dtype, offsets, mask):
    for tokens in (49, 197, 577):
        for launch in every_launch(arch, tokens, head_dim, dtype, offsets, mask):
            check_compiled(launch, arch)


@of_new_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "head_dim"), [(49, 48), (128, 64), (197, 48)])
def test_nothing_spills_at_other_lengths_and_head_dims(arch, tokens, head_dim):
    for launch in every_launch(arch, tokens, head_dim, torch.bfloat16):
        check_compiled(launch, arch)


@of_new_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("offsets", [False, True], ids=["plain", "bias and mask"])
def test_nothing_spills_in_float32(arch, head_dim, offsets):
    for launch in every_launch(arch, 197, head_dim, torch.float32, offsets):
        check_compiled(launch, arch)


@of_new_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize(("head_dim", "mask"), [(96, False), (96, True), (128, False)])
def test_a_bias_spills_nothing_in_wide_heads_of_float32(arch, head_dim, mask):
    launches = offline.record_packed(arch, 197, head_dim, torch.float32, offsets=True, mask=mask)
    check_compiled(launches["attention_forward_stream"], arch)


@of_new_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["plain", "bias and mask"])
def test_nothing_spills_with_dense_labels(arch, head_dim, dtype, offsets):
    launches = offline.record_packed(arch, 197, head_dim, dtype, sources=32, offsets=offsets)
    check_compiled(launches["dense_share"], arch)


SWIN = {
    tokens: Windows((2 * side + 2, 2 * side + 2), (side, side), (side // 2, side // 2))
    for tokens, side in ((49, 7), (64, 8), (144, 12), (256, 16), (576, 24))
}


def check_windows(arch, tokens, dtype):
    """The most that can be asked of windows: shifted and padded, with a bias and its gradient."""
    windows = SWIN[tokens]
    for prefer in kernels_to_compile(backend.Shape(arch, dtype, 1, tokens, tokens, 32, True, in_windows=True)):
        for launch in offline.record_windows(arch, windows, 32, dtype, prefer=prefer).values():
            check_compiled(launch, arch)


@of_new_triton
def test_nothing_spills_in_windows_of_49():
    check_windows(80, 49, torch.bfloat16)


@of_new_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tokens", SWIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_spills_in_windows(arch, tokens, dtype):
    check_windows(arch, tokens, dtype)


# Chosen


def test_amd_is_asked_for_no_limit_of_registers(monkeypatch):
    config = backend.Config("attention_forward_row", {"BLOCK_Q": 64}, 4, registers=168)
    assert config.options["maxnreg"] == 168
    assert "maxnreg" not in config._replace(registers=None).options
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "maxnreg" not in config.options


def test_amd_is_never_taken_for_a_hopper(monkeypatch):
    capability = backend._capability.__wrapped__  # which keeps nothing
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert capability(torch.device("cuda")) == 90
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert capability(torch.device("cuda")) not in (90, 100)


def test_what_has_the_tensor_cores_of_a_gpu_is_configured_as_that(monkeypatch):
    capability = backend._capability.__wrapped__
    for given, taken in (((10, 0), 100), ((10, 3), 100), ((11, 0), 100), ((12, 1), 121), ((8, 6), 86)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, given=given: given)
        assert capability(torch.device("cuda")) == taken


def test_gpus_before_ampere_are_refused(monkeypatch):
    problem = Problem("cuda", torch.float16, 2, 3, 49, 49, 32, 1, torch.float32, True, False, 0.0, True)
    monkeypatch.setattr(backend, "_capability", lambda device: {None: 80, 1: 75}[device.index])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert backend.unsupported_reasons(problem._replace(device_index=1)) == []  # of a fake tensor
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert backend.unsupported_reasons(problem) == []
    problem = problem._replace(device_index=1)
    assert {shape.capability for _, shape, *_ in backend._directions(problem)} == {75}
    (reason,) = backend.unsupported_reasons(problem)
    assert reason == "device: expected compute capability 8.0 or newer, got 7.5"


def test_what_32_bits_do_not_count_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(backend, "_capability", lambda device: 80)
    problem = Problem("cuda", torch.float16, 1, 2**8, 2**16, 49, 2**7, 1, torch.float32, False, False, 0.0, True)
    assert ["2**31" in reason for reason in backend.unsupported_reasons(problem)] == [True]
    of_keys = problem._replace(queries=49, keys=2**16)
    assert ["2**31" in reason for reason in backend.unsupported_reasons(of_keys)] == [True]
    assert backend.unsupported_reasons(problem._replace(queries=2**16 - 1)) == []
    of_map = problem._replace(queries=49, windows=Windows((2**8, 2**8), (7, 7), (0, 0)))
    assert ["2**31" in reason for reason in backend.unsupported_reasons(of_map)] == [True]
    far = torch.empty_strided((1, 1, 3, 16), (0, 0, 2**30, 1), device="meta")
    with pytest.raises(NotImplementedError, match=r"query: expected less than 2\*\*31 elements from the first"):
        backend._rows(query=far)
    with pytest.raises(NotImplementedError, match=r"bias, mask: expected less than 2\*\*31 elements from the first"):
        backend._offset_strides(far)
    backend._rows(query=far[:, :, :2])


def test_only_what_is_packed_has_one_set_of_addresses(monkeypatch):
    launches = []
    offline.record(monkeypatch, launches.append)
    qkv, other = torch.zeros(2, 2, 20, 3, 2, 16, dtype=torch.bfloat16).unbind()
    qkv.requires_grad_()
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    # Gradients of views are no projection.
    for views, gap in (
        ((query, key, value), 32),
        ((query, key, other.permute(2, 0, 3, 1, 4)[2]), 0),
        ((value, key, query), 0),
        ((key, query, value), 0),
    ):
        launches.clear()
        tlk.attention(*views, backend="triton")[0].sum().backward()
        gaps = {launch.name: launch.constants["GAP"] for launch in launches if "GAP" in launch.constants}
        assert gaps == {"attention_forward_row": gap, "attention_backward_head": 0}
    launches.clear()
    tlk.attention_qkv(qkv, backend="triton")[0].sum().backward()
    assert [launch.constants["GAP"] for launch in launches if "GAP" in launch.constants] == [32, 32]


@pytest.mark.parametrize(
    ("shape", "dtype", "mask", "is_laid_out", "kind"),
    [
        ((1, 2, 20, 20), torch.bfloat16, None, True, backend._ARRANGED),
        ((1, 20, 20), torch.float16, None, True, backend._ARRANGED),
        ((1, 2, 20, 20), torch.bfloat16, torch.ones(20, dtype=torch.bool), True, 1),
        ((3, 2, 20, 20), torch.bfloat16, None, False, backend._UNBOUNDED),
        ((1, 2, 1, 20), torch.bfloat16, None, False, backend._UNBOUNDED),
        ((1, 2, 20, 20), torch.float32, None, True, 1),
    ],
)
def test_a_bias_that_all_images_share_is_laid_out(monkeypatch, shape, dtype, mask, is_laid_out, kind):
    launches = []
    offline.record(monkeypatch, launches.append)
    qkv = torch.zeros(3, 20, 3, 2, 16, dtype=dtype)
    tlk.attention_qkv(qkv, bias=torch.zeros(shape, dtype=dtype), mask=mask, backend="triton")
    assert ("arrange_bias" in [launch.name for launch in launches]) == is_laid_out
    assert launches[-1].constants["BIAS"] == kind


def test_what_tune_prefers_is_for_one_class_of_problems(monkeypatch):
    """Two stages of a Swin differ in their heads alone; calls with labels and without, in the forward alone."""
    monkeypatch.setattr(backend, "_preferred", {})
    problem = Problem("cpu", torch.bfloat16, 2, 3, 49, 49, 32, 1, torch.float32, True, False, 0.0, True)
    others = [
        problem._replace(heads=6),
        problem._replace(has_bias=False),
        problem._replace(has_mask=True),
        problem._replace(dropout_p=0.1),
        problem._replace(windows=Windows((7, 7), (7, 7), (0, 0))),
    ]
    default, *_, chosen = backend.configurations(problem)
    assert {len(each) for each in backend.configurations(problem._replace(needs_gradient=False))} == {1}
    with backend.preferences_kept():
        backend.prefer(problem, chosen)
        assert backend.configuration_of(problem._replace(batch=5)) == chosen
        for other in others:
            assert backend.configuration_of(other) == backend.configurations(other)[0]
        forward, *backward = backend.configuration_of(problem._replace(sources=0, share_dtype=None))
        assert (forward, tuple(backward)) == (default[0], chosen[1:])
    assert backend.configuration_of(problem) == default


def test_what_tune_prefers_is_launched(monkeypatch):
    names = []
    offline.record(monkeypatch, lambda launch: names.append(launch.name))
    monkeypatch.setattr(backend, "_preferred", {})
    problem = Problem("cpu", torch.bfloat16, 2, 3, 50, 50, 32, 1, torch.float32, False, False, 0.0, True)
    default, *others = backend.configurations(problem)
    assert backend.configuration_of(problem) == default
    assert len(others) == 3
    for configuration in (default, *others):
        backend.prefer(problem, configuration)
        assert backend.configuration_of(problem) == configuration
        for batch in (1, 2):
            names.clear()
            qkv = torch.zeros(batch, 50, 3, 3, 32, dtype=torch.bfloat16, requires_grad=True)
            tlk.attention_qkv(qkv, torch.zeros(batch, 50, 1), backend="triton")[0].sum().backward()
            assert {config.kernel for config in configuration} <= set(names)
        query = torch.zeros(1, 3, 50, 32, dtype=torch.bfloat16, requires_grad=True)
        explained = tlk.explain(query, query, query, torch.zeros(1, 50, 1), backend="triton")
        assert explained.configuration == tuple(map(str, configuration))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.zeros(9, 9)},
        {"bias": torch.zeros(9, 9)},
        {"window_size": (3, 3), "shift": (1, 0)},
        {"window_size": (2, 2), "shift": (1, 1), "bias": torch.zeros(4, 4)},
    ],
    ids=["mask", "bias", "regions", "regions and bias"],
)
def test_launches_are_of_the_class_that_tune_prefers_for(monkeypatch, options):
    problems, classes, chosen = [], set(), backend._chosen
    offline.record(monkeypatch, lambda launch: None)
    monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: problems.append(problem) or [])
    monkeypatch.setattr(backend, "_chosen", lambda *asked: classes.add(backend._class_of(*asked)) or chosen(*asked))
    qkv = torch.zeros(1, 9, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    if "window_size" in options:
        output, _ = tlk.window_attention(qkv.unflatten(1, (3, 3)), backend="triton", **options)
    else:
        output, _ = tlk.attention_qkv(qkv, backend="triton", **options)
    output.sum().backward()
    assert classes == {backend._class_of(*direction) for direction in backend._directions(problems[-1])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_columns_hold_a_head_and_pad_little(dtype):
    for head_dim in range(1, 257):
        for has_offsets in (False, True):
            width = backend._columns(torch.empty(1, head_dim, dtype=dtype), has_offsets)
            widths = width["WIDTHS"]
            assert width["D"] == head_dim
            assert all(size >= 16 and size.bit_count() == 1 for size in widths)
            assert 0 <= sum(widths) - head_dim < max(16, head_dim / 2)


def test_float32_is_multiplied_as_pytorch_may_multiply_it():
    def precisions():
        launches = offline.record_packed(80, 49, 32, torch.float32)
        return {launch.constants["PRECISION"] for name, launch in launches.items() if name.startswith("attention")}

    assert precisions() == {"tf32x3"}
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        assert precisions() == {"tf32"}
        products.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("high")
        assert precisions() == {"tf32"}
    finally:
        torch.set_float32_matmul_precision("highest")
        products.fp32_precision = before
    assert precisions() == {"tf32x3"}


@of_new_triton
@needs_ptxvm
@pytest.mark.parametrize("sources", [2, 20])
def test_labels_are_never_multiplied_as_tf32(monkeypatch, sources):
    offline.record(monkeypatch, offline.execute)
    monkeypatch.setattr(backend, "_precision", lambda: "tf32")
    query, key, value = torch.randn(3, 1, 2, 33, 16).unbind(0)
    # Ten bits are not enough for it.
    share = torch.full((1, 33, sources), 0.3)
    output, mixed = tlk.attention(query, key, value, share, backend="triton")
    exact, _ = tlk.attention(query.double(), key.double(), value.double(), backend="reference")
    assert float((output - exact).abs().max()) > 1e-5
    torch.testing.assert_close(mixed, share, atol=2e-6, rtol=0)


# Counted

VIT = dict(tokens=197, head_dim=64, prefer=["attention_forward_row"])
WINDOWS = dict(tokens=49, head_dim=32, heads=3, prefer=["attention_forward_heads"])
SHIFTED = Windows((14, 14), (7, 7), (3, 3))


def count(launch, arch, heads=offline.HEADS):
    return offline.count_of_head(launch, arch, heads).total()


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_few_scores_are_padding(arch):
    # Each score takes one exponential.
    def padding(launch, heads, windows=1):
        opcodes = offline.count_of_head(launch, arch, heads, offline.IMAGES * windows)
        tokens = launch.constants["QUERIES"]
        return opcodes["MUFU.EX2"] * 32 / tokens**2

    assert 1 <= padding(offline.record_packed(arch, **VIT)["attention_forward_row"], offline.HEADS) <= 1.4
    launches = offline.record_packed(arch, **WINDOWS)
    assert 1 <= padding(launches["attention_forward_heads"], 3) <= 1.5
    assert 1 <= padding(launches["attention_backward_head"], 3) <= 1.5
    for forward in ("attention_forward_heads", "attention_forward_row"):
        launches = offline.record_windows(arch, SHIFTED, head_dim=32, heads=3, prefer=[forward])
        assert 1 <= padding(launches[forward], 3, SHIFTED.count()) <= 1.5
    assert 1 <= padding(launches["attention_backward_head"], 3, SHIFTED.count()) <= 1.5


@of_new_triton
@pytest.mark.parametrize(("arch", "most"), [(80, 16), (90, 13)])
def test_instructions_of_a_score_of_the_forward(arch, most):
    launch = offline.record_packed(arch, **VIT)["attention_forward_row"]
    assert count(launch, arch) * 32 / 197**2 <= most


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_labels_cost_few_instructions(arch):
    # The leanest kernel without labels: its row sum, too, is a column of the product.
    none, labels = (offline.record_packed(arch, sources=s, **VIT)["attention_forward_row"] for s in (0, 1))
    assert count(none, arch) < count(labels, arch) <= 1.06 * count(none, arch)
    assert count(labels, arch) <= count(offline.make_plain(labels), arch)


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_labels_of_windows_cost_few_instructions(arch):
    none, labels = (offline.record_packed(arch, sources=s, **WINDOWS)["attention_forward_heads"] for s in (0, 1))
    assert count(none, arch, heads=3) < count(labels, arch, heads=3) <= 1.08 * count(none, arch, heads=3)


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("options", [VIT, WINDOWS], ids=["ViT", "windows"])
def test_labels_take_no_program_from_a_multiprocessor(arch, options):
    name = "attention_forward_heads" if options is WINDOWS else "attention_forward_row"
    none, labels = (offline.record_packed(arch, sources=sources, **options)[name] for sources in (0, 1))
    assert offline.programs_at_once(labels, arch) == offline.programs_at_once(none, arch)


@of_new_triton
@needs_ptxvm
@pytest.mark.parametrize("most, options", [(1.03, VIT), (1.04, WINDOWS)], ids=["ViT", "windows"])
def test_labels_cost_few_bytes(most, options):
    none, labels = (offline.forward_bytes(sources=sources, **options) for sources in (0, 1))
    assert none < labels <= most * none


@of_new_triton
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_windows_take_no_more_instructions_than_attention_with_a_bias(arch):
    windows = offline.record_windows(arch, SHIFTED, 32, heads=3)
    packed = offline.record_packed(arch, 49, 32, heads=3, offsets=True, mask=False)
    for name in ("attention_forward_row", "attention_backward_head"):
        of_window = offline.count_of_head(windows[name], arch, 3, offline.IMAGES * SHIFTED.count()).total()
        assert of_window <= count(packed[name], arch, heads=3)


@of_new_triton
@needs_ptxvm
@pytest.mark.parametrize(
    ("kernel", "windows"),
    [("row", SHIFTED), ("heads", SHIFTED), ("window", Windows((24, 12), (12, 12), (6, 0)))],
    ids=["row", "heads", "window"],
)
def test_windows_read_the_projection_once_and_write_the_output_once(kernel, windows):
    asked, needed = offline.forward_bytes_in_windows(windows, f"attention_forward_{kernel}", heads=3)
    # The residual of a row, a four-hundredth of it, may be read by two threads.
    assert asked[0] <= needed[0] * (1.005 if kernel == "heads" else 1)
    assert asked[1] <= needed[1]


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_one_program_a_head_takes_a_third_less_than_two_kernels(arch):
    def instructions(*names):
        launches = offline.record_packed(arch, 197, 64, prefer=names)
        return sum(count(launches[name], arch) for name in names)

    two = instructions("attention_backward_queries", "attention_backward_keys")
    assert instructions("attention_backward_head") <= 0.67 * two


@of_new_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_the_default_backward_is_the_one_whose_busiest_pipe_is_done_first(arch):
    def cycles(*names):
        launches = offline.record_packed(arch, 197, 64, prefer=names)
        return sum(
            max(offline.pipe_cycles(offline.count_of_head(launches[name], arch), arch).values()) for name in names
        )

    shape = backend.Shape(arch, torch.bfloat16, 1, 197, 197, 64, False)
    default, other = backend.backward_configs(shape)
    assert cycles(*(config.kernel for config in default)) < cycles(*(config.kernel for config in other))
