"""The batch perceptron, plain and normalized: what gradient descent on the logistic loss becomes
with large steps (Tyurin, arXiv 2412.08424)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.functional import _checks as checks

__all__ = ["Perceptron", "batch_perceptron", "normalized_batch_perceptron"]


class Perceptron(NamedTuple):
    """A linear classifier, and how it was found.

    Example:
        >>> import torch
        >>> from pyloss.research.perceptron import batch_perceptron
        >>> theta, iterations, separates = batch_perceptron(torch.tensor([[2.0, 0.0]]))
        >>> theta, separates
        (tensor([1., 0.]), True)
    """

    theta: Tensor  #: (D,)
    iterations: int  #: of the points that were tried, the first one included
    separates: bool  #: whether all margins are > 0


def batch_perceptron(z: Tensor, max_iter: int = 100_000) -> Perceptron:
    r"""Adds up the samples that are on the wrong side.

    .. math:: \theta_1 = \frac{1}{2n} \sum_i z_i, \qquad
              \theta_{t+1} = \theta_t + \frac1n \sum_{i:\, z_i \theta_t \le 0} z_i

    It is the limit of gradient descent on the logistic loss, :math:`\theta / \gamma` as the step
    :math:`\gamma` grows, and separates after at most :math:`n R^2 / \mu^2` updates.

    Args:
        z: samples times their labels -1 and +1, ``(N, D)``, floating.
        max_iter: where to stop if they are not separable.

    Returns:
        :class:`Perceptron`.

    Raises:
        TypeError: z that is no floating tensor, max_iter no integer. ValueError: z of another shape
            or without samples, max_iter < 1.

    Example:
        >>> import torch
        >>> from pyloss.research.perceptron import batch_perceptron
        >>> batch_perceptron(torch.tensor([[1.0, 0.5], [0.5, 1.0]])).iterations
        1

    Reference:
        Tyurin. From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent
        with Large Step Sizes. arXiv 2412.08424.
    """
    return _run(z, max_iter, normalize=False)


def normalized_batch_perceptron(z: Tensor, max_iter: int = 100_000) -> Perceptron:
    r"""The same with the mean over the samples on the wrong side, in at most
    :math:`R^2 / \mu^2` updates.

    Args:
        z, max_iter: as for :func:`batch_perceptron`.

    Returns:
        :class:`Perceptron`.

    Raises:
        TypeError: z that is no floating tensor, max_iter no integer. ValueError: z of another shape
            or without samples, max_iter < 1.

    Example:
        >>> import torch
        >>> from pyloss.research.perceptron import normalized_batch_perceptron
        >>> normalized_batch_perceptron(torch.tensor([[1.0, 0.5], [0.5, 1.0]])).separates
        True

    Reference:
        Tyurin. From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent
        with Large Step Sizes. arXiv 2412.08424.
    """
    return _run(z, max_iter, normalize=True)


def _run(z: Tensor, max_iter: int, normalize: bool) -> Perceptron:
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z must be a floating Tensor, got {getattr(z, 'dtype', type(z).__name__)}")
    if z.dim() != 2 or z.shape[0] == 0:
        raise ValueError(f"z must be (N, D) with at least one sample, got {list(z.shape)}")
    if checks.checked_integer("max_iter", max_iter) < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    z = z.detach()
    theta = z.mean(0) if normalize else z.mean(0) / 2
    for iteration in range(1, max_iter + 1):
        wrong = ~(z @ theta > 0)  # NaN is on no side
        if not wrong.any():
            return Perceptron(theta, iteration, True)
        if iteration < max_iter:
            step = z[wrong].sum(0)
            theta = theta + step / (wrong.sum() if normalize else len(z))
    return Perceptron(theta, max_iter, False)
