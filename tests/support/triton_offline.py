"""Triton launches without a GPU: what a call would launch, compiled ahead of time, counted, or executed by ptxvm."""

import collections
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import tlalign_kernels as tlk
from tlalign_kernels.backends import triton as backend
from tlalign_kernels.backends.triton import kernels

PTXVM = Path(__file__).parents[3] / "shared" / "ptxvm"
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int64: "*i64"
}  # fmt: skip


def import_ptxvm():
    """The PTX emulator, where `PTXVM` exists."""
    if str(PTXVM) not in sys.path:
        sys.path.insert(0, str(PTXVM))
    import ptxvm

    return ptxvm


@dataclass(frozen=True)
class Launch:
    """A kernel, specialised as Triton's runtime would for these arguments."""

    function: object
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    registers: int | None
    arguments: dict[str, object]

    @property
    def name(self):
        return self.function.fn.__name__

    def compile(self, arch):
        """Triton's compiled kernel for a compute capability such as 80."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        indices = {name: self.function.arg_names.index(name) for name in self.divisible}
        source = ASTSource(
            fn=self.function,
            signature=self.signature,
            constexprs=self.constants,
            attrs={(index,): [["tt.divisibility", 16]] for index in indices.values()},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers, **backend._FUSED}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


class Recorder:
    """Stands in for the module of kernels; `run` is called with each launch."""

    def __init__(self, run):
        self.run = run

    def __getattr__(self, name):
        function = getattr(kernels, name)

        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **options: self.run(make_launch(function, grid, args, options))

        return Kernel()


def make_launch(function, grid, args, options):
    options = dict(options)
    assert options.pop("enable_fp_fusion")
    warps, stages, registers = options.pop("num_warps", 4), options.pop("num_stages", 3), options.pop("maxnreg", None)
    values = {**dict(zip(function.arg_names, args, strict=False)), **options}
    assert set(values) == set(function.arg_names)
    signature, constants, divisible, arguments = {}, {}, [], {}
    for name in function.arg_names:
        value = values[name]
        if name in options or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        arguments[name] = value
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return Launch(function, grid, signature, constants, tuple(divisible), warps, stages, registers, arguments)


def record(monkeypatch, run, arch=80):
    """Has the backend hand its launches to `run`, for tensors on the CPU, configured for a compute capability."""
    monkeypatch.setattr(backend, "kernels", Recorder(run))
    monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: [])
    monkeypatch.setattr(backend, "_capability", lambda device: arch)


IMAGES, HEADS = 2, 6


def record_packed(
    arch, tokens, head_dim, dtype=torch.bfloat16, sources=1, heads=HEADS, prefer=(), offsets=False, mask=True
):
    """Launches of a forward and backward of self-attention on a packed projection, by the names of their kernels.

    Where there is a choice, a kernel named in `prefer` is taken. `offsets`: with a bias, its gradient, and a mask, if
    `mask` lets there be one.
    """
    qkv = torch.randn(IMAGES, tokens, 3, heads, head_dim).to(dtype).requires_grad_()
    share = torch.rand(IMAGES, tokens, sources) if sources else None
    bias = torch.randn(heads, tokens, tokens, dtype=dtype, requires_grad=True) if offsets else None
    mask = torch.randn(IMAGES, 1, tokens, tokens) if offsets and mask else None
    return record_call(arch, prefer, lambda: tlk.attention_qkv(qkv, share, share, bias, mask, backend="triton"))


def record_windows(arch, windows, head_dim, dtype=torch.bfloat16, sources=1, heads=HEADS, prefer=(), has_bias=True):
    """The same of attention within windows of maps."""
    of_map, tokens = (IMAGES, *windows.map_size), windows.tokens()
    qkv = torch.randn(*of_map, 3, heads, head_dim).to(dtype).requires_grad_()
    share = torch.rand(*of_map, sources) if sources else None
    bias = torch.randn(heads, tokens, tokens, dtype=dtype, requires_grad=True) if has_bias else None
    options = dict(window_size=windows.window_size, shift=windows.shift, bias=bias, backend="triton")
    return record_call(arch, prefer, lambda: tlk.window_attention(qkv, share, share, **options))


def record_call(arch, prefer, call):
    """Launches of a call of an operator and of its backward, the first of each kernel; see `record_packed`."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        record(patch, launches.append, arch)
        for name in ("forward_configs", "backward_configs"):
            configs = getattr(backend, name)
            patch.setattr(
                backend,
                name,
                lambda shape, of=configs: sorted(of(shape), key=lambda config: config[0].kernel not in prefer),
            )
        output, _ = call()
        output.sum().backward()
    first = {}
    for launch in launches:
        first.setdefault(launch.name, launch)
    return first


@triton.jit
def plain_forward_row(
    query, output, log_sum_exp, factor, HEADS: tl.constexpr, QUERIES: tl.constexpr, ROW: tl.constexpr,
    GAP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What `attention_forward_row` is without labels if the row sum is formed by additions, to compare with."""
    block, head, image = kernels._program((QUERIES + BLOCK_Q - 1) // BLOCK_Q, HEADS)
    first = block * BLOCK_Q
    query += image * (QUERIES * ROW) + head * D
    key = query + GAP
    value = key + GAP
    q = kernels._load_rows(query, ROW, first, QUERIES, BLOCK_Q, D, (D,), True)
    row = first + tl.arange(0, BLOCK_Q)
    COUNT: tl.constexpr = len(TILES)
    scores = ()
    for i in tl.static_range(COUNT):
        of_tile = kernels._scores(
            q, key, ROW, row, QUERIES, kernels._first(TILES, i), QUERIES, 1.0, None, 0, 0, None, 0, 0,
            kernels._size(TILES, i), i == COUNT - 1, D, (D,), 0, 0, "ieee",
        )  # fmt: skip
        scores = scores + (of_tile,)  # noqa: RUF005 - Triton takes no unpacking
    lanes = kernels._max_of_lanes(scores[0])
    for i in tl.static_range(1, COUNT):
        lanes = tl.maximum(lanes, kernels._max_of_lanes(scores[i]))
    highest = tl.max(lanes, 1) * factor
    accumulated = kernels._zeros(BLOCK_Q, (D,))
    sums = tl.zeros(lanes.shape, tl.float32)
    for i in tl.static_range(COUNT):
        p = tl.exp2(scores[i] * factor - highest[:, None])
        sums += tl.sum(tl.reshape(p, (BLOCK_Q, p.shape[1] // 8, 8)), 1)
        v = kernels._load_rows(
            value, ROW, kernels._first(TILES, i), QUERIES, kernels._size(TILES, i), D, (D,), i == COUNT - 1
        )
        accumulated = kernels._add_mixed(p.to(v[0].dtype), v, accumulated, (D,), "ieee")
    total = tl.sum(sums, 1)
    start = output + (image * QUERIES * HEADS + head) * D
    accumulated = kernels._times(accumulated, (1.0 / total)[:, None], (D,))
    kernels._store_rows(start, HEADS * D, first, QUERIES, accumulated, BLOCK_Q, D, (D,))
    known = (highest + tl.log2(total)) * kernels.LN_2
    tl.store(log_sum_exp + (image * HEADS + head) * QUERIES + row, known, mask=row < QUERIES)


def make_plain(labels):
    """The launch of `plain_forward_row` beside one of `attention_forward_row`."""
    names = {"ROW": "QUERY_ROW"}
    constants = {
        name: labels.constants[names.get(name, name)] for name in plain_forward_row.arg_names if name.isupper()
    }
    arguments = [labels.arguments[name] for name in ("query", "output", "log_sum_exp", "factor")]
    options = dict(num_warps=labels.warps, num_stages=labels.stages, maxnreg=labels.registers, **backend._FUSED)
    return make_launch(plain_forward_row, labels.grid, arguments, {**constants, **options})


def trips(launch):
    """How often the loop of a kernel runs, if it has one."""
    sizes = {**launch.arguments, **launch.constants}
    of_kernel = {
        "attention_forward_heads": ("HEADS", None),
        "attention_forward_stream": ("keys", "TILE"),
        "attention_forward_window": ("QUERIES", "BLOCK_Q"),
        "attention_backward_head": ("KEYS", "BLOCK_K"),
        "attention_backward_keys": ("queries", "BLOCK_Q"),
        "attention_backward_queries": ("keys", "BLOCK_K"),
    }
    whole, step = of_kernel.get(launch.name, (None, None))
    trips = -(-sizes.get(whole, 1) // sizes.get(step, 1))
    # The last tile of this one follows the loop if it has a size of its own.
    tail = {"attention_forward_stream": "TAIL", "attention_backward_head": "TAIL_K"}.get(launch.name)
    return trips - 1 if tail and sizes[tail] else trips


def count_of_head(launch, arch, heads=HEADS, images=IMAGES):
    """SASS instructions of all warps of all programs of a head, by opcode; windows count as images."""
    _, instructions = disassemble(launch.compile(arch))
    warps_of_head = launch.warps * launch.grid[0] / (images * heads)
    counts = collections.Counter()
    for opcode, times in executions(instructions, trips(launch)):
        counts[opcode] += times * warps_of_head
    return counts


def counts_of_head(arch, heads=HEADS, **options):
    """SASS instructions of a head by kernel of attention and opcode; see `record_packed`."""
    launches = record_packed(arch, heads=heads, **options)
    return {name: count_of_head(launch, arch, heads) for name, launch in launches.items() if "attention" in name}


def programs_at_once(launch, arch):
    """Programs that the 65536 registers of a multiprocessor hold; a warp takes them by 256."""
    registers = disassemble(launch.compile(arch))[0]["REG"]
    return 65536 // (-(-registers // 8) * 8 * 32 * launch.warps)


# Marks a product of a warp group whose left factor lies in shared memory, too.
SHARED_LEFT = ".left"


def with_left(opcode, rest):
    """An opcode, of SASS whose operands are in `rest`, marked if it is such a product."""
    is_such = opcode.startswith("HGMMA") and re.match(r"\s*R\d+, gdesc", rest)
    return opcode + SHARED_LEFT if is_such else opcode


def pipe_cycles(counts, arch):
    """Cycles that each pipe of a multiprocessor is busy with counted instructions: A100 (80) or H100 (90).

    Rates: CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic Instructions" (results a cycle: 64 or 128
    float operations, 64 integer ones, 16 special functions, 32 shuffles), four instructions issued a cycle, 32 lanes of
    4 bytes loaded or stored, and the dense 16-bit tensor peak of 312 (A100, 1.41 GHz, 108 multiprocessors) or 989
    TFLOPS (H100, 1.83 GHz, 132): 1024 or 2048 multiply-adds, half as many of TF32. What HGMMA reads of shared memory is
    part of the memory.
    """
    cycles = collections.Counter()
    for opcode, times in counts.items():
        name, _, rest = opcode.partition(".")
        cycles["issue"] += times / 4
        shape = re.match(r"(\d+)x(\d+)x(\d+)", rest)
        if name in ("HMMA", "HGMMA"):
            size = 4 if "TF32" in rest else 2
            # A warp group's product is issued by each of its four warps.
            products = math.prod(map(int, shape.groups())) / 4 if shape else 16 * 8 * 32 / size
            cycles["tensor"] += times * products * size / {80: 2048, 90: 4096}[arch]
            if shape:
                rows, columns, depth = map(int, shape.groups())
                numbers = columns * depth + (rows * depth if opcode.endswith(SHARED_LEFT) else 0)
                cycles["memory"] += times * numbers * size / 128 / 4
        elif name == "MUFU":
            cycles["special"] += times * 32 / 16
        elif name in ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDSM", "STSM", "LDGSTS", "SHFL"):
            width = re.search(r"\.(64|128|[24])(\.|$)", opcode)
            cycles["memory"] += times * {None: 1, "64": 2, "128": 4, "2": 2, "4": 4}[width and width[1]]
        elif name in ("FFMA", "FMUL", "FADD"):
            cycles["float"] += times * 32 / {80: 64, 90: 128}[arch]
        else:
            cycles["integer"] += times * 32 / 64
    return cycles


def execute(launch, programs=None):
    """Runs the sm_80 code of a launch on the CPU, with bounds and shared-memory races checked; returns the counts.

    `programs`: only the last so many.
    """
    (grid,) = launch.grid
    compiled = launch.compile(80)
    return (
        import_ptxvm()
        .Module(compiled.asm["ptx"])
        .launch(
            None,
            grid=launch.grid,
            block=(32 * launch.warps, 1, 1),
            args=list(launch.arguments.values()),
            shared_bytes=compiled.metadata.shared,
            check_races=True,
            ctas=None if programs is None else [(number, 0, 0) for number in range(grid)[-programs:]],
        )
    )


def forward_bytes(**options):
    """Bytes that the kernels of a forward ask global memory for, see `record_packed`; executed by ptxvm."""
    launches = [launch for launch in record_packed(80, **options).values() if "backward" not in launch.name]
    counts = [execute(launch) for launch in launches]
    return sum(count["global_load_bytes"] + count["global_store_bytes"] for count in counts)


def forward_bytes_in_windows(windows, kernel, heads):
    """Bytes that a kernel loads and stores, executed by ptxvm, and those that it has to, as two pairs.

    To load: the projection once, for each head of a window its bias once, rows rounded up to eight keys, and the packed
    labels. To store: the output, the log-sum-exp, and what is computed of the labels.
    """
    launches = record_windows(80, windows, 32, heads=heads, prefer=[kernel])
    for name in ("arrange_bias", "pack_labels"):
        execute(launches[name])
    count, launch = execute(launches[kernel]), launches[kernel]
    size = {name: tensor.nbytes for name, tensor in launch.arguments.items() if isinstance(tensor, torch.Tensor)}
    pairs, tokens = launch.arguments["log_sum_exp"].shape[0] * heads, windows.tokens()
    bias = pairs * tokens * -(-tokens // 8) * 8 * launch.arguments["bias"].element_size()
    takes_all_heads = "share" in size
    labels = size["parts"] * (1 if takes_all_heads else heads) + size.get("residual", 0)
    made = size["output"] + size["log_sum_exp"] + size["share" if takes_all_heads else "head_share"]
    return (count["global_load_bytes"], count["global_store_bytes"]), (3 * size["output"] + bias + labels, made)


def print_of(tool, *arguments):
    """What a tool that Triton brings along prints: `cuobjdump` or `nvdisasm`."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# An instruction of SASS as these tools print it: address, opcode (after a predicate, if any), operands.
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def resource_usage(path):
    """Names of the kernels of a file, for each architecture, and their resources (REG, STACK, SHARED, LOCAL)."""
    found = re.findall(r"Function (\S+):\n(.*)", print_of("cuobjdump", "-res-usage", path))
    return [
        (name, {kind: int(number) for kind, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)})
        for name, usage in found
    ]


def disassemble(compiled):
    """Usage of resources (REG, STACK, SHARED, LOCAL) of a compiled kernel, and its SASS instructions with addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, resources),) = resource_usage(file.name)
        text = print_of("cuobjdump", "-sass", file.name)
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in INSTRUCTION.findall(text)]
    # What follows the end of the program: a branch to itself and padding.
    while instructions[-1][1] == "NOP" or instructions[-1][2].strip() == hex(instructions[-1][0]):
        instructions.pop()
    return resources, instructions


def loops_of(instructions):
    """Where the loops of SASS are, as ranges."""
    index = {at: number for number, (at, _, _) in enumerate(instructions)}
    loops = []
    for number, (at, opcode, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) <= at:
            loops.append(range(index[int(target[1], 16)], number + 1))
    return loops


def executions(instructions, trips):
    """Opcodes of a warp's SASS, and how often each is executed if the loop runs `trips` times.

    There must be one loop at most. What a branch skips is counted, and a loop's code that the compiler has unrolled or
    peeled counts as it stands: these are counts of the listing, not of a run.
    """
    loops = loops_of(instructions)
    if len(loops) > 1 or (trips > 1 and not loops):
        raise ValueError(f"trips: expected the trips of {len(loops)} loops, got {trips}")
    for number, (_, opcode, rest) in enumerate(instructions):
        yield with_left(opcode, rest), trips if loops and number in loops[0] else 1
