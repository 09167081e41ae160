"""tests/versions.py, and that the documentation and CI name the same versions of torch."""

from __future__ import annotations

import re
from pathlib import Path

import versions

ROOT = Path(__file__).resolve().parents[1]
PROMISED = ["2.6", "2.8", "2.10", "2.13", "2.14"]

REPORT = """<testsuites><testsuite>
<testcase name="a"/>
<testcase name="b"><failure message="no"/></testcase>
<testcase name="c"><error message="no"/></testcase>
<testcase name="d"><skipped type="pytest.xfail" message="known"/></testcase>
<testcase name="e"><skipped type="pytest.skip" message="hooks: needs torch 2.8"/></testcase>
<testcase name="f"><skipped type="pytest.skip" message="needs a CUDA device"/></testcase>
<testcase name="g"><skipped type="pytest.skip" message="needs a CUDA device"/></testcase>
</testsuite></testsuites>"""


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def test_counts(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    result = versions.read_junit(path)
    assert result.cells() == ["2", "2", "1", "2"]
    assert result.by_version() == {"hooks: needs torch 2.8": 1}


def test_a_row_replaces_its_own() -> None:
    page = f"text\n{versions.BEGIN}{versions.END}more\n"
    for torch, count, reasons in (
        ("2.10.0", "1", {}),
        ("2.6.0", "2", {"a: needs torch 2.8": 3, "b": 1}),
        ("2.6.0", "4", {"a: needs torch 2.8": 5}),
    ):
        page = versions.with_row(page, [torch, "3.11.7", count], reasons)
    assert page == (
        f"text\n{versions.BEGIN}{versions.HEAD}| 2.6.0 | 3.11.7 | 4 |\n| 2.10.0 | 3.11.7 | 1 |\n"
        f"\n- 2.6.0: a: needs torch 2.8 (5)\n{versions.END}more\n"
    )


def test_ci_and_documentation_name_the_same() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (matrix,) = re.findall(r"^ +torch: \[(.*)\]$", workflow, re.M)
    in_ci = re.findall(r'"([\d.]+)"', matrix)
    columns = versions.HEAD.splitlines()[0].count("|") - 1
    rows = [row.split(" | ") for row in re.findall(r"^\| (\d.*) \|$", page, re.M)]
    ran = [row for row in rows if len(row) == columns]
    assert [minor(version) for version in in_ci] == PROMISED
    assert [row[0] for row in ran] == [
        version for version in in_ci if version in {r[0] for r in ran}
    ]
    assert all(row[4] == "0" for row in ran), "the table has failures"
    assert len({row[7] for row in ran}) <= 1, "not one wheel"
