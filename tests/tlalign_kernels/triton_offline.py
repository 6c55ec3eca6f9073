"""Triton launches without a GPU: what a call would launch, compiled ahead of time, counted, or executed by ptxvm."""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import tlalign_kernels as tlk
from tlalign_kernels.backends import triton as backend
from tlalign_kernels.backends.triton import kernels

PTXVM = Path(__file__).parents[3] / "shared" / "ptxvm"
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int64: "*i64"
}  # fmt: skip


def import_ptxvm():
    """The PTX emulator, or None where it is not there."""
    if not PTXVM.exists():
        return None
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
    arguments: dict[str, object]

    @property
    def name(self):
        return self.function.fn.__name__

    def compile(self, arch):
        """Triton's compiled kernel for a compute capability such as 80."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        indices = {name: self.function.arg_names.index(name) for name in self.divisible}
        source = ASTSource(
            fn=self.function,
            signature=self.signature,
            constexprs=self.constants,
            attrs={(index,): [["tt.divisibility", 16]] for index in indices.values()},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
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
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
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
    return Launch(function, grid, signature, constants, tuple(divisible), warps, stages, arguments)


def record(monkeypatch, run, arch=80):
    """Has the backend hand its launches to `run`, for tensors on the CPU, configured for a compute capability."""
    monkeypatch.setattr(backend, "kernels", Recorder(run))
    monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: [])
    monkeypatch.setattr(backend, "_capability", lambda device: arch)


IMAGES, HEADS = 2, 6


def record_packed(monkeypatch, arch, tokens, head_dim, dtype=torch.bfloat16, sources=1):
    """Launches of a forward and backward of self-attention on a packed projection, by the names of their kernels."""
    launches = []
    record(monkeypatch, launches.append, arch)
    qkv = torch.randn(IMAGES, tokens, 3, HEADS, head_dim).to(dtype).requires_grad_()
    share = torch.rand(IMAGES, tokens, sources) if sources else None
    tlk.attention_qkv(qkv, share, share, backend="triton")[0].sum().backward()
    return {launch.name: launch for launch in launches}


def count_of_head(launch, arch, trips=()):
    """SASS instructions of all warps of all programs of a head, and registers of a thread."""
    resources, instructions = disassemble(launch.compile(arch))
    programs = launch.grid[0] // (IMAGES * HEADS)
    return count_executed(instructions, list(trips)) * launch.warps * programs, resources["REG"]


def execute(launch):
    """Runs the sm_80 code of a launch on the CPU, with bounds and shared-memory races checked; returns the counts."""
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
        )
    )


def disassemble(compiled):
    """Usage of resources (REG, STACK, SHARED, LOCAL) of a compiled kernel, and its SASS instructions with addresses."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def run(option):
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage, text = run("-res-usage"), run("-sass")
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in re.findall(pattern, text)]
    # What follows the end of the program: a branch to itself and padding.
    while instructions[-1][1] in ("NOP", "BRA"):
        instructions.pop()
    return resources, instructions


def count_executed(instructions, trips):
    """SASS instructions that a warp executes, if the loops, in order of their addresses, run `trips` times.

    Loops must not be nested. What a branch skips is counted, and a loop's code that the compiler has unrolled or peeled
    counts as it stands: these are counts of the listing, not of a run.
    """
    index = {at: number for number, (at, _, _) in enumerate(instructions)}
    loops = []
    for number, (at, opcode, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        if target and int(target[1], 16) <= at:
            loops.append(number - index[int(target[1], 16)] + 1)
    if len(loops) != len(trips):
        raise ValueError(f"trips: expected {len(loops)} numbers, one for each loop, got {trips}")
    return len(instructions) + sum(length * (trip - 1) for length, trip in zip(loops, trips, strict=True))
