"""Gradients by torch operations: of an op's reference, where no kernel serves or a gradient will be
differentiated itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    function: Callable,
    sources: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needed: Sequence[bool] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of `function(*sources)`, one for each source; None for those not needed.

    Args:
        function: of all sources, in torch operations; gives one output or several.
        cotangents: one for each output. An output counts where both are tensors; a cotangent is
            brought to the dtype of its output.
        needed: None: all sources that are tensors.
        create_graph: the gradients are functions of sources and cotangents, to any order. None then
            also stands for a gradient that is 0 because nothing depends on the source; without, it
            is a tensor of zeros.
    """
    needed = [s is not None for s in sources] if needed is None else needed
    with torch.enable_grad():
        sources = [_source(s, yes, create_graph) for s, yes in zip(sources, needed)]
        outputs = function(*sources)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [
            (o, g.to(o.dtype))
            for o, g in zip(outputs, cotangents)
            if o is not None and g is not None and o.requires_grad
        ]
        asked = [s for s, yes in zip(sources, needed) if yes]
        found = [None] * len(asked)
        if pairs and asked:
            outputs, cotangents = zip(*pairs)
            found = torch.autograd.grad(
                outputs, asked, cotangents, create_graph=create_graph, allow_unused=True
            )
    if not create_graph:
        found = [torch.zeros_like(s) if g is None else g for s, g in zip(asked, found)]
    found = iter(found)
    return [next(found) if yes else None for yes in needed]


def _source(s: Tensor | None, needed: bool, create_graph: bool) -> Tensor | None:
    """What is differentiated by: a view of the given one, because one source may depend on another,
    or be the same, and the gradients are partial ones; a leaf where that has no graph.
    """
    if s is None or (create_graph and not needed):
        return s
    if not needed:
        return s.detach()
    # Not a leaf in any case: under torch.func.vmap none can be made.
    return s.view_as(s) if s.requires_grad else s.detach().requires_grad_()
