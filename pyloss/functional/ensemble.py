"""EnsLoss: an ensemble of calibrated losses, one drawn in each step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sums import reduced
from pyloss.ops._launch import accumulator_dtype

_LEAST = 1e-6  # magnitude of a derivative: they are strictly negative


def check_options(*, bc_lambda=0.0, tail=True, reduction="mean", generator=None) -> None:
    """Those of ens_loss, also for its module."""
    if isinstance(bc_lambda, Tensor):
        checks.check_floating("bc_lambda", bc_lambda)
        checks.one_number("bc_lambda", bc_lambda)
    else:
        checks.check_number("bc_lambda", bc_lambda)
        if not -math.inf < bc_lambda < math.inf:
            raise ValueError(f"bc_lambda must be finite, got {bc_lambda}")
    checks.checked_flag("tail", tail)
    checks.check_reduction(reduction)
    checks.check_generator(generator)


def ens_loss_derivatives(
    z: Tensor,
    *,
    bc_lambda: float | Tensor = 0.0,
    tail: bool = True,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Derivatives of a random convex and calibrated loss at given margins.

    .. math:: r_i = -\min\left(1, \mathrm{BC}_\lambda^{-1}(e_i)\right), \quad e_i \sim N(0, 1),
              \qquad \mathrm{BC}_\lambda^{-1}(e) = (1 + \lambda e)_+^{1/\lambda}, \quad
              \mathrm{BC}_0^{-1}(e) = e^e

    sorted, the smallest for the smallest margin: the derivative does not decrease with the margin,
    and so is that of a convex function. Where z > 1 it is divided by z (``tail``), and it is never
    above -1e-6, so that the loss is calibrated.

    Args:
        z: margins ``(N,)`` or ``(N, 1)``, floating.
        bc_lambda: parameter of the inverse Box-Cox transform, a number or a tensor of one.
        tail: lets derivatives beyond margin 1 decay.
        generator: of the random numbers, on the device of z; default: torch's own.
        noise: e in their place, of the shape of z.

    Returns:
        Of the shape of z, float32 or float64, without a gradient; NaN where z is.

    Raises:
        TypeError, ValueError: as :func:`ens_loss`.

    Example:
        >>> import torch, pyloss
        >>> z = torch.tensor([-1.0, 0.5, 3.0])
        >>> g = pyloss.functional.ens_loss_derivatives(z)
        >>> bool((g < 0).all() and (g.diff() >= 0).all())
        True

    Reference:
        Dai. EnsLoss: Stochastic Calibrated Loss Ensembles. arXiv 2409.00908.
    """
    check_options(bc_lambda=bc_lambda, tail=tail, generator=generator)
    _check_scores("z", z)
    return _derivatives(z, bc_lambda, tail, generator, noise)


def _derivatives(z: Tensor, bc_lambda, tail: bool, generator, noise) -> Tensor:
    given = z
    z = z.detach().to(accumulator_dtype(z.dtype)).reshape(-1)
    if noise is None:
        # Named, even as None, a generator keeps graphs from taking batches of any size.
        e = (
            torch.randn_like(z)
            if generator is None
            else z.new_empty(z.shape).normal_(generator=generator)
        )
    else:
        checks.check_floating("noise", noise)
        checks.check_device("noise", noise, given, "the scores")
        if noise.shape != given.shape:
            raise ValueError(
                f"noise must have the shape of the scores, {list(given.shape)}, got "
                f"{list(noise.shape)}"
            )
        e = noise.detach().to(z.dtype).reshape(-1)
    r = -_inverse_box_cox(e, bc_lambda).clamp(max=1)
    order = z.argsort(stable=True)
    g = torch.zeros_like(z).scatter(0, order, r.sort().values)
    if tail:
        g = g / z.clamp(min=1)
    return (torch.where(z.isnan(), z, g) - _LEAST).reshape(given.shape)


def _inverse_box_cox(e: Tensor, bc_lambda: float | Tensor) -> Tensor:
    """May be infinite, below the singularity of a negative lambda."""
    if not isinstance(bc_lambda, Tensor):
        if bc_lambda == 0:
            return e.exp()
        return (1 + bc_lambda * e).clamp(min=0) ** (1 / bc_lambda)
    value = bc_lambda.detach().reshape(()).to(e)
    plain = value == 0
    value = torch.where(plain, 1.0, value)
    return torch.where(plain, e.exp(), (1 + value * e).clamp(min=0) ** (1 / value))


def ens_loss(
    input: Tensor,
    target: Tensor,
    *,
    bc_lambda: float | Tensor = 0.0,
    tail: bool = True,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""EnsLoss: one step of stochastic gradient descent on a random calibrated loss.

    .. math:: \ell_i = \mathrm{sg}(g_i)\, z_i, \qquad z_i = (2 y_i - 1) f_i, \qquad
              \frac{\partial \ell_i}{\partial f_i} = (2 y_i - 1)\, g_i

    for binary classification, with the derivatives g of :func:`ens_loss_derivatives`, drawn anew in
    each call. Like dropout of losses: no single surrogate is fitted.

    Args:
        input: scores f, ``(N,)`` or ``(N, 1)``, floating.
        target: 0 or 1, of the shape of ``input`` or ``(N,)``; bool, integer or floating.
        bc_lambda, tail, generator, noise: as for :func:`ens_loss_derivatives`.
        reduction: ``"mean" | "sum" | "none"``.

    Returns:
        A number to call ``backward`` on, 0-d or of the shape of ``input``; dtype of ``input``,
        float32 for half types under autocast. It is no risk, and may be negative or rise while the
        model gets better: look at accuracy or at another loss.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit; targets that are not 0 or 1 (CPU); an option out of
            range.
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> f, y = torch.randn(16, requires_grad=True), torch.randint(2, (16,))
        >>> pyloss.functional.ens_loss(f, y).backward()

    Reference:
        Dai. EnsLoss: Stochastic Calibrated Loss Ensembles. arXiv 2409.00908.
    """
    check_options(bc_lambda=bc_lambda, tail=tail, reduction=reduction, generator=generator)
    z, dtype = margins(input, target)
    return reduced(_derivatives(z, bc_lambda, tail, generator, noise) * z, reduction).to(dtype)


def binary_cross_entropy(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Of the same arguments: what the module shows of a model that is not trained."""
    z, dtype = margins(input, target)
    return reduced(F.softplus(-z), reduction).to(dtype)


def margins(input: Tensor, target: Tensor) -> tuple[Tensor, torch.dtype]:
    """(z = +-f of the sums' dtype, dtype of the loss) of checked arguments."""
    _check_scores("input", input)
    checks.check_tensor("target", target)
    if target.shape != input.shape and target.shape != input.shape[:1]:
        raise ValueError(
            f"target must have the shape of input, {list(input.shape)}, got {list(target.shape)}"
        )
    checks.check_device("target", target, input)
    checks.check_constant("target", target)
    if target.is_complex():
        raise TypeError(f"target must be bool, integer or floating, got {target.dtype}")
    if checks.can_look_at(target):
        bad = target[(target != 0) & (target != 1)]
        bad = bad[bad == bad] if bad.is_floating_point() else bad  # NaN gives NaN
        if bad.numel():
            raise ValueError(f"target must hold 0 and 1, got {bad.view(-1)[0].item():g}")
    acc = accumulator_dtype(input.dtype)
    sign = 2 * target.detach().reshape(input.shape).to(acc) - 1
    return sign * input.to(acc), checks.result_dtype(input.dtype, input)


def _check_scores(name: str, x) -> None:
    checks.check_floating(name, x)
    checks.check_supported("ens_loss", x)
    if not (x.dim() == 1 or (x.dim() == 2 and x.shape[1] == 1)):
        raise ValueError(f"{name} must be (N,) or (N, 1), got {list(x.shape)}")
