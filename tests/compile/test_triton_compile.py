"""Every Triton kernel of the package compiles for each supported architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
KERNELS = sorted(  # modules and packages
    p
    for p in (HERE.parents[1] / "kernels").iterdir()
    if p.name[0] != "_" and (p.suffix == ".py" or (p / "__init__.py").is_file())
)
FILES = [HERE / "sample_kernel.py", *KERNELS]


def compile_file(path: Path, capability: int) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "triton_compile.py"), str(path), str(capability)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_compiles(path: Path, capability: int) -> None:
    done = compile_file(path, capability)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert cases, "no COMPILE_CASES"
    for case in cases:
        assert case["cubin_bytes"] > 0
        assert case["shared"] <= case["shared_limit"]
        assert case["missing"] is None


def test_a_kernel_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    text = (HERE / "sample_kernel.py").read_text()
    broken = tmp_path / "broken.py"
    broken.write_text(text.replace("tl.log(", "tl.no_such_function("))
    done = compile_file(broken, 80)
    assert done.returncode != 0
    assert "no_such_function" in done.stderr
