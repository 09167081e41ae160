"""Nothing on the way to a kernel waits for the device: no copy of Python numbers from the host.

On a CPU nothing would wait. The sources are read for the calls that would, and the calls are seen
on a device that holds no data.
"""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import pyloss
from pyloss.functional import _images
from pyloss.ops import _deferred, betti_matching
from pyloss.ops._launch import constants
from pyloss.ops.betti_matching.records import Options
from pyloss.ops.sorting_network import records

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("pyloss/functional", "pyloss/nn", "pyloss/ops", "kernels")
# (file, function) -> why a copy from the host is right there.
ALLOWED = {
    ("ops/_launch.py", "constants"): "on the CPU only",
    ("ops/sorting_network/records.py", "splitter_table"): "once for each size, and never captured",
    (
        "kernels/tensor_attention_lowrank/features.py",
        "monomials",
    ): "once for each size, and never captured",
    ("ops/betti_matching/reference.py", "loss"): "the reference computes on the host",
    (
        "ops/similarity_softmax/gather.py",
        "layout_of",
    ): "ranks read each other's sizes, and wait for them",
    (
        "functional/_sorting_padding.py",
        "__init__",
    ): "rows are grouped by a length that is looked at",
    ("functional/_gaussian.py", "line"): "nodes of integrals of analysis, in no training step",
}


def is_made(node: ast.AST) -> bool:
    """Whether it is a call that makes a tensor of Python numbers."""
    called = getattr(node, "func", None)
    return isinstance(called, ast.Attribute) and called.attr in ("tensor", "as_tensor")


def copies(tree: ast.AST) -> list[tuple[str, int]]:
    """(function, line) of each call that makes a tensor of Python numbers on a given device."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {k.arg for k in node.keywords}
            name = node.func.attr
            moved = name in ("to", "cuda") and any(map(is_made, ast.walk(node.func.value)))
            if name == "new_tensor" or moved or (is_made(node) and "device" in given):
                found.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(tree, "")
    return found


def test_no_list_becomes_a_tensor_of_a_device_on_the_way_to_a_kernel() -> None:
    seen = set()
    for layer in LAYERS:
        folder = ROOT / layer
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            for function, line in copies(ast.parse(path.read_text())):
                assert (name, function) in ALLOWED, f"{name}:{line}: a copy that waits for a GPU"
                seen.add((name, function))
    assert seen == set(ALLOWED)


def test_such_calls_are_seen() -> None:
    text = "def f(x):\n    a = x.new_tensor([1.0])\n    return torch.tensor([1], device=x.device)\n"
    text += "def g(x):\n    return torch.tensor([1]).view(1).to(x.device)\n"
    assert copies(ast.parse(text)) == [("f", 2), ("f", 3), ("g", 5)]


class Device(torch.overrides.TorchFunctionMode):
    """Refuses a tensor of Python numbers on a device that is not the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            device = args[0].device if function is torch.Tensor.new_tensor else kwargs.get("device")
            assert torch.device(device or "cpu").type == "cpu", "a copy that waits for a GPU"
        return function(*args, **kwargs)


@pytest.mark.parametrize("values", [[], [1.5], [1.0, 2.0, 0.25]], ids=str)
def test_constants(values: list[float]) -> None:
    with Device():
        there = constants(values, torch.float32, torch.device("meta")) if values else None
    here = constants(values, torch.float32, torch.device("cpu"))
    assert here.tolist() == values and here.dtype == torch.float32
    assert there is None or (there.shape, there.device.type) == (here.shape, "meta")


def test_betti_weights_dims_and_padding_are_not_copied() -> None:
    terms = torch.empty((2, 3, 2, 3), device="meta")
    with Device():
        for weights in ((1.5, 0.7, 0.3, 0.5, 2.0), (1.0, 1.0, 0.0, 0.0, 1.0)):
            matched, unmatched, target, *dims = weights
            o = Options(True, 3, False, False, True, 0.1, matched, unmatched, *dims)
            assert betti_matching._total(terms, o, target).shape == (2, 3)
        framed = _images.framed(torch.empty((2, 5, 4), device="meta"), 2, 0.25, True)
        assert framed.shape == (2, 7, 6)
        with pytest.raises(AssertionError, match="waits for a GPU"):
            terms.new_tensor([1.0])


def test_oldest_components_do_not_cross_to_the_host() -> None:
    images = torch.empty((2, 5, 4), device="meta")
    assert betti_matching.essential_rows(images, images, True).device.type == "meta"


def test_mixing_weight_and_class_weights_are_not_copied() -> None:
    from pyloss.functional import _regions, _rows

    y = torch.empty((5,), dtype=torch.int64, device="meta")
    with Device():
        assert _rows._broadcast_mix(0.3, y, torch.float32).shape == (5,)
        x = torch.empty((2, 3, 8, 8), device="meta")
        assert _regions.checked_weight([1.0, 2.0, 3.0], 3, x).shape == (3,)
        assert _regions.checked_weight(2.0, 3, x).shape == ()


def test_a_deferred_number_is_asked_on_its_own_device(monkeypatch) -> None:
    """The copy runs on the stream of the number's device: so must the event and the question."""
    entered = []

    @contextlib.contextmanager
    def device_of(t):
        entered.append(t)
        yield
        entered.pop()

    def on_device(*args, **kwargs):
        assert entered, "another device's stream"

    class Event:
        record = query = on_device
        __init__ = on_device

    real = torch.empty
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", on_device)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    monkeypatch.setattr(_deferred, "_pending", [])
    _deferred.when_known(torch.tensor(3.0), lambda value: None)
    assert len(_deferred._pending) == 1 and not entered


def test_a_splitter_table_is_not_made_inside_a_graph(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="selection of 3 from 11 .* before capturing"):
        records.splitter_table(11, 3, torch.device("cuda", 0))
    here = records.splitter_table(11, 3, torch.device("cpu"))
    assert here[0].shape[1] == 2
    x = torch.randn(2, 11)
    assert pyloss.soft_topk(x, 3, network="splitter_selection").shape == (2, 11, 3)


def test_tables_of_monomials_are_not_made_inside_a_graph_and_stay(monkeypatch) -> None:
    pytest.importorskip("triton")
    from pyloss.kernels.tensor_attention_lowrank.features import monomials

    first = monomials(3, 2, torch.device("cpu"))
    for d in range(4, 104):
        monomials(d, 1, torch.device("cpu"))
    assert monomials(3, 2, torch.device("cpu")) is first  # a graph may hold its address
    assert len(first[0]) == 10
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="degree 2 .* dimension 5 .* before capturing"):
        monomials(5, 2, torch.device("cuda", 0))
