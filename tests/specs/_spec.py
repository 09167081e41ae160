"""What a test needs to know about one public callable; `test_specs.py` runs every check on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HALF = (BF16, F16)


@dataclass(frozen=True)
class Sample:
    """The arguments of one call, by name: what a module gets when called, and when made."""

    inputs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.inputs, **self.options}

    def each(self, f: Callable[[str, Tensor], Tensor]) -> Sample:
        """Every tensor replaced by f(name, tensor); those inside tuples too."""

        def one(name, value):
            if isinstance(value, Tensor):
                return f(name, value.detach())
            if type(value) in (tuple, list):
                return type(value)(one(name, v) for v in value)
            return value

        return Sample(*({k: one(k, v) for k, v in d.items()} for d in (self.inputs, self.options)))

    def map(self, f: Callable[[str, Tensor], Tensor]) -> Sample:
        """The same for the floating ones."""
        return self.each(lambda name, t: f(name, t) if t.is_floating_point() else t)

    def replace(self, change: Mapping[str, Any]) -> Sample:
        """With other values; a name that is not an input is an option."""
        inputs = {k: change.get(k, v) for k, v in self.inputs.items()}
        return Sample(inputs, {**self.options, **{k: change[k] for k in change if k not in inputs}})


def beside(module: nn.Module, like: Tensor) -> nn.Module:
    """A module that was made beforehand, on the device of a tensor."""
    return module if like.is_cpu else copy.deepcopy(module).to(like.device)


@dataclass(frozen=True)
class Empty:
    """A call with nothing in it: its first result is `value` everywhere, of shape `shape`."""

    sample: Callable[[], Sample]
    value: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bad:
    """A call that raises, of the function and of its module, when made or when called.

    `change` replaces arguments of the first sample; `of_module`: the module has other words for it.
    """

    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    change: Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]
    of_module: str | None = None


def _build(spec: Spec, sample: Sample) -> tuple[nn.Module, Mapping[str, Any]]:
    return spec.module(**sample.options), sample.inputs


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, in order; numbers count as float64."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, (tuple, list)):
        return tuple(t for part in result for t in _tensors(part))
    return () if result is None else (torch.tensor(result, dtype=F64),)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One public function, or module, and what is promised of it.

    A promise that is not made is said too: where a field takes a string, that is the message of the
    error that must come instead, so that a missing derivative is never a silently wrong one.
    """

    function: Callable[..., Any]
    # In float64, and tiny: numerical derivatives are taken of them. The first is the plainest.
    samples: Mapping[str, Callable[[], Sample]]
    # The same arguments in float64; must not call what it is to judge.
    reference: Callable[..., Any]
    # Names of the inputs that get a gradient. No other floating input may get one.
    gradients: tuple[str, ...] = ()
    # Those that raise when a gradient is asked for.
    refused: tuple[str, ...] = ()
    covers: tuple[Any, ...] = ()  # public callables that `function` only wraps
    name: str = ""  # default: that of the function

    # -- dtypes and memory
    dtypes: tuple[torch.dtype, ...] = (F64, F32, BF16, F16)
    # Dtype of the first result: that of the first input; "wide": no less than float32; or this one.
    result: str | torch.dtype = "input"
    rounded: bool = True  # half types give the float32 result, rounded
    wide: tuple[str, ...] = ()  # arguments that stay float32 beside half types
    # (rtol, atol) of assert_matches_reference in place of those of pyloss.testing
    tolerances: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    # result dtype under bfloat16 autocast by input dtype; {} for what autocast does not concern
    autocast: Mapping[torch.dtype, torch.dtype] = field(
        default_factory=lambda: {BF16: F32, F32: F32, F64: F64}
    )
    autocast_rounds: bool = False  # autocast casts the inputs, as for a matrix product
    empty: Mapping[str, Empty] = field(default_factory=dict)

    # -- derivatives and transforms
    batched_gradient: bool | None = None  # many cotangents at once; None: where there is a vmap
    derivative_samples: tuple[str, ...] = ()  # whose derivatives are those of the value; all
    gradgrad: bool | str = True
    forward_mode: bool | str = True
    thorough: bool = False  # both of every entry, not along random directions
    # What torch.func cannot do: grad, vjp, jvp, vmap, jacrev, jacfwd or hessian -> the message of
    # the error.
    transforms: Mapping[str, str] = field(default_factory=dict)
    compile: bool | str = True
    compile_samples: tuple[str, ...] = ()  # default: the first
    vmap: tuple[str, ...] = ()  # inputs that are mapped over in the first sample

    # -- numbers
    # input -> what a NaN in its first entry does to the first result. "all" of it is NaN; the first
    # "row" and no other; "any" entry; "raises"; or a test of (the result, that without the NaN).
    nan: Mapping[str, str | Callable[[Tensor, Tensor], bool]] = field(default_factory=dict)
    large: Callable[[], Sample] | None = None  # enough work for two threads; default: the first
    threads: bool = True  # False: sums whose order torch takes from the number of threads
    # Checks for --exhaustive alone: they take seconds, and other Specs do nearly the same
    exhaustive: tuple[str, ...] = ()
    errors: tuple[Bad, ...] = ()

    # -- the module twin
    module: type[nn.Module] | None = None
    build: Callable[[Spec, Sample], tuple[nn.Module, Mapping[str, Any]]] = _build
    # Its own parameters, by the argument that each of them stands for.
    parameters: Mapping[str, str] = field(default_factory=dict)
    same_signature: bool = False  # the module takes the options of the function in their order

    tensors: Callable[[Any], tuple[Tensor, ...]] = _tensors  # of a result

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.function.__name__)

    def cast(self, sample: Sample, dtype: torch.dtype) -> Sample:
        """Every floating tensor rounded to `dtype`, but those in `wide` to no less than float32."""
        real = F32 if dtype in HALF else dtype
        return sample.map(lambda name, t: t.to(real if name in self.wide else dtype))

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if isinstance(self.result, torch.dtype):
            return self.result
        return F32 if self.result == "wide" and dtype in HALF else dtype

    def first(self) -> Sample:
        return next(iter(self.samples.values()))()

    def call(self, sample: Sample) -> tuple[Tensor, ...]:
        return self.tensors(self.function(**sample.arguments))

    def exact(self, sample: Sample) -> tuple[Tensor, ...]:
        return self.tensors(self.reference(**sample.arguments))
