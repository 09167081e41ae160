"""Integers and flags of every public function may be numpy's, as a size or a comparison gives."""

from __future__ import annotations

import inspect

import pytest

np = pytest.importorskip("numpy")

from specs import SPECS  # noqa: E402
from specs._checks import each_sample, naming, with_leaves  # noqa: E402


def as_numpy(value):
    """None for what is neither integer nor flag."""
    if type(value) is bool:
        return np.bool_(value)
    if type(value) is int:
        return np.int64(value)
    if type(value) is tuple and value and all(type(v) is int for v in value):
        return tuple(np.int64(v) for v in value)
    return None


def integers_and_flags(spec):
    for name, sample in each_sample(spec):
        for option, parameter in inspect.signature(spec.function).parameters.items():
            changed = as_numpy(sample.arguments.get(option, parameter.default))
            if changed is not None:
                yield name, sample, option, changed


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS.values() if s.function])
def test_numpy_options(spec) -> None:
    for name, sample, option, changed in integers_and_flags(spec):
        with naming(f"sample {name}, {option}={changed!r}"):
            spec.call(with_leaves(spec, sample.replace({option: changed}))[0])


def test_the_sweep_finds_options() -> None:
    """Of most functions, and flags as well as integers."""
    found = [c for s in SPECS.values() if s.function for *_, c in integers_and_flags(s)]
    assert len(found) > 100 and {type(c) for c in found} >= {np.bool_, np.int64, tuple}
