"""The notebooks of docs/tutorials out of its pages.

A page is the source: each ```python block is a code cell, what stands between two of them a
Markdown cell. So a change reads as text, and notebooks have no outputs. What a block printed stands
behind it in the page, in a ```text block.

    python docs/_tutorials.py                 writes the notebooks
    python docs/_tutorials.py --run ranking   runs pages at full length and writes what they print

tests/test_tutorials.py runs the notebooks, and fails where one is not what its page gives.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent / "tutorials"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PRINTED = re.compile(r"\A\n\n```text\n.*?^```$", re.M | re.S)  # at the start of what follows
# 4.4: the last format whose cells have no ids, which would change with every cell put between two.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook(page: str) -> str:
    """The text of the .ipynb file of a page."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(BLOCK.split(page)):  # text, code, text, ..., text
        if source := part.strip("\n").splitlines(keepends=True):
            cell: dict[str, Any] = {"cell_type": "markdown", "metadata": {}, "source": source}
            if number % 2:
                cell = {**cell, "cell_type": "code", "execution_count": None, "outputs": []}
            cells.append(cell)
    book = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def run(sources: Iterable[str], name: str) -> tuple[list[str], dict[str, Any]]:
    """Runs cells in one namespace: what each printed, and the namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, source in enumerate(sources, start=1):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, f"{name}, code cell {number}", "exec"), namespace)
        printed.append(out.getvalue())
    return printed, namespace


def with_printed(page: str, printed: Iterable[str]) -> str:
    """The page with these texts behind its blocks, in the place of those that stand there."""
    text, *rest = BLOCK.split(page)
    for source, between, out in zip(rest[::2], rest[1::2], printed):
        lines = "".join(line.rstrip() + "\n" for line in out.splitlines())
        shown = f"\n\n```text\n{lines}```" if lines else ""
        text += f"```python\n{source}```{shown}{PRINTED.sub('', between)}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = sorted(p.stem for p in TUTORIALS.glob("*.md") if p.stem != "index")
    parser.add_argument("--run", nargs="+", choices=names, default=[], metavar="NAME")
    for name in parser.parse_args().run:
        path = TUTORIALS / f"{name}.md"
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            before = os.getcwd()
            os.chdir(folder)
            printed, _ = run(BLOCK.findall(page), name)
            os.chdir(before)
        path.write_text(with_printed(page, printed), encoding="utf-8")
    for name in names:
        path = TUTORIALS / f"{name}.md"
        path.with_suffix(".ipynb").write_text(
            notebook(path.read_text(encoding="utf-8")), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
