"""The names of all kernels, read from the sources: what a sanitizer is told to look at.

    python -m bench._gpu_kernels                    one name a line
    python -m bench._gpu_kernels --filters OPTION   arguments of compute-sanitizer, one a line

Needs the standard library only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The name follows the launch bounds, whose parentheses may hold template arguments.
_CUDA = re.compile(r"__global__\b(?:(?!__global__)[^;{])*?\b(\w+_kernel)\s*\(", re.S)
_TRITON = re.compile(r"^@triton\.jit[^\n]*\n(?:[#@][^\n]*\n)*def (\w+_kernel)\(", re.M)


def cuda_kernels(root: Path = ROOT) -> list[str]:
    """Of csrc/cuda."""
    sources = sorted((root / "csrc" / "cuda").glob("*.cu*"))
    return sorted({name for path in sources for name in _CUDA.findall(path.read_text())})


def triton_kernels(root: Path = ROOT) -> list[str]:
    """Of kernels/; functions that a kernel calls do not end in _kernel."""
    sources = sorted((root / "kernels").rglob("*.py"))
    return sorted({name for path in sources for name in _TRITON.findall(path.read_text())})


def kernels(root: Path = ROOT) -> list[str]:
    return cuda_kernels(root) + triton_kernels(root)


def filters(option: str) -> list[str]:
    """Arguments for compute-sanitizer, which looks at a kernel that any of its filters names."""
    return [argument for name in kernels() for argument in (option, f"kns={name}")]


def main(arguments: list[str]) -> int:
    print("\n".join(filters(arguments[1]) if arguments[:1] == ["--filters"] else kernels()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
