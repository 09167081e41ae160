"""Which dimensions of an op's tensors a device mesh may split, and with it what DTensors do.

A rule names the dimensions as torch.einsum does, a term for each tensor of the schema and each
result, in order::

    "Bn, BnD -> BnD"

A capital may be split: what carries it is independent along it, or, where a result lacks it, adds
up. A small letter is whole on each process. `...` stands for dimensions that are whole, `*` for
ones that may be split, each of them; `-` for a tensor of which every process has all. The term of a
list serves all its tensors.

An op that no dimension of splits has a sentence in place of a rule: why. Of its DTensors each
process gathers what it lacks. How it runs: _dtensors.py, imported with the first DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor
from torch.library import Library

# Per op: its rule, a function of the op's arguments that finds it, or the sentence.
rules: dict[str, str | Callable[..., str]] = {}
_waiting: list[tuple[Library, str]] = []


def is_rule(text: str) -> bool:
    return "->" in text


def add(lib: Library, name: str, rule: str | Callable[..., str]) -> None:
    rules[name] = rule
    _waiting.append((lib, name))
    if "torch.distributed.tensor" in sys.modules:
        take_dtensors()


def is_dtensor(t) -> bool:
    """Whether t is a DTensor; nobody has one before the module is loaded, to its end where another
    thread is at it."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(t, dtensor)


def beside(constant: Tensor, other: Tensor) -> Tensor:
    """A constant as torch's operations take it together with another tensor: beside a DTensor one
    that is the same everywhere."""
    if type(other) is Tensor or not is_dtensor(other):
        return constant
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    return DTensor.from_local(constant, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole(t: Tensor) -> Tensor:
    """All of a DTensor on each process; other tensors as they are."""
    if type(t) is Tensor or not is_dtensor(t):
        return t
    from torch.distributed.tensor import Replicate

    return t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)


def take_dtensors() -> None:
    """Tells torch what the ops do with DTensors, whose module is there."""
    if not _waiting:
        return
    from pyloss.ops._dtensors import take

    while True:
        try:  # another thread may have taken the last one
            waiting = _waiting.pop()
        except IndexError:
            return
        take(*waiting)
