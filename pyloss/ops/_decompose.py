"""Ops of pyloss in a graph as the torch operations of their references.

A reference may write into tensors that it has made, and may hold constants; a decomposition may do
neither. So it is traced by itself first, into a graph that writes nowhere, and its constants are
made by operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from pyloss.ops._registry import plain_forms


def check(module: torch.nn.Module) -> None:
    """Raises for an op in a graph that has no plain form, before anything is traced."""
    for name in ops_in(module):
        if not callable(plain_forms[name]):
            raise _without_form(name)


def _without_form(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"pyloss::{name} cannot be made of standard operators: {plain_forms[name]}"
    )


def table() -> dict:
    return {getattr(torch.ops.pyloss, name).default: _form(name) for name in plain_forms}


def _form(name: str) -> Callable:
    form = plain_forms[name]
    if callable(form):
        return functools.partial(_traced, form)

    def refuse(*args, **kwargs):
        raise _without_form(name)

    return refuse


def _traced(form: Callable, *args):
    """form(*args) under the tracer that has met the op, by operations that change nothing."""
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

    leaves, spec = pytree.tree_flatten(args)
    places = [
        at for at, leaf in enumerate(leaves) if isinstance(leaf, (torch.Tensor, torch.SymInt))
    ]

    def of_tensors(*given):
        filled = list(leaves)
        for at, leaf in zip(places, given):
            filled[at] = leaf
        return form(*pytree.tree_unflatten(filled, spec))

    given = [leaves[at] for at in places]
    with disable_proxy_modes_tracing(), _autograd():
        graph = make_fx(dispatch_functionalize(of_tensors))(*given)
    graph.graph.eliminate_dead_code()
    return _WithoutConstants(graph).run(*given)


def _autograd():
    """Autograd on again: a tracer meets an op below it, and the form of a backward needs it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


class _WithoutConstants(torch.fx.Interpreter):
    """Makes a graph's constants by operations: torch keeps none that a decomposition adds."""

    def get_attr(self, target, args, kwargs):
        value = super().get_attr(target, args, kwargs)
        return _made(value) if isinstance(value, torch.Tensor) else value

    def call_function(self, target, args, kwargs):
        if target is torch.ops.aten.lift_fresh_copy.default:  # of a constant
            return args[0]
        return super().call_function(target, args, kwargs)


def _made(constant: torch.Tensor) -> torch.Tensor:
    """The same numbers out of torch.arange and torch.full: indices are few progressions."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        numbers = constant.flatten().tolist()
    kind = dict(dtype=constant.dtype, device=constant.device)
    parts = []
    for start, step, count in _progressions(numbers):
        if count == 1:
            parts.append(torch.full((1,), start, **kind))
        else:
            parts.append(torch.arange(start, start + step * count, step, **kind))
    whole = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.empty(0, **kind)
    return whole.reshape(constant.shape)


def _progressions(numbers: list) -> Iterator[tuple]:
    """(start, step, count) of arithmetic progressions that follow each other."""
    at = 0
    while at < len(numbers):
        step, end = 0, at + 1
        if type(numbers[at]) is int and numbers[at + 1 : at + 2] not in ([], [numbers[at]]):
            step = numbers[at + 1] - numbers[at]
            while end < len(numbers) and numbers[end] == numbers[end - 1] + step:
                end += 1
        yield numbers[at], step, end - at
        at = end


def ops_in(module: torch.nn.Module) -> Iterator[str]:
    """The names of the ops of pyloss in a graph and in the graphs inside it."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "pyloss":
                yield node.target._opname
