"""A subclass put in the place of an instance's class: how the integrations change a `forward`.

A class, and not an attribute `forward` on the instance, since copies (deepcopy, pickle, the
replicas of DataParallel) then run their own forward and not that of the original.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any


def lookalike(cls: type, forward: Callable, subclass_of: Callable[[type], type]) -> type:
    """A subclass of cls with another forward that looks the same from outside.

    `subclass_of(cls)` must give this same class again: copy and pickle make instances with it.
    """

    def reduce_ex(self, protocol):
        _, _, *rest = super(made, self).__reduce_ex__(max(protocol, 2))
        return (_new, (subclass_of, cls), *rest)

    # Same name and module: save_pretrained writes the name into the configuration.
    made = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": reduce_ex,
            "_pyloss_original": cls,
            "forward": forward,
        },
    )
    return made


def change_class(module: Any, made: type, caller: str) -> None:
    """Make a module an instance of a lookalike of its class."""
    # accelerate's hooks keep a bound forward on the module itself, where it hides the class's.
    slots = [slot for slot in ("forward", "_old_forward") if slot in module.__dict__]
    original = made._pyloss_original.forward
    bound = [s for s in slots if getattr(module.__dict__[s], "__func__", None) is original]
    if slots and not bound and not any(_leads_to(module.__dict__[s], made.forward) for s in slots):
        raise TypeError(
            f"the forward of this {type(module).__name__} has been replaced by "
            f"{module.__dict__[slots[0]]!r}; call {caller} before what replaced it"
        )
    module.__class__ = made
    for slot in bound:
        module.__dict__[slot] = types.MethodType(made.forward, module)


def _leads_to(forward: Any, made: Callable) -> bool:
    """Whether wrappers, as those of accelerate's mixed precision, are around a forward made here,
    of a lookalike that the module has been before."""
    return inspect.unwrap(forward, stop=lambda function: function is made) is made


def _new(subclass_of: Callable[[type], type], cls: type) -> Any:
    """An empty instance, for copy and pickle, which fill in the state."""
    made = subclass_of(cls)
    return made.__new__(made)
