"""A progress bar of the standard library alone."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24
_PLAIN_LINES = 4  # lines per bar where the output is not a terminal


class Progress:
    """One line that is redrawn on a terminal; a few lines in a log file."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label, self.total = label, total
        self.stream = sys.stdout if stream is None else stream
        self.redraw = self.stream.isatty()
        self.start = time.perf_counter()
        self.shown = 0.0

    def update(self, done: int, note: str = "") -> None:
        now = time.perf_counter()
        seconds = now - self.start
        if self.redraw:
            # Ten times a second: drawing must not cost the training any time.
            if done < self.total and now - self.shown < 0.1:
                return
            self.shown = now
            bar = ("#" * (_WIDTH * done // self.total)).ljust(_WIDTH, ".")
            end = "\n" if done == self.total else ""
            text = f"\r{self.label} [{bar}] {done}/{self.total} {seconds:.0f} s  {note}\x1b[K{end}"
            print(text, end="", file=self.stream, flush=True)
        elif _PLAIN_LINES * done // self.total > _PLAIN_LINES * (done - 1) // self.total:
            text = f"{self.label} {done}/{self.total} {seconds:.0f} s  {note}"
            print(text, file=self.stream, flush=True)
