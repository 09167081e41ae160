"""The experiments on order, sets and ranking in examples/, at sizes that take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyloss.demo.seeds import Panel, draw, spread

EXAMPLES = Path(__file__).parent.parent / "examples"
# file: (needs scikit-learn, a row of its table)
EXPERIMENTS = {
    "groco_digits": (True, "untrained encoder"),
    "sort_sets": (False, "N = 4, 1 steps, 1 glimpse"),
    "order_search": (False, "exhaustive, warm-up"),
    "topk_loss": (True, "50% wrong, half k = 1, half k = 5"),
    "rank_queries": (True, "neural_ndcg"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    if EXPERIMENTS[name][0]:
        pytest.importorskip("sklearn")
    plot = tmp_path / "made" / "plot.png"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(EXPERIMENTS[name][1])
              and "+-" in line]  # fmt: skip
    assert "nan" not in row
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["made"]


def test_every_experiment_is_described() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert not [name for name in EXPERIMENTS if f"| `{name}.py` |" not in text]


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0], 1, " %") == "2.0 +- 1.0 %"
    assert spread([0.25], 2) == "0.25 +- 0.00"


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = Panel("", "", "", [1.0], {"line": [[1.0]], "level": 2.0})
    assert "needs matplotlib" in draw(tmp_path / "x.png", [panel])
    assert not list(tmp_path.iterdir())
