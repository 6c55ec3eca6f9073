"""The Triton kernels without a GPU: interpreted, compiled for each architecture, counted, and executed by ptxvm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tlalign_kernels.backends import triton as backend
from tlalign_kernels.selftest import CASES, Case, compare

if backend.triton is None:
    pytest.skip("triton can't be imported", allow_module_level=True)
if backend._interpreted:
    pytest.skip("compiles, which TRITON_INTERPRET=1 turns off", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
import triton_offline as offline

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have
needs_ptxvm = pytest.mark.skipif(not offline.PTXVM.exists(), reason="needs ptxvm")


# Interpreted


def test_the_operators_tests_pass_under_the_interpreter():
    # In a process of its own: the kernels are interpreted or compiled from their import on.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", "triton"]
    done = subprocess.run(
        [*command, Path(__file__).with_name("test_functional.py")],
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
    Case("ViT-H heads", heads=1, batch=1, head_dim=80, queries=70, keys=50),
    Case("two sources of 8", heads=1, batch=2, queries=5, keys=7, head_dim=9, sources=8, residual=False),
    *(case for case in CASES if case.keys <= 65 and case.queries <= 784),
)


@needs_ptxvm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", EXECUTED, ids=lambda case: case.name)
def test_compiled_code_is_within_the_bound(monkeypatch, case, dtype):
    if dtype == torch.float32 and case.queries * case.keys > 10_000:
        pytest.skip("slow: products of float32 are as many instructions as multiplications")
    names = []

    def run(launch):
        names.append(launch.name)
        offline.execute(launch)

    offline.record(monkeypatch, run)
    assert [check for check in compare(case, dtype, "triton") if not check.passed] == []
    assert any("forward" in name for name in names)
    assert any("backward" in name for name in names)


@needs_ptxvm
@pytest.mark.parametrize("tokens", [1, 16, 49, 64, 65, 100, 196, 198, 257])
def test_compiled_code_at_odd_lengths(monkeypatch, tokens):
    offline.record(monkeypatch, offline.execute)
    case = Case("length", batch=1, heads=1, queries=tokens, keys=tokens, head_dim=32, packed=True)
    assert [check for check in compare(case, torch.bfloat16, "triton") if not check.passed] == []


@needs_ptxvm
def test_every_configuration_of_the_backward_is_right(monkeypatch):
    # Other architectures take other tiles; their code for sm_80 is what can be executed.
    case = Case("tiles", batch=1, heads=1, packed=True)
    for arch in (86, 120):
        offline.record(monkeypatch, offline.execute, arch)
        assert [check for check in compare(case, torch.bfloat16, "triton") if not check.passed] == []


# Compiled


def check_compiled(launch, arch):
    compiled = launch.compile(arch)
    resources, instructions = offline.disassemble(compiled)
    opcodes = [opcode.split(".")[0] for _, opcode, _ in instructions]
    spills = sum(opcode in ("STL", "LDL") for opcode in opcodes)
    assert (spills, resources["LOCAL"]) == (0, 0), f"{launch.name} spills on sm_{arch}"
    assert compiled.metadata.shared <= SHARED_MEMORY[arch] * 1024
    if "attention" in launch.name:
        assert any(opcode in ("HMMA", "HGMMA", "UTCHMMA") for opcode in opcodes), f"{launch.name}: no tensor cores"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tokens", [49, 197, 577])
def test_nothing_spills_at_head_dim_64(monkeypatch, arch, tokens):
    for launch in offline.record_packed(monkeypatch, arch, tokens, 64).values():
        check_compiled(launch, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_spills(monkeypatch, arch, head_dim, dtype):
    for tokens in (49, 197, 577):
        for launch in offline.record_packed(monkeypatch, arch, tokens, head_dim, dtype).values():
            check_compiled(launch, arch)


# Counted


@pytest.mark.parametrize(("tokens", "head_dim", "most"), [(197, 64, 1.4), (49, 32, 1.71)])
def test_few_scores_are_padding(monkeypatch, tokens, head_dim, most):
    launch = offline.record_packed(monkeypatch, 80, tokens, head_dim)["attention_forward_row"]
    sizes = launch.constants
    columns = sizes["TILE"] * sizes["TILES"] + sizes["TAIL"] + sizes["TAIL_2"]
    rows = sizes["BLOCK_Q"] * launch.grid[0] // (offline.IMAGES * offline.HEADS)
    assert tokens**2 <= rows * columns <= most * tokens**2


@pytest.mark.parametrize(("arch", "most"), [(80, 16), (90, 13)])
def test_instructions_of_a_score_of_the_forward(monkeypatch, arch, most):
    launch = offline.record_packed(monkeypatch, arch, 197, 64)["attention_forward_row"]
    assert offline.count_of_head(launch, arch)[0] * 32 / 197**2 <= most


@pytest.mark.parametrize("arch", [80, 90])
def test_labels_cost_few_instructions(monkeypatch, arch):
    # The leanest kernel without labels: its row sum, too, is a column of the product.
    none, labels = (
        offline.count_of_head(
            offline.record_packed(monkeypatch, arch, 197, 64, sources=sources)["attention_forward_row"], arch
        )[0]
        for sources in (0, 1)
    )
    assert none < labels <= 1.06 * none


@pytest.mark.parametrize("arch", [80, 90])
def test_one_program_a_head_takes_a_third_less_than_two_kernels(monkeypatch, arch):
    def count(launch, block=None):
        trips = [-(-197 // launch.constants[block])] if block else []
        return offline.count_of_head(launch, arch, trips)[0]

    one = count(offline.record_packed(monkeypatch, arch, 197, 64)["attention_backward_head"], "BLOCK_K")
    monkeypatch.setattr(backend, "MAX_GRADIENT_ROWS", 0)
    launches = offline.record_packed(monkeypatch, arch, 197, 64)
    two = (
        count(launches["sum_row_terms"])
        + count(launches["attention_backward_keys"], "BLOCK_Q")
        + count(launches["attention_backward_queries"], "BLOCK_K")
    )
    assert one <= 0.67 * two
