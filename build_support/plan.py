"""Decides what a build compiles: with which compiler, whether CUDA, and for which GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


class ConfigurationError(Exception):
    """The environment asks for a build that is not possible."""


class CudaUnavailable(Exception):
    """CUDA cannot or need not be compiled here; only DIFFMIC_CUDA=on makes that an error."""


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
    """Write "80" as "8.0"."""
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
    if wanted not in ("auto", "visible", "on", "off"):
        raise ConfigurationError(f"DIFFMIC_CUDA must be auto, visible, on or off, got {wanted!r}")
    compiler = find_compiler(environment)
    try:
        if wanted == "off":
            raise CudaUnavailable("DIFFMIC_CUDA=off")
        if compiler is None:
            raise CudaUnavailable(NO_COMPILER)
        asked = wanted != "visible" or environment.get("TORCH_CUDA_ARCH_LIST")
        if not asked and not visible_architectures(environment):
            raise CudaUnavailable("DIFFMIC_CUDA=visible, and nvidia-smi lists no GPU")
        return Plan(compiler, *plan_cuda(environment, compiler), "")
    except CudaUnavailable as reason:
        if wanted != "on":
            return Plan(compiler, None, (), str(reason))
        raise ConfigurationError(
            f"DIFFMIC_CUDA=on, but {reason}. Install the CUDA toolkit or set CUDA_HOME; "
            "DIFFMIC_CUDA=auto builds without CUDA"
        ) from None
