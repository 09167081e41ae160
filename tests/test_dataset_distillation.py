"""Distillation of data sets: schedules, perturbed weights, samples to begin with, a toy."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from statistics import median

import pytest
import torch

from pyloss.functional import (
    balanced_loss_weight,
    clip_schedule,
    lipschitz_gradient_penalty,
    perturb_weights,
    representative_indices,
    trajectory_matching_loss,
)


def test_matching_is_one_at_the_start_and_zero_at_the_end() -> None:
    start = [torch.randn(3, 4), torch.randn(3)]
    target = [p + torch.randn_like(p) for p in start]
    assert trajectory_matching_loss(start, target, start) == 1
    assert trajectory_matching_loss(target, target, start) == 0
    flat = [torch.cat([p.reshape(-1) for p in side]) for side in (start, target)]
    theta = [p + 0.5 for p in start]
    torch.testing.assert_close(
        trajectory_matching_loss(flat[0] + 0.5, flat[1], flat[0]),
        trajectory_matching_loss(theta, target, start),
    )


def test_weights_of_steps_in_between() -> None:
    start, target, theta = torch.zeros(4), torch.ones(4), torch.full((4,), 0.5)
    mids = [(theta, target), (start, 2 * target)]  # 1/4 and 1
    for weight, expected in ((0.0, 0.25), (1.0, 1.5), ("adaptive", 0.25 + 0.25 / 3 + 2 / 3)):
        found = trajectory_matching_loss(theta, target, start, mids, mid_weight=weight)
        assert found.item() == pytest.approx(expected)


def test_penalty_of_outputs_is_that_of_the_network() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(),
                              torch.nn.Linear(12, 2))  # fmt: skip
    x = torch.randn(5, 2, 4, 4, requires_grad=True)
    for dims in (None, 1, (1, 2)):
        given = lipschitz_gradient_penalty(x, net(x), dims=dims)
        called = lipschitz_gradient_penalty(x.detach(), net, dims=dims)
        assert torch.equal(given, called)
        for a, b in zip(
            *(torch.autograd.grad(v, list(net[0].parameters())) for v in (given, called))
        ):
            torch.testing.assert_close(a, b)
    slopes = torch.autograd.grad(net(x).sum(), x)[0]
    expected = 2 * (slopes.norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(lipschitz_gradient_penalty(x, net, dims=1), expected)


def test_penalty_begins_with_a_network_of_zeros() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    penalty = lipschitz_gradient_penalty(torch.randn(4, 2), lambda x: x @ weight.T)
    assert torch.isfinite(torch.autograd.grad(penalty, weight)[0]).all()


@pytest.mark.parametrize("x", [torch.ones(3, 2), torch.ones(3, 2, requires_grad=True)])
def test_penalty_of_outputs_without_a_graph(x) -> None:
    with pytest.raises(RuntimeError, match="inputs"):
        lipschitz_gradient_penalty(x, torch.ones(3, requires_grad=x.requires_grad) * 2)


def test_clip_schedule() -> None:
    found = [clip_schedule(e) for e in range(12)]
    assert found == pytest.approx([0.5 + 0.05 * e for e in range(10)] + [1.0, 1.0])
    assert [clip_schedule(e, first=0.2, epochs=2) for e in range(3)] == pytest.approx([0.2, 0.6, 1])
    assert clip_schedule(0, epochs=0) == 1.0


def test_balanced_loss_weight() -> None:
    log5 = lambda v: math.log(v) / math.log(5)  # noqa: E731
    for start, expected in ((0, 1 / log5(18)), (9, 1 / log5(9)), (10, log5(8)), (20, log5(18))):
        assert balanced_loss_weight(start, 20) == pytest.approx(expected)
    assert balanced_loss_weight(1, 3, base=2.0, offset=4.0) == pytest.approx(1 / math.log2(4.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_perturbation_has_its_size(dtype) -> None:
    kernel, matrix = torch.ones(4, 3, 3, 3, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    moved, same = perturb_weights([kernel, matrix], 0.5, generator=generator)
    assert moved.dtype == dtype and same is matrix
    # Of weights of 1 it is alpha d / ||d||, but for the rounding of bfloat16 near 1.
    size = (moved - kernel).double().norm().item()
    assert size == pytest.approx(0.5, rel=0.05 if dtype == torch.bfloat16 else 1e-5)
    both = perturb_weights([kernel, matrix], 0.5, min_dim=2, generator=generator)
    assert not torch.equal(both[0], moved) and not torch.equal(both[1], matrix)


def test_representatives_are_next_to_the_centres_of_clusters() -> None:
    """Three clusters a class, far from each other, of a middle and six points around it."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    around = torch.tensor([[0, 0], [2, 0], [-2, 0], [0, 2], [0, -2], [1, 1], [-1, -1]])
    x = (middle.unsqueeze(1) + around).reshape(-1, 2)
    features = torch.cat([x, x + 200])
    labels = torch.arange(2).repeat_interleave(21)
    index = representative_indices(features, labels, 3, generator=generator)
    assert sorted(index.tolist()) == [0, 7, 14, 21, 28, 35]
    assert labels[index].tolist() == [0, 0, 0, 1, 1, 1]
    order = torch.randperm(42, generator=generator)
    mixed = representative_indices(features[order], labels[order], 3, generator=generator)
    assert sorted(order[mixed].tolist()) == [0, 7, 14, 21, 28, 35]
    nearest = representative_indices(features, labels, 9, clusters=3, generator=generator)
    assert len(set(nearest.tolist())) == 18
    off = features[nearest] - features[nearest - nearest % 7]
    assert off.norm(dim=1).max() < 1.5  # the middle and its two next points


def test_representatives_of_points_that_coincide_are_distinct() -> None:
    index = representative_indices(torch.zeros(5, 2), torch.zeros(5).long(), 4)
    assert len(set(index.tolist())) == 4


# --------------------------------------------------------------------------------------------------
# The example, at full length


@pytest.mark.exhaustive
@pytest.mark.slow
def test_distilled_points_train_better_than_real_ones() -> None:
    namespace = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "distill_toy.py"))
    args = namespace["parser"]().parse_args([])
    accuracy, losses, clipped = namespace["experiment"](0, args)
    assert accuracy["distilled"] > accuracy["real, random"] + 5, accuracy
    assert median(losses[-100:]) < 0.6 * median(losses[:20]), losses  # they scatter with the start
    args.clip = False
    x, y = namespace["points"](0, args.each, args.noise)
    model = torch.nn.Sequential(torch.nn.Linear(namespace["FEATURES"], namespace["CLASSES"]))
    plain = namespace["DatasetDistiller"](model, x, y, args, 0).largest_epoch()
    assert clipped < 0.9 * plain


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_representatives_do_not_depend_on_the_scale(scale: float) -> None:
    labels = torch.arange(3).repeat(8)
    features = torch.randn(24, 4)
    found = [
        representative_indices(
            factor * features, labels, 2, generator=torch.Generator().manual_seed(0)
        )
        for factor in (1.0, scale)
    ]
    assert torch.equal(*found)
    none = representative_indices(features[:, :0], labels, 2)
    assert none.unique().numel() == 6
