"""The ops of margin_shift on the reference, and their gradient in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._labels import equals, outside
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients


def composed(x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int) -> Tensor:
    """The shifts in torch operations, in no less than float32."""
    from pyloss.reference.margin_shift import margin_shift  # with its first use

    sums = accumulator_dtype(x.dtype)
    return margin_shift(
        x.to(sums), x_adv.to(sums), target, squared=squared, ignore_index=ignore_index
    )


def composed_gradients(
    g: Tensor, x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int,
    needed: tuple[bool, bool] = (True, True), create_graph: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients in torch operations; with `create_graph` they have gradients of their own."""
    return gradients(
        lambda x, x_adv: composed(x, x_adv, target, squared, ignore_index),
        [x, x_adv], [g], needed, create_graph=create_graph,
    )  # fmt: skip


def forward(
    x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int,
    *, checked: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sick = outside(target, x.shape[1])
    if checked and target.is_cpu:
        bad = target[sick & ~equals(target, ignore_index)]
        if bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds.")
    shift = composed(x, x_adv, target, squared, ignore_index).contiguous()
    if x.shape[1] == 0:
        return shift, torch.zeros_like(shift)
    # For a backward of the kernels: the backend may be another by then.
    moved = x_adv.to(shift) - x.to(shift)
    y = torch.where(sick, 0, target.long()).unsqueeze(1)
    total = (moved.gather(1, y) - moved).sum(1)
    return shift, torch.where(shift == 0, 0.0, total).contiguous()


def backward(
    g: Tensor, shift: Tensor, total: Tensor, x: Tensor, x_adv: Tensor, target: Tensor,
    squared: bool, ignore_index: int, clean: bool, adv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = composed_gradients(
        g, x, x_adv, target, squared, ignore_index, (clean, adv), create_graph=False
    )
    return tuple(x.new_empty((0,)) if d is None else d.to(x.dtype) for d in found)
