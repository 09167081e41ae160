"""bench/figures_sorting_network.py: the table against closed forms, and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# At the end, so that an installed pyloss stays ahead of the one in the source tree.
sys.path.append(str(ROOT))

from bench import figures_sorting_network as figures  # noqa: E402
from bench import plot  # noqa: E402

# Largest softmin - min, times the steepness.
GAPS = {
    "logistic": 0.27846,
    "gaussian": 0.16997,
    "cauchy": 0.31831,
    "reciprocal": 1.0,
    "optimal": 0.0625,
}


@pytest.mark.parametrize("steepness", [1.0, 10.0])
@pytest.mark.parametrize("distribution", GAPS)
def test_largest_gap(distribution, steepness):
    found = steepness * figures.largest_gap(distribution, steepness)
    assert found == pytest.approx(GAPS[distribution], rel=1e-4)


def test_error_falls_with_the_steepness():
    errors = [figures.total_error("cauchy", s, "bitonic", 8) for s in (1.0, 10.0, 1e6)]
    assert errors[0] > errors[1] > 1000 * errors[2] > 0


def test_ranks_move_less_with_the_steepness_and_not_at_all_in_a_sort():
    moves = [figures.move_of_ranks("cauchy", s, "bitonic", 8) for s in (1.0, 100.0, 1e9)]
    assert moves[0] > 5 * moves[1] > 0 and moves[2] < 1e-6


def test_reading_both_ways_helps_where_the_network_is_not_its_own_mirror():
    one, both = (figures.move_of_ranks("cauchy", 10.0, "odd_even", 8, b) for b in (False, True))
    assert both < one / 3
    one, both = (figures.move_of_ranks("cauchy", 10.0, "bitonic", 8, b) for b in (False, True))
    assert both == pytest.approx(one, rel=1e-9)


def test_write(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "STEEPNESS", (10.0,))
    monkeypatch.setattr(figures, "LENGTHS", (4,))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "sorting_network.md"
    blocks = [*plot.markers(figures.BLOCK), *plot.markers(figures.PLACES)]
    page.write_text("before\n" + "\n".join(blocks) + "\nafter\n")
    written = figures.write(tmp_path)
    assert written[0] == page and len(written) == 3
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 * len(figures.DISTRIBUTIONS) and "0.0318" in text
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_has_the_markers():
    text = (ROOT / "docs" / "sorting_network.md").read_text()
    assert "| `cauchy` | 10 | 0.0318 |" in text
    assert "0.0318" not in plot.replace_block(text, "", figures.BLOCK).split("## Loss")[0]
    assert "| `cauchy` | 10 |" in text.split(plot.markers(figures.PLACES)[0])[1]
