"""Builds the extension diffmic_fast._C with CMake and Ninja, and records what was built.

Environment:
    DIFFMIC_CUDA          auto (default): compile CUDA where nvcc is found; on: fail without; off.
    TORCH_CUDA_ARCH_LIST  what to compile CUDA for, as PyTorch reads it: "8.0;9.0+PTX", "Hopper".
    CXX                   the C++ compiler.
    CUDACXX, CUDA_HOME, CUDA_PATH, PATH   where nvcc is looked for, in this order.

Without any C++ compiler the package is installed without its extension; `python -m diffmic_fast
info` then says so. A compiler that fails makes the installation fail.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# Names that TORCH_CUDA_ARCH_LIST may use, as in torch.utils.cpp_extension.
ARCHITECTURE_NAMES = {
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class ConfigurationError(Exception):
    """The build cannot do what was asked for; the message is for the person who installs."""


@dataclass(frozen=True)
class Plan:
    """What a build is going to compile.

    Attributes:
        compiler: path of the C++ compiler, None where there is none.
        reason: why there is no extension; "" where there is one.
        nvcc: path of nvcc, None where CUDA is left out.
        cuda_reason: why CUDA is left out; "" where it is not.
        architectures: CUDA targets, "80", "90a" or with PTX "120+PTX".
    """

    compiler: str | None
    reason: str
    nvcc: str | None
    cuda_reason: str
    architectures: tuple[str, ...]


def find_compiler(environment: Mapping[str, str]) -> str | None:
    """The C++ compiler that CMake would take: CXX, or the first common name on the PATH."""
    path = environment.get("PATH", os.defpath)
    chosen = environment.get("CXX", "").split()
    if chosen:
        found = shutil.which(chosen[0], path=path)
        if found is None:
            raise ConfigurationError(f"CXX={environment['CXX']}, but there is no such program")
        return found
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name, path=path):
            return found
    return None


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, CUDA_PATH or the PATH."""
    path = environment.get("PATH", os.defpath)
    if chosen := environment.get("CUDACXX"):
        return shutil.which(chosen, path=path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc", path=path)


def parse_architectures(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Read TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX 12.0a, Hopper" -> ("80", "90+PTX", "120a").

    Args:
        text: the variable's value; entries are separated by semicolons, commas or spaces.
        known: architectures that nvcc compiles for, "80", "86", ...

    Raises:
        ConfigurationError: an entry is no architecture, or not one of this nvcc's.
    """
    # Longest name first: "Ampere+Tegra" begins with "Ampere".
    for name in sorted(ARCHITECTURE_NAMES, key=len, reverse=True):
        text = re.sub(rf"(?i)(?<!\w){re.escape(name)}(?![\w+])", ARCHITECTURE_NAMES[name], text)
    targets: dict[str, bool] = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        if not entry:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is no architecture; write 8.0, 9.0+PTX, 12.0a or "
                f"one of the names {', '.join(ARCHITECTURE_NAMES)}"
            )
        number = match[1] + match[2]
        if number not in known:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {entry}; it knows "
                f"{', '.join(f'{item[:-1]}.{item[-1]}' for item in known)}"
            )
        target = number + match[3]
        targets[target] = targets.get(target, False) or match[4] is not None
    if not targets:
        raise ConfigurationError("TORCH_CUDA_ARCH_LIST is set and names no architecture")
    return tuple(target + ("+PTX" if ptx else "") for target, ptx in targets.items())


def default_architectures(known: tuple[str, ...]) -> tuple[str, ...]:
    """The default targets that nvcc compiles for, with PTX of the newest."""
    chosen = [target for target in DEFAULT_ARCHITECTURES if target in known]
    if not chosen:
        raise ConfigurationError(
            f"this nvcc compiles for none of {', '.join(DEFAULT_ARCHITECTURES)}; set "
            "TORCH_CUDA_ARCH_LIST, or DIFFMIC_CUDA=off"
        )
    return (*chosen[:-1], chosen[-1] + "+PTX")


def known_architectures(nvcc: str) -> tuple[str, ...]:
    """What this nvcc compiles for: ("75", "80", ...)."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    found = re.findall(r"compute_(\d+)\b", listing.stdout)
    if listing.returncode != 0 or not found:
        raise ConfigurationError(f"{nvcc} --list-gpu-arch failed: {listing.stderr.strip()}")
    return tuple(sorted(set(found), key=int))


def cuda_host_compiler(compiler: str, environment: Mapping[str, str]) -> str | None:
    """The C++ compiler that nvcc is told to use, None to leave it its own choice."""
    if chosen := environment.get("CUDAHOSTCXX"):
        return chosen
    # CXX="ccache g++" names a launcher, which nvcc cannot be given.
    return compiler if len(environment.get("CXX", "").split()) < 2 else None


def nvcc_works(nvcc: str, compiler: str, environment: Mapping[str, str]) -> str:
    """Compile an empty kernel; "" where that works, else the last line of what nvcc says.

    A toolkit that rejects the machine's C++ compiler is the common case.
    """
    host = cuda_host_compiler(compiler, environment)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <string>\n__global__ void probe() {}\n")
        command = [nvcc, "-std=c++20", "-c", "probe.cu", "-o", "probe.o"]
        command += ["-ccbin", host] if host else []
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    lines = [line for line in (result.stderr + result.stdout).splitlines() if "error" in line]
    return lines[0] if lines else f"exit status {result.returncode}"


def make_plan(environment: Mapping[str, str]) -> Plan:
    """Decide what to compile.

    Raises:
        ConfigurationError: what the environment asks for cannot be had.
    """
    wanted = environment.get("DIFFMIC_CUDA", "auto") or "auto"
    if wanted not in ("auto", "on", "off"):
        raise ConfigurationError(f"DIFFMIC_CUDA must be auto, on or off, got {wanted!r}")
    compiler = find_compiler(environment)
    if compiler is None:
        reason = "no C++ compiler was found (CXX, c++, g++, clang++)"
        if wanted == "on":
            raise ConfigurationError(f"DIFFMIC_CUDA=on, but {reason}")
        return Plan(None, reason, None, reason, ())
    if wanted == "off":
        return Plan(compiler, "", None, "DIFFMIC_CUDA=off", ())

    nvcc = find_nvcc(environment)
    reason = "nvcc was not found (CUDACXX, CUDA_HOME, CUDA_PATH, PATH)" if nvcc is None else ""
    if nvcc is not None and (failure := nvcc_works(nvcc, compiler, environment)):
        reason = f"{nvcc} does not work with {compiler}: {failure}"
    if nvcc is None or reason:
        if wanted == "on":
            raise ConfigurationError(
                f"DIFFMIC_CUDA=on, but {reason}. Install the CUDA toolkit or set CUDA_HOME; "
                "DIFFMIC_CUDA=auto builds without CUDA"
            )
        return Plan(compiler, "", None, reason, ())
    known = known_architectures(nvcc)
    listed = environment.get("TORCH_CUDA_ARCH_LIST", "")
    chosen = parse_architectures(listed, known) if listed else default_architectures(known)
    return Plan(compiler, "", nvcc, "", chosen)


@functools.cache
def plan() -> Plan:
    """The plan of this process, made once; what cannot be had ends the build in one sentence."""
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
    """Runs CMake and Ninja in the build's temporary folder."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the module to where setuptools expects it, and record what it was made of."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DIFFMIC_VERSION": self.distribution.get_version(),
            "DIFFMIC_OUTPUT_DIR": str(target.parent),
            "DIFFMIC_WITH_CUDA": "ON" if plan().nvcc else "OFF",
            "DIFFMIC_CUDA_ARCHITECTURES": " ".join(plan().architectures),
        }
        if "CXX" not in os.environ:
            options["CMAKE_CXX_COMPILER"] = str(plan().compiler)
        if nvcc := plan().nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            if host := cuda_host_compiler(str(plan().compiler), os.environ):
                options["CMAKE_CUDA_HOST_COMPILER"] = host
        # A folder left by an earlier build may name tools of an environment that is gone.
        shutil.rmtree(folder, ignore_errors=True)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        for command in (configure, [cmake, "--build", str(folder)]):
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(
                    "diffmic_fast: compiling the extension failed; the compiler's messages are "
                    "above. It needs C++20 (GCC 10, Clang 12 or newer; CXX names another compiler); "
                    "DIFFMIC_CUDA=off builds without CUDA"
                )
        built = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        write_record(target.parent / "_build.json", built)
        if not plan().nvcc:
            print(f"diffmic_fast: built without CUDA: {plan().cuda_reason}", file=sys.stderr)


class BuildPython(build_py):
    """Copies the Python files, and where no extension follows leaves the record of that."""

    def run(self) -> None:
        """Say early what cannot be had, then copy."""
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
    """The one module, or none: a wheel without compiled code must not name a platform."""
    try:
        present = find_compiler(os.environ) is not None
    except ConfigurationError as error:
        raise SystemExit(f"diffmic_fast: {error}") from None
    return [Extension("diffmic_fast._C", sources=[])] if present else []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension, "build_py": BuildPython})
