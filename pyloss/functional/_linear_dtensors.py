"""Linear losses of hidden states that are DTensors whose rows a mesh splits: sequence or batch
shards. Imported with the first such call.

Each rank has the loss of its own rows, as in _row_dtensors.py. What is sent is the denominator of a
mean, and along another dimension of the mesh what classes that are split there need.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from pyloss.functional import _layers as layers
from pyloss.functional import _vocab_parallel as split
from pyloss.functional._checks import check_reduction
from pyloss.functional._row_dtensors import SplitRows, set_divisor
from pyloss.functional._rows import RowStats
from pyloss.functional.linear import _flat, fused_linear_cross_entropy


def loss_of_split_rows(tensors: tuple, shift: int, settings, how: dict, arguments: dict):
    """The loss of each row placed like the rows, a sum or mean of them as Partial.

    Args:
        tensors: (input, linear_weight, target, linear_bias, token_weight), the first of them as
            `laid_out` of _vocab_parallel.py leaves it.
        how: arguments of fused_linear_cross_entropy that `settings` says for split classes.
    """
    input, weight, target, bias, token_weight = tensors
    check_reduction(arguments["reduction"])
    on = SplitRows(input, input.dim() - 1)
    shape, classes = tuple(input.shape[:-1]), weight.shape[0]
    shift = _checked_shift(shift, shape, on)
    layers.check_target_shape(target, layers.logits_like(input, *shape, classes))
    along = split.split_dim("linear_weight", weight, 0) if isinstance(weight, DTensor) else None
    hidden, target = input.to_local(), on.target(target)
    weight, bias = (
        _layer(on, name, t, along) for name, t in (("linear_weight", weight), ("linear_bias", bias))
    )
    token_weight = on.local("token_weight", token_weight, on.of_rows)
    temperature, arguments = arguments["temperature"], dict(arguments)
    if isinstance(temperature, Tensor):
        of_rows = on.of_rows if temperature.dim() else None
        arguments["temperature"] = on.local("temperature", temperature, of_rows)
    for name in ("weight", "num_items"):
        arguments[name] = on.local(name, arguments[name])
    if arguments["reduction"] == "mean" and arguments["num_items"] is None:
        _set_divisor(hidden, target, token_weight, classes, shift, on, arguments)

    if along is None:
        found = fused_linear_cross_entropy(
            hidden, weight, target, bias, token_weight=token_weight, shift=shift,
            **{**arguments, **how},
        )  # fmt: skip
    else:
        found = split.linear_cross_entropy(
            hidden, weight, target, bias, token_weight, on.mesh.get_group(along), settings,
            arguments, shift=shift, dtensor_classes=classes, rows_known=True,
        )  # fmt: skip
    shape = (*shape[:-1], shape[-1] - shift)
    whole = shape if arguments["reduction"] == "none" else None
    if not arguments["return_stats"]:
        return on.placed(found, whole)
    value, stats = found
    stats = RowStats(*(s if s is None else on.placed(s, shape) for s in stats))
    return on.placed(value, whole), stats


def _checked_shift(shift, shape: tuple[int, ...], on: SplitRows) -> int:
    shift = layers.checked_shift(shift, shape)
    if shift and any(p.is_shard(len(shape) - 1) for p in on.of_rows):
        raise ValueError(
            f"shift={shift} needs labels that the next rank has, since the sequence of input is "
            f"split, {on.shown}; shift the labels before they are split, and leave shift at 0"
        )
    return shift


def _layer(on: SplitRows, name: str, t, along: int | None):
    """This rank's weight or bias, whose gradient is the sum over the rows of all ranks."""
    if along is None or t is None:
        return on.local(name, t)
    if not isinstance(t, DTensor) or split.split_dim(name, t, 0) != along:
        raise RuntimeError(
            "linear_weight and linear_bias must be split in the same way, but of linear_bias got "
            f"{split.shown(t)}"
        )
    grads = [Partial() if p.is_shard() else own for p, own in zip(on.of_rows, t.placements)]
    # The step to where it is already adds the ranks' gradients up.
    return t.redistribute(placements=t.placements).to_local(grad_placements=grads)


def _set_divisor(hidden, target, token_weight, classes, shift, on: SplitRows, arguments) -> None:
    """The denominator of a mean over the rows of all ranks."""
    flat = _flat(hidden, target, token_weight, shift, classes, arguments["ignore_index"])
    rows, target, token_weight = flat[:3]
    options = {**arguments, "token_weight": token_weight, "return_stats": (), "temperature": 1.0}
    set_divisor(layers.logits_like(hidden, rows.shape[0], classes), target, on, options)
    arguments.update(num_items=options["num_items"], weight=options["weight"])
