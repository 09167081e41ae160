"""The checks of a Spec. Each raises AssertionError, or what the callable itself raises."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from helpers import TORCH
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.forward_ad import dual_level, make_dual

import pyloss
from pyloss.testing import STRIDES, assert_matches_reference
from specs._spec import BF16, F32, F64, HALF, Sample, Spec

CHECKS: dict[str, tuple[Callable[[Spec], bool], Callable[[Spec], None]]] = {}


def check(applies: Callable[[Spec], bool] = lambda spec: True):
    """Registers a check under its name, for the specs that it applies to."""

    def register(f: Callable[[Spec], None]) -> Callable[[Spec], None]:
        CHECKS[f.__name__] = applies, f
        return f

    return register


# --------------------------------------------------------------------------------------------------
# Tools


@contextmanager
def naming(what: str):
    """Puts `what` in front of the message of a failure."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def each_sample(spec: Spec):
    for name, make in spec.samples.items():
        yield name, make()


def derivative_samples(spec: Spec):
    for name in spec.derivative_samples or spec.samples:
        yield name, spec.samples[name]()


def with_leaves(spec: Spec, sample: Sample) -> tuple[Sample, dict[str, Tensor]]:
    """The sample with fresh leaves for what gets a gradient."""
    leaves = {}
    for name in spec.gradients:
        value = sample.inputs.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.detach().requires_grad_()
    return sample.replace(leaves), leaves


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Multiples of 1/8, which every dtype has."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(4, 13, t.shape, generator=generator).to(t.device, t.dtype).div_(8)
        for t in outputs
    ]


def gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of all results, times fixed numbers between 0.5 and 1.5."""
    live = tuple(t for t in outputs if t.requires_grad)
    if not live:
        raise AssertionError("no result has a gradient")
    return dict(zip(leaves, torch.autograd.grad(live, list(leaves.values()), upstream(live))))


def named(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"result {i}": t.detach() for i, t in enumerate(outputs)}


def run(spec: Spec, sample: Sample) -> dict[str, Tensor]:
    """Results and gradients by name."""
    sample, leaves = with_leaves(spec, sample)
    outputs = spec.call(sample)
    found = named(outputs)
    if leaves:
        found |= {f"gradient of {k}": g for k, g in gradients(outputs, leaves).items()}
    return found


def assert_close(
    spec: Spec, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """`dtype` is that of the arguments; without a tolerance for it, each result has its own."""
    assert found.keys() == expected.keys()
    rtol, atol = spec.tolerances.get(dtype, (None, None))
    for name, actual in found.items():
        if not actual.is_floating_point():
            assert torch.equal(actual, expected[name]), name
            continue
        assert_matches_reference(actual, expected[name], rtol=rtol, atol=atol, what=name)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, actual in found.items():
        same = actual.dtype == expected[name].dtype and torch.equal(
            torch.nan_to_num(actual, 0.5), torch.nan_to_num(expected[name], 0.5)
        )
        if not same or not torch.equal(actual.isnan(), expected[name].isnan()):
            raise AssertionError(f"{name} differs")


def tensors_of(sample: Sample) -> dict[str, Tensor]:
    flat = {}
    for name, value in sample.arguments.items():
        for i, t in enumerate(value if isinstance(value, (tuple, list)) else [value]):
            if isinstance(t, Tensor):
                flat[f"{name} {i}"] = t
    return flat


def differentiable(spec: Spec) -> bool:
    return bool(spec.gradients)


def has_module(spec: Spec) -> bool:
    return spec.module is not None


# --------------------------------------------------------------------------------------------------
# Values, dtypes, memory


@check()
def value(spec: Spec, device: str = "cpu") -> None:
    """Value and gradient of every sample in every dtype, against the reference in float64."""
    for name, sample in each_sample(spec):
        for dtype in spec.dtypes:
            with naming(f"sample {name}, {dtype}"):
                rounded = spec.cast(sample, dtype)
                found = run(spec, rounded.each(lambda _, t: t.to(device)))
                found = {k: t.cpu() for k, t in found.items()}
                assert found["result 0"].dtype == spec.result_dtype(dtype), "dtype of the result"
                exact, leaves = with_leaves(spec, rounded.map(lambda _, t: t.double()))
                outputs = spec.exact(exact)
                expected = named(outputs)
                if leaves:
                    live = gradients(outputs, leaves)
                    expected |= {f"gradient of {k}": g for k, g in live.items()}
                for k, t in found.items():
                    want = spec.cast(sample, dtype).inputs.get(k.removeprefix("gradient of "))
                    assert want is None or want.dtype == t.dtype, f"dtype of {k}"
                assert_close(spec, found, expected, dtype)


@check(lambda spec: spec.rounded and any(d in HALF for d in spec.dtypes))
def half(spec: Spec) -> None:
    """Half types are computed in float32, and rounded once."""
    for name, sample in each_sample(spec):
        for dtype in (d for d in spec.dtypes if d in HALF):
            with naming(f"sample {name}, {dtype}"):
                sample_half = spec.cast(sample, dtype)
                expected = spec.call(sample_half.map(lambda _, t: t.float()))
                for a, b in zip(spec.call(sample_half), expected):
                    assert torch.equal(a, b.to(a.dtype)), "not the rounded float32 result"


@check()
def strides(spec: Spec) -> None:
    """Other memory layouts of the inputs give the same values and gradients."""
    dtype = F64 if F64 in spec.dtypes else F32
    sample = spec.cast(spec.first(), dtype)
    names = [k for k, v in sample.inputs.items() if isinstance(v, Tensor) and v.dim()]
    for layout, f in STRIDES.items():
        for name in names:
            with naming(f"{layout} {name}"):
                moved = sample.replace({name: f(sample.inputs[name])})
                # "expanded" repeats values: the same numbers, dense.
                dense = sample.replace({name: moved.inputs[name].contiguous()})
                found, expected = run(spec, moved), run(spec, dense)
                rtol, atol = spec.tolerances.get(dtype, (1e-10, 1e-12))
                # NaN: equal labels are one class, of which some metrics say nothing.
                torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@check(lambda spec: bool(spec.empty))
def empty(spec: Spec) -> None:
    """What comes out of nothing, and a gradient that is 0 rather than NaN."""
    for name, case in spec.empty.items():
        with naming(name):
            found = run(spec, spec.cast(case.sample(), F32))
            first = found["result 0"]
            assert tuple(first.shape) == case.shape, f"shape {tuple(first.shape)}"
            expected = torch.full_like(first, case.value)
            assert torch.equal(first.nan_to_num(1234.0), expected.nan_to_num(1234.0)), first
            for k, g in found.items():
                assert not k.startswith("gradient") or not g.any(), f"{k} is not 0"


# --------------------------------------------------------------------------------------------------
# Derivatives and transforms


def _of_leaves(spec: Spec, sample: Sample):
    """(what has a gradient as a function of what gets one, those tensors)."""
    sample, leaves = with_leaves(spec, sample)
    live = [i for i, t in enumerate(spec.call(sample)) if t.requires_grad]

    def f(*values: Tensor):
        found = spec.call(sample.replace(dict(zip(leaves, values))))
        return tuple(found[i] for i in live)

    return f, tuple(leaves.values())


@check()
def constants(spec: Spec) -> None:
    """The inputs that get a gradient are the declared ones; others get none, or refuse it."""
    for name, sample in each_sample(spec):
        with naming(f"sample {name}"):
            leaves = {
                k: v.detach().requires_grad_()
                for k, v in sample.inputs.items()
                if isinstance(v, Tensor) and v.is_floating_point()
            }
            for k in set(leaves) & set(spec.refused):
                with raises(RuntimeError, f"not differentiable with respect to {k}"):
                    spec.call(sample.replace({k: leaves.pop(k)}))
            live = [t for t in spec.call(sample.replace(leaves)) if t.requires_grad]
            given = set()
            if live:
                found = torch.autograd.grad(
                    live, list(leaves.values()), upstream(live), allow_unused=True
                )
                given = {k for k, g in zip(leaves, found) if g is not None}
            assert given == set(leaves) & set(spec.gradients), f"gradients for {sorted(given)}"


@check(differentiable)
def gradient(spec: Spec) -> None:
    """The first derivative is that of finite differences, for many cotangents at once too."""
    batched = bool(spec.vmap) if spec.batched_gradient is None else spec.batched_gradient
    for name, sample in derivative_samples(spec):
        with naming(f"sample {name}"):
            f, leaves = _of_leaves(spec, sample)
            gradcheck(f, leaves, check_batched_grad=batched)


@check(differentiable)
def switched(spec: Spec) -> None:
    """The gradient does not depend on the backend of the forward: its block may end before the
    backward, or begin after it."""

    def found(sample, forward, backward):
        sample, leaves = with_leaves(spec, sample)
        with pyloss.backend(forward):
            outputs = spec.call(sample)
        with pyloss.backend(backward):
            return gradients(outputs, leaves)

    for name, sample in derivative_samples(spec):
        for dtype in (F64, F32):
            given = sample.map(lambda _, t, dtype=dtype: t.to(dtype))
            for forward, backward in (("reference", None), (None, "reference")):
                with naming(f"sample {name}, {dtype}, {forward} then {backward}"):
                    actual = found(given, forward, backward)
                    for leaf, expected in found(given, backward, backward).items():
                        torch.testing.assert_close(
                            actual[leaf], expected, rtol=1e-4, atol=1e-5, equal_nan=True
                        )


@check(differentiable)
def second_derivative(spec: Spec) -> None:
    """The second derivative is that of finite differences, or raises as declared."""
    for name, sample in derivative_samples(spec):
        with naming(f"sample {name}"):
            f, leaves = _of_leaves(spec, sample)
            if spec.gradgrad is True:
                gradgradcheck(f, leaves, fast_mode=not spec.thorough)
                continue
            live = f(*leaves)
            found = torch.autograd.grad(live, leaves, upstream(live), create_graph=True)
            with raises(RuntimeError, spec.gradgrad):
                torch.autograd.grad(sum(g.square().sum() for g in found), leaves)


@check(differentiable)
def forward_mode(spec: Spec) -> None:
    """Forward-mode derivatives agree with finite differences, or raise as declared.

    A dual number that comes out without its tangent is a derivative of 0, silently: no Spec may
    declare that.
    """
    for name, sample in derivative_samples(spec):
        with naming(f"sample {name}"):
            f, leaves = _of_leaves(spec, sample)
            if spec.forward_mode is True:
                gradcheck(
                    f,
                    leaves,
                    check_forward_ad=True,
                    check_backward_ad=False,
                    fast_mode=not spec.thorough,
                )
                continue
            with dual_level():
                duals = [make_dual(t.detach(), torch.ones_like(t)) for t in leaves]
                with raises((RuntimeError, NotImplementedError), spec.forward_mode):
                    f(*duals)


def _transformed(f, given: tuple[Tensor, ...]) -> dict[str, Callable[[], list[Tensor]]]:
    """A call of each transform of torch.func, its result brought to that of `_expected`."""
    func, every = torch.func, tuple(range(len(given)))
    with torch.no_grad():
        outputs = f(*given)
    g, v = upstream(outputs), upstream(given)

    def inner(a, b) -> Tensor:
        return sum((x * y).sum() for x, y in zip(a, b))

    def total(*x: Tensor) -> Tensor:
        return inner(f(*x), g)

    def by_rows(jacobian) -> list[Tensor]:
        """The product of upstream gradients with a Jacobian."""
        flat = [(o.numel(), o.reshape(-1)) for o in g]
        return [
            sum(o @ j[i].reshape(n, -1) for (n, o), j in zip(flat, jacobian)).view(x.shape)
            for i, x in enumerate(given)
        ]

    def second(hessian) -> list[Tensor]:
        return [
            sum(b.reshape(x.numel(), -1) @ y.reshape(-1) for b, y in zip(row, v)).view(x.shape)
            for x, row in zip(given, hessian)
        ]

    stacked = [torch.stack([x, x + 0.0]) for x in given]
    return {
        "grad": lambda: func.grad(total, every)(*given),
        "vjp": lambda: func.vjp(f, *given)[1](tuple(g)),
        "jvp": lambda: [inner(func.jvp(f, given, tuple(v))[1], g)],
        "vmap": lambda: [o[1] for o in func.vmap(f)(*stacked)],
        "jacrev": lambda: by_rows(func.jacrev(f, every)(*given)),
        "jacfwd": lambda: by_rows(func.jacfwd(f, every)(*given)),
        "hessian": lambda: second(func.hessian(total, every)(*given)),
    }


def _expected(f, given: tuple[Tensor, ...], step: float = 1e-5) -> dict[str, list[Tensor]]:
    """The same without torch.func; the second derivative by differences of the first."""
    leaves = [x.clone().requires_grad_() for x in given]
    outputs = f(*leaves)
    g, v = upstream(outputs), upstream(given)
    first = list(torch.autograd.grad(outputs, leaves, g))

    def moved(by: float) -> list[Tensor]:
        there = [(x + by * y).requires_grad_() for x, y in zip(given, v)]
        return torch.autograd.grad(f(*there), there, g)

    second = [(a - b) / (2 * step) for a, b in zip(moved(step), moved(-step))]
    along = [sum((a * b).sum() for a, b in zip(first, v))]
    return {
        **dict.fromkeys(("grad", "vjp", "jacrev", "jacfwd"), first),
        "jvp": along, "vmap": [o.detach() for o in outputs], "hessian": second,
    }  # fmt: skip


@check(differentiable)
def transforms(spec: Spec) -> None:
    """What torch.func makes of the function is what autograd does, or raises as declared.

    A declared error must come for one sample at least: what a batch of them cannot be may depend on
    the number of results.
    """
    missing = set(spec.transforms)
    for name, sample in derivative_samples(spec):
        f, leaves = _of_leaves(spec, sample)
        given = tuple(t.detach() for t in leaves)
        expected = _expected(f, given)
        for transform, call in _transformed(f, given).items():
            with naming(f"sample {name}, {transform}"):
                try:
                    found = list(call())
                except (RuntimeError, NotImplementedError) as error:
                    declared = spec.transforms.get(transform)
                    if declared is None or not re.search(declared, str(error)):
                        raise
                    missing.discard(transform)
                    continue
                close = dict(rtol=1e-5, atol=1e-6) if transform == "hessian" else {}
                torch.testing.assert_close(found, expected[transform], **close)
    assert not missing, f"nothing raised in {sorted(missing)}"


@check()
def compiled(spec: Spec) -> None:
    """torch.compile(fullgraph=True) gives the same value and gradient, or raises as declared."""
    torch._dynamo.reset()  # a function has a limited number of compiled forms
    # Results of a size that depends on the values: what later versions of torch do by themselves.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _compiled(spec)


def _compiled(spec: Spec) -> None:
    twin = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    for name in spec.compile_samples or [next(iter(spec.samples))]:
        with naming(f"sample {name}"):
            dtype = F32 if F32 in spec.dtypes else F64
            sample = spec.cast(spec.samples[name](), dtype)
            given, leaves = with_leaves(spec, sample)
            if spec.compile is not True:
                # Before 2.10 torch gave other reasons.
                with raises(Exception, spec.compile if TORCH >= (2, 10) else ""):
                    twin(**given.arguments)
                continue
            outputs = spec.tensors(twin(**given.arguments))
            found = named(outputs)
            if leaves:
                found |= {f"gradient of {k}": g for k, g in gradients(outputs, leaves).items()}
            assert_close(spec, found, run(spec, sample), dtype)


@check(lambda spec: bool(spec.vmap))
def vmapped(spec: Spec) -> None:
    """vmap of the function, and of its gradient, is a loop over the first dimension."""
    sample = spec.cast(spec.first(), F64)
    stacked = {k: torch.stack([sample.inputs[k], sample.inputs[k].flip(-1)]) for k in spec.vmap}

    def f(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return spec.call(sample.replace(values))

    def total(inner: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
        return sum((t * t).sum() for t in f({**values, **inner}) if t.is_floating_point())

    each = [{k: t[i] for k, t in stacked.items()} for i in range(2)]
    for a, *b in zip(torch.func.vmap(f)(stacked), *map(f, each)):
        torch.testing.assert_close(a, torch.stack(b))
    inner = {k: t for k, t in stacked.items() if k in spec.gradients and t.is_floating_point()}
    if inner:
        grad = torch.func.grad(total)
        found = torch.func.vmap(grad)(inner, stacked)
        loop = [grad({k: t[i] for k, t in inner.items()}, each[i]) for i in range(2)]
        for k, g in found.items():
            torch.testing.assert_close(g, torch.stack([one[k] for one in loop]))


# --------------------------------------------------------------------------------------------------
# The module


def _modules(spec: Spec):
    """(name, module, its inputs, the results of the function) for every sample."""
    for name, sample in each_sample(spec):
        sample = spec.cast(sample, F32)
        module, inputs = spec.build(spec, sample)
        yield name, module, inputs, named(spec.call(sample))


@check(has_module)
def module(spec: Spec) -> None:
    """The module equals the function, bit for bit, gradients and those of its parameters too."""
    for name, sample in each_sample(spec):
        with naming(f"sample {name}"):
            sample = spec.cast(sample, F32)
            expected = run(spec, sample)
            twin, inputs = spec.build(spec, sample)
            assert type(twin) is spec.module, f"build made a {type(twin).__name__}"
            given, leaves = with_leaves(spec, Sample(inputs))
            outputs = spec.tensors(twin(**given.inputs))
            leaves |= {spec.parameters[k]: p for k, p in twin.named_parameters()}
            found = named(outputs)
            if leaves:
                found |= {f"gradient of {k}": g for k, g in gradients(outputs, leaves).items()}
            assert_same_bits(found, expected)


@check(has_module)
def extra_repr(spec: Spec) -> None:
    """Every number, name and flag that a module was made with is in its representation."""
    known = inspect.signature(spec.module.__init__).parameters
    keywords = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name, sample in each_sample(spec):
        text = repr(spec.build(spec, spec.cast(sample, F32))[0])
        for option, given in sample.options.items():
            if (option in known or keywords) and isinstance(given, (bool, int, float, str)):
                assert repr(given) in text, f"sample {name}: {option}={given!r} is not in {text}"


@check(has_module)
def copies(spec: Spec) -> None:
    """Pickled, saved and copied modules are the same module."""
    for name, twin, inputs, expected in _modules(spec):
        file = io.BytesIO()
        torch.save(twin, file)
        file.seek(0)
        clones = {
            "deepcopy": copy.deepcopy(twin),
            "pickle": pickle.loads(pickle.dumps(twin)),
            "torch.save": torch.load(file, weights_only=False),
        }
        for how, clone in clones.items():
            with naming(f"sample {name}, {how}"):
                assert type(clone) is type(twin)
                assert repr(clone) == repr(twin), f"{clone} was {twin}"
                assert_same_bits(named(spec.tensors(clone(**inputs))), expected)


@check(has_module)
def state_dict(spec: Spec) -> None:
    """It holds the tensors and nothing else; another module takes it over; it follows .double()."""
    seen: set[str] = set()
    for name, sample in each_sample(spec):
        with naming(f"sample {name}"):
            single = spec.cast(sample, F32)
            twin, inputs = spec.build(spec, single)
            state = twin.state_dict()
            keys = {k for k, v in sample.options.items() if isinstance(v, Tensor)}
            # Every parameter is there in some sample: without a bias it is not.
            assert keys <= set(state) <= keys | set(spec.parameters), f"keys {tuple(state)}"
            seen |= set(state)
            clone = copy.deepcopy(twin)
            with torch.no_grad():
                for t in clone.state_dict().values():
                    t.zero_()
            clone.load_state_dict(state)
            assert_same_bits(named(spec.tensors(clone(**inputs))), named(spec.call(single)))
            if F64 in spec.dtypes:
                _, inputs = spec.build(spec, spec.cast(sample, F64))
                found = spec.tensors(twin.double()(**inputs))
                assert found[0].dtype == F64, f"{found[0].dtype} after .double()"
    assert set(spec.parameters) <= seen, f"keys {tuple(seen)}"


@check(lambda spec: spec.same_signature)
def signature(spec: Spec) -> None:
    """The module takes the options of the function, in their order and with their defaults."""
    ours = dict(inspect.signature(spec.module.__init__).parameters)
    theirs = dict(inspect.signature(spec.function).parameters)
    for option in [k for k in theirs if k not in ours]:
        assert option in spec.first().inputs, f"{option} is neither an input nor an option"
        del theirs[option]
    del ours["self"]
    assert list(ours) == list(theirs), f"{list(ours)}"
    for option, parameter in theirs.items():
        assert ours[option].default == parameter.default, option


# --------------------------------------------------------------------------------------------------
# Behaviour


@check(lambda spec: bool(spec.autocast))
def autocast(spec: Spec) -> None:
    """Dtype and value under bfloat16 autocast; the gradient keeps the dtype of its input."""
    for given, expected in spec.autocast.items():
        with naming(f"{given}"):
            sample = spec.cast(spec.first(), given)
            with torch.autocast("cpu", BF16):
                found = run(spec, sample)
            assert found["result 0"].dtype == expected, f"result is {found['result 0'].dtype}"
            for k, g in found.items():
                if k.startswith("gradient of "):
                    assert g.dtype == sample.inputs[k.removeprefix("gradient of ")].dtype, k
            if spec.autocast_rounds and given == F32:
                sample = spec.cast(sample, BF16)
            exact = spec.exact(sample.map(lambda _, t: t.double()))[0]
            if spec.autocast_rounds and expected != F64:
                assert_matches_reference(found["result 0"], exact, rtol=2e-2, atol=2e-2)
            else:
                assert_close(spec, {"result 0": found["result 0"]}, {"result 0": exact}, given)


@check(lambda spec: bool(spec.nan))
def nan(spec: Spec) -> None:
    """NaN in, NaN out or an error: never a plausible number."""
    for dtype in spec.dtypes:
        for name, rule in spec.nan.items():
            with naming(f"{name}, {dtype}"):
                clean = spec.cast(spec.first(), dtype)
                bad = clean.inputs[name].clone()
                bad.view(-1)[0] = float("nan")
                sample = clean.replace({name: bad})
                if rule == "raises":
                    with raises(ValueError, "must not contain NaN"):
                        spec.call(sample)
                    continue
                result = spec.call(sample)[0]
                if callable(rule):
                    assert rule(result, spec.call(clean)[0]), f"the result {result}"
                elif rule == "row":
                    assert result[0].isnan().all(), "a number in the row of the NaN"
                    assert not result[1:].isnan().any(), "a NaN in another row"
                else:
                    assert {"all": torch.all, "any": torch.any}[rule](result.isnan()), "no NaN"


@check()
def inputs_unchanged(spec: Spec) -> None:
    """Neither forward nor backward writes to an argument."""
    for name, sample in each_sample(spec):
        sample = spec.cast(sample, F32 if F32 in spec.dtypes else F64)
        before = {k: t.clone() for k, t in tensors_of(sample).items()}
        versions = {k: t._version for k, t in tensors_of(sample).items()}
        run(spec, sample)
        with naming(f"sample {name}"):
            assert_same_bits(tensors_of(sample), before)
            for k, t in tensors_of(sample).items():
                assert t._version == versions[k], f"{k} was written to"


def _rng_state():
    state = [torch.get_rng_state().tolist(), random.getstate()]
    if "numpy" in sys.modules:
        state.append(repr(sys.modules["numpy"].random.get_state()))
    return state


@check()
def no_random_numbers(spec: Spec) -> None:
    """No global generator is used, of torch, Python or NumPy."""
    sample = spec.cast(spec.first(), F32 if F32 in spec.dtypes else F64)
    before = _rng_state()
    run(spec, sample)
    assert _rng_state() == before, "a global generator has moved"


@check()
def deterministic(spec: Spec) -> None:
    """Two runs, and runs on one and two threads, agree bit for bit."""
    sample = spec.cast((spec.large or spec.first)(), F32 if F32 in spec.dtypes else F64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(spec, sample)
        with naming("second run"):
            assert_same_bits(run(spec, sample), expected)
        torch.set_num_threads(2 if spec.threads else 1)
        with naming("two threads"):
            assert_same_bits(run(spec, sample), expected)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def raises(error, match: str):
    try:
        yield
    except error as found:
        assert re.search(match, str(found)), f"message {str(found)!r} does not match {match!r}"
    else:
        raise AssertionError(f"nothing raised; expected {match!r}")


@check(lambda spec: bool(spec.errors))
def errors(spec: Spec) -> None:
    """Wrong arguments raise the declared exception with its message, with and without gradients.

    Of a module too, unless it has parameters, which are right by its construction.
    """
    for bad in spec.errors:
        base = spec.cast(spec.first(), F32 if F32 in spec.dtypes else F64)
        change = bad.change(base.arguments) if callable(bad.change) else bad.change
        sample = base.replace(change)
        for given in (sample, with_leaves(spec, sample)[0]):
            with naming(f"{bad.error} {bad.match!r}"), raises(bad.error, bad.match):
                spec.call(given)
        if spec.module is not None and not spec.parameters:
            match = bad.match if bad.of_module is None else bad.of_module
            with naming(f"{bad.error} {match!r} of the module"), raises(bad.error, match):
                twin, inputs = spec.build(spec, sample)
                twin(**inputs)


def assert_spec(spec: Spec, name: str, **options) -> None:
    """Runs one check; a failure names the spec and the check."""
    with naming(f"spec {spec.name}, check {name}"):
        CHECKS[name][1](spec, **options)
