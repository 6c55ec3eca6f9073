"""The native extension: what it says of the processor and of its own build."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

try:
    from tlalign_kernels import _C
except ImportError:
    # Left out for want of a compiler, or of Python's headers, is fine. Missing for any other reason is a failure.
    compilers = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++", "cl"))
    if any(shutil.which(name) for name in compilers) and Path(sysconfig.get_path("include"), "Python.h").exists():
        raise
    pytest.skip("the extension is not built: no C++ compiler, or no headers of Python", allow_module_level=True)


def test_the_types_name_all_that_is_there():
    types = ast.parse(Path(__file__).parents[1].joinpath("tlalign_kernels", "_C.pyi").read_text())
    named = {getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None) for node in types.body}
    assert {name for name in dir(_C) if not name.startswith("__")} <= named


def test_cpu_features_are_flags():
    features = _C.cpu_features()
    assert {"avx2", "fma", "f16c", "avx512f", "avx512_bf16"} <= features.keys()
    assert all(type(value) is bool for value in features.values())


def test_cpu_features_agree_with_the_operating_system():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
    if not lines:
        pytest.skip("/proc/cpuinfo lists no flags on this processor")
    flags = set(lines[0].partition(":")[2].split())
    expected = {name: name in flags for name in _C.cpu_features()}
    assert _C.cpu_features() == expected


def test_build_info_describes_this_build():
    info = _C.build_info()
    assert info["version"] == importlib.metadata.version("tlalign-kernels"), "stale extension: install again"
    assert info["compiler"]
    assert info["compiler_version"][0].isdigit()
    assert info["cxx_standard"] == 17
    assert info["threads"] in {"libgomp", "of their own"}
    assert info["build_type"] in {"Release", "Debug", "RelWithDebInfo", "MinSizeRel"}
    assert all(isinstance(architecture, str) for architecture in info["cuda_architectures"])


def test_a_compiler_that_can_makes_the_cpu_kernels():
    info = _C.build_info()
    least = {"GNU": 10, "Clang": 9}.get(info["compiler"])
    if least is None or int(info["compiler_version"].partition(".")[0]) < least:
        pytest.skip(f"{info['compiler']} {info['compiler_version']} need not compile them")
    assert hasattr(_C, "cpu_attention_forward")


def test_extension_does_not_need_torch():
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.cpu_features() and module.build_info()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
