"""Runs tests/interpreter/check_*.py under Triton's interpreter, one process per op.

TRITON_INTERPRET=1 is set for these processes only: set for the whole run it would silently turn
every Triton test on a GPU machine into an interpreted one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", minversion="3.4")
if [int(n) for n in np.__version__.split(".")[:2]] >= [2, 4]:  # int() of an array of one number
    pytest.importorskip("triton", minversion="3.7", reason="the interpreter wants numpy before 2.4")

HERE = Path(__file__).resolve().parent
CHECKS: dict[str, list[Path]] = {}  # by the first two words of the op's name
for _path in sorted((HERE / "interpreter").glob("check_*.py")):
    CHECKS.setdefault("_".join(_path.stem.split("_")[1:3]), []).append(_path)


def _has_more(op: str) -> bool:
    return any("mark.exhaustive" in path.read_text() for path in CHECKS[op])


def run_interpreted(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
@pytest.mark.timeout(1000)  # a hundred seconds on an idle core
@pytest.mark.parametrize(
    "op",
    # Sizes beyond 2^31 and three orders of programs: what the others see is enough for each change.
    [pytest.param(op, marks=pytest.mark.exhaustive if op == "addresses" else ()) for op in CHECKS],
)
def test_interpreted(op: str) -> None:
    done = run_interpreted(*CHECKS[op])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("op", [op for op in CHECKS if _has_more(op)])
def test_interpreted_exhaustively(op: str) -> None:
    done = run_interpreted("--exhaustive", "-m", "exhaustive", *CHECKS[op])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_kernel_is_reported(tmp_path: Path) -> None:
    for folder, name in (("compile", "sample_kernel.py"), ("interpreter", "check_sample.py")):
        (tmp_path / folder).mkdir()
        text = (HERE / folder / name).read_text()
        (tmp_path / folder / name).write_text(
            text.replace("tl.store(out_ptr + row, m +", "tl.store(out_ptr + row, 1 + m +")
        )
    done = run_interpreted(tmp_path / "interpreter" / "check_sample.py")
    assert done.returncode == 1
    assert "4 failed" in done.stdout


def test_this_process_does_not_interpret() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
