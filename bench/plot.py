"""Turns result files into docs/benchmarks.md and its figures.

    python -m bench.plot out.json      # prints the tables of a run
    python -m bench.plot --write       # writes docs/benchmarks.md and docs/img from bench/results

The page holds the newest committed file of each op and kind of device. The overview, which the
README shows, is drawn from the same files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

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


def title(document: Document) -> str:
    environment = document["environment"]
    if _device(document) == "cuda":
        return f"GPU: {environment['gpu']['name']}"
    return f"CPU: {environment['cpu']['model']}"


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


def _by_columns(document: Document) -> bool:
    return _device(document) == "cuda" and any("pct_copy" in r for r in document["results"])


def _yardstick(document: Document) -> tuple[str, str]:
    """Key of a record and its name: the bare matrix products where there are any, else the copy."""
    if any("x_products" in r for r in document["results"]):
        return "x_products", "the bare matrix products"
    return "x_floor", "floor at the measured copy bandwidth"


def _shown_in_figure(document: Document) -> list[Record]:
    if _by_columns(document):
        return [
            r
            for r in document["results"]
            if "pct_copy" in r and r["provider"] in _COLOURS and r["group"] == r["mode"]
        ]
    threads = max(document["options"]["threads"])
    key, _ = _yardstick(document)
    return [
        r
        for r in document["results"]
        if key in r
        and r["threads"] == threads
        and r["provider"] in _COLOURS
        and r["group"] not in ("options", "inplace")
    ]


def bar_figure(document: Document, path: Path) -> Path | None:
    """Time over the yardstick of each case, at the largest thread count."""
    threads = max(document["options"]["threads"])
    key, yardstick = _yardstick(document)
    shown = _shown_in_figure(document)
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
    shown = _shown_in_figure(document)
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


class Comparison(NamedTuple):
    """One line of the overview: a call of pyloss and what people use without it."""

    op: str
    case: str
    label: str
    peers: dict[str, str]  # provider -> its name in the figure


# The peers that have the case at the largest thread count, all of them.
OVERVIEW = (
    Comparison(
        "row_softmax",
        "fwd+bwd 2048x32000 fp32",
        "fused_cross_entropy, 2048 x 32000",
        {"torch": "F.cross_entropy", "torch.compile": "the same, compiled"},
    ),
    Comparison(
        "linear_cross_entropy",
        "fwd+bwd 2048x32000x256 bf16",
        "fused_linear_cross_entropy, bf16, 2048 x 32000 x 256",
        {
            "torch": "F.linear, F.cross_entropy",
            "torch.compile": "the same, compiled",
            "torch chunked": "F.linear_cross_entropy, by chunks",
        },
    ),
    Comparison(
        "tensor_attention",
        "bwd 256x64 fp32",
        "tensor_attention, backward, 256 x 64",
        {"torch": "einsum", "torch blocked": "PyTorch by blocks"},
    ),
    Comparison(
        "betti_matching",
        "fwd+bwd 1x512x512 natural",
        "betti_matching_loss, 512 x 512",
        {"topolosses": "topolosses", "Betti-Matching-3D": "Betti-Matching-3D, matching alone"},
    ),
    Comparison(
        "sorting_network",
        "fused bitonic 64x128",
        "sorting_cross_entropy, 64 x 128",
        {"diffsort": "diffsort"},
    ),
    Comparison(
        "permutahedron",
        "soft_rank l2 64x128",
        "permutahedron_rank, 64 x 128",
        {"torchsort": "torchsort"},
    ),
)


def overview_rows(documents: list[Document]) -> list[tuple[str, str, float, float | None]]:
    """(label, peer, its time over ours, its memory over ours) of what the CPU files hold."""
    rows = []
    for line in OVERVIEW:
        for document in documents:
            if (document["op"], _device(document)) != (line.op, "cpu"):
                continue
            threads = max(document["options"]["threads"])
            found = {
                r["provider"]: r
                for r in document["results"]
                if r["case"] == line.case and r["threads"] == threads and "median_ms" in r
            }
            ours = found.get("pyloss")
            for provider, name in line.peers.items():
                peer = found.get(provider)
                if ours and peer:
                    memory = peer.get("peak_bytes"), ours.get("peak_bytes")
                    ratio = memory[0] / memory[1] if all(memory) else None
                    rows.append((line.label, name, peer["median_ms"] / ours["median_ms"], ratio))
    return rows


def overview_figure(documents: list[Document], path: Path) -> Path | None:
    """How many times the time and the memory of pyloss other packages take."""
    rows = overview_rows(documents)
    if not rows:
        return None
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.0, 0.7 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    for axes, column, what in ((left, 2, "time"), (right, 3, "peak memory of the call")):
        values = [row[column] for row in rows]
        shown = [value if value is not None else 1.0 for value in values]
        axes.barh(range(len(rows)), [v - 1 for v in shown], 0.6, left=1, color=_COLOURS["pyloss"])
        for place, value in enumerate(values):
            text = "not measured" if value is None else f" {_number(value)}x"
            axes.text(max(value or 1.0, 1.0), place, text, va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(0.7 * min([1.0, *shown]), 6 * max(shown))
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{what} / that of pyloss", fontsize=9)
    left.set_yticks(range(len(rows)), [f"{label}\nagainst {peer}" for label, peer, *_ in rows])
    left.tick_params(axis="y", labelsize=7.5)
    left.invert_yaxis()
    _save(figure, path)
    pyplot.close(figure)
    return path


# --- the page -----------------------------------------------------------------------------------

RESULTS = "bench/results"
PAGE = "docs/benchmarks.md"
_INTRO = f"""# Benchmarks

<!-- Written by `python -m bench.plot --write` from {RESULTS}; do not edit. -->

Every number of this page comes from a file of `{RESULTS}`, the newest of each op and kind of
device. "asked" is the target that was set before the measurement; "met" says whether it was
reached. A case is a call of the op; its median is over the rounds, in which all providers take
turns, after each of them has been checked against the reference on the same tensors. Extra memory
is what the call needs beyond what was there before it.

`python -m bench.run --op <op> --json out.json` measures on your own machine,
`python -m bench.plot out.json` prints the tables."""
_NO_GPU = "No GPU has run any of it yet ([what has run where](gpu.md))."
_OVERVIEW_TEXT = """![Time and memory of other packages over those of pyloss](img/overview.png)

*How many times the time and the memory of pyloss others take, on the CPU, at the largest thread
count of the files below. Peak memory is that of the call, results and gradients included.*"""


def committed(root: Path) -> list[Document]:
    """The newest result file of each op and kind of device, in the order of the overview."""
    newest: dict[tuple[str, str], Document] = {}
    for path in sorted((root / RESULTS).glob("*.json")):
        if "op" not in json.loads(path.read_text()):
            continue  # of a script that draws a figure
        (document,) = load([path])
        key = (document["op"], _device(document))
        if key not in newest or newest[key]["created"] < document["created"]:
            newest[key] = document
    order = [line.op for line in OVERVIEW]
    rank = {op: i for i, op in enumerate(order)}
    return sorted(newest.values(), key=lambda d: (rank.get(d["op"], len(rank)), d["op"]))


def figure_name(document: Document) -> str:
    return f"{document['op']}_{_device(document)}.png"


def has_figure(document: Document) -> bool:
    return bool(_shown_in_figure(document))


def draw(document: Document, folder: Path) -> Path | None:
    """The picture of a result file, where it holds something to draw."""
    by_columns = _by_columns(document)
    return (gpu_figure if by_columns else bar_figure)(document, folder / figure_name(document))


def section(document: Document, figure: str | None = None) -> str:
    """Targets, figure and every measured line of a run."""
    parts = [f"### {title(document)}", machine_text(document)]
    table = targets_table(document)
    if table:
        parts.append(table)
    if figure:
        parts.append(f"![{document['op']}, {title(document)}]({figure})")
    # Readable as it is in a repository viewer, too.
    parts.append('<details markdown="1"><summary>Every measured line</summary>')
    parts += [results_table(document), "</details>"]
    return "\n\n".join(parts)


def page(documents: list[Document], root: Path) -> str:
    """The text of docs/benchmarks.md."""
    parts = [_INTRO]
    if all(_device(document) == "cpu" for document in documents):
        parts.append(_NO_GPU)
    if overview_rows(documents):
        parts.append(_OVERVIEW_TEXT)
    op = None
    for document in documents:
        if document["op"] != op:
            op = document["op"]
            parts.append(f"## {op}")
            if (root / "docs" / f"{op}.md").is_file():
                parts.append(f"[What it is]({op}.md).")
        figure = f"img/{figure_name(document)}" if has_figure(document) else None
        parts.append(section(document, figure))
    return "\n\n".join(parts) + "\n"


def write(root: Path) -> list[Path]:
    """Writes the page and its figures from the result files below `root`."""
    documents = committed(root)
    folder = root / "docs" / "img"
    made = [draw(document, folder) for document in documents]
    made.append(overview_figure(documents, folder / "overview.png"))
    (root / PAGE).write_text(page(documents, root))
    return [*(path for path in made if path), root / PAGE]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON files of bench.run to print")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and docs/img")
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to read and write")
    args = parser.parse_args(argv)
    if bool(args.files) == args.write:
        parser.error("give either files to print or --write")
    if args.write:
        for path in write(args.root):
            print("wrote", path)
    else:
        print("\n\n".join(section(document) for document in load(args.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
