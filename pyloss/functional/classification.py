"""Losses on class scores: cross entropy and the comp-sum family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from pyloss.functional._checks import check_range
from pyloss.functional._options import options_of
from pyloss.functional._rows import RowStats, row_loss
from pyloss.ops.row_softmax import small

MixUpTarget = tuple[Tensor, Tensor, "float | Tensor"]


def fused_cross_entropy(
    input: Tensor,
    target: Tensor | MixUpTarget,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    tau: float = 1.0,
    truncate: float | None = None,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    return_stats: Sequence[str] = (),
    inplace: bool = False,
    empty: str = "nan",
    loss_dtype: torch.dtype | None = None,
    num_items: float | Tensor | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Cross entropy, and the comp-sum family that it belongs to, without N x C temporaries.

    A drop-in replacement of :func:`torch.nn.functional.cross_entropy`: the positional part of the
    signature is the same, so ``F.cross_entropy = pyloss.fused_cross_entropy`` works. Per row, with
    :math:`z = \mathrm{softcap}\cdot\tanh(\mathrm{logit\_scale}\cdot x/\mathrm{softcap})
    / \mathrm{temperature}` and :math:`L_c = -\log \mathrm{softmax}(z)_c`:

    .. math::
        \ell = k \Big( w_y\, \frac{e^{(1-\tau) L_y} - 1}{1-\tau}
               + \mathrm{z\_loss} \cdot \mathrm{lse}(z)^2
               + \mathrm{entropy\_weight} \cdot H(\mathrm{softmax}(z)) \Big),
        \qquad \tau = 1:\ \ell = k\,(w_y L_y + \dots)

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float32, bfloat16, float16 or
            float64. Any strides; half types are computed in float32. A ``DTensor`` gives a
            ``DTensor``: rows and classes may be split.
        target: one of

            - class indices ``()``, ``(N)`` or ``(N, d1, ..., dk)``; int64, uint8 or int32
            - class probabilities of the shape of ``input``, floating; differentiable
            - MixUp: ``(y, y2, lam)``, two index tensors and the weight of ``y`` against ``y2``, a
              number or a tensor that broadcasts to ``y``
        weight: weight of each class, ``(C)``, dtype of ``input`` or float32; differentiable with
            class probabilities.
        size_average: deprecated, see ``reduction``.
        ignore_index: rows with this target add nothing, and their logits are not read.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none" | "mean" | "sum"``. The mean divides by the sum of
            ``token_weight * weight[y]`` over the rows that are not ignored (the z-loss part by the
            sum of ``token_weight``); for probabilities by the number of rows.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1].
        tau: member of the comp-sum family, >= 0: 0 sum-exponential, 1 cross entropy, 1 + q
            generalized cross entropy with exponent q, 2 mean absolute error (1 - p_y).
        truncate: probability k in (0, 1]: where ``p_y <= k`` the loss is the constant it has at k,
            and has no gradient. Class indices and MixUp without label smoothing only.
        z_loss: coefficient of the squared log-normaliser, >= 0; typical 1e-4.
        entropy_weight: coefficient of the entropy of softmax(z), reduced as the z-loss is: < 0
            rewards a spread-out output, > 0 penalises it.
        softcap: bound of the logits, > 0; None: no bound.
        logit_scale: factor on the logits, before the cap.
        temperature: divides the logits after the cap, > 0.
        token_weight: weight of each row, shape of the targets; not differentiable.
        return_stats: any of ``"lse", "logprob", "entropy", "argmax", "correct", "rank", "z_loss"``;
            the result is then ``(loss, RowStats)``. The first three are differentiable.
        inplace: the backward writes the gradient over ``input``. ``input`` must not be a leaf, and
            nothing else may need its values for its backward: autograd raises if something does.
        empty: value of the mean over no rows, or of rows whose weights sum to 0: ``"nan"`` (as
            torch) or ``"zero"``.
        loss_dtype: dtype of the loss; default: that of ``input``, float32 under autocast.
        num_items: replaces the denominator of the mean; a number or a 0-d tensor. For gradient
            accumulation: the number of targets in all micro-batches.

    Returns:
        The loss: 0-d, or of the targets' shape with ``reduction="none"``; with ``return_stats`` the
        pair ``(loss, RowStats)``.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: batch sizes that differ, unknown ``reduction`` or statistic, an option out of
            its range.
        RuntimeError: shapes or dtypes of ``target``, ``weight``, ``token_weight`` that do not fit;
            ``label_smoothing`` outside [0, 1].
        IndexError: a class index out of range (CPU). On CUDA nothing is raised, which would need a
            synchronisation: loss and gradient of that row are NaN. ``PYLOSS_CHECK=1`` checks there
            too.
        NotImplementedError: integer logits.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(8, 100, requires_grad=True)
        >>> target = torch.randint(100, (8,))
        >>> loss = pyloss.fused_cross_entropy(logits, target, z_loss=1e-4)
        >>> loss.backward()
        >>> loss, stats = pyloss.fused_cross_entropy(logits, target, return_stats=["correct"])

    Reference:
        Mao, Mohri, Zhong. Cross-Entropy Loss Functions: Theoretical Analysis and Applications.
        arXiv 2304.07288.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if (
        not torch.compiler.is_compiling()  # first: a graph must not depend on the values below
        and weight is token_weight is truncate is softcap is loss_dtype is num_items is None
        and inplace is False
        and type(ignore_index) is int
        and (reduction == "mean" or reduction == "sum")
        and _are_plain(
            (
                label_smoothing,
                tau,
                z_loss,
                entropy_weight,
                logit_scale,
                temperature,
                return_stats,
                empty,
            )
        )
        and small.is_small(input, target)
    ):
        return small.small_row_softmax(input, target, ignore_index, reduction == "mean")
    return row_loss(
        input,
        target,
        inplace,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        tau=tau,
        truncate=truncate,
        z_loss=z_loss,
        entropy_weight=entropy_weight,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        token_weight=token_weight,
        return_stats=return_stats,
        empty=empty,
        loss_dtype=loss_dtype,
        num_items=num_items,
    )


_PLAIN = (0.0, 1.0, 0.0, 0.0, 1.0, 1.0, (), "nan")


def _are_plain(options: tuple) -> bool:
    try:
        return options == _PLAIN
    except (RuntimeError, ValueError):  # of several numbers; its name follows
        return False


# Where torch.jit.script meets it in place of F.cross_entropy, as in torch.nn.CrossEntropyLoss, it
# compiles torch's own: a script has no autograd of Python, and no option that torch does not have.
_torchs_own = torch.nn.functional.cross_entropy
fused_cross_entropy.__prepare_scriptable__ = lambda: _torchs_own


def comp_sum_loss(
    input: Tensor, target: Tensor | MixUpTarget, tau: float = 1.0, **kwargs
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Comp-sum loss: ``fused_cross_entropy`` with the member of the family named by position.

    .. math:: \Phi^\tau(u) = \frac{(1 + u)^{1 - \tau} - 1}{1 - \tau}, \qquad
              u = \sum_{j \ne y} e^{z_j - z_y}, \qquad \Phi^1(u) = \log(1 + u)

    Args:
        input: logits, as in :func:`fused_cross_entropy`.
        target: as there.
        tau: >= 0; 0 sum-exponential, 1 cross entropy, (1, 2) generalized cross entropy, 2 mean
            absolute error.
        **kwargs: every other argument of :func:`fused_cross_entropy`.

    Returns:
        As :func:`fused_cross_entropy`.

    Raises:
        ValueError: ``tau`` negative, infinite or NaN; and what :func:`fused_cross_entropy` raises.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 100), torch.randint(100, (8,))
        >>> mae = pyloss.comp_sum_loss(x, y, 2.0)
        >>> torch.testing.assert_close(mae, (1 - x.softmax(1)[range(8), y]).mean())

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    return fused_cross_entropy(input, target, tau=tau, **kwargs)


def focal_loss(
    input: Tensor,
    target: Tensor | MixUpTarget,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    return_stats: Sequence[str] = (),
    inplace: bool = False,
    empty: str = "nan",
    loss_dtype: torch.dtype | None = None,
    num_items: float | Tensor | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Multi-class focal loss: cross entropy that turns away from rows already well classified.

    .. math:: \ell = w_y\, (1 - p_y)^\gamma\, (-\log p_y)

    Args:
        input: logits, as in :func:`fused_cross_entropy`.
        target: class indices or a MixUp tuple, as there.
        gamma: focusing exponent, >= 0; 0 gives cross entropy.
        weight: weight of each class (the alpha of the paper), ``(C)``.
        ignore_index: rows with this target add nothing.
        reduction: ``"none" | "mean" | "sum"``, as in :func:`fused_cross_entropy`.
        z_loss, entropy_weight, softcap, logit_scale, temperature, token_weight, return_stats,
            inplace, empty, loss_dtype, num_items: as in :func:`fused_cross_entropy`.

    Returns:
        As :func:`fused_cross_entropy`.

    Raises:
        ValueError: ``gamma`` negative, infinite or NaN; probability targets; and what
            :func:`fused_cross_entropy` raises.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> pyloss.focal_loss(x, y, gamma=2.0).backward()

    Reference:
        Lin, Goyal, Girshick, He, Dollar. Focal Loss for Dense Object Detection. arXiv 1708.02002.
    """
    check_range("gamma", gamma, 0.0)
    _check_no_probabilities("focal_loss", target)
    return row_loss(
        input,
        target,
        inplace,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        gamma=gamma,
        z_loss=z_loss,
        entropy_weight=entropy_weight,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        token_weight=token_weight,
        return_stats=return_stats,
        empty=empty,
        loss_dtype=loss_dtype,
        num_items=num_items,
    )


def _check_no_probabilities(function: str, target) -> None:
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(f"{function} takes class indices or a MixUp tuple, not probabilities")


@options_of(focal_loss, without=("gamma",), positional=3)
def poly1_loss(
    input: Tensor, target: Tensor | MixUpTarget, epsilon: float = 1.0, **options: Any
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Poly-1: cross entropy with the first coefficient of its series in 1 - p changed.

    .. math:: \ell = w_y\, (-\log p_y + \epsilon\, (1 - p_y))
              = w_y \Big( (1 + \epsilon)(1 - p_y) + \tfrac12 (1 - p_y)^2 + \dots \Big)

    Args:
        input: logits, as in :func:`fused_cross_entropy`.
        target: class indices or a MixUp tuple, as there.
        epsilon: 0 gives cross entropy; > 0 adds to the slope of rows that are nearly right, down to
            -1 it takes from it.
        **options: as for :func:`focal_loss`.

    Returns:
        As :func:`fused_cross_entropy`.

    Raises:
        ValueError: ``epsilon`` infinite, NaN or below -1, where the loss would fall towards small
        p_y; probability targets; and what :func:`fused_cross_entropy` raises.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> pyloss.functional.poly1_loss(x, y, epsilon=2.0).backward()

    Reference:
        Leng, Tan, Liu, Cubuk, Shi, Cheng, Anguelov. PolyLoss. arXiv 2204.12511.
    """
    check_range("epsilon", epsilon, -1.0)
    _check_no_probabilities("poly1_loss", target)
    return row_loss(input, target, poly1=epsilon, **options)


@options_of(focal_loss, without=("gamma",), positional=3)
def label_relaxation_loss(
    input: Tensor, target: Tensor | MixUpTarget, alpha: float = 0.1, **options: Any
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Label relaxation: no loss once the label has the probability 1 - alpha; until then the
    divergence from the nearest distribution that gives it that much.

    .. math:: \ell = w_y \min_{q_y \ge 1 - \alpha} \mathrm{KL}(q, p)
              = w_y \Big( (1 - \alpha) \log \frac{1 - \alpha}{p_y}
                + \alpha \log \frac{\alpha}{1 - p_y} \Big) \text{ where } p_y < 1 - \alpha

    The other classes share alpha as the model itself does, where label smoothing makes them equal.

    Args:
        input: logits, as in :func:`fused_cross_entropy`.
        target: class indices or a MixUp tuple, as there.
        alpha: in [0, 1); 0 gives cross entropy.
        **options: as for :func:`focal_loss`.

    Returns:
        As :func:`fused_cross_entropy`.

    Raises:
        ValueError: ``alpha`` outside [0, 1); probability targets; and what
        :func:`fused_cross_entropy` raises.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> pyloss.functional.label_relaxation_loss(x, y, alpha=0.1).backward()

    Reference:
        Lienen, Huellermeier. From Label Smoothing to Label Relaxation. AAAI 2021.
    """
    check_relaxation(alpha)
    _check_no_probabilities("label_relaxation_loss", target)
    return row_loss(input, target, relaxation=alpha, **options)


def check_relaxation(alpha) -> None:
    check_range("alpha", alpha, 0.0)
    if not alpha < 1.0:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}")
