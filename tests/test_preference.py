"""DPO, GRPO and their helpers against direct formulas; end to end on token_logprobs; docs page."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyloss
from pyloss.functional import dpo_loss, group_advantages, grpo_loss, sequence_logprobs

NAN = float("nan")
DPO_TYPES = ("sigmoid", "ipo", "hinge")
GRPO_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo")


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads) -> None:
    """The tensors are small: threads would only wait for each other."""
    torch.set_num_threads(1)


def double(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


# --------------------------------------------------------------------------------------------------
# sequence_logprobs


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_sequence_logprobs(average: bool, mask_dtype: torch.dtype) -> None:
    logps = double(2, 3, 5).requires_grad_()
    mask = torch.rand(2, 3, 5) < 0.6
    mask[0, 1] = False
    found = sequence_logprobs(logps, mask.to(mask_dtype), average)
    for i in range(2):
        for j in range(3):
            kept = [logps[i, j, t].item() for t in range(5) if mask[i, j, t]]
            expected = sum(kept) / (max(len(kept), 1) if average else 1)
            assert found[i, j].item() == pytest.approx(expected, abs=1e-14)
    assert torch.autograd.gradcheck(lambda x: sequence_logprobs(x, mask, average), logps)
    full = sequence_logprobs(logps, average=average)
    torch.testing.assert_close(full, logps.mean(-1) if average else logps.sum(-1))


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_sequence_logprobs_never_sees_masked_values(value: float) -> None:
    logps = torch.tensor([[-1.0, value, -2.0], [value, value, value]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    for average in (False, True):
        found = sequence_logprobs(logps, mask, average)
        assert found.tolist() == [-1.5 if average else -3.0, 0.0]
        (grad,) = torch.autograd.grad(found.square().sum(), logps)
        assert grad[~mask].tolist() == [0.0] * 4
        assert grad[mask].isfinite().all() and (grad[mask] != 0).all()


def test_sequence_logprobs_dtypes_and_errors() -> None:
    assert sequence_logprobs(torch.randn(2, 3).bfloat16()).dtype == torch.float32
    # 257 does not exist in bfloat16: the sum must not be kept there.
    assert sequence_logprobs(torch.full((1, 257), -1.0).bfloat16()).item() == -257.0
    assert sequence_logprobs(torch.zeros(3, 0), average=True).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(TypeError, match="token_logps must be floating, got torch.int64"):
        sequence_logprobs(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="token_logps must be a Tensor, got list"):
        sequence_logprobs([1.0])
    with pytest.raises(TypeError, match="mask must be bool or integer.*float32"):
        sequence_logprobs(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask must have the shape.*\[2, 3\], got \[3\]"):
        sequence_logprobs(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="0-d"):
        sequence_logprobs(torch.tensor(1.0))


# --------------------------------------------------------------------------------------------------
# dpo_loss


def dpo_formula(loss_type: str, h: float, beta: float, smoothing: float) -> float:
    def f(h: float) -> float:
        if loss_type == "sigmoid":
            return math.log1p(math.exp(-beta * h))
        return (h - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else max(0.0, 1 - beta * h)

    return (1 - smoothing) * f(h) + smoothing * f(-h)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo_formula_and_gradient(loss_type: str, smoothing: float) -> None:
    pc, pr, rc, rr = double(4, 6, scale=5.0)
    kwargs = dict(beta=0.3, label_smoothing=smoothing, loss_type=loss_type)
    rows = dpo_loss(pc, pr, rc, rr, **kwargs, reduction="none")
    expected = [
        dpo_formula(loss_type, ((a - c) - (b - d)).item(), 0.3, smoothing)
        for a, b, c, d in zip(pc, pr, rc, rr)
    ]
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, **kwargs), rows.mean())
    torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, **kwargs, reduction="sum"), rows.sum())
    inputs = pc.requires_grad_(), pr.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, rc, rr, **kwargs), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: dpo_loss(a, b, rc, rr, **kwargs), inputs)


def test_dpo_at_the_reference() -> None:
    """Policy = reference: loss log 2, gradient -beta/2 and beta/2."""
    p = torch.tensor([[-3.0, -40.0], [-7.0, -2.0]], requires_grad=True)
    loss = dpo_loss(p[0], p[1], *p.detach(), beta=0.1, reduction="sum")
    assert loss.item() == pytest.approx(2 * math.log(2))
    (grad,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(grad, torch.tensor([[-0.05, -0.05], [0.05, 0.05]]))


def test_dpo_extreme_margins() -> None:
    h = torch.tensor([1e5, -1e5, math.inf, 30.0], requires_grad=True)
    zero = torch.zeros(4)
    rows = dpo_loss(h, zero, zero, zero, beta=1.0, reduction="none")
    assert rows.tolist() == pytest.approx([0.0, 1e5, 0.0, math.exp(-30)], rel=1e-6)
    (grad,) = torch.autograd.grad(rows.sum(), h)
    assert grad.tolist() == pytest.approx([0.0, -1.0, 0.0, -math.exp(-30)], rel=1e-6)
    # The policy excludes the preferred answer.
    assert dpo_loss(-h, zero, zero, zero, reduction="none")[2].item() == math.inf


def test_dpo_keeps_small_ratios_beside_long_sequences() -> None:
    """A ratio of 2^-7 of the short answer, next to a long answer whose spacing is 2^-3."""
    chosen, rejected = torch.tensor([-(2.0**20)]), torch.tensor([-1.0])
    _, metrics = dpo_loss(
        chosen, rejected, chosen, rejected - 2.0**-7, beta=1.0, return_metrics=True
    )
    assert metrics.margins.item() == -(2.0**-7)


def test_dpo_metrics_reference_and_dtypes() -> None:
    pc, pr, rc, rr = torch.randn(4, 5).requires_grad_()
    loss, m = dpo_loss(pc, pr, rc, rr, beta=0.5, return_metrics=True)
    torch.testing.assert_close(m.chosen_rewards, 0.5 * (pc - rc).detach())
    torch.testing.assert_close(m.rejected_rewards, 0.5 * (pr - rr).detach())
    torch.testing.assert_close(m.margins, m.chosen_rewards - m.rejected_rewards)
    assert m.accuracies.tolist() == [float(x > 0) for x in m.margins]
    assert not any(t.requires_grad for t in m)
    grads = torch.autograd.grad(loss, (pc, pr, rc, rr), allow_unused=True)
    assert grads[0] is not None and grads[2] is None and grads[3] is None
    free = dpo_loss(pc, pr, None, None)
    torch.testing.assert_close(free, dpo_loss(pc, pr, torch.zeros(5), torch.zeros(5)))

    half = [t.detach().bfloat16() for t in (pc, pr, rc, rr)]
    found = dpo_loss(*half)
    assert found.dtype == torch.float32
    assert found.item() == dpo_loss(*(t.float() for t in half)).item()
    assert dpo_loss(*half[:3], half[3].double()).dtype == torch.float64
    assert dpo_loss(*[torch.zeros(0)] * 4).isnan()
    assert dpo_loss(*[torch.zeros(0)] * 4, reduction="sum").item() == 0.0


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(policy_rejected_logps=torch.zeros(2)), ValueError, r"policy_rejected.*\[3\].*\[2\]"),
        (dict(reference_chosen_logps=None), ValueError, "both or neither"),
        (dict(reference_chosen_logps=0.0), TypeError, "reference_chosen_logps must be a Tensor"),
        (dict(policy_chosen_logps=torch.zeros(3, dtype=torch.int64)), TypeError, "floating"),
        (dict(beta=0.0), ValueError, "beta must be finite and > 0"),
        (dict(beta="1"), TypeError, "beta must be a number"),
        (dict(label_smoothing=0.6), ValueError, r"label_smoothing must be in \[0, 0.5\], got 0.6"),
        (dict(label_smoothing=NAN), ValueError, "label_smoothing"),
        (dict(loss_type="kto"), ValueError, "loss_type must be one of sigmoid.*'kto'"),
        (dict(reduction="avg"), ValueError, "avg is not a valid value for reduction"),
    ],
)
def test_dpo_errors(change: dict, error: type, message: str) -> None:
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    kwargs = {f"{n}_logps": torch.zeros(3) for n in names} | change
    with pytest.raises(error, match=message):
        dpo_loss(**kwargs)


# --------------------------------------------------------------------------------------------------
# group_advantages


def test_group_advantages() -> None:
    rewards = double(12)
    for normalise in (True, False):
        found = group_advantages(rewards, 4, normalise, eps=1e-3)
        for g in range(3):
            r = rewards[4 * g : 4 * g + 4]
            expected = r - r.mean()
            if normalise:
                expected = expected / (r.std() + 1e-3)
            torch.testing.assert_close(found[4 * g : 4 * g + 4], expected)


def test_group_advantages_degenerate() -> None:
    # 0.1 three times has a mean that is not 0.1 in float32, and a standard deviation to match.
    same = group_advantages(torch.full((6,), 0.1), 3, eps=0.0)
    assert same.tolist() == [0.0] * 6
    assert group_advantages(torch.tensor([3.0, 5.0]), 1).tolist() == [0.0, 0.0]
    mixed = group_advantages(torch.tensor([1.0, NAN, 2.0, 4.0]), 2)
    assert mixed[:2].isnan().all() and mixed[2:].isfinite().all()
    assert group_advantages(torch.tensor([True, False]), 2).dtype == torch.float32
    assert not group_advantages(torch.randn(4).requires_grad_(), 2).requires_grad
    with pytest.raises(ValueError, match="divide the number of rewards, 4, got 3"):
        group_advantages(torch.zeros(4), 3)
    with pytest.raises(ValueError, match=r"rewards must have shape \(B,\), got \[2, 2\]"):
        group_advantages(torch.zeros(2, 2), 2)
    with pytest.raises(TypeError, match="group_size must be an int"):
        group_advantages(torch.zeros(4), 2.0)
    with pytest.raises(ValueError, match="eps"):
        group_advantages(torch.zeros(4), 2, eps=-1.0)


# --------------------------------------------------------------------------------------------------
# grpo_loss


def grpo_formula(lp, old, adv, mask, low, high, ref, kl, ent, ent_coef, loss_type, level, length):
    """Token by token, with the minimum of the papers; differentiable in lp and ent."""
    rows, steps = lp.shape
    tokens = []
    for b in range(rows):
        kept = [t for t in range(steps) if mask[b, t]]
        row = []
        for t in kept:
            if level == "token":
                ratio = (lp[b, t] - old[b, t]).exp()
            else:
                ratio = (sum(lp[b, s] - old[b, s] for s in kept) / len(kept)).exp()
            a = adv[b] if adv.dim() == 1 else adv[b, t]
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
            loss = loss + kl * ((ref[b, t] - lp[b, t]).exp() - (ref[b, t] - lp[b, t]) - 1)
            row.append(loss - ent_coef * ent[b, t])
        tokens.append(row)
    sums = [sum(row, torch.zeros((), dtype=lp.dtype)) for row in tokens]
    if loss_type == "grpo":
        return sum(s / max(len(row), 1) for s, row in zip(sums, tokens)) / rows
    return sum(sums) / (rows * length if loss_type == "dr_grpo" else mask.sum())


def grpo_inputs(rows: int = 5, steps: int = 7) -> dict[str, Tensor]:
    mask = torch.rand(rows, steps) < 0.6
    mask[1], mask[2] = False, True
    lp = double(rows, steps)
    return dict(
        logprobs=lp,
        old_logprobs=lp + double(rows, steps, scale=0.5),
        ref_logprobs=lp + double(rows, steps, scale=0.5),
        entropy=double(rows, steps).abs(),
        advantages=double(rows),
        mask=mask,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_grpo_formula_and_gradient(loss_type: str, per_token: bool, level: str) -> None:
    x = grpo_inputs()
    if per_token:
        x["advantages"] = double(5, 7)
    leaves = x["logprobs"].requires_grad_(), x["entropy"].requires_grad_()
    found = grpo_loss(
        **x, clip_low=0.2, clip_high=0.28, kl_coef=0.3, entropy_coef=0.1, loss_type=loss_type,
        max_length=11, importance_sampling_level=level,
    )  # fmt: skip
    expected = grpo_formula(
        x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"], 0.2, 0.28,
        x["ref_logprobs"], 0.3, x["entropy"], 0.1, loss_type, level, 11,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)
        assert (a[~x["mask"]] == 0).all()


def test_grpo_metrics() -> None:
    x = grpo_inputs()
    ratio = (x["logprobs"] - x["old_logprobs"]).exp()
    adv, mask = x["advantages"][:, None].expand(5, 7), x["mask"]
    _, m = grpo_loss(**x, clip_high=0.3, return_metrics=True)
    d = x["ref_logprobs"] - x["logprobs"]
    clipped = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.3) * adv)
    torch.testing.assert_close(m.policy_loss, -clipped[mask].mean())
    torch.testing.assert_close(m.kl, (d.exp() - d - 1)[mask].mean())
    torch.testing.assert_close(m.entropy, x["entropy"][mask].mean())
    low = ((ratio < 0.8) & (adv < 0))[mask].double().mean()
    high = ((ratio > 1.3) & (adv > 0))[mask].double().mean()
    assert low > 0 and high > 0
    torch.testing.assert_close(m.clip_low_fraction, low)
    torch.testing.assert_close(m.clip_high_fraction, high)
    _, bare = grpo_loss(x["logprobs"], None, x["advantages"], return_metrics=True)
    assert bare.kl is None and bare.entropy is None and bare.clip_low_fraction == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", GRPO_TYPES)
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_grpo_never_sees_masked_values(value: float, loss_type: str, level: str) -> None:
    x = grpo_inputs()
    x["advantages"] = double(5, 7)
    kwargs = dict(
        kl_coef=0.3, entropy_coef=0.1, loss_type=loss_type, max_length=7, return_metrics=True,
        importance_sampling_level=level,
    )  # fmt: skip

    def run(fill: float):
        y = {k: torch.where(x["mask"], t, fill) for k, t in x.items() if k != "mask"}
        leaves = y["logprobs"].requires_grad_(), y["entropy"].requires_grad_()
        loss, metrics = grpo_loss(**y, mask=x["mask"], **kwargs)
        rows = grpo_loss(**y, mask=x["mask"], **kwargs, reduction="none")[0]
        return loss, *metrics, rows, *torch.autograd.grad(loss, leaves)

    for got, want in zip(run(value), run(0.0)):
        assert torch.equal(got, want)
    assert (run(value)[-1][~x["mask"]] == 0).all()


@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_grpo_without_tokens(loss_type: str) -> None:
    lp = torch.full((3, 4), NAN, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for num_items in (None, torch.tensor(0)):
        loss, metrics = grpo_loss(
            lp, None, torch.full((3,), NAN), mask=mask, loss_type=loss_type, max_length=4,
            num_items=num_items, return_metrics=True,
        )  # fmt: skip
        assert loss.item() == 0.0 and metrics.policy_loss == 0.0
        (grad,) = torch.autograd.grad(loss, lp)
        assert grad.abs().sum() == 0.0
    empty = grpo_loss(torch.zeros(0, 4), None, torch.zeros(0), loss_type=loss_type, max_length=4)
    assert empty.item() == 0.0


def test_grpo_extreme_ratios() -> None:
    """Where the minimum takes the clipped ratio, the other one may overflow without harm."""
    lp = torch.tensor([[200.0, -200.0, -math.inf, 0.1]], requires_grad=True)
    advantages = torch.tensor([[2.0, -2.0, 2.0, 0.0]])
    rows = grpo_loss(lp, torch.zeros(1, 4), advantages, reduction="none")
    assert rows[0].tolist() == pytest.approx([-2.4, 1.6, 0.0, 0.0])
    (grad,) = torch.autograd.grad(rows.sum(), lp)
    assert grad.tolist() == [[0.0] * 4]
    # On the side that is not clipped the loss is what the formula says.
    bad = grpo_loss(lp[:, :1], torch.zeros(1, 1), torch.tensor([-1.0]))
    assert bad.item() == math.inf
    # A wide range: nothing clipped below.
    wide = grpo_loss(lp[:, 1:2], torch.zeros(1, 1), torch.tensor([-1.0]), clip_low=1.5)
    assert wide.item() == pytest.approx(0.0, abs=1e-30)


def test_grpo_constants_get_no_gradient() -> None:
    x = {k: t if k == "mask" else t.requires_grad_() for k, t in grpo_inputs().items()}
    loss = grpo_loss(**x, kl_coef=0.1, entropy_coef=0.1)
    names = [k for k in x if k != "mask"]
    grads = torch.autograd.grad(loss, [x[k] for k in names], allow_unused=True)
    assert {n for n, g in zip(names, grads) if g is not None} == {"logprobs", "entropy"}


def test_grpo_on_policy_is_the_policy_gradient() -> None:
    lp, adv = double(3, 4).requires_grad_(), double(3)
    loss = grpo_loss(lp, None, adv, loss_type="dapo")
    assert loss.item() == pytest.approx(-adv.mean().item())
    (grad,) = torch.autograd.grad(loss, lp)
    torch.testing.assert_close(grad, (-adv[:, None] / 12).expand(3, 4))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("loss_type", GRPO_TYPES)
def test_grpo_num_items_adds_up_micro_batches(loss_type: str, as_tensor: bool) -> None:
    x = grpo_inputs(6, 5)
    kwargs = dict(kl_coef=0.1, loss_type=loss_type, max_length=5)
    whole = grpo_loss(**x, **kwargs)
    items = 6 if "grpo" in loss_type else int(x["mask"].sum())
    items = torch.tensor(items) if as_tensor else items
    parts = [
        grpo_loss(**{k: t[s] for k, t in x.items()}, **kwargs, num_items=items)
        for s in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_grpo_dtypes() -> None:
    x = {k: t if k == "mask" else t.bfloat16() for k, t in grpo_inputs().items()}
    found = grpo_loss(**x, kl_coef=0.1)
    assert found.dtype == torch.float32
    wide = {k: t if k == "mask" else t.float() for k, t in x.items()}
    assert found.item() == grpo_loss(**wide, kl_coef=0.1).item()
    assert grpo_loss(**x, reduction="none").shape == (5, 7)


BT = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(logprobs=torch.zeros(3)), ValueError, r"logprobs must.*\(B, T\), got \[3\]"),
        (dict(logprobs=[1.0]), TypeError, "logprobs must be a Tensor, got list"),
        (dict(old_logprobs=torch.zeros(2, 4)), ValueError, r"old_logprobs.*\[2, 3\], got \[2, 4\]"),
        (dict(ref_logprobs=torch.zeros(3)), ValueError, "ref_logprobs must have the shape"),
        (dict(entropy=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "entropy must be floating"),
        (dict(advantages=torch.zeros(3)), ValueError, r"advantages.*\(2,\).*\(2, 3\).*got \[3\]"),
        (dict(advantages=torch.zeros(1, 3)), ValueError, "advantages must have shape"),
        (dict(mask=torch.ones(2, 3)), TypeError, "mask must be bool or integer"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), ValueError, "mask must have the shape"),
        (dict(kl_coef=0.1), ValueError, "kl_coef needs ref_logprobs"),
        (dict(entropy_coef=0.1), ValueError, "entropy_coef needs entropy"),
        (dict(kl_coef=-0.1, ref_logprobs=BT), ValueError, "kl_coef must be finite and >= 0"),
        (dict(clip_low=-0.1), ValueError, "clip_low"),
        (dict(clip_high=NAN), ValueError, "clip_high"),
        (dict(loss_type="ppo"), ValueError, "loss_type must be one of grpo, dapo.*'ppo'"),
        (dict(loss_type="dr_grpo"), ValueError, "needs max_length"),
        (dict(loss_type="dr_grpo", max_length=0), ValueError, "max_length must be positive"),
        (dict(loss_type="dr_grpo", max_length=2.0), TypeError, "max_length must be an int"),
        (dict(importance_sampling_level="row"), ValueError, "importance_sampling_level must be"),
        (dict(reduction="sum"), ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
        (dict(num_items=0), ValueError, "num_items"),
        (dict(num_items=torch.ones(2)), ValueError, "num_items must be one number"),
    ],
)  # fmt: skip
def test_grpo_errors(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        grpo_loss(**(dict(logprobs=BT, old_logprobs=None, advantages=torch.zeros(2)) | change))


def test_both_compile_without_graph_breaks() -> None:
    x = grpo_inputs()
    lp = x.pop("logprobs").requires_grad_()

    def both(lp: Tensor) -> Tensor:
        loss = grpo_loss(lp, **x, kl_coef=0.1, entropy_coef=0.01)
        total = sequence_logprobs(lp, x["mask"])
        return loss + dpo_loss(total[:2], total[2:4], total[:2] - 1, total[2:4] + 1)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(lp), both(lp))
    for a, b in zip(torch.autograd.grad(compiled(lp), lp), torch.autograd.grad(both(lp), lp)):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# End to end


class Tiny(torch.nn.Module):
    """A model whose hidden state depends on the last two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 12)
        self.mix = torch.nn.Linear(24, 12)
        self.head = torch.nn.Linear(12, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        e = self.embedding(tokens)
        before = torch.nn.functional.pad(e, (0, 0, 1, 0))[:, :-1]
        return torch.tanh(self.mix(torch.cat([e, before], -1)))

    def logprobs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return pyloss.token_logprobs(
            self(tokens), self.head.weight, tokens, return_entropy=True, shift=1
        )


def test_dpo_raises_the_margin() -> None:
    model = Tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.randint(20, (12, 9))  # 6 chosen, 6 rejected
    answer = (torch.arange(8) >= 3).expand(12, 8)

    def logps() -> tuple[Tensor, ...]:
        return sequence_logprobs(model.logprobs(tokens)[0], answer).chunk(2)

    with torch.no_grad():
        reference = logps()
    margins = []
    for _ in range(20):
        loss, metrics = dpo_loss(*logps(), *reference, return_metrics=True)
        margins.append(metrics.margins.mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(margins[0]) < 1e-6 and margins[-1] > 0.5
    assert metrics.accuracies.mean() == 1.0


def test_grpo_raises_the_reward() -> None:
    """The reward of an answer is its share of tokens below 5; a quarter of the vocabulary."""
    model = Tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    prompts = torch.randint(20, (4, 2)).repeat_interleave(16, 0)
    mask = (torch.arange(7) >= 1).expand(64, 7)
    rewards, entropies = [], []
    for _ in range(15):
        with torch.no_grad():
            tokens = prompts
            for _ in range(6):
                p = (model(tokens)[:, -1] @ model.head.weight.t()).softmax(-1)
                tokens = torch.cat([tokens, torch.multinomial(p, 1)], 1)
            reward = (tokens[:, 2:] < 5).float().mean(1)
            old = model.logprobs(tokens)[0]
        advantages = group_advantages(reward, 16)
        for _ in range(2):
            logprobs, entropy = model.logprobs(tokens)
            loss, metrics = grpo_loss(
                logprobs, old, advantages, mask=mask, entropy=entropy, entropy_coef=1e-3,
                loss_type="dapo", clip_high=0.28, return_metrics=True,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
        entropies.append(metrics.entropy.item())
    assert rewards[0] < 0.4 and rewards[-1] > rewards[0] + 0.3
    assert entropies[-1] < entropies[0]


def test_entropy_bonus_raises_the_entropy() -> None:
    model, tokens = Tiny(), torch.randint(20, (4, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = []
    for _ in range(2):
        logprobs, entropy = model.logprobs(tokens)
        found.append(entropy.mean().item())
        loss = grpo_loss(logprobs, None, torch.zeros(4), entropy=entropy, entropy_coef=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[1] > found[0]
