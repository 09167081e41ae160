"""Arguments of the tile kernels: filter and strategy="tiles".

What the kernels compute is checked by tests/interpreter/check_linear_cross_entropy_op.py and, on a
GPU, test_linear_cross_entropy_gpu.py.
"""

from __future__ import annotations

import math
import sys

import linear_cross_entropy_cases as cases
import pytest
import torch

import pyloss
from pyloss import backends
from pyloss.ops import linear_cross_entropy as op
from pyloss.ops.linear_cross_entropy import triton as tiles

N, V = 10, 13


def call(dtype: torch.dtype = torch.float32, target: object = None, **options: object):
    layer = cases.make_layer(N, 6, V, dtype)
    target = cases.labels_with_ignored(N, V) if target is None else target
    return cases.run(cases.fused, layer, target, **options)


def test_nothing_is_left_out_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, say with the Triton of an old torch: chunks, not the reference of the tiles."""
    monkeypatch.setattr(tiles, "runs_on", lambda x: True)
    for has in (False, True):
        monkeypatch.setattr(tiles, "_HAS_TRITON", has)
        with cases.Recorder() as recorder:
            call(filter=1e-3)
        assert any("tiles" in str(func) for func, *_ in recorder.calls) == has


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("options", ({}, {"tau": 1.7, "z_loss": 0.1, "softcap": 5.0}), ids=str)
def test_nothing_is_left_out_on_the_cpu(reduction: str, options: dict) -> None:
    """Bit for bit the call without, however much the filter would allow."""
    with cases.Recorder() as recorder:
        one, two = (call(reduction=reduction, filter=f, **options) for f in (None, 100.0))
    assert torch.equal(one[0], two[0])
    for a, b in zip(one[1], two[1]):
        assert torch.equal(a, b)
    assert recorder.calls and not any("tiles" in str(func) for func, *_ in recorder.calls)


def test_nothing_is_left_out_on_the_reference() -> None:
    with pyloss.backend("reference"):
        one, two = call(), call(filter=100.0)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1][0], two[1][0])


def test_compiles_on_the_cpu() -> None:
    layer, y = cases.make_layer(N, 6, V, torch.float32), cases.labels_with_ignored(N, V)

    def loss(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pyloss.fused_linear_cross_entropy(h, w, y, b, filter=1e-3)

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*layer)
    torch.testing.assert_close(value, loss(*layer))


@pytest.mark.parametrize("value", (0, 0.0, -1.0, math.nan, math.inf))
def test_filter_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="filter must be finite and > 0"):
        call(filter=value)


def test_filter_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="filter must be a"):
        call(filter="auto")


@pytest.mark.parametrize("strategy", ("forward", "recompute"))
def test_filter_needs_the_tiles(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"filter needs strategy 'auto' or 'tiles', .*{strategy}"):
        call(filter=1e-3, strategy=strategy)


PROBABILITIES = torch.full((N, V), 1 / V)
LABELS = torch.arange(N)
REFUSED = {
    "class probabilities": {"target": PROBABILITIES},
    "a MixUp target": {"target": (LABELS, LABELS.flip(0), 0.3)},
    "float64": {"dtype": torch.float64},
    "label_smoothing with tau other than 1": {"label_smoothing": 0.1, "tau": 1.5},
    "return_stats 'argmax', 'rank'": {"return_stats": ("argmax", "lse", "rank")},
    "return_stats 'correct'": {"return_stats": ("correct",)},
    "chunk=4": {"chunk": 4},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("how", ({"filter": 1e-3}, {"strategy": "tiles"}), ids=str)
def test_what_the_tiles_do_not_have_is_named(what: str, how: dict) -> None:
    """On every device, so that a call does not fail on one and pass on another."""
    name = next(iter(how)) if "filter" in how else "strategy='tiles'"
    with pytest.raises(ValueError, match=f"{name} cannot be used with .*{what}"):
        call(**how, **REFUSED[what])


def test_smoothing_under_a_cap_cannot_be_filtered() -> None:
    options = {"label_smoothing": 0.1, "softcap": 5.0}
    with pytest.raises(ValueError, match="filter cannot be used with label_smoothing with softcap"):
        call(filter=1e-3, **options)
    with pytest.raises(RuntimeError, match="needs CUDA"):  # exact tiles have it
        call(strategy="tiles", **options)


def test_a_weight_of_several_dimensions_is_named() -> None:
    x, w, y = torch.randn(N, 6), torch.randn(V, 2, 6), torch.randint(V, (N, 2))
    with pytest.raises(ValueError, match="filter cannot be used with a linear_weight of more"):
        pyloss.fused_linear_cross_entropy(x, w, y, filter=1e-3)


def test_tiles_need_cuda() -> None:
    with pytest.raises(RuntimeError, match="strategy='tiles' needs CUDA tensors, got cpu"):
        call(strategy="tiles")


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyloss.kernels", None)
    layer = cases.make_layer(N, 6, V, torch.float32, requires_grad=False)
    t = op.Tensors(*layer, LABELS, None, None, None, None)
    with pytest.raises(RuntimeError, match=r"need Triton: pip install 'pyloss\[triton\]'"):
        tiles.forward(t, None, op.Codes(0, -100, 0, 1, 0), torch.float32, 0)


def test_the_backend_of_the_tiles() -> None:
    pytest.importorskip("triton", minversion="3.4")
    available = {"triton": None, "reference": None}
    name = "linear_cross_entropy_tiles_fwd"
    assert backends.choose(name, "cuda", available) == "triton"
    assert backends.choose(name, "cpu", available) == "reference"
    assert backends.choose(name, "other", available) == "reference"
    with pyloss.backend("reference"):
        assert backends.choose(name, "cuda", available) == "reference"
    with pyloss.backend("triton"), pytest.raises(RuntimeError, match="needs cuda tensors"):
        backends.choose(name, "cpu", available)


# --- memory -------------------------------------------------------------------------------------


def workspace(rows: int, classes: int, features: int, itemsize: int) -> int:
    """Bytes beyond inputs and gradients, by the formula of docs/linear_cross_entropy.md."""
    columns = tiles.block_columns(rows, classes, itemsize)
    blocks = math.ceil(classes / columns)
    block = rows * columns * itemsize
    ordered = rows * features * itemsize
    input_gradient = rows * features * (4 if blocks > 1 else itemsize)
    # The copy back to the original order comes when the block is gone.
    return ordered + input_gradient + max(block, ordered) + 100 * rows


def test_memory_bound() -> None:
    assert workspace(4096, 128256, 4096, 2) <= 250e6  # to reach: 256 MB


@pytest.mark.parametrize("rows", (0, 1, 7, 500, 4096, 16384, 10**6))
@pytest.mark.parametrize("classes", (1, 127, 1000, 50257, 128256, 262144))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_blocks(rows: int, classes: int, itemsize: int) -> None:
    columns = tiles.block_columns(rows, classes, itemsize)
    assert columns % 128 == 0 and columns > 0
    most = (128 << 20) // (max(rows, 1) * itemsize)
    assert columns <= max(1024, most)
    blocks = math.ceil(classes / columns)
    assert blocks == 1 or blocks == math.ceil(classes / max(1024, most // 128 * 128))
    # Evenly cut: the last block is not a sliver.
    assert blocks * columns - classes < 128 * blocks
