"""Statistics of a row of logits after a softmax, of which one writes losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._rows import checked_ignore_index
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import functorch_active
from pyloss.ops.row_softmax.stats import Rows, row_stats


class RowSoftmaxStats(NamedTuple):
    """What :func:`pyloss.functional.row_softmax_stats` returns, of the shape of the rows each.

    With z the logits after scale, margin and mask, and p = softmax(z). Floating ones are float32,
    or float64, and differentiable.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(4, 7), torch.randint(7, (4,))
        >>> stats = pyloss.functional.row_softmax_stats(x, y)
        >>> torch.testing.assert_close(stats.nll, stats.lse - stats.target)
    """

    lse: Tensor  #: log sum exp(z)
    mean: Tensor  #: sum p z
    entropy: Tensor  #: -sum p log p = lse - mean, exact also where these are large
    target: Tensor | None  #: z of the target's class; None without targets
    nll: Tensor | None  #: -log p of it = lse - target, exact also where p is near 1
    count: Tensor  #: entries that count, int64


def row_softmax_stats(
    input: Tensor,
    target: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    margin: float | Tensor | None = None,
    mask: Tensor | None = None,
    without_target: bool = False,
    ignore_index: int = -100,
) -> RowSoftmaxStats:
    r"""Log-normaliser, mean, entropy and target of each row: all that a softmax loss is made of.

    .. math:: z_j = a\,(x_j + c\,[j \ne y]), \qquad \mathrm{lse} = \log \sum_j e^{z_j}, \qquad
              \mathrm{mean} = \sum_j p_j z_j, \qquad p = \mathrm{softmax}(z)

    A loss is then a formula in numbers of rows, and its gradient with respect to the logits is
    that of one fused pass: nothing of the size of the logits is made beside it.

    Args:
        input: logits x ``(..., C)``, the classes last; float32, bfloat16, float16 or float64. Half
            types are computed in float32.
        target: class y of each row, ``(...)``, int64, int32 or uint8.
        scale: a, one over a temperature: a number > 0, or a tensor that broadcasts to the rows,
            differentiable.
        margin: c, a number or a tensor that broadcasts to the rows, without a gradient; needs
            ``target``.
        mask: bool, True at what counts, broadcasts to ``input``. A row of which nothing counts has
            lse, mean and target -inf, entropy 0, nll inf, and no gradient.
        without_target: the target's class is not in the softmax: then ``nll = lse - target`` is
            minus the margin by which it is ahead of the others, soft as it is (decoupled losses).
        ignore_index: rows with this target hold 0, and have no gradient.

    Returns:
        :class:`RowSoftmaxStats`. Second derivatives exist, and so does forward mode; they, graphs
        of ``torch.compile`` and ``torch.func`` make z where it differs from ``input``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, no class, a scale that is no positive number, a margin
            without targets.
        IndexError: a target out of range (CPU; on CUDA that row is NaN).
        RuntimeError: tensors on several devices; a margin that requires a gradient.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 100, requires_grad=True), torch.randint(100, (8,))
        >>> stats = pyloss.functional.row_softmax_stats(x, y, scale=2.0)
        >>> confidence_penalty = (stats.nll - 0.1 * stats.entropy).mean()
        >>> confidence_penalty.backward()

    Reference:
        Milakov, Gimelshein. Online normalizer calculation for softmax. arXiv 1805.02867.
    """
    checks.check_floating("input", input)
    checks.check_supported("row_softmax_stats", input)
    checks.check_has_dimension("input", input)
    if checks.is_dtensor(input):
        from pyloss.functional._row_dtensors import row_stats_of_dtensors

        return row_stats_of_dtensors(
            row_softmax_stats, input, dict(target=target, scale=scale, margin=margin, mask=mask),
            without_target=without_target, ignore_index=ignore_index,
        )  # fmt: skip
    shape, classes = input.shape[:-1], input.shape[-1]
    if classes == 0:
        raise ValueError(f"input must have at least one class, got {list(input.shape)}")
    ignore_index = checked_ignore_index(ignore_index)
    acc, count = accumulator_dtype(input.dtype), math.prod(shape)
    without_target = checks.checked_flag("without_target", without_target)
    if target is None:
        if margin is not None or without_target:
            name = "without_target" if margin is None else "margin"
            raise ValueError(f"{name} is about other classes than the target's: give a target")
        labels = torch.zeros(count, dtype=torch.int64, device=input.device)
        ignored = -1
    else:
        labels, ignored = _checked_target(target, input).reshape(-1), ignore_index
    if mask is not None:
        mask = _checked_mask(mask, input)
    found = row_stats(
        Rows(
            input.reshape(count, classes),
            labels,
            _of_rows("scale", scale, 1.0, input, acc),
            _of_rows("margin", margin, 0.0, input, acc),
            mask if mask is None else mask.reshape(count, classes),
            ignored,
            without_target,
        )
    )
    lse, mean, entropy, at_target, nll = (t.reshape(shape) for t in found)
    number = _counted(input, target, mask, ignored, without_target)
    if target is None:
        return RowSoftmaxStats(lse, mean, entropy, None, None, number)
    return RowSoftmaxStats(lse, mean, entropy, at_target, nll, number)


def _checked_target(target, input: Tensor) -> Tensor:
    checks.check_tensor("target", target)
    checks.check_index_dtype("target", target)
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of the rows, {list(input.shape[:-1])}, got "
            f"{list(target.shape)}"
        )
    checks.check_device("target", target, input)
    return target


def _checked_mask(mask, input: Tensor) -> Tensor:
    checks.check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True at what counts, got {mask.dtype}")
    checks.check_device("mask", mask, input)
    return _expanded("mask", mask, input.shape, "input")


def _of_rows(name: str, value, default: float, input: Tensor, acc: torch.dtype) -> float | Tensor:
    if value is None:
        return default
    if not isinstance(value, Tensor):
        checks.check_range(name, value, 0.0, open_low=name == "scale")
        return value
    checks.check_floating(name, value)
    checks.check_device(name, value, input)
    if name == "margin":
        checks.check_constant(name, value)
        value = value.detach()
    return _expanded(name, value, input.shape[:-1], "the rows").reshape(-1).to(acc)


def _expanded(name: str, t: Tensor, shape: torch.Size, whose: str) -> Tensor:
    try:
        return t.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {list(t.shape)} does not broadcast to {whose}, {list(shape)}"
        ) from None


def _counted(input: Tensor, target, mask, ignored: int, without_target: bool) -> Tensor:
    if mask is not None:
        number = _true_in_rows(mask)
    else:
        number = torch.full(
            input.shape[:-1], input.shape[-1], dtype=torch.int64, device=input.device
        )
    if target is None:
        return number
    if without_target:
        y = target.long().clamp(0, input.shape[-1] - 1).unsqueeze(-1)
        number = number - (1 if mask is None else mask.gather(-1, y).squeeze(-1).long())
    return torch.where(target == ignored, 0, number)


def _true_in_rows(mask: Tensor) -> Tensor:
    """mask.sum(-1), in bytes as far as they go: on a CPU a hundred times as fast."""
    pieces = mask.shape[-1] // 128
    head, tail = mask[..., : 128 * pieces], mask[..., 128 * pieces :]
    copied = torch.compiler.is_compiling() or functorch_active()
    head = head.to(torch.uint8) if copied else head.view(torch.uint8)
    sums = head.unflatten(-1, (pieces, 128)).sum(-1, dtype=torch.uint8)
    return sums.sum(-1) + tail.sum(-1)
