"""The ops on DTensors: each process runs the op on what it has, by the rules of _shards.py.

Along one dimension of the mesh, the tensors that are split agree on a letter of the rule. Those
that carry it are then split so, the others whole, and results without it Partial. Where they do
not agree, every process gathers all, and the results are the same on each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils import _pytree as pytree

from pyloss.ops._shards import is_rule, rules


class _Argument(NamedTuple):
    name: str
    tensor: Tensor
    letters: list[str] | None  # of its dimensions; None: all of it is needed
    written: bool


# Older ones keep the number by which a Partial sum was divided last, and divide by it again.
_OLDEST_TORCH = (2, 10)


def take(lib: torch.library.Library, name: str) -> None:
    """Registers the rule of an op with torch."""

    def run(cls, op, types, args, kwargs):
        if torch_version() < _OLDEST_TORCH:
            raise NotImplementedError(
                f"pyloss.{name} takes DTensors with PyTorch 2.10 or newer, whose sums of them can "
                f"be trusted; this is {torch.__version__}"
            )
        with torch.no_grad():  # autograd is above
            return _run(op, rules[name], args, kwargs or {})

    torch.library.register_torch_dispatch(f"pyloss::{name}", DTensor, run, lib=lib)


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _run(op, rule, args: tuple, kwargs: dict):
    schema = op._schema
    values = [
        args[at] if at < len(args) else kwargs.get(a.name, a.default_value)
        for at, a in enumerate(schema.arguments)
    ]
    text = rule if isinstance(rule, str) else rule(*values)
    before, after = (part.split(",") for part in (text if is_rule(text) else "->").split("->"))
    given = _arguments(schema, values, before)
    mesh = _mesh_of(given)
    sizes = _sizes(given)
    along = [_letter(given, sizes, mesh, at) for at in range(mesh.ndim)]
    local = iter([_local(a, mesh, along) for a in given])
    found = op(*pytree.tree_map_only(Tensor, lambda t: next(local), values))

    def placed(part, term: str):
        return pytree.tree_map_only(Tensor, lambda t: _placed(t, term, mesh, along, sizes), part)

    terms = [term.strip() for term in after]
    if not isinstance(found, (tuple, list)):
        return placed(found, terms[0])
    terms += ["-"] * (len(found) - len(terms))
    return type(found)([placed(part, term) for part, term in zip(found, terms)])


def _arguments(schema, values: list, terms: list[str]) -> list[_Argument]:
    """The tensors of a call, in order; a tensor counts once for each place that it has."""
    terms = iter(terms)
    found = []
    for argument, value in zip(schema.arguments, values):
        if "Tensor" not in str(argument.type):
            continue
        term = next(terms, "-").strip() or "-"
        written = argument.alias_info is not None and argument.alias_info.is_write
        for t in pytree.tree_leaves(value):
            if isinstance(t, Tensor):
                found.append(_Argument(argument.name, t, _letters(term, t.dim()), written))
    return found


def _letters(term: str, dims: int) -> list[str] | None:
    """Names of the dimensions of a tensor; None where the term is not for so many."""
    if term == "-":
        return None
    head, *tail = term.replace("...", ".").replace("*", ".*").split(".")
    rest = dims - len(term.replace("...", "").replace("*", ""))
    if rest < 0 or (rest and not tail):
        return None
    if not tail:
        return list(head)
    kind = "*" if tail[0].startswith("*") else "."
    return [*head, *(f"{kind}{i}" for i in range(rest)), *tail[0].removeprefix("*")]


def _may_be_split(letter: str) -> bool:
    return letter[0] == "*" or letter.isupper()


def _mesh_of(given: list[_Argument]):
    first = next(a for a in given if isinstance(a.tensor, DTensor))
    for a in given:
        if isinstance(a.tensor, DTensor) and a.tensor.device_mesh != first.tensor.device_mesh:
            raise RuntimeError(
                f"{a.name} must be on the mesh of {first.name}, {first.tensor.device_mesh}; got "
                f"{a.tensor.device_mesh}"
            )
    return first.tensor.device_mesh


def _sizes(given: list[_Argument]) -> dict[str, set[int]]:
    """Of each letter; a tensor that is broadcast along it does not count."""
    found: dict[str, set[int]] = {}
    for a in given:
        for letter, size in zip(a.letters or (), a.tensor.shape):
            found.setdefault(letter, set()).update({size} - {1})
    return found


def _letter(given: list[_Argument], sizes: dict[str, set[int]], mesh, mesh_dim: int) -> str | None:
    """What is split along a dimension of the mesh; None: nothing, or not in a way that fits."""
    found = set()
    for a in given:
        if not isinstance(a.tensor, DTensor):
            continue
        placement = a.tensor.placements[mesh_dim]
        if placement.is_replicate() or placement.is_partial():
            continue
        # A strided shard is not a contiguous range.
        if type(placement) is not Shard or a.letters is None:
            return None
        found.add(a.letters[placement.dim])
    if len(found) != 1:
        return None
    (letter,) = found
    if not _may_be_split(letter):
        return None
    # Heads of queries and those of keys, in groups: split evenly, a process has whole groups.
    even = all(size % mesh.size() == 0 for size in sizes[letter])
    return letter if len(sizes[letter]) == 1 or (sizes[letter] and even) else None


def _local(a: _Argument, mesh, along: list[str | None]) -> Tensor:
    """What a process has of an argument, when the mesh splits these letters."""
    wanted = []
    for letter in along:
        dim = a.letters.index(letter) if letter in (a.letters or ()) else None
        whole = dim is None or a.tensor.shape[dim] == 1  # broadcast along it
        wanted.append(Replicate() if whole else Shard(dim))
    t = a.tensor
    if not isinstance(t, DTensor):  # the same on all processes
        if all(p.is_replicate() for p in wanted):
            return t
        t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if t.requires_grad:
        t = t.detach()  # torch 2.10 has no detach_ of DTensors, which autograd would call
    if list(t.placements) != wanted:
        if a.written:
            raise RuntimeError(f"{a.name} is written to, and cannot be so as {t.placements}")
        t = t.redistribute(placements=wanted)
    return t.to_local()


def _placed(
    t: Tensor, term: str, mesh, along: list[str | None], sizes: dict[str, set[int]]
) -> DTensor:
    """A result. One of another shape than its term is a placeholder, and the same everywhere."""
    letters = _letters(term, t.dim())
    placements, shape = [], list(t.shape)
    for at, letter in enumerate(along):
        if letter is None or letters is None:
            placements.append(Replicate())
        elif letter not in letters:
            placements.append(Partial())
        else:
            dim = letters.index(letter)
            placements.append(Shard(dim))
            shape[dim] = (
                mesh.size(at) * shape[dim] if len(sizes[letter]) > 1 else max(sizes[letter])
            )
    return DTensor.from_local(
        t, mesh, placements, run_check=False, shape=torch.Size(shape), stride=_strides(t, shape)
    )


def _strides(t: Tensor, shape: list[int]) -> tuple[int, ...]:
    """Of the whole, which lies as the part does."""
    found, step = [0] * t.dim(), 1
    for dim in sorted(range(t.dim()), key=lambda d: (t.stride(d), -d)):
        found[dim] = step
        step *= max(shape[dim], 1)
    return tuple(found)
