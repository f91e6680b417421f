"""`python tests/emulated_module.py [TARGET]`: build the emulated CUDA kernels, and print the module's path.

Builds in `build/emulated` of the sources, again only what has changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(os.environ.get("DIFFMIC_SOURCE") or Path(__file__).resolve().parents[1])


def build(folder: Path, target: str = "_emulated", source: Path = SOURCE) -> Path:
    """Configure and build one of the modules of tests/emulator in `folder`.

    Raises:
        subprocess.CalledProcessError: CMake or the compiler failed; their output is on standard error.
    """
    import pybind11

    scripts = Path(sys.executable).parent  # where pip puts cmake and ninja
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    configure = [
        *("cmake", "-G", "Ninja", "-S", source / "tests/emulator", "-B", folder),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", folder, "--target", target]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return next(folder.glob(f"{target}.*so"))


if __name__ == "__main__":
    print(build(SOURCE / "build/emulated", *sys.argv[1:]))
