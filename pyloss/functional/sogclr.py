"""SogCLR, iSogCLR: contrastive losses whose samples each keep a moving average."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._averages import moved
from pyloss.functional._contrastive import (
    Features,
    check_common,
    check_positive,
    check_same_rows,
    paired,
    softmax_over,
)
from pyloss.functional._samples import checked_index as checked_index
from pyloss.functional._samples import over_all_samples as over_all_samples
from pyloss.functional._sums import summed
from pyloss.ops.similarity_softmax import Stats


class SogCLRStats(NamedTuple):
    """What :func:`pyloss.functional.sogclr_loss` found beside the loss. Nothing has a gradient.

    Example:
        >>> import torch, pyloss
        >>> z1, z2 = torch.randn(2, 8, 4)
        >>> _, stats = pyloss.functional.sogclr_loss(z1, z2, torch.zeros(8))
        >>> stats.log_u.shape, stats.value.shape
        (torch.Size([8]), torch.Size([]))
    """

    log_u: Tensor  #: the moving averages after the step, of the shape of ``log_u``
    temperature_grad: Tensor  #: of the robust loss, of the same shape
    value: Tensor  #: 0-d: the loss of the batch itself, of all ranks' with ``group``


def check_gamma(gamma) -> None:
    """Of a tensor, which may be on a device, the dtype alone."""
    check_positive("gamma", gamma)
    if not isinstance(gamma, Tensor) and not gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")


def check_options(
    *, temperature=0.1, gamma=0.9, rho=0.0, bimodal=False, center_positive=True, normalize=True,
    reduction="mean", group=None, ring=False,
) -> None:  # fmt: skip
    """Those of sogclr_loss, also for its modules."""
    check_positive("temperature", temperature)
    check_gamma(gamma)
    checks.check_range("rho", rho, 0.0)
    checks.checked_flag("bimodal", bimodal)
    checks.checked_flag("center_positive", center_positive)
    check_common(normalize, reduction, group, ring)


def sogclr_loss(
    z1: Tensor,
    z2: Tensor,
    log_u: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    gamma: float | Tensor = 0.9,
    rho: float = 0.0,
    bimodal: bool = False,
    center_positive: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> tuple[Tensor, SogCLRStats]:
    r"""One step of SogCLR: the global contrastive loss, whose normalisers are moving averages.

    .. math::
        g_a &= \frac{1}{n} \sum_{b} e^{h_{ab} / T_i}, \qquad
        u_a = (1 - \gamma) u_i + \gamma g_a \quad (g_a \text{ at the first visit}) \\
        \ell_a &= \sum_b w_{ab} h_{ab}, \qquad w_{ab} = \frac{e^{h_{ab} / T_i}}{n u_a}
        \text{ without a gradient}, \qquad h_{ab} = s_{ab} - s_{a p(a)}

    a is a view of sample i, p(a) the other one, s the cosines, and b runs over the n negatives:
    the 2B - 2 views of the other samples, or, ``bimodal``, the B - 1 of the other modality. The
    gradient estimates that of :math:`T \log \mathbb{E}_b\, e^{h_{ab} / T}` over the whole data set,
    and with gamma 1 is that of the batch. The value only has this gradient; ``value`` of the result
    is for looking at. The loss of a sample is the sum over its two views; their u are averaged.

    Args:
        z1, z2: two views of B samples, or, ``bimodal``, two modalities, ``(B, D)`` each, floating.
        log_u: the samples' log u so far, -inf for one that has none, ``(B,)``; ``bimodal``:
            ``(2, B)``, of ``z1`` and of ``z2`` as anchors.
        temperature: T > 0, or a tensor of one number, or of the shape of ``log_u``; no gradient.
        gamma: in (0, 1], or a tensor of one number.
        rho: radius of the robust loss (iSogCLR): adds ``rho`` to ``temperature_grad``, and
            :math:`\rho T` to ``value``.
        bimodal: negatives of ``z1`` are in ``z2`` and those of ``z2`` in ``z1``.
        center_positive: False: h = s inside of the exponential and weight 1 of the positive, as in
            the authors' code for one modality; the same only with gamma 1.
        normalize: cosines; else inner products of the features as they are.
        reduction: ``"mean"`` or ``"sum"`` over samples, or ``"none"``.
        group: a process group: negatives come from the batches of all its ranks, which may differ
            in size. The mean over the ranks of their ``"mean"`` is the loss of the whole batch, and
            so is its gradient as DDP averages it. Not for ``fullgraph=True``.
        ring: with ``group``: embeddings go around the ranks, and none holds them all.

    Returns:
        ``(loss, SogCLRStats)``: 0-d, or ``(B,)``, of the promoted dtype, float32 for half types
        under autocast. The mean of no samples is 0.

    Raises:
        TypeError: features that are no floating tensors; an option of the wrong type.
        ValueError: one sample alone, which has no negatives; shapes that do not fit; an option out
            of range.
        RuntimeError: tensors on several devices; a temperature that requires a gradient.

    Example:
        >>> import math, torch, pyloss
        >>> z1, z2 = torch.randn(2, 32, 16, requires_grad=True)
        >>> log_u = torch.full((1000,), -math.inf)  # of the data set
        >>> index = torch.randperm(1000)[:32]
        >>> loss, stats = pyloss.functional.sogclr_loss(z1, z2, log_u[index])
        >>> loss.backward()
        >>> log_u[index] = stats.log_u

    Reference:
        Yuan et al. SogCLR. arXiv 2202.12387. Qiu et al. iSogCLR. arXiv 2305.11965.
    """
    check_options(
        temperature=temperature, gamma=gamma, rho=rho, bimodal=bimodal,
        center_positive=center_positive, normalize=normalize, reduction=reduction, group=group,
        ring=ring,
    )  # fmt: skip
    features = Features(normalize, z1=z1, z2=z2)
    check_same_rows("z2", z2, "z1", z1)
    rows = z1.shape[0]
    log_u = _checked_log_u(log_u, features, rows, bimodal)
    tau = _checked_temperature(temperature, features, log_u)
    if isinstance(gamma, Tensor):
        checks.check_device("gamma", gamma, z1, "the features")
        gamma = checks.one_number("gamma", gamma).detach().to(features.sums)
    views = _statistics(features, z1, z2, tau, bimodal, group, ring)

    lse, positive, mean = views.lse, views.positive, views.mean
    centered = lse - positive if center_positive else lse
    log_g = (centered - torch.log(views.count)).detach()
    log_view = moved(log_u, log_g, gamma)
    mass = torch.exp(log_g - log_view)  # of the weights w of a view
    average = mean - positive.detach() if center_positive else mean
    tau_grad = log_view + rho - mass * average

    # sum_b w s_ab: its value, and the gradient of mass T lse.
    pull = mass * tau
    push = (pull * mean).detach() + pull * (lse - lse.detach())
    each = (push - (pull if center_positive else tau) * positive).sum(0)
    value = (tau * (lse - torch.log(views.count) - positive + rho)).detach().sum(0)
    if not bimodal:
        log_view = log_mean_exp(log_view)
        tau_grad = tau_grad.mean(0)
    loss = features.reduced(each, reduction, group=group)
    return loss, SogCLRStats(log_view, tau_grad, _over_ranks(value, group))


def _checked_log_u(log_u, features: Features, rows: int, bimodal: bool) -> Tensor:
    checks.check_floating("log_u", log_u)
    shape = (2, rows) if bimodal else (rows,)
    if log_u.shape != shape:
        raise ValueError(f"log_u must have the shape {list(shape)}, got {list(log_u.shape)}")
    checks.check_device("log_u", log_u, features.first, "the features")
    return log_u.detach().to(features.sums)


def _checked_temperature(temperature, features: Features, log_u: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    checks.check_constant("temperature", temperature)
    if temperature.shape == log_u.shape:
        checks.check_device("temperature", temperature, features.first, "the features")
        return temperature.detach().to(features.sums)
    return features.scale("temperature", temperature.detach())


def _statistics(features, z1, z2, tau, bimodal, group, ring) -> Stats:
    """Of the views z1 and z2 as anchors over their negatives, (2, B) each."""
    rows, options = z1.shape[0], dict(denominator="negatives", mean=True)
    call = softmax_over(group, ring)
    first, second = features.of(z1), features.of(z2)
    each = isinstance(tau, Tensor) and tau.dim() > 0
    total = rows
    if group is not None:
        from pyloss.functional import _contrastive_group as of_group  # with its first use

        layout = of_group.layout_of("z1", z1, group)
        total = layout.total
        if not bimodal:  # keys are both views
            layout = layout._replace(counts=tuple(2 * count for count in layout.counts))
        options["layout"] = layout
    if total == 1:
        raise ValueError("z1 holds one sample, which has no negatives: there must be two or more")
    if not bimodal:
        z, other = paired(first, second)
        scale = torch.cat([1 / tau, 1 / tau]) if each else 1 / tau
        found = call(z, z, scale, first=0, target=other, **options)
        return Stats(*(None if t is None else t.view(2, rows) for t in found))
    own = torch.arange(rows, device=z1.device)
    scales = (1 / tau) if each else (1 / tau,) * 2
    sides = (
        call(first, second, scales[0], target=own, **options),
        call(second, first, scales[1], target=own, **options),
    )
    return Stats(*(None if a is None else torch.stack([a, b]) for a, b in zip(*sides)))


def log_mean_exp(x: Tensor) -> Tensor:
    """Over the first dimension."""
    return torch.logsumexp(x, 0) - math.log(x.shape[0])


def _over_ranks(value: Tensor, group) -> Tensor:
    """The mean over samples, of all ranks."""
    if group is None:
        return summed(value) / max(1, value.numel())
    from pyloss.functional import _contrastive_group as of_group

    return of_group.joint_mean(value, group)
