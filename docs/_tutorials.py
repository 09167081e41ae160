"""The notebooks of docs/tutorials out of its pages: `python docs/_tutorials.py` writes them.

A page is the source: each ```python block is a code cell, all between two of them a Markdown cell.
So a change reads as text, and what a run prints stands in the page, as measured, not as outputs.
tests/test_tutorials.py runs the notebooks and fails where one is not what its page gives.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
# 4.4: the last format whose cells have no ids, which would change with every cell put between two.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(page: str) -> list[dict[str, Any]]:
    """re.split with one group: text, code, text, ..., text."""
    found: list[dict[str, Any]] = []
    for number, part in enumerate(BLOCK.split(page)):
        if source := part.strip("\n").splitlines(keepends=True):
            cell: dict[str, Any] = {"cell_type": "markdown", "metadata": {}, "source": source}
            if number % 2:
                cell = {**cell, "cell_type": "code", "execution_count": None, "outputs": []}
            found.append(cell)
    return found


def notebook(page: str) -> str:
    """The text of the .ipynb file of a page."""
    book = {"cells": cells(page), "metadata": METADATA, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def pages() -> list[Path]:
    return sorted(p for p in TUTORIALS.glob("*.md") if p.name != "index.md")


def main() -> None:
    for page in pages():
        text = notebook(page.read_text(encoding="utf-8"))
        page.with_suffix(".ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
