"""Helpers to test a loss against its reference; used by pyloss's own tests and benchmarks.

They are public because a user who adds a loss, or changes a kernel, needs the same checks::

    from functools import partial
    import torch, pyloss
    from pyloss.reference import row_softmax
    from pyloss.testing import check_loss, make_logits, make_target

    x = make_logits((289, 1000), torch.bfloat16)
    y = make_target((289, 1000))
    check_loss(partial(pyloss.fused_cross_entropy, target=y), partial(row_softmax, target=y), x)

The reference is always evaluated on the same rounded inputs, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BATCH_SIZES",
    "CLASS_COUNTS",
    "KDIM_LAYOUTS",
    "LAYOUTS",
    "ROW_SHAPES",
    "STRIDES",
    "TOLERANCES",
    "Tolerance",
    "accuracy_bound",
    "assert_matches_reference",
    "check_loss",
    "make_logits",
    "make_target",
    "relative_error",
    "row_shapes",
    "to_layout",
    "tolerance_for",
]


# ---------------------------------------------------------------------------------------------
# Tolerances
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """Bound ``rtol * |expected| + atol * max|expected| + floor`` on the error of one entry.

    ``atol`` counts in units of the largest entry, because where terms cancel (a softmax gradient
    with soft targets, for example) the error of a small entry is that of the large terms.
    ``floor`` is the spacing of the subnormal numbers of the dtype.
    """

    rtol: float
    atol: float
    floor: float


# One unit in the last place is at most eps in relative terms, and the half dtypes are compared
# with the rounded reference: they may be one unit off it, never two.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-12, 5e-324),
    torch.float32: Tolerance(1e-5, 1e-6, 1.5e-45),
    torch.bfloat16: Tolerance(2.0**-7, 1e-6, 9.2e-41),
    torch.float16: Tolerance(2.0**-10, 1e-6, 6.0e-8),
}


def tolerance_for(dtype: torch.dtype) -> Tolerance:
    """The tolerance of a floating dtype."""
    return TOLERANCES[dtype]


def assert_matches_reference(
    actual: Tensor,
    expected: Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    what: str = "value",
) -> None:
    """Raise AssertionError unless ``actual`` is the rounding of ``expected`` within tolerance.

    Args:
        actual: the result to judge; its dtype picks the tolerance.
        expected: the reference result, normally float64; same shape.
        rtol, atol: replace the entries of :data:`TOLERANCES`.
        what: name used in the message.

    NaN matches NaN only, and an infinity only the same infinity.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    tolerance = tolerance_for(actual.dtype)
    rtol = tolerance.rtol if rtol is None else rtol
    atol = tolerance.atol if atol is None else atol
    got = actual.detach().double()
    want = expected.detach().to(actual.dtype).double()

    same_kind = (got.isnan() == want.isnan()) & (got.isinf() == want.isinf())
    same_kind &= ~want.isinf() | (got == want)
    if not bool(same_kind.all()):
        place = _first(~same_kind)
        raise AssertionError(
            f"{what}: {int((~same_kind).sum())} of {got.numel()} entries differ in being NaN or "
            f"infinite; first at {place}: {got[place].item()} != {want[place].item()}"
        )
    finite = want.isfinite()
    if not bool(finite.any()):
        return
    error = torch.where(finite, (got - want).abs(), 0.0)
    size = torch.where(finite, want.abs(), 0.0)
    bound = rtol * size + atol * size.max() + tolerance.floor
    wrong = error > bound
    if bool(wrong.any()):
        place = _first(wrong)
        worst = float((error / bound).max())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {got.numel()} entries out of tolerance "
            f"(worst {worst:.3g} times the bound); first at {place}: "
            f"{got[place].item()!r} != {want[place].item()!r}"
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def relative_error(actual: Tensor, exact: Tensor) -> Tensor:
    """``|actual - exact| / |exact|`` in float64; 0 where both are 0."""
    got, want = actual.detach().double(), exact.detach().double()
    error = (got - want).abs() / want.abs()
    return torch.where(got == want, 0.0, error)


def accuracy_bound(exact: Tensor, tau: float = 1.0, nll: Tensor | float = 0.0) -> Tensor:
    """Relative error that a float32 kernel may have at the value ``exact``.

    ``(8 + |ln value| + |1 - tau| L) * 2^-23``: eight roundings, plus the rounding of the exponent
    of ``exp`` (an absolute error of the exponent is a relative error of the result).
    """
    size = exact.detach().double().abs()
    nll = torch.as_tensor(nll, dtype=torch.float64, device=size.device)
    return (8.0 + size.log().abs() + abs(1.0 - tau) * nll) * 2.0**-23


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------

CLASS_COUNTS: tuple[int, ...] = (
    1,  # the softmax is the constant 1: loss and gradient are exactly 0
    2,  # smallest real case, closed forms
    3,  # odd, below every vector width
    31,  # one below, at and above a 32-wide lane group
    32,
    33,
    1000,  # ImageNet; not a multiple of 16 or 32 bytes in bf16
    1128,  # a whole number of vectors but not a power of two
    32000,  # Llama 2 vocabulary: leaves the first-level cache
    50257,  # GPT-2 vocabulary: odd, every row starts misaligned
    128256,  # Llama 3 vocabulary: leaves the second-level cache on most machines
    262144,  # Gemma vocabulary: float32 accumulators are needed
)

BATCH_SIZES: tuple[int, ...] = (
    0,  # empty batch: NaN mean, 0 sum
    1,  # fewer rows than threads
    3,  # an odd number of rows over two or four threads
    289,  # 17 * 17: no multiple of anything that a kernel could assume
    4096,  # many rows per thread; reduction over several blocks
)

# Pairs of the two lists: every entry of each appears, the products stay at most about 1e6.
ROW_SHAPES: tuple[tuple[int, int], ...] = (
    (0, 1),
    (0, 1000),
    (1, 1),
    (3, 1),
    (289, 2),
    (4096, 2),
    (1, 3),
    (289, 3),
    (4096, 31),
    (289, 32),
    (4096, 33),
    (3, 33),
    (289, 1000),
    (3, 1128),
    (289, 1128),
    (3, 32000),
    (1, 50257),
    (3, 50257),
    (3, 128256),
    (1, 262144),
    (3, 262144),
)


def row_shapes(max_elements: int | None = None) -> Iterator[tuple[int, int]]:
    """The (rows, classes) pairs of :data:`ROW_SHAPES` with at most ``max_elements`` elements."""
    for n, c in ROW_SHAPES:
        if max_elements is None or n * c <= max_elements:
            yield n, c


def make_logits(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 3.0,
    offset: float = 0.0,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    """Normal logits; the same values on every device, up to the rounding of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset
    return x.to(device=device, dtype=dtype).requires_grad_(requires_grad)


def make_target(
    shape: tuple[int, ...],
    *,
    kind: str = "index",
    ignore_fraction: float = 0.0,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Any:
    """A target for logits of ``shape``, with classes along dimension 1 (0 for one row).

    Args:
        kind: ``"index"``, ``"prob"`` or ``"mixup"`` (``(y, y2, lam)`` with one ``lam`` per row).
        ignore_fraction: share of positions set to ``ignore_index``; 1 sets all of them.
        dtype: of the indices (int64) or of the probabilities (float64).

    The first position gets class 0 and the last one the last class.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "prob":
        dim = 0 if len(shape) == 1 else 1
        p = torch.rand(shape, generator=generator, dtype=torch.float64) ** 4 + 1e-3
        p = p / p.sum(dim, keepdim=True)
        return p.to(device=device, dtype=dtype or torch.float64)
    classes = shape[0] if len(shape) == 1 else shape[1]
    rows = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]

    def indices(first: int) -> Tensor:
        y = torch.randint(max(classes, 1), rows, generator=generator)
        if y.numel() > 1:
            y.view(-1)[0], y.view(-1)[-1] = first, classes - 1
        drop = torch.rand(rows, generator=generator) < ignore_fraction
        y = torch.where(drop, ignore_index, y)
        return y.to(device=device, dtype=dtype or torch.int64)

    if kind == "index":
        return indices(0)
    if kind == "mixup":
        lam = torch.rand(rows, generator=generator, dtype=torch.float64)
        return indices(0), indices(classes // 2), lam.to(device)
    raise ValueError(f"kind must be 'index', 'prob' or 'mixup', got {kind!r}")


def _filler(x: Tensor) -> float | bool:
    """What no test expects to read: NaN, the largest integer, True."""
    if x.is_floating_point():
        return float("nan")
    return x.dtype == torch.bool or torch.iinfo(x.dtype).max


def _padded(x: Tensor, before: int, after: int, step: int = 1) -> Tensor:
    """``x`` as a slice of a wider buffer along the last dimension."""
    last = x.shape[-1]
    wide = x.new_full((*x.shape[:-1], before + step * last + after), _filler(x))
    return wide[..., before : before + step * last : step].copy_(x)


def _every_second_row(x: Tensor) -> Tensor:
    wide = x.new_full((2 * x.shape[0], *x.shape[1:]), _filler(x))
    return wide[::2].copy_(x)


def _shifted_storage(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 1,), _filler(x))
    return flat[1:].view(x.shape).copy_(x)


# Memory layouts of an (N, C) tensor.  All hold the values of the argument, but "expanded", which
# repeats the first row.  What lies between the values is NaN, so that a read outside is seen.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "row_padded": lambda x: _padded(x, 0, 3),  # row stride > C
    "sliced": lambda x: _padded(x, 2, 3),  # start and row stride not multiples of a vector
    "shifted": _shifted_storage,  # contiguous, but not aligned to 16 bytes
    "every_second_row": _every_second_row,
    "strided_classes": lambda x: _padded(x, 1, 0, step=2),  # class stride 2
    "transposed": lambda x: x.t().contiguous().t(),  # class stride N
    "expanded": lambda x: x[:1].expand(x.shape[0], -1),  # row stride 0
}

# Memory layouts of an (N, C, H, W) tensor.
KDIM_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: _padded(x, 2, 3),  # a crop of a wider picture: W is not dense with H
    "swapped_hw": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_second_image": _every_second_row,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
}


def _reversed_strides(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


# The same for a tensor of one dimension or more.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: _padded(x, 2, 3),
    "step": lambda x: _padded(x, 1, 0, step=2),  # last stride 2
    "shifted": _shifted_storage,
    "every_second": _every_second_row,
    "reversed": _reversed_strides,  # the first dimension is the dense one
    "expanded": lambda x: x[:1].expand_as(x),  # first stride 0
}


def to_layout(x: Tensor, name: str) -> Tensor:
    """``x`` in the memory layout ``name`` of :data:`LAYOUTS` or :data:`KDIM_LAYOUTS`."""
    table = LAYOUTS if x.dim() == 2 else KDIM_LAYOUTS
    return table[name](x.detach())


# ---------------------------------------------------------------------------------------------
# The checks of one loss
# ---------------------------------------------------------------------------------------------


def check_loss(
    op: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    input: Tensor,
    *,
    expected_dtype: torch.dtype | None = None,
    gradient: bool = True,
    repeat: bool = True,
    compile_backend: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Check one loss on one input: value, dtype, gradient, no mutation, repeatability, compile.

    Args:
        op: the loss as a function of the input alone (bind the rest with ``functools.partial``).
        reference: the same for the reference; it gets the input in float64.
        input: the input in the dtype and the memory layout to be tested.
        expected_dtype: dtype of the result; default: that of the input.
        gradient: also compare the gradient for a random upstream gradient.
        repeat: run backward twice; and run all again, and require the bitwise same value (also
            without grad mode) and gradient.
        compile_backend: name of a ``torch.compile`` backend to run with ``fullgraph=True``.
    """
    before = input.detach().clone()
    version = input._version
    x = input.detach().requires_grad_(gradient)
    value = op(x)
    if value.dtype != (expected_dtype or input.dtype):
        raise AssertionError(f"the result is {value.dtype}, not {expected_dtype or input.dtype}")
    exact_x = input.detach().double().contiguous().requires_grad_(gradient)
    exact = reference(exact_x)
    assert_matches_reference(value, exact, rtol=rtol, atol=atol, what="loss")

    grad = None
    if gradient:
        generator = torch.Generator().manual_seed(7)
        upstream = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
        upstream = upstream.to(value.device, value.dtype)
        (grad,) = torch.autograd.grad(value, x, upstream, retain_graph=repeat)
        (exact_grad,) = torch.autograd.grad(exact, exact_x, upstream.double())
        if grad.dtype != input.dtype:
            raise AssertionError(f"the gradient is {grad.dtype}, not {input.dtype}")
        assert_matches_reference(grad, exact_grad, rtol=rtol, atol=atol, what="gradient")
        if repeat:
            (again,) = torch.autograd.grad(value, x, upstream)
            # Not bitwise: the first backward may use a gradient that the forward has written.
            assert_matches_reference(again, exact_grad, rtol=rtol, atol=atol, what="2nd backward")
            again_value = op(x)
            (again,) = torch.autograd.grad(again_value, x, upstream)
            _assert_same_bits(again, grad, "the gradient of a second run")
    if repeat:
        with torch.no_grad():
            _assert_same_bits(op(x), value, "the loss without grad mode")

    if input._version != version or not _same_bits(input.detach(), before):
        raise AssertionError("the input was changed")

    if compile_backend is not None:
        compiled = torch.compile(op, fullgraph=True, backend=compile_backend)
        x = input.detach().requires_grad_(gradient)
        compiled_value = compiled(x)
        assert_matches_reference(compiled_value, value.double(), what="compiled loss")
        if gradient:
            (compiled_grad,) = torch.autograd.grad(compiled_value, x, upstream)
            assert_matches_reference(compiled_grad, grad.double(), what="compiled gradient")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )


def _assert_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    if not _same_bits(a.detach(), b.detach()):
        raise AssertionError(f"{what} differs from the first one")
