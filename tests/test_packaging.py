"""The package list, the version, and what a source archive and a wheel contain."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyloss
from pyloss import _C

ROOT = Path(__file__).resolve().parents[1]


def configuration() -> dict:
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml")
    return pyprojecttoml.read_configuration(ROOT / "pyproject.toml", expand=False)


def package_dirs() -> dict[str, Path]:
    found = {}
    for name, folder in (("pyloss", ROOT / "pyloss"), ("pyloss.kernels", ROOT / "kernels")):
        for init in folder.rglob("__init__.py"):
            found[".".join([name, *init.parent.relative_to(folder).parts])] = init.parent
    return found


def test_every_package_is_listed() -> None:
    listed = configuration()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_dirs())


def test_no_directory_without_init() -> None:
    """A directory of modules without __init__.py would be left out without a word."""
    known = set(package_dirs().values())
    if (ROOT / "pyloss").is_symlink():
        pytest.skip("an installed package in its place (tests/versions.py)")
    for folder in (ROOT / "pyloss", ROOT / "kernels"):
        for module in folder.rglob("*.py"):
            assert module.parent in known, module


def test_version() -> None:
    version = configuration()["project"]["version"]
    assert pyloss.__version__ == _C.version == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_changes_stand_under_what_they_are() -> None:
    """A merge may move a heading of a version into the list of fixes above it."""
    text = (ROOT / "CHANGELOG.md").read_text()
    for version in text.split("\n## ")[1:]:
        assert "- " not in version.partition("\n### ")[0].partition("\n")[2], version[:200]
        kinds = re.findall(r"^### (\w+)$", version, re.M)
        assert len(set(kinds)) == len(kinds) and set(kinds) <= {"Added", "Changed", "Fixed"}, kinds


def test_types_ship() -> None:
    folder = Path(pyloss.__file__).parent
    assert (folder / "py.typed").is_file()
    stub = (folder / "_C.pyi").read_text()
    for name in dir(_C):
        if not name.startswith("__"):
            assert re.search(rf"^(def {name}\b|{name}\s*:|class {name}\b)", stub, re.M), name


def test_setup_imports_neither_torch_nor_numpy() -> None:
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"^\s*(import|from) (torch|numpy)\b", text, re.M)


def test_tool_versions_agree() -> None:
    """pre-commit formats with the versions that `make lint` checks with."""
    pins = (ROOT / "requirements-dev.txt").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format"):
        (pin,) = set(re.findall(rf"^{tool}==([\w.]+)", pins, re.M))
        assert set(re.findall(rf"\[{tool}==([\w.]+)\]", hooks)) == {pin}


# Without optimisation, and without clones for instruction sets, which are most of the time of a
# build and decide nothing here; CI builds wheels as users do.
BUILD = {
    "PYLOSS_CMAKE_ARGS": "-DPYLOSS_CUDA=OFF",
    "PYLOSS_BUILD_TYPE": "Debug",
    "CXXFLAGS": "-O0 -g0 -DPYLOSS_NO_MULTIVERSION",
    "MAX_JOBS": "2",
}


def run(*command: str, cwd: Path) -> None:
    env = {**os.environ, **BUILD}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def source_archive(tmp_path: Path) -> Path:
    for tool in ("build", "cmake", "ninja", "pybind11", "wheel"):
        pytest.importorskip(tool)
    run(sys.executable, "-m", "build", "-s", "-n", "-o", str(tmp_path), str(ROOT), cwd=tmp_path)
    (archive,) = tmp_path.glob("pyloss-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path)
    for folder in ("csrc", "pyloss", "kernels", "packaging", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".typed"}:
                assert str(path.relative_to(ROOT)) in names, path
    assert {"CMakeLists.txt", "LICENSE", "README.md", "setup.py"} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc", ".o")) or "/build/" in n]
    return archive


@pytest.mark.slow
def test_source_archive(tmp_path: Path) -> None:
    source_archive(tmp_path)


# Compiles everything once more: 90 seconds of a core.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_wheel(tmp_path: Path) -> None:
    archive = source_archive(tmp_path)
    # The wheel is built from the archive, without torch or a CUDA compiler in play.
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    # What an earlier build left behind, of modules that are deleted by now.
    for folder in ("lib", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"):
        stale = source / "build" / folder / "pyloss" / "deleted_module.py"
        stale.parent.mkdir(parents=True)
        stale.write_text("")
    run(sys.executable, "-m", "build", "-w", "-n", "-o", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("pyloss-*.whl")
    with zipfile.ZipFile(wheel) as archive_file:
        shipped = {n for n in archive_file.namelist() if ".dist-info/" not in n}
        archive_file.extractall(tmp_path / "site")
    want = {"pyloss/py.typed"}
    for package, folder in package_dirs().items():
        want |= {f"{package.replace('.', '/')}/{p.name}" for p in folder.glob("*.py*")}
    binaries = {n for n in shipped if re.fullmatch(r"pyloss/_C\.[^/]*\.(so|pyd)", n)}
    assert len(binaries) == 1
    assert shipped - binaries == want

    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, pyloss; "
        "assert pyloss.__file__.startswith(sys.argv[1]) and not pyloss._C.built_with_cuda; "
        "pyloss.fused_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))"
    )
    run(sys.executable, "-I", "-c", program, str(tmp_path / "site"), cwd=tmp_path)
