"""Ops, row losses and Lion-K of DTensors against one process (dtensor_worker.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import check_ranks

import pyloss
from pyloss.ops import _shards

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


@pytest.mark.parametrize(
    "world",
    [
        2,
        pytest.param(3, marks=pytest.mark.exhaustive),
        pytest.param(4, marks=pytest.mark.exhaustive),
    ],
)
def test_against_one_process(world: int, tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, world, str(ROOT / "tests" / "dtensor_worker.py"))
    assert all("all cases done" in text for text in texts)
    assert len({text.count(": ok") for text in texts}) == 1 and texts[0].count(": ok") > 70


def test_every_op_says_what_a_mesh_may_split() -> None:
    """A rule with a term for each tensor of the schema, one that is found for each call, or why no
    split suits; an op registered with torch in another way is found too."""
    pyloss.ops.load_all()
    schemas = {s.name.removeprefix("pyloss::"): s for s in torch._C._jit_get_all_schemas()
               if s.name.startswith("pyloss::")}  # fmt: skip
    assert set(schemas) == set(_shards.rules)
    for name, rule in _shards.rules.items():
        if callable(rule):
            continue
        if not _shards.is_rule(rule):
            assert len(rule.split()) > 4, f"{name}: {rule!r} is neither a rule nor a reason"
            continue
        before, after = (side.split(",") for side in rule.split("->"))
        tensors = [a.name for a in schemas[name].arguments if "Tensor" in str(a.type)]
        results = schemas[name].returns
        assert len(before) == len(tensors), (name, tensors)
        listed = any("List" in str(r.type) for r in results)
        assert listed or len(after) == max(1, len(results)), name
        capitals = {c for term in before for c in term if c.isupper() or c == "*"}
        assert capitals, f"{name}: a rule that splits nothing"
        assert all(c in capitals for term in after for c in term if c.isupper()), name


def test_plain_tensors_do_not_load_them() -> None:
    code = (
        "import sys, torch, pyloss\n"
        "x = torch.nn.Parameter(torch.randn(3, 5))\n"
        "pyloss.fused_cross_entropy(x, torch.tensor([0, 1, 2])).backward()\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "assert 'pyloss.functional._row_dtensors' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_another_thread_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in sys.modules before it has its names."""
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", type(sys)("half"))
    assert not _shards.is_dtensor(torch.ones(1))
    # A subclass goes past the short way of plain tensors.
    assert pyloss.fused_cross_entropy(torch.nn.Parameter(torch.ones(1, 2)), torch.tensor([0])) > 0
