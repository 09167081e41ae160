"""The output layer of a transformers model: the Linear below its wrappers and adapters.

What PEFT puts over an output layer is read without importing PEFT: a layer that is trained in place
of the original (`modules_to_save`), and LoRA, which adds scale * B (A x) to the logits. The sum is
one product again, [W, B] times [h, scale * A h], and so the loss need not know of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyloss.nn._layer_call import exchanged, exchanged_forward, view_of, view_with

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
            self._check_split(weight, hidden, extra)
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

    def _check_split(self, weight: Any, hidden: Tensor, extra: Tensor | None) -> None:
        """A DTensor in the layer's own forward is a split of the classes if the input, which the
        layer's tensor parallelism has laid out, is one on the same mesh; else a weight of FSDP2
        that has not been gathered."""
        if getattr(hidden, "device_mesh", None) != weight.device_mesh:
            raise RuntimeError(
                f"the weight of the output layer is a DTensor ({weight.placements}) inside its own "
                "forward, and its input is none of the same mesh. Under FSDP2 put the output layer "
                "into a call of fully_shard, and a layer that shares its weight into the same one: "
                "fully_shard([embedding, lm_head]). For tensor parallelism use parallelize_module "
                "with ColwiseParallel, or a tp_plan"
            )
        if self.adapters or extra is not None:
            what = "LoRA on" if self.adapters else "a bias that the model adds to the logits of"
            raise RuntimeError(f"{what} a tensor-parallel output layer is not supported")


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
    forward = getattr(inner, "__dict__", {}).get(_slot_of(inner))
    if _is_tensor_parallel(forward):
        forward = nn.Linear.forward
    if forward is None:
        forward = getattr(type(inner), "forward", None)
    # Subclasses with the same forward are fine: that is what fully_shard makes.
    if not isinstance(inner, nn.Linear) or (
        getattr(forward, "__func__", forward) is not nn.Linear.forward
    ):
        raise TypeError(f"{found} {full_name(layer)}")
    return inner


def _slot_of(linear: Any) -> str:
    """accelerate's hooks (offloading) are a forward of their own, which calls _old_forward."""
    return "_old_forward" if hasattr(linear, "_hf_hook") else "forward"


def _is_tensor_parallel(forward: Any) -> bool:
    """The forward that transformers puts on a layer of a `tp_plan`, in the place of hooks."""
    module, name = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
    return module == "transformers.distributed.tensor_parallel" and name.endswith(".tp_forward")


def _style_of(linear: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """What the `tp_plan` of transformers does to the layer's input; None without one."""
    forward = linear.__dict__.get(_slot_of(linear))
    if not _is_tensor_parallel(forward):
        return None
    free = inspect.getclosurevars(forward).nonlocals

    def style(hidden: Tensor) -> Tensor:
        prepare = free["self"].transform_inputs_pre_forward
        return prepare(linear, (hidden,), {}, free["mesh"])[0][0]

    return style


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


def called_with(head: Head, function: Callable, hidden: Tensor) -> Any:
    """What the output layer returns when function is the forward of the Linear in it."""
    layer, linear = head.layer, head.linear
    slot, style = _slot_of(linear), _style_of(linear)
    # Without its checkpoint_wrapper, which would call it again in the backward: nothing is lost,
    # since there are no logits to save the memory of.
    reached = []

    def forward(hidden: Tensor) -> Any:
        reached.append(True)
        return function(hidden if style is None else style(hidden))

    if torch.compiler.is_compiling():
        inner = layer._modules.get("_fsdp_wrapped_module", layer)
        wrapped = inner._modules.get("_checkpoint_wrapped_module")
        with exchanged_forward(linear, slot, function if style is None else forward):
            if wrapped is None:
                return layer(hidden)
            with exchanged(inner.__dict__, "forward", wrapped):
                return layer(hidden)
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
    if name is None:
        return view_with(layer, slot, function)
    view = view_of(layer)
    inner = _layer_view(layer._modules[name], slot, function)
    view.__dict__["_modules"] = {**layer._modules, name: inner}
    if name == "_checkpoint_wrapped_module":
        view.__dict__["forward"] = inner
    return view
