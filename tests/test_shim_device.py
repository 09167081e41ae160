"""The CUDA half of the ops from Python, on the stand-in for a GPU that `make ctest` builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def test_cuda_path_from_python():
    modules = sorted(TESTS.parent.glob("build/cmake-*/tests/cpp/shim_module/_C*.so"))
    if not modules:
        pytest.skip("the stand-in is not built: make ctest")
    worker = [sys.executable, str(TESTS / "shim_worker.py"), str(modules[-1])]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "26 problems" in done.stdout
