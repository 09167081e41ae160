"""summary.json and a table out of what the stages of gpu_check.sh have left behind until now.

    python bench/_gpu_summary.py STEPS OUT [--quiet]

Written again after every stage, and complete each time: a stage that was not reached is in it, and
so is the prediction of a time that was not measured. Needs the standard library only, so that it
also works where the build failed.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

LOOK = 1.5  # what takes this many times its prediction is where to look first
SCRIPT = Path(__file__).with_name("gpu_check.sh")


def stages() -> list[str]:
    """The stages in their order, as the script runs them."""
    calls = re.findall(r"^(?: *if ! )?(?:stage|tests|sanitize) (\w+) \d", SCRIPT.read_text(), re.M)
    return list(dict.fromkeys(calls))


def read_steps(path: Path) -> list[dict[str, Any]]:
    """What has been noted, then the stages that have not been reached."""
    steps = []
    for line in path.read_text().splitlines():
        name, status, seconds, remark = line.split("\t", 3)
        steps.append({"stage": name, "status": status, "seconds": int(seconds), "remark": remark})
    noted = {s["stage"] for s in steps}
    steps += [
        {"stage": name, "status": "not reached", "seconds": 0, "remark": ""}
        for name in stages()
        if name not in noted
    ]
    return steps


def read_junit(path: Path) -> dict[str, Any]:
    """Counts and the names of what failed."""
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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # not written, or killed while writing
        return None


def read_times(folder: Path) -> list[dict[str, Any]]:
    """Measured beside predicted; predictions alone for what was not measured."""
    sys.path.insert(0, str(SCRIPT.parent.parent))
    from bench import _predictions

    measured = read_json(folder / "times.json") or []
    return measured or _predictions.planned()


def summary(steps: Path, folder: Path) -> dict[str, Any]:
    rows = read_steps(steps)
    failed = [s["stage"] for s in rows if s["status"] == "failed"]
    return {
        "ok": not failed,
        "complete": all(s["status"] != "not reached" for s in rows),
        "failed": failed,
        "stages": rows,
        "first": read_json(folder / "first.json"),
        "tests": {p.stem: read_junit(p) for p in sorted(folder.glob("*.xml"))},
        "times": read_times(folder),
        "bench": read_json(folder / "bench.json"),
    }


def time_line(record: dict[str, Any]) -> str:
    """Of a case, or of a kernel in one."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    ratio = record.get("ratio")
    text = f"{record.get('kernel') or record['case']:<52} {shown(record['predicted_ms']):>10} "
    text += f"{shown(record['measured_ms']):>10} {'-' if ratio is None else f'{ratio:.2f}':>6}"
    return text + ("  look here first" if ratio is not None and ratio > LOOK else "")


def print_table(found: dict[str, Any]) -> None:
    kernels = [k for record in found["times"] for k in record.get("kernels", [])]
    for what, records in (("case", found["times"]), ("kernel", kernels)):
        print(f"{what:<52} {'predicted':>10} {'measured':>10} {'ratio':>6}  (ms)")
        for record in records:
            print(time_line(record))
    for name, result in found["tests"].items():
        print(f"{name}: {json.dumps({k: v for k, v in result.items() if k != 'failed'})}")
        for test in result.get("failed", [])[:20]:
            print(f"  failed: {test}")
    print(f"{'stage':<16} {'status':<12} {'seconds':>7}  remark")
    for s in found["stages"]:
        print(f"{s['stage']:<16} {s['status']:<12} {s['seconds']:>7}  {s['remark']}")
    print("result:", "FAILED: " + ", ".join(found["failed"]) if found["failed"] else "ok")


def main(steps: str, out: str, quiet: str = "") -> int:
    folder = Path(out)
    found = summary(Path(steps), folder)
    partial = folder / "summary.json.part"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(folder / "summary.json")
    if not quiet:
        print_table(found)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
