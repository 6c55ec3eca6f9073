"""What the kernels of csrc/cuda take of a multiprocessor and execute, without a GPU. Counts, not times.

`pytest benchmarks/test_cuda_counts.py -m slow --benchmark-only -s`. Launches are those of a call, recorded;
instructions are SASS, of all warps of all blocks of a head, and follow loops and branches as the emulator takes them
(`cuda_offline.count`), where those of the Triton kernels beside them are the listing, loops times their trips. Cycles
are what these take of each pipe of an A100 or H100 (`triton_offline.pipe_cycles`).
"""

import itertools
import shutil

import pytest

from tlalign_kernels.backends import triton as backend
from tlalign_kernels.windows import Windows

if backend.triton is None or shutil.which("nvcc") is None:
    pytest.skip("needs nvcc, and triton, which brings along what disassembles", allow_module_level=True)

import cuda_offline as offline
import triton_offline

from benchmarks.counts import PIPES, keep

pytestmark = pytest.mark.slow  # compiles and emulates for minutes

CALLS = {
    "N=197 D=64": dict(tokens=197, head_dim=64),
    # Windows: so many that a block takes the heads of one in turn.
    "N=49 D=32 H=3": dict(tokens=49, head_dim=32, heads=3, images=2048),
    "N=49 D=32 H=3, bias": dict(tokens=49, head_dim=32, heads=3, offsets=True),
    "N=197 D=64, bias": dict(tokens=197, head_dim=64, offsets=True),
    # In place: windows of a map, 7 of 16 with regions, so many that a block takes the heads of one in turn.
    "windows of 49": dict(windows=Windows((28, 28), (7, 7), (0, 0)), head_dim=32, heads=3, images=128),
    "shifted": dict(windows=Windows((28, 28), (7, 7), (3, 3)), head_dim=32, heads=3, images=128),
    "windows of 144": dict(windows=Windows((24, 24), (12, 12), (6, 6)), head_dim=32, heads=3, images=128),
    "N=577 D=64": dict(tokens=577, head_dim=64),
    "N=197 D=80": dict(tokens=197, head_dim=80),
    "N=197 D=128": dict(tokens=197, head_dim=128),
}
# Calls of which a Hopper takes kernels of its own.
ON_HOPPER, OF_HOPPER = ["N=197 D=64", "N=577 D=64"], "on Hopper"
# Which Triton kernel is compared, where there is a choice.
TRITON = {"N=197 D=64": "attention_forward_row", "N=49 D=32 H=3": "attention_forward_heads"}
# Calls of windows, and that on windows which were copied before, with the same bias and its gradient.
WINDOWS = ["windows of 49", "shifted", "windows of 144", "N=49 D=32 H=3, bias"]


emulated = pytest.mark.skipif(not triton_offline.PTXVM.exists(), reason="needs ptxvm")


@pytest.mark.parametrize("arch", offline.LIMITS)
def test_resources(benchmark, arch):
    def measure():
        launches = []
        for name, call in CALLS.items():
            offline.record_call(lambda launch, _, name=name: launches.append((name, launch)), **call)
        if arch == 90:
            with offline.on_hopper():
                for name in ON_HOPPER:
                    offline.record_call(
                        lambda launch, _, name=name: launches.append((f"{name}, {OF_HOPPER}", launch)), **CALLS[name]
                    )
        for _, launch in launches:
            offline.assemble(launch.kernel, arch)
        return launches

    launches = benchmark.pedantic(measure, rounds=1)
    spilling, table = [], []
    for name, launch in launches:
        kernel = offline.name_of(launch.kernel)
        if "attention" not in kernel or (OF_HOPPER in name and "hopper" not in kernel):
            continue
        resources, blocks = offline.resources_of(launch, arch), offline.resident_blocks(launch, arch)
        spilled, least = resources["STACK"] + resources["LOCAL"], min(blocks, key=blocks.get)
        warps = blocks[least] * launch.block[0] // 32
        table.append([name, kernel, resources["REG"], spilled, resources["SHARED"], blocks[least], warps, least])
        assert blocks[least] > 0
        spilling += [(name, kernel)] * (spilled > 0)
    head = ["call", "kernel", "registers", "bytes spilled", "bytes shared", "blocks", "warps", "limited by"]
    keep(benchmark, f"CUDA, resources of a kernel and what a multiprocessor has of it at once, sm_{arch}", head, table)
    assert spilling == []


@emulated
@pytest.mark.parametrize("name", CALLS)
def test_conflicts(benchmark, name):
    def measure():
        conflicts = {}

        def run(launch, tensors):
            blocks = offline.some_blocks(launch, CALLS[name].get("images", offline.IMAGES))
            counts = offline.execute(launch, tensors, count_conflicts=True, ctas=blocks)
            conflicts[offline.name_of(launch.kernel)] = counts["conflicts"], counts.get("shared_wavefronts", 0)

        offline.record_call(run, **CALLS[name])
        return conflicts

    found = benchmark.pedantic(measure, rounds=1)
    rows = [[kernel, wavefronts, conflicts.total()] for kernel, (conflicts, wavefronts) in found.items()]
    title = f"CUDA, wavefronts of shared memory, and those that conflicts of banks add, {name}"
    keep(benchmark, title, ["kernel", "wavefronts", "by conflicts"], rows)
    assert all(conflicts == 0 for _, _, conflicts in rows), found


@emulated
@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize("arch", [80, 90])
def test_counts(benchmark, arch, name):
    tokens = CALLS[name]["tokens"]

    def measure():
        def of_triton(*prefer, **options):
            call = {option: value for option, value in CALLS[name].items() if option != "images"}
            return triton_offline.counts_of_head(arch, prefer=[TRITON[name], *prefer], **call, **options)

        def of_cuda(**options):
            return offline.counts_of_head(arch, **CALLS[name], **options)

        of_hopper = {}
        if arch == 90 and name in ON_HOPPER:
            with offline.on_hopper():
                of_hopper = {f"CUDA {OF_HOPPER}": of_cuda(), f"CUDA {OF_HOPPER}, no labels": of_cuda(sources=0)}
        return {
            "CUDA": of_cuda(),
            "CUDA, no labels": of_cuda(sources=0),
            **of_hopper,
            # With both ways to do the backward.
            "Triton": of_triton() | of_triton("attention_backward_head"),
            "Triton, no labels": of_triton(sources=0),
        }

    rows = benchmark.pedantic(measure, rounds=1)
    table, notes = [], []
    for row, counts in rows.items():
        for kernel, of_kernel in counts.items():
            if "no labels" in row and "backward" in kernel:
                continue  # Labels have no part in it.
            cycles, total = triton_offline.pipe_cycles(of_kernel, arch), of_kernel.total()
            of_pipes = [f"{cycles[pipe]:.0f}" for pipe in PIPES]
            table.append([row, kernel, f"{total:.0f}", f"{32 * total / tokens**2:.1f}", *of_pipes])
    cuda = ["CUDA", *([f"CUDA {OF_HOPPER}"] if f"CUDA {OF_HOPPER}" in rows else [])]
    for of, kernels in (*itertools.product(cuda, ("forward", "")), ("Triton", "forward")):

        def total(row, kernels=kernels):
            return sum(of.total() for kernel, of in rows[row].items() if kernels in kernel and "backward" not in kernel)

        which = "attention_forward alone" if kernels else "with the kernels before and after"
        notes.append(f"Labels, {of}, {which}: {100 * (total(of) / total(f'{of}, no labels') - 1):+.1f} %.")
    head = ["", "kernel", "instructions", "a score", *(f"cycles: {pipe}" for pipe in PIPES)]
    keep(benchmark, f"Instructions and cycles of a head, sm_{arch}, {name}, bfloat16", head, table, *notes)


@emulated
@pytest.mark.parametrize("arch", [80, 90])
def test_counts_of_windows(benchmark, arch):
    def measure():
        return {name: offline.counts_of_head(arch, **CALLS[name]) for name in WINDOWS}

    rows = benchmark.pedantic(measure, rounds=1)
    table, notes = [], []
    for row, counts in rows.items():
        for kernel, of_kernel in counts.items():
            cycles = triton_offline.pipe_cycles(of_kernel, arch)
            table.append([row, kernel, f"{of_kernel.total():.0f}", *(f"{cycles[pipe]:.0f}" for pipe in PIPES)])
        forward = sum(of.total() for kernel, of in counts.items() if kernel == "attention_forward")
        backward = sum(of.total() for kernel, of in counts.items() if "backward" in kernel)
        notes.append(f"{row}: attention_forward {forward:.0f}, backward {backward:.0f}.")
    title = f"CUDA, instructions and cycles of a head of a window, sm_{arch}, bfloat16, with the gradient of the bias"
    keep(benchmark, title, ["", "kernel", "instructions", *(f"cycles: {pipe}" for pipe in PIPES)], table, *notes)


@emulated
@pytest.mark.parametrize("name", ["windows of 49", "shifted", "windows of 144"])
def test_bytes_of_windows(benchmark, name):
    """What a block moves: Q, K, V and O of a head of a window are 4 N D numbers of 2 bytes, its bias N**2 of 4."""
    windows, heads, dim = (CALLS[name][key] for key in ("windows", "heads", "head_dim"))
    images = CALLS[name].get("images", offline.IMAGES)

    def measure():
        moved = {}

        def run(launch, tensors):
            blocks = offline.some_blocks(launch, images)
            counts = offline.execute(launch, tensors, check_races=False, check_uninit=False, ctas=blocks)
            moved[offline.name_of(launch.kernel)] = counts

        offline.record_call(run, **CALLS[name])
        return moved

    of_row = offline.IMAGES * windows.count() * heads * windows.tokens() * dim * 2
    table = []
    for kernel, counts in benchmark.pedantic(measure, rounds=1).items():
        if "attention" in kernel:
            copied, stored = counts.get("cp_async_bytes", 0), counts["global_store_bytes"]
            others = counts["global_load_bytes"] - copied
            table.append([kernel, *(f"{of / of_row:.2f}" for of in (copied, others, stored))])
    title = f"CUDA, bytes over those of the queries of all heads, {name}"
    head = ["kernel", "copied (Q, K, V, O, dO, labels)", "loaded else", "stored"]
    keep(benchmark, title, head, table)
