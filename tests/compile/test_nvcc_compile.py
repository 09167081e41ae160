"""Every CUDA source compiles for every architecture of the wheels, without spilled registers.

Nothing runs here, so no GPU is needed, only nvcc. The limits on registers keep the number of
threads per multiprocessor that the kernels are laid out for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90", "sm_100")

# Part of a kernel's mangled name -> registers per thread; the first match counts. ModeE0, E1 and E2
# are Mode::kPlain, kOptions and kSoft, `d` is double.
LIMITS = (
    (r"_kernelId", 255),  # double: for gradient checks
    (r"row_softmax_(fwd|bwd)_kernel.*ModeE[01]", 85),  # 3 blocks of 256 threads
    (r"row_softmax_(fwd|bwd)_kernel.*ModeE2", 128),  # 2 blocks of 256 threads
    (r"row_softmax_alone", 102),  # 5 blocks of 128 threads
    (r"row_softmax_cluster", 85),
    (r"sorting_tiny_kernel.*Ed", 255),  # double, as above
    (r"sorting_tiny", 128),  # one warp a block; shared memory allows 7 an SM
    (r"sorting_tile", 128),  # a block of 512 threads
    (r"permutahedron_fwd", 96),  # sums in double; a thread per row never fills the registers
    (r"", 64),
)
# Static shared memory in bytes; of sorting_tile what plan_tiles leaves for it (kStaticBytes).
SHARED_LIMITS = ((r"sorting_tile", 4096), (r"", 48 * 1024))


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


NVCC = _nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spilled: int
    shared: int


def _compile(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    out = folder / f"{source.stem}.{arch}.cubin"
    command = [
        NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-cubin",
        f"-arch={arch}", "-Xptxas", "-v", "-Werror", "all-warnings", "-o", str(out), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return out, done.stdout + done.stderr


def _kernels(report: str) -> list[Kernel]:
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
        assert registers and memory, part
        stack, stores, loads = map(int, memory.groups())
        shared = re.search(r"(\d+) bytes smem", part)
        name, bytes_shared = part.split("'")[0], int(shared[1]) if shared else 0
        found.append(Kernel(name, int(registers[1]), stack, stores + loads, bytes_shared))
    return found


def _limit(name: str, limits: tuple[tuple[str, int], ...] = LIMITS) -> int:
    return next(limit for pattern, limit in limits if re.search(pattern, name))


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == "sm_90" else pytest.mark.slow) for a in ARCHS]
)
def test_compiles_without_spills(arch: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda source: _compile(source, arch, tmp_path), SOURCES))
    kernels = []
    for source, (cubin, report) in zip(SOURCES, results):
        assert cubin.stat().st_size > 0, source
        kernels += _kernels(report)
    assert len(kernels) > 30
    bad = [k for k in kernels if k.stack or k.spilled or k.registers > _limit(k.name)]
    bad += [k for k in kernels if k.shared > _limit(k.name, SHARED_LIMITS)]
    assert not bad, "\n".join(f"{k} (limit {_limit(k.name)})" for k in bad)


def _disassembler() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def test_vector_loads_and_stores_are_128_bits_wide(tmp_path: Path) -> None:
    tool = _disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump")
    cubin, _ = _compile(ROOT / "csrc/cuda/row_softmax_backward.cu", "sm_90", tmp_path)
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    for body in sass.stdout.split("Function : ")[1:]:
        name = body.split()[0]
        assert "LDG.E.128" in body and "STG.E.128" in body, name
        assert "LDL" not in body and "STL" not in body, f"{name} uses local memory"
