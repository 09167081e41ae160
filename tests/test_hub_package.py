"""The package of the Hugging Face kernels format: its rules, and that it computes what pyloss does.

Whoever has the library `kernels` installed runs its loader too.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import pyloss
from pyloss import _C

ROOT = Path(__file__).resolve().parents[1]


def module_of(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


builder = module_of(ROOT / "packaging" / "hub" / "build.py", "hub_build")


# --------------------------------------------------------------------------------------------------
# Sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub_sources")
    builder.write_sources(out)
    return out


def test_imports_are_relative_or_of_torch(sources: Path) -> None:
    """And every relative one leads to a module of the package; _ops.py comes with a build."""
    package = sources / "torch-ext" / builder.PACKAGE
    (package / "_ops.py").touch()
    for path in package.rglob("*.py"):
        allowed = {*sys.stdlib_module_names, "torch"}
        if path.is_relative_to(package / "kernels"):
            allowed.add("triton")  # imported by those functions alone that run on it
        # Syntax of Python 3.9, which the format asks for.
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, path
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level == 0:
                assert node.module.split(".")[0] in allowed, (path, node.module)
                continue
            base = path.parents[node.level - 1]
            assert base.is_relative_to(package), (path, ast.unparse(node))
            for part in filter(None, (node.module or "").split(".")):
                base = base / part
            assert base.is_dir() or base.with_suffix(".py").is_file(), (path, ast.unparse(node))
    (package / "_ops.py").unlink()


def test_ops_are_registered_in_the_build_s_namespace_only(sources: Path) -> None:
    for path in (sources / "torch-ext").rglob("*.py"):
        text = path.read_text()
        assert "ops.pyloss" not in text and "pyloss::" not in text, path
    registry = (sources / "torch-ext" / builder.PACKAGE / "ops" / "_registry.py").read_text()
    assert registry.count("NAMESPACE") == 2 and registry.count("add_op_namespace_prefix") == 2


def test_build_toml_lists_every_source(sources: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    found = tomllib.loads((sources / "build.toml").read_text())
    assert found["general"]["name"].replace("-", "_") == builder.PACKAGE
    listed = set(found["torch"]["src"])
    for backend in found["general"]["backends"]:
        assert found["kernel"][backend]["backend"] == backend
        listed |= set(found["kernel"][backend]["src"])
    written = {
        path.relative_to(sources).as_posix()
        for folder in ("csrc", "torch-ext")
        for path in (sources / folder).rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
    }
    assert listed == written
    assert not [name for name in found["kernel"]["cpu"]["src"] if "cuda" in name]


def test_a_changed_source_has_another_namespace(sources: Path, tmp_path: Path) -> None:
    for folder in ("csrc", "torch-ext"):
        shutil.copytree(sources / folder, tmp_path / folder)
    before = builder.fingerprint(tmp_path)
    assert before == builder.fingerprint(sources)
    header = tmp_path / "csrc" / "common" / "math.h"
    header.write_text(header.read_text() + "\n")
    assert builder.fingerprint(tmp_path) != before


# --------------------------------------------------------------------------------------------------
# The build


def loaded(folder: Path):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    return sys.modules.get(name) or module_of(folder / "__init__.py", name)


# Half a minute of a core without ccache.
@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    out = tmp_path_factory.mktemp("hub")
    builder.write_sources(out)
    return builder.build(out)


@pytest.fixture(scope="module")
def package(built: Path):
    return loaded(built)


def results(module) -> list[torch.Tensor]:
    """Losses and gradients of both functions: small calls and large ones, dtypes, options."""
    generator = torch.Generator().manual_seed(5)

    def logits(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    def labels(rows, classes):
        return torch.randint(classes, (rows,), generator=generator)

    found = []

    def add(loss, *inputs):
        found.extend([loss.detach(), *torch.autograd.grad(loss.sum(), inputs)])

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, y = logits(60, 1500, dtype=dtype), labels(60, 1500)
        y[::7] = -100
        add(module.fused_cross_entropy(x, y), x)
        options = dict(label_smoothing=0.1, z_loss=1e-3, softcap=20.0, reduction="none")
        add(module.fused_cross_entropy(x, y, **options), x)
        h, w, b = (logits(*s, dtype=dtype) for s in ((60, 48), (1500, 48), (1500,)))
        add(module.fused_linear_cross_entropy(h, w, y, b, chunk=32), h, w, b)
        add(module.fused_linear_cross_entropy(h, w, y, strategy="recompute", tau=1.5), h, w)
    x, y, h, w = logits(4, 9), labels(4, 9), logits(4, 3), logits(9, 3)
    add(module.fused_cross_entropy(x, y), x)
    add(module.focal_loss(x, y, gamma=2.0), x)
    add(module.fused_linear_cross_entropy(h, w, y), h, w)
    x = logits(2, 5, 3, 4)
    add(module.fused_cross_entropy(x, torch.zeros(2, 3, 4, dtype=torch.long)), x)
    (first,) = torch.autograd.grad(
        module.fused_cross_entropy(x, torch.ones(2, 3, 4, dtype=torch.long)), x, create_graph=True
    )
    add(first.square().sum(), x)
    return found


def assert_same_bits(found, expected) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"result {i}"


ALONE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyloss":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
folder, where, results = sys.argv[1:]
import importlib.util, json, torch

torch.set_num_threads({threads})
name = json.load(open(folder + "/metadata.json"))["id"]
spec = importlib.util.spec_from_file_location(name, folder + "/{inner}__init__.py")
package = sys.modules[name + "{suffix}"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
namespace = {{"torch": torch}}
exec(open(results).read(), namespace)
torch.save(namespace["results"](package), where)
"""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("inner", ["", f"{builder.PACKAGE}/"])
def test_equals_pyloss_where_pyloss_cannot_be_imported(
    built: Path, tmp_path: Path, inner: str
) -> None:
    """Also in the folder of its own name, where old releases of `kernels` look."""
    import inspect

    (tmp_path / "results.py").write_text(inspect.getsource(results).replace("torch.Tensor", "any"))
    script = ALONE.format(threads=torch.get_num_threads(), inner=inner, suffix="_" * bool(inner))
    where = tmp_path / "found.pt"
    command = [sys.executable, "-c", script, str(built), str(where), str(tmp_path / "results.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_bits(torch.load(where), results(pyloss.functional))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_equals_pyloss_beside_it(package) -> None:
    """Both in one process, each with ops of its own."""
    expected = results(pyloss.functional)
    assert_same_bits(results(package), expected)
    assert_same_bits(results(pyloss.functional), expected)
    own = getattr(torch.ops, package.__name__).row_softmax_fwd
    assert own is not torch.ops.pyloss.row_softmax_fwd
    assert own.default.name().startswith(package.__name__ + "::")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compiles_without_a_break(package) -> None:
    def step(h, w, y):
        loss = package.fused_linear_cross_entropy(h, w, y)
        return loss + package.fused_cross_entropy(h, y % h.shape[1], label_smoothing=0.1)

    h, w = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    y = torch.randint(30, (20,))
    expected = step(h, w, y)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(h, w, y)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, (h, w)), torch.autograd.grad(expected, (h, w))):
        torch.testing.assert_close(a, b)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_layer_has_what_torch_s_module_has(package) -> None:
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    module = torch.nn.CrossEntropyLoss(torch.rand(5), ignore_index=2, label_smoothing=0.2)
    expected = module(x, y)
    layer = package.layers.CrossEntropyLoss
    assert set(vars(layer)) <= {
        *vars(torch.nn.Module),
        *{"__annotations__", "has_backward", "can_torch_compile", "__static_attributes__"},
        "__firstlineno__",
    }
    torch.testing.assert_close(layer.forward(module, x, y), expected)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_bindings_refuse_what_those_of_pyloss_refuse(package) -> None:
    """In the same words: pybind11 and torch-ext/python_abi3.h translate alike."""
    (native,) = (m for n, m in sys.modules.items() if n == f"{package.__name__}.{package.__name__}")
    assert native._records["row_softmax"] == _C.fields("row_softmax")
    assert (native.version, native.built_with_cuda) == (_C.version, False)
    assert native.simd_level() == _C.simd_level() and native.cuda_driver_problem() == ""
    label = torch.tensor([7])
    small = (1, 2, label.data_ptr(), label.data_ptr(), 4, -100, True, label.data_ptr(), 0)
    calls = [
        ("row_softmax_fwd", ((1, 2), (), 1)),  # not a record
        ("row_softmax_fwd", (None, (), 1)),
        ("row_softmax_fwd", ((None,) * 13, (), 1)),  # fields of another type
        ("row_softmax_fwd", (((1, 2, 3.5), *[0] * 12), (), 1)),
        ("scale_inplace", (0, 1, 5, 0, 1)),  # no data
        ("scale_inplace", (0, 99, 0, 0, 1)),  # no such dtype
        ("column_sums", (0, 0, 1, -1, 1, 1, True, 1)),
        ("small_row_softmax", small),  # a label out of range
    ]
    for name, arguments in calls:
        with pytest.raises((ValueError, TypeError, IndexError)) as expected:
            getattr(_C, name)(*arguments)
        with pytest.raises(type(expected.value)) as found:
            getattr(native, name)(*arguments)
        assert str(expected.value) in str(found.value), name
    for arguments in [(1, 2), (0, 1, 5.0, 0, 1), ("0", 1, 5, 0, 1), (2**70, 1, 5, 0, 1)]:
        with pytest.raises(TypeError, match=r"scale_inplace\(\)"):
            native.scale_inplace(*arguments)
        with pytest.raises(TypeError, match=r"scale_inplace\(\)"):
            _C.scale_inplace(*arguments)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_module_needs_no_torch_and_no_version_of_python(built: Path) -> None:
    (module,) = built.glob("*.so")
    assert module.name == json.loads((built / "metadata.json").read_text())["id"] + ".abi3.so"
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", str(module)], capture_output=True, text=True, check=True
    ).stdout
    libraries = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert libraries and not [line for line in libraries if "torch" in line or "python" in line]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_cuda_bindings_compile(sources: Path, tmp_path: Path) -> None:
    """With the header that stands for pybind11. The kernels are those that pyloss compiles."""
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.append(str(Path(nvcc).resolve().parents[1]))
    found = [Path(root) / "include" for root in roots if root]
    headers = next((folder for folder in found if (folder / "cuda_runtime.h").is_file()), None)
    if shutil.which("c++") is None or headers is None:
        pytest.skip("no compiler, or no headers of CUDA")
    folders = [*(sources / name for name in builder.INCLUDES), headers]
    folders.append(Path(sysconfig.get_paths()["include"]))
    for name in builder.BINDINGS:
        command = ["c++", "-std=c++17", "-fsyntax-only", "-DCUDA_KERNEL"]
        command += [f"-I{folder}" for folder in folders]
        command.append(str(sources / "csrc" / "bind" / f"{name}.cpp"))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


# Away from the checkout, whose folder kernels/ has the library's name.
BY_THE_LIBRARY = """
import pathlib, sys
import kernels, torch
import pyloss

folder = pathlib.Path(sys.argv[1])
package = kernels.get_local_kernel(folder.parents[1])
x, y = torch.randn(7, 11), torch.randint(11, (7,))
assert torch.equal(package.fused_cross_entropy(x, y), pyloss.fused_cross_entropy(x, y))
(entry,) = (k for k in kernels.get_loaded_kernels() if k.module is package)
assert entry.metadata.id == package.__name__
digest = entry.metadata.digest
digest.validate(type(digest).hash_variant(digest.algorithm, folder))

loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
expected = loss(x, y)
kernels.replace_kernel_forward_from_hub(torch.nn.CrossEntropyLoss, "CrossEntropyLoss")
mapping = {
    "CrossEntropyLoss": {
        "cpu": kernels.LocalLayerRepository(
            repo_path=folder.parents[1], layer_name="CrossEntropyLoss"
        )
    }
}
with kernels.use_kernel_mapping(mapping):
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    loss = kernels.kernelize(loss, mode=mode, device="cpu", use_fallback=False)
assert torch.equal(loss(x, y), pyloss.fused_cross_entropy(x, y, label_smoothing=0.1))
torch.testing.assert_close(loss(x, y), expected)
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_library_kernels_loads_it(built: Path, tmp_path: Path) -> None:
    """By its own rules: the variant, the digest of the files, and the layer in a model's place."""
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the library kernels")
    command = [sys.executable, "-c", BY_THE_LIBRARY, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
