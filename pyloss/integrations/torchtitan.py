"""The loss of a language model in the form that TorchTitan calls, with the output layer inside.

TorchTitan is not needed: its losses are called with (predictions, labels, number of tokens of all
ranks) and return (loss, metrics), and one that contains the output layer gets it by `set_lm_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import fused_linear_cross_entropy
from pyloss.integrations._output_layer import Head, called_with, head_of

__all__ = ["ChunkedLMHeadLoss"]

# What is given by the arguments of forward, or must stay as it is.
_RESERVED = (
    "input", "linear_weight", "linear_bias", "target", "reduction", "num_items", "shift",
    "return_stats", "token_weight", "group", "options", "empty",
)  # fmt: skip
_METRICS = {"accuracy": "correct", "entropy": "entropy", "z_loss": "z_loss"}


class ChunkedLMHeadLoss(nn.Module):
    r"""Cross entropy of hidden states under an output layer that is set once: TorchTitan's form.

    .. math:: \ell = \frac{1}{N} \sum_t \ell_\mathrm{fused}(W h_t + b,\; y_t)

    over the labels of this call that are not ``ignore_index``, with N the number of them in all
    calls and on all ranks that make one step; the sum of the losses, and of the gradients, is then
    the mean over these tokens. Logits exist one chunk at a time.

    Args:
        ignore_index: label that does not count.
        metrics: of ``"accuracy"``, ``"entropy"``, ``"z_loss"``, which of them to return.
        loss_options: options of :func:`pyloss.fused_linear_cross_entropy`: ``z_loss``,
            ``label_smoothing``, ``tau``, ``truncate``, ``temperature``, ``softcap``,
            ``logit_scale``, ``weight``, ``chunk``, ``strategy``, ``accumulate_dtype``, ``filter``,
            ``loss_dtype`` (default float32; float64 for float64).

    Raises:
        TypeError: an unknown option or one that the call decides.
        ValueError: an unknown metric.

    Example:
        >>> import torch
        >>> from pyloss.integrations.torchtitan import ChunkedLMHeadLoss
        >>> lm_head = torch.nn.Linear(16, 1000, bias=False)
        >>> loss_fn = ChunkedLMHeadLoss(metrics=("accuracy",))
        >>> loss_fn.set_lm_head(lm_head)
        >>> hidden, labels = torch.randn(2, 8, 16), torch.randint(1000, (2, 8))
        >>> loss, metrics = loss_fn(hidden, labels, torch.tensor(32))  # 16 of 32 tokens are here
        >>> loss.backward()
        >>> list(metrics)
        ['accuracy/mean']

    Reference:
        Wijmans et al. Cut Your Losses in Large-Vocabulary Language Models. arXiv 2411.09009.
    """

    def __init__(
        self, *, ignore_index: int = -100, metrics: Sequence[str] = (), **loss_options: Any
    ) -> None:
        super().__init__()
        for name in metrics:
            if name not in _METRICS:
                raise ValueError(f"metrics must be of {', '.join(_METRICS)}, got {name!r}")
        known = fused_linear_cross_entropy.__annotations__
        for name in loss_options:
            if name in _RESERVED or name not in known:
                choice = ", ".join(sorted(set(known) - {*_RESERVED, "ignore_index", "return"}))
                raise TypeError(f"loss_options has {name!r}; there are {choice}")
        self.ignore_index = ignore_index
        self.metrics = tuple(metrics)
        self.loss_options = loss_options
        self.__dict__["lm_head"] = None  # not a submodule: its parameters are the model's

    def extra_repr(self) -> str:
        options = {"ignore_index": self.ignore_index, "metrics": self.metrics, **self.loss_options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Set the output layer: a Linear, also below ``fully_shard``, ``parallelize_module``, LoRA
        or checkpointing."""
        _head(lm_head)
        self.__dict__["lm_head"] = lm_head

    def forward(
        self,
        pred: Tensor | tuple[Tensor, ...],
        labels: Tensor | tuple[Tensor, ...],
        global_valid_tokens: float | Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            pred: hidden states before the output layer, ``(..., d)``; or several, as of
                multi-token prediction, whose losses are added.
            labels: class indices ``(...)``, one tensor for each of ``pred``; not shifted here.
            global_valid_tokens: N, a number or a 0-d tensor; None: 1, the loss is the sum.
            inputs: what else the trainer passes; not used.

        Returns:
            The loss, 0-d, and the metrics, whose sum over ranks and micro-batches is the mean over
            N tokens.
        """
        if self.lm_head is None:
            raise RuntimeError("ChunkedLMHeadLoss needs set_lm_head(lm_head) before its first call")
        pairs = _aligned(pred, labels)
        head = _head(self.lm_head)
        results = [self._loss(head, p, y, global_valid_tokens) for p, y in pairs]
        if len(results) == 1:
            return results[0]
        losses, metrics = zip(*results)
        return torch.stack(losses).sum(), {
            name: torch.stack([m[name] for m in metrics]).sum() for name in metrics[0]
        }

    def _loss(
        self, head: Head, pred: Tensor, labels: Tensor, items: float | Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = dict(self.loss_options, ignore_index=self.ignore_index, empty="zero")
        options["return_stats"] = [_METRICS[name] for name in self.metrics]
        if pred.dtype != torch.float64:
            options.setdefault("loss_dtype", torch.float32)
        if items is None:
            options["reduction"], count = "sum", 1
        else:
            if not isinstance(items, Tensor) and items == 0:  # as the tensor 0
                items = torch.zeros((), device=pred.device)
            options["num_items"] = items
            # A step without labels: 0 / 0 is 0 for the metrics, as for the loss.
            count = torch.where(items == 0, 1, items) if isinstance(items, Tensor) else items

        def loss(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            hidden, weight, bias = head.product(hidden, None)
            found = fused_linear_cross_entropy(hidden, weight, labels, bias, **options)
            if not self.metrics:
                return found, {}
            value, stats = found
            counted, metrics = labels != self.ignore_index, {}
            for name in self.metrics:
                per_token = getattr(stats, _METRICS[name]).detach()
                total = torch.where(counted, per_token, 0).sum()
                metrics[f"{name}/mean"] = total.to(value.dtype) / count
            return value, metrics

        return called_with(head, loss, pred)  # the layer's hooks run: FSDP2 gathers its weight


def _head(lm_head: nn.Module) -> Head:
    return head_of(lm_head, "lm_head must be a torch.nn.Linear, got")


def _aligned(pred: Any, labels: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(pred, Tensor) and isinstance(labels, Tensor):
        pred, labels = (pred,), (labels,)
    both = isinstance(pred, tuple) and isinstance(labels, tuple)
    if not both or len(pred) != len(labels) or not pred:
        raise TypeError(
            "pred and labels must be two tensors, or two tuples of the same number of tensors"
        )
    for p, y in zip(pred, labels):
        if p.shape[:-1] != y.shape:
            raise ValueError(
                f"labels must have the shape of pred without its last dimension, "
                f"{list(p.shape[:-1])}, got {list(y.shape)}"
            )
    return list(zip(pred, labels))
