"""Logits that are not there: what stands for them in a model's forward, and the loss of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import fused_linear_cross_entropy
from pyloss.integrations._output_layer import Head, called_with


class DeferredHead(nn.Module):
    """Takes the output layer's place during a forward."""

    def __init__(self, head: Head, options: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__["head"] = head  # not as a submodule
        self.__dict__["options"] = options

    def __getattr__(self, name: str) -> Any:  # some models look at the weight's dtype
        return getattr(self.__dict__["head"].linear, name)

    def forward(self, hidden: Tensor) -> Deferred:
        return Deferred(hidden, self.__dict__["head"], self.__dict__["options"])


class Deferred:
    """Stands for `outer * tanh(z)`, or for z, with `z = inner * logits + shift`, of the hidden
    states; grows with the model's own steps on its logits."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        options: dict[str, Any],
        inner: float = 1.0,
        outer: float | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self.hidden, self.head, self.options = hidden, head, options
        self.inner, self.outer, self.shift = inner, outer, shift

    def transform(self) -> tuple[float | None, float]:
        """(softcap, logit_scale), for softcap * tanh(logit_scale * logits / softcap)."""
        if self.outer is None:
            return None, self.inner
        scale = self.inner * self.outer
        # x / cap, then tanh, then * cap: no scale, though 1 / cap * cap is not always 1.
        return self.outer, 1.0 if math.isclose(scale, 1.0, rel_tol=1e-12) else scale

    def bias(self) -> Tensor | None:
        """What is added to the logits before they are scaled, beside the layer's own bias."""
        return None if self.shift is None else self.shift / self.inner

    def _with(self, **changes: Any) -> Deferred:
        return Deferred(**{**self.__dict__, **changes})

    def _times(self, factor: float) -> Deferred:
        if self.outer is not None:
            return self._with(outer=self.outer * factor)
        shift = None if self.shift is None else self.shift * factor
        return self._with(inner=self.inner * factor, shift=shift)

    def __mul__(self, factor: Any) -> Deferred:
        return self._times(_number(factor, "multiplies its logits by"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Deferred:
        return self._times(1.0 / _number(divisor, "divides its logits by"))

    def __add__(self, other: Any) -> Deferred:
        """A bias of the classes, as `final_logits_bias` of Bart."""
        classes = self.head.classes
        if not isinstance(other, Tensor) or other.numel() != classes or other.shape[-1] != classes:
            raise _unknown("adds something other than one number per class to its logits")
        if self.outer is not None:
            raise _unknown("adds to its logits after a tanh")
        other = other.reshape(classes)
        return self._with(shift=other if self.shift is None else self.shift + other)

    __radd__ = __add__

    def tanh(self) -> Deferred:
        if self.outer is not None:
            raise _unknown("applies tanh to its logits twice")
        return self._with(outer=1.0)

    # The loss works in float32 and has its own layout: these change nothing.
    def float(self) -> Deferred:
        return self

    def contiguous(self) -> Deferred:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Deferred:
        return self

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.classes))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> Deferred:
        """Tokens in one row; the classes stay the last dimension."""
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(shape) < 2 or shape[-1] not in (-1, self.head.classes):
            if shape == (-1, shape[-1]):
                raise ValueError(
                    f"the model's vocab_size is {shape[-1]}, but its output layer has "
                    f"{self.head.classes} classes"
                )
            raise _unknown(f"brings its logits into the shape {shape}")
        return self._with(hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    reshape = view

    @classmethod
    def __torch_function__(
        cls, function: Callable, classes: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is nn.functional.cross_entropy and args and isinstance(args[0], cls):
            return args[0]._cross_entropy(*args[1:], **(kwargs or {}))
        if len(args) == 2 and function in (Tensor.add, Tensor.__add__, torch.add) and not kwargs:
            # Not a + b, of which torch.compile would make this call again.
            a, b = args
            return a.__add__(b) if isinstance(a, cls) else b.__add__(a)
        one_argument = len(args) == 1 and isinstance(args[0], cls) and not kwargs
        if one_argument and function in (torch.tanh, torch.Tensor.tanh):
            return args[0].tanh()
        name = getattr(function, "__name__", str(function))
        raise _unknown(f"calls {name} on its logits")

    def _cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """torch's cross_entropy, for models that have no loss function: T5, Bart, Whisper."""
        if weight is not None or reduction != "mean" or label_smoothing or self.hidden.dim() != 2:
            raise _unknown(
                "calls cross_entropy with class weights, label smoothing, another reduction than "
                "the mean, or logits that are not (tokens, classes)"
            )
        return _loss(self, target, None if ignore_index == -100 else ignore_index)

    def __getitem__(self, index: Any) -> Any:
        # A part of the tokens; the classes must stay whole.
        whole = slice(None)
        entries = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(entry, slice) for entry in entries):
            raise _unknown("takes a part of its logits")
        if len(entries) == len(self.shape):
            *entries, last = entries
            if last != whole:
                raise _unknown("takes a part of its logits")
        return self._with(hidden=self.hidden[tuple(entries)])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(f"uses .{name} of its logits")


def _number(value: Any, does: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _unknown(f"{does} a {type(value).__name__}")
    return value


def _unknown(what: str) -> TypeError:
    return TypeError(
        f"patch_loss cannot follow this model: it {what}. Known are a number as factor or divisor, "
        "a bias of the classes and soft capping by tanh; unpatch_loss(model) brings the original "
        "loss back"
    )


# --------------------------------------------------------------------------------------------------
# The loss


def causal_loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int | None = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """ForCausalLMLoss of a Deferred."""
    _check(logits, vocab_size)
    if shift_labels is not None:
        return _loss(logits, shift_labels, ignore_index, num_items_in_batch)
    return _loss(logits, labels, ignore_index, num_items_in_batch, shift=1)


def masked_loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """ForMaskedLMLoss of a Deferred."""
    _check(logits, vocab_size)
    return _loss(logits, labels, ignore_index, num_items_in_batch)


def _check(logits: Any, vocab_size: int | None) -> None:
    if not isinstance(logits, Deferred):
        raise TypeError(
            "patch_loss cannot follow this model: its loss is not computed from the output of "
            f"get_output_embeddings(), but from a {type(logits).__name__}"
        )
    if vocab_size is not None and vocab_size != logits.head.classes:
        raise ValueError(
            f"the model's vocab_size is {vocab_size}, but its output layer has "
            f"{logits.head.classes} classes"
        )


def _loss(
    logits: Deferred,
    labels: Tensor,
    ignore_index: int | None = None,
    num_items: float | Tensor | None = None,
    shift: int = 0,
) -> Tensor:
    """Cross entropy of the labels, those of the next tokens with shift 1."""
    options, head = dict(logits.options), logits.head
    ignore = options.pop("ignore_index", None) if ignore_index is None else ignore_index
    options["ignore_index"] = -100 if ignore is None else ignore
    options["softcap"], options["logit_scale"] = logits.transform()
    if isinstance(options.get("weight"), Tensor):
        options["weight"] = options["weight"].to(logits.device)
    if logits.hidden.dtype != torch.float64:  # as ForCausalLMLoss, which converts the logits
        options.setdefault("loss_dtype", torch.float32)
    divisor = _set_denominator(options, num_items)
    if shift and labels.shape[-1] == 1:  # nothing follows a single token
        labels, shift = torch.full_like(labels, options["ignore_index"]), 0

    def loss(hidden: Tensor) -> Tensor:
        hidden, weight, bias = head.product(hidden, logits.bias())
        target = labels.to(hidden.device)
        if not shift:
            target, hidden = target.reshape(-1), hidden.flatten(0, -2)
        elif hidden.dim() != target.dim() + 1:  # a model that has flattened its logits
            hidden = hidden.reshape(*target.shape, hidden.shape[-1])
        return fused_linear_cross_entropy(hidden, weight, target, bias, shift=shift, **options)

    value = called_with(head, loss, logits.hidden)  # all hooks and other wrappers run
    return value if divisor is None else _divided(value, divisor)


def _set_denominator(options: dict[str, Any], num_items: Any) -> Any:
    """Put num_items_in_batch into the options. Returns what is left to divide the loss by.

    0 labels are left to _divided: behind the loss, where their factor 1 / 0 meets no gradient.
    """
    if num_items is None:
        options["reduction"] = "mean"
        return None
    if isinstance(num_items, Tensor):
        single = num_items.dim() == 0
    else:
        single = num_items > 0
    if not single:
        # One entry per device, under DataParallel; or a batch without labels, 0 / 0.
        options["reduction"] = "sum"
        return torch.as_tensor(num_items, dtype=torch.float32)
    options["reduction"], options["num_items"] = "mean", num_items
    if not isinstance(num_items, Tensor):
        return None
    options["num_items"] = torch.where(num_items == 0, 1, num_items)
    return torch.where(num_items == 0, 0.0, 1.0)  # the rest of the division


def _divided(value: Tensor, divisor: Tensor) -> Tensor:
    """value / divisor; by 0 the value is torch's, NaN, and the gradient 0, which it also is there:
    that of each row is 0, and nothing is multiplied by the infinite factor."""
    divisor = divisor.to(value.device)
    none = divisor == 0
    return torch.where(none, value.detach() / divisor, value / torch.where(none, 1, divisor))
