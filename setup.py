"""Builds the extension tlalign_kernels._C with CMake and Ninja; the rest of the packaging is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE_SOURCES = ["CMakeLists.txt", *sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/**/*") if f.is_file())]


class CleanBuild(build_py):
    """Collects the modules that there are, and none that a former build has left in build/."""

    def run(self) -> None:
        for package in ("tlalign", "tlalign_kernels"):
            shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds the extension in build/, or leaves it out, with a warning, where there is nothing to build it with."""

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / f"cmake-{self.plat_name}-{sys.implementation.cache_tag}"
        product = Path(self.get_ext_fullpath(ext.name))
        self._configure(folder)

        left_out = folder / "left_out.txt"
        if left_out.exists():
            product.unlink(missing_ok=True)
            self.extensions = []  # so that setuptools looks for no product
            self.warn(
                f"{left_out.read_text().strip()}: tlalign_kernels is installed without its native extension. "
                "It works on the backends that are written in Python; install it again once that is there."
            )
            return
        subprocess.run([_tool("cmake"), "--build", folder], check=True)
        self.mkpath(str(product.parent))
        self.copy_file(str(folder / product.name), str(product))

    def _configure(self, folder: Path) -> None:
        # What CMake remembers can be wrong by now: pip's cmake, ninja and pybind11 lie in another folder each time, the
        # tree may have been moved, a compiler installed. So configure anew, but keep the objects: the build stays
        # incremental.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        for remembered in folder.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(remembered)
        options = {
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TLALIGN_VERSION": self.distribution.get_version(),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([_tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions], check=True)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is needed to build tlalign_kernels and is not on PATH; try `pip install {name}`")
    return path


setup(
    ext_modules=[Extension("tlalign_kernels._C", sources=NATIVE_SOURCES)],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild},
)
