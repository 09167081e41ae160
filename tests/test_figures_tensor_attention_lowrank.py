"""bench/figures_tensor_attention_lowrank.py: errors against closed forms, and what it writes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# At the end, so that an installed pyloss stays ahead of the one in the source tree.
sys.path.append(str(ROOT))

from bench import figures_tensor_attention_lowrank as figures  # noqa: E402
from bench import plot  # noqa: E402

RESULTS = sorted((ROOT / "bench" / "results").glob("figures_tensor_attention_lowrank_*.json"))


def test_the_adversary_meets_the_bound():
    """Taylor of degree 1 on [-R, R]: p / exp is 1 at 0, (1 - R) e^R, (1 + R) e^-R at the ends."""
    entry = 0.8
    radius = entry**3
    f = min((1 - radius) * math.exp(radius), (1 + radius) * math.exp(-radius))
    delta = (1 - f) / (1 + f)
    bound = 2 * (1 - math.sqrt(1 - delta**2)) / delta
    found = figures.adversarial_error(entry, "taylor", 1)
    assert found["bound"] == pytest.approx(bound, rel=0.02)
    assert 0.9 * bound < found["measured"] <= found["bound"]


def test_errors_are_below_their_bounds(monkeypatch):
    monkeypatch.setattr(figures, "SEEDS", 1)
    monkeypatch.setattr(figures, "TOKENS", 16)
    for poly in figures.POLYNOMIALS:
        errors = [figures.random_error(0.9, poly, g) for g in (1, 2, 4)]
        assert all(0 < e["measured"] <= e["bound"] for e in errors)
        assert errors[0]["measured"] > errors[1]["measured"] > errors[2]["measured"]
    assert figures.random_error(3.0, "taylor", 1)["bound"] is None


def test_measure_and_write(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "SEEDS", 1)
    monkeypatch.setattr(figures, "TOKENS", 16)
    monkeypatch.setattr(figures, "DEGREES", figures.SHOWN_DEGREES)
    monkeypatch.setattr(figures, "LENGTHS", (64, 128))
    monkeypatch.setattr(figures, "MOST_EXACT", 64)
    monkeypatch.setattr(figures, "WIDTH", 4)
    path = tmp_path / "out.json"
    path.write_text(json.dumps(figures.measure()))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "tensor_attention_lowrank.md"
    page.write_text("before\n" + "\n".join(plot.markers(figures.BLOCK)) + "\nafter\n")
    written = figures.write(figures.load(path), tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert len([line for line in text.splitlines() if "| taylor |" in line]) == 6
    assert "| 128 |  | " in text  # exact is too long there
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="not written by this script"):
        path.with_name("other.json").write_text('{"schema": 1}')
        figures.load(path.with_name("other.json"))


def test_the_page_shows_the_committed_results():
    assert RESULTS, "no result file"
    document = figures.load(RESULTS[-1])
    page = (ROOT / "docs" / "tensor_attention_lowrank.md").read_text()
    assert plot.replace_block(page, figures.tables(document), figures.BLOCK) == page
    bounded = [r for r in document["errors"] if r["bound"] is not None]
    assert len(bounded) > 100 and all(r["measured"] <= r["bound"] for r in bounded)
