"""Which implementation an op runs on, why, and how to choose another."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Collection, Iterator

import torch

from pyloss import _C

BACKENDS = ("reference", "cpu", "cuda", "triton")

_log = logging.getLogger("pyloss")
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("pyloss_backend")
_fallbacks_logged: set[tuple[str, str]] = set()


def _look_at_driver() -> None:
    """What would fail in every call on a GPU is said when pyloss is imported. Wakes no device."""
    problem = _C.cuda_driver_problem()
    if problem:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)


_look_at_driver()


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_from_environment = _checked(os.environ.get("PYLOSS_BACKEND") or None)


def forced() -> str | None:
    """The backend asked for by ``with pyloss.backend(...)`` or PYLOSS_BACKEND, if any."""
    return _override.get(_from_environment)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Runs the ops inside the block on one backend; None: the automatic choice.

    Args:
        name: ``"reference"`` (plain PyTorch), ``"cpu"``, ``"cuda"`` or ``"triton"``. A backend that
            cannot run an op raises RuntimeError with the reason when the op is called. A backward
            outside the block takes the automatic choice, with the same gradients; on a GPU, where
            autograd has threads of its own, one inside may too.

    Raises:
        ValueError: unknown name.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(4, 10), torch.randint(10, (4,))
        >>> with pyloss.backend("reference"):
        ...     a = pyloss.fused_cross_entropy(x, y)
        >>> torch.testing.assert_close(a, pyloss.fused_cross_entropy(x, y))
    """
    token = _override.set(_checked(name))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def _has_triton() -> bool:
    # Looked up, not imported: importing triton takes longer than everything else here.
    return importlib.util.find_spec("triton") is not None


# That of PyTorch 2.8. The kernels of attention take tuples, with constants that go by name; of
# those of the linear loss a third does not compile with 3.2.
_NEEDS_TRITON = (3, 4)


@functools.cache
def _old_triton() -> str | None:
    """Why the installed Triton is too old, in words."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name: a build of its own
        return None
    if tuple(map(int, found.split(".")[:2])) >= _NEEDS_TRITON:
        return None
    needed = ".".join(map(str, _NEEDS_TRITON))
    return f"its kernels need Triton {needed} or newer (that of PyTorch 2.8), {found} is installed"


def has_triton() -> bool:
    """Whether there is a Triton that the kernels can be compiled with."""
    return _has_triton() and _old_triton() is None


def why_not(name: str, op: str, device_type: str, available: Collection[str]) -> str | None:
    """The reason why a backend cannot run an op on a device, in words; None when it can."""
    if name not in available:
        return f"{op} has no {name} implementation"
    if name == "reference":
        return None
    if name == "cuda" and not _C.built_with_cuda:
        return "pyloss was built without CUDA; build it where nvcc is on PATH"
    if name == "triton" and not _has_triton():
        return "Triton is not installed"
    if name == "triton" and (reason := _old_triton()):
        return reason
    needed = "cpu" if name == "cpu" else "cuda"
    if name == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "1":
        needed = device_type if device_type == "cpu" else needed
    if device_type != needed:
        return f"the {name} backend needs {needed} tensors"
    return None


def choose(op: str, device_type: str, available: Collection[str]) -> str:
    """The backend that runs `op`: the forced one, else the device's own, else the reference."""
    name = forced()
    if name is not None:
        reason = why_not(name, op, device_type, available)
        if reason is not None:
            raise RuntimeError(f"pyloss backend {name!r} cannot run {op}: {reason}")
        return name
    if device_type == "cpu" and "cpu" in available:  # on every path of small calls
        return device_type
    own = device_type if device_type in available or "triton" not in available else "triton"
    reason = why_not(own, op, device_type, available)
    if reason is None:
        return own
    say_reference(op, device_type, reason)
    return "reference"


def say_reference(op: str, device_type: str, reason: str) -> None:
    """That a call runs on the reference though nobody asked for it: an error or a line of the log,
    once per op.
    """
    if os.environ.get("PYLOSS_STRICT", "0") not in ("", "0"):
        raise RuntimeError(f"PYLOSS_STRICT is set and {op} would run on the reference: {reason}")
    if (op, device_type) not in _fallbacks_logged:
        _fallbacks_logged.add((op, device_type))
        _log.info("%s runs on the reference implementation: %s", op, reason)


def show_config() -> str:
    """Prints and returns what pyloss was built with and what it uses here.

    Returns:
        The text: versions, SIMD level, CUDA architectures, threads, forced backend.

    Example:
        >>> import pyloss
        >>> text = pyloss.show_config()  # doctest: +ELLIPSIS
        pyloss ...
    """
    if _C.built_with_cuda:
        cuda = f"built in, architectures {_C.cuda_archs}, {_C.cuda_device_count()} device(s)"
    else:
        cuda = "not built in"
    text = "\n".join(
        [
            f"pyloss {_C.version}, torch {torch.__version__}",
            f"cpu: {_C.simd_level()}, {torch.get_num_threads()} thread(s)",
            f"cuda: {cuda}",
            f"triton: {'installed' if _has_triton() else 'not installed'}",
            f"backend: {forced() or 'automatic'}",
        ]
    )
    print(text)
    return text
