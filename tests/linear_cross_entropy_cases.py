"""What the linear_cross_entropy test files share: layers, options, comparisons, recorded calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from row_softmax_cases import exact
from row_softmax_cases import make_options as _row_options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyloss
from pyloss.reference import linear_cross_entropy as reference
from pyloss.testing import make_logits, make_target

# Ways to carry out one call. 10 rows in chunks of 3 leave a shorter last chunk; 64 exceeds N.
SCALAR_WAYS = {
    "auto": {},
    "forward": {"strategy": "forward", "chunk": 3},
    "forward_one_chunk": {"strategy": "forward", "chunk": 64},
    "recompute": {"strategy": "recompute", "chunk": 3},
    "recompute_one_chunk": {"strategy": "recompute", "chunk": 64},
}
# Losses per row and differentiable statistics always recompute.
ROW_WAYS = {name: way for name, way in SCALAR_WAYS.items() if "forward" not in name}


class Layer(NamedTuple):
    """Arguments of the linear layer; gradients are asked for all of them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


def make_layer(
    rows: int | tuple[int, ...] = 10,
    features: int = 6,
    classes: int = 13,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    scale: float = 2.0,
    seed: int = 0,
    requires_grad: bool = True,
) -> Layer:
    """Hidden states of size 1 and a layer whose logits have the size ``scale``; bias of size 1."""
    lead = (rows,) if isinstance(rows, int) else rows
    h = make_logits((*lead, features), dtype, seed=seed, scale=1.0)
    w = make_logits((classes, features), dtype, seed=seed + 101, scale=scale / features**0.5)
    b = make_logits((classes,), dtype, seed=seed + 202, scale=1.0) if bias else None
    for t in (h, w, b):
        if t is not None:
            t.requires_grad_(requires_grad)
    return Layer(h, w, b)


def labels_with_ignored(rows: int, classes: int, ignore_index: int = -100) -> Tensor:
    """Labels of which the fourth and the last but two are ignored; 7 rows or more."""
    y = make_target((rows, classes))
    y = torch.where(y == ignore_index, (ignore_index + 1) % classes, y)
    y[[3, rows - 3]] = ignore_index
    return y


def make_options(name: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[object, dict]:
    """The case ``name`` of row_softmax, with two ignored rows whatever its labels."""
    target, options = _row_options(name, shape, dtype)
    if isinstance(target, tuple):
        target[0][3] = target[1][shape[0] - 3] = -100
    elif not target.is_floating_point():
        target[[3, shape[0] - 3]] = -100
    return target, options


def fused(layer: Layer, target, **options):
    """The function under test, on a layer."""
    return pyloss.fused_linear_cross_entropy(
        layer.input, layer.weight, target, layer.bias, **options
    )


def referenced(layer: Layer, target, **options):
    """The float64 reference on the same values; also differentiable in ``layer``'s copies."""
    return reference(*layer[:2], exact(target), layer.bias, **exact(options))


def unfused(layer: Layer, target, **options):
    """Stored logits and ``pyloss.fused_cross_entropy``, which linear_cross_entropy stands for."""
    return pyloss.fused_cross_entropy(F.linear(*layer), target, **options)


def fresh(layer: Layer, dtype: torch.dtype | None = None) -> Layer:
    """The values of a layer as new leaves, in another dtype if asked."""
    return Layer(
        *(
            t if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
            for t in layer
        )
    )


def upstream_of(value: Tensor) -> Tensor:
    """A gradient different from 1, of the shape of a loss."""
    generator = torch.Generator().manual_seed(7)
    g = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
    return g.to(value.device, value.dtype)


def gradients(value: Tensor, layer: Layer, upstream: Tensor | None = None, **kwargs) -> list:
    """Gradients of input, weight and bias (where there is one)."""
    upstream = upstream_of(value) if upstream is None else upstream
    inputs = [t for t in layer if t is not None]
    return list(torch.autograd.grad(value, inputs, upstream.to(value.dtype), **kwargs))


def run(function: Callable, layer: Layer, target, **options) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one of the functions above for the upstream of ``upstream_of``."""
    value = function(layer, target, **options)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach(), gradients(value, layer)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance; 0 where both are 0. NaN never passes a comparison."""
    a, b = a.detach().double(), b.detach().double()
    if torch.equal(a, b):
        return 0.0
    return float((a - b).norm() / b.norm())


# The bounds of the specification: float32 in the relative Frobenius norm, float64 per entry.
FROBENIUS = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(actual, expected, what: str = "value", factor: float = 1.0) -> None:
    """Same shape and dtype, within the tolerances of the dtype; accepts tensors and lists."""
    if isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for i, (a, b) in enumerate(zip(actual, expected)):
            assert_close(a, b, f"{what} {i}", factor)
        return
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN at other places"
    a, b = actual.detach().nan_to_num(), expected.detach().nan_to_num()
    if a.numel() == 0:
        return
    if a.dtype == torch.float64:
        size = float(b.abs().max())
        torch.testing.assert_close(
            a, b.to(a.dtype), rtol=1e-10 * factor, atol=1e-12 * max(size, 1e-300) * factor,
            msg=lambda m: f"{what}: {m}",
        )  # fmt: skip
    error = distance(a, b)
    assert error <= factor * FROBENIUS.get(a.dtype, torch.finfo(a.dtype).eps), f"{what}: {error}"


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op of this library."""

    def __init__(self, prefix: str = "pyloss.linear_cross_entropy"):
        super().__init__()
        self.prefix, self.calls = prefix, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.prefix):
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


class Memory:
    """Sizes of CPU allocations inside a ``with`` block, as torch's allocator reports them.

    ``largest`` is the largest single one, ``peak`` the largest sum alive at a time, in bytes;
    memory from before the block counts as 0.
    """

    def __enter__(self) -> Memory:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        events = [
            (event.start_ns(), event.nbytes())
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        self.largest = self.peak = alive = 0
        for _, nbytes in sorted(events, key=lambda e: e[0]):  # stable: equal times keep their order
            alive += nbytes
            self.largest, self.peak = max(self.largest, nbytes), max(self.peak, alive)
