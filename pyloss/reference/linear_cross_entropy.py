"""The losses of a linear layer's output written with ordinary PyTorch operations.

All logits are formed, in float64 or float32, and given to the reference of ``row_softmax``; what an
option means stands there.  Two things are new.  Rows whose label is ignored are replaced before the
product, because 0 times a NaN would reach the gradient of the weight.  And ``shift`` cuts the last
positions off the input and the first ones off the targets and token weights, as a next-token loss
written by hand does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.reference.row_softmax import Target, row_softmax


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    linear_bias: Tensor | None = None,
    *,
    shift: int = 0,
    ignore_index: int | None = None,
    **options,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Loss (and statistics) of ``F.linear(input, ...)``; see ``pyloss.fused_linear_cross_entropy``.

    The logits are float64 when a floating argument is float64 and float32 otherwise.

    Args:
        input: ``(D)`` or ``(..., D)``.
        linear_weight: ``(V, D)``; or ``(V, d1, ..., dk, D)`` with ``input`` of shape ``(N, D)``.
        target: class indices ``input.shape[:-1]``, probabilities ``(*input.shape[:-1], V)`` or
            ``(y, y2, lam)``; for ``dk``-dimensional weights as the logits' ``(N, V, d1, ..., dk)``
            ask for.
        linear_bias: ``(V)``, or ``(V, d1, ..., dk)``.
        shift: position t of dimension -2 of ``input`` belongs to position t + shift of the targets,
            of ``token_weight`` and of a tensor ``temperature``.
        ignore_index: None means -100.
        options: those of the reference of ``row_softmax``; ``temperature`` may be a tensor, 0-d or
            of the shape ``input.shape[:-1]``.

    Returns:
        The loss, or the pair of the loss and a dict of the statistics named in ``return_stats``.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    labels = target if isinstance(target, tuple) else (target,)
    dense = torch.is_tensor(labels[0]) and labels[0].is_floating_point()
    double = any(
        torch.is_tensor(t) and t.dtype == torch.float64
        for t in (input, linear_weight, linear_bias, *(labels if dense else ()))
    )
    dtype = torch.float64 if double else torch.float32
    if options.get("loss_dtype") is None:
        options["loss_dtype"] = input.dtype
        if dense:
            options["loss_dtype"] = torch.promote_types(input.dtype, labels[0].dtype)
    weight = linear_weight.to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)

    if weight.dim() > 2:
        flat_bias = None if bias is None else bias.reshape(-1)
        logits = F.linear(input.to(dtype), weight.reshape(-1, weight.shape[-1]), flat_bias)
        logits = logits.reshape(input.shape[0], *weight.shape[:-1])
        return row_softmax(logits, target, ignore_index=ignore_index, **options)

    def moved(t, dim):
        """A per-position argument without its first `shift` positions."""
        return t.narrow(dim, shift, t.shape[dim] - shift) if shift else t

    lead = input.shape[:-1]
    if dense:
        target = moved(labels[0], -2).reshape(-1, weight.shape[0])
        ignored = None
    elif len(labels) == 3:
        y, y2, lam = labels
        lam = torch.as_tensor(lam, dtype=dtype, device=input.device).expand(lead)
        target = tuple(moved(t, -1).reshape(-1) for t in (y, y2, lam))
        # As int64: compared in its own dtype, a uint8 label of 156 would equal -100.
        ignored = (target[0].long() == ignore_index) | (target[1].long() == ignore_index)
    else:
        target = moved(labels[0], -1).reshape(-1)
        ignored = target.long() == ignore_index
    if isinstance(options.get("temperature"), Tensor):
        temperature = moved(options["temperature"].to(dtype).expand(lead), -1).reshape(-1)
        if ignored is not None:
            temperature = torch.where(ignored, 1.0, temperature)
        options["temperature"] = temperature.unsqueeze(-1)
    if options.get("token_weight") is not None:
        options["token_weight"] = moved(options["token_weight"], -1).reshape(-1)
    if shift:
        input = input.narrow(-2, 0, input.shape[-2] - shift)
        lead = input.shape[:-1]
    rows = input.to(dtype).reshape(math.prod(lead), input.shape[-1])
    if ignored is not None:
        rows = torch.where(ignored.unsqueeze(-1), 0.0, rows)
    found = row_softmax(F.linear(rows, weight, bias), target, ignore_index=ignore_index, **options)

    loss, stats = found if isinstance(found, tuple) else (found, None)
    if options.get("reduction") == "none":
        loss = loss.reshape(lead)
    if stats is None:
        return loss
    return loss, {name: value.reshape(lead) for name, value in stats.items()}


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every token, and the entropy; see ``pyloss.token_logprobs``."""
    _, stats = linear_cross_entropy(
        hidden,
        weight,
        tokens,
        bias,
        shift=shift,
        ignore_index=ignore_index,
        reduction="sum",
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        return_stats=("logprob", "entropy"),
    )
    return (stats["logprob"], stats["entropy"]) if return_entropy else stats["logprob"]
