"""Preference and policy-gradient losses on log-probabilities of tokens.

They take what :func:`pyloss.token_logprobs` returns, so that a trainer never stores logits, and
are plain torch operations on ``(B, T)`` numbers: any device, ``torch.compile``, higher derivatives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _dpo
from pyloss.functional._checks import check_floating, check_range
from pyloss.ops._launch import accumulator_dtype

_GRPO_LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
_UNCLIPPED = ("sapo", "vespo")
_LEVELS = ("token", "sequence")
_SAPO_TEMPERATURES = 1.0, 1.05  # of advantages > 0 and of the others
_VESPO_WEIGHTS = (2.0, 3.0), (3.0, 2.0)  # exponent and decay, of advantages >= 0 and of the others
_LARGEST_LOG_RATIO = 20.0  # of exponentials that no clip bounds; VESPO's weight is 0 from there on


class DPOMetrics(NamedTuple):
    """What :func:`dpo_loss` returns beside the loss with ``return_metrics=True``, detached.

    Every field has one entry per pair.

    Example:
        >>> import torch, pyloss
        >>> chosen, rejected, reference = torch.tensor([-4.0]), torch.tensor([-6.0]), torch.zeros(1)
        >>> _, metrics = pyloss.functional.dpo_loss(
        ...     chosen, rejected, reference, reference, beta=0.5, return_metrics=True
        ... )
        >>> metrics.margins, metrics.accuracies
        (tensor([1.]), tensor([1.]))
    """

    chosen_rewards: Tensor  # beta * (policy - reference) of the chosen answer
    rejected_rewards: Tensor
    margins: Tensor  # chosen_rewards - rejected_rewards
    accuracies: Tensor  # 1 where the margin is positive, else 0


class GRPOMetrics(NamedTuple):
    """What :func:`grpo_loss` returns beside the loss with ``return_metrics=True``, detached.

    Every field is 0-d, a mean over the tokens that count (0 without any). None: not asked for.

    Example:
        >>> import torch, pyloss
        >>> logprobs = torch.tensor([[-1.0, -2.0]])
        >>> old = logprobs - torch.tensor([[0.5, 0.0]])  # the first is now 1.6 times as likely
        >>> _, metrics = pyloss.functional.grpo_loss(
        ...     logprobs, old, torch.ones(1), return_metrics=True
        ... )
        >>> metrics.clip_high_fraction, metrics.clip_low_fraction
        (tensor(0.5000), tensor(0.))
    """

    policy_loss: Tensor  # the clipped term alone, averaged over tokens whatever the loss_type
    clip_low_fraction: Tensor  # tokens with negative advantage whose ratio fell below 1 - clip_low
    clip_high_fraction: Tensor  # ... positive advantage, ratio above 1 + clip_high
    kl: Tensor | None  # estimate of KL(policy || reference)
    entropy: Tensor | None


# --------------------------------------------------------------------------------------------------
# Sequences


def sequence_logprobs(
    token_logps: Tensor, mask: Tensor | None = None, average: bool = False
) -> Tensor:
    r"""Log-probability of whole sequences from those of their tokens.

    .. math:: \log \pi(y) = \sum_t m_t \log \pi(y_t), \qquad
              \text{average: divided by } \max(1, \textstyle\sum_t m_t)

    Args:
        token_logps: ``(..., T)``, floating.
        mask: True (or nonzero) where a token counts, shape of ``token_logps``; bool or integer.
            What stands at other positions changes nothing, NaN and infinities included, and gets
            gradient 0. None: every token counts.
        average: the mean over the tokens that count instead of the sum.

    Returns:
        ``(...)``; float32 for half types, else the dtype of ``token_logps``. 0 for a sequence
        without tokens.

    Raises:
        TypeError: an argument of the wrong Python type, a floating mask.
        ValueError: a mask of another shape, a 0-d ``token_logps``.

    Example:
        >>> import torch, pyloss
        >>> logps = torch.tensor([[-1.0, -2.0, float("nan")]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> pyloss.functional.sequence_logprobs(logps, mask)
        tensor([-3.])

    Reference:
        Rafailov et al. Direct Preference Optimization. arXiv 2305.18290 (the sum); Meng, Xia, Chen.
        SimPO. arXiv 2405.14734 (the average).
    """
    check_floating("token_logps", token_logps)
    checks.check_has_dimension("token_logps", token_logps)
    checks.check_flag("average", average)
    logps = token_logps.to(accumulator_dtype(token_logps.dtype))
    mask = _checked_mask(mask, "token_logps", token_logps)
    if mask is None:
        count = logps.new_full((), logps.shape[-1])
    else:
        logps, count = _kept(logps, mask), mask.sum(-1).to(logps.dtype)
    total = logps.sum(-1)
    return total / count.clamp(min=1) if average else total


# --------------------------------------------------------------------------------------------------
# DPO


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
    return_metrics: bool = False,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor | tuple[Tensor, DPOMetrics]:
    r"""Direct preference optimization on log-probabilities of chosen and rejected sequences.

    With :math:`h = \log\frac{\pi(y_w)}{\pi_\mathrm{ref}(y_w)}
    - \log\frac{\pi(y_l)}{\pi_\mathrm{ref}(y_l)}`:

    .. math::
        f(h) = \begin{cases}
            -\log \sigma(\beta h) & \text{sigmoid} \\
            (h - 1/(2\beta))^2 & \text{ipo} \\
            \max(0, 1 - \beta h) & \text{hinge}
        \end{cases}
        \qquad \ell = (1 - \epsilon) f(h) + \epsilon f(-h)

    and further losses and divergences with the names of TRL; docs/preference.md has their formulas.

    Args:
        policy_chosen_logps: of the preferred answers under the policy, ``(B,)`` or ``(B, 1)``, one
            entry per pair, not per token; see :func:`sequence_logprobs`. float32, float64 or half
            (computed in float32).
        policy_rejected_logps: of the other answers, same shape.
        reference_chosen_logps: the same under the reference model; constants, no gradient flows
            into them. None (both): a reference that rates all answers the same.
        reference_rejected_logps: likewise.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability epsilon that the two answers of a pair were swapped, in
            [0, 0.5]; with ``"sigmoid"`` this is conservative DPO. ``"robust"`` needs less than
            0.5, ``"exo_pair"`` more than 0 (1e-3, say); of the losses after these only ``"aot"``
            and ``"aot_unpaired"`` have it.
        loss_type: ``"sigmoid" | "ipo" | "hinge" | "robust" | "exo_pair" | "nca_pair" | "bco_pair" |
            "sppo_hard" | "apo_zero" | "apo_down" | "discopop" | "aot" | "aot_unpaired"``. IPO is
            meant for the ``average=True`` of :func:`sequence_logprobs` when lengths differ: its
            target 1/(2 beta) has no length. The last two compare quantiles over the batch: the
            larger it is, the better.
        reduction: ``"mean" | "sum" | "none"`` over the pairs; for ``"aot"`` and ``"aot_unpaired"``
            over the quantiles, ascending.
        return_metrics: also return the implicit rewards.
        f_divergence_type: ``"reverse_kl" | "forward_kl" | "js_divergence" | "alpha_divergence"``:
            h is then the difference of :math:`f'(u)` of the two answers, :math:`u = \pi /
            \pi_\mathrm{ref}`; log u for the first. For the losses of h alone: ``"sigmoid"``,
            ``"ipo"``, ``"hinge"``, ``"robust"``, ``"exo_pair"``, ``"discopop"``.
        f_alpha_divergence_coef: alpha of :math:`f'(u) = (u^{\alpha-1} - 1) / (\alpha - 1)`; 0 is
            the forward and 1 the reverse KL. Read with ``"alpha_divergence"`` only.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or of the inputs' shape with
        ``reduction="none"``; with ``return_metrics`` the pair ``(loss, DPOMetrics)``. The mean over
        no pairs is NaN.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: shapes that differ, one reference without the other, an unknown ``loss_type`` or
            ``reduction``, a number out of its range.

    Example:
        >>> import torch, pyloss
        >>> policy = torch.tensor([[-5.0, -6.0], [-7.0, -7.0]], requires_grad=True)
        >>> reference = torch.tensor([[-5.5, -6.0], [-6.5, -7.0]])
        >>> loss, metrics = pyloss.functional.dpo_loss(*policy, *reference, return_metrics=True)
        >>> loss.backward()
        >>> metrics.margins
        tensor([0.1000, 0.0000])

    Reference:
        Rafailov et al. Direct Preference Optimization. arXiv 2305.18290. IPO: Azar et al.
        arXiv 2310.12036. Hinge: Zhao et al. SLiC-HF. arXiv 2305.10425. Robust: Ray Chowdhury et al.
        arXiv 2403.00409. EXO: Ji et al. arXiv 2402.00856. NCA: Chen et al. arXiv 2402.05369. BCO:
        Jung et al. arXiv 2404.04656. SPPO: Wu et al. arXiv 2405.00675. APO: D'Oosterlinck et al.
        arXiv 2408.06266. DiscoPOP: Lu et al. arXiv 2406.08414. AOT: Melnyk et al. arXiv 2406.05882.
        Divergences: Wang et al. f-DPO. arXiv 2309.16240.
    """
    named = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    if (reference_chosen_logps is None) != (reference_rejected_logps is None):
        raise ValueError(
            "reference_chosen_logps and reference_rejected_logps: give both or neither (None)"
        )
    if reference_chosen_logps is not None:
        named["reference_chosen_logps"] = reference_chosen_logps
        named["reference_rejected_logps"] = reference_rejected_logps
    for name, t in named.items():
        check_floating(name, t)
        if t.dim() > 1 and t.shape[-1] > 1:
            raise ValueError(
                f"{name} must have one entry per pair, (B,), got {list(t.shape)}; "
                "sequence_logprobs sums those of tokens; flatten pairs in other shapes"
            )
        _check_same_shape(name, t, "policy_chosen_logps", policy_chosen_logps)
    checks.check_one_of("loss_type", loss_type, _dpo.LOSSES)
    checks.check_reduction(reduction)
    checks.check_flag("return_metrics", return_metrics)
    check_range("beta", beta, 0.0, open_low=True)
    checks.check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5], got {label_smoothing}")
    if label_smoothing and loss_type not in _dpo.SMOOTHED:
        raise ValueError(f"loss_type {loss_type!r} has no label_smoothing, got {label_smoothing}")
    if loss_type == "robust" and label_smoothing == 0.5:
        raise ValueError("loss_type 'robust' needs label_smoothing < 0.5: it divides by 1 - 2 * it")
    if loss_type == "exo_pair" and label_smoothing == 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0: it takes its logarithm")
    checks.check_one_of("f_divergence_type", f_divergence_type, _dpo.DIVERGENCES)
    check_range("f_alpha_divergence_coef", f_alpha_divergence_coef, -math.inf)
    if f_divergence_type != "reverse_kl" and loss_type not in _dpo.WITH_DIVERGENCE:
        raise ValueError(
            f"loss_type {loss_type!r} has no f_divergence_type, got {f_divergence_type!r}; those "
            f"that have: {', '.join(_dpo.WITH_DIVERGENCE)}"
        )

    wide = any(t.dtype == torch.float64 for t in named.values())
    dtype = torch.float64 if wide else torch.float32
    chosen, rejected = policy_chosen_logps.to(dtype), policy_rejected_logps.to(dtype)
    policy, reference = chosen - rejected, 0.0
    if reference_chosen_logps is not None:
        fixed = [t.detach().to(dtype) for t in (reference_chosen_logps, reference_rejected_logps)]
        chosen, rejected, reference = chosen - fixed[0], rejected - fixed[1], fixed[0] - fixed[1]
    ratios = _dpo.LogRatios(chosen, rejected, policy, reference)
    loss = _dpo.loss_of_pairs(
        loss_type, ratios, beta, label_smoothing, f_divergence_type, f_alpha_divergence_coef
    )
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    if not return_metrics:
        return loss
    margins = beta * (chosen - rejected).detach()
    chosen, rejected = beta * chosen.detach(), beta * rejected.detach()
    return loss, DPOMetrics(chosen, rejected, margins, (margins > 0).to(dtype))


# --------------------------------------------------------------------------------------------------
# GRPO


def group_advantages(
    rewards: Tensor, group_size: int, normalise: bool = True, eps: float = 1e-4
) -> Tensor:
    r"""Advantages of answers against the other answers to the same prompt.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon}, \qquad
              \text{not normalised: } A_i = r_i - \mathrm{mean}(r)

    Args:
        rewards: ``(B,)``; each ``group_size`` consecutive entries belong to one prompt. Floating,
            integer or bool.
        group_size: answers per prompt; divides B.
        normalise: divide by the standard deviation of the group (with Bessel's correction). Dr.
            GRPO does not, since it makes easy and hard prompts weigh more.
        eps: added to the standard deviation, >= 0.

    Returns:
        ``(B,)``, float32 (float64 for float64 rewards), no gradient. Exactly 0 in a group whose
        rewards are all equal. A NaN stays in its group.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: ``rewards`` not 1-D, ``group_size`` that does not divide B, ``eps`` out of its
            range.

    Example:
        >>> import torch, pyloss
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 5.0, 5.0, 5.0, 5.0])
        >>> pyloss.functional.group_advantages(rewards, 4, normalise=False)
        tensor([ 0.5000, -0.5000,  0.5000, -0.5000,  0.0000,  0.0000,  0.0000,  0.0000])

    Reference:
        Shao et al. DeepSeekMath. arXiv 2402.03300. Without the division: Liu et al.
        Understanding R1-Zero-Like Training (Dr. GRPO). arXiv 2503.20783.
    """
    checks.check_tensor("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (B,), got {list(rewards.shape)}")
    group_size = checks.checked_integer("group_size", group_size)
    checks.check_flag("normalise", normalise)
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size must be positive and divide the number of rewards, {rewards.shape[0]}, "
            f"got {group_size}"
        )
    check_range("eps", eps, 0.0)
    groups = rewards.detach().to(accumulator_dtype(rewards.dtype)).view(-1, group_size)
    # Relative to the first one: equal rewards then give exact zeros, not rounding errors of the
    # mean that the division would make large.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(1, keepdim=True)
    if normalise and group_size > 1:
        std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
        # A NaN is not 0 and stays.
        centred = torch.where(centred == 0, 0.0, centred / (std + eps))
    return centred.reshape(-1)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    loss_type: str = "grpo",
    max_length: int | None = None,
    num_items: float | Tensor | None = None,
    importance_sampling_level: str = "token",
    reduction: str = "mean",
    return_metrics: bool = False,
    max_ratio: float | None = None,
    kl_clip: float | None = None,
    kl_correction: bool = False,
) -> Tensor | tuple[Tensor, GRPOMetrics]:
    r"""Clipped policy-gradient loss of GRPO and its relatives, with KL and entropy terms.

    With the ratio :math:`\rho_t = \pi(y_t) / \pi_\mathrm{old}(y_t)` and
    :math:`d_t = \log\pi_\mathrm{ref}(y_t) - \log\pi(y_t)`, per token:

    .. math::
        \ell_t = -\min\big(\rho_t A,\
                 \mathrm{clip}(\rho_t, 1 - \epsilon_\mathrm{low}, 1 + \epsilon_\mathrm{high}) A\big)
               + \mathrm{kl\_coef}\, (e^{d_t} - d_t - 1) - \mathrm{entropy\_coef}\, H_t

    Args:
        logprobs: of the sampled tokens under the policy, ``(B, T)``; see
            :func:`pyloss.token_logprobs`. Half types are computed in float32.
        old_logprobs: the same when they were sampled; a constant. None: the policy has not changed
            since, the ratio is 1 with the gradient of ``logprobs``.
        advantages: one per sequence, ``(B,)`` or ``(B, 1)``, or one per token, ``(B, T)``; a
            constant. See :func:`group_advantages`.
        mask: True (or nonzero) where a token counts, ``(B, T)``; bool or integer. What stands at
            other positions in any of the tensors changes nothing, NaN and infinities included.
        clip_low: how far below 1 the ratio still has a gradient, >= 0.
        clip_high: how far above 1; None: as ``clip_low``. DAPO takes 0.28.
        ref_logprobs: under the reference model, ``(B, T)``; a constant.
        kl_coef: weight of the estimated KL divergence from the reference, >= 0. The estimate is
            never negative and has the right mean ("k3").
        entropy: of the policy at each token, ``(B, T)``; differentiable.
        entropy_coef: weight of the entropy bonus.
        loss_type: how tokens are averaged, with m the mask:

            - ``"grpo"``: the mean of each sequence, then the mean over the B sequences
            - ``"dapo"``, ``"bnpo"``: sum over all tokens / number of tokens
            - ``"dr_grpo"``: sum over all tokens / (B * ``max_length``)
            - ``"luspo"``: the sum of each sequence, then the mean over the B sequences; meant for
              the level ``"sequence"``

            and with another term than the clipped one, A the advantage:

            - ``"cispo"``: :math:`-\min(\rho_t, 1 + \epsilon_\mathrm{high}) A \log\pi(y_t)` with a
              constant ratio, averaged as ``"dapo"``; no lower clip
            - ``"sapo"``: :math:`-\frac{4}{\tau}\sigma(\tau(\rho_t - 1)) A`, with tau 1 for A > 0
              and 1.05 else, averaged as ``"grpo"``; no clip
            - ``"vespo"``: :math:`-w^k e^{\lambda (1 - w)} A \log\pi(y_t)` with a constant w, the
              product of the sequence's ratios, :math:`k, \lambda` = 2, 3 for A >= 0 and 3, 2 else,
              averaged as ``"dapo"``; no clip

            A sequence without tokens adds 0 (it does count in B); a batch without tokens gives 0.
        max_length: the length that ``"dr_grpo"`` divides by, a constant of the training run (the
            limit of the generation); only read there.
        num_items: a number or a 0-d tensor that replaces the count in the denominator: of sequences
            for ``"grpo"``, ``"sapo"``, ``"luspo"`` and ``"dr_grpo"``, of tokens for the others. For
            gradient accumulation and several processes.
        importance_sampling_level: ``"token"``, or ``"sequence"``: all tokens of a sequence share
            the geometric mean of their ratios (GSPO; its clipping range is about 3e-4). Not for
            ``"vespo"``, whose sequences have a product.
        reduction: ``"mean"``: by ``loss_type``; ``"none"``: the loss of each token, ``(B, T)``, 0
            where masked.
        return_metrics: also return KL, entropy and the share of clipped tokens.
        max_ratio: bound of the ratio from above where A < 0, where the minimum has none (TRL's
            ``delta``); > 1 + ``clip_high``. For the clipped losses. None: none.
        kl_clip: bound of :math:`|d_t|` in the KL estimate, > 0; a token beyond it has the bound's
            value and gradient 0 from this term. None: none.
        kl_correction: multiply the KL estimate of each token by its ratio (TRL's
            ``use_bias_correction_kl``), which makes the mean right although the tokens were sampled
            under the old policy. A ratio above e^20 counts as e^20 here.

    Returns:
        The loss, float32 (float64 for float64 ``logprobs``); with ``return_metrics`` the pair
        ``(loss, GRPOMetrics)``.

    Raises:
        TypeError: an argument of the wrong Python type, a floating mask.
        ValueError: shapes that do not fit, a coefficient without its tensor, ``"dr_grpo"`` without
            ``max_length``, an unknown choice, a number out of its range.

    Example:
        >>> import torch, pyloss
        >>> logprobs = torch.randn(4, 7, requires_grad=True)
        >>> advantages = pyloss.functional.group_advantages(torch.tensor([1, 0, 0, 1]), 4)
        >>> mask = torch.arange(7) < torch.tensor([7, 3, 5, 0])[:, None]
        >>> loss = pyloss.functional.grpo_loss(logprobs, logprobs.detach(), advantages, mask=mask)
        >>> loss.backward()

    Reference:
        GRPO: Shao et al. arXiv 2402.03300. DAPO: Yu et al. arXiv 2503.14476. Dr. GRPO: Liu et al.
        arXiv 2503.20783. Sequence level: Zheng et al. GSPO. arXiv 2507.18071. CISPO: MiniMax-M1.
        arXiv 2506.13585. SAPO: arXiv 2511.20347. LUSPO: arXiv 2602.05261. VESPO: arXiv 2602.10693.
        Correction of the KL estimate: DeepSeek-V3.2. arXiv 2512.02556.
    """
    check_floating("logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape (B, T), got {list(logprobs.shape)}")
    shape, dtype = logprobs.shape, accumulator_dtype(logprobs.dtype)
    for name, t in (
        ("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("entropy", entropy)
    ):  # fmt: skip
        if t is not None:
            check_floating(name, t)
            _check_same_shape(name, t, "logprobs", logprobs)
    mask = _checked_mask(mask, "logprobs", logprobs)
    advantages = _checked_advantages(advantages, shape).to(dtype)
    checks.check_one_of("loss_type", loss_type, _GRPO_LOSSES)
    checks.check_one_of("importance_sampling_level", importance_sampling_level, _LEVELS)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    checks.check_flag("return_metrics", return_metrics)
    checks.check_flag("kl_correction", kl_correction)
    clip_high = clip_low if clip_high is None else clip_high
    check_range("clip_low", clip_low, 0.0)
    check_range("clip_high", clip_high, 0.0)
    check_range("kl_coef", kl_coef, 0.0)
    check_range("entropy_coef", entropy_coef, -math.inf)
    if kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    if entropy_coef and entropy is None:
        raise ValueError("entropy_coef needs entropy")
    if loss_type == "dr_grpo":
        max_length = _checked_max_length(max_length)
    if loss_type == "vespo" and importance_sampling_level != "token":
        raise ValueError(
            "loss_type 'vespo' has weights of sequences of its own: importance_sampling_level must "
            f"be 'token', got {importance_sampling_level!r}"
        )
    if max_ratio is not None:
        check_range("max_ratio", max_ratio, 1 + clip_high, open_low=True)
        if loss_type in ("cispo", *_UNCLIPPED):
            raise ValueError(f"loss_type {loss_type!r} has no max_ratio, got {max_ratio}")
    if kl_clip is not None:
        check_range("kl_clip", kl_clip, 0.0, open_low=True)

    def kept(t):
        return _kept(t.to(dtype), mask)

    # Zeros instead of the masked values before any arithmetic: neither a value nor, through
    # 0 * inf, a gradient can come from them.
    logps, advantages = kept(logprobs), kept(advantages)
    old = logps.detach() if old_logprobs is None else kept(old_logprobs.detach())
    log_ratio = logps - old
    count = logps.new_full((shape[0],), shape[1]) if mask is None else mask.sum(1).to(dtype)
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / count.clamp(min=1)[:, None]
        log_ratio = _kept(log_ratio.expand(shape), mask)

    # min(rho A, clip(rho) A) bounds the ratio from above where A >= 0 and from below where A < 0.
    # Bounding its logarithm keeps exp, and its gradient, finite where the ratio is clipped.
    top = math.log1p(clip_high)
    bottom = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    positive = advantages >= 0
    if loss_type == "cispo":
        policy = -advantages * log_ratio.detach().clamp(max=top).exp() * logps
    elif loss_type == "vespo":
        log_w = log_ratio.detach().sum(1, keepdim=True).clamp(max=_LARGEST_LOG_RATIO)
        (k_high, decay_high), (k_low, decay_low) = _VESPO_WEIGHTS
        k = torch.full_like(advantages, k_low).masked_fill(positive, k_high)
        decay = torch.full_like(advantages, decay_low).masked_fill(positive, decay_high)
        policy = -advantages * (k * log_w - decay * torch.expm1(log_w)).exp() * logps
    elif loss_type == "sapo":
        # From exp(10) on the sigmoid is 1 and its slope 0, which must not meet an infinite ratio.
        pos, neg = _SAPO_TEMPERATURES
        tau = torch.full_like(advantages, neg).masked_fill(advantages > 0, pos)
        policy = -advantages * 4 / tau * torch.sigmoid(tau * torch.expm1(log_ratio.clamp(max=10)))
    else:
        most = None if max_ratio is None else math.log(max_ratio)
        below = log_ratio.clamp(bottom, most)
        policy = -advantages * torch.where(positive, log_ratio.clamp(max=top), below).exp()

    loss, kl = policy, None
    if ref_logprobs is not None and (kl_coef or return_metrics):
        d = kept(ref_logprobs.detach()) - logps
        if kl_clip is not None:
            d = d.clamp(-kl_clip, kl_clip)
        kl = torch.expm1(d) - d
        if kl_correction:
            kl = kl * log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()
        if kl_coef:
            loss = loss + kl_coef * kl
    if entropy is not None:
        entropy = kept(entropy)
        if entropy_coef:
            loss = loss - entropy_coef * entropy

    if reduction == "mean":
        reduced = _averaged(loss, count, loss_type, max_length, num_items)
    else:
        reduced = _kept(loss, mask)
    if not return_metrics:
        return reduced

    def mean(t):
        return None if t is None else t.detach().to(dtype).sum() / count.sum().clamp(min=1)

    real = True if mask is None else mask
    if loss_type == "cispo":  # no lower clip
        bottom = -math.inf
    elif loss_type in _UNCLIPPED:
        bottom, top = -math.inf, math.inf
    clip_below = (log_ratio < bottom) & ~positive & real
    clip_above = (log_ratio > top) & (advantages > 0) & real
    return reduced, GRPOMetrics(*map(mean, (policy, clip_below, clip_above, kl, entropy)))


def _averaged(loss, count, loss_type, max_length, num_items):
    if loss_type in ("grpo", "sapo"):
        items, total = loss.shape[0], (loss.sum(1) / count.clamp(min=1)).sum()
    elif loss_type == "luspo":
        items, total = loss.shape[0], loss.sum()
    elif loss_type == "dr_grpo":
        items, total = loss.shape[0], loss.sum() / max_length
    else:
        items, total = count.sum(), loss.sum()
    if num_items is not None:
        items = num_items
        if isinstance(items, Tensor):
            items = checks.one_number("num_items", items).detach()
        else:
            check_range("num_items", items, 0.0, open_low=True)
    if isinstance(items, Tensor):
        items = items.to(loss.dtype)
        return total / torch.where(items == 0, 1.0, items)
    return total / (items or 1)


# --------------------------------------------------------------------------------------------------
# Checks


def _kept(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else torch.where(mask, t, 0.0)


def _check_same_shape(name, t, other_name, other):
    if t.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(t.shape)}"
        )


def _checked_mask(mask, other_name, other):
    if mask is None:
        return None
    checks.check_tensor("mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or integer (weights are not meant), got {mask.dtype}")
    _check_same_shape("mask", mask, other_name, other)
    return mask.bool()


def _checked_advantages(advantages, shape):
    check_floating("advantages", advantages)
    rows, tokens = shape
    if advantages.shape == (rows,):
        advantages = advantages[:, None]
    if advantages.shape not in ((rows, 1), (rows, tokens)):
        raise ValueError(
            f"advantages must have shape ({rows},), ({rows}, 1) or ({rows}, {tokens}) for logprobs "
            f"of shape {list(shape)}, got {list(advantages.shape)}"
        )
    return advantages.detach().expand(rows, tokens)


def _checked_max_length(max_length):
    if max_length is None:
        raise ValueError(
            "loss_type 'dr_grpo' needs max_length: it divides by a constant, not by the length of "
            "the batch"
        )
    max_length = checks.checked_integer("max_length", max_length)
    if max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    return max_length
