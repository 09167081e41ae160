"""The tables of lazy exports: stubs for type checkers, what resolves, what a misspelling says."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import pydoc
import subprocess
import sys
import traceback
import types
import typing
from pathlib import Path

import pytest
import torch

import pyloss
from pyloss import _lazy

EVERY = ["pyloss", *(f"pyloss.{name}" for name in _lazy.PACKAGES)]


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(package: str) -> dict[str, str]:
    """Module by name, as the call of ``exports`` in ``__init__.py`` says."""
    source = Path(importlib.import_module(package).__file__).read_text()
    (call,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_lazy.exports"
    )
    modules = ast.literal_eval(call.args[1])
    return {name: f"{package}.{module}" for module, names in modules.items() for name in names}


def stub(package: str) -> tuple[dict[str, str], list[str]]:
    """Module by name, and ``__all__``, as ``__init__.pyi`` says."""
    path = Path(importlib.import_module(package).__file__).with_suffix(".pyi")
    imported, listed = {}, []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            listed = ast.literal_eval(node.value)
    return imported, listed


def test_every_package_with_a_table_is_listed():
    root = Path(pyloss.__file__).parent
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for path in root.glob("*/**/__init__.py")
        if "_lazy.exports" in path.read_text()
    }
    assert sorted(found) == sorted(_lazy.PACKAGES)


@pytest.mark.parametrize("package", EVERY)
def test_stub_table_and_all_agree(package: str):
    module = importlib.import_module(package)
    imported, listed = stub(package)
    known = table(package)
    submodules = {name for name, home in imported.items() if home == package}
    for name in submodules:
        assert getattr(module, name) is importlib.import_module(f"{package}.{name}")
    known |= dict.fromkeys(submodules, package)
    if package == "pyloss":
        known |= {"backend": "pyloss.backends", "show_config": "pyloss.backends"}
    assert imported == known
    assert listed == module.__all__ == sorted(module.__all__)
    assert set(known) <= set(dir(module))
    if package != "pyloss":
        assert set(module.__all__) == set(known) - submodules
    # A module takes the place of its namesake in the package when it is imported.
    names = table(package)
    assert not names.keys() & {home.rpartition(".")[2] for home in names.values()}


@pytest.mark.parametrize("package", EVERY)
def test_names_are_those_of_their_module(package: str):
    module = importlib.import_module(package)
    for name, home in table(package).items():
        value = getattr(module, name)
        assert value is getattr(importlib.import_module(home), name)
        assert not isinstance(value, types.ModuleType)
        assert vars(module)[name] is value  # an ordinary global from now on
        assert value.__module__.startswith("pyloss.")


def test_one_object_everywhere():
    assert pyloss.functional.fused_cross_entropy is pyloss.fused_cross_entropy
    assert pyloss.nn.CrossEntropyLoss is pyloss.CrossEntropyLoss
    assert pyloss.metrics.betti_numbers is pyloss.betti_numbers
    assert pyloss.functional.classification.fused_cross_entropy is pyloss.fused_cross_entropy


def test_star_import_and_help():
    names: dict = {}
    exec("from pyloss import *", names)
    assert set(pyloss.__all__) <= set(names)
    for package in EVERY:
        text = pydoc.plaintext.document(importlib.import_module(package))
        for name in importlib.import_module(package).__all__:
            assert name in text


@pytest.mark.parametrize("package", EVERY)
def test_signatures_and_type_hints(package: str):
    module = importlib.import_module(package)
    for name in table(package):
        value = getattr(module, name)
        if inspect.isclass(value) and issubclass(value, tuple):
            continue  # NamedTuples
        assert inspect.signature(value).parameters or inspect.isclass(value)
        hints = typing.get_type_hints(value.__init__ if inspect.isclass(value) else value)
        assert inspect.isclass(value) or hints


def test_pickles_are_loaded_by_a_process_that_imported_nothing(tmp_path: Path):
    objects = [
        pyloss.nn.CrossEntropyLoss(label_smoothing=0.1),
        pyloss.CrossEntropyLoss,
        pyloss.fused_cross_entropy,
        pyloss.functional.soft_rank,
        pyloss.metrics.RankingAccuracy,
        pyloss.reference.row_softmax,
    ]
    file = tmp_path / "objects.pkl"
    file.write_bytes(pickle.dumps(objects))
    out = run(
        "import pickle, sys\n"
        "objects = pickle.load(open(sys.argv[1], 'rb'))\n"
        "import pyloss\n"
        "assert objects[1] is pyloss.CrossEntropyLoss is type(objects[0])\n"
        "assert objects[2] is pyloss.fused_cross_entropy\n"
        "assert objects[3] is pyloss.functional.soft_rank\n"
        "assert objects[5] is pyloss.reference.row_softmax\n"
        "print(objects[0])",
        str(file),
    )
    assert out.strip() == repr(objects[0])


# --- what is not there ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, name, hint",
    [
        (pyloss, "SoftDiceLoss", "it is pyloss.nn.SoftDiceLoss"),
        (pyloss.nn, "soft_rank", "it is pyloss.soft_rank"),
        (pyloss.functional, "RankingAccuracy", "it is pyloss.metrics.RankingAccuracy"),
        (pyloss, "fused_crossentropy", "did you mean pyloss.fused_cross_entropy?"),
        (pyloss.functional, "SoftRank", "did you mean pyloss.functional.soft_rank?"),
        (pyloss.nn, "CrossEntropyLos", "did you mean pyloss.nn.CrossEntropyLoss?"),
        (pyloss, "rankingaccuracy", "did you mean pyloss.metrics."),
        (pyloss, "nothing_like_it", None),
        (pyloss, "_fused_cross_entropy", None),
        (pyloss, "__path_to_nowhere__", None),
    ],
)
def test_missing_name(module, name: str, hint: str | None):
    with pytest.raises(AttributeError) as caught:
        getattr(module, name)
    text = f"module {module.__name__!r} has no attribute {name!r}"
    assert str(caught.value).startswith(text if hint is None else f"{text}; {hint}")
    assert hint is not None or str(caught.value) == text
    assert not hasattr(module, name)


def test_the_hint_is_given_once():
    """Python adds a guess of its own to a traceback, unless the error names no object."""
    with pytest.raises(AttributeError) as caught:
        getattr(pyloss, "fused_cross_entropi")  # noqa: B009
    assert caught.value.name == "fused_cross_entropi" and caught.value.obj is None
    text = "".join(traceback.format_exception(caught.value))
    assert text.lower().count("did you mean") == 1


# --- a fresh process --------------------------------------------------------------------------

FRESH = """
import sys
import pyloss

def families():
    tables = {f"pyloss.{name}" for name in pyloss._lazy.PACKAGES}
    return {n for n in sys.modules if n.startswith("pyloss.") and n.count(".") > 1} - tables

for module in (pyloss, pyloss.functional):
    for name in ("SoftDiceLoss", "__wrapped__", "_private", "nothing_like_it"):
        assert not hasattr(module, name)
assert "difflib" in sys.modules
dir(pyloss), dir(pyloss.functional), pyloss.__all__
assert not families(), families()

pyloss.metrics.topology
assert not [n for n in families() if n.startswith("pyloss.nn") or "sorting" in n]
"""


def test_what_a_fresh_process_imports():
    run(FRESH)


def test_names_can_be_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pyloss, "soft_sort", torch.sort)
    assert pyloss.soft_sort is torch.sort
    monkeypatch.undo()
    assert pyloss.soft_sort is pyloss.functional.soft_sort
