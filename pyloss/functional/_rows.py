"""Arguments of a loss on rows of class scores: checked, packed for the op, its results named.

What :mod:`pyloss.functional.classification` has of logits, `linear` and `_vocab_parallel` have of
logits that are never whole; all three come here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import _checks as checks
from pyloss.functional._options import FormulaOptions, RowOptions
from pyloss.ops import row_softmax as op
from pyloss.ops._empty import divided
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.row_softmax.masses import ignored_rows

FLOAT_STATS = ("lse", "logprob", "entropy", "z_loss")
_INDEX_STATS = ("argmax", "correct", "rank")


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


# Public there, and shown there.
RowStats.__module__ = "pyloss.functional.classification"


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


def prepare(
    input,
    target,
    *,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    token_weight=None,
    return_stats=(),
    empty="nan",
    loss_dtype=None,
    num_items=None,
    no_classes=False,
    **formula: Unpack[FormulaOptions],
) -> tuple[Tensor, Prepared]:
    """Checks the arguments of a row loss in torch's order and packs them.

    Of `input`, the logits, only shape, dtype and device are looked at. Returns them, as float64
    where the probabilities are. Rows of no classes are refused, unless `no_classes`.
    """
    checks.check_tensor("input", input)
    checks.check_reduction(reduction, op.REDUCTIONS)
    if loss_dtype is not None:
        _check_loss_dtype(loss_dtype)
    if type(ignore_index) is not int:
        ignore_index = checked_ignore_index(ignore_index)
    smoothing = formula.get("label_smoothing", 0.0)
    if smoothing != 0.0:
        formula["label_smoothing"] = checked_smoothing(smoothing)

    target2 = mix = None
    if isinstance(target, Tensor):
        kind = op.DENSE if target.is_floating_point() else op.INDEX
    else:
        kind = op.MIX
        target, target2, lam = _checked_mixup(target)
    classes = 0 if input.dim() == 0 else input.shape[0 if input.dim() == 1 else 1]
    if kind == op.DENSE:
        check_probabilities(input, target, ignore_index)
        result_dtype = torch.promote_types(input.dtype, target.dtype)
        if result_dtype == torch.float64:
            input, target = input.double(), target.double()
    else:
        result_dtype = input.dtype
        check_labels(input, target, "target")
        if kind == op.MIX:
            check_labels(input, target2, "target[1]")
            mix = _broadcast_mix(lam, target, input.dtype)
        # The CPU kernels look at every label anyway.
        if not input.is_cpu and os.environ.get("PYLOSS_CHECK", "0") not in ("", "0"):
            for labels in (target,) if target2 is None else (target, target2):
                checks.check_index_values(labels, classes, ignore_index)
    checks.check_device("target", target, input)
    if target2 is not None:
        checks.check_device("target[1]", target2, input)
    checks.check_supported("fused_cross_entropy", input, ": input must be floating")
    if loss_dtype is None:
        loss_dtype = checks.result_dtype(result_dtype, input)
    rows_of_nothing = classes == 0 and (target.numel() > 0 or kind == op.DENSE)
    if rows_of_nothing and (return_stats or not no_classes):
        raise IndexError("input has no classes: cannot take a softmax over a dimension of size 0")
    if weight is not None:
        learned = kind == op.DENSE and weight.requires_grad and torch.is_grad_enabled()
        weight = _checked_weight(weight, input, classes, learned)
        if learned:
            target = _weighted(target, weight, formula.pop("label_smoothing", 0.0))
            weight = None
    if token_weight is not None:
        token_weight = _checked_token_weight(token_weight, input, target)

    numbers = _checked_formula(kind, **formula)
    divisor = items = None
    if num_items is not None:
        if reduction == "mean" and isinstance(num_items, Tensor):
            reduction, divisor = "sum", checks.one_number("num_items", num_items)
        elif reduction == "mean":
            checks.check_range("num_items", num_items, 0.0, open_low=True)
            items = float(num_items)
        elif not isinstance(num_items, Tensor):
            checks.check_number("num_items", num_items)
    options = None
    if numbers is not None or items is not None:
        options = op.Options(num_items=0.0 if items is None else items, **(numbers or {}))
    checks.check_empty(empty)
    # gamma = 0 is cross entropy, where the focal derivatives would be 0 * inf.
    loss = op.FOCAL if options is not None and options.gamma else op.COMP_SUM
    codes = op.Codes(kind, ignore_index, loss, op.REDUCTIONS[reduction], int(empty == "zero"))
    wants = 0
    if return_stats != ():
        return_stats, wants = _checked_stats(return_stats, kind)
    labels = (target, target2, mix, weight, token_weight)
    return input, Prepared(labels, options, codes, loss_dtype, wants, return_stats, divisor, empty)


def check_target_of(input, target) -> None:
    """The dtype and the shape of a target, in prepare's words; of `input` only the shape counts."""
    if isinstance(target, Tensor) and target.is_floating_point():
        check_probabilities(input, target, -100, "the logits")
        return
    pair = (target,) if isinstance(target, Tensor) else _checked_mixup(target)[:2]
    for name, labels in zip(("target", "target[1]"), pair):
        check_labels(input, labels, name)


def check_options(
    *,
    reduction="mean",
    ignore_index=-100,
    empty="nan",
    loss_dtype=None,
    return_stats=(),
    **formula: Unpack[FormulaOptions],
) -> None:
    """The checks of :func:`prepare` that need no tensor, for those who keep options for later."""
    checks.check_reduction(reduction, op.REDUCTIONS)
    if loss_dtype is not None:
        _check_loss_dtype(loss_dtype)
    checked_ignore_index(ignore_index)
    formula["label_smoothing"] = checked_smoothing(formula.get("label_smoothing", 0.0))
    checks.check_range("gamma", formula.get("gamma", 0.0), 0.0)
    _checked_formula(op.INDEX, **formula)
    checks.check_empty(empty)
    _checked_stats(return_stats, op.INDEX)


def with_smoothing(p: Prepared, smoothing: float) -> Prepared:
    """A copy. Not by _replace, which torch.compile cannot trace in every version of torch."""
    fields = zip(op.Options._fields, p.options)
    options = op.Options(*[smoothing if name == "smoothing" else x for name, x in fields])
    return Prepared(
        p.labels, options, p.codes, p.loss_dtype, p.wants, p.return_stats, p.divisor, p.empty
    )


def row_loss(input, target, inplace=False, **options: Unpack[RowOptions]):
    """Checks and packs the arguments, calls the op, names the statistics."""
    if type(input) is not Tensor and checks.is_dtensor(input):
        from pyloss.functional._row_dtensors import row_loss_of_dtensors

        return row_loss_of_dtensors(input, target, inplace, options)
    if isinstance(input, Tensor) and input.dim() == 1:
        target = without_batch(target)
    input, p = prepare(input, target, no_classes=True, **options)
    if inplace:
        inplace = _checked_inplace(input)
    # What is divided afterwards is rounded to its dtype afterwards.
    dtype = p.loss_dtype if p.divisor is None else accumulator_dtype(p.loss_dtype)
    if input.numel() == 0 and _has_no_classes(input):
        value, extras, index = _without_classes(input, p, dtype), None, None
    else:
        value, extras, index = op.row_softmax(
            input, *p.labels, p.options, p.codes, dtype, p.wants, inplace
        )
    if p.divisor is not None:
        value = divided(value, p.divisor.to(dtype), p.empty == "zero").to(p.loss_dtype)
    if not p.return_stats:
        return value
    return value, named_stats(p, extras, index, _row_shape(input, p.labels[0]))


def _has_no_classes(input) -> bool:
    return input.shape[0 if input.dim() == 1 else 1] == 0


def _without_classes(input, p: Prepared, dtype) -> Tensor:
    """The loss of rows of no classes, as torch has it: 0, and NaN for the mean of any number."""
    o, c = p.options or op.PLAIN, p.codes
    # Nothing, but of the rows' shape, and with a gradient.
    rows = input.sum(0 if input.dim() == 1 else 1, dtype=accumulator_dtype(input.dtype))
    ignored = ignored_rows(p.labels, c)
    if ignored is None:
        rows = rows + (math.inf if o.z_loss else 0.0)  # log of the sum of nothing
    else:
        if checks.can_look_at(input):
            checks.check_index_values(p.labels[0][~ignored], 0, c.ignore_index)
        rows = torch.where(ignored, rows, math.nan)
    if c.reduction == op.REDUCTIONS["none"]:
        return rows.to(dtype)
    total = rows.sum()
    if c.reduction == op.REDUCTIONS["mean"]:
        total = total / o.num_items if o.num_items else divided(total, total * 0, c.zero_if_empty)
    return total.to(dtype)


def without_batch(target):
    """torch takes a label of shape (1,) with one row of logits, and gives a 0-d loss."""
    if isinstance(target, Tensor) and target.shape == (1,) and not target.is_floating_point():
        return target.reshape(())
    return target


def _check_loss_dtype(dtype) -> None:
    if dtype not in checks.FLOATS:
        raise ValueError(f"loss_dtype must be a floating dtype, got {dtype}")


def checked_ignore_index(value) -> int:
    found = checks.as_integer(value)
    if found is None:
        kind = type(value).__name__
        raise TypeError(f"ignore_index must be an integer, got {value!r} ({kind})")
    return found


def checked_smoothing(value) -> float:
    """A number, or what torch takes for one."""
    if isinstance(value, (bool, Tensor)):
        value = float(value)
    checks.check_number("label_smoothing", value)
    if not 0.0 <= value <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {value}")
    return value


def _checked_mixup(target):
    if not isinstance(target, tuple):
        raise TypeError(
            f"target must be a Tensor or a MixUp tuple (y, y2, lam), got {type(target).__name__}"
        )
    if len(target) != 3:
        raise ValueError(f"a MixUp target is (y, y2, lam), got {len(target)} items")
    y, y2, lam = target
    for name, t in (("target[0]", y), ("target[1]", y2)):
        checks.check_tensor(name, t)
        if t.is_floating_point():
            raise RuntimeError(f"{name} must hold class indices, got {checks.scalar_name(t.dtype)}")
    if y.shape != y2.shape or y.dtype != y2.dtype:
        raise RuntimeError(
            f"the two labels of a MixUp target must agree, got {list(y.shape)} {y.dtype} and "
            f"{list(y2.shape)} {y2.dtype}"
        )
    # Dynamo refuses an autograd.Function that gets one tensor twice.
    return y, y2.view_as(y2) if y2 is y else y2, lam


def _broadcast_mix(lam, target, dtype):
    acc = accumulator_dtype(dtype)
    if isinstance(lam, Tensor):
        if lam.requires_grad:
            raise RuntimeError("the loss is not differentiable with respect to lam")
        lam = lam.to(target.device, acc)
    else:
        checks.check_number("lam", lam)
        if not 0.0 <= lam <= 1.0:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
        if torch.compiler.is_compiling():
            # A product with a number that changes stays in the graph, a tensor made of it does not.
            lam = torch.ones((), dtype=acc, device=target.device) * lam
        else:  # a copy from the host would wait for a GPU
            lam = torch.full((), lam, dtype=acc, device=target.device)
    try:
        return lam.expand(target.shape)
    except RuntimeError:
        raise RuntimeError(
            f"lam of shape {list(lam.shape)} does not broadcast to the labels' {list(target.shape)}"
        ) from None


def check_probabilities(input, target, ignore_index, whose="input"):
    if input.shape != target.shape:
        _check_batch(input, target)
        labels = target.dim() == input.dim() - 1 or target.shape[1:2] == (1,)
        hint = "; class labels must be integers, target.long()" if labels else ""
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities to have the shape "
            f"of {whose}, {list(input.shape)}, got {list(target.shape)}{hint}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")


def _check_batch(input, target):
    if input.dim() > 1 and (target.dim() == 0 or input.shape[0] != target.shape[0]):
        size = target.shape[0] if target.dim() else 1
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({size})."
        )


def check_labels(input, target, name):
    # The usual case, at a quarter of the cost: checks are a part of what a small call costs.
    if (
        input.dim() == 2
        and target.dim() == 1
        and target.dtype in checks.CLASS_INDICES
        and input.size(0) == target.size(0)
    ):
        return
    if target.shape == input.shape and input.shape != (1,):
        raise RuntimeError(
            "Expected floating point type for target with class probabilities, got "
            f"{checks.scalar_name(target.dtype)}"
        )
    checks.check_index_dtype(name, target)
    checks.check_has_dimension("input", input)
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError(
                f"0D or 1D {name} expected for 1D input of shape {list(input.shape)}, "
                f"got {list(target.shape)}"
            )
        if target.numel() != 1:
            raise ValueError(
                f"For 1D input, 1D {name} must have size 1, but got {name} size: {target.numel()}"
            )
        return
    _check_batch(input, target)
    expected = (input.shape[0], *input.shape[2:])
    if target.shape != expected:
        raise RuntimeError(f"Expected target size {list(expected)}, got {list(target.shape)}")


def check_class_weight(weight) -> None:
    """Of any number of classes."""
    checks.check_tensor("weight", weight)
    if weight.dim() != 1:
        raise RuntimeError(
            f"weight must have one entry for each class, (C), got shape {list(weight.shape)}"
        )


def _weighted(target, weight, smoothing):
    """The coefficients of all classes, through which a class weight gets a gradient."""
    target = target.to(weight.dtype)
    if smoothing:
        target = (1.0 - smoothing) * target + smoothing / weight.shape[0]
    return target * weight.view(-1, *[1] * (target.dim() - 2))


def _checked_weight(weight, input, classes, learned):
    checks.check_tensor("weight", weight)
    acc = accumulator_dtype(input.dtype)
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}"
        )
    if weight.dtype not in (input.dtype, torch.float32, acc):
        own = checks.scalar_name(input.dtype)
        raise RuntimeError(
            f"expected scalar type {own if own == 'Float' else own + ' or Float'} for weight but "
            f"found {checks.scalar_name(weight.dtype)}"
        )
    checks.check_device("weight", weight, input)
    if not learned:
        checks.check_constant("weight", weight)
    return weight.to(acc)


def _checked_token_weight(token_weight, input, target):
    checks.check_token_weight(token_weight, _row_shape(input, target))
    checks.check_device("token_weight", token_weight, input)
    checks.check_constant("token_weight", token_weight)
    return token_weight.to(accumulator_dtype(input.dtype))


def _checked_formula(
    kind,
    label_smoothing=0.0,
    tau=1.0,
    gamma=0.0,
    truncate=None,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    temperature=1.0,
):
    """The fields of op.Options that are the formula's; None for the plain cross entropy."""
    try:
        plain = (
            label_smoothing == 0.0
            and tau == 1.0
            and gamma == 0.0
            and truncate is None
            and z_loss == 0.0
            and softcap is None
            and logit_scale == 1.0
            and temperature == 1.0
        )
        if plain:
            return None
    except RuntimeError:  # a tensor of several numbers; its name follows
        pass
    checks.check_range("tau", tau, 0.0)
    checks.check_range("z_loss", z_loss, 0.0)
    checks.check_range("temperature", temperature, 0.0, open_low=True)
    checks.check_range("logit_scale", logit_scale, -math.inf)
    if softcap is not None:
        checks.check_range("softcap", softcap, 0.0, open_low=True)
    max_nll = math.inf
    if truncate is not None:
        check_probability("truncate", truncate)
        if kind == op.DENSE or label_smoothing > 0.0:
            raise ValueError("truncate needs class indices without label smoothing")
        max_nll = -math.log(truncate)
    return dict(
        logit_scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        temperature=float(temperature),
        tau=float(tau),
        max_nll=max_nll,
        gamma=float(gamma),
        z_loss=float(z_loss),
        smoothing=float(label_smoothing),
    )


def check_probability(name: str, value) -> None:
    checks.check_range(name, value, 0.0, open_low=True)
    if value > 1.0:
        raise ValueError(f"{name} must be a probability in (0, 1], got {value}")


def _checked_inplace(input):
    if not (torch.is_grad_enabled() and input.requires_grad):
        return False
    if input.is_leaf:
        raise RuntimeError("inplace=True: input is a leaf, its values would become gradients")
    if any(s == 0 and n > 1 for s, n in zip(input.stride(), input.shape)):
        raise RuntimeError("inplace=True: elements of an expanded input share memory")
    # A compiled graph plans its own buffers and may already reuse this one.
    return not torch.compiler.is_compiling()


def _checked_stats(return_stats, kind) -> tuple[tuple[str, ...], int]:
    """The names, and what they want of the op."""
    if isinstance(return_stats, str):
        raise TypeError("return_stats must be a sequence of names, got one string")
    if not isinstance(return_stats, Iterable):
        found = type(return_stats).__name__
        raise TypeError(f"return_stats must be a sequence of names, got {found}")
    return_stats = tuple(return_stats)
    for name in return_stats:
        if name not in RowStats._fields:
            raise ValueError(
                f"unknown statistic {name!r} in return_stats; known: {', '.join(RowStats._fields)}"
            )
        if kind == op.DENSE and name in ("logprob", "correct", "rank"):
            raise ValueError(f"return_stats: {name!r} needs class indices, not probabilities")
    extras = op.WANT_EXTRAS * any(n in FLOAT_STATS for n in return_stats)
    return return_stats, extras + op.WANT_INDEX * any(n in _INDEX_STATS for n in return_stats)


def _row_shape(input, target) -> tuple[int, ...]:
    shape = (*input.shape[:1], *input.shape[2:]) if target.is_floating_point() else target.shape
    return () if input.dim() == 1 else tuple(shape)


def named_stats(p: Prepared, extras, index, shape) -> RowStats:
    """The statistics that were asked for, each of the given shape."""
    found = {}
    for name in p.return_stats:
        if name in FLOAT_STATS:
            row = extras[FLOAT_STATS.index(name)].view(shape)
            found[name] = row.detach() if name == "z_loss" else row
        elif name == "correct":
            argmax = index[0].view(shape)
            # -1 may be the ignored label
            found[name] = (argmax == p.labels[0].reshape(shape)) & (argmax >= 0)
        else:
            found[name] = index[("argmax", "rank").index(name)].view(shape)
    return RowStats(**found)
