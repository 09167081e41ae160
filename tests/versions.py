"""The whole suite on several versions of torch, with one wheel; writes docs/versions.md.

    python tests/versions.py --wheel FILE ENVIRONMENT... [-- ARGUMENTS OF PYTEST]

An environment is a virtual one with the torch to test and the packages of requirements-dev.txt
(`make test-matrix TORCHES="2.6.0 2.8.0"` makes them in build/torch). The wheel is installed into
each, and the tests run beside the installed files: in a copy of the checkout whose pyloss/ and
kernels/ are links to them. With arguments for pytest, which choose a part of the tests, and with
--no-table nothing is written.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- by tests/versions.py -->\n", "<!-- end -->\n"
HEAD = (
    "| torch | Python | Triton | passed | failed | left out for this torch | left out otherwise |"
    " wheel | date |\n|---|---|---|---|---|---|---|---|---|\n"
)
FACTS = """
import json, platform, sysconfig, torch
try:
    from triton import __version__ as triton
except ImportError:
    triton = "none"
print(json.dumps([torch.__version__.split("+")[0], platform.python_version(), triton,
                  sysconfig.get_paths()["purelib"]]))
"""
# Reasons for which a test is left out that name a version: of helpers.needs_torch, and of
# pytest.importorskip for Triton, which torch brings.
BY_VERSION = re.compile(r"needs torch \d|'triton' has __version__")


@dataclasses.dataclass
class Result:
    """What a run counted; `reasons`: why how many tests were left out."""

    passed: int = 0
    failed: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def by_version(self) -> dict[str, int]:
        return {why: n for why, n in self.reasons.items() if BY_VERSION.search(why)}

    def cells(self) -> list[str]:
        left_out = sum(self.by_version().values())
        counts = self.passed, self.failed, left_out, self.reasons.total() - left_out
        return [str(count) for count in counts]


def read_junit(path: Path) -> Result:
    """The counts of pytest's report; an expected failure counts as passed."""
    result = Result()
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
        elif skipped is None or skipped.get("type") == "pytest.xfail":
            result.passed += 1
        else:
            result.reasons[skipped.get("message", "")] += 1
    return result


def lay_tree(folder: Path, packages: Path) -> None:
    """The checkout's tracked files in `folder`, with the installed pyloss in place of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith(("pyloss/", "kernels/")) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "pyloss").symlink_to(packages / "pyloss")
    (folder / "kernels").symlink_to(packages / "pyloss" / "kernels")


def run(environment: Path, wheel: Path, arguments: list[str]) -> tuple[list[str], Result, int]:
    """Installs the wheel and runs pytest: ([torch, Python, Triton], counts, exit status)."""
    python = str((environment / "bin" / "python").absolute())
    install = "install --quiet --disable-pip-version-check --no-deps --force-reinstall".split()
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, *install, str(wheel)], check=True)
    with tempfile.TemporaryDirectory(prefix="pyloss-versions-") as scratch:
        facts = subprocess.run(
            [python, "-c", FACTS], cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
        )
        *versions, packages = json.loads(facts.stdout)
        tree, report = Path(scratch) / "tree", Path(scratch) / "report.xml"
        lay_tree(tree, Path(packages))
        print(f"\n== torch {versions[0]}, Python {versions[1]}, Triton {versions[2]}", flush=True)
        command = [python, "-m", "pytest", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=tree).returncode
        return versions, read_junit(report) if report.exists() else Result(), status


def version_key(row: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", " ".join(row.split("|")[1:3]))]


def with_row(page: str, cells: list[str], reasons: dict[str, int]) -> str:
    """The page with this run's row and reasons in place of those of the same torch and Python."""
    before, rest = page.split(BEGIN)
    generated, after = rest.split(END)
    rows = [line for line in generated.splitlines() if re.match(r"\| \d", line)]
    notes = [line for line in generated.splitlines() if line.startswith("- ")]
    same = f"| {cells[0]} | {cells[1]} |"
    rows = [row for row in rows if not row.startswith(same)] + ["| " + " | ".join(cells) + " |"]
    notes = [note for note in notes if not note.startswith(f"- {cells[0]}:")]
    if reasons:
        text = "; ".join(f"{why} ({n})" for why, n in sorted(reasons.items()))
        notes.append(f"- {cells[0]}: {text}")
    rows.sort(key=version_key)
    notes.sort(key=lambda note: [int(n) for n in re.findall(r"\d+", note.split(":")[0])])
    table = HEAD + "".join(row + "\n" for row in rows)
    listed = "".join(note + "\n" for note in notes)
    return f"{before}{BEGIN}{table}{listed and chr(10) + listed}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--jobs", default="2", help="processes of pytest (2)")
    parser.add_argument("--no-table", action="store_true", help="leave docs/versions.md alone")
    parser.add_argument("environments", nargs="+", type=Path)
    own = sys.argv[1:]
    chosen = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: len(own) - len(chosen)])
    wheel = options.wheel.absolute()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:8]
    arguments = ["-q", "--timeout=900", "-n", options.jobs, "--dist", "worksteal", *chosen]
    worst = 0
    for environment in options.environments:
        versions, result, status = run(environment, wheel, arguments)
        worst = worst or status
        cells = [*versions, *result.cells(), digest, datetime.date.today().isoformat()]
        print(" | ".join(cells), flush=True)
        if not (chosen or options.no_table) and status in (0, 1):  # else the run broke off
            TABLE.write_text(with_row(TABLE.read_text(), cells, result.by_version()))
    return worst


if __name__ == "__main__":
    sys.exit(main())
