"""Makes the Makefile's virtual environment: with packages from an index, or, without a network, with this Python's.

    python build_support/environment.py .venv [--offline]

Without `--offline` this Python's packages are used only if they suffice for a build and nothing can be fetched. Such an
environment contains the file `.offline`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import site
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

# As in pyproject.toml, [build-system].
BUILD_REQUIREMENTS = ("setuptools>=77", "pybind11>=2.13", "cmake>=3.24", "ninja")
OFFLINE = ".offline"
_PIP = ("-m", "pip", "--disable-pip-version-check")


def missing() -> list[str]:
    """Requirements of an offline build that this Python lacks, as pip spells them."""
    return [text for text in ("pip", "torch", "numpy", *BUILD_REQUIREMENTS) if not _installed(text)]


def _installed(requirement: str) -> bool:
    name, _, least = requirement.partition(">=")
    if name in ("cmake", "ninja") and shutil.which(name):
        return True
    # A search for pip by all finders would make setuptools' own one give up its distutils in this process.
    find = PathFinder.find_spec if name == "pip" else importlib.util.find_spec
    if find(name) is None:
        return False
    try:
        return _numbers(metadata.version(name)) >= _numbers(least)
    except metadata.PackageNotFoundError:  # of a system's package manager; the build checks it
        return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def can_fetch() -> bool:
    """Whether pip, with its configuration, fetches a small package within seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *_PIP, "download", "--quiet", "--no-deps", "--dest", folder]
        command += ["--retries", "0", "--timeout", "5", "ninja"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def make_online(folder: Path) -> None:
    """Create the environment, and install what builds the package into it.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; their output is on standard error.
    """
    (folder / OFFLINE).unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin/python"), *_PIP]
    subprocess.run([*pip, "install", "--upgrade", *BUILD_REQUIREMENTS], check=True)


def make_offline(folder: Path) -> None:
    """Create the environment around the packages of this Python, its pip included.

    `--system-site-packages` shows those of the system's Python. This one may be a virtual environment itself, so its
    folders are added. Files *.pth in them are not read: an editable installation there is not taken over.

    Raises:
        subprocess.CalledProcessError: venv failed; its output is on standard error.
    """
    options = ["--clear", "--system-site-packages", "--without-pip"]
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run(
        [folder / "bin/python", "-c", program], check=True, capture_output=True, text=True
    ).stdout.strip()
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    Path(purelib, "outer_python.pth").write_text("\n".join([*folders, ""]), encoding="utf-8")
    (folder / OFFLINE).touch()


def main() -> None:
    """Make the environment in the way that is possible."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    options = parser.parse_args()
    lacking = missing()
    if options.offline and lacking:
        raise SystemExit(
            f"diffmic_fast: without a network, {sys.executable} must have the build requirements; it lacks "
            f"{', '.join(lacking)}"
        )
    if options.offline or not (lacking or can_fetch()):
        print(f"diffmic_fast: nothing is fetched, the packages are those of {sys.executable}")
        make_offline(options.folder)
    else:
        make_online(options.folder)


if __name__ == "__main__":
    main()
