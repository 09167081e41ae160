"""What the launchers of Triton kernels promise: grids, options, guards, no wait for the device.

Recorded on meta tensors; nothing is compiled.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", minversion="3.4")

import triton_scenarios as scenarios
from triton_launches import Launch, record

from pyloss.kernels import _launch

ROOT = Path(__file__).resolve().parents[2]
CALLS = [
    pytest.param(call, id=f"{module}-{name}")
    for calls in (scenarios.USUAL, scenarios.MORE)
    for module, named in calls.items()
    for name, call in named.items()
]
# Grids: lengths that no test can run.
LARGE = {
    "chunks and heads": scenarios.lowrank_of(
        1_000_000, 16, degree=1, heads=(32, 32), causal=True, window=8
    ),
    "states": scenarios.lowrank_of(1_000_000, 16, degree=1, heads=(32, 32), causal=True),
    "many heads": scenarios.lowrank_of(64, 4, degree=1, heads=(64, 64), batch=2048),
    "mask of many keys": scenarios.attention_of(
        1, 16, 16, n_1=3_000_000, masked=True, heads=(1, 1), batch=1
    ),
    "many rows": scenarios.linear_loss(1 << 22, 16, 64),
    "many pairs": scenarios.pairs_of(1 << 24, 1 << 14, 16, columns=True),
    "many wide pairs": scenarios.pairs_of(1 << 19, None, 256),
}


def check_grids(launches: list[Launch]) -> None:
    for launch in launches:
        x, *rest = launch.grid
        assert 0 < x < 2**31 and all(0 < size <= 65535 for size in rest), (launch.name, launch.grid)


@pytest.mark.parametrize("call", CALLS)
def test_launches(call: Callable[[], Any]) -> None:
    launches = record(call)
    check_grids(launches)
    for launch in launches:
        assert launch.guards, f"{launch.name} is launched on whatever device is current"
        assert {"num_warps", "enable_fp_fusion"} <= launch.asked.keys(), launch.name
        assert launch.asked["enable_fp_fusion"] is True


@pytest.mark.parametrize("name", LARGE)
def test_grids_of_long_inputs(name: str) -> None:
    launches = record(LARGE[name])
    assert launches
    check_grids(launches)


def test_the_guard_is_that_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device))
    _launch.device_guard(SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")))
    assert seen == [torch.device("cuda:1")]
    with _launch.device_guard(torch.empty(1)):
        assert len(seen) == 1


# ------------------------------------------------------------------------------ settings


@pytest.fixture
def float32_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("float32_precision")
def test_precision_of_float32_products() -> None:
    precision = _launch.dot_precision
    assert precision(torch.float32) == precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert precision(torch.float32) == "tf32" and precision(torch.float16) == "ieee"
    torch.set_float32_matmul_precision("highest")
    assert precision(torch.float32) == "ieee"


@pytest.mark.usefixtures("float32_precision")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="of torch 2.9 and later"
)
def test_precision_set_by_the_newer_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert _launch.dot_precision(torch.float32) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert _launch.dot_precision(torch.float32) == "ieee"


# ------------------------------------------------------------------------------ memory


class Allocations(TorchDispatchMode):
    """Bytes that are alive at once, at most, of what is allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive.setdefault(
                    storage._cdata, (StorageWeakRef(storage), storage.nbytes())
                )  # fmt: skip
        self.alive = {at: one for at, one in self.alive.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


def backward_bytes(call: Callable[..., Any]) -> tuple[int, int]:
    """(bytes at once, at most, of the backward besides its results, bytes of its inputs)."""
    found = {}

    def counted(backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
            sizes = [t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)]
            with Allocations() as inside:
                results = backward(*args)
            flat = [t for r in results for t in (r if isinstance(r, (list, tuple)) else (r,))]
            kept = sum(t.untyped_storage().nbytes() for t in flat if t is not None)
            found["bytes"] = (inside.peak - kept, sum(sizes))
            return results

        return run

    with pytest.MonkeyPatch.context() as patch:
        ops = (scenarios.linear, scenarios.similarity, scenarios.attention, scenarios.lowrank)
        for module in ops:
            patch.setattr(module, "backward", counted(module.backward))
        record(call)
    return found["bytes"]


LONG = {
    "causal": scenarios.lowrank_of(65536, 64, heads=(32, 32), batch=2, causal=True),
    "one head": scenarios.lowrank_of(65536, 64, heads=(1, 1), causal=True),
    "grouped heads": scenarios.lowrank_of(65536, 64, heads=(32, 4), causal=True),
    "windows": scenarios.lowrank_of(65536, 64, heads=(16, 16), batch=3, causal=True, window=512),
    "wide": scenarios.lowrank_of(16384, 128, heads=(8, 8), batch=2, causal=True),
    "without": scenarios.lowrank_of(65536, 64, heads=(32, 32), batch=2),
    "exact rows": scenarios.attention_of(8192, 8192, 64, heads=(16, 16)),
    "exact windows": scenarios.attention_of(65536, 65536, 128, heads=(16, 16), **scenarios.WINDOWS),
    "tiles": scenarios.linear_loss(16384, 4096, 128256),
    "filtered tiles": scenarios.linear_loss(16384, 4096, 128256, filter=1e-3, exact=True),
    "pairs": scenarios.pairs_of(65536, 65536, 128, columns=True),
    "wide pairs": scenarios.pairs_of(65536, 65536, 512),
    "pairs of half a float32": scenarios.pairs_of(65536, 65536, 192, torch.float16),
}


GROUPED = {"causal": 1.5, "grouped heads": 2}  # heads at a time; all at once: 3.6, 3.4


@pytest.mark.parametrize("name", LONG)
def test_scratch_of_the_backward(name: str) -> None:
    """At most 4 times the inputs; the docs say so."""
    scratch, inputs = backward_bytes(LONG[name])
    assert scratch <= max(GROUPED.get(name, 4) * inputs, 256 << 20), (
        f"{scratch / inputs:.2f} times {inputs / 2**30} GiB"
    )


def test_allocations_are_counted() -> None:
    with Allocations() as counted:
        a = torch.empty(1000, device="meta")
        b = a[10:] + 1.0
        del a, b
        torch.empty(500, device="meta").view(5, 100)
    assert counted.peak == 4 * 1000 + 4 * 990


# --------------------------------------------------------------------- waits, atomics

WAITS = {"item", "cpu", "tolist", "nonzero", "numpy", "synchronize", "masked_select", "unique"}


def launch_paths() -> list[Path]:
    kernels = sorted((ROOT / "kernels").rglob("*.py"))
    return kernels + sorted((ROOT / "pyloss" / "ops").glob("*/triton.py"))


def waits(source: str) -> list[str]:
    """Calls that make the host wait for the device."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            if name in WAITS:
                found.append(f"line {node.lineno}: .{name}()")
            where = [k.value for k in node.keywords if k.arg == "device"] + node.args
            if name == "to" and any(
                isinstance(a, ast.Constant) and a.value == "cpu" for a in where
            ):
                found.append(f"line {node.lineno}: .to('cpu')")
            if isinstance(node.func, ast.Name) and node.func.id in ("bool", "float", "int"):
                if any(isinstance(n, ast.Call) for a in node.args for n in ast.walk(a)):
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
        # A branch on what a reduction found.
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            for part in ast.walk(node.test):
                called = isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute)
                if called and part.func.attr in ("any", "all", "equal", "isnan"):
                    found.append(f"line {node.lineno}: if .{part.func.attr}()")
    return found


@pytest.mark.parametrize("path", launch_paths(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_host_does_not_wait(path: Path) -> None:
    assert waits(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "n = count.item()",
        "t = t.cpu()",
        "t = t.to('cpu')",
        "t = t.to(device='cpu')",
        "rows = mask.nonzero()",
        "yes = bool(mask.any())",
        "x = 1 if mask.any() else 2",
        "while (a == b).all():\n  pass",
    ],
)
def test_waits_are_found(line: str) -> None:
    assert waits(line)


def atomics(source: str) -> list[str]:
    """Atomics of Triton. None is needed: every sum has an owner, and so a fixed order."""
    return [
        f"line {node.lineno}: {node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("atomic_")
    ]


@pytest.mark.parametrize("path", launch_paths(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_kernel_is_atomic(path: Path) -> None:
    assert atomics(path.read_text()) == []


def test_atomics_are_found() -> None:
    assert atomics("tl.atomic_add(ptr, x)") == ["line 1: atomic_add"]
