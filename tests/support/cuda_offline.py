"""CUDA launches without a GPU: recorded by a stand-in for CUDA's runtime, and executed by ptxvm."""

import collections
import contextlib
import functools
import importlib
import importlib.util
import re
import shutil
import statistics
import subprocess
import sysconfig
import tempfile
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch
from triton_offline import HEADS, IMAGES, INSTRUCTION, import_ptxvm, print_of, resource_usage, with_left

import tlalign_kernels as tlk
from tlalign_kernels.backends import cuda as backend

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted({*CUDA.glob("*.c*"), Path(__file__).with_name("cuda_recorder.cpp")} - {CUDA / "without_hopper.cpp"})
HOPPER = sorted(CUDA.glob("hopper*.cu"))


@dataclass(frozen=True)
class Launch:
    """A kernel, by its mangled name, and what it was to be launched with: `addresses` of bytes of its parameters."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: bytes
    addresses: list[int]
    stream: int


def _nvcc(*options):
    return ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *options]


def installed(source):
    """What the installation compiled a source of kernels to, and its PTX, if it did so and it is not old."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").glob("**/*.*"))
    for compiled in ROOT.glob(f"build/cmake-*/CMakeFiles/tlalign_cuda.dir/csrc/cuda/{source.name}.o"):
        if compiled.stat().st_mtime > newest:
            _, version, text = print_of("cuobjdump", "-ptx", "-arch", "sm_80", compiled).partition(".version")
            if text:
                return compiled, version + text[: text.rindex("}") + 2]
    return None


@functools.cache
def build():
    """The recorder as a Python module, and PTX of each source of kernels, for sm_80 but where it is for Hopper only.

    Most of the time goes to sources that the installation has compiled before.
    """
    folder = Path(tempfile.mkdtemp())
    target = folder / f"cuda_recorder{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects, texts, running = [], [], []
    for source in SOURCES:
        if (found := installed(source)) is not None:
            objects.append(found[0])
            texts.append(found[1])
            continue
        objects.append(folder / f"{source.stem}_{source.suffix[1:]}.o")
        virtual = "compute_90a" if source in HOPPER else "compute_80"
        command = _nvcc(
            "-c", "-gencode", f"arch={virtual},code={virtual}", "-Xcompiler", "-fPIC,-fvisibility=hidden",
            f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "--keep", "--keep-dir", folder,
            source, "-o", objects[-1],
        )  # fmt: skip
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output.decode()[-4000:]
    subprocess.run(_nvcc("-shared", "-cudart", "none", *objects, "-o", target), check=True)
    spec = importlib.util.spec_from_file_location("cuda_recorder", target)
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    texts += [path.read_text() for path in folder.glob("*.ptx")]
    shutil.rmtree(folder)
    return recorder, texts


@contextlib.contextmanager
def on_hopper():
    """Context in which calls launch what they would on a Hopper."""
    recorder, _ = build()
    recorder.set_device(1)
    try:
        yield
    finally:
        recorder.set_device(0)


def ptx():
    """PTX of each source of kernels: of those for Hopper only for it, of the others for 8.0, from which all come."""
    return build()[1]


def ptx_of(kernel):
    """PTX of one kernel."""
    (text,) = [text for text in ptx() if f".entry {kernel}(" in text]
    header = text[: re.search(r"^.*\.entry", text, re.MULTILINE).start()]
    (body,) = re.findall(rf"^[^\n]*\.entry {re.escape(kernel)}\(.*?^}}", text, re.MULTILINE | re.DOTALL)
    # Without an end of its last line ptxas 13 may die.
    return f"{header}{body}\n"


def usage_of(arch, folder):
    """Names of all kernels but Hopper's, and what they take (`resource_usage`)."""
    usage = []
    for number, text in enumerate(ptx()):
        if ".target sm_80" in text:
            source, cubin = folder / f"{number}.ptx", folder / f"{number}.cubin"
            source.write_text(text)
            subprocess.run(_nvcc(f"-arch=sm_{arch}", "-cubin", source, "-o", cubin), check=True)
            usage += resource_usage(cubin)
    return usage


def usage_on_hopper(folder):
    """The same for kernels that are for Hopper only, and what the compiler said."""
    usage, said = [], ""
    for source in HOPPER:
        cubin = folder / f"{source.stem}.cubin"
        command = _nvcc("-gencode", "arch=compute_90a,code=sm_90a", "-cubin", source, "-o", cubin)
        said += subprocess.run(command, check=True, text=True, capture_output=True).stderr
        usage += resource_usage(cubin)
    return usage, said


@functools.cache
def module_of(kernel):
    """One kernel as ptxvm has it."""
    return import_ptxvm().Module(ptx_of(kernel))


def execute(launch, tensors, **options):
    """Runs a launch on the CPU, with bounds and shared-memory races checked; returns the counts.

    `tensors` are those that it may touch: an address in the parameters that lies in the memory of one points to it.
    Among the counts are "lines", how many warps executed a line of the PTX, and "conflicts", wavefronts of shared
    memory over the least possible by instruction, if asked for by `count_conflicts`.
    """
    module = module_of(launch.kernel)

    def bind(kernel, _):
        """Memory as ptxvm has it, what to copy back from it, and the parameters with its addresses."""
        words, memory, back, found = bytearray(launch.parameters), dict(module._gsegs), [], {}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for at in launch.addresses:
            address = int.from_bytes(words[at : at + 8], "little")
            begin = next((b for b, storage in storages.items() if b <= address < b + storage.nbytes()), None)
            if begin is None:
                continue
            if begin not in found:
                host = torch.empty(0, dtype=torch.uint8).set_(storages[begin]).numpy()
                found[begin] = rt.Segment(module._next + len(found) << rt.SEG, host, f"{host.nbytes} bytes")
                memory[found[begin].base >> rt.SEG] = found[begin]
                back.append((found[begin], host))
            words[at : at + 8] = (found[begin].base + address - begin).to_bytes(8, "little")
        (parameter,) = kernel.f.params
        raw = np.zeros(kernel.param_size, np.uint8)
        raw[kernel.param_off[parameter.name] :][: parameter.size] = np.frombuffer(words, np.uint8)[: parameter.size]
        number = module._next + len(found)
        memory[number] = rt.Segment(number << rt.SEG, raw, "parameters")
        memory[number].ro = True
        return memory, back, memory[number]

    rt = importlib.import_module("ptxvm.rt")
    module._args = bind
    module._run, lines, conflicts = _noting_run(module)
    counts = module.launch(
        None, grid=launch.grid, block=launch.block, shared_bytes=launch.shared_bytes,
        **{"check_races": True, "check_uninit": True, **options},
    )  # fmt: skip
    return {**counts, "lines": lines, "conflicts": conflicts}


def _noting_run(module):
    """What runs a batch of blocks, but notes which lines of the PTX are executed and where banks conflict."""
    lines, conflicts = collections.Counter(), collections.Counter()

    def run(kernel, machine, namespace, warps, *rest):
        def extra_wavefronts():
            return machine.stats.get("shared_wavefronts", 0) - machine.stats.get("shared_wavefronts_ideal", 0)

        def access(number, *arguments):
            before = extra_wavefronts()
            address = type(machine).shphys(machine, number, *arguments)
            conflicts[".".join(kernel.code[number].op.split(".")[:2])] += extra_wavefronts() - before
            return address

        machine.shphys = access
        before = warps.copy()
        type(module)._run(module, kernel, machine, namespace, warps, *rest)
        batch = {}
        for block, times in zip(kernel.blocks, (warps - before).tolist(), strict=True):
            # A line may hold several instructions.
            batch.update({i.line: max(times, batch.get(i.line, 0)) for i in block.ins})
        lines.update(batch)

    return run, lines, conflicts


def record(monkeypatch, run):
    """Has the backend hand each launch, and the tensors that it may touch, to `run`, for tensors on the CPU."""
    recorder, _ = build()
    tensors = []

    def noting(function):
        def call(*args, **options):
            result = function(*args, **options)
            tensors.append(result)
            return result

        return call

    def running(launcher):
        def call(*arguments):
            recorder.launches.clear()
            launcher(*arguments)
            for launch in list(recorder.launches):
                run(Launch(*launch), tensors)

        return call

    def noting_arguments(launcher):
        def call(inputs, *others):
            tensors[:] = [argument for argument in (*inputs, *others) if isinstance(argument, torch.Tensor)]
            launcher(inputs, *others)

        return call

    native = types.SimpleNamespace(
        cuda_labels=recorder.cuda_labels,
        cuda_row_terms=recorder.cuda_row_terms,
        cuda_attention_forward=running(recorder.cuda_attention_forward),
        cuda_attention_backward=running(recorder.cuda_attention_backward),
        cuda_starts=recorder.cuda_starts,
        cuda_places=recorder.cuda_places,
    )
    for name in ("new_empty", "clone", "contiguous", "flatten", "float", "to"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))
    for name in ("forward", "backward", "window_forward", "window_backward"):
        monkeypatch.setattr(backend, name, noting_arguments(getattr(backend, name)))
    monkeypatch.setattr(backend, "_native", native)
    monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: [])
    monkeypatch.setattr(backend, "_current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))


def record_attention(run, tokens, head_dim, keys=None, heads=HEADS, sources=1, offsets=False, images=IMAGES):
    """Hands each launch of a forward and backward in bfloat16 to `run`; see `record`.

    Self-attention on a packed projection, or attention to fewer `keys`. `offsets`: with a bias and its gradient.
    """
    with pytest.MonkeyPatch.context() as patch:
        record(patch, run)
        projection = torch.randn(images, tokens, 3, heads, head_dim).bfloat16().requires_grad_()
        residual = torch.rand(images, tokens, sources) if sources else None
        bias = torch.randn(heads, tokens, keys or tokens).bfloat16().requires_grad_() if offsets else None
        if keys is None:
            output, _ = tlk.attention_qkv(projection, residual, residual, bias, backend="cuda")
        else:
            query, key, value = projection.permute(2, 0, 3, 1, 4).unbind(0)
            tensors = [query, key[:, :, :keys], value[:, :, :keys]]
            share = None if residual is None else residual[:, :keys]
            output, _ = tlk.attention(*tensors, share, residual, bias, backend="cuda")
        output.sum().backward()


def record_windows(run, windows, head_dim, heads=HEADS, sources=1, bias=True, images=IMAGES):
    """Hands each launch of a forward and backward in bfloat16 within windows of maps to `run`; see `record`."""
    with pytest.MonkeyPatch.context() as patch:
        record(patch, run)
        qkv = torch.randn(images, *windows.map_size, 3, heads, head_dim).bfloat16().requires_grad_()
        residual = torch.rand(images, *windows.map_size, sources) if sources else None
        bias = torch.randn(heads, windows.tokens(), windows.tokens()).bfloat16().requires_grad_() if bias else None
        output, _ = tlk.window_attention(
            qkv, residual, residual, window_size=windows.window_size, shift=windows.shift, bias=bias, backend="cuda"
        )
        output.sum().backward()


def record_call(run, windows=None, **call):
    """Hands each launch of `record_attention` or, where there are windows, of `record_windows` to `run`."""
    if windows is None:
        record_attention(run, **call)
    else:
        record_windows(run, windows, **call)


# Kernels for what is the same for all images of record_attention and record_windows.
PREPARE = ("pack_places", "pack_starts")


def some_blocks(launch, images):
    """Of a launch for many images, the blocks of the first few; all blocks of what is the same for all images."""
    executed = images if name_of(launch.kernel) in PREPARE else IMAGES
    return [(number, 0, 0) for number in range(launch.grid[0] * executed // images)]


def name_of(kernel):
    """The function's name in a mangled one."""
    return re.search(r"\d([a-z]+(?:_[a-z]+)+)[IE]", kernel)[1]


# Opcodes of which there is one for an instruction of PTX, and what the emulator calls these.
ONE_FOR_ONE = {"HMMA": "mma", "LDSM": "ldmatrix", "MUFU.EX2": "ex2"}


@functools.cache
def assemble(kernel, arch):
    """What a kernel takes (`resource_usage`), and its SASS: basic blocks of instructions (line of the PTX, opcode)."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx_of(kernel))
        target = "sm_90a" if ".target sm_90a" in source.read_text() else f"sm_{arch}"
        subprocess.run(_nvcc(f"-arch={target}", "-cubin", "-Xptxas", "-lineinfo", source, "-o", cubin), check=True)
        ((_, resources),) = resource_usage(cubin)
        text = print_of("nvdisasm", "-c", "-gp", cubin)
    blocks, line, label = [[]], None, None
    for row in text.splitlines():
        if found := re.search(r'"\.nv_debug_ptx_txt", line (\d+)', row):
            line = int(found[1])
        elif row.startswith(".L_x_"):
            blocks.append([])
            label = row.strip(":")
        elif found := INSTRUCTION.search(row):
            opcode = with_left(found[2], found[3])
            # What follows the end of the program: a branch to itself and padding.
            if opcode == "BRA" and not blocks[-1] and f"({label})" in row:
                break
            blocks[-1].append((line, opcode))
            if opcode.partition(".")[0] in ("BRA", "EXIT", "CALL", "RET"):
                blocks.append([])
                label = None
    return resources, blocks


def count(launch, tensors, arch, images=IMAGES):
    """SASS instructions that all warps of `some_blocks` of a launch execute, by opcode.

    The emulator says how often each line of the PTX is executed, the assembler of which line each instruction of SASS
    comes; a basic block is executed as often as most of its lines. So loops and branches count as they are taken; what
    a false predicate switches off is issued all the same, and counts. Where the assembler has made several copies of a
    block, as of a loop that it unrolls, each is taken to be executed equally often: how many there are is known of
    matrix products, loads of matrices and exponentials, which are one instruction each. If those found in this way are
    not as many as the emulator has executed, a warning says so.
    """
    blocks = some_blocks(launch, images)
    executed = execute(launch, tensors, check_races=False, check_uninit=False, ctas=blocks)
    counts = collections.Counter()
    code = assemble(launch.kernel, arch)[1]
    known = [[line for line, opcode in block if opcode.startswith(tuple(ONE_FOR_ONE))] for block in code]
    copies = collections.Counter(line for lines in known for line in lines)
    for block, lines in zip(code, known, strict=True):
        times = collections.Counter(executed["lines"].get(line, 0) for line, _ in block)
        most = max(times, key=lambda number: (times[number], number), default=0)
        of_copy = most / statistics.mode([copies[line] for line in lines] or [1])
        for _, opcode in block:
            counts[opcode] += of_copy
    # The emulator counts products of warp groups by the parts of those of a warp that they are made of.
    has_groups = any(opcode.startswith("HGMMA") for opcode in counts)
    for opcode, kind in ONE_FOR_ONE.items():
        if has_groups and kind == "mma":
            continue
        found = sum(times for of, times in counts.items() if re.match(rf"{re.escape(opcode)}(\.|$)", of))
        if round(found) != executed[kind]:
            warnings.warn(f"{name_of(launch.kernel)}: {executed[kind]} {kind}, counted as {found}", stacklevel=2)
    return counts


def counts_of_head(arch, heads=HEADS, images=IMAGES, windows=None, **options):
    """SASS instructions of all warps of all blocks of a head, by kernel and opcode; see `count`, `record_attention`.

    With `windows` those of a head of one of them; see `record_windows`.
    """
    counts = collections.defaultdict(collections.Counter)
    per_image = heads if windows is None else heads * windows.count()

    def run(launch, tensors):
        for opcode, times in count(launch, tensors, arch, images).items():
            executed = images if name_of(launch.kernel) in PREPARE else IMAGES
            counts[name_of(launch.kernel)][opcode] += times / (executed * per_image)

    record_call(run, windows, heads=heads, images=images, **options)
    return dict(counts)


# Warps, blocks and KB of shared memory that a multiprocessor holds (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
LIMITS = {
    80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228), 120: (48, 24, 100)
}  # fmt: skip


def resident_blocks(launch, arch):
    """Blocks that a multiprocessor holds at once, as far as each thing it has of them allows.

    A warp takes its registers by 256 of the 16384 of a quarter of the multiprocessor; a block takes its shared memory
    by 128 bytes, and 1024 for the system (`cuda_occupancy.h` of the CUDA toolkit).
    """
    warps, blocks, kilobytes = LIMITS[arch]
    of_block = launch.block[0] // 32
    warps_of_registers = 4 * (16384 // (-(-resources_of(launch, arch)["REG"] * 32 // 256) * 256))
    taken = -(-resources_of(launch, arch)["SHARED"] // 128) * 128 + 1024
    return {
        "registers": warps_of_registers // of_block,
        "shared": kilobytes * 1024 // taken,
        "warps": warps // of_block,
        "blocks": blocks,
    }


def resources_of(launch, arch):
    """What a block takes (REG, STACK, SHARED, LOCAL), with the shared memory of the launch."""
    resources = assemble(launch.kernel, arch)[0]
    # From 9.0 on the system's part is reported, too, where there is any.
    of_system = min(resources["SHARED"], 1024 if arch >= 90 else 0)
    return {**resources, "SHARED": resources["SHARED"] - of_system + launch.shared_bytes}
