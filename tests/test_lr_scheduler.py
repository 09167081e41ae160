"""Schedules as torch's own behave, the refined one against its paper, and the recorder of norms."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as theirs
from torch.utils._python_dispatch import TorchDispatchMode

from pyloss.optim.lr_scheduler import (
    GradNormRecorder,
    LinearDecay,
    RefinedSchedule,
    refine_schedule,
)
from pyloss.optim.lr_scheduler.recorder import total_norm
from pyloss.optim.lr_scheduler.refinement import last_iterate_bound, running_median

F64 = torch.float64
NORMS = [9.0, 4.0, 2.0, 1.0, 1.0, 1.5, 1.0, 1.0]


def sgd(*rates, **options) -> torch.optim.SGD:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0, **options)


def rates_of(optimizer, schedule, steps: int) -> list[list[float]]:
    """Of each group before each step; what the schedule says is what the optimizer has."""
    found = []
    for _ in range(steps):
        found.append([float(rate) for rate in schedule.get_last_lr()])
        assert found[-1] == [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
        schedule.step()
    return found


def close(found, expected, **tolerance) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=F64), torch.tensor(expected, dtype=F64), **tolerance
    )


MAKERS = {
    "linear": lambda optimizer, **o: LinearDecay(optimizer, 7, 2, 0.1, **o),
    "refined": lambda optimizer, **o: RefinedSchedule(optimizer, NORMS, 7, smoothing=0, **o),
}
each_schedule = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

# --------------------------------------------------------------------------------------------------
# The mathematics


def test_constant_norms_give_the_linear_decay() -> None:
    for count in (2, 3, 50):
        line = torch.linspace(1, 0, count, dtype=F64)
        for norm in ("l1", "l2"):
            found = refine_schedule(torch.full((count,), 3.7e-200, dtype=F64), norm=norm)
            torch.testing.assert_close(found, line, rtol=0, atol=1e-12)
    optimizer = sgd(0.5)
    refined = RefinedSchedule(optimizer, [2.0] * 31, 20)
    linear = LinearDecay(sgd(0.5), 20)
    close([refined.multiplier(t) for t in range(30)], [linear.multiplier(t) for t in range(30)],
          rtol=0, atol=1e-12)  # fmt: skip


def test_norms_that_fall_and_settle_give_a_warm_up_and_a_decay() -> None:
    where, what = (0.0, 0.003, 0.02, 0.03, 0.1, 1.0), (15.0, 6.0, 4.0, 2.0, 1.0, 1.0)
    steps = 1000
    norms = torch.empty(steps, dtype=F64)
    for a, b, x, y in zip(where, where[1:], what, what[1:]):
        i, j = round(a * (steps - 1)), round(b * (steps - 1))
        norms[i : j + 1] = torch.linspace(x, y, j - i + 1, dtype=F64)
    for smoothing, atol in ((0.0, 0), (0.02, 30)):
        found = refine_schedule(norms, smoothing=smoothing)
        peak = int(found.argmax())
        assert abs(peak - 100) <= atol  # where the norm settles
        assert (found[: peak + 1].diff() >= 0).all() and (found[peak:].diff() <= 0).all()
        assert found[0] < 0.02 and found[-1] == 0


@pytest.mark.parametrize("share", [0.03, 0.1, 0.55, 1.0])
def test_running_median(share: float) -> None:
    x = torch.randint(0, 40, (101,)).double()  # with ties
    half = int(share * 101 // 2)
    near = torch.cat([x[:1].expand(half), x, x.flip(0)[:half]])
    expected = near.unfold(0, 2 * half + 1, 1).median(-1).values
    assert torch.equal(running_median(x, share), expected)


def test_infinite_and_zero_norms() -> None:
    norms = torch.tensor([4.0, torch.inf, 2.0, 1.0, 1.0])
    weights = torch.arange(1.0, 6.0)
    kept = [0, 2, 3, 4]
    assert torch.equal(refine_schedule(norms, smoothing=0),
                       refine_schedule(norms[kept], smoothing=0))  # fmt: skip
    assert torch.equal(refine_schedule(norms, weights=weights),
                       refine_schedule(norms[kept], weights=weights[kept]))  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 4 grad_norms are 0; .* above, 0.5"):
        found = refine_schedule([2.0, 0.0, 0.5, 1.0], smoothing=0)
    assert torch.equal(found, refine_schedule([2.0, 0.5, 0.5, 1.0], smoothing=0))


@pytest.mark.parametrize("steps", [2, 40, pytest.param(3000, marks=pytest.mark.exhaustive)])
def test_the_optimal_rates_minimise_the_bound(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    norms = 1 + 9 * torch.exp(-torch.arange(steps, dtype=F64) / 4)
    weights = norms**-2
    rates = refine_schedule(norms, smoothing=0, mode="optimal")

    def bound(rates: Tensor) -> Tensor:  # at the best scale
        at_one, total = last_iterate_bound(rates, weights), rates.sum()
        best = (2 * total * at_one - 1).rsqrt()
        return last_iterate_bound(best * rates, weights)

    least = bound(rates)
    closed = refine_schedule(norms, smoothing=0)
    closed[-1] = closed[-2]
    assert least < bound(closed)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(10):
            factor = torch.exp(size * torch.randn(steps, generator=generator, dtype=F64))
            assert bound(rates * factor) > least


def test_linear_decay_of_the_last_iterate_beats_a_constant_rate() -> None:
    """L1 regression in batches of 8, each at the best of 15 rates; 3 seeds at once."""
    steps, rates = 500, torch.logspace(-3, 0.5, 15, dtype=F64)

    def last_loss(multipliers: list[float]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 200, 10, generator=generator, dtype=F64)
        y = (x @ torch.randn(3, 10, 1, generator=generator, dtype=F64)).squeeze(-1)
        w = torch.zeros(3, 10, 15, dtype=F64)
        for multiplier in multipliers:
            index = torch.randint(200, (8,), generator=generator)
            batch = x[:, index]
            residual = batch @ w - y[:, index, None]
            w -= multiplier * rates * (batch.transpose(1, 2) @ residual.sign()) / 8
        losses = (x @ w - y.unsqueeze(-1)).abs().mean(1)
        return losses.min(1).values.mean()

    linear = LinearDecay(sgd(1.0), steps)
    ours = last_loss([linear.multiplier(t) for t in range(steps)])
    assert ours < 0.1 * last_loss([1.0] * steps)


# --------------------------------------------------------------------------------------------------
# As torch's schedules


def test_linear_decay_is_torchs_where_it_has_one() -> None:
    ours, their = sgd(0.5, 2.0), sgd(0.5, 2.0)
    found = rates_of(ours, LinearDecay(ours, 6, final=0.25), 9)
    close(found, rates_of(their, theirs.LinearLR(their, 1.0, 0.25, 6), 9))


@each_schedule
def test_stepped_is_the_closed_form(make) -> None:
    optimizer = sgd(0.5, 2.0)
    schedule = make(optimizer)
    found = rates_of(optimizer, schedule, 12)
    closed = [[0.5 * schedule.multiplier(t), 2.0 * schedule.multiplier(t)] for t in range(12)]
    close(found, closed, rtol=1e-13, atol=0)
    for t in (3, 0, 11):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # step(epoch) is deprecated
            schedule.step(t)
        assert schedule.get_last_lr() == closed[t]


@each_schedule
def test_chained_and_in_sequence(make) -> None:
    optimizer, alone = sgd(0.5), sgd(0.5)
    other = theirs.StepLR(optimizer, 3, gamma=0.5)
    chained = theirs.ChainedScheduler([make(optimizer), other], optimizer)
    found = rates_of(optimizer, chained, 10)
    expected = [
        [rate * 0.5 ** (t // 3)] for t, (rate,) in enumerate(rates_of(alone, make(alone), 10))
    ]
    close(found, expected)

    optimizer, alone = sgd(0.5), sgd(0.5)
    first = theirs.ConstantLR(optimizer, 0.1, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of its step(0)
        sequence = theirs.SequentialLR(optimizer, [first, make(optimizer)], [2])
        found = rates_of(optimizer, sequence, 12)
    close(found, [[0.05]] * 2 + rates_of(alone, make(alone), 10))


@each_schedule
def test_resumed(make) -> None:
    """From a state_dict, and from last_epoch."""
    optimizer = sgd(0.5, 2.0)
    schedule = make(optimizer)
    rates_of(optimizer, schedule, 4)
    file = io.BytesIO()
    torch.save([schedule.state_dict(), optimizer.state_dict()], file)
    last = schedule.last_epoch
    expected = rates_of(optimizer, schedule, 5)

    file.seek(0)
    of_schedule, of_optimizer = torch.load(file, weights_only=True)
    optimizer = sgd(7.0, 7.0)
    schedule = RefinedSchedule(optimizer, [1.0, 1.0], 3) if "multipliers" in of_schedule else (
        LinearDecay(optimizer, 3))  # fmt: skip
    schedule.load_state_dict(of_schedule)
    optimizer.load_state_dict(copy.deepcopy(of_optimizer))
    assert rates_of(optimizer, schedule, 5) == expected

    optimizer = sgd(7.0, 7.0)
    optimizer.load_state_dict(of_optimizer)
    close(rates_of(optimizer, make(optimizer, last_epoch=last - 1), 5), expected)
    with pytest.raises(KeyError, match="initial_lr"):
        make(sgd(0.5), last_epoch=3)


@each_schedule
def test_a_group_that_comes_later(make) -> None:
    """Its rate is that of its present step, and changes with the others'."""
    optimizer = sgd(0.5)
    schedule = make(optimizer)
    rates_of(optimizer, schedule, 3)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.3})
    schedule.step()
    found = rates_of(optimizer, schedule, 3)
    for t, (first, later) in enumerate(found):
        assert later / 0.3 == pytest.approx(first / (0.5 * schedule.multiplier(3)), rel=1e-12), t


@each_schedule
def test_rates_that_are_tensors_are_changed_in_place(make) -> None:
    rate = torch.tensor(0.5, dtype=F64)
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=rate)
    schedule, alone = make(optimizer), sgd(0.5)
    given = optimizer.param_groups[0]["lr"]
    found = rates_of(optimizer, schedule, 9)
    assert optimizer.param_groups[0]["lr"] is given
    close(found, rates_of(alone, make(alone), 9))


def test_a_rate_that_was_0_comes_back() -> None:
    """Multipliers may underflow; a ratio leads nowhere from there."""
    optimizer = sgd(0.5)
    schedule = RefinedSchedule(optimizer, [1e170, 1.0, 1.0, 1.0], 3, smoothing=0)
    assert schedule.multipliers.tolist() == [0.0, 1.0, 0.5, 0.0]
    close(rates_of(optimizer, schedule, 5), [[0.0], [0.5], [0.25], [0.0], [0.0]])


# --------------------------------------------------------------------------------------------------
# The recorder


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def test_one_multi_tensor_norm_and_nothing_waits() -> None:
    weights = [torch.ones(3, requires_grad=True) for _ in range(20)]
    recorder = GradNormRecorder(torch.optim.SGD(weights, lr=0.1))
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    recorder(optimizer)
    with Operations() as seen:
        recorder(optimizer)
    assert seen.names.count("_foreach_norm") == 1 and len(seen.names) < 12
    assert not {"_local_scalar_dense", "is_nonzero", "equal"} & set(seen.names)
    assert recorder.norms.tolist() == pytest.approx([240**0.5] * 2)


def test_it_grows_by_doubling() -> None:
    optimizer = sgd(0.5)
    (weight,) = optimizer.param_groups[0]["params"]
    recorder, places = GradNormRecorder(optimizer), set()
    for step in range(2100):
        weight.grad = torch.tensor([float(step), 0.0])
        recorder(optimizer)
        places.add(recorder.norms.data_ptr())
    assert len(places) == 3  # 1024, 2048, 4096
    assert torch.equal(recorder.norms, torch.arange(2100.0))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_of_all_kinds(norm: str) -> None:
    half = 60000 * torch.ones(9, dtype=torch.float16)
    given = [torch.randn(3, 4), half, None, half[:2].bfloat16(), torch.zeros(0), half[:1].double()]
    flat = torch.cat([g.double().flatten() for g in given if g is not None])
    found = total_norm(given, norm)
    assert found.dtype == F64 and total_norm(given[:2], norm).dtype == torch.float32
    torch.testing.assert_close(found, flat.norm(int(norm[1])), rtol=1e-6, atol=0)
    assert total_norm([None], norm) == 0
    long = torch.rand(3_000_000).t()  # whose plain float32 sum is off by more
    torch.testing.assert_close(total_norm([long], norm).double(), long.double().norm(int(norm[1])),
                               rtol=1e-5, atol=0)  # fmt: skip
    with pytest.raises(RuntimeError, match="gradients must be dense, got one of layout"):
        total_norm([torch.eye(3).to_sparse()], norm)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_gradients_wait_for_threads_but_once(monkeypatch, keep_num_threads, norm, dtype):
    """The wait for another thread at the end of each of many calls was most of the time."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5_000_001,), (700, 1500), (70_000,), (5,)]
    given = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    given[1] = given[1].t()
    exact = torch.cat([g.double().flatten() for g in given]).norm(int(norm[1]))
    alone, together = [], []
    vector_norm, foreach_norm = torch.linalg.vector_norm, torch._foreach_norm

    def one(x: Tensor, *args, **options) -> Tensor:
        alone.append(x.numel())
        return vector_norm(x, *args, **options)

    def several(x: list[Tensor], *args, **options) -> list[Tensor]:
        together.extend(t.numel() for t in x)
        return foreach_norm(x, *args, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", one)
    monkeypatch.setattr(torch, "_foreach_norm", several)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(total_norm(given, norm))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=0)
    waits_from = 1 << 15  # numbers of a tensor, in torch
    assert max(together) < waits_from and sum(n >= waits_from for n in alone) == 2 * 3


def test_steps_with_a_closure() -> None:
    """Their gradients come within the step."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    recorder = GradNormRecorder(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure=closure)
    closure()
    optimizer.step(None)
    assert recorder.norms.tolist() == [5.0, 2.5, 1.25] and len(recorder) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_gradient_scaler(fused: bool) -> None:
    weight = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=fused)
    recorder = GradNormRecorder(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, float("inf"), 3.0):
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    # A fused optimizer gets the scale, and leaves the step out by itself.
    assert recorder.norms.tolist() == ([2.0, float("inf"), 6.0] if fused else [2.0, 6.0])


def test_the_record_goes_on_elsewhere() -> None:
    optimizer = sgd(0.5)
    (weight,) = optimizer.param_groups[0]["params"]
    recorder = GradNormRecorder(optimizer, "l1")
    weight.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    state = copy.deepcopy(recorder.state_dict())
    optimizer.step()
    recorder.remove()
    optimizer.step()
    assert recorder.norms.tolist() == [7.0, 7.0] and state["norms"].tolist() == [7.0]

    other = GradNormRecorder(optimizer, "l1")
    assert other.norms.shape == (0,)
    other.load_state_dict(other.state_dict())  # of no steps
    other.load_state_dict(state)
    weight.grad *= 2
    optimizer.step()
    assert other.norms.tolist() == [7.0, 14.0]
    assert refine_schedule(other.norms, norm="l1").tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="norm is 'l2' here and 'l1' in state_dict"):
        GradNormRecorder(optimizer).load_state_dict(state)
