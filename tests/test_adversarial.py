"""Attacks and adversarial training: balls, what stays untouched, formulas, the implicit part. What
the losses of logits promise: tests/specs/adversarial.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyloss
from pyloss.adversarial import (
    AdvCompSum,
    DoublyRobustATLoss,
    mart_loss,
    pgd_attack,
    pgd_maximise,
    trades_loss,
)
from pyloss.adversarial._implicit import implicit_term
from pyloss.functional import margin_shift, smooth_adversarial_comp_sum

EPS = 0.2


def network(seed: int = 0, **kind) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4)
    return nn.Sequential(*layers).to(**kind)


def batch(rows: int = 12, dtype=torch.float32, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (rows,), generator=generator)


ATTACKS = {
    "pgd_attack": lambda m, x, y, **o: pgd_attack(m, x, y, EPS, **o),
    "l2": lambda m, x, y, **o: pgd_attack(m, x, y, EPS, "l2", **o),
    "targeted": lambda m, x, y, **o: pgd_attack(m, x, y, EPS, targeted=True, **o),
    "margin": lambda m, x, y, **o: pgd_attack(m, x, y, EPS, loss="margin", restarts=2, **o),
    "margin_shift": lambda m, x, y, **o: pgd_maximise(m, x, y, EPS, **o),
    "kl": lambda m, x, y, **o: pgd_maximise(m, x, None, EPS, "l2", objective="kl", **o),
}
LOSSES = {
    "trades": lambda m, x, y: trades_loss(m, x, y, EPS, steps=3),
    "mart": lambda m, x, y: mart_loss(m, x, y, EPS, "l2", steps=3),
    "comp_sum": AdvCompSum(1.3, nu=2.0, eps=EPS, steps=3),
    "doubly robust": DoublyRobustATLoss(0.5, eps=EPS, steps=3, implicit=True, cg_steps=2),
}

# --------------------------------------------------------------------------------------------------
# Attacks


def plain_pgd(model, x, y, norm, steps, step, targeted, clip):
    """From x, one row at a time, without a word of pyloss."""
    found = []
    for row, label in zip(x, y):
        moved = row.clone()
        for _ in range(steps):
            moved.requires_grad_()
            loss = F.cross_entropy(model(moved[None]), label[None])
            g = torch.autograd.grad(-loss if targeted else loss, moved)[0]
            d = g.sign() if norm == "linf" else g / g.norm()
            away = moved.detach() + step * d - row
            if norm == "linf":
                away = away.clamp(-EPS, EPS)
            elif away.norm() > EPS:
                away = away * EPS / away.norm()
            moved = row + away
            if clip is not None:
                moved = moved.clamp(*clip)
        found.append(moved.detach())
    return torch.stack(found)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_is_that_of_a_plain_loop(norm, clip, targeted) -> None:
    model, (x, y) = network(dtype=torch.float64).eval(), batch(6, torch.float64)
    got = pgd_attack(
        model, x, y, EPS, norm, 5, 0.07, targeted=targeted, random_start=False, clip=clip
    )
    torch.testing.assert_close(got, plain_pgd(model, x, y, norm, 5, 0.07, targeted, clip))


@pytest.mark.parametrize("name", ATTACKS)
def test_inside_the_ball_and_the_clip_and_better_than_the_start(name) -> None:
    model, (x, y) = network().eval(), batch()
    moved = ATTACKS[name](model, x, y, clip=(0.1, 0.9))
    x = x.clamp(0.1, 0.9)
    moved = ATTACKS[name](model, x, y, clip=(0.1, 0.9))
    assert not moved.requires_grad
    assert moved.dtype == x.dtype
    assert moved.min() >= 0.1
    assert moved.max() <= 0.9
    away = moved - x
    size = away.norm(dim=1) if name in ("l2", "kl") else away.abs().amax(1)
    assert size.max() <= EPS * (1 + 1e-5)
    assert size.min() > 0.5 * EPS
    with torch.no_grad():
        clean, adv = model(x), model(moved)
    change = F.cross_entropy(adv, y, reduction="none") - F.cross_entropy(clean, y, reduction="none")
    if name in ("pgd_attack", "l2"):
        assert (change > 0).all()
    elif name == "targeted":
        assert (change < 0).all()


def test_the_shift_of_a_linear_model_becomes_the_largest() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    moved = pgd_maximise(model, x, y, 0.1, steps=20)
    shift = margin_shift(model(x), model(moved), y)
    w = model.weight[0] - model.weight[1]
    torch.testing.assert_close(shift, 0.1 * w.abs().sum().expand(5))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_whose_square_is_no_number_has_a_direction(norm) -> None:
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([65.0, 0.0, 0.0, 0.0]))  # p of the others: 1e-28
    x, y = batch()[0], torch.zeros(12).long()
    moved = pgd_attack(model, x, y, EPS, norm, random_start=False)
    away = moved - x
    size = away.norm(dim=1) if norm == "l2" else away.abs().amax(1)
    torch.testing.assert_close(size, torch.full((12,), EPS))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm) -> None:
    """Half the radius holds a quarter of a disc and of a square."""
    model, x = nn.Linear(2, 2), torch.zeros(4000, 2)
    y = torch.zeros(4000).long()
    moved = pgd_attack(model, x, y, 1.0, norm, 1, 1e-9, generator=torch.Generator().manual_seed(0))
    size = moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)
    assert size.max() <= 1 + 1e-6
    assert abs((size < 0.5).float().mean() - 0.25) < 0.03  # four standard deviations


def test_restarts_take_the_best_of_each_row() -> None:
    model, (x, y) = network().eval(), batch(40)
    options = dict(steps=1, step=0.01, loss="margin")
    generator = torch.Generator().manual_seed(3)
    single = [pgd_attack(model, x, y, EPS, **options, generator=generator) for _ in range(3)]
    generator.manual_seed(3)
    best = pgd_attack(model, x, y, EPS, **options, restarts=3, generator=generator)

    def margins(z):
        return pyloss.adversarial.attacks._margin(model(z), y)

    torch.testing.assert_close(margins(best), torch.stack([margins(z) for z in single]).amax(0))


def test_one_that_succeeds_goes_before_one_of_larger_loss() -> None:
    """The loss is largest where the prediction is right."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.bias.zero_()
    x, y = torch.zeros(20, 1), torch.zeros(20).long()
    moved = pgd_attack(
        model, x, y, 1.0, steps=1, step=1e-6, restarts=4, loss=lambda z, y: z[:, 0],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    starts = torch.rand(4, 20, 1, generator=torch.Generator().manual_seed(0))
    assert (moved < 0).sum() > 15 > (starts[0] < 0.5).sum()


# --------------------------------------------------------------------------------------------------
# What stays as it was


def state_of(model, x):
    return copy.deepcopy((
        [m.training for m in model.modules()],
        dict(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        torch.get_rng_state(),
        x,
    ))  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_everything_as_it_was(name) -> None:
    model, (x, y) = network(), batch()
    model[1].eval()  # a batch norm that is kept still while the rest is trained
    model[0].weight.requires_grad_(False)
    model(x).sum().backward()
    x.requires_grad_()
    before = state_of(model, x)
    first = ATTACKS[name](model, x, y)
    torch.testing.assert_close(state_of(model, x), before, rtol=0, atol=0)
    assert x.grad is None
    # and is therefore the same again
    assert torch.equal(ATTACKS[name](model, x, y), first)
    with torch.inference_mode():
        assert torch.equal(ATTACKS[name](model, x, y), first)
    with torch.no_grad():
        assert torch.equal(ATTACKS[name](model, x, y), first)


def test_random_numbers_of_a_model_do_not_move_the_global_ones() -> None:
    """Some models draw in eval mode, too: dropout as a function does unless it is told."""
    layer, (x, y) = nn.Linear(6, 4), batch()

    def model(z):
        return layer(F.dropout(z, 0.2))

    before = torch.get_rng_state()
    for attack in ATTACKS.values():
        attack(model, x, y)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ATTACKS)
def test_in_inference_mode_labels_are_made_there_too(name) -> None:
    model, (x, y) = network(), batch()
    expected = ATTACKS[name](model, x, y)
    with torch.inference_mode():
        assert torch.equal(ATTACKS[name](model, x.clone(), y.clone()), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_dtypes_and_ones_that_are_ignored(dtype) -> None:
    model, (x, y) = network().eval(), batch()
    for call in (*ATTACKS.values(), LOSSES["trades"], LOSSES["mart"]):
        torch.testing.assert_close(call(model, x, y.to(dtype)), call(model, x, y))
    some, rest = y.clone(), slice(0, None, 2)
    some[1::2] = -100
    for loss in (trades_loss, mart_loss):
        for reduction in ("mean", "sum"):
            found = loss(model, x, some, 0.0, step=1.0, reduction=reduction)
            kept = loss(model, x[rest], y[rest], 0.0, step=1.0, reduction=reduction)
            torch.testing.assert_close(found, kept)
    still = pgd_attack(model, x, some, EPS, loss="margin", random_start=False)
    assert torch.equal(still[1::2], x[1::2]) and not torch.equal(still, x)
    for call in (mart_loss, lambda *a: pgd_attack(*a, loss="margin")):
        with pytest.raises(IndexError, match="Target 7 is out of bounds"):
            call(model, x, torch.full_like(y, 7), EPS)


def test_of_no_inputs_there_is_no_loss() -> None:
    """As torch's mean has it, and not an error of a shape."""
    model, (x, y) = network().eval(), batch()
    for loss in LOSSES.values():
        assert loss(model, x[:0], y[:0]).isnan()


def test_flags_return_after_an_error() -> None:
    model, (x, y) = network(), batch()
    with pytest.raises(ZeroDivisionError):
        pgd_attack(model, x, y, EPS, loss=lambda z, y: 1 / 0)
    assert all(m.training for m in model.modules())


def test_batch_norm_sees_two_forwards_and_no_attack() -> None:
    model, (x, y) = network(), batch()
    for loss in LOSSES.values():
        before = int(model[1].num_batches_tracked)
        loss(model, x, y)
        calls = 1 if isinstance(loss, DoublyRobustATLoss) else 2
        assert int(model[1].num_batches_tracked) == before + calls


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_leaves_the_gradients_of_the_weights(name) -> None:
    """Weights that autocast has cast for the attack must not come without a graph."""
    model, (x, y) = network().eval(), batch()
    found = []
    for cache in (True, False):
        model.zero_grad()
        loss = copy.deepcopy(LOSSES[name])
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            value = loss(model, x, y)
        value.backward()
        assert value.dtype == torch.float32
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().max() > 0 for g in found[0])
    torch.testing.assert_close(*found, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("name", ["pgd_attack", "margin_shift"])
def test_half_inputs(name) -> None:
    model, (x, y) = network(dtype=torch.bfloat16), batch(dtype=torch.bfloat16)
    moved = ATTACKS[name](model, x, y)
    assert moved.dtype == torch.bfloat16
    assert (moved.float() - x.float()).abs().max() <= EPS + 2**-8


def test_compiled_model() -> None:
    model, (x, y) = network(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    for name in ("pgd_attack", "margin_shift"):
        torch.testing.assert_close(ATTACKS[name](compiled, x, y), ATTACKS[name](model, x, y))
    assert all(m.training for m in model.modules())


def test_inside_of_ddp() -> None:
    """The wrapper's own forward is not called: it would wait for gradients of the parameters."""
    model, (x, y) = network(), batch()
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    assert torch.equal(pgd_attack(wrapper, x, y, EPS), pgd_attack(model, x, y, EPS))


@pytest.mark.parametrize(
    ("after", "attack", "message"),
    [
        (0, pgd_maximise, "NaN for the inputs as they are, step 0"),
        (0, pgd_attack, "the model returned NaN at step 1 of 10"),
        (4, pgd_attack, "the model returned NaN at step 5 of 10"),
        (4, pgd_maximise, "the model returned NaN at step 4 of 10"),
    ],
)
def test_nan_names_the_step(after, attack, message) -> None:
    model, (x, y), calls = network(), batch(), []

    def breaks(x):
        calls.append(x)
        return model(x) * (torch.nan if len(calls) > after else 1)

    with pytest.raises(RuntimeError, match=message):
        attack(breaks, x, y, EPS)


def test_a_gradient_of_nan_names_the_step() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(3).long()
    with pytest.raises(RuntimeError, match="gradient with respect to the input is NaN at step 1"):
        pgd_attack(lambda x: torch.sqrt(x * 0), x, y, EPS, loss=lambda z, y: z[:, 0])


def test_no_rows() -> None:
    x, y = torch.zeros(0, 6), torch.zeros(0).long()
    for attack in ATTACKS.values():
        assert attack(network(), x, y).shape == (0, 6)


# --------------------------------------------------------------------------------------------------
# Losses


def test_smooth_loss_is_an_upper_bound_of_the_adversarial_one() -> None:
    """On balls of finitely many points, with the least nu that is promised to do."""
    generator = torch.Generator().manual_seed(0)
    rows, points, classes = 400, 6, 5
    for rho in (0.3, 1.0, 4.0):
        for tau in (0.0, 0.6, 1.0, 1.5, 2.0):
            scale = torch.empty(rows, 1, 1, dtype=torch.float64)
            scale.log_normal_(0, 1.5, generator=generator)
            x = scale * torch.randn(rows, 1, classes, generator=generator, dtype=torch.float64)
            ball = x + scale * torch.randn(
                rows, points, classes, generator=generator, dtype=torch.float64
            )
            ball[:, :1] = x
            y = torch.randint(classes, (rows,), generator=generator)
            mine = torch.arange(classes) == y[:, None, None]
            margins = (ball * mine).sum(-1, keepdim=True) - ball
            u = torch.where(mine, 0.0, (1 - margins / rho).clamp(0, 1)).sum(-1).amax(1)
            adversarial = u.log1p() if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
            nu = (classes - 1) ** 0.5 / rho
            smooth = [
                smooth_adversarial_comp_sum(
                    x[:, 0], ball[:, k].contiguous(), y, tau, rho, nu, reduction="none"
                )
                for k in range(points)
            ]
            bound = torch.stack(smooth).amax(0)
            assert (bound >= adversarial * (1 - 1e-12)).all()


def test_trades_and_mart_are_the_published_formulas() -> None:
    model, (x, y) = network(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    moved = pgd_maximise(model, x, None, EPS, objective="kl", steps=3)
    clean, adv = model(x), model(moved)
    kl = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    expected = F.cross_entropy(clean, y) + 2.5 * kl.mean()
    got = trades_loss(model, x, y, EPS, steps=3, beta=2.5)
    torch.testing.assert_close(got, expected)

    moved = pgd_maximise(model, x, y, EPS, objective="cross_entropy", steps=3)
    adv = model(moved)
    p, p_adv = clean.softmax(1), adv.softmax(1)
    kl = (p * (p / p_adv).log()).sum(1)
    rows = torch.arange(len(x))
    others = p_adv.clone()
    others[rows, y] = 0
    bce = -p_adv[rows, y].log() - (1 - others.amax(1)).log()
    expected = bce + 2.5 * kl * (1 - p[rows, y])
    got = mart_loss(model, x, y, EPS, steps=3, beta=2.5, reduction="none")
    torch.testing.assert_close(got, expected)


def test_comp_sum_module_is_its_function() -> None:
    model, (x, y) = network().eval(), batch()
    criterion = AdvCompSum(0.5, 2.0, 3.0, eps=EPS, norm="l2", steps=4, reduction="none")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(criterion)))
    moved = pgd_maximise(model, x, y, EPS, "l2", 4, generator=twin.generator)
    expected = smooth_adversarial_comp_sum(
        model(x), model(moved), y, 0.5, 2.0, 3.0, reduction="none"
    )
    torch.testing.assert_close(criterion(model, x, y), expected)
    assert not torch.equal(criterion(model, x, y), expected)  # another start


def test_doubly_robust_weights() -> None:
    """Those of softmax(l / r); with a large r the mean."""
    model, (x, y) = network(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    for r in (0.3, 1e4):
        criterion = DoublyRobustATLoss(r, 1.0, eps=EPS, steps=2)
        twin = copy.deepcopy(criterion.generator)
        model.zero_grad()
        criterion(model, x, y).backward()
        got = [p.grad.clone() for p in model.parameters()]
        moved = pgd_attack(model, x, y, EPS, steps=2, generator=twin)
        losses = F.cross_entropy(model(moved), y, reduction="none")
        weights = (losses / r).softmax(0).detach() if r < 1 else torch.full_like(losses, 1 / 12)
        expected = torch.autograd.grad((weights * losses).sum(), list(model.parameters()))
        torch.testing.assert_close(got, list(expected), rtol=1e-3, atol=1e-5 if r > 1 else 1e-9)


@pytest.mark.parametrize("bent", [False, True])
def test_implicit_part_is_the_derivative_through_the_inner_minimum(bent) -> None:
    """Of a quadratic objective of the attack: its minimum with the barrier is found by Newton's
    method for each theta, and the total derivative taken by differences."""
    generator = torch.Generator().manual_seed(0)
    eps, barrier, n, m = 0.5, 0.1, 3, 4

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    push, target = normal(2, n, m), normal(2, n)
    half = normal(n, n)
    curve = half @ half.T * bent  # of the attack's loss, convex

    def attack(theta, delta):  # what is maximised, of each row
        return (delta * (push @ theta)).sum(1) - 0.5 * ((delta @ curve) * delta).sum(1)

    def loss(theta, delta):
        return ((delta - target) ** 2).sum(1) + (delta.sum(1) * theta[0]).sin()

    def minimum(theta):
        delta = torch.zeros(2, n, dtype=torch.float64)
        for _ in range(80):
            g = -(push @ theta) + delta @ curve
            g = g + barrier * (1 / (eps - delta) - 1 / (eps + delta))
            d2 = barrier * (1 / (eps - delta) ** 2 + 1 / (eps + delta) ** 2)
            move = torch.linalg.solve(curve + torch.diag_embed(d2), g)
            share = 1.0
            while ((delta - share * move).abs() >= eps).any():
                share /= 2
            delta = delta - share * move
        assert move.abs().max() < 1e-12
        return delta

    theta = normal(m).requires_grad_()
    delta = minimum(theta.detach()).requires_grad_()
    losses = loss(theta, delta)
    term = implicit_term(losses, attack(theta, delta), delta, eps, barrier, n + 1 if bent else 0)
    assert torch.equal(term, torch.zeros_like(term))
    for row in range(2):
        (got,) = torch.autograd.grad((losses + term)[row], theta, retain_graph=True)
        steps = 1e-5 * torch.eye(m, dtype=torch.float64)
        high = torch.stack([loss(t, minimum(t))[row] for t in theta.detach() + steps])
        low = torch.stack([loss(t, minimum(t))[row] for t in theta.detach() - steps])
        torch.testing.assert_close(got, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)


def test_implicit_part_at_the_walls_is_zero() -> None:
    model = nn.Linear(6, 4, dtype=torch.float64)
    x, y = batch(dtype=torch.float64)
    found = []
    for implicit in (False, True):
        model.zero_grad()
        criterion = DoublyRobustATLoss(eps=EPS, steps=8, step=EPS, implicit=implicit)
        criterion.generator.manual_seed(0)
        criterion(model, x, y).backward()  # of a linear model the attack ends in a corner
        found.append(model.weight.grad.clone())
    torch.testing.assert_close(*found)
