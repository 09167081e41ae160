"""Checks of a linear layer and of the labels of its rows, whole or split over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _rows as rows
from pyloss.ops import linear_cross_entropy as op
from pyloss.ops._labels import wide
from pyloss.ops._launch import accumulator_dtype

STRATEGIES = ("auto", "forward", "recompute", "tiles")


def checked_settings(chunk, strategy, accumulate_dtype, filter, reduction, return_stats):
    chunk = checked_chunk(chunk)
    checks.check_one_of("strategy", strategy, STRATEGIES)
    if strategy == "forward" and reduction == "none":
        raise ValueError("strategy='forward' needs a scalar reduction, got 'none'")
    if strategy == "forward" and any(s in rows.FLOAT_STATS for s in return_stats):
        raise ValueError("strategy='forward' cannot return differentiable statistics")
    if accumulate_dtype not in (None, torch.float32):
        raise ValueError(f"accumulate_dtype must be None or torch.float32, got {accumulate_dtype}")
    if filter is not None:
        checks.check_range("filter", filter, 0.0, open_low=True)
    if filter is not None and strategy not in ("auto", "tiles"):
        raise ValueError(f"filter needs strategy 'auto' or 'tiles', got {strategy!r}")
    tiles = filter if filter is not None else 0.0 if strategy == "tiles" else None
    exact = accumulate_dtype is not None
    return op.Settings(chunk or 0, strategy, exact, tiles)


def check_options(
    *,
    chunk="auto",
    strategy="auto",
    accumulate_dtype=None,
    filter=None,
    ignore_index=None,
    temperature=1.0,
    reduction="mean",
    return_stats=(),
    **of_rows,
) -> None:
    """The checks that need no tensor, for those who keep options for later."""
    rows.check_options(
        ignore_index=-100 if ignore_index is None else ignore_index,
        temperature=1.0 if isinstance(temperature, Tensor) else temperature,
        reduction=reduction, return_stats=return_stats, **of_rows,
    )  # fmt: skip
    checked_settings(chunk, strategy, accumulate_dtype, filter, reduction, return_stats)


def checked_chunk(chunk) -> int | None:
    """A number of rows; None for "auto"."""
    if isinstance(chunk, str) and chunk == "auto":
        return None
    found = checks.as_integer(chunk)
    if found is None:
        raise TypeError(f"chunk must be 'auto' or a number of rows, got {chunk!r}")
    if found < 1:
        raise ValueError(f"chunk must be at least 1, got {found}")
    return found


def checked_layer(input, weight, bias):
    """(input, linear_weight, linear_bias) of shapes and dtypes that fit, cast under autocast."""
    for name, t in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if t is not None or name != "linear_bias":
            checks.check_tensor(name, t)
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {weight.dim()}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}"
        )
    checks.check_supported("fused_linear_cross_entropy", input, ": input must be floating")
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None:
            checks.check_device(name, t, input)
    if checks.autocast_on(input) and input.dtype != torch.float64:
        # The weight stays as it is: the op casts it, and gives its gradient in its own dtype.
        return input.to(torch.get_autocast_dtype(input.device.type)), weight, bias
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(
                f"expected input and {name} to have the same dtype, but got: "
                f"{checks.scalar_name(input.dtype)} and {checks.scalar_name(t.dtype)}"
            )
    return input, weight, bias


def logits_like(input: Tensor, *shape: int) -> Tensor:
    """Stands for the logits, whose shape, dtype and device checks look at; takes no memory."""
    return input.new_empty(()).expand(shape)


def checked_shift(shift, lead) -> int:
    shift = checks.checked_integer("shift", shift)
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    if shift and not lead:
        raise ValueError("shift needs a sequence dimension, (..., T, D), but input has 1 dimension")
    if shift and shift >= lead[-1]:
        raise ValueError(f"shift must be less than the sequence length {lead[-1]}, got {shift}")
    return shift


def check_target_shape(target, like: Tensor) -> None:
    """What the check of the flattened target could not name; `like` stands for the logits."""
    lead, classes = tuple(like.shape[:-1]), like.shape[-1]
    if len(lead) < 2:
        rows.check_target_of(like, target)
        return
    tensors = [target] if isinstance(target, Tensor) else []
    if isinstance(target, tuple):
        tensors = [t for t in target[:2] if isinstance(t, Tensor)]
    for t in tensors:
        dense = t.is_floating_point()
        expected = (*lead, classes) if dense else lead
        if tuple(t.shape) == expected:
            continue
        if dense and tuple(t.shape) == lead:
            raise RuntimeError(
                "Expected floating point type for target with class probabilities to have the "
                f"shape {list(expected)}, got {list(lead)}; class labels must be integers, "
                "target.long()"
            )
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {len(lead) + 1}, or a target of "
            f"shape {list(expected)} to go with it, got {list(t.shape)}"
        )


# --------------------------------------------------------------------------------------------------
# A temperature of each row


def tempered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target,
    temperature: Tensor,
    shift: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(input, weight) of a layer without bias that has the given one's logits over `temperature`.

    (W h + b) / t = W (h / t) + b / t: the kernels need not know. The bias becomes a column of the
    weight and 1 / t a feature, with zeros up to a multiple of eight, which products of half
    matrices want.
    """
    input, temperature = scored_at(input, target, temperature, shift, ignore_index)
    inverse = (1 / temperature).unsqueeze(-1)
    scaled = (input * inverse).to(input.dtype)
    if bias is None:
        return scaled, weight
    more = -(weight.shape[1] + 1) % 8
    columns = (bias.unsqueeze(1), weight.new_zeros(weight.shape[0], more))
    features = (inverse.to(input.dtype), input.new_zeros(*input.shape[:-1], more))
    return torch.cat((scaled, *features), -1), torch.cat((weight, *columns), 1)


def scored_at(
    input: Tensor, target, temperature: Tensor, shift: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(input, the temperature of each of its rows). Rows that are ignored may hold anything in
    either; the latter is 1 there."""
    lead = input.shape[:-1]
    if temperature.dtype == torch.bool or temperature.is_complex():
        raise TypeError(f"temperature must hold numbers, got {temperature.dtype}")
    if temperature.dim():
        if temperature.shape != lead:
            raise RuntimeError(
                f"temperature must be a number, a 0-d tensor or have the targets' shape "
                f"{list(lead)}, got {list(temperature.shape)}"
            )
        checks.check_device("temperature", temperature, input)
    temperature = temperature.to(input.device, accumulator_dtype(input.dtype)).expand(lead)
    temperature = shifted(temperature, shift, 1.0)
    labels = target[:2] if isinstance(target, tuple) else (target,)
    if labels[0].dtype == torch.float64:  # what they make of the logits, below the division
        input = input.double()
    if not labels[0].is_floating_point():
        # A narrow dtype has no room for every ignore_index.
        labels = [shifted(wide(y), shift, ignore_index) == ignore_index for y in labels]
        ignored = labels[0] if len(labels) == 1 else labels[0] | labels[1]
        temperature = torch.where(ignored, 1.0, temperature)
        if temperature.requires_grad:  # its gradient would be 0 times what stands there
            input = torch.where(ignored.unsqueeze(-1), 0.0, input)
    if checks.can_look_at(temperature) and bool((temperature <= 0).any()):
        raise ValueError(f"temperature must be > 0, got {temperature.min().item()}")
    return input, temperature


# --------------------------------------------------------------------------------------------------
# Shifted labels


def shifted(x: Tensor, shift: int, fill) -> Tensor:
    """x[..., t + shift] at t, and `fill` at the end: the hidden states need no slice, no copy."""
    if not shift:
        return x
    moved = torch.full_like(x, fill)
    moved[..., : x.shape[-1] - shift] = x[..., shift:]
    return moved


def unshifted(x: Tensor, shift: int) -> Tensor:
    return x[..., : x.shape[-1] - shift] if shift else x


def flat_labels(target, lead, shift, ignore_index):
    """Labels, or a MixUp tuple, one entry for each row."""

    def flat(labels):
        if not isinstance(labels, Tensor):
            return labels  # to be refused by name
        if shift:  # a narrow dtype has no room for every ignore_index
            labels = wide(labels)
        return shifted(labels, shift, ignore_index).reshape(-1)

    if not isinstance(target, tuple) or len(target) != 3:
        return flat(target) if isinstance(target, Tensor) else target
    y, y2, lam = target
    if isinstance(lam, Tensor) and lam.dim():
        try:
            lam = lam.expand(lead)
        except RuntimeError:
            raise RuntimeError(
                f"lam of shape {list(lam.shape)} does not broadcast to the labels' {list(lead)}"
            ) from None
        lam = shifted(lam, shift, 0.0).reshape(-1)
    return flat(y), flat(y2), lam
