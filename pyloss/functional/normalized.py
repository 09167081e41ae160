"""The normalized logistic loss: gradient descent that goes over into the perceptron."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sums import summed
from pyloss.functional.ensemble import margins
from pyloss.functional.row_stats import row_softmax_stats


def normalized_logistic_loss(input: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    r"""Logistic loss whose gradient is divided by the mean probability of being wrong.

    .. math::
        L = \frac1n \sum_i -\log p_{i y_i}, \qquad
        \nabla = \frac{\sum_i (1 - p_{i y_i})\, \nabla h_i}{\sum_i (1 - p_{i y_i})}, \qquad
        h_i = \log \sum_{j \ne y_i} e^{x_{ij}} - x_{i y_i}

    The plain gradient is the numerator over n, and shrinks with the loss; this one does not. With
    ``torch.optim.SGD`` it is normalized gradient descent: on separable data it finds a separator
    after :math:`R^2 / \mu^2 + 2 \log(2n - 1) / (\gamma \mu^2)` steps of any size
    :math:`\gamma`, and for large ones it is the normalized batch perceptron. Weights are formed as
    logarithms, so that no step is too large.

    Args:
        input: scores ``(N, C)`` or ``(N, C, d1, ..)``, C >= 2; or, binary, ``(N,)`` or ``(N, 1)``.
        target: classes ``(N)`` or ``(N, d1, ..)``; binary: 0 and 1, ``(N,)`` or as ``input``.
        ignore_index: rows with this target do not count; of several classes only.

    Returns:
        The mean of the logistic loss, 0-d, with the gradient above; dtype of ``input``, float32 for
        half types under autocast. Further derivatives take the weights for constants. Of no rows:
        NaN, as torch has it, and no gradient.

    Raises:
        TypeError: scores that are no floating tensor.
        ValueError: shapes that do not fit, one class, targets that are not 0 or 1 (binary, CPU).
        IndexError: a class out of range (CPU).
        RuntimeError: tensors on several devices, targets of a wrong dtype.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(100, 2), torch.randint(2, (100,))
        >>> w = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=10.0)
        >>> pyloss.functional.normalized_logistic_loss(x @ w, y).backward()
        >>> optimizer.step()

    Reference:
        Tyurin. From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent
        with Large Step Sizes. arXiv 2412.08424.
    """
    checks.check_floating("input", input)
    checks.check_supported("normalized_logistic_loss", input)
    if input.dim() == 1 or (input.dim() == 2 and input.shape[1] == 1):
        z, dtype = margins(input, target)
        h, counted = -z.reshape(-1), None
    else:
        h, counted = _behind(input, target, ignore_index)
        dtype = checks.result_dtype(input.dtype, input)
    return _normalized(h, counted, dtype)


def _behind(input: Tensor, target, ignore_index) -> tuple[Tensor, Tensor]:
    """(h, which rows count), of the shape of the rows each."""
    checks.check_has_dimension("input", input)
    classes = input.shape[1]
    if classes < 2:
        raise ValueError(f"input must have at least two classes, got {list(input.shape)}")
    checks.check_tensor("target", target)
    expected = input.shape[:1] + input.shape[2:]
    if target.shape != expected:
        raise ValueError(f"target must have the shape {list(expected)}, got {list(target.shape)}")
    scores = input.movedim(1, -1)
    stats = row_softmax_stats(scores, target, without_target=True, ignore_index=ignore_index)
    assert stats.nll is not None
    return stats.nll, target != ignore_index


def _normalized(h: Tensor, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
    each, log_miss = F.softplus(h.detach()), F.logsigmoid(h.detach())
    if counted is not None:
        each = torch.where(counted, each, 0.0)
        log_miss = torch.where(counted, log_miss, -torch.inf)
    count = h.shape[0] if counted is None else counted.sum()
    most = log_miss.amax() if h.numel() else log_miss.sum()
    weights = torch.exp(log_miss - torch.where(most == -torch.inf, 0.0, most))
    weights = weights / summed(weights).clamp(min=torch.finfo(h.dtype).tiny)
    pull = torch.where(h.detach().isinf(), 0.0, h - h.detach())
    return (summed(each) / count + summed(weights * pull)).to(dtype)
