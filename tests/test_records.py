"""The records that cross to C++: both sides list the same fields in the same order."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from pyloss import _C

OPS = Path(__file__).resolve().parents[1] / "pyloss" / "ops"
WITH_RECORDS = sorted(p.parent.name for p in OPS.glob("*/records.py"))


@pytest.mark.parametrize("op", WITH_RECORDS)
def test_both_sides_have_the_same_fields(op: str) -> None:
    records = importlib.import_module(f"pyloss.ops.{op}.records").RECORDS
    assert {r.__name__: r._fields for r in records} == _C.fields(op)


def test_no_record_of_the_compiled_module_is_left_out() -> None:
    assert sorted(_C._records) == WITH_RECORDS


def test_a_record_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Problem: needs a tuple of 7 fields"):
        _C.permutahedron_fwd((1, 2, 3), 0, 0, 0, 1)


def test_a_wrong_value_is_named() -> None:
    good = dict(rows=0, n=2, dtype=1, rank=False, kl=False, centred=False, strength=1.0)
    for name, value, error, text in [
        ("rows", -1, ValueError, "negative size"),
        ("dtype", 9, ValueError, "dtype: unknown code 9"),
        ("kl", 2, ValueError, "kl: not a flag"),
        ("n", 2**70, ValueError, "n: not a 64-bit integer"),
        ("n", 2.0, TypeError, "n: needs an integer, got float"),
        ("strength", "1", TypeError, "strength: needs a number, got str"),
    ]:
        with pytest.raises(error, match=text):
            _C.permutahedron_fwd(tuple({**good, name: value}.values()), 0, 0, 0, 1)


@pytest.mark.parametrize(
    "shape, text",
    [
        ((900, 900, 900), "more than 2.31 cells"),
        ((2, 2**30, 1), "more than 2.31 cells"),
        ((2, 2, 2, 2), "1 to 3 sizes"),
        ((), "1 to 3 sizes"),
    ],
)
def test_a_betti_problem_has_up_to_three_dimensions_and_2_31_cells(shape, text) -> None:
    problem = dict(items=0, shape=shape, want=7, superlevel=False, input=0, input_dtype=1)
    with pytest.raises(ValueError, match=f"shape: .*{text}"):
        _C.betti_matching((*problem.values(), 0, 1), 1)
