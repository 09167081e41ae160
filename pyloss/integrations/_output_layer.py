"""The output layer of a transformers model: the Linear below its wrappers and adapters.

What PEFT puts over an output layer is read without importing PEFT: a layer that is trained in place
of the original (`modules_to_save`), and LoRA, which adds scale * B (A x) to the logits. The sum is
one product again, [W, B] times [h, scale * A h], and so the loss need not know of it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FORWARDS = ("forward", "_old_forward")
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Adapter(NamedTuple):
    """One LoRA adapter: scale * up(down(dropout(x)))."""

    down: nn.Linear
    up: nn.Linear
    dropout: nn.Module
    scale: float


class Head(NamedTuple):
    """An output layer."""

    layer: nn.Module  # the Linear with the wrappers whose hooks must run
    linear: nn.Linear
    adapters: tuple[Adapter, ...]

    @property
    def classes(self) -> int:
        return self.linear.out_features

    def product(self, hidden: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(input, weight, bias) whose product is the layer's output plus `extra`."""
        weight, bias = self.linear.weight, self.linear.bias
        if hasattr(weight, "placements"):
            raise RuntimeError(
                f"the weight of the output layer is a DTensor ({weight.placements}) inside its own "
                "forward. Under FSDP2 put the output layer into a call of fully_shard, and a layer "
                "that shares its weight into the same one: fully_shard([embedding, lm_head]). "
                "Tensor parallelism of the output layer is not supported here"
            )
        inputs, weights, biases = [hidden], [weight], [bias, extra]
        for a in self.adapters:
            low = a.scale * a.down(a.dropout(hidden.to(a.down.weight.dtype)))
            inputs.append(low.to(hidden.dtype))
            weights.append(a.up.weight.to(weight.dtype))
            biases.append(None if a.up.bias is None else a.scale * a.up.bias)
        if self.adapters:
            hidden, weight = torch.cat(inputs, -1), torch.cat(weights, 1)
        bias = None
        for b in biases:
            if b is not None:
                b = b.to(weight)
                bias = b if bias is None else bias + b
        return hidden, weight, bias


def head_of(layer: Any, found: str) -> Head:
    """What an output layer consists of; an error that begins with `found` if that is not known.

    At each call, since adapters are added, switched and taken off between the calls.
    """
    adapters: tuple[Adapter, ...] = ()
    if _is_of_peft(layer, "AuxiliaryTrainingWrapper"):
        layer = _saved(layer, found)
    if _is_of_peft(layer, "BaseTunerLayer"):
        adapters = _adapters(layer, found)
        layer = layer.base_layer
    return Head(layer, _linear(layer, found), adapters)


def _linear(layer: Any, found: str) -> nn.Linear:
    """The Linear below the wrappers that it may have got."""
    inner = layer
    while name := next((n for n in _WRAPPED if n in getattr(inner, "_modules", ())), None):
        inner = inner._modules[name]
    # accelerate's hooks (offloading) are a forward of their own, which calls _old_forward.
    slot = "_old_forward" if hasattr(inner, "_hf_hook") else "forward"
    forward = getattr(inner, "__dict__", {}).get(slot)
    if forward is None:
        forward = getattr(type(inner), "forward", None)
    # Subclasses with the same forward are fine: that is what fully_shard makes.
    if not isinstance(inner, nn.Linear) or (
        getattr(forward, "__func__", forward) is not nn.Linear.forward
    ):
        raise TypeError(f"{found} {full_name(layer)}")
    return inner


def full_name(module: Any) -> str:
    """With its package, since adapters and quantised layers are called Linear too."""
    cls = type(module)
    ours = cls.__module__.startswith("torch.nn.")
    return cls.__qualname__ if ours else f"{cls.__module__}.{cls.__qualname__}"


# --------------------------------------------------------------------------------------------------
# PEFT


def _is_of_peft(layer: Any, base: str) -> bool:
    return any(
        cls.__name__ == base and cls.__module__.partition(".")[0] == "peft"
        for cls in type(layer).__mro__
    )


def _saved(wrapper: Any, found: str) -> nn.Module:
    """The layer that a wrapper of `modules_to_save` uses now."""
    if not hasattr(wrapper, "modules_to_save"):
        raise TypeError(f"{found} {full_name(wrapper)}")
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active:
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _adapters(layer: Any, found: str) -> tuple[Adapter, ...]:
    """The adapters that a LoRA layer adds to its base layer now."""
    name = full_name(layer)
    if not name.startswith("peft.tuners.lora.") or not hasattr(layer, "lora_A"):
        raise TypeError(
            f"{found} an adapter of the type {name}. Of adapters on the output layer patch_loss "
            "knows LoRA and modules_to_save"
        )
    if layer.disable_adapters or layer.merged:
        return ()
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    for a in active:
        if variant := layer.lora_variant.get(a):
            raise TypeError(
                f"{found} LoRA with the variant {type(variant).__name__}, which is no sum of two "
                "products; only plain LoRA is supported on the output layer"
            )
    return tuple(
        Adapter(layer.lora_A[a], layer.lora_B[a], layer.lora_dropout[a], layer.scaling[a])
        for a in active
    )


# --------------------------------------------------------------------------------------------------
# Calls with another forward


def called_with(head: Head, function: Callable, hidden: Tensor) -> Tensor:
    """What the output layer returns when function is the forward of the Linear in it."""
    layer, linear = head.layer, head.linear
    slot = "_old_forward" if hasattr(linear, "_hf_hook") else "forward"
    # Without its checkpoint_wrapper, which would call it again in the backward: nothing is lost,
    # since there are no logits to save the memory of.
    if torch.compiler.is_compiling():
        inner = layer._modules.get("_fsdp_wrapped_module", layer)
        wrapped = inner._modules.get("_checkpoint_wrapped_module")
        with exchanged(linear.__dict__, slot, function):
            if wrapped is None:
                return layer(hidden)
            with exchanged(inner.__dict__, "forward", wrapped):
                return layer(hidden)
    reached = []

    def forward(hidden: Tensor) -> Tensor:
        reached.append(True)
        return function(hidden)

    value = _layer_view(layer, slot, forward)(hidden)
    if not reached:
        raise TypeError(
            f"patch_loss needs an output layer with the forward of torch.nn.Linear, but hooks of "
            f"this {full_name(layer)} call another one"
        )
    return value


def _layer_view(layer: nn.Module, slot: str, function: Callable) -> nn.Module:
    """A view of the output layer, wrappers included, with function as the Linear's forward."""
    name = next((name for name in _WRAPPED if name in layer._modules), None)
    view = object.__new__(type(layer))
    view.__dict__.update(layer.__dict__)
    bind_to(view, layer)
    if name is None:
        view.__dict__[slot] = function
        return view
    inner = _layer_view(layer._modules[name], slot, function)
    view.__dict__["_modules"] = {**layer._modules, name: inner}
    if name == "_checkpoint_wrapped_module":
        view.__dict__["forward"] = inner
    return view


def bind_to(view: nn.Module, module: nn.Module) -> None:
    """Forwards that accelerate keeps on the module itself must not lead back to it."""
    for slot in FORWARDS:
        bound = view.__dict__.get(slot)
        if getattr(bound, "__self__", None) is module:
            view.__dict__[slot] = types.MethodType(bound.__func__, view)
        elif isinstance(bound, functools.partial) and bound.args and bound.args[0] is module:
            rest = bound.args[1:]
            view.__dict__[slot] = functools.partial(bound.func, view, *rest, **bound.keywords)


@contextmanager
def exchanged(entries: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """A dictionary with another entry, as long as it takes."""
    present, before = name in entries, entries.get(name)
    entries[name] = value
    try:
        yield
    finally:
        if present:
            entries[name] = before
        else:
            del entries[name]
