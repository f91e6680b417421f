"""Builds the extension diffmic_fast._C with CMake and Ninja, and records what was built.

Environment variables:
    DIFFMIC_CUDA: "auto" (default) compiles CUDA where nvcc is found, "on" fails without nvcc, "off".
    TORCH_CUDA_ARCH_LIST: CUDA targets as PyTorch reads them, "8.0;9.0+PTX" or "Hopper"; "All" for a
        wheel that runs on every supported GPU. Default: the compute capabilities of the visible GPUs;
        without a GPU 8.0+PTX, whose machine code runs on 8.x and whose PTX later GPUs compile.
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
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NO_COMPILER = "no C++ compiler was found (CXX, c++, g++, clang++)"
# The kernels use cp.async and matrix instructions of bfloat16, which came with 8.0.
MINIMUM_ARCHITECTURE = 80
ALL_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
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
# Variables besides CMake's definitions that a configured build folder depends on.
CONFIGURING = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")


class ConfigurationError(Exception):
    """The environment asks for a build that is not possible."""


class CudaUnavailable(Exception):
    """CUDA cannot be compiled here; DIFFMIC_CUDA=auto builds without it."""


@dataclass(frozen=True)
class Plan:
    """What a build compiles.

    Attributes:
        compiler: path of the C++ compiler; None builds no extension.
        nvcc: path of nvcc; None builds without CUDA.
        architectures: CUDA targets, "80", "90a", or with PTX "120+PTX".
        cuda_reason: why CUDA is left out; "" where it is not.
    """

    compiler: str | None
    nvcc: str | None
    architectures: tuple[str, ...]
    cuda_reason: str

    @property
    def reason(self) -> str:
        """Why no extension is built; "" where one is."""
        return "" if self.compiler else NO_COMPILER


def find_compiler(environment: Mapping[str, str]) -> str | None:
    """The C++ compiler that CMake would take: CXX, or the first common name on the PATH."""
    path = environment.get("PATH", os.defpath)
    chosen = environment.get("CXX", "").split()
    if chosen:
        found = shutil.which(chosen[0], path=path)
        if found is None:
            raise ConfigurationError(f"CXX={environment['CXX']}, but there is no such program")
        return found
    names = ("c++", "g++", "clang++")
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """nvcc by CUDACXX, CUDA_HOME, CUDA_PATH or the PATH."""
    path = environment.get("PATH", os.defpath)
    if chosen := environment.get("CUDACXX"):
        return shutil.which(chosen, path=path)
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else path)


def known_architectures(nvcc: str) -> tuple[str, ...]:
    """Architectures that this nvcc compiles for: ("75", "80", ...)."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    found = re.findall(r"compute_(\d+)\b", listing.stdout)
    if listing.returncode != 0 or not found:
        raise ConfigurationError(f"{nvcc} --list-gpu-arch failed: {listing.stderr.strip()}")
    return tuple(sorted(set(found), key=int))


def visible_architectures(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Compute capabilities of the GPUs that nvidia-smi lists: ("89", "90"); () without one."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if program is None:
        return ()
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", listing, re.MULTILINE)
    return tuple(sorted({major + minor for major, minor in found}, key=int))


def dotted(architecture: str) -> str:
    """ "8.0" of "80"."""
    return f"{architecture[:-1]}.{architecture[-1]}"


def parse_architectures(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Read TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX 12.0a, Hopper" -> ("80", "90+PTX", "120a").

    Args:
        text: the variable's value; entries are separated by semicolons, commas or spaces. "All"
            stands for those of ALL_ARCHITECTURES that nvcc compiles for, with PTX of the newest.
        known: architectures that nvcc compiles for, "80", "86", ...

    Raises:
        ConfigurationError: an entry is not an architecture, or nvcc or the kernels do not support it.
    """
    if text.strip().lower() == "all":
        *others, newest = (item for item in ALL_ARCHITECTURES if item in known)
        return (*others, f"{newest}+PTX")
    # Longest name first: "Ampere+Tegra" begins with "Ampere".
    for name in sorted(ARCHITECTURE_NAMES, key=len, reverse=True):
        text = re.sub(rf"(?i)(?<!\w){re.escape(name)}(?![\w+])", ARCHITECTURE_NAMES[name], text)
    targets: dict[str, bool] = {}
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: an entry must be like 8.0, 9.0+PTX or 12.0a, All, or one of "
                f"{', '.join(ARCHITECTURE_NAMES)}, got {entry!r}"
            )
        number = match[1] + match[2]
        if int(number) < MINIMUM_ARCHITECTURE:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: an architecture must be 8.0 or newer, got {entry}"
            )
        if number not in known:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {entry}; it knows "
                f"{', '.join(map(dotted, known))}"
            )
        target = number + match[3]
        targets[target] = targets.get(target, False) or match[4] is not None
    if not targets:
        raise ConfigurationError("TORCH_CUDA_ARCH_LIST is set and names no architecture")
    return tuple(target + ("+PTX" if ptx else "") for target, ptx in targets.items())


def default_architectures(known: tuple[str, ...], visible: tuple[str, ...]) -> tuple[str, ...]:
    """The visible GPUs' own architectures; without a GPU one target that every later GPU runs.

    Args:
        known: architectures that nvcc compiles for; of a newer GPU's predecessors it compiles PTX.
        visible: those of the machine's GPUs.

    Raises:
        CudaUnavailable: no visible GPU can run the kernels.
    """
    possible = [item for item in known if int(item) >= MINIMUM_ARCHITECTURE]
    if not visible:
        return (f"{possible[0]}+PTX",)
    served = [item for item in visible if int(item) >= MINIMUM_ARCHITECTURE]
    if not served:
        raise CudaUnavailable(
            f"the kernels need a GPU of compute capability 8.0 or newer, got {dotted(visible[-1])}"
        )
    targets = dict.fromkeys(
        item if item in possible else f"{[p for p in possible if int(p) < int(item)][-1]}+PTX"
        for item in served
    )
    return tuple(item for item in targets if f"{item}+PTX" not in targets)


def cuda_host_compiler(compiler: str, environment: Mapping[str, str]) -> str | None:
    """The C++ compiler that nvcc is told to use, None to leave it its own choice."""
    if chosen := environment.get("CUDAHOSTCXX"):
        return chosen
    # CXX="ccache g++" names a launcher, which nvcc cannot be given.
    return compiler if len(environment.get("CXX", "").split()) < 2 else None


def nvcc_failure(nvcc: str, compiler: str, environment: Mapping[str, str]) -> str:
    """Compile an empty kernel; "" where that works, else the first error that nvcc reports.

    A toolkit that rejects the machine's C++ compiler is the common case.
    """
    host = cuda_host_compiler(compiler, environment)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text("#include <string>\n__global__ void probe() {}\n")
        command = [nvcc, "-std=c++20", "-c", "probe.cu", "-o", "probe.o"]
        command += ["-ccbin", host] if host else []
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    lines = [line for line in (result.stderr + result.stdout).splitlines() if "error" in line]
    return lines[0] if lines else f"exit status {result.returncode}"


def plan_cuda(environment: Mapping[str, str], compiler: str) -> tuple[str, tuple[str, ...]]:
    """nvcc and the CUDA targets.

    Raises:
        CudaUnavailable: there is no nvcc, it does not work, or the GPU is too old.
        ConfigurationError: TORCH_CUDA_ARCH_LIST is not possible.
    """
    nvcc = find_nvcc(environment)
    if nvcc is None:
        raise CudaUnavailable("nvcc was not found (CUDACXX, CUDA_HOME, CUDA_PATH, PATH)")
    if failure := nvcc_failure(nvcc, compiler, environment):
        raise CudaUnavailable(f"{nvcc} does not work with {compiler}: {failure}")
    known = known_architectures(nvcc)
    if listed := environment.get("TORCH_CUDA_ARCH_LIST"):
        return nvcc, parse_architectures(listed, known)
    return nvcc, default_architectures(known, visible_architectures(environment))


def make_plan(environment: Mapping[str, str]) -> Plan:
    """Decide what to compile.

    Raises:
        ConfigurationError: the environment asks for what is not possible.
    """
    wanted = environment.get("DIFFMIC_CUDA") or "auto"
    if wanted not in ("auto", "on", "off"):
        raise ConfigurationError(f"DIFFMIC_CUDA must be auto, on or off, got {wanted!r}")
    compiler = find_compiler(environment)
    try:
        if wanted == "off":
            raise CudaUnavailable("DIFFMIC_CUDA=off")
        if compiler is None:
            raise CudaUnavailable(NO_COMPILER)
        return Plan(compiler, *plan_cuda(environment, compiler), "")
    except CudaUnavailable as reason:
        if wanted != "on":
            return Plan(compiler, None, (), str(reason))
        raise ConfigurationError(
            f"DIFFMIC_CUDA=on, but {reason}. Install the CUDA toolkit or set CUDA_HOME; "
            "DIFFMIC_CUDA=auto builds without CUDA"
        ) from None


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


def run_showing_progress(command: list[str], path: str) -> int:
    """Run a build by Ninja, and write to `path` which file of how many has been compiled.

    Args:
        command: its output goes to standard output as well.
        path: a terminal, where one line is rewritten, or a file; "" or one that cannot be opened
            (no controlling terminal) for none.

    Returns:
        The exit status.
    """
    begin = time.monotonic()
    try:
        shown = open(path, "a", encoding="utf-8")  # noqa: SIM115
    except OSError:
        shown = open(os.devnull, "a", encoding="utf-8")  # noqa: SIM115
    # pip's spinner overwrites the last character of the line, a blank.
    line_format = "\r\033[K{} " if shown.isatty() else "{}\n"

    def show(text: str) -> None:
        shown.write(line_format.format(text))
        shown.flush()

    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with shown, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as build:  # fmt: skip
        if shown.isatty():
            shown.write("\n")
        show("diffmic_fast: compiling the extension")
        for line in build.stdout or ():
            print(line, end="", flush=True)
            if found := re.match(r"\[(\d+)/(\d+)\] Building .*?(csrc/\S+)\.o\b", line):
                show(f"diffmic_fast: {found[1]} of {found[2]} done, {found[3]}")
        status = build.wait()
        outcome = "failed" if status else "compiled"
        show(f"diffmic_fast: {outcome} after {time.monotonic() - begin:.0f} s")
    return status


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
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        # Only what has changed is compiled, if the tools and the options are those of the last time.
        configured = json.dumps([configure, [os.environ.get(name) for name in CONFIGURING]])
        stamp = folder / "configured.json"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != configured:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            stamp.write_text(configured, encoding="utf-8")
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
