"""Who may import whom, and that every op has all its files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# First matching prefix wins. Values: what a module may import besides the standard library, its own
# package and PLUMBING. "pyloss" alone means the names of pyloss/__init__.py. The reasons, and the
# packages that are still to come: docs/decisions/0001-packages.md.
PLUMBING = {"pyloss._lazy", "pyloss.segment"}  # for every package that may import torch
PYTHON_LAYERS = {
    "pyloss._lazy": set(),
    "pyloss.segment": {"torch"},
    "pyloss.reference": {"torch"},
    "pyloss.kernels": {"torch", "triton"},
    "pyloss.ops": {"torch", "pyloss._C", "pyloss.kernels", "pyloss.reference", "pyloss.backends"},
    "pyloss.functional": {"torch", "scipy", "pyloss.ops"},  # scipy: an extra, where it is used
    "pyloss.aggregate": {"torch", "pyloss.functional"},
    "pyloss.distributed": {"torch", "pyloss.ops", "pyloss.functional"},
    "pyloss.integrations": {
        *{"torch", "transformers", "torch_geometric", "trl", "pyloss"},
        *{"pyloss.functional", "pyloss.nn"},
    },
    "pyloss.metrics": {"torch", "pyloss.functional"},
    "pyloss.nn": {"torch", "pyloss.functional"},
    "pyloss.optim": {"torch", "pyloss.ops", "pyloss.functional"},
    "pyloss.regularizers": {"torch", "pyloss.functional"},
    "pyloss.analysis": {"torch", "pyloss.functional"},
    "pyloss.adversarial": {"torch", "pyloss.functional", "pyloss.nn"},
    "pyloss.research": {
        *{"torch", "pyloss", "pyloss.functional", "pyloss.nn", "pyloss.optim", "pyloss.metrics"},
        *{"pyloss.regularizers", "pyloss.analysis", "pyloss.adversarial", "pyloss.distributed"},
    },
    "pyloss.backends": {"torch", "pyloss._C"},
    "pyloss.testing": {"torch", "pyloss", "pyloss.reference", "pyloss.functional"},
    "pyloss.visualize": {"torch", "matplotlib"},
    "pyloss.demo": {
        *{"torch", "numpy", "matplotlib", "skimage", "sklearn"},
        *{"pyloss", "pyloss.functional", "pyloss.nn", "pyloss.metrics", "pyloss.visualize"},
    },
    "pyloss": {
        *{"torch", "pyloss._C", "pyloss.backends"},
        *{"pyloss.functional", "pyloss.metrics", "pyloss.nn"},
    },
    "bench": {
        "torch",
        "matplotlib",
        "triton",
        "pyloss",
        "pyloss.adversarial",
        "pyloss.functional",
        "pyloss.metrics",
        "pyloss.nn",
        "pyloss.optim",
        "pyloss.demo",  # its model
        "pyloss.reference",
        "pyloss.regularizers",
        "pyloss.testing",
        "pyloss.backends",
        "pyloss._C",  # how it was built, for the result files
        # peers, when installed
        "liger_kernel",
        "cut_cross_entropy",
        "quack",
        "cripser",
        "gudhi",
        "topolosses",
        "monai",
        "betti_matching",
        "diffsort",
        "difftopk",
        "torchsort",
        "torchattacks",
        "pytorch_metric_learning",
        "lightly",
        "torch_geometric",
        "lion_pytorch",
        "skimage",
        "numpy",
    },
}

CPP_LAYERS = {
    "common": {"common"},
    "cpu": {"cpu", "common"},
    "cuda": {"cuda", "common"},
    "bind": {"bind", "cpu", "cuda", "common", "pybind11"},
}


def python_files() -> list[tuple[str, Path]]:
    """(module name, path) of everything that has a layer."""
    files = []
    for folder, package in (
        ("pyloss", "pyloss"),
        ("kernels", "pyloss.kernels"),
        ("bench", "bench"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            files.append((".".join(parts), path))
    return files


def layer_of(module: str) -> str | None:
    return next((p for p in PYTHON_LAYERS if module == p or module.startswith(p + ".")), None)


def imports_of(module: str, path: Path, source: str | None = None) -> set[str]:
    """Absolute names of all imported modules; `from a import b` is a.b where that is a module.

    The modules of a table of lazy exports count: they are imported, only later.
    """
    tree = ast.parse(path.read_text() if source is None else source)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in MODULES else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("exports"):
            names |= {f"{package}.{key}" for key in ast.literal_eval(node.args[1])}
    return names


MODULES = {name for name, _ in python_files()} | {"pyloss._C"}


def violations(module: str, imported: set[str]) -> list[str]:
    layer = layer_of(module)
    bad = []
    for name in sorted(imported):
        root = name.partition(".")[0]
        # typing_extensions, which torch depends on: the newer part of typing for Python 3.10.
        if root in sys.stdlib_module_names or root in ("__future__", "typing_extensions"):
            continue
        if root != "pyloss" and root in PYTHON_LAYERS[layer]:
            continue
        inside = layer_of(name)
        if inside == layer and (inside != "pyloss" or name == module):
            continue
        if inside in PLUMBING and "torch" in PYTHON_LAYERS[layer] and layer != "pyloss.kernels":
            continue
        target = name if name == "pyloss._C" else inside
        if target not in PYTHON_LAYERS[layer]:
            bad.append(f"{module} imports {name}")
    return bad


def test_python_layers() -> None:
    bad = [v for name, path in python_files() for v in violations(name, imports_of(name, path))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "module, source",
    [
        ("pyloss.reference.x", "from pyloss import _C"),
        ("pyloss.reference.x", "import numpy as np"),
        ("pyloss.reference.x", "from ..ops import row_softmax"),
        ("pyloss.ops.x", "from pyloss.functional import classification"),
        ("pyloss.functional.x", "import pyloss._C"),
        ("pyloss.functional.x", "def f():\n  from ..reference import row_softmax"),
        ("pyloss.nn.x", "from pyloss.ops import row_softmax"),
        ("pyloss.kernels.x", "import pyloss"),
        ("pyloss.demo.x", "import pyloss.ops"),
        ("pyloss.segment", "import pyloss.functional"),
        ("pyloss._lazy", "import torch"),
        ("pyloss.kernels.x", "from pyloss import segment"),
        ("pyloss.x", '_lazy.exports(__name__, {"research": ("x",)})'),
        ("pyloss.optim.x", "from pyloss import _C"),
        ("pyloss.optim.lr_scheduler", "from pyloss.nn import CrossEntropyLoss"),
        ("pyloss.regularizers.x", "from pyloss.ops import row_softmax"),
        ("pyloss.analysis.x", "import scipy"),
        ("pyloss.adversarial.x", "from pyloss.ops import row_softmax"),
        ("pyloss.research.x", "from pyloss.ops import row_softmax"),
        ("pyloss.research.x", "from pyloss.demo import model"),
        ("bench.x", "from pyloss.ops import row_softmax"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(module, imports_of(module, Path("x.py"), source))


@pytest.mark.parametrize("package", sorted(PYTHON_LAYERS.keys() - {"pyloss.research"}))
def test_nothing_imports_research(package: str) -> None:
    assert violations(f"{package}.x", {"pyloss.research.x"})


def test_kernels_are_imported_lazily() -> None:
    """Only inside a function, so that neither CPU users nor `import pyloss` load Triton."""
    for name, path in python_files():
        if not name.startswith("pyloss") or layer_of(name) == "pyloss.kernels":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found = imports_of(name, path, ast.unparse(node))
                assert not any(n.startswith(("pyloss.kernels", "triton")) for n in found), path


def test_cpp_layers() -> None:
    bad = []
    for layer, allowed in CPP_LAYERS.items():
        for path in sorted((ROOT / "csrc" / layer).glob("*")):
            for kind, target in re.findall(r'#\s*include\s*([<"])([^>"]+)', path.read_text()):
                root = target.partition("/")[0] if "/" in target else ""
                ours_or_theirs = kind == '"' or root in {"pybind11", "torch", "ATen", "c10"}
                if ours_or_theirs and root not in allowed:
                    bad.append(f"{path.relative_to(ROOT)} includes {target}")
    assert not bad, "\n".join(bad)


OPS = sorted(p.stem for p in (ROOT / "pyloss" / "ops").glob("[a-z]*"))


# Ops of torch operations alone have no kernels; the page is that of their family.
COMPOSED = {
    "linear_distillation": "docs/preference.md",
    "similarity_topk": "docs/groco.md",
}


# Of ops that share a page with what needs no op of its own.
PAGES = {"aldr": "docs/ldr.md"}


@pytest.mark.parametrize("op", OPS)
def test_op_has_all_files(op: str) -> None:
    mandatory = [f"pyloss/reference/{op}.py", f"tests/test_{op}.py", f"bench/bench_{op}.py"]
    if op in COMPOSED:
        mandatory.append(COMPOSED[op])
    else:
        page = PAGES.get(op, f"docs/{op}.md")
        mandatory += [f"csrc/bind/{op}.cpp", f"csrc/cpu/{op}.cpp", page]
    missing = [f for f in mandatory if not (ROOT / f).is_file()]
    gpu = [f"csrc/cuda/{op}.cu", f"kernels/{op}.py", f"kernels/{op}/__init__.py"]
    if op not in COMPOSED and not any((ROOT / f).is_file() for f in gpu):
        missing.append(" or ".join(gpu))
    assert not missing


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pyloss" / "ops").glob("_*.py")), ids=lambda p: p.stem
)
def test_what_begins_with_an_underscore_is_no_op(path: Path) -> None:
    """It helps ops: it registers none, and is none by an autograd Function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and path.stem != "_registry":
            called = ast.unparse(node.func)
            assert called not in ("define_op", "register_fake", "lib.define", "lib.impl"), called
        if isinstance(node, ast.ClassDef):
            function = any("Function" in ast.unparse(base) for base in node.bases)
            assert not function, node.name


def test_there_is_an_op() -> None:
    assert OPS
