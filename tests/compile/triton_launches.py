"""Records what launchers launch, without a device.

The launchers run as they are, on meta tensors; Triton's own binder turns the arguments into a
signature (type, None, 1, multiple of 16), so that what is compiled is what a device would get.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: Any  # parsed by the backend
    asked: dict[str, Any]  # options as the launcher names them
    guards: tuple[torch.device, ...]  # device guards around it, of what devices

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> str:
        """What makes two launches one binary."""
        attrs = {at: found for at, found in self.attrs.items() if found}
        parts = (self.name, self.signature, self.constexprs, attrs, self.options)
        return " ".join(map(repr, parts))

    @property
    def form(self) -> str:
        """The same but for which numbers are 1 or multiples of 16."""
        declared = {p.num for p in self.kernel.params if p.is_constexpr}
        types = [
            t if isinstance(t, tuple) or "*" in t else "number" for t in self.signature.values()
        ]
        fixed = {at: x for at, x in self.constexprs.items() if at[0] in declared or x is None}
        return " ".join(map(repr, (self.name, types, fixed, self.options)))


class _Driver:
    """As if there were one device of a compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # the functions keep a binder per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def _as_on_a_device(capability: int) -> Iterator[list[torch.device]]:
    """Launchers take a device to be of this capability; yields the guards that are open."""
    open_guards: list[torch.device] = []

    @contextlib.contextmanager
    def guard(t: torch.Tensor) -> Iterator[None]:
        open_guards.append(t.device)
        yield
        open_guards.pop()

    major_minor = divmod(capability, 10)
    replaced = {"device_guard": guard, "device_capability": lambda device: major_minor}
    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if module.__name__.startswith(("pyloss.kernels", "sample_kernel")):
                for name, value in replaced.items():
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, value))
        yield open_guards


def record(launcher: Callable[[], Any], capability: int = 90) -> list[Launch]:
    """The launches of a call of `launcher`; none is carried out."""
    found: list[Launch] = []
    run = JITFunction.run
    with _as_on_a_device(capability) as open_guards:

        def recorded_run(kernel, *args, grid, warmup, **kwargs):
            asked = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}

            def keep(kernel, key, signature, device, constexprs, options, attrs, warmup):
                guards = tuple(open_guards)
                found.append(
                    Launch(
                        kernel, grid, signature, constexprs, attrs, options, asked, guards
                    )
                )  # fmt: skip

            with patch.object(JITFunction, "_do_compile", keep):
                return run(kernel, *args, grid=grid, warmup=True, **kwargs)

        with (
            patch.object(driver, "_active", _Driver(capability)),
            patch.object(JITFunction, "run", recorded_run),
        ):
            launcher()
    return found
