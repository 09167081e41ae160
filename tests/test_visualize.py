"""pyloss.visualize: what is drawn where. The canvas is Agg, no display is needed."""

from __future__ import annotations

import math
import subprocess
import sys

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
        ("2D and of one shape", dict(image=torch.zeros(1, 9, 9))),
        ("2D and of one shape", dict(target=torch.zeros(9, 8))),
        ("kind must be one of 'both', 'matched', 'unmatched'", dict(kind="all")),
        ("dim must be 0, 1 or None", dict(dim=2)),
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
