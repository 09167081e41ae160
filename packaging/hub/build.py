"""The row-softmax and linear losses as a package of the Hugging Face kernels format.

    python packaging/hub/build.py OUT            # sources, and the CPU build of this machine
    python packaging/hub/build.py OUT --sources  # sources only

OUT becomes a kernel repository: build.toml, csrc/ and torch-ext/ for `kernel-builder`, which makes
the builds for all systems, CUDA among them; and build/<variant>/, which `kernels` loads.

There is no second version of anything: the C++ and Python sources are those of pyloss. Copies
differ in their imports, which are relative here; in the namespace of their ops, which is this
build's; and in the header that the bindings see in pybind11's place (torch-ext/python_abi3.h).

CXX names the compiler; ccache serves where it is installed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import concurrent.futures
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NAME = "pyloss-cross-entropy"
PACKAGE = NAME.replace("-", "_")
VERSION = 0  # of the package's functions, counted as the format has it: 0 may change

# Where the copied functions stand; what they import comes along.
MODULES = ("pyloss.functional.classification", "pyloss.functional.linear")
# Replaced by empty ones: they list what is not in the package.
EMPTY = ("pyloss", "pyloss.functional", "pyloss.kernels", "pyloss.ops", "pyloss.reference")
BINDINGS = ("about", "gemm", "linear_cross_entropy", "row_softmax")
# Defines what a header of another name declares, so that no include leads there.
ALSO = ("cpu/row_hvp.cpp",)

# As CMakeLists.txt has them. Hidden symbols, because a process may hold several builds, and pyloss.
FLAGS = (
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
)
INCLUDES = ("csrc", "torch-ext")


def text_of_version() -> str:
    (found,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
    )
    return found


# --------------------------------------------------------------------------------------------------
# C++


def native_sources(cuda: bool) -> list[str]:
    """Files of csrc/ that the module is made of, headers included: what their includes lead to."""
    csrc = ROOT / "csrc"
    found: set[str] = set()

    def follow(name: str) -> None:
        if name in found:
            return
        found.add(name)
        text = (csrc / name).read_text(encoding="utf-8")
        for included in re.findall(r'"((?:bind|common|cpu|cuda)/[\w.]+)"', text):
            if included.startswith("cuda/") and not cuda:
                continue
            follow(included)
            source = Path(included).with_suffix(".cpp")
            if source.parts[0] != "bind" and (csrc / source).is_file():
                follow(source.as_posix())

    for name in (*(f"bind/{b}.cpp" for b in BINDINGS), *ALSO):
        follow(name)
    if cuda:
        for path in (*csrc.glob("cuda/row_softmax*.cu"), csrc / "cuda" / "device.cu"):
            follow(path.relative_to(csrc).as_posix())
    return sorted(found)


def copy_native(out: Path) -> None:
    for name in native_sources(cuda=True):
        target = out / "csrc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / "csrc" / name).read_text(encoding="utf-8")
        target.write_text(
            text.replace("<pybind11/pybind11.h>", '"python_abi3.h"'), encoding="utf-8"
        )
    for path in (HERE / "torch-ext").iterdir():
        shutil.copy(path, out / "torch-ext" / path.name)
    version = f'#pragma once\n#define PYLOSS_VERSION "{text_of_version()}"\n'
    (out / "torch-ext" / "pyloss_version.h").write_text(version, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Python


def path_of(module: str) -> Path | None:
    folder = ROOT.joinpath(*module.split("."))
    if module.startswith("pyloss.kernels"):
        folder = ROOT.joinpath(*module.split(".")[1:])
    for path in (folder.with_suffix(".py"), folder / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported(module: str, path: Path) -> set[str]:
    """The modules of pyloss that a module imports anywhere, functions included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("pyloss") for a in node.names), path
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *filter(None, [node.module])])
        if base.split(".")[0] == "pyloss":
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    return found


def python_modules() -> dict[str, Path]:
    """Every module of the package with its file, by its name in pyloss."""
    found: dict[str, Path] = {}
    waiting = list(MODULES)
    while waiting:
        module = waiting.pop()
        path = path_of(module)
        if module in found or path is None:
            continue
        found[module] = path
        if module not in EMPTY:
            waiting += imported(module, path)
        waiting.append(module.rpartition(".")[0])  # its package
    return found


OPS_IMPORT = "from {root}_ops import ops as registered_ops\n"
# What differs in a copy besides imports: (module, text, replacement). Each must be found.
EDITS = (
    (
        "pyloss.ops._registry",
        'torch.library.Library("pyloss", "DEF")',
        'torch.library.Library(NAMESPACE, "DEF")',
    ),
    ("pyloss.ops._registry", 'f"pyloss::{name}"', "add_op_namespace_prefix(name)"),
    (
        "pyloss.ops._registry",
        "from pyloss import backends\n",
        "from pyloss import backends\nfrom pyloss._native import NAMESPACE\n"
        "from pyloss._ops import add_op_namespace_prefix\n",
    ),
    ("pyloss.ops._dtensors", 'f"pyloss::{name}"', "add_op_namespace_prefix(name)"),
    (
        "pyloss.ops._dtensors",
        "from pyloss.ops._shards",
        "from pyloss._ops import add_op_namespace_prefix\nfrom pyloss.ops._shards",
    ),
    (
        "pyloss.functional._rows",
        '"pyloss.functional.classification"',
        '__name__.replace("._rows", ".classification")',
    ),
    # Of annotations only, and no part of torch or of the standard library before Python 3.11.
    (
        "pyloss.functional._rows",
        "from typing_extensions import Unpack  # torch has imported it\n",
        "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from typing import Unpack\n",
    ),
)


def adapted(module: str, path: Path) -> str:
    """A module's text with imports and namespace of the package."""
    text = path.read_text(encoding="utf-8")
    for where, old, new in EDITS:
        if where == module:
            assert text.count(old) == 1, f"{path}: {old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
    depth = module.count(".") + (path.name == "__init__.py")
    root = "." * depth
    if "torch.ops.pyloss" in text:
        text = text.replace("torch.ops.pyloss", "registered_ops")
        at = re.search(r"^from pyloss", text, re.M) or re.search(r"^_\w+ = ", text, re.M)
        text = text[: at.start()] + OPS_IMPORT.format(root=root) + text[at.start() :]

    def from_package(match: re.Match) -> str:
        indent, names = match.groups()
        lines = [f"{indent}from {root} import {name}\n" for name in names.split(", ")]
        return "".join(lines).replace(f"{root} import _C", f"{root}_native import native as _C")

    text = re.sub(r"^( *)from pyloss import (.+)\n", from_package, text, flags=re.M)
    return re.sub(r"^( *)from pyloss\.", rf"\1from {root}", text, flags=re.M)


def copy_python(folder: Path) -> None:
    for module, path in python_modules().items():
        parts = module.split(".")[1:]
        target = folder.joinpath(*parts)
        target = target / "__init__.py" if path.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        text = "" if module in EMPTY else adapted(module, path)
        target.write_text(text, encoding="utf-8")
    for path in (HERE / "package").glob("*.py"):
        shutil.copy(path, folder / path.name)


# --------------------------------------------------------------------------------------------------
# What the format asks for besides


def configuration() -> dict[str, dict]:
    """The tables of build.toml."""
    both = [f"csrc/{name}" for name in native_sources(cuda=False)]
    cuda = [f"csrc/{name}" for name in native_sources(cuda=True)]
    own = sorted(f"torch-ext/{p.name}" for p in (HERE / "torch-ext").iterdir())
    shared = {"depends": ["torch"], "include": list(INCLUDES)}
    return {
        "general": {
            "name": NAME,
            "version": VERSION,
            "edition": 5,
            "license": "apache-2.0",
            "backends": ["cpu", "cuda"],
        },
        "torch": {
            "src": [*own, "torch-ext/pyloss_version.h"],
            "include": list(INCLUDES),
        },
        "kernel.cpu": {"backend": "cpu", **shared, "cxx-flags": list(FLAGS), "src": both},
        "kernel.cuda": {
            "backend": "cuda",
            **shared,
            "cxx-flags": list(FLAGS),
            "cuda-capabilities": ["8.0", "9.0", "10.0", "12.0"],
            "cuda-flags": ["--expt-relaxed-constexpr"],
            "src": cuda,
        },
    }


def as_toml(tables: dict[str, dict]) -> str:
    """Strings, numbers and lists of strings: JSON writes them as TOML does."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v, indent=2)}" for k, v in table.items()), ""]
    return "\n".join(lines)


def fingerprint(out: Path) -> str:
    """Seven digits that stand for the sources: only equal ones share a namespace."""
    total = hashlib.sha256()
    for path in sorted(p for top in ("csrc", "torch-ext") for p in (out / top).rglob("*.*")):
        total.update(path.relative_to(out).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:7]


def write_sources(out: Path) -> None:
    for old in ("csrc", "torch-ext"):
        shutil.rmtree(out / old, ignore_errors=True)
    (out / "torch-ext").mkdir(parents=True)
    copy_native(out)
    copy_python(out / "torch-ext" / PACKAGE)
    (out / "build.toml").write_text(as_toml(configuration()), encoding="utf-8")
    for name in ("CARD.md", "flake.nix"):
        shutil.copy(HERE / name, out / name)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")


# --------------------------------------------------------------------------------------------------
# The build of this machine


def variant() -> str:
    """Of any torch from 2.6 on: there is no symbol of torch in the module."""
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi26-cpu-{machine}-{platform.system().lower()}"


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def compile_module(out: Path, module: str, target: Path) -> None:
    """Compiles what build.toml lists for the CPU, from OUT alone."""
    tables = configuration()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    launcher = [found] if (found := shutil.which("ccache")) else []
    objects = out / "build" / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    common = [
        "-std=c++17",
        "-fPIC",
        "-DCPU_KERNEL",
        "-DPy_LIMITED_API=0x03090000",
        f"-DTORCH_EXTENSION_NAME={module}",
        *(f"-I{out / name}" for name in INCLUDES),
        f"-I{sysconfig.get_paths()['include']}",
        *FLAGS,
    ]
    jobs = []
    for table in ("torch", "kernel.cpu"):
        for name in tables[table]["src"]:
            if name.endswith(".cpp"):
                result = objects / (name.replace("/", "_") + ".o")
                command = [*launcher, *compiler, *common, "-c", str(out / name), "-o", str(result)]
                jobs.append((command, str(result)))
    workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, [command for command, _ in jobs]))
    # Every symbol is looked up when the module is imported: one that is missing shows there.
    mac = platform.system() == "Darwin"
    link = (
        ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared", "-Wl,-z,now,-Bsymbolic"]
    )
    link += ["-pthread", *([] if mac else ["-ldl"])]
    run([*compiler, *(result for _, result in jobs), *link, "-o", str(target)])
    shutil.rmtree(objects)


def digest(folder: Path) -> dict:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "metadata.json"):
        found = hashlib.sha256(path.read_bytes()).digest()
        files[path.relative_to(folder).as_posix()] = base64.b64encode(found).decode()
    return {"algorithm": "sha256", "files": files}


OPS = '''"""Written by build.py: the names of this build."""

import torch

from . import {module}

ops = torch.ops.{module}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{module}::{{op_name}}"
'''

# For releases of `kernels` that look for the package in a folder of its name.
INNER = '''"""The package of the folder above."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).resolve().parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("{module}", _path)
_module = sys.modules.get("{module}")
if _module is None:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["{module}"] = _module
    _spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
'''


def build(out: Path) -> Path:
    """Compiles for the CPU of this machine; returns the folder of the variant."""
    module = f"_{PACKAGE}_cpu_{fingerprint(out)}"
    folder = out / "build" / variant()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out / "torch-ext" / PACKAGE, folder)
    (folder / "_ops.py").write_text(OPS.format(module=module), encoding="utf-8")
    (folder / PACKAGE).mkdir()
    inner = INNER.format(module=module)
    (folder / PACKAGE / "__init__.py").write_text(inner, encoding="utf-8")
    compile_module(out, module, folder / f"{module}.abi3.so")
    metadata = {
        "id": module,
        "name": NAME,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": digest(folder),
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder for the kernel repository")
    parser.add_argument("--sources", action="store_true", help="do not compile")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    write_sources(out)
    print(out if arguments.sources else build(out))


if __name__ == "__main__":
    main()
