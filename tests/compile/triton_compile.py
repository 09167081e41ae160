"""Compiles a recorded launch for one architecture and reads what came out; needs no GPU."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_launches import Launch

# Largest dynamic shared memory of a block, in bytes, and registers of a multiprocessor.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
# Instructions that multiply matrices: mma.sync, wgmma, tcgen05.
_MATRIX = re.compile(r"\b(?:[HIQ]MMA|[HIQ]GMMA|UTC[HIQ]?MMA)\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


class Loop(NamedTuple):
    """An innermost loop that multiplies matrices."""

    instructions: int
    matrix: int
    local: int  # of spilled registers
    barriers: int


class Compiled(NamedTuple):
    registers: int
    shared: int
    warps: int
    spilled: int  # bytes that are stored, anywhere in the kernel
    warnings: tuple[str, ...]  # of ptxas, about performance
    loops: tuple[Loop, ...]
    ptx: str

    def programs(self, capability: int) -> int:
        """Of one multiprocessor, as registers and shared memory allow."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = (SHARED_LIMIT[capability] + 1024) // (self.shared + 1024)
        threads = {86: 1536, 89: 1536}.get(capability, 2048)
        return min(by_registers, by_shared, threads // (32 * self.warps), 32)


def _loops(sass: str) -> list[Loop]:
    """Of the instructions of one kernel: a loop is what a branch jumps back over."""
    code = [
        (int(at, 16), text)
        for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass, re.M)
    ]
    spans = []
    for at, text in code:
        jump = re.search(r"\bBRA(?:\.\S+)?\s+(?:\S+,\s+)*`?\(?(?:0x)?([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            spans.append((int(jump[1], 16), at))
    spans.sort(key=lambda span: span[1] - span[0])
    found, taken = [], set()
    for first, last in spans:  # from the shortest on: what is taken lies in a loop further in
        inside = {at: text for at, text in code if first <= at <= last}
        matrix = [at for at, text in inside.items() if _MATRIX.search(text)]
        if matrix and not taken.intersection(matrix):
            taken.update(matrix)
            texts = inside.values()
            found.append(
                Loop(
                    len(inside),
                    len(matrix),
                    sum(bool(_LOCAL.search(t)) for t in texts),
                    sum("BAR.SYNC" in t for t in texts),
                )
            )
    return found


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = shutil.which(str(tool)) or shutil.which("cuobjdump")
    assert command, "no cuobjdump, which Triton's wheels hold"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([command, "-sass", file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_launch(launch: Launch, capability: int) -> Compiled:
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    target = GPUTarget("cuda", capability, 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        done = triton.compile(source, target=target, options=launch.options.__dict__)
    text = log.getvalue()
    used = re.search(r"Used (\d+) registers", text)
    spilled = re.search(r"(\d+) bytes spill stores", text)
    assert used and spilled, f"no log of ptxas: {text}"
    return Compiled(
        int(used[1]),
        done.metadata.shared,
        done.metadata.num_warps,
        int(spilled[1]),
        tuple(re.findall(r"\(C75\d\d\)[^\n]*", text)),
        tuple(_loops(_disassembled(done.asm["cubin"]))),
        done.asm["ptx"],
    )
