"""What bounds the attention kernels, by arithmetic: writes `results/roofline.md` and its picture. Nothing is measured.

`python -m benchmarks.roofline`. Peaks: data sheets of NVIDIA A100 (40 GB SXM) and H100 (SXM; dense); multiprocessors
and clocks: white papers of their architectures. Instructions are counted as in `test_cuda_counts.py`, with nvcc, triton
and the emulator.
"""

import argparse
import importlib.util
import itertools
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.report import table

PAGE = Path(__file__).parent / "results" / "roofline.md"
BACKENDS = {"CUDA": "full", "Triton": "left"}  # and how their marks are filled


class Device(NamedTuple):
    """A GPU by its public figures: GHz of the boost clock, dense 16-bit tensor TFLOPS, GB/s of memory."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    tflops: float
    bandwidth: float


class Shape(NamedTuple):
    """A call; `triton` is its Triton kernel, where that one's instructions can be counted."""

    name: str
    images: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    triton: str | None = None


class Work(NamedTuple):
    """What a call can't do without, and the part of labels in it."""

    bytes: int
    label_bytes: int
    flops: int
    label_flops: int
    exponentials: int


DEVICES = [Device("A100", 80, 108, 1.41, 312, 1555), Device("H100", 90, 132, 1.83, 989, 3350)]
SHAPES = [
    Shape("DeiT-S, N=197, D=64", 128, 6, 197, 197, 64, "attention_forward_row"),
    Shape("DeiT-B at 384, N=577, D=64", 128, 12, 577, 577, 64),
    Shape("Swin-T stage 1, windows of 49, D=32", 128 * 64, 3, 49, 49, 32, "attention_forward_heads"),
    Shape("PVT-S stage 1, Nq=3136, Nk=49, D=64", 128, 1, 3136, 49, 64),
]
CALLS = [(shape, direction) for shape in SHAPES for direction in ("forward", "backward")]

HEAD = """# Roofline of the attention kernels

**COMPUTED, NOT MEASURED.** Times of a GPU are in `h200/report.md`. These are sums, made by
`python -m benchmarks.roofline`, of public peak figures (data sheets of NVIDIA A100 40 GB SXM and H100 SXM) and of
counts of compiled code. A floor is a time that nothing can beat; how far above it a kernel runs, only a GPU can tell.

![The same as a picture](roofline.png)

## What has to be moved and computed

A batch of 128 images in bfloat16, labels of one extra source (Swin: 64 windows an image, without the bias). Inputs are
read once, outputs written once, nothing of Nq x Nk; products that the backward does again are counted. Labels have no
part in the backward. Their bytes are the shares, read and written; their FLOPs a multiply-add a score (on tensor cores
a block of eight columns beside V: 6 % more at D=64, 13 % at D=32). The last column: what it would add to write the
attention matrix in 16 bits and to read it once.
"""
DEVICE = """## {0.name}: microseconds at least

Floors: {0.bandwidth} GB/s of memory, {0.tflops} TFLOPS of tensor cores, 16 exponentials a clock and multiprocessor
({0.multiprocessors} at {0.clock} GHz). Then what the code needs if all heads spread evenly: the issue of its
instructions, four a clock; its busiest pipe (`load/store`: of shared and global memory, 128 bytes a clock); and that
over the floor. Below 1, the code could reach the floor; latencies, which no pipe shows, come on top.
"""
NOTES = """
Code is counted as by `test_cuda_counts.py`, where nvcc, triton and the emulator are there; - is not counted. CUDA: all
kernels of a call, on both GPUs those that any has, though where D is 64 an H100 takes its own for 193 to 200 tokens and
for the forward of more. Triton: those of attention. The pipe of integers is left out, since moves and branches count as
such. `mma.sync` may not reach H100's tensor peak, which needs warp groups.
"""


def work(shape, direction):
    """Bytes and operations of a call on 16-bit tensors, with labels of one extra source.

    The forward reads query, key and value, writes output and log-sum-exp, and has two products. The backward reads all
    these and the output's gradient, writes three gradients, and has five products. Labels: the shares of keys and the
    residual are read and new shares written.
    """
    queries, keys = shape.images * shape.queries, shape.images * shape.keys
    scores = shape.heads * queries * shape.keys
    rows = shape.heads * (queries + keys) * shape.head_dim * 2
    log_sum_exp = 4 * shape.heads * queries
    if direction == "backward":
        return Work(4 * rows + log_sum_exp, 0, 5 * 2 * scores * shape.head_dim, 0, scores)
    labels = 4 * (keys + 2 * queries)
    flops = 2 * 2 * scores * shape.head_dim
    return Work(2 * rows + log_sum_exp + labels, labels, flops + 2 * scores, 2 * scores, scores)


def matrix_bytes(shape):
    """What writing the attention matrix in 16 bits and reading it once takes."""
    return 2 * 2 * shape.images * shape.heads * shape.queries * shape.keys


def floors(done, device):
    """Microseconds that memory, tensor cores and special functions need for some work."""
    return {
        "memory": done.bytes / device.bandwidth / 1e3,
        "tensor cores": done.flops / device.tflops / 1e6,
        "exponentials": done.exponentials / (16 * device.multiprocessors * device.clock) / 1e3,
    }


def microseconds(cycles, shape, device):
    """Time of so many cycles a head, all heads spread evenly over the multiprocessors."""
    return cycles * shape.images * shape.heads / (device.multiprocessors * device.clock) / 1e3


def count_code():
    """Microseconds of issue and of the busiest pipe, and its name, by device, shape, backend and direction."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    if shutil.which("nvcc") is None or importlib.util.find_spec("triton") is None:
        return {}
    import cuda_offline
    import triton_offline

    if not triton_offline.PTXVM.exists():
        return {}
    needed = {}
    for device, shape in itertools.product(DEVICES, SHAPES):
        call = dict(tokens=shape.queries, head_dim=shape.head_dim, heads=shape.heads)
        keys = None if shape.keys == shape.queries else shape.keys
        # So many images make a block take the heads of a window in turn.
        images = min(shape.images, 2048)
        kernels = [("CUDA", cuda_offline.counts_of_head(device.arch, keys=keys, images=images, **call))]
        if shape.triton:
            kernels += [("Triton", triton_offline.counts_of_head(device.arch, prefer=[shape.triton], **call))]
        for backend, name, counts in [(backend, *kernel) for backend, of in kernels for kernel in of.items()]:
            cycles = triton_offline.pipe_cycles(counts, device.arch)
            # Not that of the GPU, which has a floor of its own.
            cycles["load/store"] = cycles.pop("memory")
            del cycles["integer"]
            times = {pipe: microseconds(cycles[pipe], shape, device) for pipe in cycles}
            most = max(times, key=times.get)
            which = device, shape, backend, "backward" if "backward" in name else "forward"
            # One kernel runs after another; the pipe is that of the longest.
            issue, busiest, longest = needed.get(which, (0, 0, (0, "")))
            needed[which] = issue + times["issue"], busiest + times[most], max(longest, (times[most], most))
    return {which: (issue, busiest, pipe) for which, (issue, busiest, (_, pipe)) in needed.items()}


def table_of_work():
    head = ["call", "", "MB", "labels", "GFLOP", "labels", "FLOP a byte", "a matrix would add"]
    rows = []
    for shape, direction in CALLS:
        done, matrix = work(shape, direction), matrix_bytes(shape)
        moved = [f"{done.bytes / 1e6:.1f}", f"{100 * done.label_bytes / done.bytes:.1f} %"]
        computed = [f"{done.flops / 1e9:.2f}", f"{100 * done.label_flops / done.flops:.1f} %"]
        more = f"{matrix / 1e6:.0f} MB, {100 * matrix / done.bytes:+.0f} %"
        rows.append([shape.name, direction, *moved, *computed, f"{done.flops / done.bytes:.0f}", more])
    return table(head, rows)


def table_of_times(device, code):
    head = ["call", "", "memory", "tensor cores", "exponentials", "bound by"]
    head += [f"{backend}: {what}" for backend in BACKENDS for what in ("issue", "busiest", "over floor")]
    rows = []
    for shape, direction in CALLS:
        times = floors(work(shape, direction), device)
        row = [shape.name, direction, *(f"{time:.1f}" for time in times.values()), max(times, key=times.get)]
        for backend in BACKENDS:
            issue, busiest, pipe = code.get((device, shape, backend, direction), (None, None, None))
            over = issue and busiest / max(times.values())
            row += [f"{issue:.1f}", f"{busiest:.1f} {pipe}", f"{over:.2f}"] if issue else ["-"] * 3
        rows.append(row)
    return table(head, rows)


def draw(code, path):
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    figure.suptitle("COMPUTED, NOT MEASURED: attention with labels, bfloat16, under the peaks of two GPUs")
    for axis, device in zip(figure.subplots(1, 2, sharey=True), DEVICES, strict=True):
        ridge = device.tflops * 1e3 / device.bandwidth
        axis.loglog([10, ridge, 1000], [device.bandwidth / 100, device.tflops, device.tflops], color="black")
        for shape, direction in CALLS:
            done, colour = work(shape, direction), f"C{SHAPES.index(shape)}"
            style = dict(marker="o" if direction == "forward" else "^", color=colour, linestyle="", markersize=8)
            x, roof = done.flops / done.bytes, done.flops / max(floors(done, device).values()) / 1e6
            axis.plot(x, roof, fillstyle="none", label=f"{shape.name}, {direction}", **style)
            for backend, fill in BACKENDS.items():
                if found := code.get((device, shape, backend, direction)):
                    allowed = done.flops / found[1] / 1e6
                    axis.plot([x, x], [roof, allowed], color=colour, linewidth=0.8)
                    axis.plot(x, allowed, fillstyle=fill, **style)
        axis.set(title=f"{device.name}: {device.tflops} TFLOPS, {device.bandwidth} GB/s", xlabel="FLOP a byte")
        axis.grid(alpha=0.3, which="both")
    for backend, fill in BACKENDS.items():
        label = f"what the {backend} code allows (over the roof: no bound)"
        axis.plot([], [], "o", color="grey", fillstyle=fill, markersize=8, label=label)
    figure.axes[0].set_ylabel("TFLOPS")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.parse_args()
    code = count_code()
    if not code:
        parser.error("expected nvcc, triton and the emulator (no part of this repository), which count instructions")
    draw(code, PAGE.with_suffix(".png"))
    tables = [part for device in DEVICES for part in (DEVICE.format(device), table_of_times(device, code))]
    PAGE.write_text("\n".join([HEAD, table_of_work(), *tables]) + NOTES)
