"""Turns result files into the tables and figures of the README and the documentation.

    python -m bench.plot bench/results/<op>_*.json             # prints the tables
    python -m bench.plot bench/results/<op>_*.json --write     # updates README.md, docs/, docs/img/

The text between ``<!-- bench:begin <op> -->`` and ``<!-- bench:end <op> -->`` is replaced: the
README gets the targets and the main figures, ``docs/<op>.md`` gets every measured line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import _core, _targets
from bench.run import load_op

ROOT = Path(__file__).resolve().parent.parent
_COLOURS = {
    "pyloss": "#1b6ca8",
    "torch": "#b0b0b0",
    "torch.compile": "#e08e45",
    "liger": "#7a9e4b",
    "quack": "#9467bd",
    "pyloss accumulate fp32": "#7fb2d9",
    "pyloss filter": "#0b3c5d",
    "torch chunked": "#d9c27f",
    "cce": "#c05299",
    "cce_exact": "#e3a6cd",
    "torch blocked": "#8f8f8f",
    "torch windows": "#d9c27f",
    "torch tiled": "#c9a66b",
    "flash over pairs": "#7a9e4b",
    "flex over pairs": "#9467bd",
    "Betti-Matching-3D": "#e08e45",
    "topolosses": "#b0b0b0",
    "gudhi": "#d9c27f",
    "cripser": "#7a9e4b",
    "torchsort": "#9467bd",
    "diffsort": "#e08e45",
    "difftopk": "#c05299",
    "pyloss permutahedron": "#7fb2d9",
    "pyloss unfused": "#0b3c5d",
}

Document = dict[str, Any]
Record = dict[str, Any]


def load(paths: Iterable[Path]) -> list[Document]:
    """Reads result files; refuses those of another schema."""
    documents = []
    for path in paths:
        document = json.loads(path.read_text())
        if document.get("schema") != _core.SCHEMA_VERSION:
            raise ValueError(f"{path}: schema {document.get('schema')}, not {_core.SCHEMA_VERSION}")
        documents.append(document)
    return documents


# --- markdown -----------------------------------------------------------------------------------


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _device(document: Document) -> str:
    return document["options"]["device"]


def markers(op: str) -> tuple[str, str]:
    """What stands before and after the generated text of an op."""
    return f"<!-- bench:begin {op} -->", f"<!-- bench:end {op} -->"


def title(document: Document, with_op: bool = False) -> str:
    environment = document["environment"]
    op = f"`{document['op']}`, " if with_op else ""
    if _device(document) == "cuda":
        return f"{op}GPU: {environment['gpu']['name']}"
    return f"{op}CPU: {environment['cpu']['model']}"


def machine_text(document: Document) -> str:
    """What the numbers were measured on, in a few sentences."""
    e = document["environment"]
    parts = [f"Measured {document['created'][:10]} at revision `{e['revision']}`"]
    parts.append(f"PyTorch {e['torch']}")
    if e["triton"]:
        parts.append(f"Triton {e['triton']}")
    parts += [f"{name} {version}" for name, version in e["peers"].items()]
    if _device(document) == "cuda":
        gpu = e["gpu"]
        parts.append(f"{gpu['name']}, {gpu['sm_count']} multiprocessors, driver {gpu['driver']}")
        parts.append(f"CUDA {e['torch_cuda']}")
    else:
        cpu = e["cpu"]
        parts.append(f"{cpu['model']}, {cpu['cores_usable']} cores, {cpu['torch_capability']}")
        parts.append(f"huge pages: {e['huge_pages'] or 'unknown'}")
        load = e["load_average_at_start"]
        parts.append(f"load average at the start {load[0]:.2f}" if load else "load unknown")
    text = "; ".join(parts) + ".\nCopy bandwidth (bytes read plus written): "
    copies = []
    for b in document["bandwidth"]:
        where = _threads(b["threads"]) + " " if b["device"] == "cpu" else ""
        fresh = f" ({b['fresh_copy_gbs']:.1f} into new pages)" if "fresh_copy_gbs" in b else ""
        copies.append(f"{where}{b['copy_gbs']:.1f} GB/s{fresh}")
    text += ", ".join(copies) + "."
    if document["options"]["quick"]:
        text += "\n**A quick run on tiny shapes: the figures mean nothing.**"
    return text


def targets_table(document: Document) -> str:
    """Asked against measured; empty where the run holds no target's record."""
    targets = load_op(document["op"]).TARGETS
    outcomes = _targets.evaluate(targets, document["results"])
    if not outcomes:
        return ""
    by_target: dict[_targets.Target, dict[int, _targets.Outcome]] = {}
    for outcome in outcomes:
        by_target.setdefault(outcome.target, {})[outcome.threads] = outcome
    on_cpu = _device(document) == "cpu"
    columns = sorted(document["options"]["threads"], reverse=True) if on_cpu else []
    rows = []
    for target, found in by_target.items():
        met = [target.met(o.value) for o in found.values()]
        verdict = "yes" if all(met) else ("partly" if any(met) else "no")
        if columns:
            cells = [target.show(found[c].value) if c in found else "" for c in columns]
        else:
            cells = [target.show(o.value) for o in found.values()]
        rows.append([target.what, target.asked(), *cells, verdict])
    names = [_threads(c) for c in columns] or ["measured"]
    return markdown_table(["what", "asked", *names, "met"], rows)


_COLUMNS = {
    "GFLOP/s": "gflops",
    "% of copy": "pct_copy",
    "x bare products": "x_products",
    "x torch": "speedup",
    "extra memory (tensors)": "peak_tensors",
    "extra memory (MB)": "extra_mb",
}


def results_table(document: Document) -> str:
    """Every measured line of a run."""
    measured = {key for r in document["results"] for key in r}
    if "extra_mb" in measured:
        measured.discard("peak_tensors")
    columns = {name: key for name, key in _COLUMNS.items() if key in measured}
    if all(r["provider"] != "torch" for r in document["results"]):
        # Another package is what cases are compared with: the one that has a 1 in this column.
        columns = {name.replace("x torch", "x peer"): key for name, key in columns.items()}
    rows = []
    for r in document["results"]:
        if "median_ms" not in r:
            continue
        scale, unit = (1e3, "us") if r["inner"] > 1 else (1.0, "ms")
        spread = f"{_number(scale * r['p20_ms'])}-{_number(scale * r['p80_ms'])}"
        rows.append(
            [
                r["case"],
                str(r["threads"]) if r["device"] == "cpu" else "",
                r["provider"],
                f"{_number(scale * r['median_ms'])} {unit}",
                f"{_number(scale * r['min_ms'])}",
                spread,
                str(r["rounds"]),
                *(_number(r.get(key)) for key in columns.values()),
            ]
        )
    head = ["case", "threads", "provider", "median", "min", "p20-p80", "rounds", *columns]
    table = markdown_table(head, rows)
    probes = [
        [r["case"], r["provider"], r.get("what", ""), f"{r['value']:.3g} {r['unit']}"]
        for r in document["results"]
        if "value" in r
    ]
    if probes:
        table += "\n\n" + markdown_table(["probe", "provider", "what", "value"], probes)
    skipped: dict[str, set[str]] = {}
    for r in document["results"]:
        if r["status"] != "ok":
            skipped.setdefault(f"{r['provider']} ({r['status']}): {r['reason']}", set()).add(
                r["case"]
            )
    if skipped:
        table += "\n\nNot measured:\n"
        for reason, where in skipped.items():
            table += f"\n- {reason} ({len(where)} cases)"
    return table


def replace_block(text: str, block: str, op: str) -> str:
    """The text with what stands between the markers of ``op`` replaced."""
    begin, end = markers(op)
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected exactly one pair of {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text)


# --- figures ------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date or version inside, so that the same numbers give the same file.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return path


def bar_figure(document: Document, path: Path) -> Path | None:
    """Time over the yardstick of each case, at the largest thread count.

    The yardstick is the bare matrix products where a case has them, otherwise the copy.
    """
    threads = max(document["options"]["threads"])
    by_products = any("x_products" in r for r in document["results"])
    key, yardstick = (
        ("x_products", "the bare matrix products")
        if by_products
        else ("x_floor", "floor at the measured copy bandwidth")
    )
    shown = [
        r
        for r in document["results"]
        if key in r
        and r["threads"] == threads
        and r["provider"] in _COLOURS
        and r["group"] not in ("options", "inplace")
    ]
    if not shown:
        return None
    cases = list(dict.fromkeys(r["case"] for r in shown))
    providers = [p for p in _COLOURS if any(r["provider"] == p for r in shown)]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 1.0 + 0.42 * len(cases)), layout="constrained")
    height = 0.8 / len(providers)
    for offset, provider in enumerate(providers):
        values = {r["case"]: r[key] for r in shown if r["provider"] == provider}
        places = [cases.index(case) + (offset + 0.5) * height - 0.4 for case in values]
        axes.barh(places, list(values.values()), height, color=_COLOURS[provider], label=provider)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    where = f", {_threads(threads)}" if _device(document) == "cpu" else ""
    axes.set_xlabel(f"time / {yardstick}{where}")
    axes.legend(fontsize=8)
    _save(figure, path)
    pyplot.close(figure)
    return path


def gpu_figure(document: Document, path: Path) -> Path | None:
    """Share of the copy bandwidth over the number of classes."""
    shown = [
        r
        for r in document["results"]
        if "pct_copy" in r and r["provider"] in _COLOURS and r["group"] == r["mode"]
    ]
    if not shown:
        return None
    modes = [m for m in ("fwd", "bwd", "fwd+bwd") if any(r["mode"] == m for r in shown)]
    dtypes = [d for d in ("bf16", "fp32") if any(r["dtype"] == d for r in shown)]
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(
        len(dtypes),
        len(modes),
        figsize=(3.2 * len(modes), 2.6 * len(dtypes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, dtype in enumerate(dtypes):
        for j, mode in enumerate(modes):
            axes = grid[i][j]
            for provider, colour in _COLOURS.items():
                points = sorted(
                    (r["shape"][1], r["pct_copy"])
                    for r in shown
                    if (r["dtype"], r["mode"], r["provider"]) == (dtype, mode, provider)
                )
                if points:
                    axes.plot(*zip(*points), marker="o", ms=3, color=colour, label=provider)
            axes.set_title(f"{mode}, {dtype}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_ylim(0, max(110.0, 1.05 * max(r["pct_copy"] for r in shown)))
            axes.axhline(90, color="black", linewidth=0.6, linestyle=":")
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("classes", fontsize=9)
    figure.supylabel("% of the copy bandwidth", fontsize=9)
    _save(figure, path)
    pyplot.close(figure)
    return path


def make_figures(documents: list[Document], folder: Path) -> dict[int, Path]:
    """One picture per result file, where it holds something to draw; keyed by position."""
    made = {}
    for position, document in enumerate(documents):
        device = _device(document)
        by_columns = device == "cuda" and any("pct_copy" in r for r in document["results"])
        draw = gpu_figure if by_columns else bar_figure
        path = draw(document, folder / f"{document['op']}_{device}.png")
        if path:
            made[position] = path
    return made


# --- the two blocks -----------------------------------------------------------------------------


def block(documents: list[Document], figures: dict[int, str], full: bool) -> str:
    """The markdown between the markers; ``full`` adds every measured line."""
    parts = []
    for position, document in enumerate(documents):
        parts.append(f"### {title(document, with_op=not full)}")
        parts.append(machine_text(document))
        table = targets_table(document)
        if table:
            parts.append(table)
        if position in figures:
            parts.append(f"![{title(document)}]({figures[position]})")
        if full:
            parts.append(results_table(document))
    return "\n\n".join(parts)


def write(documents: list[Document], root: Path) -> list[Path]:
    """Updates README.md, docs/<op>.md and docs/img; all documents are of one op."""
    (op,) = {d["op"] for d in documents}
    devices = [_device(d) for d in documents]
    if len(set(devices)) != len(devices):
        raise ValueError("give at most one result file per kind of device")
    made = make_figures(documents, root / "docs" / "img")
    changed = list(made.values())
    for path, prefix, full in (
        (root / "README.md", "docs/img/", False),
        (root / "docs" / f"{op}.md", "img/", True),
    ):
        links = {i: prefix + figure.name for i, figure in made.items()}
        path.write_text(replace_block(path.read_text(), block(documents, links, full), op))
        changed.append(path)
    return changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of bench.run")
    parser.add_argument("--write", action="store_true", help="update README.md, docs/ and docs/img")
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to write to")
    args = parser.parse_args(argv)
    documents = load(args.files)
    if args.write:
        for path in write(documents, args.root):
            print("wrote", path)
    else:
        print(block(documents, {}, full=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
