"""Metrics of embeddings beyond one tile, over batches, and their picture.

Their promises: tests/specs/embeddings.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

import pyloss
from pyloss import backend, metrics
from pyloss.metrics import _embeddings


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(_embeddings, "TILE", 7)


def clusters(classes=6, each=10, dim=5, spread=0.4, seed=0, dtype=torch.float64):
    """Classes around centres; `spread` is one number, or one a class."""
    g = torch.Generator().manual_seed(seed)
    centre = normalize(torch.randn(classes, dim, generator=g, dtype=dtype), dim=1)
    noise = torch.randn(classes, each, dim, generator=g, dtype=dtype)
    spread = torch.as_tensor(spread, dtype=dtype).expand(classes).view(-1, 1, 1)
    order = torch.randperm(classes * each, generator=g)
    labels = torch.arange(classes).repeat_interleave(each)
    return (centre[:, None] + spread * noise).flatten(0, 1)[order], labels[order]


def test_tiles_hold_each_pair_once(small_tiles) -> None:
    x, _ = clusters()
    expected = torch.pdist(x).square().mul(-3.0).exp().mean().log()
    torch.testing.assert_close(metrics.uniformity(x, 3.0, normalize=False), expected)


def test_uniformity_and_entropy_of_unit_vectors() -> None:
    x, _ = clusters()
    f = normalize(x, dim=1)
    for t in (2.0, 1000.0):
        expected = torch.pdist(f).square().mul(-t).logsumexp(0) - math.log(60 * 59 / 2)
        torch.testing.assert_close(metrics.uniformity(x, t), expected)
    r = (f @ f.t()).div(0.1).fill_diagonal_(-math.inf).softmax(1)
    expected = torch.special.entr(r).sum(1)
    found = metrics.penalty_entropy(x, temperature=0.1, reduction="none")
    torch.testing.assert_close(found, expected)
    x[[3, 8]] = 0  # no unit vectors: at a distance of 1 from those, of 0 from each other
    expected = torch.pdist(normalize(x, dim=1)).square().mul(-2).exp().mean().log()
    torch.testing.assert_close(metrics.uniformity(x), expected)


def test_drawn_pairs_estimate_the_mean_of_all() -> None:
    x, _ = clusters()
    g = torch.Generator().manual_seed(3)
    all_pairs = metrics.uniformity(x)
    drawn = metrics.uniformity(x, max_pairs=1700, generator=g)
    assert drawn != all_pairs and abs(drawn - all_pairs) < 0.1
    assert metrics.uniformity(x, max_pairs=60 * 59 // 2, generator=g) == all_pairs


def test_entropy_grows_with_the_temperature() -> None:
    x, _ = clusters()
    found = [metrics.penalty_entropy(x, temperature=t) for t in (0.01, 0.07, 0.3, 1.0, 100.0)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(math.log(59), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# OPIS


@pytest.mark.parametrize(
    "metric",
    [
        lambda x: metrics.uniformity(x[:600].float(), normalize=False),
        lambda x: metrics.alignment(x, x.flip(0)),
        lambda x: pyloss.functional.proto_triplet_loss(x, torch.arange(len(x)) % 3, x[:3]),
    ],
    ids=["uniformity", "alignment", "prototypes"],
)
def test_sums_do_not_depend_on_threads(metric, keep_num_threads) -> None:
    x = torch.randn(100_001, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(metric(x))
    assert torch.equal(*found)


def test_opis_of_equal_classes_is_zero() -> None:
    """Copies of one class, turned into planes of their own."""
    one, _ = clusters(classes=1, each=12)
    turned = torch.zeros(4, 12, 20, dtype=one.dtype)
    for c in range(4):
        turned[c, :, 5 * c : 5 * c + 5] = one
    labels = torch.arange(4).repeat_interleave(12)
    found = metrics.opis(turned.flatten(0, 1), labels, thresholds=torch.linspace(0.1, 1.3, 20))
    assert found < 1e-20


def test_opis_tells_classes_of_different_spread_apart() -> None:
    same = metrics.opis(*clusters(each=40, dim=16, spread=0.15))
    other = metrics.opis(*clusters(each=40, dim=16, spread=[0.05, 0.1, 0.15, 0.2, 0.25, 0.3]))
    assert other > 4 * same


def test_range_of_opis_from_some_embeddings() -> None:
    """The bounds of a sample lie near those of all, and are the same in every call."""
    x, y = clusters(each=40, dim=16, spread=0.5)
    whole = metrics.opis(x, y, return_curves=True).thresholds
    some = metrics.opis(x, y, bounds_samples=5000, return_curves=True).thresholds
    assert not torch.equal(some, whole)
    torch.testing.assert_close(some, whole, rtol=0.1, atol=0.0)
    assert torch.equal(metrics.opis(x, y, bounds_samples=5000, return_curves=True)[2], some)


def test_far_is_the_share_of_negatives_below_the_range() -> None:
    x, y = clusters(each=20)
    f, negative = normalize(x, dim=1), (y[:, None] != y).triu(1)
    distances = torch.cdist(f, f)[negative]
    t = metrics.opis(x, y, far=(0.05, 0.2), return_curves=True).thresholds
    for bound, share in ((t[0], 0.05), (t[-1], 0.2)):
        assert (distances <= bound + 1e-9).double().mean() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("thresholds", [[0.5, 0.4], [-1.0, 0.5], [0.2, math.nan]])
def test_thresholds_are_ascending_distances(thresholds) -> None:
    with pytest.raises(ValueError, match="thresholds must be distances that ascend"):
        metrics.opis(*clusters(), thresholds=torch.tensor(thresholds))


def test_epsilon_opis_compares_the_ends() -> None:
    found = metrics.opis(*clusters(classes=5), epsilon=0.4, return_curves=True)
    ordered = found.utility.sort(0).values
    expected = (ordered[-2:].mean(0) - ordered[:2].mean(0)).square().mean()
    torch.testing.assert_close(found.epsilon_opis, expected)


@pytest.mark.parametrize("labels", [[0] * 8, list(range(8)), [0, 0, 1, 2, 3, 4, 5, 6]])
def test_opis_of_fewer_than_two_classes_with_pairs_is_zero(labels) -> None:
    found = metrics.opis(torch.randn(8, 3), torch.tensor(labels), return_curves=True)
    assert found.opis == 0 and found.epsilon_opis == 0
    assert not found.utility.isnan().any()


# --------------------------------------------------------------------------------------------------
# Over batches


@pytest.mark.parametrize(
    ("metric", "function", "options", "count"),
    [
        (metrics.Uniformity, metrics.uniformity, dict(t=3.0), 1),
        (metrics.Tolerance, metrics.tolerance, dict(over="all"), 2),
        (metrics.OPIS, metrics.opis, dict(far=(0.1, 0.4)), 2),
    ],
)
def test_batches_are_one_set(metric, function, options, count) -> None:
    arguments = clusters()[:count]
    metric = metric(**options)
    assert repr(options[next(iter(options))]) in repr(metric)
    with pytest.raises(RuntimeError, match=r"compute\(\) before update\(\)"):
        metric.compute()
    for begin in (0, 10, 35):
        batch = [t[begin : {0: 10, 10: 35, 35: 60}[begin]].clone() for t in arguments]
        metric.update(*batch)
        batch[0].zero_()  # what it keeps is its own
    torch.testing.assert_close(metric.compute(), function(*arguments, **options))
    with pytest.raises(ValueError, match=r"embeddings must be torch.float64 \(N, 5\) as before"):
        metric.update(*[arguments[0][:, :4], *arguments[1:]])
    metric.reset()
    with pytest.raises(RuntimeError, match="before update"):
        metric.compute()


def test_alignment_over_batches() -> None:
    x, y = clusters(seed=0)[0], clusters(seed=1)[0]
    metric = metrics.Alignment(alpha=1.0)
    with pytest.raises(RuntimeError, match="before update"):
        metric.compute()
    for part in (slice(0, 10), slice(10, 60)):
        metric.update(x[part], y[part])
    torch.testing.assert_close(metric.compute(), metrics.alignment(x, y, 1.0))
    metric.reset()
    metric.update(x[:0], y[:0])
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        (metrics.Uniformity, dict(t=0.0), "t must be finite and > 0"),
        (metrics.Uniformity, dict(max_pairs=0), "max_pairs must be at least 1"),
        (metrics.Tolerance, dict(over="both"), "over must be one of same_class, all"),
        (metrics.Alignment, dict(alpha=-1.0), "alpha must be finite and > 0"),
        (metrics.OPIS, dict(far=(0.2, 0.1)), "far must be 0 < low < high <= 1"),
    ],
)
def test_options_are_checked_when_made(metric, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        metric(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bins'"):
        metric(bins=3)


# --------------------------------------------------------------------------------------------------
# The picture


def test_picture_of_opis() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from pyloss import visualize

    curves = metrics.opis(
        *clusters(each=20, spread=[0.1, 0.1, 0.1, 0.1, 0.1, 1.0]), return_curves=True
    )
    axis = visualize.draw_opis(curves, worst=1)
    named = [t.get_text() for t in axis.get_legend().get_texts()]
    assert named == ["class 5", "mean of 6"]
    assert len(axis.lines) == 7 and axis.get_title().startswith("OPIS ")
    assert visualize.draw_opis(curves, axis) is axis
    with pytest.raises(TypeError, match="curves must be OPISCurves, got Tensor"):
        visualize.draw_opis(curves.opis)
    pyplot.close("all")


# --------------------------------------------------------------------------------------------------
# The counts below OPIS


@pytest.mark.parametrize(
    ("n", "d", "classes", "edges"),
    [
        (1, 3, 0, [1.0]),
        (700, 19, 7, [3.0, 5.0, 5.5, 12.0]),
        (200, 300, 40, torch.linspace(150.0, 300.0, 101).tolist()),  # K in two blocks
        (150, 6, 4, [0.5, 0.5, 0.5001, 3.0, math.inf]),  # more edges in one place than a table has
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_pairs_of_kernel_tiles_and_reference(n, d, classes, edges, dtype, keep_num_threads):
    from pyloss.ops.similarity_softmax import counts

    g = torch.Generator().manual_seed(0)
    # Multiples of 1/8: the distances are exact, whatever their order of summation.
    x = torch.randint(-8, 9, (n, d), generator=g).to(dtype) / 8
    labels = torch.randint(classes + 1, (n,), generator=g)
    arguments = x, (x * x).sum(1) / 2, labels, torch.tensor(edges, dtype=dtype), classes
    torch.set_num_threads(1)
    found = counts.similarity_counts(*arguments)
    assert torch.equal(found, counts._by_tiles(*arguments, 64))
    with backend("reference"):
        assert torch.equal(found, counts.similarity_counts(*arguments))
    torch.set_num_threads(3)
    assert torch.equal(found, counts.similarity_counts(*arguments))


def test_labels_that_would_count_outside_are_refused(monkeypatch) -> None:
    from pyloss.ops import _gemm
    from pyloss.ops.similarity_softmax.counts import similarity_counts

    monkeypatch.setattr(_gemm, "by_torch", lambda: False)
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="labels: not from 0 to the number of classes"):
        similarity_counts(x, x[:, 0], torch.tensor([0, 1, 3, 0]), torch.ones(2), 2)
