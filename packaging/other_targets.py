"""Compiles csrc/common and csrc/cpu for systems that are not this one, with zig's clang, which has
the headers of MinGW and macOS: `pip install ziglang`, then

    python packaging/other_targets.py [TARGET ...]

Objects only: nothing is linked or run. clang-cl and Microsoft's headers are not what it has; they
share the compiler and the C library's limits (no aligned_alloc, a long of 32 bits).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("x86_64-windows-gnu", "aarch64-macos")
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-ffp-contract=fast", f"-I{ROOT / 'csrc'}")


def compiler() -> list[str] | None:
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    zig = shutil.which("zig")
    return zig and [zig, "c++"]


def failures(target: str, folder: Path) -> dict[str, str]:
    """What the compiler says of each source that it refuses."""
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    found = {}
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        command = [*compiler(), "-target", target, *FLAGS, "-c", str(source), "-o"]
        done = subprocess.run(
            [*command, str(folder / "object")], env=env, capture_output=True, text=True
        )
        if done.returncode:
            found[source.name] = done.stderr
    return found


def main() -> int:
    if compiler() is None:
        print("no zig: pip install ziglang")
        return 2
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in sys.argv[1:] or TARGETS:
            found = failures(target, Path(folder))
            wrong += len(found)
            print(f"{target}: {len(found)} failures")
            for name, text in found.items():
                print(f"{name}\n{text}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
