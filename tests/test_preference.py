"""DPO, GRPO and their helpers at their edges; end to end on token_logprobs; docs page.

`specs/preference.py` has the formulas, derivatives, dtypes and errors.
"""

from __future__ import annotations

import math

import pytest
import torch
from specs.preference import everything, grpo_reference
from torch import Tensor

import pyloss
from pyloss.functional import dpo_loss, group_advantages, grpo_loss, sequence_logprobs

NAN = float("nan")
GRPO_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo")


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads) -> None:
    """The tensors are small: threads would only wait for each other."""
    torch.set_num_threads(1)


def double(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


# --------------------------------------------------------------------------------------------------
# sequence_logprobs


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.uint8])
def test_integer_masks(mask_dtype: torch.dtype) -> None:
    logps, mask = double(3, 5), torch.rand(3, 5) < 0.6
    assert torch.equal(
        sequence_logprobs(logps, mask.to(mask_dtype)), sequence_logprobs(logps, mask)
    )


def test_half_sums_are_kept_in_float32() -> None:
    """257 does not exist in bfloat16."""
    assert sequence_logprobs(torch.full((1, 257), -1.0).bfloat16()).item() == -257.0


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


# --------------------------------------------------------------------------------------------------
# dpo_loss


def test_dpo_at_the_reference() -> None:
    """Policy = reference: loss log 2, gradient -beta/2 and beta/2."""
    p = torch.tensor([[-3.0, -40.0], [-7.0, -2.0]], requires_grad=True)
    loss = dpo_loss(p[0], p[1], *p.detach(), beta=0.1, reduction="sum")
    assert loss.item() == pytest.approx(2 * math.log(2))
    (grad,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(grad, torch.tensor([[-0.05, -0.05], [0.05, 0.05]]))


def test_the_widest_dtype_decides() -> None:
    half = [torch.randn(5).bfloat16() for _ in range(4)]
    assert dpo_loss(*half[:3], half[3].double()).dtype == torch.float64


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


# --------------------------------------------------------------------------------------------------
# group_advantages


def test_group_advantages_degenerate() -> None:
    # 0.1 three times has a mean that is not 0.1 in float32, and a standard deviation to match.
    same = group_advantages(torch.full((6,), 0.1), 3, eps=0.0)
    assert same.tolist() == [0.0] * 6
    assert group_advantages(torch.tensor([3.0, 5.0]), 1).tolist() == [0.0, 0.0]
    mixed = group_advantages(torch.tensor([1.0, NAN, 2.0, 4.0]), 2)
    assert mixed[:2].isnan().all() and mixed[2:].isfinite().all()
    assert group_advantages(torch.tensor([True, False]), 2).dtype == torch.float32
    assert not group_advantages(torch.randn(4).requires_grad_(), 2).requires_grad


# --------------------------------------------------------------------------------------------------
# grpo_loss


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
    expected = grpo_reference(
        **x, clip_low=0.2, clip_high=0.28, kl_coef=0.3, entropy_coef=0.1, loss_type=loss_type,
        max_length=11, importance_sampling_level=level,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)
        assert (a[~x["mask"]] == 0).all()


def test_grpo_metrics_that_nobody_asked_for() -> None:
    lp, advantages = double(5, 7), double(5)
    _, bare = grpo_loss(lp, None, advantages, return_metrics=True)
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


def test_cispo() -> None:
    """Not a sample of the Spec: its gradient is not that of its value, the ratio is a constant."""
    x = everything("cispo", return_metrics=True).arguments
    results = []
    for function in (grpo_loss, grpo_reference):
        logprobs = x["logprobs"].clone().requires_grad_()
        loss, metrics = function(**x | dict(logprobs=logprobs))
        results.append((loss, *metrics, *torch.autograd.grad(loss, logprobs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert results[0][3] > 0 and results[0][2] == 0  # some are clipped from above, none from below


def test_ratios_that_overflow() -> None:
    """-min(rho A, ...) has no upper bound where A < 0, unless max_ratio sets it."""
    logprobs = torch.tensor([[200.0, 0.0]], requires_grad=True)
    old, advantages = torch.zeros(1, 2), torch.tensor([-1.0])
    loss = grpo_loss(logprobs, old, advantages, max_ratio=4.0)
    loss.backward()
    assert loss == 2.5 and logprobs.grad.tolist() == [[0.0, 0.5]]
    logprobs.grad = None
    loss = grpo_loss(logprobs, old, advantages, loss_type="sapo")
    loss.backward()
    want = (4 + 2) / 1.05 / 2  # sigmoid is 1 and 1/2
    assert math.isclose(loss.item(), want, rel_tol=1e-6) and logprobs.grad.tolist() == [[0.0, 0.5]]
    logprobs.grad = None
    zeros = dict(
        ref_logprobs=torch.zeros(1, 2), kl_coef=1.0, kl_clip=2.0, advantages=torch.zeros(1)
    )
    loss = grpo_loss(-logprobs, -logprobs.detach(), **zeros)
    loss.backward()
    assert math.isclose(loss.item(), (math.exp(2) - 3) / 2, rel_tol=1e-6)
    assert logprobs.grad.tolist() == [[0.0, 0.0]]


def test_discopop_of_a_pair_that_is_far_off() -> None:
    """0 * inf in the blend as written: here the logistic part is all there is."""
    chosen = torch.tensor([-2000.0], requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(1), None, None, beta=1.0, loss_type="discopop")
    loss.backward()
    assert loss == 2000 and chosen.grad == -1


# --------------------------------------------------------------------------------------------------
# Quantiles, divergences, weights of sequences


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_quantiles_by_hand(loss_type: str) -> None:
    """(chosen, rejected) of three pairs; beta 1."""
    policy = torch.tensor([[-1.0, -5.0, -3.0], [-2.0, -2.0, -6.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -2.0, -2.0], [-3.0, -1.0, -4.0]])
    rows = dpo_loss(*policy, *reference, beta=1.0, loss_type=loss_type, reduction="none")
    if loss_type == "aot":
        # differences of the policy 1, -3, 3 and of the reference 1, -1, 2: both in order
        deltas = [-3.0 + 1.0, 1.0 - 1.0, 3.0 - 2.0]
    else:
        # ratios of the chosen 1, -3, -1 and of the rejected 1, -1, -2: both in order
        deltas = [-3.0 + 2.0, -1.0 + 1.0, 1.0 - 1.0]
    assert rows.tolist() == pytest.approx([math.log1p(math.exp(-d)) for d in deltas])
    (grad,) = torch.autograd.grad(rows.sum(), policy)
    sigma = [1 / (1 + math.exp(d)) for d in deltas]  # each entry gets the slope of its quantile
    if loss_type == "aot":
        order = [1, 0, 2]
        assert grad[0].tolist() == pytest.approx([-sigma[order[i]] for i in range(3)])
        assert grad[1].tolist() == pytest.approx([sigma[order[i]] for i in range(3)])
    else:
        assert grad[0].tolist() == pytest.approx([-sigma[2], -sigma[0], -sigma[1]])
        assert grad[1].tolist() == pytest.approx([sigma[2], sigma[1], sigma[0]])


def test_quantiles_do_not_see_pairs() -> None:
    """The order of the rejected answers does not matter, in `aot` that of the pairs neither."""
    a, b, c, d = double(4, 6)
    turned = torch.tensor([3, 1, 5, 0, 2, 4])

    def loss(loss_type: str, *x: Tensor) -> Tensor:
        return dpo_loss(*x, loss_type=loss_type, label_smoothing=0.1)

    expected = loss("aot_unpaired", a, b, c, d)
    torch.testing.assert_close(loss("aot_unpaired", a, b[turned], c, d[turned]), expected)
    expected = loss("aot", a, b, c, d)
    torch.testing.assert_close(loss("aot", a[turned], b[turned], c, d), expected)
    # A policy that dominates its reference in every quantile has less loss than log 2.
    assert loss("aot", a + 0.1, b, a, b) < math.log(2) < loss("aot", a - 0.1, b, a, b)
    # One pair is its own quantile: the sigmoid loss.
    one = [x[:1] for x in (a, b, c, d)]
    for name in ("aot", "aot_unpaired"):
        torch.testing.assert_close(loss(name, *one), dpo_loss(*one, label_smoothing=0.1))


def test_divergences_at_their_limits() -> None:
    x = double(4, 5)

    def loss(**options: object) -> Tensor:
        return dpo_loss(*x, beta=0.7, reduction="none", **options)

    def alpha(value: float) -> Tensor:
        return loss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=value)

    torch.testing.assert_close(alpha(1.0), loss())
    torch.testing.assert_close(alpha(1 + 1e-9), loss(), rtol=1e-7, atol=0)
    torch.testing.assert_close(alpha(0.0), loss(f_divergence_type="forward_kl"))
    # Near the reference all of them are the reverse KL: f''(1) = 1, and half of it for JS.
    near = [x[0], x[1], x[0] - 1e-4 * x[2], x[1] - 1e-4 * x[3]]
    plain = dpo_loss(*near, beta=1.0, reduction="none") - math.log(2)
    for name, share in (("forward_kl", 1.0), ("alpha_divergence", 1.0), ("js_divergence", 0.5)):
        found = dpo_loss(*near, beta=1.0, reduction="none", f_divergence_type=name) - math.log(2)
        torch.testing.assert_close(found, share * plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_divergences_of_far_policies(loss_type: str, name: str, dtype: torch.dtype) -> None:
    """Log-ratios of sequences are hundreds; an exponential of them is infinite."""
    far = torch.tensor([-5000.0, -90.0, 90.0, 5000.0], dtype=dtype)
    chosen, rejected = (
        t.reshape(-1).requires_grad_() for t in torch.meshgrid(far, far, indexing="ij")
    )
    zero = torch.zeros_like(chosen)
    rows = dpo_loss(
        chosen, rejected, zero, zero, loss_type=loss_type, reduction="none", f_divergence_type=name
    )
    assert rows.isfinite().all() and (rows >= 0).all()
    for g in torch.autograd.grad(rows.sum(), (chosen, rejected)):
        assert g.isfinite().all()
    equal = rows.view(4, 4).diagonal()
    assert equal.tolist() == pytest.approx([math.log(2) if loss_type == "sigmoid" else 1.0] * 4)


def test_vespo() -> None:
    """The weight is a constant of the derivative, 1 for a policy that has not moved."""
    logps = double(3, 4).requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()

    def run(old: Tensor | None) -> tuple[Tensor, Tensor]:
        loss = grpo_loss(logps, old, advantages, mask=mask, loss_type="vespo", num_items=1)
        return loss, torch.autograd.grad(loss, logps)[0]

    plain = -advantages[:, None] * mask
    for old in (None, logps.detach()):
        loss, grad = run(old)
        torch.testing.assert_close(grad, plain)
        torch.testing.assert_close(loss, (plain * logps).sum())
    old = logps.detach() - 0.1
    w = torch.exp(0.1 * mask.sum(1).double())
    k, decay = torch.tensor([2.0, 3.0, 2.0]).double(), torch.tensor([3.0, 2.0, 3.0]).double()
    torch.testing.assert_close(run(old)[1], plain * (w**k * (decay * (1 - w)).exp())[:, None])
    # Its largest value is at w = k / decay, and 0 at both ends: no overflow, no NaN.
    for shift in (-1e4, -50.0, 50.0, 1e4):
        loss, grad = run(logps.detach() + shift)
        assert loss.isfinite() and grad.abs().max() < 1e-30


def test_vespo_over_micro_batches() -> None:
    """`num_items` is the number of tokens of all of them."""
    x = everything("vespo").arguments
    whole = grpo_loss(**x)
    count = int(x["mask"].sum())
    parts = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        y = {k: v[part] if isinstance(v, Tensor) else v for k, v in x.items()}
        parts = parts + grpo_loss(**y, num_items=count)
    torch.testing.assert_close(parts, whole)
