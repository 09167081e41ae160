"""Losses on class scores: cross entropy and the comp-sum family."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction

from pyloss.ops import row_softmax as op

MixUpTarget = tuple[Tensor, Tensor, "float | Tensor"]

_FLOAT_STATS = ("lse", "logprob", "entropy", "z_loss")
_INDEX_STATS = ("argmax", "correct", "rank")
_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX_DTYPES = (torch.int64, torch.uint8, torch.int32)

# The names that torch's own messages use.
_SCALAR_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}


class RowStats(NamedTuple):
    """Per-row statistics that ``fused_cross_entropy(..., return_stats=...)`` returns.

    Every field has the shape of the targets; fields that were not asked for are None. Ignored rows
    hold 0 (argmax: -1; correct: False). With z the transformed logits and p = softmax(z):

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(4, 10), torch.randint(10, (4,))
        >>> loss, stats = pyloss.fused_cross_entropy(x, y, return_stats=("lse", "correct"))
        >>> stats.lse.shape, stats.correct.dtype
        (torch.Size([4]), torch.bool)
    """

    lse: Tensor | None = None  # log sum exp(z); differentiable
    logprob: Tensor | None = None  # log p_y; differentiable
    entropy: Tensor | None = None  # -sum p log p; differentiable
    argmax: Tensor | None = None  # first index of the largest z, int64
    correct: Tensor | None = None  # argmax == y, bool
    rank: Tensor | None = None  # number of classes with z_j > z_y, int64
    z_loss: Tensor | None = None  # z_loss * lse^2


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
               + \mathrm{z\_loss} \cdot \mathrm{lse}(z)^2 \Big),
        \qquad \tau = 1:\ \ell = k\,(w_y L_y + \dots)

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float32, bfloat16, float16 or
            float64. Any strides; half types are computed in float32.
        target: one of

            - class indices ``()``, ``(N)`` or ``(N, d1, ..., dk)``; int64, uint8 or int32
            - class probabilities of the shape of ``input``, floating; differentiable
            - MixUp: ``(y, y2, lam)``, two index tensors and the weight of ``y`` against ``y2``, a
              number or a tensor that broadcasts to ``y``
        weight: weight of each class, ``(C)``, dtype of ``input`` or float32.
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
    return _row_loss(
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
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        token_weight=token_weight,
        return_stats=return_stats,
        empty=empty,
        loss_dtype=loss_dtype,
        num_items=num_items,
    )


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
        z_loss, softcap, logit_scale, temperature, token_weight, return_stats, inplace, empty,
            loss_dtype, num_items: as in :func:`fused_cross_entropy`.

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
    _check_range("gamma", gamma, 0.0)
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError("focal_loss takes class indices or a MixUp tuple, not probabilities")
    return _row_loss(
        input,
        target,
        inplace,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        gamma=gamma,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        token_weight=token_weight,
        return_stats=return_stats,
        empty=empty,
        loss_dtype=loss_dtype,
        num_items=num_items,
    )


class Prepared(NamedTuple):
    """The checked arguments of a row loss as the op takes them, and what its result still needs."""

    labels: tuple[Tensor | None, ...]  # target, target2, mix, weight, token_weight
    options: op.Options | None
    codes: op.Codes
    loss_dtype: torch.dtype
    wants: int
    return_stats: tuple[str, ...]
    divisor: Tensor | None  # of the sum; a number is in the options
    empty: str

    @property
    def op_dtype(self) -> torch.dtype:
        """Of the op's loss: divided before it is rounded to its dtype."""
        if self.divisor is None:
            return self.loss_dtype
        return torch.float64 if self.loss_dtype == torch.float64 else torch.float32


def prepare(
    input,
    target,
    *,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    tau=1.0,
    gamma=None,
    truncate=None,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    temperature=1.0,
    token_weight=None,
    return_stats=(),
    empty="nan",
    loss_dtype=None,
    num_items=None,
) -> tuple[Tensor, Prepared]:
    """Checks the arguments of a row loss in torch's order and packs them.

    Of `input`, the logits, only shape, dtype and device are looked at. Returns them, as float64
    where the probabilities are. `gamma` selects the focal loss.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if reduction not in op.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if loss_dtype is not None and loss_dtype not in _INPUT_DTYPES:
        raise ValueError(f"loss_dtype must be a floating dtype, got {loss_dtype}")

    target2 = mix = None
    if isinstance(target, Tensor):
        kind = op.DENSE if target.is_floating_point() else op.INDEX
    else:
        kind = op.MIX
        target, target2, lam = _checked_mixup(target)
    if kind == op.DENSE:
        _check_probabilities(input, target, ignore_index)
        result_dtype = torch.promote_types(input.dtype, target.dtype)
        if result_dtype == torch.float64:
            input, target = input.double(), target.double()
    else:
        result_dtype = input.dtype
        _check_labels(input, target, "target")
        if kind == op.MIX:
            _check_labels(input, target2, "target[1]")
            mix = _broadcast_mix(lam, target, input.dtype)
        # The CPU kernels look at every label anyway.
        if not input.is_cpu and os.environ.get("PYLOSS_CHECK", "0") not in ("", "0"):
            _check_label_values(input, target, target2, ignore_index)
    _check_device("target", target, input)
    if target2 is not None:
        _check_device("target[1]", target2, input)
    if input.dtype not in _INPUT_DTYPES:
        raise NotImplementedError(
            f"\"fused_cross_entropy\" not implemented for '{_scalar_name(input.dtype)}'"
        )
    if loss_dtype is None:
        loss_dtype = result_dtype
        if loss_dtype in (torch.bfloat16, torch.float16) and _autocast(input):
            loss_dtype = torch.float32
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    classes = input.shape[0 if input.dim() == 1 else 1]
    if classes == 0 and (target.numel() > 0 or kind == op.DENSE):
        raise IndexError("input has no classes: cannot take a softmax over a dimension of size 0")
    if weight is not None:
        weight = _checked_weight(weight, input, classes, acc)
    if token_weight is not None:
        token_weight = _checked_token_weight(token_weight, input, target, kind, acc)

    # gamma = 0 is cross entropy, where the focal derivatives would be 0 * inf.
    loss = op.FOCAL if gamma else op.COMP_SUM
    options = _packed_options(
        label_smoothing,
        tau,
        gamma or 0.0,
        truncate,
        z_loss,
        softcap,
        logit_scale,
        temperature,
        kind,
    )
    divisor = None
    if num_items is not None:
        if reduction == "mean":
            options, reduction, divisor = _packed_num_items(num_items, options, reduction)
        elif not isinstance(num_items, Tensor):
            _check_number("num_items", num_items)
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', got {empty!r}")
    codes = op.Codes(kind, ignore_index, loss, op.REDUCTIONS[reduction], int(empty == "zero"))
    return_stats = return_stats if isinstance(return_stats, str) else tuple(return_stats)
    wants = _checked_stats(return_stats, kind) if return_stats else 0
    labels = (target, target2, mix, weight, token_weight)
    return input, Prepared(labels, options, codes, loss_dtype, wants, return_stats, divisor, empty)


def _row_loss(input, target, inplace, **arguments):
    """Checks and packs the arguments, calls the op, names the statistics."""
    input, p = prepare(input, target, **arguments)
    if inplace:
        inplace = _checked_inplace(input)
    value, extras, index = op.row_softmax(
        input, *p.labels, p.options, p.codes, p.op_dtype, p.wants, inplace
    )
    if p.divisor is not None:
        divisor = p.divisor.to(p.op_dtype)
        value = value / divisor
        if p.empty == "zero":
            value = torch.where(divisor == 0, 0.0, value)
        value = value.to(p.loss_dtype)
    if not p.return_stats:
        return value
    return value, named_stats(p, extras, index, _row_shape(input, p.labels[0]))


def _autocast(input: Tensor) -> bool:
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def _scalar_name(dtype: torch.dtype) -> str:
    return _SCALAR_NAMES.get(dtype, str(dtype))


def _check_number(name: str, value) -> None:
    if torch.compiler.is_compiling():  # a changing number is a symbol there, of no Python type
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_range(name: str, value: float, low: float, open_low: bool = False) -> None:
    _check_number(name, value)
    # Comparisons alone: they are what torch.compile can do with a number that changes.
    if not (low < value if open_low else low <= value) or not value < math.inf:
        bound = f"> {low:g}" if open_low else f">= {low:g}"
        raise ValueError(f"{name} must be finite and {bound}, got {value}")


def _checked_mixup(target):
    if not isinstance(target, tuple):
        raise TypeError(
            f"target must be a Tensor or a MixUp tuple (y, y2, lam), got {type(target).__name__}"
        )
    if len(target) != 3:
        raise ValueError(f"a MixUp target is (y, y2, lam), got {len(target)} items")
    y, y2, lam = target
    for name, t in (("target[0]", y), ("target[1]", y2)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if t.is_floating_point():
            raise RuntimeError(f"{name} must hold class indices, got {_scalar_name(t.dtype)}")
    if y.shape != y2.shape or y.dtype != y2.dtype:
        raise RuntimeError(
            f"the two labels of a MixUp target must agree, got {list(y.shape)} {y.dtype} and "
            f"{list(y2.shape)} {y2.dtype}"
        )
    return y, y2, lam


def _broadcast_mix(lam, target, dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(lam, Tensor):
        if lam.requires_grad:
            raise RuntimeError("the loss is not differentiable with respect to lam")
    else:
        _check_number("lam", lam)
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
    lam = torch.as_tensor(lam, dtype=acc, device=target.device)
    try:
        return lam.expand(target.shape)
    except RuntimeError:
        raise RuntimeError(
            f"lam of shape {list(lam.shape)} does not broadcast to the labels' {list(target.shape)}"
        ) from None


def _check_probabilities(input, target, ignore_index):
    if input.shape != target.shape:
        _check_batch(input, target)
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities to have the shape "
            f"of input, {list(input.shape)}, got {list(target.shape)}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")


def _check_batch(input, target):
    if input.dim() > 1 and (target.dim() == 0 or input.shape[0] != target.shape[0]):
        size = target.shape[0] if target.dim() else 1
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({size})."
        )


def _check_labels(input, target, name):
    if target.shape == input.shape and input.shape != (1,):
        raise RuntimeError(
            "Expected floating point type for target with class probabilities, got "
            f"{_scalar_name(target.dtype)}"
        )
    if target.dtype not in _INDEX_DTYPES:
        raise RuntimeError(
            f"expected {name} dtype to be Long or Byte, but got {_scalar_name(target.dtype)}"
        )
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a 0-d tensor")
    if input.dim() == 1:
        if target.dim() > 0:
            raise RuntimeError(
                f"0D {name} expected for 1D input of shape {list(input.shape)}, "
                f"got {list(target.shape)}"
            )
        return
    _check_batch(input, target)
    expected = (input.shape[0], *input.shape[2:])
    if target.shape != expected:
        raise RuntimeError(f"Expected target size {list(expected)}, got {list(target.shape)}")


def _check_label_values(input, target, target2, ignore_index):
    classes = input.shape[0 if input.dim() == 1 else 1]
    for labels in (target, target2):
        if labels is None:
            continue
        bad = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
        if bad.numel():
            raise IndexError(f"Target {int(bad.flatten()[0])} is out of bounds.")


def _checked_weight(weight, input, classes, acc):
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}"
        )
    if weight.dtype not in (input.dtype, torch.float32, acc):
        raise RuntimeError(
            f"expected scalar type {_scalar_name(input.dtype)} or Float for weight but found "
            f"{_scalar_name(weight.dtype)}"
        )
    _check_device("weight", weight, input)
    _check_constant("weight", weight)
    return weight.to(acc)


def _checked_token_weight(token_weight, input, target, kind, acc):
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"token_weight must be a Tensor, got {type(token_weight).__name__}")
    rows = target.shape if kind != op.DENSE else (*input.shape[:1], *input.shape[2:])
    rows = () if input.dim() == 1 else tuple(rows)
    if tuple(token_weight.shape) != rows:
        raise RuntimeError(
            f"token_weight must have the targets' shape {list(rows)}, "
            f"got {list(token_weight.shape)}"
        )
    _check_device("token_weight", token_weight, input)
    _check_constant("token_weight", token_weight)
    return token_weight.to(acc)


def _check_device(name, t, input):
    if t.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {t.device} and input "
            f"on {input.device}"
        )


def _check_constant(name, t):
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"the loss is not differentiable with respect to {name}")


def _packed_options(
    label_smoothing, tau, gamma, truncate, z_loss, softcap, logit_scale, temperature, kind
):
    if (
        label_smoothing == 0.0
        and tau == 1.0
        and gamma == 0.0
        and truncate is None
        and z_loss == 0.0
        and softcap is None
        and logit_scale == 1.0
        and temperature == 1.0
    ):
        return None
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    _check_range("tau", tau, 0.0)
    _check_range("z_loss", z_loss, 0.0)
    _check_range("temperature", temperature, 0.0, open_low=True)
    _check_range("logit_scale", logit_scale, -math.inf)
    if softcap is not None:
        _check_range("softcap", softcap, 0.0, open_low=True)
    max_nll = math.inf
    if truncate is not None:
        _check_range("truncate", truncate, 0.0, open_low=True)
        if truncate > 1.0:
            raise ValueError(f"truncate must be a probability in (0, 1], got {truncate}")
        if kind == op.DENSE or label_smoothing > 0.0:
            raise ValueError("truncate needs class indices without label smoothing")
        max_nll = -math.log(truncate)
    return op.Options(
        float(logit_scale),
        float(softcap or 0.0),
        float(temperature),
        float(tau),
        max_nll,
        float(gamma),
        float(z_loss),
        float(label_smoothing),
        0.0,
    )


def _packed_num_items(num_items, options, reduction):
    """(options, reduction, tensor to divide by): a number goes into the kernel."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {list(num_items.shape)}")
        return options, "sum", num_items.reshape(())
    _check_range("num_items", num_items, 0.0, open_low=True)
    return (options or op.PLAIN)._replace(num_items=float(num_items)), reduction, None


def _checked_inplace(input):
    if not (torch.is_grad_enabled() and input.requires_grad):
        return False
    if input.is_leaf:
        raise RuntimeError("inplace=True: input is a leaf, its values would become gradients")
    if any(s == 0 and n > 1 for s, n in zip(input.stride(), input.shape)):
        raise RuntimeError("inplace=True: elements of an expanded input share memory")
    # A compiled graph plans its own buffers and may already reuse this one.
    return not torch.compiler.is_compiling()


def _checked_stats(return_stats, kind):
    if isinstance(return_stats, str):
        raise TypeError("return_stats must be a sequence of names, got one string")
    for name in return_stats:
        if name not in RowStats._fields:
            raise ValueError(
                f"unknown statistic {name!r} in return_stats; known: {', '.join(RowStats._fields)}"
            )
        if kind == op.DENSE and name in ("logprob", "correct", "rank"):
            raise ValueError(f"return_stats: {name!r} needs class indices, not probabilities")
    return op.WANT_EXTRAS * any(n in _FLOAT_STATS for n in return_stats) + op.WANT_INDEX * any(
        n in _INDEX_STATS for n in return_stats
    )


def _row_shape(input, target) -> tuple[int, ...]:
    shape = (*input.shape[:1], *input.shape[2:]) if target.is_floating_point() else target.shape
    return () if input.dim() == 1 else tuple(shape)


def named_stats(p: Prepared, extras, index, shape) -> RowStats:
    """The statistics that were asked for, each of the given shape."""
    found = {}
    for name in p.return_stats:
        if name in _FLOAT_STATS:
            row = extras[_FLOAT_STATS.index(name)].view(shape)
            found[name] = row.detach() if name == "z_loss" else row
        elif name == "correct":
            argmax = index[0].view(shape)
            # -1 may be the ignored label
            found[name] = (argmax == p.labels[0].reshape(shape)) & (argmax >= 0)
        else:
            found[name] = index[("argmax", "rank").index(name)].view(shape)
    return RowStats(**found)
