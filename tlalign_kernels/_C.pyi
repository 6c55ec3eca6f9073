"""Types of the native extension; csrc/bindings.cpp defines it."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    build_type: str
    compiler: str
    compiler_version: str
    cxx_standard: int
    cuda_architectures: list[str]

def cpu_features() -> dict[str, bool]: ...
def build_info() -> BuildInfo: ...
