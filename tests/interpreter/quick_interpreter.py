"""Triton's interpreter without what it does again or for nothing, which was most of its time.

Nothing that it computes changes. A version of Triton that has a part in another form keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def pytest_configure() -> None:
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    # The check for overflow of int32 ends in a device_assert, which does nothing without `debug`.
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = by_scalar(interpreter._get_np_dtype)
    tl.tensor.__init__ = sharing_shapes(tl.tensor.__init__)
    tl.block_type.with_element_ty = with_element_ty
    tl.block_type.to_ir = lambda self, builder: self  # what the interpreter's builder makes of it
    TritonSemantic.broadcast_impl_value = unless_same_shape(TritonSemantic.broadcast_impl_value)


def once_a_launch(patch_lang: Callable) -> Callable:
    """The language is patched once a launch, not again at each call of a device function.

    The interpreter puts its own functions in the place of those of triton.language when a kernel
    starts and takes them away when it ends; in between, each call of a @triton.jit function does
    the same once more.
    """
    patched: set[frozenset[int]] = set()

    def patch_lang_once(fn: Any) -> Any:
        modules = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        scope = patch_lang(fn)
        restore = scope.restore  # called for the kernel's scope only, at its end

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    return patch_lang_once


def by_scalar(np_dtype: Callable) -> Callable:
    """The table of types is made once a type, not at each cast."""
    of_scalar = cache(np_dtype)
    return lambda t: np_dtype(t) if t.scalar.is_ptr() else of_scalar(t.scalar)


def sharing_shapes(init: Callable) -> Callable:
    """Tensors of one shape share the object that holds it."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}
    attributes = {"handle", "type", "dtype", "shape", "numel"}

    def shared(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        found = known.get(key)
        if found is None:
            init(self, handle, type)
            if vars(self).keys() == attributes:
                known[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    return shared


def with_element_ty(self: Any, scalar_ty: Any) -> Any:
    """A block type of the same shape, which has been checked."""
    other = object.__new__(tl.block_type)
    vars(other).update(vars(self), element_ty=scalar_ty, name=f"<{self.shape}, {scalar_ty}>")
    return other


def unless_same_shape(broadcast: Callable) -> Callable:
    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and list(a.shape) == list(b.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return quick
