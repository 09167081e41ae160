"""Targets as data: what was asked of an op, found again in the records of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One line of the numbers table of an op; give exactly one of at_least and at_most."""

    what: str
    metric: str  # key of a record
    case: str  # regular expression for the whole name of the case
    at_least: float | None = None
    at_most: float | None = None
    provider: str = "pyloss"  # regular expression for the whole name
    device: str = "cpu"
    unit: str = "x"

    def asked(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:g}{self._suffix()}"
        return f"at most {self.at_most:g}{self._suffix()}"

    def show(self, value: float) -> str:
        number = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return number + self._suffix()

    def met(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most

    def worst(self, values: Iterable[float]) -> float:
        return min(values) if self.at_least is not None else max(values)

    def _suffix(self) -> str:
        return self.unit if self.unit in ("x", "") else f" {self.unit}"


@dataclass(frozen=True)
class Outcome:
    target: Target
    threads: int
    value: float
    where: str  # the case and the provider with the worst value


def evaluate(targets: Iterable[Target], results: list[dict[str, Any]]) -> list[Outcome]:
    """The worst value of each target, per thread count; a target without a record is left out."""
    outcomes = []
    for target in targets:
        found: dict[int, list[tuple[float, str]]] = {}
        for record in results:
            value = record.get(target.metric)
            if (
                value is not None
                and record["device"] == target.device
                and re.fullmatch(target.case, record["case"])
                and re.fullmatch(target.provider, record["provider"])
            ):
                where = f"{record['case']}, {record['provider']}"
                found.setdefault(record["threads"], []).append((value, where))
        for threads in sorted(found, reverse=True):
            worst = target.worst(value for value, _ in found[threads])
            where = next(where for value, where in found[threads] if value == worst)
            outcomes.append(Outcome(target, threads, worst, where))
    return outcomes
