"""fused_linear_cross_entropy by tiles, from the public function down, under Triton's interpreter.

The kernels' tiles are 16 wide and a block has 48 classes, so that small problems have several of
both. Expected values are those of the reference in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import pyloss
from pyloss.kernels import linear_cross_entropy as K
from pyloss.kernels.linear_cross_entropy import launch
from pyloss.ops.linear_cross_entropy import triton as tiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import linear_cross_entropy_cases as cases
from row_softmax_cases import OPTION_NAMES

SMALL = K.Config(16, 16, 16, num_warps=4, num_stages=2, group=2)
N, D, V = 21, 10, 101
# What the tile kernels do not have; tests/test_linear_cross_entropy_filter.py asks for the errors.
CARRIED = [
    n
    for n in OPTION_NAMES
    if "prob" not in n and "mixup" not in n and not n.startswith("smoothing_tau")
]
TILES = {"strategy": "tiles"}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_config", lambda *arguments: SMALL)
    monkeypatch.setattr(tiles, "block_columns", lambda rows, classes, itemsize: 48)


def layer_of(dtype: torch.dtype = torch.float32, **kwargs: object) -> cases.Layer:
    return cases.make_layer(N, D, V, dtype, **kwargs)


def compare(layer: cases.Layer, target: torch.Tensor, factor: float = 1.0, **options) -> None:
    """Loss and the gradients of input, weight and bias against float64."""
    loss, grads = cases.run(cases.fused, layer, target, **TILES, **options)
    want, exact = cases.run(cases.referenced, cases.fresh(layer, torch.float64), target, **options)
    wide = options.get("loss_dtype") or layer.input.dtype
    assert loss.dtype == wide
    assert [g.dtype for g in grads] == [t.dtype for t in layer if t is not None]
    eps = 2e-6 if wide == torch.float32 else 2 * torch.finfo(wide).eps
    torch.testing.assert_close(loss.double(), want.double(), rtol=eps, atol=1e-6)
    for name, got, right in zip(("input", "weight", "bias"), grads, exact):
        bound = 1e-5 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
        assert cases.distance(got, right) < bound * factor, name


def test_the_op_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("linear_softmax_stats", "linear_softmax_grad"):
        launch = getattr(K, name)
        monkeypatch.setattr(
            K, name, lambda *a, _f=launch, _n=name, **k: (ran.append(_n), _f(*a, **k))[1]
        )
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    cases.run(cases.fused, layer, y)
    assert ran == []
    for how in (TILES, {"filter": 1e-3}):
        cases.run(cases.fused, layer, y, **how)
        assert ran == ["linear_softmax_stats"] + 3 * ["linear_softmax_grad"]
        ran.clear()
        with pyloss.backend("reference"):
            cases.run(cases.fused, layer, y, **how)
        assert ran == []


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_options(name: str, reduction: str) -> None:
    target, options = cases.make_options(name, (N, V), torch.float32)
    if reduction == "none":
        options.pop("num_items", None)
    compare(layer_of(), target, reduction=reduction, **options)


@pytest.mark.parametrize("weighted", (False, True))
def test_smoothing_of_scaled_logits(weighted: bool) -> None:
    options = {"weight": torch.rand(V) + 0.2} if weighted else {}
    options |= {"label_smoothing": 0.3, "temperature": 1.7, "logit_scale": 0.6}
    compare(layer_of(), cases.labels_with_ignored(N, V), **options)


@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1, "softcap": 5.0}), ids=str)
def test_one_block_and_default_tiles(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.undo()
    assert tiles.block_columns(N, V, 4) >= V
    compare(layer_of(), cases.labels_with_ignored(N, V), **options)
    compare(layer_of(bias=False), cases.labels_with_ignored(N, V), reduction="sum", **options)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("plain", "everything_smoothed", "smoothing_weight"))
def test_half_types(dtype: torch.dtype, name: str) -> None:
    target, options = cases.make_options(name, (N, V), dtype)
    compare(layer_of(dtype), target, loss_dtype=torch.float32, **options)
    compare(layer_of(dtype), target, reduction="sum", **options)
    wide = {"accumulate_dtype": torch.float32}
    layer, ours = layer_of(dtype), []
    for how in ({}, wide):
        ours.append(cases.run(cases.fused, layer, target, **TILES, **how, **options)[1][1])
    _, exact = cases.run(cases.referenced, cases.fresh(layer, torch.float64), target, **options)
    plain, better = (cases.distance(g, exact[1]) for g in ours)
    assert better <= plain < torch.finfo(dtype).eps


def test_statistics_and_their_gradients() -> None:
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    names = ("lse", "logprob", "entropy", "z_loss")
    options = dict(reduction="none", return_stats=names, z_loss=0.1, temperature=0.8, tau=1.3)
    value, stats = cases.fused(layer, y, **TILES, **options)
    exact = cases.fresh(layer, torch.float64)
    want, right = cases.referenced(exact, y, **options)
    cotangents = torch.randn(4, N, dtype=torch.float64)
    total, expected = (value.double() * cotangents[3]).sum(), (want * cotangents[3]).sum()
    for name, c in zip(names[:3], cotangents):
        got = getattr(stats, name)
        torch.testing.assert_close(got.double(), right[name].double(), rtol=1e-5, atol=1e-5)
        assert got[3] == 0
        total, expected = total + (got.double() * c).sum(), expected + (right[name] * c).sum()
    torch.testing.assert_close(stats.z_loss.double(), right["z_loss"], rtol=1e-5, atol=1e-5)
    for a, b in zip(cases.gradients(total, layer), cases.gradients(expected, exact)):
        assert cases.distance(a, b) < 1e-5
    # A statistic alone: the loss has no gradient.
    _, stats = cases.fused(layer, y, **TILES, **options)
    _, right = cases.referenced(exact, y, **options)
    got = cases.gradients(stats.entropy.sum(), layer)
    for a, b in zip(got, cases.gradients(right["entropy"].sum(), exact)):
        assert cases.distance(a, b) < 1e-5


@pytest.mark.parametrize("how", (TILES, {"filter": 1e-4}), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_nan_in_ignored_rows_changes_nothing(how: dict, reduction: str) -> None:
    layer, y = layer_of(requires_grad=False), cases.labels_with_ignored(N, V)
    token = torch.rand(N)
    found = []
    for bad in (0.0, math.nan):
        x, k = layer.input.clone(), token.clone()
        x[y == -100], k[y == -100] = bad, bad
        leaf = cases.fresh(layer._replace(input=x))
        loss, grads = cases.run(
            cases.fused, leaf, y, reduction=reduction, token_weight=k, label_smoothing=0.1, **how
        )
        assert grads[0][y == -100].eq(0).all()
        found.append([loss, *grads])
    for a, b in zip(*found):
        assert torch.equal(a, b) and a.isfinite().all()


def test_all_rows_ignored_and_no_rows() -> None:
    layer = layer_of()
    y = torch.full((N,), -100)
    for reduction, want in (("mean", math.nan), ("sum", 0.0)):
        loss, grads = cases.run(cases.fused, layer, y, reduction=reduction, **TILES)
        torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
        assert all(g.eq(0).all() for g in grads)
    assert cases.fused(layer, y, empty="zero", **TILES) == 0
    empty = cases.make_layer(0, D, V, torch.float32)
    loss, grads = cases.run(cases.fused, empty, y[:0], reduction="sum", **TILES)
    assert loss == 0 and grads[0].shape == (0, D) and grads[1].eq(0).all() and grads[2].eq(0).all()


@pytest.mark.parametrize("bad", (-1, V, 2**40))
def test_labels_out_of_range_give_nan(bad: int) -> None:
    """As on CUDA by chunks: in the loss and the gradient of that row."""
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    y[5] = bad
    loss, grads = cases.run(cases.fused, layer, y, reduction="none", **TILES)
    at = torch.arange(N) == 5
    assert torch.equal(loss.isnan(), at)
    assert torch.equal(grads[0].isnan().all(1), at) and torch.equal(grads[0].isnan().any(1), at)


@pytest.mark.parametrize("kept", ((0,), (1,), (2,), (0, 2), (1, 2)))
def test_what_is_frozen_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, kept: tuple[int, ...]
) -> None:
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    options = {"label_smoothing": 0.1}
    _, want = cases.run(cases.fused, layer, y, **TILES, **options)
    ran = set()
    for name in ("masked_matmul_nn", "masked_matmul_tn"):
        launch = getattr(K, name)
        monkeypatch.setattr(
            K, name, lambda *a, _f=launch, _n=name, **k: (ran.add(_n), _f(*a, **k))[1]
        )
    frozen = cases.Layer(*(t.detach().requires_grad_(i in kept) for i, t in enumerate(layer)))
    value = cases.fused(frozen, y, **TILES, **options)
    asked = [frozen[i] for i in kept]
    grads = torch.autograd.grad(value, asked, cases.upstream_of(value))
    for i, g in zip(kept, grads):
        assert torch.equal(g, want[i])
    assert ran == {n for n, i in (("masked_matmul_nn", 0), ("masked_matmul_tn", 1)) if i in kept}


def test_label_types_and_shift() -> None:
    layer = cases.make_layer((3, 7), D, V, torch.float32)
    y = torch.randint(V, (3, 7))
    want, exact = cases.run(cases.referenced, cases.fresh(layer, torch.float64), y, shift=1)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        loss, grads = cases.run(cases.fused, layer, y.to(dtype), shift=1, **TILES)
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        for a, b in zip(grads, exact):
            assert cases.distance(a, b) < 1e-5


def test_strided_and_expanded_inputs() -> None:
    layer, y = layer_of(requires_grad=False), cases.labels_with_ignored(N, V)
    transposed = cases.Layer(
        layer.input.t().contiguous().t(),
        layer.weight.t().contiguous().t(),
        layer.bias[:1].expand(V),
    )
    leaves = cases.Layer(*(t.detach().requires_grad_() for t in transposed))
    compare(leaves, y)


def test_autocast_and_wide_weights() -> None:
    """The weight stays float32 under autocast, as does its gradient."""
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = cases.run(cases.fused, layer, y, **TILES)
    _, want = cases.run(cases.referenced, cases.fresh(layer, torch.float64), y)
    for a, b in zip(grads, want):
        assert a.dtype == torch.float32 and cases.distance(a, b) < 2e-2


# --- filter -------------------------------------------------------------------------------------


def peaked() -> tuple[cases.Layer, torch.Tensor]:
    """One-hot features; the higher a class, the less of a rival it is."""
    x = torch.zeros(N, D)
    x[torch.arange(N), torch.arange(N) % D] = 1
    weight = torch.randn(V, D) - torch.linspace(0, 14, V)[:, None]
    y = torch.randint(40, (N,))
    y[2], y[20], y[7] = 90, 75, -100
    return cases.fresh(cases.Layer(x, weight, torch.randn(V))), y


def masks_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    masks, launch = [], K.linear_softmax_grad

    def spy(*args, **kwargs):
        dz, mask = launch(*args, **kwargs)
        masks.append(mask)
        return dz, mask

    monkeypatch.setattr(K, "linear_softmax_grad", spy)
    return masks


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"tau": 1.7, "token_weight": torch.rand(N) + 0.1},
        {"softcap": 20.0, "z_loss": 1e-3},
        {"label_smoothing": 0.1},
    ),
    ids=("plain", "tau", "cap", "smoothing"),
)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_filter(monkeypatch: pytest.MonkeyPatch, options: dict, reduction: str) -> None:
    options = {**options, "reduction": reduction}
    masks = masks_of(monkeypatch)
    layer, y = peaked()
    exact, full = cases.run(cases.fused, layer, y, **TILES, **options)
    assert masks == [None] * 3

    # The rule, from logits that are stored and without the smoothing that every entry has.
    double = cases.fresh(layer, torch.float64)
    z = torch.nn.functional.linear(*double).detach().requires_grad_()
    eye = torch.eye(V, dtype=torch.float64)
    value = cases.reference(z, eye, y, **cases.exact(options))
    (dz,) = torch.autograd.grad(value, z, cases.upstream_of(value))
    if "label_smoothing" in options:
        share = torch.where(y == -100, 0.0, cases.upstream_of(value))
        dz = dz + (0.1 / V * share / (1 if reduction == "none" else N - 1))[:, None]
    order = torch.argsort((y == -100).to(torch.uint8), stable=True)
    label = torch.nn.functional.one_hot(y.clamp(0), V).bool() & (y != -100)[:, None]
    size = (dz.abs() / dz.abs().amax(1, keepdim=True)).nan_to_num()
    size = torch.where(label, math.inf, size)[order]
    largest = torch.nn.functional.max_pool2d(size[None, None], 16, ceil_mode=True)[0, 0]

    middle = largest[largest.isfinite()].median().item()
    for eps in (0.98 * middle, 1.02 * middle):  # just below and above one tile's own threshold
        masks.clear()
        loss, grads = cases.run(cases.fused, layer, y, filter=eps, **options)
        assert torch.equal(loss, exact)
        kept = torch.cat([m.tiles for m in masks], 1).bool()  # blocks of 48 are three tiles wide
        assert torch.equal(kept, largest > eps)
        dropped = ~kept.repeat_interleave(16, 0)[:N].repeat_interleave(16, 1)[:, :V]
        lost = torch.zeros_like(dz).index_copy_(0, order, torch.where(dropped, dz[order], 0.0))
        left_out = (lost @ double.weight, lost.T @ double.input, lost.sum(0))
        for name, a, b, c in zip(("input", "weight", "bias"), grads, full, left_out):
            torch.testing.assert_close((b - a).double(), c, rtol=1e-3, atol=3e-6, msg=name)


def test_filter_is_relative_to_each_row() -> None:
    """Rows of loss 1e-7 keep their gradient; an absolute threshold would drop their rivals."""
    layer, y = cases.fresh(cases.Layer(torch.eye(2)[[0] * 8 + [1] * 8], torch.full((V, 2), -60.0),
                           torch.zeros(V))), torch.zeros(16, dtype=torch.long)  # fmt: skip
    with torch.no_grad():
        layer.weight[0] = 0.0
        layer.weight[50:53, 0] = -16.0
    _, full = cases.run(cases.fused, layer, y, reduction="sum", **TILES)
    _, grads = cases.run(cases.fused, layer, y, reduction="sum", filter=1e-2)
    for a, b in zip(grads, full):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)
    assert grads[1][50, 0] > 0


def test_filter_of_statistics() -> None:
    """The threshold follows the entries of the whole gradient, with those of the entropy."""
    layer, y = peaked()
    options = dict(reduction="none", return_stats=("entropy",))
    for how, bound in ((1e-7, 1e-5), (1e-3, 2e-2)):
        found = []
        for way in (TILES, {"filter": how}):
            loss, stats = cases.fused(layer, y, **way, **options)
            found.append(cases.gradients((loss - 0.5 * stats.entropy).sum(), layer))
        for a, b in zip(*found):
            assert cases.distance(a, b) < bound


# --- the framework ------------------------------------------------------------------------------


def test_opcheck() -> None:
    layer = layer_of(requires_grad=False)
    y = cases.labels_with_ignored(N, V)
    with cases.Recorder("pyloss.linear_cross_entropy_tiles") as recorder:
        with torch.enable_grad():
            for options in (
                {"filter": 1e-3},
                {**TILES, "reduction": "none", "return_stats": ("entropy",), "tau": 1.5},
            ):
                cases.run(cases.fused, cases.fresh(layer), y, **options)
    assert len(recorder.calls) == 4
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_compile() -> None:
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    for options in ({"filter": 1e-3}, {**TILES, "reduction": "none", "label_smoothing": 0.1}):

        def loss(h, w, b, options=options):
            return pyloss.fused_linear_cross_entropy(h, w, y, b, **options)

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        value, want = compiled(*layer), loss(*layer)
        assert torch.equal(value, want)
        for a, b in zip(cases.gradients(value, layer), cases.gradients(want, layer)):
            assert torch.equal(a, b)


def test_double_backward_goes_through_stored_logits() -> None:
    layer, y = layer_of(), cases.labels_with_ignored(N, V)
    found = []
    for way in (TILES, {}):
        (gx,) = torch.autograd.grad(cases.fused(layer, y, **way), layer.input, create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_twice_gives_the_same_bits() -> None:
    layer, y = peaked()
    value = cases.fused(layer, y, filter=1e-2)
    one, two = (cases.gradients(value, layer, retain_graph=True) for _ in range(2))
    again = cases.gradients(cases.fused(layer, y, filter=1e-2), layer)
    for a, b, c in zip(one, two, again):
        assert torch.equal(a, b) and torch.equal(a, c)
