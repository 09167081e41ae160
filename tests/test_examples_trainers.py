"""The examples with trainers of other packages run, and their tables say what they should."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys, *options: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_lightning(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("lightning")
    lines = printed("lightning_lm.py", monkeypatch, capsys, "--steps", "20")
    rows = [line.split() for line in lines if re.match(r" *\d+ ", line)]
    assert [int(step) for step, *_ in rows] == [0, 5, 10, 15, 20]
    losses = [float(loss) for _, loss, _ in rows]
    assert 5 < losses[0] < 6 and losses[-1] < 3.6


def test_trl(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("trl", minversion="1.16")
    lines = printed(
        "trl_dpo.py", monkeypatch, capsys, "--steps", "4", "--losses", "sigmoid,apo_zero"
    )
    rows = [line.split() for line in lines if line.startswith(("sigmoid", "apo_zero"))]
    assert len(rows) == 4
    for own, ours in (rows[:2], rows[2:]):
        assert own[1:2] + ours[1:2] == ["TRL", "pyloss"] and own[2:] == ours[2:]
    assert float(rows[0][3]) < float(rows[0][2])
