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
    """One line per shape with all providers, in % of the copy bandwidth."""
    if not path.exists():
        return [f"{title}: no result"]
    document = json.loads(path.read_text())
    copies = ", ".join(f"{b['copy_gbs']:.0f}" for b in document["bandwidth"])
    lines = [f"{title}: copy bandwidth {copies} GB/s; below, % of it"]
    cases: dict[str, dict[str, float]] = {}
    for record in document["results"]:
        if "pct_copy" in record and record["threads"] == document["options"]["threads"][0]:
            cases.setdefault(record["case"], {})[record["provider"]] = record["pct_copy"]
    for case, values in cases.items():
        shown = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        lines.append(f"{case:<34} {shown}")
    for record in document["results"]:
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
    cluster = work / "bench_cluster.json"
    if cluster.exists():  # in here, because OUT is limited to eight files
        summary["bench_cluster"] = json.loads(cluster.read_text())
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    print("\n".join(bench_lines(folder / "bench.json", "bench")))
    if cluster.exists():
        print("\n".join(bench_lines(cluster, "bench with clusters")))
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
