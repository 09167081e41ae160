"""Last step of gpu_check.sh: one table and summary.json out of what the steps left behind.

Needs the standard library only, so that it also works where the build failed.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def read_steps(path: Path) -> list[dict[str, Any]]:
    steps = []
    for line in path.read_text().splitlines():
        name, status, seconds, remark = line.split("\t", 3)
        steps.append({"step": name, "status": status, "seconds": int(seconds), "remark": remark})
    return steps


def read_junit(path: Path) -> dict[str, Any] | None:
    """Counts and the names of what failed; None where that run did not take place."""
    if not path.exists():
        return None
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except ElementTree.ParseError as error:  # pytest was killed while writing
        return {"unreadable": str(error)}
    counts = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "skipped")}
    failed = []
    for case in (c for s in suites for c in s.iter("testcase")):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
    return {**counts, "failed": failed}


def bench_lines(path: Path, title: str) -> list[str]:
    """One line per shape with all providers.

    In multiples of the bare matrix products where there are some, else in % of the copy bandwidth.
    """
    if not path.exists():
        return [f"{title}: no result"]
    document = json.loads(path.read_text())
    copies = ", ".join(f"{b['copy_gbs']:.0f}" for b in document["bandwidth"])
    results = document["results"]
    if any("x_products" in r for r in results):
        keys, unit = ("x_products", "ratio_to_pyloss"), "times the bare matrix products or pyloss"
    else:
        keys, unit = ("pct_copy",), "% of it"
    lines = [f"{title}: copy bandwidth {copies} GB/s; below, {unit}"]
    cases: dict[str, dict[str, str]] = {}
    for record in results:
        key = next((key for key in keys if key in record), None)
        if key is None or record["threads"] != document["options"]["threads"][0]:
            continue
        text = f"{record[key]:.1f}" if key == "pct_copy" else f"{record[key]:.2f}"
        if "extra_mb" in record:
            text += f" (+{record['extra_mb']:.0f} MB)"
        cases.setdefault(record["case"], {})[record["provider"]] = text
    for case, values in cases.items():
        shown = ", ".join(f"{name} {text}" for name, text in values.items())
        lines.append(f"{case:<34} {shown}")
    for record in results:
        if record["status"] in ("failed", "wrong"):
            where = f"{record['case']}, {record['provider']}"
            lines.append(f"{where}: {record['status']}, {record['reason']}")
    return lines


def main(steps_file: str, out: str) -> int:
    folder, work = Path(out), Path(steps_file).parent
    steps = read_steps(Path(steps_file))
    tests = {}
    for name in ("tests_gpu", "tests_cpu"):
        tests[name] = read_junit(folder / f"{name}.xml")
        tests[f"{name}_again"] = read_junit(work / f"{name}_again.xml")
    failed = [s["step"] for s in steps if s["status"] == "failed"]
    summary = {"ok": not failed, "failed": failed, "steps": steps, "tests": tests}
    others = sorted(work.glob("bench_*.json"))
    for path in others:  # in here, because OUT is limited to eight files
        summary[path.stem] = json.loads(path.read_text())
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    print("\n".join(bench_lines(folder / "bench.json", "bench")))
    for path in others:
        print("\n".join(bench_lines(path, path.stem)))
    for name, result in tests.items():
        if result:
            print(f"{name}: {json.dumps({k: v for k, v in result.items() if k != 'failed'})}")
            for test in result.get("failed", [])[:20]:
                print(f"  failed: {test}")
    print(f"{'step':<24} {'status':<8} {'seconds':>7}  remark")
    for s in steps:
        print(f"{s['step']:<24} {s['status']:<8} {s['seconds']:>7}  {s['remark']}")
    print("result:", "FAILED: " + ", ".join(failed) if failed else "ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
