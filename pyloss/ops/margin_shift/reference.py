"""The ops of margin_shift on the reference, and their gradient in torch operations."""

from __future__ import annotations

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


def forward(x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int) -> Tensor:
    if target.is_cpu:
        bad = target[outside(target, x.shape[1]) & ~equals(target, ignore_index)]
        if bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds.")
    return composed(x, x_adv, target, squared, ignore_index).contiguous()


def backward(
    g: Tensor, shift: Tensor, x: Tensor, x_adv: Tensor, target: Tensor, squared: bool,
    ignore_index: int, clean: bool, adv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = composed_gradients(
        g, x, x_adv, target, squared, ignore_index, (clean, adv), create_graph=False
    )
    return tuple(x.new_empty((0,)) if d is None else d.to(x.dtype) for d in found)
