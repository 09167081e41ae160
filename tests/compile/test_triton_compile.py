"""Every Triton kernel of the package compiles for each supported architecture.

In this process, without Triton's cache of earlier runs. A file in kernels/ lists its kernels in
COMPILE_CASES (triton_compile.py), a package of files in that of its __init__.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")

from triton_compile import cases_of, compile_case

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"


def sources_of(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def kernels_of(path: Path) -> list[str]:
    """Read, not imported: collecting the tests must not cost the import of Triton."""
    texts = [source.read_text() for source in sources_of(path)]
    return [name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)]


OPS = [HERE / "sample_kernel.py"] + sorted(
    p  # modules and packages
    for p in KERNELS.iterdir()
    if p.name[0] != "_" and (p.suffix == ".py" or (p / "__init__.py").is_file())
)
# By architecture, and by kernel, so that the processes of pytest-xdist share the work.
EXHAUSTIVE = pytest.mark.exhaustive
CAPABILITIES = [90, pytest.param(80, marks=EXHAUSTIVE), pytest.param(100, marks=EXHAUSTIVE)]


@pytest.fixture(autouse=True)
def no_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "interpreted kernels cannot be compiled"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "path, kernel", [pytest.param(p, k, id=f"{p.stem}-{k}") for p in OPS for k in kernels_of(p)]
)
def test_compiles(path: Path, kernel: str, capability: int, tmp_path: Path) -> None:
    cases = [case for case in cases_of(path) if case["kernel"].__name__ == kernel]
    assert cases, f"no COMPILE_CASES of {kernel}"
    for case in cases:
        done = compile_case(case, capability)
        assert done["cubin_bytes"] > 0
        assert done["shared"] <= done["shared_limit"]
        assert done["missing"] is None
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == len(cases), "compiled elsewhere"


@pytest.mark.parametrize("path", OPS, ids=lambda p: p.stem)
def test_cases(path: Path) -> None:
    """Each is of a kernel that test_compiles finds, and none stands there twice."""
    assert {case["kernel"].__name__ for case in cases_of(path)} == set(kernels_of(path))
    texts = [repr([case["kernel"].__name__, {**case, "kernel": None}]) for case in cases_of(path)]
    assert len(set(texts)) == len(texts)


def test_a_kernel_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    text = (HERE / "sample_kernel.py").read_text()
    broken = tmp_path / "broken.py"
    broken.write_text(text.replace("tl.log(", "tl.no_such_function("))
    with pytest.raises(Exception, match="no_such_function"):
        compile_case(cases_of(broken)[0], 90)
