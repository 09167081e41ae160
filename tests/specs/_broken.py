"""A small loss that keeps every promise, and losses that each break one: the tester must see it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyloss.backends import forced
from pyloss.testing import make_logits
from specs._spec import F32, F64, HALF, Bad, Empty, Sample, Spec


def _result(x: Tensor) -> torch.dtype:
    return F32 if x.dtype in HALF and torch.is_autocast_enabled("cpu") else x.dtype


def distance(
    input: Tensor, target: Tensor, *, scale: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """scale * sum_j weight_j (input_j - target_j)^2 of each row; the target is a constant."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    acc = F64 if input.dtype == F64 else F32
    squares = (input.to(acc) - target.detach().to(acc)).square()
    squares = squares if weight is None else squares * weight.to(acc)
    return (scale * squares.sum(-1)).to(_result(input))


def reference(input, target, *, scale=1.0, weight=None):
    rows = [sum(w * (a - b) ** 2 for a, b, w in zip(x, y, weight_of(weight, len(x))))
            for x, y in zip(input, target)]  # fmt: skip
    return scale * torch.stack(rows)


def weight_of(weight, n):
    return [1.0] * n if weight is None else weight


class Distance(nn.Module):
    def __init__(self, scale: float = 1.0, weight: Tensor | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return distance(input, target, scale=self.scale, weight=self.weight)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def sample(rows: int = 3, **options) -> Sample:
    x, y = (make_logits((rows, 4), F64, seed=seed) for seed in (0, 1))
    return Sample(dict(input=x, target=y), options)


KEPT = Spec(
    function=distance,
    samples={
        "plain": sample,
        "options": lambda: sample(scale=0.375, weight=torch.arange(4.0, dtype=F64)),
    },
    reference=reference,
    gradients=("input",),
    empty={
        "no rows": Empty(lambda: sample(0), 0.0, (0,)),
        "no weight": Empty(lambda: sample(weight=torch.zeros(4, dtype=F64)), 0.0, (3,)),
    },
    vmap=("input", "target"),
    nan={"input": "row", "target": "row"},
    errors=(
        Bad(TypeError, "input must be a Tensor, got list", dict(input=[1.0])),
        Bad(ValueError, "scale must be positive, got 0", dict(scale=0)),
    ),
    module=Distance,
    same_signature=True,
)


# --------------------------------------------------------------------------------------------------
# The wrong ones


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.01 * g


class _ForgetsOnReference(torch.autograd.Function):
    """x^2 whose backward reads what the reference's forward does not save."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.zeros_like(x) if forced() == "reference" else x)
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * (ctx.x if forced() == "reference" else x)


class _FirstDerivativeOnly(torch.autograd.Function):
    """x^2 with a derivative that has itself none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g


def _function(change: Callable[[Callable, Tensor, Tensor, dict], Tensor]) -> Spec:
    def wrong(input, target, *, scale=1.0, weight=None):
        return change(distance, input, target, dict(scale=scale, weight=weight))

    return replace(KEPT, function=wrong, name="wrong", module=None, same_signature=False)


def _no_repr(spec, sample):
    twin = Distance(**sample.options)
    twin.extra_repr = str
    return twin, sample.inputs


def _ignores_scale(spec, sample):
    options = {k: v for k, v in sample.options.items() if k != "scale"}
    return Distance(**options), sample.inputs


class Forgetful(Distance):
    """Loses its scale when copied."""

    def __getstate__(self):
        return {**super().__getstate__(), "scale": 1.0}


class Plain(Distance):
    """Keeps the weight as an attribute."""

    def __init__(self, scale: float = 1.0, weight: Tensor | None = None) -> None:
        super().__init__(scale)
        del self.weight
        self.weight = weight


class Lenient(Distance):
    """Takes what its function refuses."""

    def __init__(self, scale: float = 1.0, weight: Tensor | None = None) -> None:
        super().__init__(abs(scale) or 1.0, weight)


class OtherDefault(Distance):
    def __init__(self, scale: float = 2.0, weight: Tensor | None = None) -> None:
        super().__init__(scale, weight)


_calls = itertools.count()


def _in_half(f, x, y, options):
    return (options["scale"] * (x - y.detach()).square().sum(-1)).to(_result(x))


def _reads_storage(f, x, y, options):
    dense = x.new_empty(x.shape).stride()
    return f(torch.as_strided(x, x.shape, dense, x.storage_offset()), y, **options)


def _with_target_gradient(f, x, y, options):
    return f(x, y, **options) + y.sum(-1).to(x.dtype) - y.detach().sum(-1).to(x.dtype)


def _compiles_to_something_else(f, x, y, options):
    return f(x, y, **options) * (1.001 if torch.compiler.is_compiling() else 1.0)


def _looks(f, x, y, options):
    return f(x, y, **options) if float(x.detach().sum()) != 0.125 else x.sum(-1)


def _constant_curvature(f, x, y, options):
    """Right to the first order."""
    fixed = x.detach()
    result = f(fixed, y, **options)
    slope = 2 * options["scale"] * (fixed - y)
    weight = options["weight"]
    slope = slope if weight is None else slope * weight.to(x.dtype)
    return result + (slope * (x - fixed)).sum(-1)


def _writes(f, x, y, options):
    result = f(x, y, **options)
    y.data.zero_()
    return result


def _writes_the_same(f, x, y, options):
    with torch.no_grad():
        y.mul_(1)
    return f(x, y, **options)


def _draws(f, x, y, options):
    torch.rand(1)
    return f(x, y, **options)


def _draws_from_python(f, x, y, options):
    random.random()
    return f(x, y, **options)


def _hides_nan(f, x, y, options):
    return f(x, y, **options).nan_to_num()


def _spreads_nan(f, x, y, options):
    return f(x, y, **options) + 0 * x.sum()


def _stays_half(f, x, y, options):
    return f(x, y, **options).to(x.dtype)


# check -> what is wrong -> a spec that the check must refuse
WRONG: dict[str, dict[str, Spec]] = {
    "value": {
        "a factor": _function(lambda f, x, y, o: 1.001 * f(x, y, **o)),
        "an option": _function(lambda f, x, y, o: f(x, y, **{**o, "scale": 1.0})),
        "the gradient": _function(lambda f, x, y, o: f(_WrongBackward.apply(x), y, **o)),
        "the dtype": _function(lambda f, x, y, o: f(x, y, **o).double()),
        "one entry": _function(lambda f, x, y, o: f(x, y, **o).cumsum(0).diff(prepend=x[:1, 0])),
    },
    "half": {"sums in half": _function(_in_half)},
    "strides": {"reads the storage": _function(_reads_storage)},
    "empty": {
        "the value": replace(KEPT, empty={"no rows": Empty(lambda: sample(0), math.nan, (1,))}),
        "raises": _function(lambda f, x, y, o: f(x, y, **o) + 0 * x.amax()),
        "the gradient": _function(lambda f, x, y, o: f(x, y, **o) + (x - x.detach()).sum(-1)),
    },
    "constants": {
        "one more": _function(_with_target_gradient),
        "one less": replace(KEPT, gradients=("input", "target")),
        "not refused": replace(KEPT, refused=("target",)),
    },
    "gradient": {"a factor": _function(lambda f, x, y, o: f(_WrongBackward.apply(x), y, **o))},
    "switched": {
        "forgets": _function(lambda f, x, y, o: _ForgetsOnReference.apply(x - y).sum(-1)),
    },
    "second_derivative": {
        "missing": _function(lambda f, x, y, o: _FirstDerivativeOnly.apply(x - y).sum(-1)),
        "declared missing": replace(KEPT, gradgrad="no second derivative"),
    },
    "forward_mode": {
        "missing": _function(lambda f, x, y, o: f(_WrongBackward.apply(x), y, **o)),
        "declared to raise": replace(KEPT, forward_mode="no forward mode"),
    },
    "transforms": {
        "missing": _function(lambda f, x, y, o: f(_WrongBackward.apply(x), y, **o)),
        "looks at the values": _function(_looks),
        "the second derivative": _function(_constant_curvature),
        "declared missing": replace(KEPT, transforms={"hessian": "no hessian"}),
    },
    "compiled": {
        "a graph break": _function(_looks),
        "another value": _function(_compiles_to_something_else),
        "declared missing": replace(KEPT, compile="cannot be compiled"),
    },
    "vmapped": {"looks at the values": _function(_looks)},
    "module": {"loses an option": replace(KEPT, build=_ignores_scale)},
    "extra_repr": {"shows nothing": replace(KEPT, build=_no_repr)},
    "copies": {"loses an option": replace(KEPT, module=Forgetful)},
    "state_dict": {"weight is no buffer": replace(KEPT, module=Plain)},
    "signature": {"another default": replace(KEPT, module=OtherDefault)},
    "autocast": {"stays half": _function(_stays_half)},
    "nan": {
        "hidden": _function(_hides_nan),
        "everywhere": _function(_spreads_nan),
        "declared to spread": replace(KEPT, nan={"input": "all"}),
        "declared to raise": replace(KEPT, nan={"input": "raises"}),
        "hidden somewhere": replace(_function(_hides_nan), nan={"input": "any"}),
        "another number": replace(KEPT, nan={"input": torch.equal}),
    },
    "inputs_unchanged": {
        "bits": _function(_writes),
        "version": _function(_writes_the_same),
    },
    "no_random_numbers": {"torch": _function(_draws), "Python": _function(_draws_from_python)},
    "deterministic": {
        "a counter": _function(lambda f, x, y, o: f(x, y, **o) + 1e-3 * next(_calls)),
        "threads": _function(lambda f, x, y, o: f(x, y, **o) + 1e-3 * torch.get_num_threads()),
    },
    "errors": {
        "none": _function(lambda f, x, y, o: f(x, y, **{**o, "scale": 1.0})),
        "none of the module": replace(KEPT, module=Lenient),
        "another message": replace(KEPT, errors=(Bad(TypeError, "got a list", dict(input=[1])),)),
        "another type": replace(KEPT, errors=(Bad(ValueError, "got list", dict(input=[1])),)),
    },
}
