"""A layer called with another forward, so that its hooks run around a loss.

FSDP2 gathers a weight in the hooks of its layer and frees it there; tensor parallelism
(`parallelize_module`) brings the input into its layout. What the hooks of tensor parallelism do to
the output, which they take for logits, is left out: it is a loss here.

Nothing is changed on the layer itself, for other threads that call it: what is exchanged is
exchanged on a view, an object of its own that shares all the rest. Under torch.compile, which
cannot make such an object, it is exchanged on the layer, while tracing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FORWARDS = ("forward", "_old_forward")  # the second: accelerate's hooks (offloading)
_HOOKS = "_forward_hooks"


def call_layer(layer: nn.Module, function: Callable, *args: Any) -> Any:
    """What a layer without wrappers returns when function is its forward."""
    if torch.compiler.is_compiling():
        with exchanged_forward(layer, "forward", function):
            return layer(*args)
    return view_with(layer, "forward", function)(*args)


def view_with(layer: nn.Module, slot: str, function: Callable) -> nn.Module:
    """The layer as another object, with function in a slot of FORWARDS."""
    view = view_of(layer)
    view.__dict__[slot] = function
    view.__dict__[_HOOKS] = _kept_hooks(layer)
    return view


def view_of(module: nn.Module) -> Any:
    """The module as another object; parameters, hooks and submodules are shared."""
    view = object.__new__(type(module))  # FSDP2's classes have a __new__ of their own
    view.__dict__.update(module.__dict__)
    _bind_to(view, module)
    return view


def _kept_hooks(layer: nn.Module) -> dict[int, Callable]:
    """Without those of tensor parallelism that lay out the logits."""
    hooks = layer.__dict__[_HOOKS]
    of_torch = "torch.distributed.tensor"
    dropped = [key for key, hook in hooks.items() if _module_of(hook).startswith(of_torch)]
    if not dropped:
        return hooks
    return type(hooks)((key, hook) for key, hook in hooks.items() if key not in dropped)


def _module_of(hook: Callable) -> str:
    return getattr(hook, "__module__", None) or ""


def _bind_to(view: nn.Module, module: nn.Module) -> None:
    """Forwards that accelerate keeps on the module itself must not lead back to it."""
    for slot in FORWARDS:
        bound = view.__dict__.get(slot)
        if getattr(bound, "__self__", None) is module:
            view.__dict__[slot] = types.MethodType(bound.__func__, view)
        elif isinstance(bound, functools.partial) and bound.args and bound.args[0] is module:
            rest = bound.args[1:]
            view.__dict__[slot] = functools.partial(bound.func, view, *rest, **bound.keywords)


@contextmanager
def exchanged_forward(layer: nn.Module, slot: str, function: Callable) -> Iterator[None]:
    """A layer whose forward is another one, as long as it takes."""
    entries, kept = layer.__dict__, _kept_hooks(layer)
    if kept is entries[_HOOKS]:
        with exchanged(entries, slot, function):
            yield
    else:
        with exchanged(entries, slot, function), exchanged(entries, _HOOKS, kept):
            yield


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
