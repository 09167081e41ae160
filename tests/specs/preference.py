"""DPO, GRPO and their helpers, against the formulas of the papers, number by number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import dpo_loss, group_advantages, grpo_loss, sequence_logprobs
from pyloss.functional.preference import DPOMetrics, GRPOMetrics
from pyloss.testing import make_logits
from specs._spec import F64, Bad, Empty, Sample, Spec

NAN = math.nan
DPO_NAMES = tuple(
    f"{who}_{which}_logps" for who in ("policy", "reference") for which in ("chosen", "rejected")
)


def mask(rows: int, steps: int) -> Tensor:
    """Some tokens of each row, none of the second one, all of the third one."""
    kept = make_logits((rows, steps), seed=5) < 0.6
    kept[1:2], kept[2:3] = False, True
    return kept


# --------------------------------------------------------------------------------------------------
# References


def sequence_reference(token_logps, mask=None, average=False):
    kept = torch.ones_like(token_logps) if mask is None else mask.double()
    total = (token_logps * kept).sum(-1)
    return total / kept.sum(-1).clamp(min=1) if average else total


def dpo_reference(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    *, beta=0.1, label_smoothing=0.0, loss_type="sigmoid", reduction="mean", return_metrics=False,
    f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
):  # fmt: skip
    def f(h):
        if loss_type in ("sigmoid", "robust", "aot", "aot_unpaired"):
            return (1 + (-beta * h).exp()).log()
        return (h - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else (1 - beta * h).clamp(min=0)

    def sigma(x):
        return 1 / (1 + (-x).exp())

    def slope(u):
        """f' of the divergence, of the ratio of two probabilities; paper of f-DPO, table 1."""
        alpha = 1 - f_alpha_divergence_coef  # the paper's
        return {
            "reverse_kl": lambda: u.log() + 1,
            "forward_kl": lambda: -1 / u,
            "js_divergence": lambda: (2 * u / (1 + u)).log(),
            "alpha_divergence": lambda: (1 - u**-alpha) / alpha,
        }[f_divergence_type]()

    def quantiles(x):
        return torch.stack(sorted(x.unbind(), key=lambda t: t.item()))

    def unsmoothed(c, r):
        """As in the papers: probabilities, not their logarithms."""
        a, b = beta * c, beta * r
        p, e = sigma(a - b), label_smoothing
        return {
            "exo_pair": lambda: p * (p / (1 - e)).log() + (1 - p) * ((1 - p) / e).log(),
            "nca_pair": lambda: -sigma(a).log() - (sigma(-a).log() + sigma(-b).log()) / 2,
            "bco_pair": lambda: -(sigma(a) * sigma(-b)).log(),
            "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
            "apo_zero": lambda: 1 - sigma(a) + sigma(b),
            "apo_down": lambda: sigma(a) + 1 - p,
            "discopop": lambda: (
                -p.log() * (1 - sigma((a - b) / 0.05)) + (b - a).exp() * sigma((a - b) / 0.05)
            ),
        }[loss_type]()

    chosen, rejected = policy_chosen_logps, policy_rejected_logps
    if reference_chosen_logps is not None:
        chosen, rejected = chosen - reference_chosen_logps, rejected - reference_rejected_logps
    h = slope(chosen.exp()) - slope(rejected.exp())
    if loss_type == "aot":
        h = quantiles(policy_chosen_logps - policy_rejected_logps)
        h = h - quantiles(reference_chosen_logps - reference_rejected_logps)
    elif loss_type == "aot_unpaired":
        h = quantiles(chosen) - quantiles(rejected)
    if loss_type == "robust":
        e = label_smoothing
        loss = ((1 - e) * f(h) - e * f(-h)) / (1 - 2 * e)
    elif loss_type in ("sigmoid", "ipo", "hinge", "aot", "aot_unpaired"):
        loss = (1 - label_smoothing) * f(h) + label_smoothing * f(-h)
    elif f_divergence_type != "reverse_kl":
        loss = unsmoothed(slope(chosen.exp()), slope(rejected.exp()))
    else:
        loss = unsmoothed(chosen, rejected)
    loss = loss if reduction == "none" else getattr(loss, reduction)()
    if not return_metrics:
        return loss
    a, b = (beta * t.detach() for t in (chosen, rejected))
    return loss, DPOMetrics(a, b, a - b, (a > b).double())


def advantages_reference(rewards, group_size, normalise=True, eps=1e-4):
    groups = []
    for r in rewards.double().split(group_size):
        a = r - r.mean()
        groups.append(a / (r.std() + eps) if normalise else a)
    return torch.cat(groups)


def grpo_reference(
    logprobs, old_logprobs, advantages, *, mask=None, clip_low=0.2, clip_high=None,
    ref_logprobs=None, kl_coef=0.0, entropy=None, entropy_coef=0.0, loss_type="grpo",
    max_length=None, num_items=None, importance_sampling_level="token", reduction="mean",
    return_metrics=False, max_ratio=None, kl_clip=None, kl_correction=False,
):  # fmt: skip
    """Token by token, with the minimum of the papers."""
    lp, (rows, steps) = logprobs, logprobs.shape
    old = lp.detach() if old_logprobs is None else old_logprobs
    kept = torch.ones(rows, steps, dtype=torch.bool) if mask is None else mask.bool()
    high = clip_low if clip_high is None else clip_high
    zero = torch.zeros((), dtype=lp.dtype)
    loss = [[zero] * steps for _ in range(rows)]
    policy, low_clips, high_clips, kls = [], 0, 0, []
    for b in range(rows):
        for t in (t for t in range(steps) if kept[b, t]):
            if importance_sampling_level == "token":
                ratio = (lp[b, t] - old[b, t]).exp()
            else:
                ratio = (lp[b] - old[b])[kept[b]].mean().exp()
            a = advantages[b] if advantages.dim() == 1 else advantages[b, t]
            if loss_type == "vespo":
                w = (lp[b] - old[b])[kept[b]].exp().prod().detach()
                k, decay = (2, 3) if a >= 0 else (3, 2)
                policy.append(-(w**k) * (decay * (1 - w)).exp() * a * lp[b, t])
            elif loss_type == "cispo":
                policy.append(-ratio.detach().clamp(max=1 + high) * a * lp[b, t])
            elif loss_type == "sapo":
                tau = 1.0 if a > 0 else 1.05
                policy.append(-a * 4 / tau / (1 + (-tau * (ratio - 1)).exp()))
            else:
                free = ratio if max_ratio is None else ratio.clamp(max=max_ratio)
                policy.append(-torch.minimum(free * a, ratio.clamp(1 - clip_low, 1 + high) * a))
            loss[b][t] = policy[-1]
            clips = loss_type not in ("sapo", "vespo")
            low_clips += int(ratio < 1 - clip_low and a < 0 and clips and loss_type != "cispo")
            high_clips += int(ratio > 1 + high and a > 0 and clips)
            if ref_logprobs is not None:
                d = ref_logprobs[b, t] - lp[b, t]
                d = d if kl_clip is None else d.clamp(-kl_clip, kl_clip)
                kls.append((d.exp() - d - 1) * (ratio if kl_correction else 1))
                loss[b][t] = loss[b][t] + kl_coef * kls[-1]
            if entropy is not None:
                loss[b][t] = loss[b][t] - entropy_coef * entropy[b, t]
    count = kept.sum(1)
    sums = torch.stack([sum(row, zero) for row in loss])
    if reduction == "none":
        value = torch.stack([torch.stack(row) for row in loss])
    elif loss_type == "luspo":
        value = sums.sum() / (num_items or rows)
    elif loss_type in ("grpo", "sapo"):
        value = (sums / count.clamp(min=1)).sum() / (num_items or rows)
    elif loss_type == "dr_grpo":
        value = sums.sum() / max_length / (num_items or rows)
    else:
        value = sums.sum() / (num_items or count.sum())
    if not return_metrics:
        return value
    n = count.sum().double()
    return value, GRPOMetrics(
        sum(policy).detach() / n,
        low_clips / n,
        high_clips / n,
        sum(kls).detach() / n if kls else None,
        None if entropy is None else entropy.detach()[kept].mean(),
    )


# --------------------------------------------------------------------------------------------------
# Samples


def sequences(*shape: int, masked: bool = True, **options) -> Sample:
    x = dict(token_logps=make_logits(shape, F64))
    return Sample(x | dict(mask=mask(*shape)) if masked else x, options)


def pairs(n: int, scale: float = 5.0, free: bool = False, **options) -> Sample:
    x = {k: make_logits((n,), F64, seed=i, scale=scale) for i, k in enumerate(DPO_NAMES)}
    if free:
        x |= dict.fromkeys(DPO_NAMES[2:])
    return Sample(x, options)


def rewards(n: int, group_size: int, **options) -> Sample:
    return Sample(dict(rewards=make_logits((n,), F64)), dict(group_size=group_size, **options))


def tokens(
    rows: int = 4, steps: int = 5, *, extras: bool = False, masked: bool = False, per_token=False,
    **options,
) -> Sample:  # fmt: skip
    def draw(seed, *shape, scale=0.5):
        return make_logits(shape or (rows, steps), F64, seed=seed, scale=scale)

    lp = draw(0, scale=1.0)
    inputs = dict(
        logprobs=lp,
        old_logprobs=lp + draw(1),
        advantages=draw(2, *([rows, steps] if per_token else [rows]), scale=1.0),
    )
    if extras:
        inputs |= dict(ref_logprobs=lp + draw(3), entropy=draw(4).abs())
        options = dict(kl_coef=0.3, entropy_coef=0.1) | options
    if masked:
        inputs["mask"] = mask(rows, steps)
    return Sample(inputs, options)


def everything(loss_type: str, **options) -> Sample:
    return tokens(
        extras=True, masked=True, clip_high=0.28, loss_type=loss_type, max_length=11, **options
    )


BT, INTEGERS = torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64)

SPECS = (
    Spec(
        function=sequence_logprobs,
        samples={
            "all tokens": lambda: sequences(3, 5, masked=False),
            "mask": lambda: sequences(3, 5),
            "average": lambda: sequences(3, 5, average=True),
        },
        reference=sequence_reference,
        gradients=("token_logps",),
        result="wide",
        empty={
            "no tokens": Empty(lambda: sequences(3, 0, masked=False, average=True), 0.0, (3,)),
            "no sequences": Empty(lambda: sequences(0, 4, masked=False), 0.0, (0,)),
        },
        vmap=("token_logps",),
        nan={"token_logps": "row"},
        large=lambda: sequences(300, 200),
        errors=(
            Bad(TypeError, "token_logps must be floating, got torch.int64",
                dict(token_logps=INTEGERS)),
            Bad(TypeError, "token_logps must be a Tensor, got list", dict(token_logps=[1.0])),
            Bad(TypeError, "mask must be bool or integer.*float32", dict(mask=torch.ones(3, 5))),
            Bad(ValueError, r"mask must have the shape.*\[3, 5\], got \[3\]",
                dict(mask=torch.ones(3, dtype=torch.bool))),
            Bad(ValueError, "0-d", dict(token_logps=torch.tensor(1.0))),
        ),
    ),
    Spec(
        function=dpo_loss,
        samples={
            "sigmoid": lambda: pairs(4),
            "smoothed": lambda: pairs(4, beta=0.3, label_smoothing=0.2, reduction="none"),
            "ipo": lambda: pairs(4, beta=0.3, loss_type="ipo", reduction="sum"),
            "ipo smoothed": lambda: pairs(4, beta=0.3, loss_type="ipo", label_smoothing=0.2),
            "hinge": lambda: pairs(4, beta=0.3, loss_type="hinge"),
            "hinge smoothed": lambda: pairs(4, beta=0.3, loss_type="hinge", label_smoothing=0.2),
            "metrics": lambda: pairs(4, beta=0.5, return_metrics=True),
            "robust": lambda: pairs(4, beta=0.3, loss_type="robust", label_smoothing=0.1),
            "exo_pair": lambda: pairs(4, beta=0.3, loss_type="exo_pair", label_smoothing=1e-3),
            "nca_pair": lambda: pairs(4, beta=0.3, loss_type="nca_pair"),
            "bco_pair": lambda: pairs(4, beta=0.3, loss_type="bco_pair"),
            "sppo_hard": lambda: pairs(4, beta=0.3, loss_type="sppo_hard"),
            "apo_zero": lambda: pairs(4, beta=0.3, loss_type="apo_zero"),
            "apo_down": lambda: pairs(4, beta=0.3, loss_type="apo_down"),
            "discopop": lambda: pairs(4, scale=1.0, beta=0.3, loss_type="discopop"),
            "aot": lambda: pairs(5, beta=0.3, loss_type="aot", label_smoothing=0.1),
            "aot_unpaired": lambda: pairs(5, beta=0.3, loss_type="aot_unpaired", reduction="none"),
            **{
                f"{loss} of {divergence}": lambda loss=loss, divergence=divergence: pairs(
                    4, scale=1.0, beta=0.3, loss_type=loss, label_smoothing=0.1,
                    f_divergence_type=divergence, f_alpha_divergence_coef=0.3,
                )
                for loss, divergence in (
                    ("sigmoid", "forward_kl"), ("sigmoid", "js_divergence"),
                    ("sigmoid", "alpha_divergence"), ("ipo", "js_divergence"),
                    ("exo_pair", "alpha_divergence"), ("robust", "forward_kl"),
                    ("hinge", "alpha_divergence"),
                )
            },
            "discopop of js_divergence": lambda: pairs(
                4, scale=1.0, beta=0.3, loss_type="discopop", f_divergence_type="js_divergence"
            ),
            "no reference": lambda: pairs(4, free=True),
        },
        reference=dpo_reference,
        gradients=DPO_NAMES[:2],
        result="wide",
        empty={
            "mean": Empty(lambda: pairs(0), NAN),
            "sum": Empty(lambda: pairs(0, reduction="sum"), 0.0),
        },
        vmap=DPO_NAMES,
        nan=dict.fromkeys(DPO_NAMES, "all"),
        large=lambda: pairs(5000),
        errors=(
            Bad(ValueError, r"policy_rejected.*\[4\].*\[2\]",
                dict(policy_rejected_logps=torch.zeros(2))),
            Bad(ValueError, "both or neither", dict(reference_chosen_logps=None)),
            Bad(TypeError, "reference_chosen_logps must be a Tensor",
                dict(reference_chosen_logps=0.0)),
            Bad(TypeError, "floating", dict(policy_chosen_logps=INTEGERS)),
            Bad(ValueError, "beta must be finite and > 0", dict(beta=0.0)),
            Bad(TypeError, "beta must be a number", dict(beta="1")),
            Bad(ValueError, r"label_smoothing must be in \[0, 0.5\], got 0.6",
                dict(label_smoothing=0.6)),
            Bad(ValueError, "label_smoothing", dict(label_smoothing=NAN)),
            Bad(ValueError, "'robust' needs label_smoothing < 0.5",
                dict(loss_type="robust", label_smoothing=0.5)),
            Bad(ValueError, "'exo_pair' needs label_smoothing > 0", dict(loss_type="exo_pair")),
            Bad(ValueError, "'bco_pair' has no label_smoothing, got 0.1",
                dict(loss_type="bco_pair", label_smoothing=0.1)),
            Bad(ValueError, r"policy_chosen_logps must have one entry per pair.*\[4, 5\]; sequence",
                {name: torch.zeros(4, 5) for name in DPO_NAMES}),
            Bad(ValueError, "'apo_zero' has no f_divergence_type, got 'forward_kl'; .*discopop",
                dict(loss_type="apo_zero", f_divergence_type="forward_kl")),
            Bad(ValueError, "f_divergence_type must be one of reverse_kl.*'kl'",
                dict(f_divergence_type="kl")),
            Bad(ValueError, "f_alpha_divergence_coef must be finite",
                dict(f_alpha_divergence_coef=NAN)),
            Bad(ValueError, "'apo_down' has no label_smoothing",
                dict(loss_type="apo_down", label_smoothing=0.1)),
            Bad(ValueError, "loss_type must be one of sigmoid.*'kto'", dict(loss_type="kto")),
            Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
        ),
    ),
    Spec(
        function=group_advantages,
        samples={
            "normalised": lambda: rewards(6, 3),
            "eps": lambda: rewards(12, 4, eps=1e-3),
            "centred": lambda: rewards(12, 4, normalise=False),
        },
        reference=advantages_reference,
        result="wide",
        empty={
            "no rewards": Empty(lambda: rewards(0, 3), 0.0, (0,)),
            "groups of one": Empty(lambda: rewards(2, 1), 0.0, (2,)),
        },
        vmap=("rewards",),
        nan={"rewards": lambda found, _: found.isnan().tolist() == 3 * [True] + 3 * [False]},
        large=lambda: rewards(60_000, 6),
        errors=(
            Bad(ValueError, "divide the number of rewards, 6, got 4", dict(group_size=4)),
            Bad(ValueError, r"rewards must have shape \(B,\), got \[2, 2\]",
                dict(rewards=torch.zeros(2, 2))),
            Bad(TypeError, "group_size must be an integer, got float", dict(group_size=2.0)),
            Bad(ValueError, "eps", dict(eps=-1.0)),
        ),
    ),
    Spec(
        function=grpo_loss,
        samples={
            "plain": tokens,
            "grpo": lambda: everything("grpo", return_metrics=True),
            "dapo": lambda: everything("dapo", num_items=17, kl_correction=True),
            "bnpo": lambda: everything("bnpo", per_token=True),
            "dr_grpo": lambda: everything("dr_grpo", importance_sampling_level="sequence"),
            "sequence": lambda: everything(
                "grpo", importance_sampling_level="sequence", kl_correction=True
            ),
            "sapo": lambda: everything("sapo", return_metrics=True, num_items=3),
            "vespo": lambda: everything("vespo", return_metrics=True, num_items=17),
            "vespo, each token": lambda: tokens(
                masked=True, per_token=True, reduction="none", loss_type="vespo"
            ),
            "luspo": lambda: everything("luspo", importance_sampling_level="sequence"),
            "bounds": lambda: everything("grpo", max_ratio=1.5, kl_clip=0.4, return_metrics=True),
            "each token": lambda: tokens(masked=True, reduction="none", clip_low=0.1),
        },
        reference=grpo_reference,
        gradients=("logprobs", "entropy"),
        result="wide",
        empty={
            "no sequences": Empty(lambda: tokens(0, 4), 0.0),
        },
        # The weights of VESPO are constants of the derivative, and no part of a finite difference.
        derivative_samples=(
            "plain", "grpo", "dapo", "bnpo", "dr_grpo", "sequence", "sapo", "luspo", "bounds",
            "each token",
        ),
        compile_samples=("plain", "dr_grpo", "vespo"),
        vmap=("logprobs", "old_logprobs", "advantages"),
        nan=dict.fromkeys(("logprobs", "old_logprobs", "advantages"), "all"),
        large=lambda: tokens(200, 100, extras=True, masked=True),
        errors=(
            Bad(ValueError, r"logprobs must.*\(B, T\), got \[3\]", dict(logprobs=torch.zeros(3))),
            Bad(TypeError, "logprobs must be a Tensor, got list", dict(logprobs=[1.0])),
            Bad(ValueError, r"old_logprobs.*\[4, 5\], got \[2, 4\]",
                dict(old_logprobs=torch.zeros(2, 4))),
            Bad(ValueError, "ref_logprobs must have the shape", dict(ref_logprobs=torch.zeros(3))),
            Bad(TypeError, "entropy must be floating", dict(entropy=BT.long())),
            Bad(ValueError, r"advantages.*\(4,\).*\(4, 5\).*got \[3\]",
                dict(advantages=torch.zeros(3))),
            Bad(ValueError, "advantages must have shape", dict(advantages=torch.zeros(1, 5))),
            Bad(TypeError, "mask must be bool or integer", dict(mask=torch.ones(4, 5))),
            Bad(ValueError, "mask must have the shape",
                dict(mask=torch.ones(4, dtype=torch.bool))),
            Bad(ValueError, "kl_coef needs ref_logprobs", dict(kl_coef=0.1)),
            Bad(ValueError, "entropy_coef needs entropy", dict(entropy_coef=0.1)),
            Bad(ValueError, "kl_coef must be finite and >= 0", dict(kl_coef=-0.1, ref_logprobs=BT)),
            Bad(ValueError, "clip_low", dict(clip_low=-0.1)),
            Bad(ValueError, "clip_high", dict(clip_high=NAN)),
            Bad(ValueError, "loss_type must be one of grpo, dapo.*'ppo'", dict(loss_type="ppo")),
            Bad(ValueError, "max_ratio must be finite and > 1.2", dict(max_ratio=1.1)),
            Bad(ValueError, "'vespo' has weights of sequences.*got 'sequence'",
                dict(loss_type="vespo", importance_sampling_level="sequence")),
            Bad(ValueError, "'vespo' has no max_ratio", dict(max_ratio=3.0, loss_type="vespo")),
            Bad(ValueError, "'sapo' has no max_ratio", dict(max_ratio=3.0, loss_type="sapo")),
            Bad(ValueError, "kl_clip must be finite and > 0", dict(kl_clip=0.0)),
            Bad(TypeError, "kl_correction must be a bool", dict(kl_correction="yes")),
            Bad(ValueError, "needs max_length", dict(loss_type="dr_grpo")),
            Bad(ValueError, "max_length must be positive",
                dict(loss_type="dr_grpo", max_length=0)),
            Bad(TypeError, "max_length must be an integer, got float",
                dict(loss_type="dr_grpo", max_length=2.0)),
            Bad(ValueError, "importance_sampling_level must be",
                dict(importance_sampling_level="row")),
            Bad(ValueError, "reduction must be 'mean' or 'none', got 'sum'",
                dict(reduction="sum")),
            Bad(ValueError, "num_items", dict(num_items=0)),
            Bad(ValueError, "num_items must be one number", dict(num_items=torch.ones(2))),
        ),
    ),
)  # fmt: skip
