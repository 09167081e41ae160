"""The fused output layer of TRL's trainers, computed by pyloss.

TRL gives a model a forward that, called with `fused_lm_head=True`, hands hidden states, output
layer and the names of the wanted outputs to a function of its own, which returns log-probabilities
of tokens. The names are a variable of that forward, one per model. In a patched model they are a
`Request`, and a function that knows it stands in the place of TRL's, to which all other calls go
on. So it does not matter what accelerate has put around the forward, and all else stays TRL's code:
which positions count, scale, soft capping, temperature.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import fused_linear_cross_entropy

_NAME = "_ChunkedLogProbFunction"  # in trl.trainer.utils
_MEAN_ROWS = 1024  # of logits at a time


class Request(tuple):
    """The names of the outputs that a patched model wants."""

    options: dict[str, Any]


class TokenLogProbs:
    """Stands for TRL's function."""

    def __init__(self, own: Any) -> None:
        self.own = own

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
        `outputs`. `log_probs` is minus the loss of the options, where they make another loss."""
        if not isinstance(outputs, Request):
            return self.own.apply(
                hidden, weight, bias, labels, temperature, chunk_size, softcap, logit_scale, outputs
            )
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
        found = rows(temperature, stats, **outputs.options)
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
    utils = sys.modules["trl.trainer.utils"]
    cell = _outputs_of(model)
    if cell is None or not hasattr(utils, _NAME):
        raise TypeError(
            f"this {type(model).__name__} has no fused output layer of TRL as pyloss knows it "
            "(TRL 1.16); call patch_trainer after the trainer is made"
        )
    if not isinstance(getattr(utils, _NAME), TokenLogProbs):  # for good: others do not notice
        setattr(utils, _NAME, TokenLogProbs(getattr(utils, _NAME)))
    request = Request(cell.cell_contents)
    request.options = options
    cell.cell_contents = request


def is_exchanged(model: nn.Module) -> bool:
    """Whether pyloss computes the fused output layer of a model."""
    return isinstance(getattr(_outputs_of(model), "cell_contents", None), Request)


def restore(model: nn.Module) -> None:
    """Undo `exchange`."""
    if is_exchanged(model):
        cell = _outputs_of(model)
        cell.cell_contents = tuple(cell.cell_contents)


def _outputs_of(model: nn.Module) -> Any:
    """The variable `outputs` of the model's fused forward; None without such a forward."""
    function = model.__dict__.get("forward")
    while function is not None:
        code = getattr(function, "__code__", None)
        if _NAME in getattr(code, "co_names", ()) and "outputs" in code.co_freevars:
            return function.__closure__[code.co_freevars.index("outputs")]
        function = getattr(function, "__wrapped__", None)
    return None
