"""Builds the extension diffmic_fast._C with CMake and Ninja, and records what was built.

Environment variables:
    DIFFMIC_CUDA: "auto" (default) compiles CUDA where nvcc is found, "visible" only where nvidia-smi also
        lists a GPU or TORCH_CUDA_ARCH_LIST is set, "on" fails without nvcc, "off".
    TORCH_CUDA_ARCH_LIST: CUDA targets as PyTorch reads them, "8.0;9.0+PTX" or "Hopper"; "All" for a
        wheel that runs on every supported GPU. Default: the compute capabilities of the visible GPUs;
        without a GPU 8.0+PTX, whose machine code runs on 8.x and whose PTX later GPUs compile.
    DIFFMIC_WERROR: "on" (default) fails at a compiler's warning, "off" does not.
    DIFFMIC_PROGRESS: file that shows what has been compiled, since pip hides a build's output; by
        default the terminal (/dev/tty), where there is one. Empty for none.
    CXX: C++ compiler.
    CUDACXX, CUDA_HOME, CUDA_PATH, PATH: where nvcc is searched for, in this order.

Without a C++ compiler the package is installed without its extension, which `python -m diffmic_fast
info` reports. A compiler that fails makes the installation fail.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip does not import setup.py from its folder

from build_support.plan import (  # noqa: E402
    ConfigurationError,
    Plan,
    cuda_host_compiler,
    find_compiler,
    make_plan,
)
from build_support.progress import run_showing_progress  # noqa: E402

# Variables besides CMake's definitions that a configured build folder depends on.
CONFIGURING = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")


@functools.cache
def plan() -> Plan:
    """The plan of this process; a configuration error ends the build with one line."""
    try:
        return make_plan(os.environ)
    except ConfigurationError as error:
        raise SystemExit(f"diffmic_fast: {error}") from None


def tool(name: str, folder: str) -> str:
    """A program of a build requirement: from its Python package, or from the PATH."""
    try:
        package = __import__(name)
    except ImportError:
        package = None
    candidate = shutil.which(name, path=getattr(package, folder, "")) or shutil.which(name)
    if candidate is None:
        raise SystemExit(f"diffmic_fast: {name} was not found; pip install {name}")
    return candidate


def write_record(path: Path, built: dict[str, Any]) -> None:
    """Write _build.json, which `info` shows: what was built, and what was not and why."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "extension": plan().compiler is not None,
        "reason": plan().reason,
        "cuda": plan().nvcc is not None,
        "cuda_reason": plan().cuda_reason,
        **built,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class BuildExtension(build_ext):
    """Runs CMake and Ninja, of an editable installation in build/editable."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the module to where setuptools expects it, and record what it was built from."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        editable = self.editable_mode
        folder = ROOT / "build/editable" if editable else Path(self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DIFFMIC_VERSION": self.distribution.get_version(),
            "DIFFMIC_WITH_CUDA": "ON" if plan().nvcc else "OFF",
            "DIFFMIC_CUDA_ARCHITECTURES": " ".join(plan().architectures),
            "DIFFMIC_WERROR": os.environ.get("DIFFMIC_WERROR", "on"),
        }
        if "CXX" not in os.environ:
            options["CMAKE_CXX_COMPILER"] = str(plan().compiler)
        if nvcc := plan().nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            if host := cuda_host_compiler(str(plan().compiler), os.environ):
                options["CMAKE_CUDA_HOST_COMPILER"] = host
        # Only what has changed is compiled, if the tools and the options are those of the last time.
        configured = json.dumps([options, [os.environ.get(name) for name in CONFIGURING]])
        stamp = folder / "configured.json"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != configured:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            stamp.write_text(configured, encoding="utf-8")
        options["DIFFMIC_OUTPUT_DIR"] = str(target.parent)  # a temporary folder, for linking alone
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        status = subprocess.run(configure, check=False).returncode
        progress = os.environ.get("DIFFMIC_PROGRESS", "/dev/tty")
        if status or run_showing_progress([cmake, "--build", str(folder)], progress):
            raise SystemExit(
                "diffmic_fast: compiling the extension failed; the compiler's messages are "
                "above. It needs C++20 (GCC 10, Clang 12 or newer; CXX names another compiler); "
                "DIFFMIC_CUDA=off builds without CUDA"
            )
        built = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        package = ROOT / "diffmic_fast" if editable else target.parent
        write_record(package / "_build.json", built)
        if not plan().nvcc:
            print(f"diffmic_fast: built without CUDA: {plan().cuda_reason}", file=sys.stderr)


class BuildPython(build_py):
    """Copies the Python files, and without a compiler records that there is no extension."""

    def run(self) -> None:
        """Report a configuration error early, then copy."""
        missing = plan().reason
        if not self.editable_mode:
            # setuptools keeps files there that the sources no longer have.
            shutil.rmtree(Path(self.build_lib) / "diffmic_fast", ignore_errors=True)
        super().run()
        if missing:
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            write_record(folder / "diffmic_fast" / "_build.json", {})
            print(
                f"diffmic_fast: installed without its C++ extension: {missing}. Everything works, "
                "slower; install a compiler (GCC 10, Clang 12 or newer) and install again",
                file=sys.stderr,
            )


def extensions() -> list[Extension]:
    """The module, or none: a wheel without compiled code must not name a platform."""
    try:
        present = find_compiler(os.environ) is not None
    except ConfigurationError as error:
        raise SystemExit(f"diffmic_fast: {error}") from None
    return [Extension("diffmic_fast._C", sources=[])] if present else []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension, "build_py": BuildPython})
