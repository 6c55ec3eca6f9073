"""What the Triton kernels execute, counted in the code compiled for two architectures. Counts, not times: no GPU runs.

`pytest benchmarks/test_triton_counts.py -m slow --benchmark-only -s`.

Instructions are SASS, of all warps of all programs of a head: those of the listing, loops times their trips. Cycles are
what these take of each pipe of an A100 or H100 (rates: `triton_offline.pipe_cycles`): the busiest pipe bounds the time
from below, the issue of instructions is one of them.
"""

import pytest
import torch

from tlalign_kernels.backends import triton as backend
from tlalign_kernels.windows import Windows

if backend.triton is None:
    pytest.skip("triton can't be imported", allow_module_level=True)

import triton_offline as offline

from benchmarks.counts import PIPES, keep

pytestmark = pytest.mark.slow  # compiles for minutes

BACKWARDS = ("attention_backward_head", "attention_backward_queries", "attention_backward_keys")
SHAPES = {
    "N=197 D=64": (dict(tokens=197, head_dim=64, prefer=["attention_forward_row"]), "attention_forward_row"),
    "windows of 49 D=32 H=3": (
        dict(tokens=49, head_dim=32, heads=3, prefer=["attention_forward_heads"]),
        "attention_forward_heads",
    ),
}


HEAD = ["kernel", "instructions", "a score", *(f"cycles: {pipe}" for pipe in PIPES)]


def row_of(counts, arch, tokens):
    cycles = offline.pipe_cycles(counts, arch)
    total = counts.total()
    return [f"{total:.0f}", f"{32 * total / tokens**2:.1f}", *(f"{cycles[pipe]:.0f}" for pipe in PIPES)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_counts(benchmark, arch, name):
    options, forward = SHAPES[name]
    tokens, heads = options["tokens"], options.get("heads", offline.HEADS)

    def measure():
        launches = offline.record_packed(arch, **options)
        labels = launches[forward]
        rows = {"with labels": labels, "without": offline.record_packed(arch, sources=0, **options)[forward]}
        if forward == "attention_forward_row":
            rows["without, row sum by additions"] = offline.make_plain(labels)
            streams = offline.record_packed(arch, **{**options, "prefer": ["attention_forward_stream"]})
            rows["with labels, streaming"] = streams["attention_forward_stream"]
        for kernel in BACKWARDS:
            prefer = ["attention_backward_head" if "head" in kernel else "attention_backward_queries"]
            rows[kernel] = offline.record_packed(arch, **{**options, "prefer": prefer})[kernel]
        padded = labels.constants["PARTS_ROW"] * labels.constants["BLOCK_Q"] * -(-tokens // labels.constants["BLOCK_Q"])
        return padded, {
            row: (
                offline.count_of_head(launch, arch, heads),
                offline.programs_at_once(launch, arch) * launch.warps,
            )
            for row, launch in rows.items()
        }

    padded, rows = benchmark.pedantic(measure, rounds=1)
    computed = 32 * rows["with labels"][0]["MUFU.EX2"]
    least, table = rows["without"][0].total(), []
    for row, (counts, warps) in rows.items():
        more = "" if "backward" in row else f"{100 * (counts.total() / least - 1):+.1f} %"
        table.append([row, *row_of(counts, arch, tokens), warps, more])
    keep(
        benchmark,
        f"Triton, instructions and cycles of a head, sm_{arch}, {name}, bfloat16",
        [*HEAD, "resident warps", "over the least"],
        table,
        f"For each score that is needed tiles hold {padded / tokens**2:.2f}, and {computed / tokens**2:.2f} "
        "exponentials are computed: what it knows to be padding the compiler leaves out.",
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_counts_of_float32(benchmark, arch):
    def measure():
        launches = offline.record_packed(arch, 197, 64, torch.float32)
        return {
            name: offline.count_of_head(launch, arch)
            for name, launch in launches.items()
            if name in ("attention_forward_stream", *BACKWARDS)
        }

    rows = benchmark.pedantic(measure, rounds=1)
    keep(
        benchmark,
        f"Triton, instructions and cycles of a head, sm_{arch}, N=197 D=64, float32",
        HEAD,
        [[row, *row_of(counts, arch, 197)] for row, counts in rows.items()],
        "A product of float32 is three of TF32.",
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_counts_with_a_bias(benchmark, arch):
    def measure():
        launches = offline.record_packed(arch, 197, 64, offsets=True, mask=False)
        return {
            kernel: offline.count_of_head(launches[kernel], arch)
            for kernel in ("attention_forward_stream", *BACKWARDS[1:])
        }

    rows = benchmark.pedantic(measure, rounds=1)
    keep(
        benchmark,
        f"Triton, instructions and cycles of a head, sm_{arch}, N=197 D=64, bfloat16, with a bias",
        HEAD,
        [[row, *row_of(counts, arch, 197)] for row, counts in rows.items()],
        "The bias is that of all images.",
    )


@pytest.mark.skipif(not offline.PTXVM.exists(), reason="needs ptxvm")
@pytest.mark.parametrize("name", SHAPES)
def test_bytes(benchmark, name):
    options, _ = SHAPES[name]

    none, labels = benchmark.pedantic(lambda: [offline.forward_bytes(sources=s, **options) for s in (0, 1)], rounds=1)
    title = f"Triton, bytes that the kernels of a forward ask for, {name}, bfloat16"
    more = f"{100 * (labels / none - 1):+.1f} %"
    keep(benchmark, title, ["without labels", "with", "more"], [[none, labels, more]])


# Kernels for windows of so many tokens along each axis.
OF_WINDOWS = {
    7: ("attention_forward_row", "attention_forward_heads", "attention_backward_head"),
    12: ("attention_forward_window", "attention_forward_stream", *BACKWARDS),
    16: ("attention_forward_window", "attention_forward_stream"),
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("window", OF_WINDOWS)
def test_counts_in_windows_of_a_map(benchmark, arch, window):
    """Windows with a bias and its gradient against attention of as many tokens with a bias: what indexing costs."""
    heads, tokens = 3, window**2
    shifted = Windows((4 * window, 4 * window), (window, window), (window // 2, window // 2))
    maps = {
        "windows": shifted._replace(shift=(0, 0)),
        "shifted": shifted,
        "shifted, padded": shifted._replace(map_size=(4 * window - 1, 4 * window - 1)),
    }

    def measure():
        rows = {}
        for kernel in OF_WINDOWS[window]:
            prefer = ["attention_backward_queries" if kernel == "attention_backward_keys" else kernel]
            for name, windows in maps.items():
                launch = offline.record_windows(arch, windows, 32, heads=heads, prefer=prefer)[kernel]
                images = offline.IMAGES * windows.count()
                rows[f"{kernel}, {name}"] = offline.count_of_head(launch, arch, heads, images)
            of_images = offline.record_packed(arch, tokens, 32, heads=heads, prefer=prefer, offsets=True, mask=False)
            if kernel in of_images:
                rows[f"{kernel}, no map"] = offline.count_of_head(of_images[kernel], arch, heads)
        return rows

    rows = benchmark.pedantic(measure, rounds=1)
    keep(
        benchmark,
        f"Triton, instructions and cycles of a head of a window, sm_{arch}, N={tokens} D=32 H=3, bfloat16, with a bias",
        HEAD,
        [[row, *row_of(counts, arch, tokens)] for row, counts in rows.items()],
        "Code that is skipped is counted.",
    )


@pytest.mark.skipif(not offline.PTXVM.exists(), reason="needs ptxvm")
@pytest.mark.parametrize("window", [7, 8, 12, 16])
def test_bytes_in_windows_of_a_map(benchmark, window):
    windows = Windows((2 * window, 2 * window), (window, window), (window // 2, window // 2))

    def measure():
        kernel = "attention_forward_row" if window <= 8 else "attention_forward_window"
        return offline.forward_bytes_in_windows(windows, kernel, heads=3)

    asked, needed = benchmark.pedantic(measure, rounds=1)
    title = f"Triton, bytes of a forward in windows of {window} x {window} over those of all inputs and outputs once"
    keep(benchmark, title, ["loaded", "stored"], [[f"{of[0] / of[1]:.3f}" for of in zip(asked, needed, strict=True)]])
