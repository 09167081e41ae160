"""The tutorials: every notebook is what its page gives, and runs.

With PYLOSS_QUICK at sizes that say nothing; with --exhaustive at full length too, where each must
end within two minutes of processor time and show what its page says that it shows.
"""

from __future__ import annotations

import json
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE = runpy.run_path(str(ROOT / "docs" / "_tutorials.py"))
TUTORIALS = ROOT / "docs" / "tutorials"
NEEDS = {"label_noise": "sklearn", "ranking": "sklearn"}


def means(runs: list[list[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*runs)]


def language_model(found: dict[str, Any]) -> None:
    losses = [found["trained"][name][1] for name in ("plain_loss", "fused_loss")]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[1][-1] < losses[1][0] - 1.5
    assert all(memory > 4 for _, memory in found["costs"])


def segmentation(found: dict[str, Any]) -> None:
    (dice, _, holes, _), (dice_too, _, fewer, _) = map(means, found["results"].values())
    assert fewer < 0.8 * holes and dice_too > dice - 0.06


def ranking(found: dict[str, Any]) -> None:
    rankers = {name: means(runs)[0] for name, runs in found["rankers"].items()}
    assert min(rankers["list_net"], rankers["lambda_loss"]) > rankers["squared error"] + 0.5
    sorters = {name: means(runs)[0] for name, runs in found["sorters"].items()}
    assert sorters["sorting_cross_entropy"] > sorters["pairs"]


def tensor_attention(found: dict[str, Any]) -> None:
    right = found["results"]
    assert (
        min(right["tensor attention"]) > max(right["plain attention"] + right["plain, wider"]) + 5
    )
    assert all(
        by_hand > 4 * kernel for _, by_hand, kernel in found["costs"].values() if by_hand > 50
    )


def label_noise(found: dict[str, Any]) -> None:
    _, forty, sixty = zip(*(map(statistics.fmean, runs) for runs in found["results"].values()))
    names = list(found["results"])
    for robust in ("GCE, q = 0.7", "MAE", "ALDR, lam0 = 10"):
        assert forty[names.index(robust)] > forty[names.index("cross entropy")] + 15
    assert sixty[names.index("MAE")] == max(sixty)


SHOWS: dict[str, Callable[[dict[str, Any]], None]] = {
    check.__name__: check
    for check in (label_noise, language_model, ranking, segmentation, tensor_attention)
}


def run(name: str) -> tuple[str, dict[str, Any]]:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    book = json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]
    printed, namespace = MAKE["run"](sources, name)
    return "".join(printed), namespace


@pytest.mark.parametrize("name", SHOWS)
def test_notebook_is_that_of_its_page(name: str) -> None:
    page = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    text = (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == MAKE["notebook"](page), "run: python docs/_tutorials.py"
    assert f"]({name}.ipynb)" in page
    assert f"]({name}.md)" in (TUTORIALS / "index.md").read_text(encoding="utf-8")


def test_every_tutorial_is_tested() -> None:
    for ending in ("md", "ipynb"):
        assert {p.stem for p in TUTORIALS.glob(f"*.{ending}")} - {"index"} == set(SHOWS)


@pytest.mark.usefixtures("keep_num_threads")
@pytest.mark.parametrize("name", SHOWS)
def test_quick(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYLOSS_QUICK", "1")
    printed, _ = run(name)
    assert printed and "nan" not in printed.split()
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("keep_num_threads")
@pytest.mark.parametrize("name", SHOWS)
def test_full_length(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYLOSS_QUICK", raising=False)
    begin = time.process_time()  # of the process: other programs may have the cores
    _, namespace = run(name)
    assert time.process_time() - begin < 120
    SHOWS[name](namespace)


def test_printed_text_goes_behind_its_block() -> None:
    page = "a\n\n```python\nprint(1)\n```\n\n```text\nold\n```\n\nb\n\n```python\nx = 2\n```\n\nc\n"
    printed, namespace = MAKE["run"](MAKE["BLOCK"].findall(page), "page")
    assert printed == ["1\n", ""] and namespace["x"] == 2
    assert MAKE["with_printed"](page, printed) == page.replace("old", "1")
