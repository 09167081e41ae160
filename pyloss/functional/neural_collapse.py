"""Losses of free features: the model in which neural collapse is studied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._neural_collapse import checked_decay
from pyloss.functional._row_checks import check_labels, check_rows
from pyloss.ops._launch import accumulator_dtype


def ufm_loss(
    weights: Tensor | Sequence[Tensor],
    features: Tensor,
    target: Tensor,
    lam_w: float | Sequence[float],
    lam_h: float,
    loss: str = "mse",
    bias: Tensor | None = None,
) -> Tensor:
    r"""The loss of the unconstrained features model: linear layers on features that are free.

    .. math:: L = \frac{1}{2 N} \|Z - Y\|^2 + \sum_j \frac{\lambda_{W_j}}{2} \|W_j\|^2 +
              \frac{\lambda_H}{2} \|H\|^2, \qquad Z = H W_1^\top \cdots W_M^\top + b

    with one-hot labels Y; with ``loss="ce"`` the first term is the mean cross entropy of the logits
    Z. Features are optimised as the weights are, as if a network could make any. The minima:
    :func:`pyloss.analysis.ufm_minimizer`.

    Args:
        weights: W, first layer first, each ``(out, in)``; or the one that there is. The last has a
            row for each of K classes.
        features: H ``(N, D)``, floating.
        target: class indices ``(N,)``.
        lam_w: weight decay of all layers or of each, >= 0.
        lam_h: of the features, >= 0.
        loss: ``"mse"`` or ``"ce"``.
        bias: b ``(K,)``, which has no decay; None: none.

    Returns:
        0-d, of the dtype of ``features``, float32 for half types under autocast; computed in
        float32 at least. NaN without samples. Differentiable twice in weights, features and bias.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shapes that do not fit, an option out
            of range. IndexError: a label that is no class (CPU).

    Example:
        >>> import torch, pyloss
        >>> h, w = torch.randn(12, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
        >>> y = torch.arange(12) % 3
        >>> pyloss.functional.ufm_loss(w, h, y, lam_w=5e-3, lam_h=5e-4).backward()

    Reference:
        Dang et al. Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.
        arXiv 2301.00437.
    """
    layers = (weights,) if isinstance(weights, Tensor) else tuple(weights)
    classes = _check(layers, features, target, bias)
    decay = checked_decay("lam_w", lam_w, len(layers))
    checks.check_range("lam_h", lam_h, 0.0)
    checks.check_one_of("loss", loss, ("mse", "ce"))
    acc = accumulator_dtype(features.dtype)
    with checks.without_autocast(features):
        x = features.to(acc)
        z, penalty = x, float(lam_h) / 2 * x.square().sum()
        for lam, layer in zip(decay, layers):
            w = layer.to(acc)
            z, penalty = z @ w.mT, penalty + lam / 2 * w.square().sum()
        if bias is not None:
            z = z + bias.to(acc)
        if loss == "ce":
            fit = torch.nn.functional.cross_entropy(z, target.long())
        else:
            there = target.long().unsqueeze(1) == torch.arange(classes, device=target.device)
            fit = (z - there.to(acc)).square().sum() / (2 * x.shape[0])
    return (fit + penalty).to(checks.result_dtype(features.dtype, features))


def _check(layers: tuple, features, target, bias) -> int:
    """The number of classes."""
    check_rows("features", features)
    check_labels(target, features, "target", "features")
    if not layers:
        raise ValueError("weights must hold at least one layer, got none")
    width = features.shape[1]
    for w in layers:
        checks.check_floating("weights", w)
        if w.dim() != 2 or w.shape[1] != width:
            raise ValueError(f"weights must be (out, {width}) there, got {list(w.shape)}")
        checks.check_device("weights", w, features, "features")
        width = w.shape[0]
    if bias is not None:
        checks.check_floating("bias", bias)
        if bias.shape != (width,):
            raise ValueError(f"bias must have the shape {[width]}, got {list(bias.shape)}")
        checks.check_device("bias", bias, features, "features")
    if checks.can_look_at(target):
        checks.check_index_values(target, width, -1 - width)
    return width
