"""What surrounds a call: torch.func transforms, forward mode, hooks on saved tensors."""

from __future__ import annotations

import functools
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor


def functorch_active() -> bool:
    """Whether a torch.func transform is running; those need ops that vmap can look into."""
    return _functorch_active()


def forward_ad_active() -> bool:
    """Whether a forward-mode level is open, so that inputs may carry tangents."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def saved_tensor_hooks_active() -> bool:
    """Whether saved tensors are being hooked (checkpointing, offloading)."""
    return _top_hooks(False) is not None


def is_batched(t: torch.Tensor) -> bool:
    """Whether a tensor stands for a batch (vmap, is_grads_batched)."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the checks, and hands over no such one
        return False
    return _is_batched(t) or _is_legacy_batched(t)


def is_transformed(t: torch.Tensor) -> bool:
    """Whether a tensor has no numbers of its own to look at: a torch.func transform has wrapped
    it, and they may be many, or it is a fake one."""
    return _is_wrapped(t) or isinstance(t, FakeTensor)


def distinct(tensors):
    """The same for Function.apply under torch.compile, which takes no tensor twice: a view for
    each repetition there, nothing at all in eager mode.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found = []
    for at, t in enumerate(tensors):
        again = isinstance(t, torch.Tensor) and any(t is other for other in tensors[:at])
        found.append(t.view_as(t) if again else t)
    return tuple(found)


def eager(function):
    """The function, kept out of compiled graphs: compiled code calls it as it is.

    torch.compiler.disable as a decorator would do the same, and import Dynamo with all its weight.
    """

    disabled = []  # made with the first call that needs it

    @functools.wraps(function)
    def call(*args, **options):
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **options)

    return call


# Private in torch, hence the fallbacks: without them an optimisation stays on where it should not,
# or a transform fails loudly.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batched = getattr(torch._C._functorch, "is_batchedtensor", lambda t: False)
_is_wrapped = getattr(
    torch._C._functorch, "is_functorch_wrapped_tensor", lambda t: _functorch_active()
)
_is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)
_top_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)
