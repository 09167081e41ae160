"""Runs the benchmark of one op and writes a JSON file.

    python -m bench.run --op row_softmax --json out.json
    python -m bench.run --op linear_cross_entropy --budget 330 --json out.json
    python -m bench.run --op row_softmax --quick --case 'fwd 4096' --threads 1
    python -m bench.run --op row_softmax --json new.json --compare old.json [--shared]

Runs in a checkout with an editable install (`make build`): no wheel holds `bench/`, and in a
checkout without a build `./pyloss` stands before an installed one.

Exit status: 0 fine, 1 a pyloss provider failed or was wrong, 2 slower than the file compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import _core, _env, _targets

OPS = {
    "row_softmax": "bench.bench_row_softmax",
    "aldr": "bench.bench_aldr",
    "call_overhead": "bench.bench_call_overhead",
    "adversarial": "bench.bench_adversarial",
    "betti_matching": "bench.bench_betti_matching",
    "betti_matching_3d": "bench.bench_betti_matching_3d",
    "embedding_metrics": "bench.bench_embedding_metrics",
    "frame_pca": "bench.bench_frame_pca",
    "gemm": "bench.bench_gemm",
    "grad_norm_recorder": "bench.bench_grad_norm_recorder",
    "linear_cross_entropy": "bench.bench_linear_cross_entropy",
    "linear_distillation": "bench.bench_linear_distillation",
    "lcm": "bench.bench_lcm",
    "lion_k": "bench.bench_lion_k",
    "row_stats": "bench.bench_row_stats",
    "margin_shift": "bench.bench_margin_shift",
    "permutahedron": "bench.bench_permutahedron",
    "row_moments": "bench.bench_row_moments",
    "segment": "bench.bench_segment",
    "segmentation": "bench.bench_segmentation",
    "similarity_softmax": "bench.bench_similarity_softmax",
    "similarity_topk": "bench.bench_similarity_topk",
    "sorting_network": "bench.bench_sorting_network",
    "spherical": "bench.bench_spherical",
    "tensor_attention": "bench.bench_tensor_attention",
    "tensor_attention_lowrank": "bench.bench_tensor_attention_lowrank",
}

MAX_SLOWDOWN = 0.10
# Page-table rounding and allocator slack: below this a growth of memory is not a finding.
MEMORY_SLACK_BYTES = 8 << 20


def load_op(name: str) -> ModuleType:
    return importlib.import_module(OPS[name])


def run_op(
    op: str,
    ctx: _core.Context,
    threads: list[int],
    *,
    pattern: str = "",
    budget: float = float("inf"),
    output: Path | None = None,
    echo: bool = True,
) -> dict[str, Any]:
    """Runs all cases whose name matches; the file is rewritten after each, so a kill loses one."""
    module = load_op(op)
    deadline = time.monotonic() + budget
    started_with = torch.get_num_threads()
    document: dict[str, Any] = {
        "schema": _core.SCHEMA_VERSION,
        "op": op,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": {**dataclasses.asdict(ctx), "case": pattern, "threads": threads},
        "environment": _env.describe(),
        "bandwidth": [],
        "results": [],
    }
    try:
        copy_gbs = {}
        for count in threads:
            torch.set_num_threads(count)
            measured = _core.measure_bandwidth(ctx, count)
            document["bandwidth"].append(measured)
            copy_gbs[count] = measured["copy_gbs"]
            if echo:
                print(f"copy bandwidth, threads {count}: {copy_gbs[count]:.1f} GB/s", flush=True)
        for case in module.cases(ctx):
            if not re.search(pattern, case.name):
                continue
            if time.monotonic() > deadline:
                records = [{**_head(case, ctx, 0), "status": "skipped", "reason": "time budget"}]
            elif isinstance(case, _core.Probe):
                torch.set_num_threads(max(threads))
                records = _run_probe(case, ctx)
            else:
                records = _run_case(case, ctx, threads, copy_gbs)
            document["results"] += records
            if echo:
                _print_records(records)
            if output:
                write_json(document, output)
        # How far this is from the first figure tells how quiet the machine was.
        for measured in document["bandwidth"]:
            torch.set_num_threads(measured["threads"])
            again = _core.measure_bandwidth(ctx, measured["threads"])
            measured["copy_gbs_at_end"] = again["copy_gbs"]
    finally:
        torch.set_num_threads(started_with)
    document["environment"]["load_average_at_end"] = list(os.getloadavg())
    if output:
        write_json(document, output)
    return document


def _head(case: _core.Case | _core.Probe, ctx: _core.Context, threads: int) -> dict[str, Any]:
    return {
        "case": case.name,
        "group": case.group,
        "device": ctx.device,
        "threads": threads,
        "provider": "-",
    }


def _run_case(
    case: _core.Case, ctx: _core.Context, threads: list[int], copy_gbs: dict[int, float]
) -> list[dict[str, Any]]:
    records = []
    providers = [p for p in case.open() if re.search(ctx.providers, p.name)]
    for count in threads:
        largest = count == max(threads)
        if case.once and not largest:
            continue
        torch.set_num_threads(count)
        records += _core.run_case(case, providers, ctx, count, copy_gbs[count], largest)
    del providers
    if ctx.device == "cuda":
        torch.cuda.empty_cache()
    return records


def _run_probe(probe: _core.Probe, ctx: _core.Context) -> list[dict[str, Any]]:
    head = _head(probe, ctx, torch.get_num_threads())
    try:
        return [{**head, "status": "ok", **record} for record in probe.measure()]
    except Exception as error:  # the rest of the run is still worth having
        reason = f"{type(error).__name__}: {error}"[:300]
        return [{**head, "provider": "pyloss", "status": "failed", "reason": reason}]


def write_json(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def _print_records(records: list[dict[str, Any]]) -> None:
    for r in records:
        head = f"{r['case']:<42} {r['threads']:>2} thr  {r['provider']:<22}"
        if "median_ms" in r:
            text = f"{r['median_ms']:>10.4f} ms"
            for key, form in (
                ("pct_copy", "{:6.1f} % of copy"),
                ("x_products", "{:5.2f}x products"),
                ("speedup", "{:6.2f}x torch"),
            ):
                text += "  " + form.format(r[key]) if key in r else ""
            if "extra_mb" in r:
                text += f"  +{r['extra_mb']:.1f} MB"
            elif r.get("peak_bytes") is not None:
                text += f"  +{r['peak_tensors']:.2f} tensors"
            text += f"  n={r['rounds']}"
        elif "value" in r:
            text = f"{r['value']:>10.4f} {r['unit']}  {r['what']}"
        else:
            text = f"{r['status']}: {r.get('reason', '')}"
        print(head, text, flush=True)


def failures(document: dict[str, Any]) -> list[str]:
    """The records that make a run fail: this project's, not a peer's."""
    return [
        f"{r['case']} / {r['provider']} / {r['threads']} threads: {r['status']}, {r['reason']}"
        for r in document["results"]
        if r["status"] in ("failed", "wrong") and _core.is_own(r["provider"])
    ]


def compare(old: dict[str, Any], new: dict[str, Any], shared: bool = False) -> list[str]:
    """What got worse in ``new`` by more than 10 %, one sentence each.

    On a machine shared with others times say little: there only the peak memory counts, and the
    call overhead as a ratio to PyTorch's own in the same run (best of all rounds). The same holds
    between two different machines.
    """
    timed = not shared and _env.same_hardware(old["environment"], new["environment"])

    def key(r: dict[str, Any]) -> tuple:
        return r["case"], str(r.get("shape")), r["device"], r["threads"], r["provider"]

    def overhead(document: dict[str, Any], r: dict[str, Any]) -> float | None:
        """Best time over the best time of PyTorch."""
        for other in document["results"]:
            if key(other) == (*key(r)[:-1], "torch") and "min_ms" in other:
                return r["min_ms"] / other["min_ms"]
        return None

    before = {key(r): r for r in old["results"]}
    worse = []
    for r in new["results"]:
        o = before.get(key(r))
        if o is None or not _core.is_own(r["provider"]):
            continue
        name = f"{r['case']} / {r['provider']} / {r['threads']} threads"
        if r.get("peak_bytes") is not None and o.get("peak_bytes") is not None:
            limit = o["peak_bytes"] * (1 + MAX_SLOWDOWN) + MEMORY_SLACK_BYTES
            if r["peak_bytes"] > limit:
                worse.append(
                    f"{name}: peak memory {o['peak_bytes'] / 2**20:.0f} MiB before, "
                    f"{r['peak_bytes'] / 2**20:.0f} MiB now"
                )
        if "median_ms" not in r or "median_ms" not in o:
            continue
        if timed:
            a, b, unit = o["median_ms"], r["median_ms"], "ms"
        elif r["group"] == "overhead":
            a, b, unit = overhead(old, o), overhead(new, r), "x torch"
        else:
            continue
        if a is not None and b is not None and b > a * (1 + MAX_SLOWDOWN):
            worse.append(f"{name}: {a:.4g} {unit} before, {b:.4g} {unit} now")
    return worse


def main(argv: list[str] | None = None) -> int:
    cores = _env.usable_cores()
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=sorted(OPS), default="row_softmax")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument(
        "--threads",
        default="",
        help="CPU thread counts, such as 1,2 (default: 2 and 1, as far as there are cores)",
    )
    parser.add_argument("--case", default="", metavar="REGEX", help="only cases that match")
    parser.add_argument("--providers", default="", metavar="REGEX", help="only these providers")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; later cases are skipped"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="JSON of an earlier run")
    parser.add_argument(
        "--shared", action="store_true", help="shared machine: compare overhead and memory only"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    if args.device == "cuda":
        threads = [torch.get_num_threads()]
    elif args.threads:
        threads = [int(t) for t in args.threads.split(",")]
    else:
        threads = sorted({min(2, cores), 1}, reverse=True)
    ctx = _core.Context(
        device=args.device,
        quick=args.quick,
        compile=not (args.no_compile or args.quick),
        rounds=max(2, args.rounds or (3 if args.quick else 20)),
        seconds=1.0 if args.quick else 20.0,
        providers=args.providers,
    )
    document = run_op(
        args.op, ctx, threads, pattern=args.case, budget=args.budget, output=args.json
    )
    if not args.quick:  # the figures of tiny shapes mean nothing
        _print_targets(args.op, document)
    status = 0
    for failure in failures(document):
        print("FAILED", failure)
        status = 1
    if args.compare:
        old = json.loads(args.compare.read_text())
        if not args.shared and not _env.same_hardware(old["environment"], document["environment"]):
            print("the hardware differs: only memory and relative call overhead are compared")
        worse = compare(old, document, args.shared)
        for line in worse:
            print("WORSE", line)
        if worse and status == 0:
            status = 2
    return status


def _print_targets(op: str, document: dict[str, Any]) -> None:
    outcomes = _targets.evaluate(load_op(op).TARGETS, document["results"])
    if not outcomes:
        return
    print("\nasked and measured")
    for o in outcomes:
        verdict = "met" if o.target.met(o.value) else "NOT MET"
        print(
            f"{o.target.what:<80} {o.threads:>2} thr  {o.target.asked():<16}"
            f"{o.target.show(o.value):>10}  {verdict}"
        )


if __name__ == "__main__":
    sys.exit(main())
