"""Builds and installs of a copy of this tree: with a compiler, without one, and with one that rejects the sources."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pybind11 = pytest.importorskip("pybind11")
ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
for tool in ("cmake", "ninja"):
    if shutil.which(tool, path=PATH) is None:
        pytest.skip(f"{tool} is not installed", allow_module_level=True)

# One worker of `pytest -n`, which compiles the sources once; without CUDA's, which take minutes and are packaged alike.
pytestmark = pytest.mark.xdist_group("packaging")
WITHOUT_CUDA = {"TLALIGN_BUILD_CUDA": "0"}
WARNING = "installed without its native extension"
NO_COMPILER = {"CXX": str(ROOT / "no" / "such" / "compiler")}


def copy_tree(destination: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.egg-info")
    for name in ("csrc", "tlalign_kernels", "python"):
        shutil.copytree(ROOT / name, destination / name, ignore=ignore)
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, destination / name)
    (destination / "tests").mkdir()
    (destination / "tests" / "test_nothing.py").touch()  # setuptools would pack it
    return destination


def setup_py(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, "PATH": PATH, **WITHOUT_CUDA, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def built(tree: Path, *arguments: str, **environment: str) -> str:
    result = setup_py(tree, *arguments, **environment)
    assert result.returncode == 0, result.stdout
    return result.stdout


def wheel_contents(tree: Path) -> list[str]:
    (wheel,) = tree.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def extensions(names: list[str]) -> list[str]:
    return [name for name in names if Path(name).match("tlalign_kernels/_C.*") and not name.endswith(".pyi")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path)


@pytest.fixture(scope="module")
def compiled_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("compiled"))
    # What is packaged need not compute: the kernels are most of what there is to compile.
    kernels = '#include "kernels.h"\nnamespace tlalign::cpu { extern const Kernels TLALIGN_KERNELS{}; }\n'
    (tree / "csrc" / "cpu" / "kernels.cpp").write_text(kernels)
    if WARNING in built(tree, "build"):
        pytest.skip("no C++ compiler, or no headers of Python")
    return tree


def test_wheel_holds_both_packages_and_the_extension(compiled_tree):
    # What an earlier build collected of a module that is gone.
    (left,) = compiled_tree.glob("build/lib*") or [None]
    (left / "tlalign").mkdir(exist_ok=True)
    (left / "tlalign" / "gone.py").touch()
    built(compiled_tree, "bdist_wheel")
    names = wheel_contents(compiled_tree)
    assert len(extensions(names)) == 1
    expected = {
        f"{package.name}/{file.relative_to(package)}"
        for package in (compiled_tree / "tlalign_kernels", compiled_tree / "python" / "tlalign")
        for file in package.rglob("*")
        if file.is_file() and file.suffix not in (".so", ".pyc")
    }
    assert {"tlalign/recipes/digits.yaml", "tlalign/py.typed", "tlalign_kernels/_C.pyi"} <= expected <= set(names)
    assert "tlalign/gone.py" not in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"tlalign_kernels", "tlalign"}


def test_second_build_compiles_nothing(compiled_tree):
    assert "no work to do" in built(compiled_tree, "build_ext")


def test_compiler_that_has_gone_leaves_no_old_extension_behind(compiled_tree, tmp_path):
    moved = shutil.copytree(compiled_tree, tmp_path / "moved")
    assert WARNING in built(moved, "bdist_wheel", **NO_COMPILER)
    assert extensions(wheel_contents(moved)) == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_compiler_that_is_too_old_leaves_out_the_cpu_kernels_alone(compiled_tree, tmp_path):
    moved = shutil.copytree(compiled_tree, tmp_path / "moved")
    old = tmp_path / "c++"
    old.write_text('#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    output = built(moved, "bdist_wheel", CXX=str(old))
    if platform.machine() == "x86_64":
        assert "no CPU kernels: they need gcc 10 or clang 9" in output
        assert "tlalign_cpu" not in output
    assert len(extensions(wheel_contents(moved))) == 1


def configured(tmp_path: Path, tool: str, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Has CMake look for CUDA where `tool` is another."""
    (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / tool).chmod(0o755)
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    path = os.pathsep.join([str(tmp_path), PATH])
    environment = {**os.environ, "TLALIGN_CUDA_ARCHS": "", "TLALIGN_BUILD_CUDA": "1", "PATH": path, **environment}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def test_nvcc_that_does_not_work_is_told(tmp_path):
    result = configured(tmp_path, "nvcc", "exit 1", CUDACXX=str(tmp_path / "nvcc"))
    if "header files of Python" in result.stdout or "CXX compiler - NOTFOUND" in result.stdout:
        pytest.skip("no C++ compiler, or no headers of Python")
    assert result.returncode == 0, result.stdout
    assert f"no CUDA kernels: {tmp_path / 'nvcc'} doesn't work" in " ".join(result.stdout.split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_gpu_that_is_newer_than_nvcc_is_left_to_ptx(tmp_path):
    tool = "nvidia-smi", r"printf '8.0\n19.0\n9.0\n'"
    result = configured(tmp_path, *tool)
    if "CUDA compiler - NOTFOUND" in result.stdout or "header files of Python" in result.stdout:
        pytest.skip("nvcc does not work here, or no headers of Python")
    assert result.returncode == 0, result.stdout
    assert "knows no compute capability 190" in result.stdout
    assert "CUDA kernels for 80;90\n" in result.stdout

    result = configured(tmp_path, *tool, TLALIGN_CUDA_ARCHS="80;190")
    assert result.returncode != 0
    assert "TLALIGN_CUDA_ARCHS: nvcc" in result.stdout


def test_editable_install_without_a_compiler_warns_once_and_finds_both_packages(tree):
    output = built(tree, "editable_wheel", "--dist-dir", "dist", **NO_COMPILER)
    assert output.count(WARNING) == 1
    assert "CMake Warning" not in output
    assert not extensions([str(path.relative_to(tree)) for path in tree.glob("tlalign_kernels/*")])

    (wheel,) = tree.glob("dist/*.whl")
    shutil.unpack_archive(wheel, tree / "site", format="zip")
    script = """
import importlib.util, json, site, sys
site.addsitedir(sys.argv[1])
print(json.dumps([importlib.util.find_spec(name).origin for name in ("tlalign_kernels", "tlalign")]))
"""
    found = subprocess.run([sys.executable, "-ISc", script, tree / "site"], check=True, capture_output=True, text=True)
    expected = [tree / "tlalign_kernels" / "__init__.py", tree / "python" / "tlalign" / "__init__.py"]
    assert [Path(origin).resolve() for origin in json.loads(found.stdout)] == [path.resolve() for path in expected]


def test_source_that_does_not_compile_is_an_error(tree):
    (tree / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    result = setup_py(tree, "build_ext", "--inplace")
    if WARNING in result.stdout:
        pytest.skip("no C++ compiler, or no headers of Python")
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout


def test_source_distribution_holds_the_native_sources(tree):
    built(tree, "sdist")
    (archive,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {path.relative_to(tree).as_posix() for path in tree.glob("csrc/**/*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not any(name.startswith("tests/") for name in names)
