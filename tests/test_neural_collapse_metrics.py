"""Metrics of neural collapse over batches, and at the minima that theory gives. What the functions
promise: tests/specs/neural_collapse.py; processes: tests/contrastive_worker.py."""

from __future__ import annotations

import pickle

import pytest
import torch

from pyloss import metrics
from pyloss.analysis import gof, simplex_etf, ufm_minimizer
from pyloss.metrics import NeuralCollapseMetrics

F64 = torch.float64


def data(count: int = 90, classes: int = 4, dim: int = 6, mean: float = 0.0):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (count,), generator=g)
    x = torch.randn(count, dim, generator=g, dtype=F64) + mean
    return x + torch.randn(classes, dim, generator=g, dtype=F64)[y], y


def by_functions(x, y, classes, weight, target, logits=None):
    """What compute() gives, of classes that all have samples."""
    of_w, of_h, of_both = target if isinstance(target, tuple) else (target,) * 3
    means = torch.stack([x[y == k].mean(0) for k in range(classes)])
    center = x.mean(0) if target == "etf" else None
    angle = target if isinstance(target, str) else "of"
    nan = torch.tensor(torch.nan, dtype=F64)
    return metrics.NeuralCollapse(
        nc1=metrics.nc1(x, y),
        nc1_trace=metrics.nc1(x, y, kind="trace"),
        cdnv=metrics.cdnv(x, y),
        nc2_w=metrics.nc2(weight, of_w),
        nc2_h=metrics.nc2(means, of_h, center=center),
        nc3=metrics.nc3(weight, means, of_both, center=center),
        nc4=nan if logits is None else metrics.nc4(logits, x, means),
        equinorm_w=metrics.equinorm(weight),
        equinorm_h=metrics.equinorm(means, center=center),
        equiangle_w=metrics.equiangle(weight, angle),
        equiangle_h=metrics.equiangle(means, angle, center=center),
    )


GOF = tuple(torch.tensor(v, dtype=F64) for v in ([4, 3, 2, 1], [1, 2, 3, 3], [1, 1, 0.9, 0.8]))


@pytest.mark.parametrize("target", ["etf", "of", GOF])
def test_batches_are_one_set(target) -> None:
    x, y = data(mean=1e4)  # a sum of squares would have lost the variances
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    logits = x @ weight.T
    metric = NeuralCollapseMetrics(4, 6, target)
    with pytest.raises(RuntimeError, match=r"compute\(\) before update\(\)"):
        metric.compute()
    parts = [slice(0, 0), slice(0, 1), slice(1, 50), slice(50, 90)]
    for part in parts:
        metric.update(x[part].clone(), y[part].to(torch.int32))
    with pytest.raises(RuntimeError, match=r"compare\(\) before compute\(\)"):
        metric.compare(logits, x)
    found = metric.compute(weight)
    close = dict(rtol=1e-7, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(found, by_functions(x, y, 4, weight, target), **close)
    for part in parts:
        metric.compare(logits[part], x[part])
    expected = by_functions(x, y, 4, weight, target, logits)
    torch.testing.assert_close(metric.compute(weight), expected, **close)
    without = metric.compute()
    assert without.nc2_w.isnan() and without.nc3.isnan() and without.nc4 == expected.nc4
    metric.update(x[:5], y[:5])  # the means have moved
    assert metric.compute().nc4.isnan()
    metric.reset()
    with pytest.raises(RuntimeError, match="before update"):
        metric.compute()


def test_classes_without_samples_count_nowhere() -> None:
    x, y = data()
    weight = torch.randn(4, 6, dtype=F64)
    spread = torch.tensor([0, 2, 5, 6])
    wide, narrow = NeuralCollapseMetrics(8, 6), NeuralCollapseMetrics(4, 6)
    wide.update(torch.cat([x, x[:2] * torch.nan]), torch.cat([spread[y], torch.full((2,), -100)]))
    narrow.update(x, y)
    in_eight = torch.randn(8, 6, dtype=F64)
    in_eight[spread] = weight
    found, expected = wide.compute(in_eight), narrow.compute(weight)
    of_rows = dict(nc2_w=None, equinorm_w=None, equiangle_w=None)  # of all rows there are
    torch.testing.assert_close(found._replace(**of_rows, nc4=None),
                               expected._replace(**of_rows, nc4=None))  # fmt: skip
    logits = torch.zeros(90, 8, dtype=F64)
    logits[:, spread] = x @ weight.T + 10
    wide.compare(logits, x)
    narrow.compare(x @ weight.T, x)
    assert wide.compute().nc4 == narrow.compute().nc4 > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_types_are_added_up_in_float64(dtype) -> None:
    x, y = data()
    x = x.to(dtype)
    rounded, exact = NeuralCollapseMetrics(4, 6), NeuralCollapseMetrics(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        rounded.update(x, y)
        found = rounded.compute(x[:4])
    exact.update(x.double(), y)
    assert found.nc1.dtype == F64
    torch.testing.assert_close(found, exact.compute(x[:4].double()), equal_nan=True)


@pytest.mark.parametrize("scatter", [True, False])
def test_state(scatter) -> None:
    x, y = data()
    metric, other = (NeuralCollapseMetrics(4, 6, scatter=scatter) for _ in range(2))
    other.load_state_dict(metric.state_dict())
    metric.update(x[:40], y[:40])
    state = pickle.loads(pickle.dumps(metric.state_dict()))
    other.load_state_dict(state)
    for m in (metric, other, pickle.loads(pickle.dumps(metric))):
        m.update(x[40:], y[40:])
        found = m.compute()
        assert found.nc1.isnan() == (not scatter)
        torch.testing.assert_close(found.nc1_trace, metrics.nc1(x, y, kind="trace"))
    with pytest.raises(ValueError, match="the state must have the shapes"):
        NeuralCollapseMetrics(5, 6, scatter=scatter).load_state_dict(state)
    assert "NeuralCollapseMetrics(4, 6, target='etf', scatter=" in repr(metric)


# --------------------------------------------------------------------------------------------------
# At the minima


def of_a_minimum(weight, means, sizes, target):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=F64)).Q
    metric = NeuralCollapseMetrics(len(sizes), 9, target)
    features, weight = (means @ turn)[y], weight @ turn
    metric.update(features, y)
    metric.compute()
    metric.compare(features @ weight.T, features)
    return metric.compute(weight)._asdict()


@pytest.mark.parametrize("depth", [1, 3])
def test_metrics_are_zero_for_unequal_classes(depth) -> None:
    sizes = [30, 20, 10, 4]
    found = ufm_minimizer(sizes, 5e-3, 5e-4, depth)
    target = (found.w_norm2, found.h_norm2, found.logits_diag)
    frames = gof(found.w_norm2.sqrt(), 9), gof(found.h_norm2.sqrt(), 9)
    at = of_a_minimum(*frames, sizes, target)
    assert at.pop("equinorm_w") > 0.1 and at.pop("equinorm_h") > 0.1
    assert max(at.values()) < 1e-7
    assert of_a_minimum(*frames, sizes, "of")["nc2_h"] > 0.1


def test_metrics_are_zero_for_a_simplex() -> None:
    frame, aside = simplex_etf(4, 9), torch.eye(9, dtype=F64)[8]  # which the center takes off
    at = of_a_minimum(3 * frame, 0.5 * frame + aside, [7] * 4, "etf")
    assert max(at.values()) < 1e-7


# --------------------------------------------------------------------------------------------------
# Bad calls


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "num_classes must be >= 1, got 0", dict(num_classes=0)),
        (TypeError, "num_features must be an integer", dict(num_features=2.5)),
        (ValueError, "target must be one of etf, of, got 'gof'", dict(target="gof")),
        (ValueError, "three targets", dict(target=torch.ones(4))),
        (ValueError, r"of shape \[4\] or \[4, 4\], got \[3\]", dict(target=(torch.ones(3),) * 3)),
        (TypeError, "scatter must be a bool", dict(scatter="full")),
        (TypeError, "ignore_index must be an integer", dict(ignore_index=None)),
    ],
)
def test_options_are_checked_when_made(error, words, arguments) -> None:
    with pytest.raises(error, match=words):
        NeuralCollapseMetrics(**dict(num_classes=4, num_features=6) | arguments)


def test_tensors_are_checked() -> None:
    (x, y), metric = data(), NeuralCollapseMetrics(4, 6)
    for words, arguments in (
        (r"features must be \(N, 6\), got \[90, 5\]", (x[:, :5], y)),
        (r"labels must have the shape \[90\]", (x, y[:3])),
    ):
        with pytest.raises(ValueError, match=words):
            metric.update(*arguments)
    with pytest.raises(IndexError, match="label 4 is out of range for 4 classes"):
        metric.update(x, y + 1)
    metric.update(x, y)
    with pytest.raises(ValueError, match=r"weight must be \[4, 6\], got \[6, 4\]"):
        metric.compute(x[:6, :4])
    metric.compute()
    with pytest.raises(ValueError, match=r"logits must have the shape \[90, 4\], got \[90, 6\]"):
        metric.compare(x, x)
