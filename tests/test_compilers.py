"""What compilers and systems disagree about stands in one header, and the C++ sources compile for
Windows and macOS by a compiler that has their headers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "packaging"))
import other_targets  # noqa: E402

HEADER = "common/compiler.h"
# Where each of them may be, besides the header.
SPECIAL = {
    r"__builtin_|__attribute__|__declspec|__has_builtin": (),
    r"__GNUC__|__clang__|_MSC_VER": (),
    # Regions around an #include, which no macro can make.
    r"#pragma (?!once)|_Pragma": ("cpu/per_instruction_set.h",),
    r"__int128": ("cpu/betti_local.h",),  # of gcc and clang, on every machine of 64 bits
    r"\basm\b|__asm|\balloca\b|\bssize_t\b|\bM_PI\b|\btypeof\b": (),
    r"aligned_alloc|posix_memalign|_aligned_malloc": (),
    # Asked for under #if, with an answer where they are not.
    r"<(sys/\w+|unistd|dlfcn|pthread|sched|malloc)\.h>": ("cpu/memory.h", "cpu/parallel.cpp"),
    # 32 bits on Windows; sysconf and /proc of Linux speak in it.
    r"(?<!long )\blong (?!long\b|double\b)[a-zA-Z_]": ("cpu/memory.h", "cpu/parallel.cpp"),
    r"#pragma omp|<omp\.h>": (),
}


def code(path: Path) -> str:
    """Without comments and strings."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


def found_in(text: str) -> set[str]:
    return {pattern for pattern in SPECIAL if re.search(pattern, text)}


@pytest.mark.parametrize("folder", ["common", "cpu", "bind"])
def test_builtins_stand_in_one_header(folder: str) -> None:
    base = ROOT / "csrc"
    for path in sorted((base / folder).iterdir()):
        name = path.relative_to(base).as_posix()
        if name != HEADER:
            for pattern in found_in(code(path)):
                assert name in SPECIAL[pattern], f"{name} has what {HEADER} is for: {pattern}"


def test_exemptions_are_needed() -> None:
    for pattern, names in SPECIAL.items():
        for name in names:
            assert pattern in found_in(code(ROOT / "csrc" / name)), (name, pattern)


@pytest.mark.parametrize(
    "line",
    [
        "int n = __builtin_ctz(x);",
        "#if defined(__clang__)",
        "#pragma GCC unroll 4",
        "unsigned long n = 0;",
        "void* p = std::aligned_alloc(64, n);",
        "#include <unistd.h>",
    ],
)
def test_such_lines_are_seen(line: str) -> None:
    assert found_in(line)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(other_targets.compiler() is None, reason="needs zig: pip install ziglang")
@pytest.mark.parametrize("target", other_targets.TARGETS)
def test_sources_compile(target: str, tmp_path: Path) -> None:
    assert other_targets.failures(target, tmp_path) == {}
