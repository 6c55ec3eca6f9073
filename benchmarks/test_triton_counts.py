"""What the Triton kernels execute, counted in the code compiled for two architectures. Counts, not times: no GPU runs.

Instructions are SASS, of all warps of all programs of a head: those of the listing, loops times their trips.
"""

import sys
from pathlib import Path

import pytest

from tlalign_kernels.backends import triton as backend

if backend.triton is None:
    pytest.skip("triton can't be imported", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tlalign_kernels"))
import triton_offline as offline


@pytest.mark.parametrize(("tokens", "head_dim"), [(197, 64), (49, 32)], ids=["ViT", "windows"])
@pytest.mark.parametrize("arch", [80, 90])
def test_counts(benchmark, monkeypatch, arch, tokens, head_dim):
    def measure():
        labels = offline.record_packed(monkeypatch, arch, tokens, head_dim)
        none = offline.record_packed(monkeypatch, arch, tokens, head_dim, sources=0)
        row = labels["attention_forward_row"].constants
        padded = (row["TILE"] * row["TILES"] + row["TAIL"] + row["TAIL_2"]) * -(-tokens // row["BLOCK_Q"])
        head = labels["attention_backward_head"]
        trips = -(-tokens // head.constants["BLOCK_K"])
        return (
            offline.count_of_head(labels["attention_forward_row"], arch),
            offline.count_of_head(none["attention_forward_row"], arch),
            padded * row["BLOCK_Q"] / tokens**2,
            offline.count_of_head(head, arch, [trips] if trips > 1 else [])[0],
        )

    (forward, registers), (lean, lean_registers), padding, backward = benchmark.pedantic(measure, rounds=1)
    print(
        f"\ncounts, sm_{arch}, N={tokens}, D={head_dim}, bfloat16: forward {forward} ({registers} registers), without "
        f"labels {lean} ({lean_registers}): labels {100 * (forward / lean - 1):+.1f} %; "
        f"{32 * forward / tokens**2:.1f} a score, of which {padding:.2f} are computed for one needed; "
        f"backward {backward}"
    )
