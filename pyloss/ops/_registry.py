"""Registration of the ops with torch, and the small helpers that every op's file needs.

Form: ``Library.define`` + ``impl`` + ``register_fake``, with autograd in a
``torch.autograd.Function`` outside the op. It is the cheapest form that still compiles without
graph breaks; an op that needs no gradient is called directly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyloss import backends

lib = torch.library.Library("pyloss", "DEF")

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.uint8: 6,
}


def define_op(schema: str, *, fake: Callable, impls: dict[str, Callable]) -> None:
    """Registers one op.

    Args:
        schema: as for ``torch.library.define``, without the namespace.
        fake: shapes and dtypes of the results, for compile and export.
        impls: implementation per backend name; ``"reference"`` must be among them, and serves every
            device that has no kernel.
    """
    name = schema.split("(")[0]
    lib.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def chooser(device_type: str) -> Callable:
        def call(*args):
            return impls[backends.choose(name, device_type, impls)](*args)

        return call

    lib.impl(name, chooser("cpu"), "CPU")
    lib.impl(name, chooser("cuda"), "CUDA")
    lib.impl(name, chooser("other"), "CompositeExplicitAutograd")
    register_fake(name, fake)


def register_fake(name: str, fake: Callable) -> None:
    """From this line alone: for every new file that registers, torch looks through all modules."""
    torch.library.register_fake(f"pyloss::{name}", fake, lib=lib)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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


# Private in torch, hence the fallbacks: without them an optimisation stays on where it should not,
# or a transform fails loudly.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batched = getattr(torch._C._functorch, "is_batchedtensor", lambda t: False)
_is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda t: False)
_top_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)
