"""Betti matching: the reference, the kernel against it, options, gradients, properties, errors."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
from betti_matching_cases import check_pair, fields, image, random_pair, rows
from torch.autograd import gradcheck, gradgradcheck

import pyloss
from pyloss.reference import betti_matching as reference

RANDOM_COUNT = int(os.environ.get("PYLOSS_BETTI_RANDOM", "500"))

# --------------------------------------------------------------------------------------------------
# The reference


def test_reference_on_a_ring():
    ring = torch.tensor([[0.0, 1, 1, 1], [0, 1, 0.25, 1], [0, 1, 1, 1]])
    bars = reference.persistence_pairs(ring[None], True, [0, 1], True)
    # The component, which never dies, first seen at the first 1; the hole, closed by the last 1.
    assert bars[:, :4].tolist() == [[0, 0, 1, -1], [0, 1, 11, 6]]
    left = reference.betti_matching(ring[None], ring[None] * 0, True, [0, 1])
    assert [t.shape[0] for t in left] == [0, 1, 0]


@pytest.mark.parametrize("shape", [(12,), (5, 6), (3, 4, 3)])
def test_reference_counts(shape):
    """Each cell gives birth or death once; Euler's formula for masks."""
    rng = random.Random(0)
    f = reference.Filtration(image(rng, shape, 3))
    born = {d: set() for d in range(len(shape) + 1)}
    dead = {d: set() for d in range(len(shape) + 1)}
    for d in range(len(shape)):
        for column, row in reference.reduce(f, f, d).items():
            born[d].add(row)
            dead[d + 1].add(column)
    for d in range(len(shape) + 1):
        assert not born[d] & dead[d]
        unpaired = set(reference.cells(shape, d)) - born[d] - dead[d]
        assert len(unpaired) == (d == 0)  # the grid is contractible
    mask = image(rng, shape, 2).bool()
    numbers = reference.betti_numbers(mask)
    g = reference.Filtration(torch.where(mask, 0.0, 1.0).double())
    euler = sum(
        (-1) ** d * sum(g.value(c) == 0 for c in reference.cells(shape, d))
        for d in range(len(shape) + 1)
    )
    assert sum((-1) ** d * b for d, b in enumerate(numbers)) == euler


def test_reference_voxel_of_a_cube_is_the_first():
    f = reference.Filtration(torch.ones(2, 2, 2))
    (cube,) = reference.cells((2, 2, 2), 3)
    assert f.birth_voxel(cube) == (0, 0, 0)
    assert f.birth_voxel(reference.cells((2, 2, 2), 2)[0]) != (0, 0, 0)


def test_reference_in_three_dimensions_matches_itself():
    x = image(random.Random(1), (1, 3, 3, 4), 4)
    matched, left, right = reference.betti_matching(x, x, True, [0, 1, 2])
    assert len(matched) and not len(left) and not len(right)
    assert torch.equal(matched[:, 2:4], matched[:, 4:6])


# --------------------------------------------------------------------------------------------------
# The kernel


def test_random_images_match_the_reference():
    """PYLOSS_BETTI_RANDOM sets the number of images; test_many_random_images has 10,000."""
    rng = random.Random(2)
    for _ in range(RANDOM_COUNT):
        check_pair(*random_pair(rng))


@pytest.mark.exhaustive
def test_many_random_images():
    rng = random.Random(3)
    for _ in range(10_000):
        check_pair(*random_pair(rng))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (1,), (9,), (30, 3)])
@pytest.mark.parametrize("levels", [0, 1, 2, 4])
def test_shapes(shape, levels):
    rng = random.Random(4)
    x, y = image(rng, (1, *shape), levels), image(rng, (1, *shape), 2)
    for superlevel in (False, True):
        check_pair(x, y, superlevel)


def test_zeros_infinities_and_subnormals():
    x = torch.tensor([[[0.0, -0.0, 1e-40, -1e-40], [float("inf"), 1, -1, float("-inf")]]])
    for superlevel in (False, True):
        check_pair(x, x.flip(1), superlevel)
    a = torch.tensor([[[0.0, 1, -0.0]]])
    assert pyloss.persistence_pairs(a).index.tolist() == [[0, 0, 2, 1]]


@pytest.mark.parametrize("filtration", ["sublevel", "superlevel"])
@pytest.mark.parametrize("construction", ["V", "T"])
def test_bars_of_infinities_are_those_of_large_numbers(construction, filtration):
    generator = torch.Generator().manual_seed(0)
    options = dict(construction=construction, filtration=filtration, essential=True)
    for spatial in (1, 2, 3):
        x = torch.randint(-2, 3, (8, *(4,) * spatial), generator=generator).float()
        x[0], x[1] = 2, -2  # nothing else
        infinite = torch.where(x.abs() == 2, x * torch.inf, x)
        found, exact = (pyloss.persistence_pairs(t, spatial, **options) for t in (infinite, x))
        assert torch.equal(found.index, exact.index) and len(exact.index) > 8
    with pytest.raises(ValueError, match="NaN"):
        pyloss.persistence_pairs(torch.tensor([[torch.inf, -torch.inf, torch.nan]]), 1, **options)


def loss_by_all_ways(x, y, **options):
    """(value, gradient) of the fused op, by the target's gradient, functorch, twice, of rows."""

    def loss(a, b=y):
        return pyloss.betti_matching_loss(a, b, reduction="sum", **options)

    def of_rows(a):
        return pyloss.betti_matching(a, y).loss(**options).sum()

    for f, graph in (
        (loss, False),
        (lambda a: loss(a, y.clone().requires_grad_()), False),
        (loss, True),
        (of_rows, False),
    ):
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        (grad,) = torch.autograd.grad(value, leaf, create_graph=graph)
        yield value.detach(), grad.detach()
    yield loss(x), torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    with pyloss.backend("reference"):
        value = loss(leaf)
        yield value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.filterwarnings("ignore:input has values outside")
@pytest.mark.filterwarnings("ignore:target has values outside")
def test_infinities_in_every_layer(spatial):
    """Equal ones differ by 0; no weight, no term; else the loss is infinite, as a square is."""
    shape = (1, 1, 5, 4) if spatial == 2 else (1, 1, 3, 2, 3)
    x, y = torch.rand(2, *shape, dtype=torch.float64)
    x.view(-1)[[0, -1]] = torch.inf
    shared = y.clone()
    shared.view(-1)[[0, -1]] = torch.inf
    for target, options, is_finite in (
        (y, dict(), False),
        (y, dict(unmatched="extreme"), False),
        (y, dict(matched_weight=0.0, unmatched_weight=0.0), True),
        (y, dict(weight=[0.0, 1.0, 0.5][:spatial]), True),
        (shared, dict(), True),
        (shared, dict(unmatched="extreme", weight=[0.5, 1.0, 2.0][:spatial]), True),
    ):
        found = list(loss_by_all_ways(x, target, **options))
        assert bool(found[0][0].isfinite()) == is_finite == bool(found[0][1].isfinite().all())
        for value, grad in found[1:]:
            torch.testing.assert_close(value, found[0][0])
            torch.testing.assert_close(grad, found[0][1], equal_nan=True)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("superlevel", [False, True])
@pytest.mark.parametrize("unmatched", ["diagonal", "extreme"])
@pytest.mark.parametrize("essential", [False, True])
def test_loss_and_gradient(spatial, superlevel, unmatched, essential):
    rng = random.Random(5)
    shape = (3, 2, *{1: (25,), 2: (7, 6), 3: (3, 4, 3)}[spatial])
    x = image(rng, shape, 0).requires_grad_()
    y = image(rng, shape, 2)
    weight = [0.5, 2.0, 3.0][:spatial]
    value = pyloss.betti_matching_loss(
        x, y, filtration="superlevel" if superlevel else "sublevel", weight=weight,
        matched_weight=1.5, unmatched_weight=0.7, target_weight=0.3, unmatched=unmatched,
        min_persistence=0.2, essential=essential, reduction="none",
    )  # fmt: skip
    terms = reference.betti_matching_loss(
        x.flatten(0, 1), y.flatten(0, 1), superlevel=superlevel, unmatched=unmatched,
        min_persistence=0.2, essential=essential,
    )  # fmt: skip
    factors = terms.new_tensor([1.5, 0.7, 0.3])
    exact = (terms * factors * terms.new_tensor(weight)[:, None]).sum((1, 2)).view(3, 2)
    torch.testing.assert_close(value, exact)
    upstream = torch.rand(3, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad(value, x, upstream)
    (exact_grad,) = torch.autograd.grad(exact, x, upstream)
    torch.testing.assert_close(grad, exact_grad)
    # The gradient of a given matching, through BettiMatching.
    if not essential:
        filtration = "superlevel" if superlevel else "sublevel"
        matching = pyloss.betti_matching(x, y, filtration=filtration)
        again = matching.loss(
            weight=weight, matched_weight=1.5, unmatched_weight=0.7, target_weight=0.3,
            unmatched=unmatched, min_persistence=0.2,
        )  # fmt: skip
        torch.testing.assert_close(again.view(3, 2), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    x, y = fields(24)
    x = x.to(dtype).requires_grad_()
    value = pyloss.betti_matching_loss(x, y.to(dtype))
    assert value.dtype == dtype
    exact_x = x.detach().double().requires_grad_()
    exact = pyloss.betti_matching_loss(exact_x, y.double())
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(value.double(), exact, **tolerance)
    (grad,) = torch.autograd.grad(value, x)
    (exact_grad,) = torch.autograd.grad(exact, exact_x)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), exact_grad, **tolerance)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_integer_targets(dtype):
    x, y = fields(24)
    exact = pyloss.betti_matching_loss(x, y)
    assert torch.equal(pyloss.betti_matching_loss(x, y.to(dtype)), exact)


def test_large_integers_are_not_rounded():
    """2^24 and 2^24 + 1 are one number in float32."""
    x = torch.zeros(1, 1, 1, 3)
    y = torch.tensor([2**24 + 1, 2**24, 2**24 + 1]).view(1, 1, 1, 3)
    assert pyloss.betti_matching(x, y).unmatched_target.shape[0] == 1
    assert pyloss.betti_matching_loss(x, y) == 1


@pytest.mark.parametrize("construction", ["V", "T"])
@pytest.mark.parametrize("start", [0, 2**24 + 1, -(2**24) - 1, 2**31 - 16, 2**40 + 1, 2**53 - 16])
def test_values_of_integer_images_are_exact(start, construction):
    base = torch.tensor([[0, 4, 3, 9]])
    options = dict(construction=construction, essential=True)
    for dtype in (torch.int32, torch.int64):
        if start + 9 > torch.iinfo(dtype).max:
            continue
        image = (start + base).to(dtype)
        for low in (0.0, 0.5, 1.5):
            pairs = pyloss.persistence_pairs(image, 1, min_persistence=low, **options)
            expected = pyloss.persistence_pairs(base.double(), 1, min_persistence=low, **options)
            assert pairs.values.dtype == torch.float64
            assert torch.equal(pairs.index, expected.index)
            assert torch.equal(pairs.values - start, expected.values)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.bool):
        assert pyloss.persistence_pairs(base.to(dtype), 1).values.dtype == torch.float32


def test_small_integers_are_exact_whatever_the_default_dtype():
    image = torch.tensor([[1, 255, 253, 254, 0]], dtype=torch.uint8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        values = pyloss.persistence_pairs(image, 1).values
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.tolist() == [[1, 255], [253, 254]]


def test_integers_that_float64_does_not_hold():
    image = torch.tensor([[0, 2**53 + 1, 5, 7]])
    for call in (
        lambda: pyloss.persistence_pairs(image, 1),
        lambda: pyloss.persistence_pairs(-image, 1),
        lambda: pyloss.betti_matching(image, image, 1),
    ):
        with pytest.raises(ValueError, match="2\\*\\*53 are not exact"):
            call()


def test_lengths_of_half_types_are_not_rounded():
    """256 - 1 is 255, and 256 in bfloat16."""
    image = torch.tensor([[0.0, 256.0, 1.0, 300.0]], dtype=torch.bfloat16)
    assert len(pyloss.persistence_pairs(image, 1, min_persistence=255.0).index) == 0
    assert len(pyloss.persistence_pairs(image, 1, min_persistence=254.0).index) == 1


@pytest.mark.parametrize("filtration", ["sublevel", "superlevel"])
def test_betti_at_infinite_thresholds(filtration):
    """The last set of a filtration is the whole image: one component."""
    image = torch.rand(2, 1, 5, 6)
    last = math.inf if filtration == "sublevel" else -math.inf
    pairs = pyloss.persistence_pairs(image, filtration=filtration, essential=True)
    assert pairs.betti(last).tolist() == [[1, 0], [1, 0]]
    assert pairs.betti(-last).tolist() == [[0, 0], [0, 0]]
    image[0, 0, 2, 3] = last  # a value of the image: it only comes last
    pairs = pyloss.persistence_pairs(image, filtration=filtration, essential=True)
    assert pairs.betti(last).tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        pairs.betti(math.nan)
    with pytest.raises(TypeError, match="threshold must be a number, got NoneType"):
        pairs.betti(None)


def test_float64_target_is_not_rounded():
    x = torch.zeros(1, 1, 1, 3)
    y = torch.tensor([1.0 + 1e-12, 1.0, 1.0 + 1e-12], dtype=torch.float64).view(1, 1, 1, 3)
    assert pyloss.betti_matching(x, y).unmatched_target.shape[0] == 1


def test_class_indices_and_channels():
    x = torch.rand(2, 3, 9, 8).softmax(1)
    labels = torch.randint(3, (2, 9, 8))
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    value = pyloss.betti_matching_loss(x, labels, reduction="none")
    assert torch.equal(value, pyloss.betti_matching_loss(x, one_hot, reduction="none"))
    for c in range(3):
        alone = pyloss.betti_matching_loss(x[:, c : c + 1], one_hot[:, c : c + 1], reduction="none")
        assert torch.equal(alone[:, 0], value[:, c])
    without = pyloss.betti_matching_loss(x, labels, include_background=False)
    torch.testing.assert_close(without, value[:, 1:].mean())
    torch.testing.assert_close(pyloss.betti_matching_loss(x, labels), value.mean())
    torch.testing.assert_close(pyloss.betti_matching_loss(x, labels, reduction="sum"), value.sum())
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        pyloss.betti_matching_loss(x, labels + 1)


def test_activations():
    x, y = torch.randn(2, 2, 8, 8), torch.rand(2, 2, 8, 8) > 0.5
    twice = lambda t: (2 * t).sigmoid()  # noqa: E731
    of_name = dict(sigmoid=torch.sigmoid, softmax=lambda t: t.softmax(1))
    for name, f in (*of_name.items(), (twice, twice)):
        value = pyloss.betti_matching_loss(x, y, activation=name)
        assert torch.equal(value, pyloss.betti_matching_loss(f(x), y))


def test_both_is_the_sum():
    x, y = fields(20)
    parts = [pyloss.betti_matching_loss(x, y, filtration=f) for f in ("sublevel", "superlevel")]
    torch.testing.assert_close(pyloss.betti_matching_loss(x, y, filtration="both"), sum(parts))


def test_dims_and_target_terms():
    x, y = fields(20)[0], (torch.rand(1, 1, 20, 20) > 0.7).float()
    parts = [pyloss.betti_matching_loss(x, y, dims=[d]) for d in (0, 1)]
    torch.testing.assert_close(pyloss.betti_matching_loss(x, y), sum(parts))
    torch.testing.assert_close(
        pyloss.betti_matching_loss(x, y, dims=[1], weight=[3.0]), 3 * parts[1]
    )
    left = pyloss.betti_matching_loss(x, y, include_target_unmatched=False)
    assert torch.equal(left, pyloss.betti_matching_loss(x, y, target_weight=0.0))
    assert left < sum(parts)


@pytest.mark.parametrize("padding", ["foreground", "foreground_detached", "background", 0.25])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_padding(padding, spatial):
    rng = random.Random(6)
    shape = (2, 1, *{1: (11,), 2: (6, 5), 3: (3, 2, 4)}[spatial])
    x, y = image(rng, shape, 0).requires_grad_(), image(rng, shape, 2)

    def framed(t):
        sides = [1] * (2 * spatial)
        frame = torch.nn.functional.pad(torch.zeros_like(t), sides, value=1.0)
        value = {"foreground": t.amax(), "foreground_detached": t.detach().amax()}
        value["background"] = 0.0
        return torch.nn.functional.pad(t, sides) + frame * value.get(padding, padding)

    both = [torch.cat([framed(t[i : i + 1]) for i in range(2)]) for t in (x, y)]
    value = pyloss.betti_matching_loss(x, y, padding=padding)
    by_hand = pyloss.betti_matching_loss(*both)
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], torch.autograd.grad(by_hand, x)[0])
    matching = pyloss.betti_matching(x, y, padding=padding)
    torch.testing.assert_close(matching.loss().mean(), value)
    plain = pyloss.betti_matching(*both)
    for kind in ("matched", "unmatched_input", "unmatched_target"):
        for d in range(spatial):
            a, b = matching.coordinates(kind, 1, d), plain.coordinates(kind, 1, d) - 1
            limit = torch.tensor(shape[2:])
            outside = ((b < 0) | (b >= limit)).any(-1, keepdim=True)
            b = torch.where(outside, -1, b)
            assert sorted(a.tolist()) == sorted(b.tolist())


def test_strides_and_batches():
    x, y = torch.rand(3, 2, 9, 12), torch.rand(3, 2, 9, 12) > 0.5
    value = pyloss.betti_matching_loss(x, y, reduction="none")
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(pyloss.betti_matching_loss(strided, y, reduction="none"), value)
    for i in range(3):
        one = pyloss.betti_matching_loss(x[i : i + 1], y[i : i + 1], reduction="none")
        assert torch.equal(one[0], value[i])


def test_constant_images_and_empty_batches():
    x = torch.full((2, 1, 4, 4), 0.5, requires_grad=True)
    value = pyloss.betti_matching_loss(x, torch.ones(2, 1, 4, 4))
    value.backward()
    assert value == 0 and not x.grad.any()
    empty = torch.zeros(0, 1, 4, 4, requires_grad=True)
    for reduction in ("mean", "sum"):
        value = pyloss.betti_matching_loss(empty, empty.detach(), reduction=reduction)
        assert value == 0
        value.backward()
    assert pyloss.betti_matching_loss(empty, empty, reduction="none").shape == (0, 1)
    assert pyloss.betti_matching(empty, empty).counts.shape == (0, 2, 3)
    assert pyloss.persistence_pairs(empty).index.shape == (0, 4)
    assert pyloss.betti_numbers(empty).shape == (0, 1, 2)


# --------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("padding", ["foreground", "background"])
@pytest.mark.parametrize("filtration", ["superlevel", "sublevel", "both"])
def test_gradcheck_with_padding(padding, filtration):
    x = ((torch.randperm(2 * 36) + 1) / 73.0).double().view(2, 1, 6, 6).requires_grad_()
    y = (torch.rand(2, 1, 6, 6) > 0.5).double()

    def loss(t):
        return pyloss.betti_matching_loss(t, y, padding=padding, filtration=filtration)

    assert gradcheck(loss, (x,), eps=1e-4)
    assert gradgradcheck(loss, (x,), eps=1e-4)


def test_a_detached_frame_has_the_value_but_no_gradient():
    x = torch.rand(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 1, 5, 4)
    found = []
    for padding in ("foreground", "foreground_detached", float(x.detach().max())):
        options = dict(padding=padding, include_target_unmatched=False)
        # A number frames the target as well, so that both have the same largest value.
        loss = pyloss.betti_matching_loss(x, y / y.max() * float(x.detach().max()), **options)
        found.append((loss, torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][0], found[2][0])
    torch.testing.assert_close(found[1][1], found[2][1])


@pytest.mark.parametrize("superlevel", [True, False])
@pytest.mark.parametrize("unmatched", ["diagonal", "extreme"])
def test_vmap(superlevel, unmatched):
    """Loss, gradient and second derivative of each item, over one and two mapped dimensions."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 3, 1, 2, 4, 5, dtype=torch.float64, generator=generator).unbind(0)
    options = dict(
        filtration="superlevel" if superlevel else "sublevel", unmatched=unmatched, essential=True,
        padding="foreground", min_persistence=0.1, target_weight=0.5,
    )  # fmt: skip

    def loss(a, b):
        return pyloss.betti_matching_loss(a, b, **options)

    def slope(a, b):
        return torch.func.grad(loss)(a, b)

    def curve(a, b):
        return torch.func.grad(lambda t: slope(t, b).square().sum())(a)

    for f in (loss, slope, curve):
        expected = torch.stack([f(a, b) for a, b in zip(x, y)])
        torch.testing.assert_close(torch.vmap(f)(x, y), expected)
    leaf = x.clone().requires_grad_()
    alone = torch.stack([loss(a, b) for a, b in zip(leaf, y)])
    torch.testing.assert_close(torch.vmap(loss)(x, y), alone.detach())
    (grad,) = torch.autograd.grad(alone.sum(), leaf)
    torch.testing.assert_close(torch.vmap(slope)(x, y), grad)
    torch.testing.assert_close(
        torch.vmap(loss, in_dims=(0, None))(x, y[0]), torch.stack([loss(a, y[0]) for a in x])
    )
    nested = torch.vmap(torch.vmap(loss))(x[None], y[None])
    torch.testing.assert_close(nested[0], alone.detach())


def test_func_grad():
    x, y = fields(16)
    found = torch.func.grad(lambda t: pyloss.betti_matching_loss(t, y))(x)
    x.requires_grad_()
    pyloss.betti_matching_loss(x, y).backward()
    torch.testing.assert_close(found, x.grad)


def test_gradient_steps_reach_the_target():
    x, y = fields(24)
    x = x.clone().requires_grad_()
    first = pyloss.betti_matching_loss(x, y)
    for _ in range(60):
        (grad,) = torch.autograd.grad(pyloss.betti_matching_loss(x, y), x)
        with torch.no_grad():
            x -= 0.1 * grad
    assert pyloss.betti_matching_loss(x, y) < 0.05 * first


# --------------------------------------------------------------------------------------------------
# torch machinery


def test_opcheck():
    x, y = torch.rand(2, 2, 7, 6), (torch.rand(2, 2, 7, 6) > 0.5).float()
    for want_grad in (0.0, 1.0):
        options = [1.0, 3.0, 0.0, 0.0, want_grad, 0.0, 1.0, 1.0, 1.0, 1.0]
        torch.library.opcheck(torch.ops.pyloss.betti_loss_fused, (x, y, options))
    a, b = x.flatten(0, 1), y.flatten(0, 1)
    torch.library.opcheck(torch.ops.pyloss.betti_matching, (a, b, True, [0, 1]))
    torch.library.opcheck(torch.ops.pyloss.persistence_pairs, (a, True, [0, 1], True))


def test_compile_with_padding():
    x, y = fields(16)
    x.requires_grad_()

    def f(t, target):
        return pyloss.betti_matching_loss(t, target, padding="foreground")

    value = torch.compile(f, fullgraph=True, backend="aot_eager")(x, y)
    exact = f(x, y)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(exact, x))


def test_reference_backend():
    x, y = fields(8)
    x.requires_grad_()
    value = pyloss.betti_matching_loss(x, y)
    with pyloss.backend("reference"):
        exact = pyloss.betti_matching_loss(x, y)
        matching = pyloss.betti_matching(x, y)
        pairs = pyloss.persistence_pairs(x)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(exact, x))
    assert rows(matching) == rows(pyloss.betti_matching(x, y))
    assert torch.equal(pairs.index, pyloss.persistence_pairs(x).index)


def test_threads(keep_num_threads):
    """Bit for bit, for one image (runs in parallel, from 128^2 voxels on) and for several (items
    in parallel)."""
    for batch, n in ((1, 130), (3, 96)):
        x = torch.cat([fields(n, seed)[0] for seed in range(batch)]).requires_grad_()
        y = torch.cat([fields(n, seed)[1] for seed in range(batch)])
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            value = pyloss.betti_matching_loss(x, y, reduction="none")
            (grad,) = torch.autograd.grad(value.sum(), x)
            found.append((value.detach(), grad, rows(pyloss.betti_matching(x, y))))
        for value, grad, table in found[1:]:
            assert torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1])
            assert table == found[0][2]


# --------------------------------------------------------------------------------------------------
# Properties


def test_monotone_maps_keep_the_coordinates():
    x, y = fields(32)
    before = rows(pyloss.betti_matching(x, y + 0.1 * x))
    f = lambda t: (3 * t.double()).exp() - 7  # noqa: E731
    assert rows(pyloss.betti_matching(f(x), f(y + 0.1 * x))) == before


def test_an_image_matches_itself():
    x, _ = fields(32)
    m = pyloss.betti_matching(x, x)
    assert len(m.matched) and not len(m.unmatched_input) and not len(m.unmatched_target)
    assert torch.equal(m.matched[:, 2:4], m.matched[:, 4:])


def test_mirror():
    x, y = fields(32)
    a, b = pyloss.betti_matching(x, y), pyloss.betti_matching(y, x)
    swapped = b.matched[:, [0, 1, 4, 5, 2, 3]].tolist()
    assert a.matched.tolist() == sorted(swapped)
    assert torch.equal(a.unmatched_input, b.unmatched_target)
    assert torch.equal(a.counts, b.counts[..., [0, 2, 1]])


def test_bars_are_what_is_matched_or_not():
    x, y = fields(32)
    m = pyloss.betti_matching(x, y)
    pairs = pyloss.persistence_pairs(x, filtration="superlevel")
    both = m.matched[:, :4].tolist() + m.unmatched_input.tolist()
    assert sorted(both) == pairs.index.tolist()
    assert torch.equal(pairs.counts, m.counts[..., 0] + m.counts[..., 1])


# --------------------------------------------------------------------------------------------------
# Pairs, cycles, metrics


def test_essential_and_split():
    x = torch.tensor([[[0.3, 0.1, 0.2]], [[0.0, 0.5, 0.4]]])
    pairs = pyloss.persistence_pairs(x, 2, essential=True)
    assert pairs.index.tolist() == [[0, 0, 1, -1], [1, 0, 0, -1], [1, 0, 2, 1]]
    assert pairs.values[0, 1] == torch.inf
    assert pairs.counts.tolist() == [[1, 0], [2, 0]]
    assert pairs.split()[1][0].tolist() == [[[0, 0], [-1, -1]], [[0, 2], [0, 1]]]
    assert pairs.betti(0.45).tolist() == [[1, 0], [2, 0]]
    assert pairs.betti(0.5).tolist() == [[1, 0], [1, 0]]
    short = pyloss.persistence_pairs(x, 2, min_persistence=0.2)
    assert short.index.tolist() == []


@pytest.mark.parametrize("filtration", ["sublevel", "superlevel"])
def test_t_construction_by_hand(filtration):
    """Two squares that meet in a corner are one component; the diagonal closes a hole."""
    x = torch.ones(1, 4, 4)
    x[0, 0, 1] = x[0, 1, 0] = x[0, 1, 2] = x[0, 2, 1] = 0.0
    x = x if filtration == "sublevel" else -x
    v = pyloss.persistence_pairs(x, 2, filtration=filtration)
    t = pyloss.persistence_pairs(x, 2, filtration=filtration, construction="T", essential=True)
    assert v.counts.tolist() == [[3, 0]]
    assert t.counts.tolist() == [[1, 1]]
    assert t.index[1].tolist()[:2] == [0, 1] and t.index[1, 3] == 5  # the voxel inside


def test_representative_cycles():
    y = torch.zeros(1, 1, 7, 7)
    y[..., 1:4, 1:4] = 1
    y[..., 2, 2] = 0
    y[..., 5, 5:] = 1
    m = pyloss.betti_matching(y, y)
    (hole,) = m.representative_cycles(0, "input", 1)
    ring = {(r, c) for r in range(1, 4) for c in range(1, 4)} - {(2, 2)}
    assert set(map(tuple, hole[:-1].tolist())) == ring and hole[-1].tolist() == [2, 2]
    (part,) = m.representative_cycles(0, "target", 0, index=0)
    assert set(map(tuple, part[:-1].tolist())) == {(5, 5), (5, 6)}
    assert m.representative_cycles(0, "comparison", 1)[0].tolist() == hole.tolist()
    assert m.representative_cycles(0, "input", 0, "unmatched") == []
    framed = pyloss.betti_matching(y, y, padding="background")
    assert framed.representative_cycles(0, "input", 1)[0].tolist() == hole.tolist()


def test_betti_numbers():
    rng = random.Random(7)
    for _ in range(60):
        mask = image(rng, (rng.randint(1, 7), rng.randint(1, 7)), 2).bool()
        assert pyloss.betti_numbers(mask, 2).tolist() == reference.betti_numbers(mask)
        line = mask.flatten()
        assert pyloss.betti_numbers(line, 1).tolist() == reference.betti_numbers(line)
    for fill in (0, 1):
        assert pyloss.betti_numbers(torch.full((2, 1, 3, 3), fill)).tolist() == [[[fill, 0]]] * 2


def test_metrics():
    x = torch.zeros(2, 1, 6, 6)
    y = torch.zeros(2, 1, 6, 6)
    x[0, 0, 0, 0] = y[0, 0, 5, 5] = y[0, 0, 0, 0] = 1
    x[1, 0, 1:4, 1:4] = y[1, 0, 1:4, 1:4] = 0.8
    x[1, 0, 2, 2] = 0.1
    assert pyloss.betti_number_error(x, y, reduction="none").tolist() == [[[1, 0]], [[0, 1]]]
    assert pyloss.betti_matching_error(x, y).tolist() == [0.5, 0.5]
    assert pyloss.betti_matching_error(x, y, normalize=True, reduction="none").tolist() == [
        [0.5], [1.0]
    ]  # fmt: skip
    nothing = torch.zeros(1, 1, 6, 6)
    assert pyloss.betti_matching_error(nothing, nothing, normalize=True) == 0
    # Constant masks have no bars of finite length, so the error of a lone component is 0.
    gray = pyloss.betti_matching_error(x, y, binarize=False)
    torch.testing.assert_close(gray.sum(), pyloss.betti_matching_loss(x, y))
    for cls, f in (
        (pyloss.metrics.BettiNumberError, pyloss.betti_number_error),
        (pyloss.metrics.BettiMatchingError, pyloss.betti_matching_error),
    ):
        metric = cls()
        with pytest.raises(RuntimeError, match="before update"):
            metric.compute()
        metric.update(x[:1], y[:1])
        metric.update(x[1:], y[1:])
        torch.testing.assert_close(metric.compute(), f(x, y))
        metric.reset()
        metric.update(x[1:], y[1:])
        torch.testing.assert_close(metric.compute(), f(x[1:], y[1:]))


@pytest.mark.parametrize("threshold", [-1, 256, 300, -1.0, 127.5, 256.0])
def test_thresholds_that_the_dtype_of_a_mask_does_not_hold(threshold):
    """300 is no 44 of uint8, and -1 no 255."""
    x, y = (
        torch.tensor(t, dtype=torch.uint8)[None, None] for t in ([0, 255, 0, 1], [50, 0, 50, 0])
    )
    for metric in (pyloss.betti_number_error, pyloss.betti_matching_error):
        assert torch.equal(metric(x, y, threshold), metric(x.double(), y.double(), threshold))


def test_essential_of_a_matching():
    x, y = (t.requires_grad_() for t in torch.rand(2, 2, 1, 5, 6, dtype=torch.float64))
    for filtration in ("superlevel", "sublevel"):
        matching = pyloss.betti_matching(x, y, filtration=filtration)
        loss = pyloss.betti_matching_loss(
            x, y, filtration=filtration, essential=True, reduction="none"
        )
        torch.testing.assert_close(matching.loss(include_essential=True), loss[:, 0])
        assert not torch.equal(matching.loss(), matching.loss(include_essential=True))


def test_repr_of_a_metric():
    metric = pyloss.metrics.BettiMatchingError(0.25, normalize=True)
    assert repr(metric) == "BettiMatchingError(threshold=0.25, normalize=True)"


def test_cycles_of_no_bar():
    matching = pyloss.betti_matching(torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6) > 0.5)
    for index in (99, -1):
        with pytest.raises(IndexError, match=f"index must be that of one of .* bars, got {index}"):
            matching.representative_cycles(0, index=index)
    with pytest.raises(IndexError, match=r"item must be in 0\.\.1, got 7"):
        matching.representative_cycles(7)


def test_numpy_integers():
    np = pytest.importorskip("numpy")
    x, y = torch.rand(2, 1, 5, 6), torch.rand(2, 1, 5, 6) > 0.5
    options = dict(spatial_dims=np.int64(2), dims=np.array([1]))
    assert rows(pyloss.betti_matching(x, y, **options)) == rows(
        pyloss.betti_matching(x, y, 2, dims=[1])
    )
    with pytest.raises(TypeError, match="spatial_dims must be an integer"):
        pyloss.betti_matching(x, y, np.bool_(True))


@pytest.mark.parametrize("name", ["filtration", "unmatched", "reduction", "activation"])
def test_typos_are_found_at_construction(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got 'misspelt'"):
        pyloss.BettiMatchingLoss(**{name: "misspelt"})


def test_module():
    x, y = fields(16)
    alone = pyloss.BettiMatchingLoss(filtration="both", dims=[0])
    assert alone(x, y) == pyloss.betti_matching_loss(x, y, filtration="both", dims=[0])
    with_base = pyloss.BettiMatchingLoss(base_loss=torch.nn.BCELoss(), alpha=0.25)
    expected = torch.nn.BCELoss()(x, y) + 0.25 * pyloss.betti_matching_loss(x, y)
    torch.testing.assert_close(with_base(x, y), expected)
    assert "alpha=0.25" in repr(with_base)


# --------------------------------------------------------------------------------------------------
# Peers, when installed


def _multiset(values):
    return sorted((round(b, 9), round(d, 9)) for b, d in values)


@pytest.mark.parametrize("construction", ["V", "T"])
def test_gudhi(construction):
    gudhi = pytest.importorskip("gudhi")
    rng = random.Random(8)
    for _ in range(40):
        x = image(rng, (rng.randint(2, 12), rng.randint(2, 12)), rng.choice([0, 3, 6]))
        name = "vertices" if construction == "V" else "top_dimensional_cells"
        complex_ = gudhi.CubicalComplex(**{name: x.numpy()})
        theirs = complex_.persistence(homology_coeff_field=2, min_persistence=0.0)
        pairs = pyloss.persistence_pairs(x, 2, essential=True, construction=construction)
        for d in (0, 1):
            ours = pairs.values[pairs.index[:, 1] == d].tolist()
            assert _multiset(ours) == _multiset(v for k, v in theirs if k == d)


def test_cripser():
    cripser = pytest.importorskip("cripser")
    rng = random.Random(9)
    for _ in range(40):
        x = image(rng, (rng.randint(2, 12), rng.randint(2, 12)), rng.choice([0, 3, 6]))
        theirs = cripser.computePH(x.numpy(), maxdim=1)
        pairs = pyloss.persistence_pairs(x, 2)
        for d in (0, 1):
            ours = pairs.values[pairs.index[:, 1] == d].tolist()
            finite = [(r[1], r[2]) for r in theirs if r[0] == d and r[2] < 1e30 and r[1] != r[2]]
            assert _multiset(ours) == _multiset(finite)


# --------------------------------------------------------------------------------------------------
# Errors


def test_errors_of_a_matching():
    matching = pyloss.betti_matching(*torch.rand(2, 1, 1, 4, 4))
    with pytest.raises(IndexError, match="item must be in 0..0"):
        matching.coordinates("matched", 1, 0)
    with pytest.raises(ValueError, match="dim must be in 0..1"):
        matching.coordinates("matched", 0, 2)
    with pytest.raises(ValueError, match="alpha"):
        pyloss.BettiMatchingLoss(alpha=-1)


# --- after review ---------------------------------------------------------------------------------


def test_float16_mean_does_not_overflow():
    x, y = torch.rand(96, 1, 100, 100), torch.rand(96, 1, 100, 100) > 0.5
    half = pyloss.betti_matching_loss(x.half(), y)
    total = pyloss.betti_matching_loss(x.half().float(), y, reduction="sum")
    assert total > 65504 and half.dtype == torch.float16
    torch.testing.assert_close(half.float(), total / 96, rtol=1e-3, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyloss.betti_matching_loss(x.bfloat16(), y).dtype == torch.float32


def test_targets_that_dice_takes():
    x, labels = torch.rand(2, 3, 8, 8).softmax(1), torch.randint(3, (2, 8, 8))
    want = pyloss.betti_matching_loss(x, labels)
    torch.testing.assert_close(pyloss.betti_matching_loss(x, labels.unsqueeze(1)), want)
    one, mask = torch.rand(2, 1, 8, 8), torch.rand(2, 8, 8) > 0.5
    want = pyloss.betti_matching_loss(one, mask.unsqueeze(1))
    for target in (mask, mask.long(), mask.to(torch.uint8)):
        torch.testing.assert_close(pyloss.betti_matching_loss(one, target), want)


def test_loss_of_a_matching_checks_its_numbers():
    x = torch.rand(1, 5, 5)
    matching = pyloss.betti_matching(x, x > 0.5, 2)
    for name in ("matched_weight", "unmatched_weight", "target_weight", "min_persistence"):
        with pytest.raises(ValueError, match=name):
            matching.loss(**{name: -1.0})
    infinite = torch.tensor([[1.0, -torch.inf, 1, 1, 1]])
    assert pyloss.betti_matching(torch.ones(1, 5), infinite, 1).loss(target_weight=0.0) == 0


def test_base_loss_of_another_shape():
    criterion = pyloss.BettiMatchingLoss(
        base_loss=torch.nn.MSELoss(reduction="none"), reduction="none"
    )
    with pytest.raises(ValueError, match="base_loss gives the shape"):
        criterion(torch.rand(2, 2, 4, 4), torch.rand(2, 2, 4, 4))
