"""Triton's interpreter, without its repeated work; every launch under the access recorder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import triton.language as tl
from access_recorder import recording
from triton.runtime import interpreter


def pytest_configure() -> None:
    """Patches triton.language once per launch, not again at each call of a device function.

    The interpreter puts its own functions in the place of those of triton.language when a kernel
    starts and takes them away when it ends; in between, each call of a @triton.jit function does
    the same once more, which was 40 % of the time of these tests. Other versions of Triton keep
    what they do.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch_lang = interpreter._patch_lang
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

    interpreter._patch_lang = patch_lang_once


# Kernels that load memory which nothing has written, and why.
MAY_LOAD_UNWRITTEN: dict[str, str] = {}


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Programs run in a shuffled order; what no kernel may do fails the test."""
    if request.module.__name__ in ("check_recorder", "check_addresses"):  # have their own
        yield None
        return
    with recording("random", MAY_LOAD_UNWRITTEN) as state:
        yield state
