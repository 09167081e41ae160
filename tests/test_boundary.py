"""The compiled module answers a wrong call with an exception, never with a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyloss import _C

FUZZER = Path(__file__).resolve().parent / "boundary_fuzz.py"


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz(seed: int) -> None:
    # Its own process: a crash must fail the test, not end the run.
    command = [sys.executable, str(FUZZER), _C.__file__, str(seed), "10000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
