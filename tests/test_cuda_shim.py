"""The CUDA kernels compiled as C++ and run on the CPU, one fiber per thread (tests/cpp/cuda_shim).

Each program compares random problems with plain loops in double, in four thread orders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = {  # by op
    "row_softmax": 120,
    "betti_matching": 40,
    "permutahedron": 200,
    "sorting_network": 105,
}
COMPILER = os.environ.get("CXX") or shutil.which("g++")
FLAGS = [
    "-std=c++17",
    "-DPYLOSS_CUDA_SHIM=1",
    f"-I{ROOT / 'tests/cpp/cuda_shim'}",
    f"-I{ROOT / 'csrc'}",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # `unroll` means something to nvcc only
    "-ffp-contract=off",
]

pytestmark = pytest.mark.skipif(
    COMPILER is None or os.uname().sysname != "Linux", reason="needs g++ on Linux"
)


def _build(folder: Path, op: str, *flags: str) -> Path:
    sources = [
        *sorted((ROOT / "csrc/cuda").glob(f"{op}*.cu")),
        ROOT / f"tests/cpp/cuda_shim/test_{op}.cpp",
    ]

    def compile_one(source: Path) -> Path:
        out = folder / (source.name + ".o")
        command = [COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / f"test_{op}"
    subprocess.run([COMPILER, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program


def _run(program: Path, problems: int, seed: int) -> None:
    # LeakSanitizer cannot follow fibers, nor can the detection of use after return.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    done = subprocess.run(
        [str(program), str(problems), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": options},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{problems} problems" in done.stdout


@pytest.mark.parametrize("op", PROBLEMS)
def test_kernels_match_plain_loops_in_every_thread_order(op: str, tmp_path: Path) -> None:
    _run(_build(tmp_path, op, "-O1"), problems=PROBLEMS[op], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("op", PROBLEMS)
def test_kernels_under_sanitizers(op: str, tmp_path: Path) -> None:
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    _run(_build(tmp_path, op, *flags), problems=PROBLEMS[op] // 3, seed=1)
