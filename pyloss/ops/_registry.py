"""Registration of the ops with torch.

Form: ``Library.define`` + ``impl`` + ``register_fake``, with autograd in a
``torch.autograd.Function`` outside the op. It is the cheapest form that still compiles without
graph breaks; an op that needs no gradient is called directly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from pyloss import backends
from pyloss.ops import _shards

lib = torch.library.Library("pyloss", "DEF")

# Per op: itself in torch operations, for :func:`pyloss.ops.decompositions`; or why there is none.
plain_forms: dict[str, Callable | str] = {}

# torch asks inspect for the source line of a registration, which looks through all loaded modules
# for the one of this file: half of the time of a first import of an op. Here is the answer.
getattr(inspect, "modulesbyfile", {})[__file__] = __name__


def define_op(
    schema: str,
    *,
    fake: Callable,
    impls: dict[str, Callable],
    shards: Callable[..., str] | str,
    plain: Callable | str | None = None,
) -> None:
    """Registers one op.

    Args:
        schema: as for ``torch.library.define``, without the namespace.
        fake: shapes and dtypes of the results, for compile and export.
        impls: implementation per backend name; ``"reference"`` must be among them, and serves every
            device that has no kernel.
        shards: along which dimensions a mesh may split the tensors (_shards.py), or why none.
        plain: torch operations that a trace can follow, with no look at a number in a tensor; None:
            the reference. A sentence, where there can be none: why.
    """
    name = schema.split("(")[0]
    changes = "it changes its arguments" if "!)" in schema else None
    plain_forms[name] = plain or changes or impls["reference"]
    lib.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def chooser(device_type: str) -> Callable:
        def call(*args):
            return impls[backends.choose(name, device_type, impls)](*args)

        return call

    def other(*args):
        _check_dense(name, args)
        return impls[backends.choose(name, "other", impls)](*args)

    lib.impl(name, chooser("cpu"), "CPU")
    lib.impl(name, chooser("cuda"), "CUDA")
    lib.impl(name, other, "CompositeExplicitAutograd")
    register_fake(name, fake)
    _shards.add(lib, name, shards)


def _check_dense(name: str, args: tuple) -> None:
    """A sparse tensor has no kernel, and comes where devices without one do."""
    for at, t in enumerate(args):
        if isinstance(t, torch.Tensor) and t.layout != torch.strided:
            argument = getattr(torch.ops.pyloss, name).default._schema.arguments[at].name
            raise TypeError(f"{argument} must be a dense Tensor, got one of layout {t.layout}")


def register_fake(name: str, fake: Callable) -> None:
    """From this file alone, whose module inspect knows."""
    torch.library.register_fake(f"pyloss::{name}", fake, lib=lib)
