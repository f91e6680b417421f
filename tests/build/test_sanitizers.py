"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Native programs (tests/native/*.cpp) over the sources themselves: Python under a sanitizer would drown
a finding in those of other libraries. Needs the source tree and a C++ compiler with the sanitizers.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("DIFFMIC_SOURCE") or Path(__file__).parents[2])
PROGRAMS = sorted((Path(__file__).parents[1] / "native").glob("*.cpp"))
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
if not (SOURCE / "csrc").is_dir():
    pytest.skip("no source tree: set DIFFMIC_SOURCE", allow_module_level=True)

AVX512 = [
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


def compile_with(sanitizers: str, arguments: list[str]) -> None:
    assert COMPILER is not None
    flags = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizers}"]
    include = ["-fno-sanitize-recover=all", f"-I{SOURCE / 'csrc'}"]
    subprocess.run([COMPILER, *flags, *include, *arguments], check=True)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels(tmp_path: Path, sanitizers: str) -> None:
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    try:
        compile_with(sanitizers, [str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")])
        subprocess.run([str(tmp_path / "empty")], check=True)
    except subprocess.CalledProcessError:
        pytest.skip(f"{COMPILER} has no working -fsanitize={sanitizers} here")

    def compile_kernels(path: Path) -> str:
        flags = next((f for name, f in SETS.items() if path.stem.endswith(name)), [])
        if platform.machine() not in ("x86_64", "AMD64"):
            flags = []
        compiled = str(tmp_path / f"{path.stem}.o")
        compile_with(sanitizers, [*flags, "-c", str(path), "-o", compiled])
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_kernels, sorted((SOURCE / "csrc" / "cpu").glob("*.cpp"))))
    assert len(PROGRAMS) >= 3
    for path in PROGRAMS:
        program = str(tmp_path / path.stem)
        compile_with(sanitizers, [str(path), *objects, "-pthread", "-o", program])
        # Every finding ends the program with another status than 0.
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{path.name}: {done.stdout}{done.stderr}"
        assert f"{path.stem} ran" in done.stdout
