"""Checks and dtype rules that the functions of every family share.

The message of a check is part of its family's behaviour, so where families word the same thing in
different ways, the words are an argument here.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyloss.ops._labels import at_least as at_least
from pyloss.ops._labels import equals as equals
from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import widened as widened
from pyloss.ops._launch import widest as widest
from pyloss.ops._launch import without_autocast as without_autocast
from pyloss.ops._shards import is_dtensor as is_dtensor
from pyloss.ops._shards import take_dtensors
from pyloss.ops._transforms import functorch_active

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
CLASS_INDICES = (torch.int64, torch.uint8, torch.int32)
REDUCTIONS = ("none", "mean", "sum")

# numpy's dtype compares equal to its name, and so numpy is not imported.
_BOOLS = ("bool", torch.bool)

# The names that torch's own messages use.
_SCALAR_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}


def scalar_name(dtype: torch.dtype) -> str:
    return _SCALAR_NAMES.get(dtype, str(dtype))


# --------------------------------------------------------------------------------------------------
# Rules


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def result_dtype(dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """Of a result that would be of `dtype`: float32 for half types where x is under autocast."""
    if dtype in (torch.float32, torch.float64) or not autocast_on(x):
        return dtype
    return torch.float32


# --------------------------------------------------------------------------------------------------
# Types and numbers


def can_look_at(t: Tensor) -> bool:
    """Whether there are values to look at now, and without waiting for a device; nor for another
    process, which would wait for this one if it raised alone."""
    if not t.is_cpu or torch.compiler.is_compiling() or functorch_active():
        return False
    return type(t) is Tensor or not is_dtensor(t)


def check_tensor(name: str, x) -> None:
    if type(x) is Tensor:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if is_dtensor(x):
        take_dtensors()


def check_floating(name: str, x) -> None:
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating, got {x.dtype}")


def check_number(name: str, value) -> None:
    # The common types first: asking an abstract class is slow. While compiling, a changing number
    # is a symbol, of no Python type.
    if type(value) in (float, int):
        return
    if torch.compiler.is_compiling() and not isinstance(value, (Tensor, str)):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_range(name: str, value: float, low: float, open_low: bool = False) -> None:
    """A finite number from `low` on, or above it."""
    check_number(name, value)
    # Comparisons alone: they are what torch.compile can do with a number that changes.
    if not (low < value if open_low else low <= value) or not value < math.inf:
        bound = f"> {low:g}" if open_low else f">= {low:g}"
        raise ValueError(f"{name} must be finite and {bound}, got {value}")


def is_integer(value) -> bool:
    """An int or a size of a compiled graph, and no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def as_integer(value) -> int | None:
    """The int that a value stands for (numpy's too); None for a bool and for what is no integer."""
    if is_integer(value):
        return value
    if isinstance(value, bool) or getattr(value, "dtype", None) in _BOOLS:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def checked_integer(name: str, value) -> int:
    """The int that a value stands for."""
    found = as_integer(value)
    if found is None:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return found


def checked_count(name: str, value, low: int = 0) -> int:
    """The int that a value stands for, from `low` on."""
    found = checked_integer(name, value)
    if found < low:
        raise ValueError(f"{name} must be >= {low}, got {found}")
    return found


def checked_flag(name: str, value) -> bool:
    """The bool that a value stands for (numpy's too)."""
    if isinstance(value, bool):
        return value
    # numpy's dtype alone compares equal to the name: a tensor would be waited for.
    if getattr(value, "dtype", None) == "bool" and value.ndim == 0:
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_generator(generator) -> None:
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def check_flag(name: str, value) -> None:
    """A bool, numpy's too; or 0 or 1."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in _BOOLS:
        return
    if not (is_integer(value) and value in (0, 1)):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_one_of(
    name: str, value, known: Iterable[str], show: Callable[[str], str] = str, then: str = ", "
) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(show, known))}{then}got {value!r}")


def check_reduction(reduction, known: Iterable[str] = REDUCTIONS) -> None:
    """In torch's words."""
    try:
        valid = reduction in known
    except TypeError:  # a list
        valid = False
    if not valid:
        raise ValueError(f"{reduction} is not a valid value for reduction")


def check_empty(empty) -> None:
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' or 'zero', got {empty!r}")


def one_number(name: str, t: Tensor) -> Tensor:
    """The 0-d tensor of one that holds one number."""
    if t.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {list(t.shape)}")
    return t.reshape(())


def check_dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense Tensor, got one of layout {x.layout}")


# --------------------------------------------------------------------------------------------------
# Tensors that go with another one


def check_device(name: str, t: Tensor, other: Tensor, other_name: str = "input") -> None:
    if t.device != other.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {t.device} and "
            f"{other_name} on {other.device}"
        )


def check_mask(mask, like: Tensor, name: str = "mask", shape: torch.Size | None = None) -> None:
    """A mask of what counts in `like`, of its shape or of the one that is given."""
    check_tensor(name, mask)
    shape = like.shape if shape is None else shape
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{name} must be bool, True at what counts, of the shape {list(shape)}; got "
            f"{mask.dtype} of shape {list(mask.shape)}"
        )
    check_device(name, mask, like)


def check_constant(name: str, t: Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"the loss is not differentiable with respect to {name}")


def check_supported(function: str, t: Tensor, where: str = "") -> None:
    """That the dtype is one of those that the kernels compute with."""
    if t.dtype not in FLOATS:
        raise NotImplementedError(
            f"\"{function}\" not implemented for '{scalar_name(t.dtype)}'{where}"
        )


def check_index_dtype(name: str, labels: Tensor) -> None:
    if labels.dtype not in CLASS_INDICES:
        hint = f"; class labels must be integers, {name}.long()"
        raise RuntimeError(
            f"expected {name} dtype to be Long or Byte, but got {scalar_name(labels.dtype)}"
            + (hint if labels.is_floating_point() else "")
        )


def check_index_values(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Looks at every label: waits for the device."""
    bad = labels[outside(labels, classes) & (wide(labels) != ignore_index)]
    if bad.numel():
        raise IndexError(f"Target {int(bad[0])} is out of bounds.")


def check_token_weight(token_weight, shape: tuple[int, ...]) -> None:
    check_tensor("token_weight", token_weight)
    if tuple(token_weight.shape) != shape:
        raise RuntimeError(
            f"token_weight must have the targets' shape {list(shape)}, "
            f"got {list(token_weight.shape)}"
        )


def check_has_dimension(name: str, x: Tensor, got: str = "a 0-d tensor") -> None:
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got {got}")


def check_along(name: str, x: Tensor, dim: int, empty: bool = False) -> None:
    """That x has something along dim, or may have nothing."""
    checked_integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        low, high = -x.dim(), x.dim() - 1
        raise IndexError(f"dim must be in [{low}, {high}] for {x.dim()} dimensions, got {dim}")
    if x.shape[dim] == 0 and not empty:
        raise ValueError(f"{name} must not be empty along dim {dim}, got {list(x.shape)}")
