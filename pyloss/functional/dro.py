"""Distributionally robust losses: the mean over samples under the worst weights near uniform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._averages import moved
from pyloss.functional._sums import summed
from pyloss.ops._launch import accumulator_dtype


def check_options(*, r=1.0, eta=1.0, group=None) -> None:
    """Those of kl_dro_loss, also for its module."""
    checks.check_range("r", r, 0.0, open_low=True)
    checks.check_range("eta", eta, 0.0, open_low=True)
    if not eta <= 1:
        raise ValueError(f"eta must be in (0, 1], got {eta}")


def kl_dro_loss(
    losses: Tensor,
    r: float = 1.0,
    *,
    log_u: Tensor | None = None,
    eta: float = 1.0,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    r"""KL-regularised distributionally robust loss: samples of large loss get large weights.

    .. math::
        L = \max_{w \in \Delta} \sum_i w_i \ell_i - r \sum_i w_i \log(B w_i)
          = r \log \frac{1}{B} \sum_i e^{\ell_i / r}

    Its gradient is :math:`\sum_i w_i \nabla \ell_i` with w = softmax(l / r). A large ``r`` is the
    plain mean, a small one the largest loss. The weights of small batches are those of the batch
    and not of the data set; with ``log_u``, a moving average of the normaliser, they become so:

    .. math::
        u' = (1 - \eta) u + \eta \frac{1}{B} \sum_i e^{\ell_i / r}, \qquad
        \nabla = \frac{1}{B} \sum_i \frac{e^{\ell_i / r}}{u'} \nabla \ell_i

    Args:
        losses: of B samples, of any shape, floating.
        r: weight of the divergence, > 0, in the unit of the losses.
        log_u: log u so far, a tensor of one number; None, or -inf: there is none yet.
        eta: weight of the batch in the average, in (0, 1]; 1 is the loss of the batch.
        group: a process group: the batch is that of all its ranks, which may differ in size. The
            mean over ranks of the gradients, as DDP forms it, is that of the whole batch. Not for
            ``fullgraph=True``.

    Returns:
        ``(loss, log u')``, 0-d. The loss has the value L of the batch and the gradient above, that
        of L itself with ``eta=1``; dtype of ``losses``, float32 for half types under autocast.
        log u' has no gradient and is float32, or float64.

    Raises:
        TypeError: losses that are no floating tensor; an option of the wrong type.
        ValueError: no losses; an option out of range; a log_u of several numbers.
        RuntimeError: log_u on another device.

    Example:
        >>> import torch, pyloss
        >>> losses = torch.tensor([0.1, 0.2, 3.0], requires_grad=True)
        >>> loss, log_u = pyloss.functional.kl_dro_loss(losses, r=0.5)
        >>> loss.backward()
        >>> torch.testing.assert_close(losses.grad, (losses.detach() / 0.5).softmax(0))

    Reference:
        Sow et al. Doubly Robust Instance-Reweighted Adversarial Training. arXiv 2308.00311.
        Li et al. Tilted Empirical Risk Minimization. arXiv 2007.01162.
    """
    check_options(r=r, eta=eta, group=group)
    checks.check_floating("losses", losses)
    checks.check_supported("kl_dro_loss", losses)
    if losses.numel() == 0:
        raise ValueError(f"losses must hold at least one loss, got {list(losses.shape)}")
    dtype, acc = checks.result_dtype(losses.dtype, losses), accumulator_dtype(losses.dtype)
    log_u = _checked_log_u(log_u, losses, acc)

    log_mean = log_mean_exp(losses.reshape(-1).to(acc) / r)
    value, mass = r * log_mean, None
    log_g = log_mean.detach()
    if group is not None:
        from pyloss.functional import _contrastive_group as of_group  # with its first use

        log_g, log_share = of_group.log_mean_exp_of_all(log_g, losses.numel(), group)
    new = log_g if log_u is None or eta == 1 else moved(log_u, log_g, eta)
    if group is not None:
        mass = torch.exp(log_share - new)
    elif new is not log_g:
        mass = torch.exp(log_g - new)
    if mass is not None:
        value = r * log_g + mass * (value - value.detach())
    return value.to(dtype), new


def _checked_log_u(log_u, losses: Tensor, acc: torch.dtype) -> Tensor | None:
    if log_u is None:
        return None
    checks.check_floating("log_u", log_u)
    checks.check_device("log_u", log_u, losses, "losses")
    return checks.one_number("log_u", log_u).detach().to(acc)


def log_mean_exp(x: Tensor, share: Tensor | None = None) -> Tensor:
    """log of the mean of e^x, x (N,): also of numbers that are all but equal, whose logarithm of a
    sum would be no more exact than log N is. `share`: weights of the mean, which add up to 1."""
    m = x.detach().amax()
    m = torch.where(m.isfinite(), m, 0.0)
    if share is None:
        share = 1 / x.numel()
    u = x - m
    near = summed(torch.expm1(u) * share)
    far = summed(torch.exp(u) * share)
    is_near = near > -0.5
    near = torch.log1p(torch.where(is_near, near, 0.0))
    return m + torch.where(is_near, near, torch.log(torch.where(is_near, 1.0, far)))
