"""README and docs: every Python block runs, links lead somewhere, tables name what exists.

The blocks of a page run in order in one namespace. A block that needs an extra which is not
installed is left out, and so is a later one that uses its names; the page then counts as skipped.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TORCH

import pyloss

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# What an import in a block needs. transformers' Trainer imports accelerate when it is made.
EXTRAS = {"transformers": ("transformers", "accelerate"), "matplotlib": ("matplotlib",),
          "torch_geometric": ("torch_geometric",), "trl": ("trl", "datasets"),
          "peft": ("peft",), "lightning": ("lightning",)}  # fmt: skip
# Blocks that are scripts for torchrun: a process of their own, alone in its group.
SCRIPT = "init_process_group"
# Pages whose script another test runs in two processes every time.
RUN_ELSEWHERE = {
    "docs/meshes.md": ROOT / "tests" / "meshes_worker.py",
    "docs/vocab_parallel.md": ROOT / "tests" / "test_vocab_parallel.py",
}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(path: Path) -> list[tuple[int, str]]:
    """(line, source) of each Python block."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in found]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def bound(tree: ast.Module) -> set[str]:
    """Names that a block defines at its top level."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names


def used(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def missing_extra(tree: ast.Module) -> str | None:
    for name in sorted(imported(tree) & set(EXTRAS)):
        for package in EXTRAS[name]:
            if importlib.util.find_spec(package) is None:
                return package
    return None


def run_script(source: str, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(source)
    program = (
        "import os, runpy, sys\n"
        "import torch.distributed as dist\n"
        "real = dist.init_process_group\n"
        "dist.init_process_group = lambda name: real(\n"
        "    name, store=dist.FileStore(sys.argv[2], 1), rank=0, world_size=1)\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "sys.stdout.flush()\n"
        "os._exit(0)  # gloo's threads may end a process that shuts down in order\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    done = subprocess.run(
        [sys.executable, "-c", program, str(script), str(folder / "store")],
        capture_output=True, text=True, timeout=200, cwd=folder, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# The blocks of tutorials are the cells of notebooks, which tests/test_tutorials.py runs.
WITH_BLOCKS = [p for p in PAGES if p.parent.name != "tutorials" and blocks_of(p)]


@pytest.mark.parametrize("path", WITH_BLOCKS, ids=page_id)
def test_python_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict = {"__name__": "docs"}
    lost: set[str] = set()  # names of blocks that were left out
    left_out: list[str] = []
    for line, source in blocks_of(path):
        where = f"{page_id(path)}, line {line}"
        # The first line of the block stands at its own line, for tracebacks.
        tree = ast.parse("\n" * (line - 1) + source, where)
        extra = missing_extra(tree)
        if extra or (used(tree) - bound(tree)) & lost:
            lost |= bound(tree)
            left_out.append(f"line {line} needs {extra or 'a block that was left out'}")
        elif "fully_shard" in source and TORCH < (2, 11):
            left_out.append(f"line {line} needs torch 2.11 on the CPU")
        elif page_id(path) == "docs/dtensors.md" and TORCH < (2, 10):
            left_out.append(f"line {line} needs torch 2.10")
        elif SCRIPT in source and page_id(path) in RUN_ELSEWHERE:
            assert path.name in RUN_ELSEWHERE[page_id(path)].read_text()
        elif SCRIPT in source:
            run_script(source, tmp_path)
        else:
            lost -= bound(tree)
            exec(compile(tree, where, "exec"), namespace)
    if left_out:
        pytest.skip("; ".join(left_out))


# --- links --------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(path: Path) -> str:
    """The text without code, in which brackets mean something else."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda m: "`" + re.sub(r"[\[\]()]", "", m[0][1:-1]) + "`", text)


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in headings]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in plain}


OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "RELEASE.md"]


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), link
        if path.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{link} leaves the site"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


NAMED_FILE = re.compile(r"`((?:\.ci|bench|csrc|docs|examples|kernels|pyloss|tests)/[\w./*{},-]*)`")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "bench/results/README.md"], ids=page_id)
def test_named_files_exist(path: Path) -> None:
    if path.parent.name == "decisions":
        return  # they say what was decided, not what is
    for name in NAMED_FILE.findall(path.read_text(encoding="utf-8")):
        patterns = [name]
        if braces := re.fullmatch(r"(.*)\{(.*)\}(.*)", name):  # a/b.{h,cpp}
            patterns = [braces[1] + part + braces[3] for part in braces[2].split(",")]
        for pattern in patterns:
            assert any(ROOT.glob(pattern.rstrip("/"))), name


def test_readme_is_short_and_its_links_work_on_a_package_index() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    setup = ROOT / "setup.py"
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    text = runpy.run_path(str(setup))["long_description"]()
    links = LINK.findall(text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    configuration = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.+)"$', configuration, re.M)
    assert f"({repository}/raw/main/docs/img/overview.png)" in text
    assert f"({repository}/blob/main/docs/index.md)" in text


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    assert listed == {p for p in pages if not re.match(r"decisions/\d", p)}  # those: docs/_nav.py


# --- tables that name things --------------------------------------------------------------------


def resolve(dotted: str) -> object:
    """The object of that name; where a function and a module share it, the function."""
    parts = dotted.split(".")
    for cut in range(1, len(parts)):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
            return functools.reduce(getattr, parts[cut:], module)
        except (ModuleNotFoundError, AttributeError):
            continue
    return importlib.import_module(dotted)


@pytest.mark.parametrize(
    "name", ["mkdocs.yml", "CHANGELOG.md", "README.md", "examples/README.md", "docs/api/index.md"]
)
def test_lists_name_nothing_twice(name: str) -> None:
    """As a merge of two branches that touch one line may leave it."""
    text = (ROOT / name).read_text()
    if name == "CHANGELOG.md":  # releases may repeat each other
        text = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    if name.endswith("mkdocs.yml"):
        rows = re.findall(r": (\S+\.md)$", text, re.MULTILINE)
    else:  # rows of tables by their first cell, items of lists, other lines of text
        rows = [re.sub(r"^(\|[^|]+\|).*", r"\1", line) for line in text.splitlines()]
        rows = [row for row in rows if len(row) > 30 or row.startswith(("| `", "| ["))]
    assert rows
    assert not sorted({row for row in rows if rows.count(row) > 1})


def test_api_reference_lists_every_public_name() -> None:
    text = "".join(p.read_text() for p in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", text, re.M)
    assert len(listed) == len(set(listed))
    objects = set()
    for name in listed:
        try:
            objects.add(id(resolve(name)))
        except ModuleNotFoundError as error:  # of an extra that is not installed
            assert not (error.name or "pyloss").startswith("pyloss"), name
    snapshot = (ROOT / "tests" / "api_snapshot.txt").read_text()
    research = pkgutil.iter_modules([str(ROOT / "pyloss" / "research")])  # not in the snapshot
    modules = [f"pyloss.research.{m.name}" for m in research if not m.name.startswith("_")]
    for module in re.findall(r"^\[(\S+)\]$", snapshot, re.M) + modules:
        try:
            names = importlib.import_module(module).__all__
        except ImportError as error:
            assert not (error.name or "pyloss").startswith("pyloss")
            continue
        for name in names:
            if f"{module}.{name}" not in listed:
                found = resolve(f"{module}.{name}")
                is_module = type(found) is type(pyloss)
                assert is_module or id(found) in objects, f"{module}.{name}"


def test_papers_have_one_row_each_and_names_that_exist() -> None:
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    first, _, second = text.partition("\n## ")
    rows = [line.split(" | ") for line in first.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 43))
    for row in rows:
        _, _, status, _, names, _, example, number = row
        assert (status == "not there yet") == (names.strip() == "") == (number.strip(" |") == "")
        for file in filter(None, example.strip().split(", ")):
            assert (ROOT / file.strip("`")).is_file(), file
        for name in re.findall(r"`(pyloss[\w.]+)`", names):
            resolve(name)
    for name in re.findall(r"`(pyloss[\w.]+)`", second):
        resolve(name)


def test_gpu_page_lists_every_kernel() -> None:
    text = (DOCS / "gpu.md").read_text(encoding="utf-8")
    jitted = re.compile(r"^@triton\.jit\b[^\n]*\ndef (\w+_kernel)", re.M)
    kernels = set()
    for path in [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cuh")]:
        kernels |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", path.read_text()))
    for path in (ROOT / "kernels").rglob("*.py"):
        kernels |= set(jitted.findall(path.read_text()))
    assert kernels == set(re.findall(r"`(\w+_kernel)`", text))
