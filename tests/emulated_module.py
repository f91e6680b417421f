"""The emulated CUDA kernels, built in build/emulated; only what has changed is compiled again.

python tests/emulated_module.py [TARGET]    build and print the path of the module, or why not
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
FOLDER = SOURCE / "build/emulated"
# Scripts of this environment first: pip installs cmake and ninja there.
_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def obstacle() -> str:
    """Why the emulator cannot be built here; empty if it can."""
    if not (SOURCE / "csrc").is_dir():
        return "the emulator needs the sources, csrc is not beside tests"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "the emulator needs pybind11 (pip install '.[test]')"
    if missing := [name for name in ("cmake", "ninja") if shutil.which(name, path=_PATH) is None]:
        return f"the emulator needs {' and '.join(missing)} (pip install '.[test]')"
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return f"the emulator needs a C++ compiler, and there is no {compiler[0]}"
    probe = [*compiler, "-fsanitize=thread", "-fsanitize=bounds-strict", "-E", "-x", "c++", "-"]
    if subprocess.run(probe, input=b"", capture_output=True, check=False).returncode != 0:
        return f"the emulator needs GCC, {compiler[0]} has no -fsanitize=bounds-strict (set CXX)"
    return ""


def build(folder: Path = FOLDER, target: str = "_emulated", source: Path = SOURCE) -> Path:
    """Configure and build a module of tests/emulator, while other processes that want it wait.

    Raises:
        subprocess.CalledProcessError: CMake or the compiler failed; their output is on standard error.
    """
    import pybind11

    configure = [
        *("cmake", "-G", "Ninja", "-S", source / "tests/emulator", "-B", folder),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    compile_ = ["cmake", "--build", folder, "--target", target]
    environment = {**os.environ, "PATH": _PATH}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
        subprocess.run(compile_, check=True, env=environment, stdout=sys.stderr)
    return next(folder.glob(f"{target}.*so"))


@functools.cache
def prepare() -> str:
    """Build the emulated kernels for this process and its children, unless DIFFMIC_EMULATED names them.

    Returns:
        Why the backend cuda-emulated is not available; empty if it is.

    Raises:
        subprocess.CalledProcessError: the build failed.
    """
    from diffmic_fast import _native

    if not os.environ.get("DIFFMIC_EMULATED"):
        if reason := obstacle():
            return reason
        os.environ["DIFFMIC_EMULATED"] = str(build())
        _native.attempt_emulated.cache_clear()
    return _native.attempt_emulated()[1]


if __name__ == "__main__":
    print(obstacle() or build(FOLDER, *sys.argv[1:]))
