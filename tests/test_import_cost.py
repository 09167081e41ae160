"""`import pyloss` is cheap and brings in neither Triton nor numpy."""

from __future__ import annotations

import compileall
import re
import subprocess
import sys
from pathlib import Path

import pyloss

LIMIT_MS = 20.0

# torch itself imports numpy where it is installed, so looking at sys.modules is not enough: every
# import statement that runs inside a pyloss module is recorded.
RECORD = """
import builtins, sys
import torch
before = set(sys.modules)
original, asked = builtins.__import__, set()
def recording(name, globals=None, locals=None, fromlist=(), level=0):
    if globals and str(globals.get("__name__", "")).partition(".")[0] == "pyloss" and level == 0:
        asked.add(name.partition(".")[0])
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = recording
import pyloss
builtins.__import__ = original
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(" ".join(sorted(asked)))
print(" ".join(sorted(new)))
"""

FORBIDDEN = {"numpy", "triton", "matplotlib"}


def test_import_brings_in_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RECORD], capture_output=True, text=True, check=True
    )
    asked, new = (set(line.split()) for line in done.stdout.split("\n")[:2])
    assert "torch" in asked  # the recorder works
    assert "pyloss" in new
    assert not asked & FORBIDDEN
    assert not new & FORBIDDEN


def import_ms() -> float:
    """Cumulative time of `import pyloss` after torch."""
    command = [sys.executable, "-X", "importtime", "-c", "import torch; import pyloss"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    match = re.search(r"import time:\s+\d+ \|\s+(\d+) \| pyloss$", report, re.MULTILINE)
    assert match, "pyloss is not in the report"
    return int(match[1]) / 1000


def test_import_time() -> None:
    # With bytecode, as after any first import; PYTHONDONTWRITEBYTECODE would leave it out.
    compileall.compile_dir(Path(pyloss.__file__).parent, quiet=2)
    # The smallest of a few runs: load on the machine adds time and never takes any away.
    times = []
    for _ in range(5):
        times.append(import_ms())
        if times[-1] < LIMIT_MS:
            return
    raise AssertionError(f"import pyloss took {times} ms, limit {LIMIT_MS}")
