"""CUDA launches without a GPU: recorded by a stand-in for CUDA's runtime, and executed by ptxvm."""

import contextlib
import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pybind11
import torch
from triton_offline import import_ptxvm

from tlalign_kernels.backends import cuda as backend

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.c*")), Path(__file__).with_name("cuda_recorder.cpp")]


@dataclass(frozen=True)
class Launch:
    """A kernel, by its mangled name, and what it was to be launched with."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: bytes
    stream: int


def _nvcc(*options):
    return ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *options]


@functools.cache
def build():
    """The recorder as a Python module, and PTX for sm_80 of each source of kernels."""
    folder = Path(tempfile.mkdtemp())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    ptx = [folder / f"{source.stem}.ptx" for source in SOURCES if source.suffix == ".cu"]
    commands = [
        _nvcc("-arch=sm_80", "-ptx", source, "-o", target)
        for source, target in zip([source for source in SOURCES if source.suffix == ".cu"], ptx, strict=True)
    ]
    # Without optimisation and for one architecture: the host code is what is wanted.
    commands.append(
        _nvcc(
            "-shared", "-cudart", "none", "-gencode", "arch=compute_80,code=compute_80", "-Xcompiler", "-fPIC",
            "-Xcompiler", "-fvisibility=hidden", f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_paths()['include']}", *SOURCES, "-o", folder / f"cuda_recorder{suffix}",
        )
    )  # fmt: skip
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output.decode()[-4000:]
    spec = importlib.util.spec_from_file_location("cuda_recorder", folder / f"cuda_recorder{suffix}")
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    texts = [path.read_text() for path in ptx]
    shutil.rmtree(folder)
    return recorder, texts


@functools.cache
def module_of(kernel):
    """One kernel as ptxvm has it."""
    _, texts = build()
    (text,) = [text for text in texts if f".entry {kernel}(" in text]
    header = text[: re.search(r"^.*\.entry", text, re.MULTILINE).start()]
    (body,) = re.findall(rf"^[^\n]*\.entry {re.escape(kernel)}\(.*?^}}", text, re.MULTILINE | re.DOTALL)
    return import_ptxvm().Module(header + body)


def execute(launch, tensors, **options):
    """Runs a launch on the CPU, with bounds and shared-memory races checked; returns the counts.

    `tensors` are those that it may touch: an address in the parameters that lies in the memory of one points to it.
    """
    module = module_of(launch.kernel)

    def bind(kernel, _):
        """Memory as ptxvm has it, what to copy back from it, and the parameters with its addresses."""
        words, memory, back, found = bytearray(launch.parameters), dict(module._gsegs), [], {}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for at in range(0, len(words) - 7, 8):
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
    return module.launch(
        None, grid=launch.grid, block=launch.block, shared_bytes=launch.shared_bytes,
        **{"check_races": True, "check_uninit": True, **options},
    )  # fmt: skip


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
        def call(*arguments):
            tensors[:] = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            launcher(*arguments)

        return call

    native = types.SimpleNamespace(
        cuda_parts=recorder.cuda_parts,
        cuda_row_terms=recorder.cuda_row_terms,
        cuda_attention_forward=running(recorder.cuda_attention_forward),
        cuda_attention_backward=running(recorder.cuda_attention_backward),
    )
    for name in ("new_empty", "contiguous", "float", "to"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))
    for name in ("forward", "backward"):
        monkeypatch.setattr(backend, name, noting_arguments(getattr(backend, name)))
    monkeypatch.setattr(backend, "_native", native)
    monkeypatch.setattr(backend, "unsupported_reasons", lambda problem: [])
    monkeypatch.setattr(backend, "_current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
