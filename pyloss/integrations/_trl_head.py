"""The fused output layer of TRL's trainers, computed by pyloss.

TRL gives a model a forward that, called with `fused_lm_head=True`, hands hidden states and output
layer to a function of its own, which returns log-probabilities of tokens. Here that forward gets a
copy of itself with one global name changed: the one of this function. All the rest stays TRL's
code: what the model is called with, which positions count, scale, soft capping and temperature.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import fused_linear_cross_entropy

_NAME = "_ChunkedLogProbFunction"  # in trl.trainer.utils
_MARK = "_pyloss_original"
_MEAN_ROWS = 1024  # of logits at a time


class TokenLogProbs:
    """Stands for TRL's function. `log_probs` is minus the loss of the options, if there are any."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), None for what is not in
        `outputs`. There is no chunk of the classes."""
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        changed = {"softcap": softcap, "logit_scale": logit_scale}

        def rows(temperature: float, stats: list[str], **options: Any) -> Any:
            return fused_linear_cross_entropy(
                hidden, weight, labels, bias, reduction="none", return_stats=stats,
                temperature=temperature, loss_dtype=torch.float32, **changed, **options,
            )  # fmt: skip

        named = {"entropy": "entropy", "is_top1": "correct", "log_sum_sq_probs": "lse"}
        stats = [stat for name, stat in named.items() if name in outputs]
        found = rows(temperature, stats, **self.options)
        loss, found = found if stats else (found, None)
        squares = mean = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:  # sum of p^2: the normaliser at half the temperature
                squares = rows(temperature / 2, ["lse"])[1].lse - 2 * found.lse
            if "mean_logits" in outputs:
                mean = _mean_logits(hidden, weight, bias, softcap, logit_scale) / temperature
        return (
            0.0 - loss,
            found.entropy if "entropy" in outputs else None,
            squares,
            mean,
            found.correct.bool() if "is_top1" in outputs else None,
        )


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """Mean over the classes; without soft capping that of the weights gives it."""
    hidden = hidden.float()
    if softcap is None:
        mean = hidden @ weight.mean(0, dtype=torch.float32)
        return scale * (mean if bias is None else mean + bias.float().mean())
    weight = weight.float()
    parts = [
        (softcap * torch.tanh(scale / softcap * nn.functional.linear(part, weight, bias))).mean(-1)
        for part in hidden.split(_MEAN_ROWS)
    ]
    return torch.cat(parts)


def exchange(model: nn.Module, options: dict[str, Any]) -> None:
    """Let pyloss compute the fused output layer of a model; a second call changes the options."""
    restore(model)
    function = getattr(model.__dict__.get("forward"), "__func__", None)
    if _NAME not in getattr(getattr(function, "__code__", None), "co_names", ()):
        raise TypeError(
            f"this {type(model).__name__} has no fused output layer of TRL as pyloss knows it "
            "(TRL 1.16); call patch_trainer after the trainer is made and before it trains"
        )
    # Without Triton TRL computes all positions; pyloss everywhere only those that count.
    names = {_NAME: TokenLogProbs(options), "_use_triton": lambda device: True}
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)  # `generate` looks at the signature
    setattr(copy, _MARK, function)
    model.forward = types.MethodType(copy, model)


def restore(model: nn.Module) -> None:
    """Undo `exchange`."""
    function = getattr(model.__dict__.get("forward"), "__func__", None)
    if (original := getattr(function, _MARK, None)) is not None:
        model.forward = types.MethodType(original, model)
