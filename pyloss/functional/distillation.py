"""Knowledge distillation from a teacher's hidden states, without either model's logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _layers as layers
from pyloss.functional._checks import check_range
from pyloss.ops import linear_distillation as op
from pyloss.ops._launch import accumulator_dtype


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    direction: str = "forward",
    beta: float = 0.5,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    empty: str = "nan",
    scale_by_temperature: bool = True,
    shift: int = 0,
    chunk: int | str = "auto",
) -> Tensor:
    r"""Divergence of a student's token distribution from its teacher's, from hidden states.

    With :math:`P = \mathrm{softmax}((W_t h_t + b_t)/T)`, :math:`Q = \mathrm{softmax}((W_s h_s +
    b_s)/T)` and :math:`M = \beta P + (1 - \beta) Q`, per row:

    .. math::
        D = \begin{cases}
            \mathrm{KL}(P \| Q) & \text{forward} \\
            \mathrm{KL}(Q \| P) & \text{reverse} \\
            \beta\,\mathrm{KL}(P \| M) + (1 - \beta)\,\mathrm{KL}(Q \| M) & \text{jsd}
        \end{cases}
        \qquad \ell = (1 - w)\, T^2 D + w \big(-\log \mathrm{softmax}(W_s h_s + b_s)_y\big)

    Both models' logits exist for some hundred rows at a time only. With a scalar ``reduction`` the
    gradients are formed in the forward pass (float16: in the backward, where the loss scale is
    known); with ``"none"`` the logits are formed again in the backward. The teacher gets no
    gradient.

    Args:
        student_hidden: ``(..., D)``; float32, bfloat16, float16 or float64. The softmax is computed
            in float32 (float64 for float64).
        student_weight: ``(V, D)``, dtype of ``student_hidden``.
        teacher_hidden: ``(..., E)`` with the same leading dimensions; its dtype and width may
            differ from the student's.
        teacher_weight: ``(V, E)``, dtype of ``teacher_hidden``. A vocabulary that is padded to
            another size must be cut: ``teacher_weight[:V]``.
        student_bias, teacher_bias: ``(V,)``, dtype of their weight.
        temperature: T, divides both models' logits, > 0.
        target: class indices ``(...)``, int64, uint8 or int32: says which rows count, and gives
            the labels of the cross entropy. None: all rows count.
        ignore_index: rows with this target add nothing and may hold anything, NaN included.
        ce_weight: w, the share of the cross entropy with ``target`` in the loss, in [0, 1]. It is
            taken at temperature 1.
        direction: ``"forward"`` (the student must cover what the teacher does), ``"reverse"`` (it
            must avoid what the teacher avoids; infinite where it does not and the teacher's
            probability is 0), or ``"jsd"``, the generalised Jensen-Shannon divergence between them.
        beta: weight of the teacher in the mixture of ``"jsd"``, in (0, 1); not read otherwise.
        reduction: ``"mean"`` over the rows that count, ``"sum"``, ``"none"``, or ``"batchmean"``:
            the sum over the size of the first dimension, as in
            :func:`torch.nn.functional.kl_div`.
        num_items: number or 0-d tensor that replaces the denominator of ``"mean"``, for gradient
            accumulation.
        empty: value of the mean over no rows, or over ``num_items`` of 0: ``"nan"`` or ``"zero"``.
        scale_by_temperature: the factor T^2, which keeps the size of the gradient when T changes.
        shift: ``target`` is that many positions ahead: row t of the sequence dimension (the last
            but one of the hidden states) goes with ``target[..., t + shift]``, and the last
            ``shift`` rows are left out. 1 for the labels of a causal language model.
        chunk: rows of logits that exist at a time, or ``"auto"``.

    Returns:
        The loss, float32 (float64 for a float64 student): 0-d, or with ``reduction="none"`` of
        shape ``(...)``, 0 where ignored. The mean over no rows is NaN unless ``empty``
        says otherwise, its gradient 0. Higher derivatives, forward mode and ``torch.func`` run
        through the logits of both models, whole.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a number out of its range, an unknown choice, ``ce_weight`` without ``target``.
        RuntimeError: shapes, dtypes or devices that do not fit.
        IndexError: a class index out of range (CPU). On CUDA, where the check would need a
            synchronisation, the row is NaN if ``ce_weight`` is positive.
        NotImplementedError: integer hidden states.

    Example:
        >>> import torch, pyloss
        >>> student = torch.nn.Linear(16, 1000, bias=False)
        >>> teacher = torch.nn.Linear(64, 1000, bias=False)
        >>> hidden = torch.randn(2, 8, 16, requires_grad=True)
        >>> loss = pyloss.functional.linear_distillation_loss(
        ...     hidden, student.weight, torch.randn(2, 8, 64), teacher.weight, temperature=2.0
        ... )
        >>> loss.backward()

    Reference:
        Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. arXiv 1503.02531.
        Generalised JSD: Agarwal et al. On-Policy Distillation of Language Models. arXiv 2306.13649.
    """
    check_range("temperature", temperature, 0.0, open_low=True)
    checks.check_number("ce_weight", ce_weight)
    if not 0.0 <= ce_weight <= 1.0:
        raise ValueError(f"ce_weight must be in [0, 1], got {ce_weight}")
    if ce_weight > 0 and target is None:
        raise ValueError("ce_weight needs target")
    checks.check_one_of("direction", direction, op.DIRECTIONS)
    if direction == "jsd":
        checks.check_number("beta", beta)
        if not 0.0 < beta < 1.0:
            raise ValueError(f"beta must be in (0, 1), got {beta}")
    checks.check_reduction(reduction, op.REDUCTIONS)
    checks.check_empty(empty)
    checks.check_flag("scale_by_temperature", scale_by_temperature)
    ignore_index = checks.checked_integer("ignore_index", ignore_index)
    shift = checks.checked_integer("shift", shift)

    _check_head("student", student_hidden, student_weight, student_bias)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    if target is not None:
        _check_target(target, student_hidden)
        # int64 before anything is compared with ignore_index: as uint8, -100 would be 156.
        target = target.long()
    if shift:
        steps = student_hidden.shape[-2] if student_hidden.dim() > 1 else 0
        if not 0 < shift <= steps:
            raise ValueError(f"shift must be in [0, {steps}], the sequence length, got {shift}")
        student_hidden, teacher_hidden = (
            student_hidden[..., :-shift, :],
            teacher_hidden[..., :-shift, :],
        )
        target = None if target is None else target[..., shift:]
    if target is not None and checks.can_look_at(target):
        checks.check_index_values(target, student_weight.shape[0], ignore_index)

    student = [student_hidden, student_weight, student_bias]
    teacher = [
        t if t is None else t.detach() for t in (teacher_hidden, teacher_weight, teacher_bias)
    ]
    if checks.autocast_on(student_hidden):
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
        student, teacher = _cast(student, dtype), _cast(teacher, dtype)
    _check_same_dtype("student", *student)
    _check_same_dtype("teacher", *teacher)

    lead = student_hidden.shape[:-1]
    acc = accumulator_dtype(student[0].dtype)
    labels = None if target is None else target.reshape(-1)
    divisor = None
    if reduction != "none":
        divisor = _divisor(reduction, lead, labels, ignore_index, num_items, acc, student_hidden)
        if empty == "zero":  # both the loss and its gradient are then 0
            divisor = torch.where(divisor == 0, torch.inf, divisor)
    square = temperature**2 if scale_by_temperature else 1.0
    options = op.Options(
        float(temperature), float(beta), (1.0 - ce_weight) * square, float(ce_weight)
    )
    codes = op.Codes(op.DIRECTIONS[direction], ignore_index, _checked_chunk(chunk, student_weight))
    loss = op.linear_distillation(
        student[0].reshape(-1, student[0].shape[-1]),
        *student[1:],
        teacher[0].reshape(-1, teacher[0].shape[-1]),
        *teacher[1:],
        labels,
        divisor,
        options,
        codes,
    )
    return loss.view(lead) if reduction == "none" else loss


def _divisor(reduction, lead, labels, ignore_index, num_items, acc, like):
    if reduction == "sum":
        value = 1
    elif reduction == "batchmean":
        value = lead[0] if lead else 1
    elif num_items is None:
        if labels is not None:
            return (labels != ignore_index).sum().to(acc)
        value = math.prod(lead)
    elif isinstance(num_items, Tensor):
        return checks.one_number("num_items", num_items).detach().to(like.device, acc)
    else:
        check_range("num_items", num_items, 0.0, open_low=True)
        value = num_items
    return torch.full((), value, dtype=acc, device=like.device)


def _cast(tensors, dtype):
    """As autocast does for F.linear: float64 stays."""
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check_head(owner, hidden, weight, bias):
    for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if t is not None or name != "bias":
            checks.check_tensor(f"{owner}_{name}", t)
    if hidden.dim() == 0:
        raise RuntimeError(f"{owner}_hidden must have at least one dimension, got a 0-d tensor")
    checks.check_supported("linear_distillation_loss", hidden, f" ({owner}_hidden)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise RuntimeError(
            f"{owner}_weight must have shape (V, {hidden.shape[-1]}) for {owner}_hidden of shape "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise RuntimeError(f"{owner}_weight has no classes, got shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"{owner}_bias must have shape ({weight.shape[0]},), got {list(bias.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.check_device(f"{owner}_{name}", t, hidden, f"{owner}_hidden")


def _check_same_dtype(owner, hidden, weight, bias):
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != hidden.dtype:
            raise RuntimeError(
                f"{owner}_{name} must have the dtype of {owner}_hidden, {hidden.dtype}, got "
                f"{t.dtype}"
            )


def _check_pair(student_hidden, student_weight, teacher_hidden, teacher_weight):
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise RuntimeError(
            f"student_hidden and teacher_hidden must have the same leading dimensions, got "
            f"{list(student_hidden.shape)} and {list(teacher_hidden.shape)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise RuntimeError(
            f"student_weight and teacher_weight must have the same number of classes, got "
            f"{student_weight.shape[0]} and {teacher_weight.shape[0]}; where the larger one is "
            f"padded, cut it: weight[:{min(student_weight.shape[0], teacher_weight.shape[0])}]"
        )
    checks.check_device("teacher_hidden", teacher_hidden, student_hidden, "student_hidden")


def _check_target(target, student_hidden):
    checks.check_tensor("target", target)
    checks.check_index_dtype("target", target)
    if target.shape != student_hidden.shape[:-1]:
        raise RuntimeError(
            f"target must have the shape of student_hidden without its last dimension, "
            f"{list(student_hidden.shape[:-1])}, got {list(target.shape)}"
        )
    checks.check_device("target", target, student_hidden, "student_hidden")


def _checked_chunk(chunk, weight):
    chunk = layers.checked_chunk(chunk)
    return op.auto_chunk(weight.device.type, weight.shape[0]) if chunk is None else chunk
