"""Experiment of docs/tensor_attention_lowrank.md: errors beside their bounds, and time over length.

    python -m bench.figures_tensor_attention_lowrank --measure out.json    # 1 thread, 2 minutes
    python -m bench.figures_tensor_attention_lowrank out.json              # prints the tables
    python -m bench.figures_tensor_attention_lowrank out.json --write      # docs/ and docs/img/

Errors are max |out - exact| over max |v1 v2|, float32 against exact attention in float64, the scale
1/d. "random": uniform entries in [-B, B], the worst of a few problems; "adversary": one feature,
keys where p / exp is largest and least, values that tell the two apart.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyloss
from bench import _env, plot
from bench.run import write_json
from pyloss.functional import tensor_attention_error

SCHEMA = 1
BLOCK = "tensor_attention_lowrank_experiment"
FEATURES, TOKENS, SEEDS = 8, 128, 5
KINDS = ("random", "adversary")
DEGREES = (1, 2, 3, 4, 5, 6, 8)
POLYNOMIALS = ("taylor", "chebyshev")
ENTRIES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
SHOWN_ENTRIES, SHOWN_DEGREES = (0.5, 1.0, 1.5), (1, 2, 3, 4)
WIDTH = 16  # features of the timed problems
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
MOST_EXACT = 2048
TIMED = {
    "exact": dict(method="exact"),
    "degree 2": dict(method="lowrank", degree=2),
    "degree 3": dict(method="lowrank", degree=3),
    "degree 2, causal": dict(method="lowrank", degree=2, is_causal=True),
}
_COLOURS = ("#1b6ca8", "#e08e45", "#7a9e4b", "#9467bd")

Record = dict[str, Any]


# --- errors ---------------------------------------------------------------------------------------


def _error(tensors: list[Tensor], scale: float, poly: str, degree: int) -> tuple[float, float]:
    """(measured, bound) in units of the largest |v1 v2|; NaN where the sums of weights vanish."""
    options = dict(scale=scale, degree=degree, poly=poly)
    stated = tensor_attention_error(*tensors[:3], **options, samples=1, tol=10.0)
    exact = pyloss.tensor_attention(*(t.double() for t in tensors), scale=scale)
    unit = tensors[3].abs().amax(2) * tensors[4].abs().amax(2)
    try:
        near = pyloss.tensor_attention(*tensors, method="lowrank", check="none", **options)
    except RuntimeError:
        return math.nan, stated["bound"]
    return ((near.double() - exact).abs().max() / unit.max()).item(), stated["bound"]


def random_error(entry: float, poly: str, degree: int) -> Record:
    """The worst of some problems; the bound is that of the worst."""
    worst = (-1.0, 0.0)
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        draw = 2 * torch.rand(5, 1, 1, TOKENS, FEATURES, generator=generator) - 1
        tensors = [*(entry * draw[:3]), *draw[3:]]
        found = _error(tensors, 1.0 / FEATURES, poly, degree)
        worst = max(worst, found, key=lambda f: math.inf if math.isnan(f[0]) else f[0])
    return _record("random", entry, poly, degree, *worst)


def adversarial_error(entry: float, poly: str, degree: int) -> Record:
    """One feature: a key of x and another of 1 have score x for a query of 1."""
    from pyloss.functional import _polynomials as polynomials

    radius = entry**3
    if poly == "taylor":
        polynomial = polynomials.taylor(degree)
    else:
        polynomial = polynomials.chebyshev(degree, radius)
    x = torch.linspace(-radius, radius, 4001, dtype=torch.float64)
    f = sum(c * x**t for t, c in enumerate(polynomial.coefficients)) / x.exp()
    low, high = x[f.argmin()].item(), x[f.argmax()].item()
    delta = ((f.max() - f.min()) / (f.max() + f.min())).item()
    many, best = 400, (-1.0, 0.0)
    share = 0.5
    if 0.0 < delta < 1.0:
        share = 0.5 * (1.0 - (1.0 - math.sqrt(1.0 - delta**2)) / delta)
    ratio = share / (1.0 - share) * math.exp(low - high)
    count = round(many * ratio / (1.0 + ratio))
    for n in {min(max(count + step, 1), many - 1) for step in (-1, 0, 1)}:
        keys = torch.tensor([high] * n + [low] * (many - n)).view(1, 1, many, 1)
        edge = high if abs(high) >= abs(low) else low
        keys[0, 0, 0 if edge == high else -1, 0] = math.copysign(radius, edge)  # the stated range
        values = torch.tensor([1.0] * n + [-1.0] * (many - n)).view(1, 1, many, 1)
        one = torch.ones(1, 1, 1, 1)
        found = _error([one, keys, one, values, one], 1.0, poly, degree)
        best = max(best, found, key=lambda f: math.inf if math.isnan(f[0]) else f[0])
    return _record("adversary", entry, poly, degree, *best)


def _record(kind: str, entry: float, poly: str, degree: int, measured: float, bound: float):
    return {
        "kind": kind,
        "entry_bound": entry,
        "poly": poly,
        "degree": degree,
        "measured": measured if math.isfinite(measured) else None,  # JSON has no NaN
        "bound": bound if math.isfinite(bound) else None,
    }


def measure_errors() -> list[Record]:
    found = []
    for entry in ENTRIES:
        for poly in POLYNOMIALS:
            for degree in DEGREES:
                found.append(random_error(entry, poly, degree))
                found.append(adversarial_error(entry, poly, degree))
    return found


# --- times ----------------------------------------------------------------------------------------


def measure_times(rounds: int = 5) -> list[Record]:
    """Medians; forward, one head."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for n in LENGTHS:
        tensors = list(torch.rand(5, 1, 1, n, WIDTH, generator=generator) - 0.5)
        for name, options in TIMED.items():
            if name == "exact" and n > MOST_EXACT:
                continue
            samples = []
            for step in range(rounds + 1):
                start = time.perf_counter()
                pyloss.tensor_attention(*tensors, scale="kronecker", **options)
                if step:
                    samples.append(1e3 * (time.perf_counter() - start))
            found.append({"what": name, "n": n, "d": WIDTH, "ms": statistics.median(samples)})
    return found


def measure() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": _env.describe(),
            "errors": measure_errors(),
            "times": measure_times(),
        }
    finally:
        torch.set_num_threads(threads)


# --- tables and figures ---------------------------------------------------------------------------


def _of(document: dict[str, Any], **wanted: Any) -> list[Record]:
    return [r for r in document["errors"] if all(r[k] == v for k, v in wanted.items())]


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.1e}"


def tables(document: dict[str, Any]) -> str:
    environment = document["environment"]
    head = ["problem", "entries up to B", "poly"] + [f"degree {g}" for g in SHOWN_DEGREES]
    rows = []
    for kind in KINDS:
        for entry in SHOWN_ENTRIES:
            for poly in POLYNOMIALS:
                row = [kind, f"{entry:g}", poly]
                for degree in SHOWN_DEGREES:
                    chosen = dict(kind=kind, entry_bound=entry, poly=poly, degree=degree)
                    (found,) = _of(document, **chosen)
                    row.append(f"{_text(found['measured'])} / {_text(found['bound'])}")
                rows.append(row)
    errors = plot.markdown_table(head, rows)
    head = ["n", *(f"{name} (ms)" for name in TIMED)]
    rows = []
    for n in sorted({r["n"] for r in document["times"]}):
        by_name = {r["what"]: r["ms"] for r in document["times"] if r["n"] == n}
        rows.append([str(n), *(f"{by_name[k]:.3g}" if k in by_name else "" for k in TIMED)])
    return (
        f"Measured {document['created'][:10]} at revision `{environment['revision']}`, "
        f"{environment['cpu']['model']}, one thread.\n\n"
        f"Error / stated bound, in units of the largest |v1 v2|: random entries (d = {FEATURES}, "
        f"n = {TOKENS}) and an adversary (d = 1):\n\n{errors}\n\n"
        f"Forward, one head, d = {WIDTH}:\n\n{plot.markdown_table(head, rows)}"
    )


def _line(axis: Any, records: list[Record], x: str, y: str, **style: Any) -> None:
    kept = [r for r in records if r[y] is not None]
    axis.plot([r[x] for r in kept], [r[y] for r in kept], **style)


def errors_figure(document: dict[str, Any], folder: Path) -> Path:
    """Over the degree and over the entry bound; above random problems, below the adversary's."""
    pyplot = plot._pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(9.0, 6.4), layout="constrained", sharex="col")
    families = (
        ("degree", "entry_bound", SHOWN_ENTRIES, "B = {:g}"),
        ("entry_bound", "degree", SHOWN_DEGREES, "degree {:g}"),
    )
    for row, kind in zip(axes, KINDS):
        for axis, (x, fixed, choices, label) in zip(row, families):
            for colour, choice in zip(_COLOURS, choices):
                records = _of(document, **{fixed: choice, "poly": "taylor", "kind": kind})
                _line(axis, records, x, "measured", color=colour, marker="o", markersize=3,
                      linewidth=1.2, label=label.format(choice))  # fmt: skip
                _line(axis, records, x, "bound", color=colour, linestyle="--", linewidth=1.2)
            axis.axhline(1e-2, color="#b0b0b0", linewidth=0.8)
            axis.set(yscale="log", ylim=(1e-9, 5.0), title=f"{kind}, Taylor (dashed: bound)")
            axis.legend(fontsize=7)
        row[0].set_ylabel("error / max |v1 v2|")
        row[1].axvline(math.log(TOKENS) ** (1 / 3), color="#b0b0b0", linewidth=0.8, linestyle=":")
    axes[1][0].set_xlabel("degree")
    axes[1][1].set_xlabel(f"entries up to B, scale 1/d (dotted: (ln {TOKENS})^(1/3))")
    return plot._save(figure, folder / "tensor_attention_lowrank_error.png")


def times_figure(document: dict[str, Any], folder: Path) -> Path:
    pyplot = plot._pyplot()
    figure, axis = pyplot.subplots(figsize=(5.6, 3.6), layout="constrained")
    for colour, name in zip(_COLOURS, TIMED):
        records = [r for r in document["times"] if r["what"] == name]
        axis.plot([r["n"] for r in records], [r["ms"] for r in records], color=colour, marker="o",
                  markersize=3, label=name)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="n", ylabel="ms",
             title=f"forward, one head, d = {WIDTH}, one thread")  # fmt: skip
    axis.legend(fontsize=8)
    return plot._save(figure, folder / "tensor_attention_lowrank_time.png")


def write(document: dict[str, Any], root: Path) -> list[Path]:
    page = root / "docs" / "tensor_attention_lowrank.md"
    page.write_text(plot.replace_block(page.read_text(), tables(document), BLOCK))
    folder = root / "docs" / "img"
    return [page, errors_figure(document, folder), times_figure(document, folder)]


def load(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA or "errors" not in document:
        raise ValueError(f"{path} was not written by this script, or by another version of it")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="result file")
    parser.add_argument("--measure", action="store_true", help="measure and write the result file")
    parser.add_argument("--write", action="store_true", help="update docs/ and docs/img/")
    parser.add_argument("--root", type=Path, default=plot.ROOT, help="tree to write to")
    args = parser.parse_args()
    if args.measure:
        write_json(measure(), args.results)
    if args.write:
        for path in write(load(args.results), args.root):
            print("wrote", path)
    else:
        print(tables(load(args.results)))


if __name__ == "__main__":
    main()
