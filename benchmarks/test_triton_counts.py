"""What the Triton kernels execute, counted in the code compiled for two architectures. Counts, not times: no GPU runs.

Instructions are SASS, of all warps of all programs of a head: those of the listing, loops times their trips.
"""

import sys
from pathlib import Path

import pytest
import torch

import tlalign_kernels as tlk
from tlalign_kernels.backends import triton as backend

if backend.triton is None:
    pytest.skip("triton can't be imported", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tlalign_kernels"))
import triton_offline as offline

IMAGES = 2


def record_packed(monkeypatch, arch, shape, sources):
    launches = []
    offline.record(monkeypatch, launches.append, arch)
    tokens, heads, head_dim = shape
    qkv = torch.randn(IMAGES, tokens, 3, heads, head_dim).bfloat16().requires_grad_()
    share = torch.rand(IMAGES, tokens, sources) if sources else None
    tlk.attention_qkv(qkv, share, share, backend="triton")[0].sum().backward()
    return {launch.name: launch for launch in launches}


def count(launch, arch, heads, trips=()):
    resources, instructions = offline.disassemble(launch.compile(arch))
    programs = launch.grid[0] // (IMAGES * heads)
    return offline.count_executed(instructions, list(trips)) * launch.warps * programs, resources["REG"]


@pytest.mark.parametrize("shape", [(197, 6, 64), (49, 3, 32)], ids=["ViT", "windows"])
@pytest.mark.parametrize("arch", [80, 90])
def test_counts(benchmark, monkeypatch, arch, shape):
    tokens, heads, head_dim = shape

    def measure():
        labels = record_packed(monkeypatch, arch, shape, 1)
        none = record_packed(monkeypatch, arch, shape, 0)
        forward, registers = count(labels["attention_forward_row"], arch, heads)
        lean, lean_registers = count(none["attention_forward_row"], arch, heads)
        row = labels["attention_forward_row"].constants
        padded = (row["TILE"] * row["TILES"] + row["TAIL"] + row["TAIL_2"]) * -(-tokens // row["BLOCK_Q"])
        head = labels["attention_backward_head"]
        trips = -(-tokens // head.constants["BLOCK_K"])
        backward, _ = count(head, arch, heads, [trips] if trips > 1 else [])
        return forward, registers, lean, lean_registers, padded * row["BLOCK_Q"] / tokens**2, backward

    forward, registers, lean, lean_registers, padding, backward = benchmark.pedantic(measure, rounds=1)
    print(
        f"\ncounts, sm_{arch}, N={tokens}, D={head_dim}, bfloat16: forward {forward} ({registers} registers), without "
        f"labels {lean} ({lean_registers}): labels {100 * (forward / lean - 1):+.1f} %; "
        f"{32 * forward / tokens**2:.1f} a score, of which {padding:.2f} are computed for one needed; "
        f"backward {backward}"
    )
