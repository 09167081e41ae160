"""The compiled CUDA kernels neither spill registers nor use more of them than planned.

Nothing runs here, so no GPU is needed; the resources are read from what the build has compiled:
from pyloss._C, for the architecture that it was built for, and from build/gpu-proof, where `make
gpu-proof` compiles the others. The limits on registers keep the number of threads per
multiprocessor that the kernels are laid out for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pyloss import _C

ROOT = Path(__file__).resolve().parents[2]
# At the end, so that an installed pyloss stays ahead of the one in the source tree.
sys.path.append(str(ROOT))

from bench import _gpu_kernels, _kernel_table, _models  # noqa: E402

MODULE = Path(_C.__file__)
OTHERS = ROOT / "build/gpu-proof/libpyloss_cuda.a"

# Part of a kernel's mangled name -> registers per thread; the first match counts. ModeE0, E1 and E2
# are Mode::kPlain, kOptions and kSoft, `d` is double.
LIMITS = (
    (r"_kernelId", 255),  # double: for gradient checks
    (r"row_softmax_(fwd|bwd)_kernel.*ModeE0", 64),  # 4 blocks of 256 threads
    (r"row_softmax_(fwd|bwd)_kernel.*ModeE1", 85),  # 3 blocks of 256 threads
    (r"row_softmax_(fwd|bwd)_kernel.*ModeE2", 128),  # 2 blocks of 256 threads
    (r"row_softmax_alone", 102),  # 5 blocks of 128 threads
    (r"row_softmax_cluster", 85),
    (r"sorting_tiny_kernel.*Ed", 255),  # double, as above
    (r"sorting_tiny", 128),  # one warp a block; shared memory allows 7 an SM
    (r"sorting_tile", 128),  # a block of 512 threads
    (r"permutahedron_fwd", 96),  # sums in double; a thread per row never fills the registers
    (r"segment_(fold|parts)_kernel.*Ed", 102),  # double, as above; blocks of 128 threads
    (r"segment_(fold|parts)_kernel", 80),  # 6 blocks of 128 threads
    (r"", 64),
)
# Static shared memory in bytes; of sorting_tile what plan_tiles leaves for it (kStaticBytes),
# and the KiB of the runtime.
SHARED_LIMITS = ((r"sorting_tile", 4096 + 1024), (r"", 48 * 1024))


def _disassembler() -> str:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = shutil.which(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"))
    return found or pytest.skip("needs cuobjdump")


def _cuobjdump(*arguments: str, folder: Path | None = None) -> str:
    command = [_disassembler(), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    stack: int  # spilled registers are there
    shared: int
    local: int


def _kernels(library: Path) -> list[Kernel]:
    found = []
    # One part per architecture and source.
    for part in _cuobjdump("-res-usage", str(library)).split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", part)
        for name, text in re.findall(r"Function (\w+):\s+(REG:.*)", part):
            used = dict(re.findall(r"(\w+):(\d+)", text))
            numbers = (int(used[key]) for key in ("REG", "STACK", "SHARED", "LOCAL"))
            found.append(Kernel(arch[1], name, *numbers))
    return found


def _limit(name: str, limits: tuple[tuple[str, int], ...] = LIMITS) -> int:
    return next(limit for pattern, limit in limits if re.search(pattern, name))


def _check(library: Path, archs: set[str]) -> None:
    kernels = _kernels(library)
    for arch in archs:
        assert sum(k.arch == arch for k in kernels) > 30, arch
    bad = [k for k in kernels if k.stack or k.local or k.registers > _limit(k.name)]
    bad += [k for k in kernels if k.shared > _limit(k.name, SHARED_LIMITS)]
    assert not bad, "\n".join(f"{k} (limit {_limit(k.name)})" for k in bad)


def _archs_of_module() -> set[str]:
    if not _C.built_with_cuda:
        pytest.skip("pyloss._C was built without CUDA")
    return {f"sm_{a.partition('-')[0]}" for a in _C.cuda_archs.split(",") if "virtual" not in a}


def test_module_is_without_spills() -> None:
    _check(MODULE, _archs_of_module())


@pytest.mark.exhaustive
def test_other_architectures_are_without_spills() -> None:
    if not OTHERS.exists():
        pytest.skip("needs nvcc, and `make gpu-proof`, which builds them")
    _check(OTHERS, {"sm_80", "sm_100"})


def test_vector_loads_and_stores_are_128_bits_wide(tmp_path: Path) -> None:
    _archs_of_module()
    _cuobjdump("-xelf", "all", str(MODULE), folder=tmp_path)
    # Names of internal linkage hold the name of the source.
    cubins = [p for p in tmp_path.iterdir() if b"row_softmax_backward_cu" in p.read_bytes()]
    assert cubins
    for cubin in cubins:
        bodies = _cuobjdump("-sass", str(cubin)).split("Function : ")[1:]
        assert bodies
        for body in bodies:
            name = body.split()[0]
            assert "LDG.E.128" in body and "STG.E.128" in body, name
            assert "LDL" not in body and "STL" not in body, f"{name} uses local memory"


def _is_double(name: str, kernel: str) -> bool:
    """Whether it is the instance for float64: for gradient checks, beyond every table."""
    arguments = name.split(kernel, 1)[1]
    return re.match(r"I(d|[A-Z]\w*?E(Li)?\d+Ed)", arguments) is not None


def test_table_of_predictions_has_every_kernel() -> None:
    assert sorted(k.name for k in _kernel_table.KERNELS) == _gpu_kernels.cuda_kernels()


def test_table_of_predictions_has_what_was_compiled() -> None:
    """Registers within 16, for other compilers; shared memory not beyond the table's."""
    if "sm_90" not in _archs_of_module():
        pytest.skip("the table is of sm_90")
    # A kernel's name follows its length, so that no other one ends like it.
    compiled = [k for k in _kernels(MODULE) if k.arch == "sm_90"]
    for row in _kernel_table.KERNELS:
        mine = [k for k in compiled if f"{len(row.name)}{row.name}" in k.name]
        mine = [k for k in mine if not _is_double(k.name, row.name)]
        assert mine, row.name
        registers, shared = max(k.registers for k in mine), max(k.shared for k in mine)
        assert abs(registers - row.registers) <= 16, (row.name, registers)
        assert shared <= row.shared, (row.name, shared)


def test_occupancy_rule() -> None:
    """64 registers and 256 threads: 4 blocks; shared memory and threads bound it, too."""
    blocks = _kernel_table.blocks_per_multiprocessor
    assert [blocks(256, r, 0) for r in (32, 64, 65, 80, 128, 255)] == [8, 4, 3, 3, 2, 1]
    assert [blocks(128, 32, s) for s in (0, 30_000, 100_000)] == [16, 7, 2]
    assert blocks(32, 16, 0) == 32


@pytest.mark.parametrize(("classes", "least"), [(4096, 0.85), (32768, 0.92), (131072, 0.95)])
def test_predicted_shares_of_the_copy_rate(classes: int, least: float) -> None:
    for kernel in (_models.FORWARD, _models.BACKWARD):
        assert _models.share(kernel, classes) >= least
    assert _models.share(_models.FORWARD_BEFORE, 4096) < 0.6
