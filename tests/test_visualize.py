"""pyloss.visualize: what is drawn where. The canvas is Agg, no display is needed."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyloss

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from pyloss import visualize  # noqa: E402
from pyloss.visualize import topology  # noqa: E402

RED = topology._UNMATCHED_COLOR


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def ring_and_dot():
    """Input: a ring with a weak spot and a dot. Target: the ring alone."""
    target = torch.zeros(9, 9)
    target[1:6, 1:6] = 1
    target[2:5, 2:5] = 0
    image = 0.9 * target
    image[1, 3] = 0.6
    image[7, 7] = 0.8
    return image, target, pyloss.betti_matching(image[None], target[None], spatial_dims=2)


def marks(axis, color=None):
    """{(marker, row, col)} of the points."""
    lines = [line for line in axis.lines if color is None or to_hex(line.get_color()) == color]
    return {(line.get_marker(), line.get_ydata()[0], line.get_xdata()[0]) for line in lines}


def shaded(axis):
    """{(row, col)} that a cycle covers."""
    alpha = torch.as_tensor(axis.images[1].get_array()[..., 3])
    return {tuple(voxel) for voxel in alpha.nonzero().tolist()}


def test_matched_and_unmatched():
    image, target, matching = ring_and_dot()
    left, right = visualize.draw_matching(image, target, matching)
    assert left.get_title() == "input: 1 matched, 1 unmatched"
    assert right.get_title() == "target: 1 matched, 0 unmatched"
    # The dot is a component too many, born where it stands.
    birth, death = matching.coordinates("unmatched_input", 0, 0)[0].tolist()
    assert birth == [7, 7]
    assert marks(left, RED) == {("o", *birth), ("X", *death)}
    assert marks(right, RED) == set()
    # The hole of the ring is one feature on both sides, in one colour; it is born at the weak spot.
    rows = matching.coordinates("matched", 0, 1)[0].tolist()
    assert rows[0] == [1, 3]
    color = topology._MATCHED_COLORS[0]
    assert marks(left, color) == {("s", *rows[0]), ("X", *rows[1])}
    assert marks(right, color) == {("s", *rows[2]), ("X", *rows[3])}
    # Its cycle is the ring, with the voxel of death inside.
    ring = {tuple(voxel) for voxel in target.nonzero().tolist()}
    corners = {(1, 1), (1, 5), (5, 1), (5, 5)}
    assert ring - corners <= shaded(right) <= ring | {tuple(rows[3])}
    assert (7, 7) in shaded(left) and (7, 7) not in shaded(right)
    assert torch.equal(torch.as_tensor(left.images[0].get_array()), image.double())


@pytest.mark.parametrize("kind", ["matched", "unmatched"])
@pytest.mark.parametrize("dim", [0, 1])
def test_selection(kind, dim):
    image, target, matching = ring_and_dot()
    left, _ = visualize.draw_matching(image, target, matching, dim=dim, kind=kind)
    expected = (kind == "matched") == (dim == 1)
    assert bool(marks(left)) == bool(shaded(left)) == expected
    assert left.get_title() == f"input: {int(expected)} {kind}"


def test_one_axes_is_the_image():
    image, target, matching = ring_and_dot()
    axis = pyplot.subplots()[1]
    assert visualize.draw_matching(image, target, matching, axis, cycles=False) is axis
    assert len(marks(axis)) == 4 and not shaded(axis)
    pair = pyplot.subplots(1, 2)[1]
    assert visualize.draw_matching(image, target, matching, pair) is pair


def test_min_persistence():
    image, target, matching = ring_and_dot()
    left, right = visualize.draw_matching(image, target, matching, min_persistence=0.85)
    # The hole has length 0.6 in the image, but 1 in the target: it stays, the dot (0.8) goes.
    assert left.get_title() == "input: 1 matched, 0 unmatched"
    assert right.get_title() == "target: 1 matched, 0 unmatched"
    left, _ = visualize.draw_matching(image, target, matching, min_persistence=1.0)
    assert not marks(left)


def test_voxels_of_the_padding_are_left_out():
    image, target = torch.zeros(2, 6, 6), torch.zeros(2, 6, 6)
    image[1, 2:4, 2:4] = 0.7
    image[1, 0, 0] = 0.4
    matching = pyloss.betti_matching(image, target, spatial_dims=2, padding="foreground")
    for item in range(2):
        left, right = visualize.draw_matching(image[item], target[item], matching, item=item)
        for axis in (left, right):
            assert all(0 <= row < 6 and 0 <= col < 6 for _, row, col in marks(axis))
    assert marks(left)


def test_what_has_coordinates_alone():
    """Any object with the documented attributes will do; without cycles none are shaded."""
    image, target, matching = ring_and_dot()

    class Coordinates:
        coordinates = matching.coordinates

    left, _ = visualize.draw_matching(image, target, Coordinates())
    assert len(marks(left)) == 4 and not shaded(left)


def test_bool_target_and_gradient():
    image, target, matching = ring_and_dot()
    left, _ = visualize.draw_matching(image.requires_grad_(), target.bool(), matching)
    assert marks(left)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("2D or 3D and of one shape", dict(image=torch.zeros(1, 9, 9))),
        ("2D or 3D and of one shape", dict(image=torch.zeros(9), target=torch.zeros(9))),
        ("2D or 3D and of one shape", dict(target=torch.zeros(9, 8))),
        ("kind must be one of 'both', 'matched', 'unmatched'", dict(kind="all")),
        ("dim must be in 0..1 or None, got 2", dict(dim=2)),
        ("axis must be 0, 1 or 2, got 3", dict(axis=3)),
        ("one axes or two, got 3", dict(ax=[None] * 3)),
    ],
)
def test_errors(match, change):
    image, target, matching = ring_and_dot()
    arguments = dict(image=image, target=target, matching=matching)
    with pytest.raises(ValueError, match=match):
        visualize.draw_matching(**{**arguments, **change})


# --- barcodes --------------------------------------------------------------------------------


def drawn_bars(axis):
    """(birth, death, color) from the lowest up; without the lines of the legend."""
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
    return [(*line.get_xdata(), line.get_color()) for line in lines]


def test_barcode():
    image, _, _ = ring_and_dot()
    pairs = pyloss.persistence_pairs(image[None], spatial_dims=2, filtration="superlevel")
    axis = visualize.draw_barcode(pairs)
    expected = [
        (*values, topology._DIM_COLORS[row[1]])
        for row, values in zip(pairs.index.tolist(), pairs.values.tolist())
    ]
    assert sorted(drawn_bars(axis)) == sorted(expected) and expected
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["dimension 0: 1", "dimension 1: 1"]
    (only,) = drawn_bars(visualize.draw_barcode(pairs, dims=[1]))
    assert only[2] == topology._DIM_COLORS[1]


def test_barcode_of_one_item():
    images = torch.rand(2, 8, 8)
    pairs = pyloss.persistence_pairs(images, spatial_dims=2)
    for item in range(2):
        axis = pyplot.subplots()[1]
        assert visualize.draw_barcode(pairs, axis, item=item) is axis
        assert len(drawn_bars(axis)) == int(pairs.counts[item].sum())


def test_barcode_of_values():
    values = torch.tensor([[0.0, math.inf], [0.2, 0.4], [0.1, 0.9]], requires_grad=True)
    axis = visualize.draw_barcode(values)
    births = [bar[:2] for bar in drawn_bars(axis)]
    assert births == [pytest.approx((0.2, 0.4)), pytest.approx((0.1, 0.9))]
    assert len(axis.texts) == 1  # the arrow
    assert visualize.draw_barcode(torch.empty(0, 2)).get_legend() is None
    with pytest.raises(ValueError, match=r"\(P, 2\), got \[3\]"):
        visualize.draw_barcode(values[:, 0])


def test_bars_born_at_infinity_begin_at_the_edge():
    values = torch.tensor([[-math.inf, 1.0], [-math.inf, math.inf], [2.0, 3.0], [math.inf] * 2])
    axis = visualize.draw_barcode(values)
    axis.figure.canvas.draw()
    low, high = axis.get_xlim()
    assert {bar[:2] for bar in drawn_bars(axis)} >= {(low, 1.0), (2.0, 3.0)}
    (arrow,) = axis.texts
    assert (arrow.xyann[0], arrow.xy[0]) == (low, high)


# --- import ----------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["matplotlib"] = None
import torch, pyloss
assert "pyloss.visualize" not in sys.modules
from pyloss import visualize
try:
    visualize.draw_barcode(torch.zeros(1, 2))
except ImportError as error:
    print(error)
"""


def test_without_matplotlib():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert "pip install 'pyloss[visualize]'" in done.stdout


def test_examples():
    import doctest

    for function in (visualize.draw_barcode, visualize.draw_matching):
        globs = {"torch": torch, "pyloss": pyloss}
        (test,) = doctest.DocTestFinder().find(function, function.__name__, globs=globs)
        assert doctest.DocTestRunner().run(test).failed == 0


def test_matching_of_arrays():
    x, y = torch.rand(1, 8, 8), (torch.rand(1, 8, 8) > 0.5).float()
    matching = pyloss.betti_matching(x, y, spatial_dims=2)
    left, right = pyloss.visualize.draw_matching(x[0].numpy(), y[0].numpy(), matching)
    assert left.get_title().startswith("input") and right.get_title().startswith("target")


# --- what is said beside the picture -------------------------------------------------------------


def stars(axis):
    """{(row, col)} of the marks for the oldest component."""
    return {
        (float(y), float(x))
        for points in axis.collections
        for x, y in points.get_offsets().tolist()
    }


def legend_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_legend_of_a_matching():
    image, target, matching = ring_and_dot()
    left, right = visualize.draw_matching(image, target, matching)
    assert legend_of(left) == [
        "birth of a component",
        "birth of a hole",
        "death",
        "component that never dies",
        "matched: the same colour on both sides",
        "unmatched",
    ]
    assert right.get_legend() is None
    left, _ = visualize.draw_matching(image, target, matching, dim=1)
    assert "birth of a component" not in legend_of(left) and "unmatched" not in legend_of(left)
    assert "component that never dies" not in legend_of(left)
    left, _ = visualize.draw_matching(image, target, matching, legend=False)
    assert left.get_legend() is None


def test_the_component_that_never_dies():
    image, target, matching = ring_and_dot()
    image[3, 7] = 0.95  # the largest value, and beside the target's component
    matching = pyloss.betti_matching(image[None], target[None], spatial_dims=2)
    left, right = visualize.draw_matching(image, target, matching)
    assert stars(left) == {(3.0, 7.0)} and stars(right) == {(1.0, 1.0)}
    for axis in visualize.draw_matching(image, target, matching, dim=1):
        assert not stars(axis)
    # In a frame of the same value the frame is the oldest, and no voxel of the image.
    framed = pyloss.betti_matching(image[None], target[None], 2, padding="foreground")
    for axis in visualize.draw_matching(image, target, framed):
        assert not stars(axis)


@pytest.mark.parametrize(
    ("filtration", "words", "side"),
    [("superlevel", "bright is foreground", "right"), ("sublevel", "dark is foreground", "left")],
)
def test_the_filtration_is_named(filtration, words, side):
    image, target, _ = ring_and_dot()
    matching = pyloss.betti_matching(image[None], target[None], 2, filtration=filtration)
    assert matching.filtration == filtration
    for axis in visualize.draw_matching(image, target, matching):
        assert axis.get_xlabel() == f"{filtration} sets: {words}"
    pairs = pyloss.persistence_pairs(image[None], 2, filtration=filtration, essential=True)
    assert pairs.filtration == filtration
    axis = visualize.draw_barcode(pairs)
    assert axis.get_xlabel() == f"value ({filtration} sets: born at the mark, on the {side})"
    born = sorted(b for b, _ in pairs.values.tolist())
    assert sorted(x for _, x in stars(axis)) == pytest.approx(born)
    low, high = axis.get_xlim()
    for x, death, _ in drawn_bars(axis):
        assert low < x < high and (x > death) == (side == "right")


def test_short_bars_are_left_out():
    values = torch.tensor([[0.0, 0.5], [0.2, 0.4], [0.9, 0.1], [0.3, math.inf]]).double()
    axis = visualize.draw_barcode(values, min_persistence=0.5)
    assert [bar[:2] for bar in drawn_bars(axis)] == [pytest.approx((0.9, 0.1))]
    assert len(axis.texts) == 1  # what never dies stays
    assert legend_of(axis) == ["dimension 0: 2"]
    assert axis.get_xlabel() == "value (born at the mark)"


def test_barcode_of_an_array():
    values = np.array([[0.0, 1.0], [0.5, 0.25]])
    for given in (values, values[::-1], values.tolist()):
        assert len(drawn_bars(visualize.draw_barcode(given))) == 2
    pairs = pyloss.persistence_pairs(torch.rand(2, 8, 8), spatial_dims=2)
    axis = visualize.draw_barcode(pairs, item=np.int64(1), dims=np.array([1]))
    assert len(drawn_bars(axis)) == int(pairs.counts[1, 1])


def test_flipped_arrays():
    x, y = torch.rand(8, 8), torch.rand(8, 8) > 0.5
    a, b = (t.numpy()[::-1, ::-1] for t in (x, y))  # negative strides
    matching = pyloss.betti_matching(x.flip(0, 1)[None], y.flip(0, 1)[None], spatial_dims=2)
    left, right = visualize.draw_matching(a, b, matching, item=np.int64(0), dim=np.int64(1))
    assert (left.images[0].get_array() == a).all() and (right.images[0].get_array() == b).all()


def test_the_figure_of_the_demo(tmp_path, monkeypatch):
    """No two axes of a row have one title."""
    from matplotlib.figure import Figure

    from pyloss.demo import segmentation

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    x, y = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8) > 0.5
    models = {segmentation.DICE: lambda t: t - 0.5, "other": lambda t: 0.4 - t}
    segmentation.draw(tmp_path / "figure.png", x, y, models)
    titles = [axis.get_title() for axis in drawn[0].axes]
    for row in (titles[:3], titles[3:]):
        names = [title.partition(":")[0] for title in row]
        assert names == ["input", "prediction", "vessels"]
        assert all("matched" in title for title in row[1:])
    legends = [axis.get_legend() is not None for axis in drawn[0].axes]
    assert legends == [False] * 4 + [True, False]


def test_lyapunov():
    """Two lines, the objective below H; steps outside of the constraint are shaded."""
    x = torch.nn.Parameter(torch.full((2,), 3.0))
    optimizer = pyloss.optim.Lion([x], lr=0.1, weight_decay=0.5)
    monitor = pyloss.optim.LyapunovMonitor(optimizer)
    for value in (3.0, 2.5, 1.0):
        monitor.record(value)
        x.data.sub_(0.7)
    axis = visualize.draw_lyapunov(monitor.records)
    h, objective = (line.get_ydata() for line in axis.lines)
    assert list(objective) == [3.0, 2.5, 1.0] and all(a >= b for a, b in zip(h, objective))
    assert len(axis.patches) == 2  # 3 and 2.3 are outside of the box of 2
    for bad, error in (([], ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="records must"):
            visualize.draw_lyapunov(bad)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_is_seen_along_an_axis(axis):
    """A ring normal to the first axis with a weak spot, and a dot; seen from three sides."""
    target = torch.zeros(5, 9, 9)
    target[1, 1:6, 1:6] = 1
    target[1, 2:5, 2:5] = 0
    image = 0.9 * target
    image[1, 1, 3] = 0.6
    image[3, 7, 7] = 0.8
    matching = pyloss.betti_matching(image[None], target[None], spatial_dims=3)
    left, right = visualize.draw_matching(image, target, matching, axis=axis)
    assert left.get_title() == "input: 1 matched, 1 unmatched"
    assert right.get_title() == "target: 1 matched, 0 unmatched"
    seen = torch.as_tensor(left.images[0].get_array())
    assert torch.equal(seen.to(image.dtype), image.amax(axis))
    kept = [a for a in range(3) if a != axis]
    assert ("o", *((3, 7, 7)[a] for a in kept)) in marks(left, RED)
    assert tuple((3, 7, 7)[a] for a in kept) in shaded(left)
    texts = {text.get_text() for text in left.get_legend().get_texts()}
    assert {"birth of a loop", "birth of a component"} <= texts
    assert not visualize.draw_matching(image, target, matching, dim=2, axis=axis)[0].lines


def test_loops_of_a_volume_are_asked_for_once(monkeypatch):
    """All of a side and kind: each call is a reduction of the volume."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 5, 5, 5, generator=generator)
    matching = pyloss.betti_matching(x[None], y[None], spatial_dims=3)
    calls, cycles = [], matching.representative_cycles
    monkeypatch.setattr(
        matching, "representative_cycles", lambda *a, **o: calls.append(o) or cycles(*a, **o)
    )
    (picture,) = visualize.draw_matching(
        x, y, matching, [pyplot.axes()] * 2, dim=1, kind="unmatched"
    )[:1]
    assert len(matching.coordinates("unmatched_input", 0, 1)) > 3 and len(calls) == 2
    expected = {tuple(v[1:]) for c in cycles(0, "input", 1, "unmatched") for v in c.tolist()}
    assert shaded(picture) == expected


def test_messages_of_draw_barcode():
    pairs = pyloss.persistence_pairs(torch.rand(2, 4, 4), 2)
    with pytest.raises(TypeError, match="dims must be a sequence of integers or None, got 1"):
        visualize.draw_barcode(pairs, dims=1)
    for item in (2, -1):
        with pytest.raises(IndexError, match=rf"item must be in 0\.\.1, got {item}"):
            visualize.draw_barcode(pairs, item=item)


def test_collapse():
    """A panel a metric, without what is NaN; records and steps must fit."""
    metrics = pyloss.metrics.NeuralCollapseMetrics(3, 5)
    metrics.update(torch.randn(30, 5), torch.arange(30) % 3)
    records = [metrics.compute(), metrics.compute()]
    axes = visualize.draw_collapse(records, [0, 10])
    assert [len(axis.lines) for axis in axes] == [3, 1, 0] and axes[2].get_title() == "NC3"
    assert list(axes[0].lines[0].get_xdata()) == [0, 10]
    with pytest.raises(ValueError, match="steps must be 2 numbers, got 1"):
        visualize.draw_collapse(records, [0])
    for bad, error in (([], ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="records must"):
            visualize.draw_collapse(bad)
    path = pyloss.analysis.central_path(torch.randn(12, 5), torch.arange(12) % 3, 0.1, steps=4)
    left, right = visualize.draw_central_path(path)
    assert len(left.lines) == 2 and list(right.lines[0].get_ydata()) == path.value.tolist()
    with pytest.raises(TypeError, match="path must be a CentralPath, got NeuralCollapse"):
        visualize.draw_central_path(records[0])
