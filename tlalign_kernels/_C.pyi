"""Types of the native extension; csrc/bindings.cpp defines it."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    build_type: str
    compiler: str
    compiler_version: str
    cxx_standard: int
    threads: str
    cuda_architectures: list[str]

def cpu_features() -> dict[str, bool]: ...
def build_info() -> BuildInfo: ...

# Built by gcc or clang only. tlalign_kernels/backends/cpu.py calls them, csrc/cpu/bindings.cpp names their arguments.
def cpu_instruction_set(wanted: str) -> str: ...
def cpu_attention_forward(*arguments: object) -> None: ...
def cpu_attention_backward(*arguments: object) -> None: ...
