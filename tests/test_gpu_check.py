"""bench/gpu_check.sh and what it calls, without a device: a rehearsal, stand-ins for tools."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# At the end, so that an installed pyloss stays ahead of the one in the source tree.
sys.path.append(str(ROOT))

from bench import (  # noqa: E402
    _gpu_first,
    _gpu_kernels,
    _gpu_summary,
    _gpu_times,
    _kernel_table,
    _kernel_times,
    _predictions,
)
from bench import _sanitizer_cases as cases  # noqa: E402

SCRIPT = ROOT / "bench" / "gpu_check.sh"
STAGES = ["build", "first", "betti", "tests_gpu", "accuracy", "memcheck", "racecheck", "graphs"]
STAGES += ["times", "synccheck", "cluster", "bench"]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


# --------------------------------------------------------------------------------------------------
# The kernels' names


def test_no_kernel_is_missing() -> None:
    """Every definition has a name of the form that the sanitizer is given."""
    cuda = [p.read_text() for p in (ROOT / "csrc/cuda").glob("*.cu*")]
    assert len(_gpu_kernels.cuda_kernels()) == sum(text.count("__global__") for text in cuda) > 40
    jitted = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        text = re.sub(r"#.*", "", path.read_text())
        jitted |= set(re.findall(r"@triton\.jit(?:\([^)]*\))?\s*(?:@[^\n]*\n)*def (\w+)\(", text))
    assert _gpu_kernels.triton_kernels() == sorted(n for n in jitted if n.endswith("_kernel"))
    # Only a kernel is launched: what is called within one does not end so.
    launched = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        launched |= set(re.findall(r"\b(\w+)\[[^\]=]*\]\(\n? *\w", path.read_text()))
    assert launched & jitted <= set(_gpu_kernels.triton_kernels())


def test_a_new_kernel_is_found(tmp_path: Path) -> None:
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    source = "__global__ void __launch_bounds__(kWarp, k<T, 2>)\n    new_kernel(T* x) {}\n"
    (tmp_path / "csrc/cuda/new.cu").write_text(source + "__global__ void other_kernel(int n) {}\n")
    (tmp_path / "kernels/new.py").write_text("@triton.jit\ndef third_kernel(x_ptr):\n    pass\n")
    assert _gpu_kernels.kernels(tmp_path) == ["new_kernel", "other_kernel", "third_kernel"]


def test_docs_name_every_kernel() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    assert [k for k in _gpu_kernels.kernels() if f"`{k}`" not in page] == []


def test_every_kernel_has_bytes_and_flop_in_the_table(capsys) -> None:
    rows = {k.name: k for k in _kernel_table.KERNELS + _kernel_table.TRITON_KERNELS}
    assert sorted(rows) == sorted(_gpu_kernels.kernels())
    _predictions.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert "FLOP" in head
    printed = {line.split()[0]: line for line in lines[: len(rows)]}
    for name, k in rows.items():
        assert k.traffic and k.flop and f"  {k.flop}  " in printed[name]
        blocks = _kernel_table.blocks_per_multiprocessor(k.threads, k.registers, k.shared)
        assert blocks >= 1, name


def test_every_kernel_has_a_predicted_time(capsys) -> None:
    """In a case that is measured, whose own prediction is no shorter than those of its kernels."""
    works = {w.kernel: w for w in _kernel_times.works()}
    assert sorted(works) == sorted(w.kernel for w in _kernel_times.works())
    assert sorted(works) == sorted(_gpu_kernels.kernels())
    cases = _predictions.milliseconds()
    _predictions.main()
    printed = capsys.readouterr().out
    for name, w in works.items():
        assert w.case in cases and 1e-7 < w.seconds < 1, name
        assert f"{name:<52} {1e3 * w.seconds:9.4f}  {w.launches:8d}  {w.bound}" in printed
    optional = _kernel_times.of_case("rows fwd with gradient 32768")
    for case, ms in cases.items():
        kernels = {k: t for k, t in _kernel_times.of_case(case).items() if k not in optional}
        assert sum(kernels.values()) <= 1.1 * ms, case
    assert all(any(w.case == case for w in works.values()) for case in _predictions.FOR_A_KERNEL)


def test_a_prediction_joins_what_bounds_it() -> None:
    work = _kernel_times.Work("k", "c", bytes=4.3e9, alone=1e-6)
    assert work.bound == "bytes" and 1e-3 <= work.seconds < 1.01e-3
    both = work._replace(instructions=1e-3 * _kernel_times.LANES)
    assert 1.1e-3 < both.seconds < 1.2e-3
    assert work._replace(flop=1e12).bound == "products" and work._replace(cached=1e11).bound == "L2"


def test_measured_kernels_come_from_the_profiler() -> None:
    def event(key: str, us: float) -> Any:
        return types.SimpleNamespace(key=key, self_device_time_total=us)

    found = _gpu_times.kernel_milliseconds(
        (
            event("void pyloss::cuda::row_softmax_fwd_kernel<float, (Mode)0>(Problem)", 300.0),
            event("void pyloss::cuda::row_softmax_fwd_kernel<float, (Mode)1>(Problem)", 100.0),
            event("void at::native::vectorized_elementwise_kernel<4>(int)", 50.0),
        )
    )
    assert found == {"row_softmax_fwd_kernel": 0.4}
    records = {r["kernel"]: r for r in _predictions.kernel_records("rows fwd 32768", found)}
    fwd = records["row_softmax_fwd_kernel"]
    assert fwd["measured_ms"] == 0.4 and fwd["ratio"] == 0.4 / fwd["predicted_ms"] > 1.5
    assert "look here first" in _gpu_summary.time_line(fwd)
    assert records["row_softmax_loss_kernel"]["measured_ms"] is None
    assert "look here" not in _gpu_summary.time_line(records["row_softmax_loss_kernel"])


def test_flop_of_attention_are_those_of_its_head() -> None:
    """The table counts by kernel, the head of the file by pass."""
    rows = {k.name: k.flop for k in _kernel_table.TRITON_KERNELS}

    def total(*kernels: str) -> int:
        return sum(int(rows[f"tensor_attention_{k}_kernel"].removesuffix(" d")) for k in kernels)

    (said,) = re.findall(
        r"forward (\d+) T d; backward (\d+) T d \(rows\), (\d+) T d \(pairs\)",
        (ROOT / "kernels/tensor_attention/__init__.py").read_text(),
    )
    forms = [f"bwd_{of}_{by}" for by in ("rows", "pairs") for of in ("q", "kv")]
    found = total("fwd_rows"), total(*forms[:2]), total(*forms[2:])
    assert found == tuple(map(int, said)) and total("fwd_pairs") == found[0]


def test_a_kernel_that_never_ran_is_named() -> None:
    names = {f"void pyloss::cuda::{k}<float>(int)" for k in _gpu_kernels.cuda_kernels()}
    names |= set(_gpu_kernels.triton_kernels())
    assert _gpu_first.missing(names) == []
    assert _gpu_first.missing(names - {"tensor_attention_merge_kernel"}) == [
        "tensor_attention_merge_kernel"
    ]


# --------------------------------------------------------------------------------------------------
# What the stages run


def test_small_cases_of_every_op_agree_on_the_cpu() -> None:
    found = dict(cases.errors("cpu"))
    assert {k: e for k, e in found.items() if not e <= 1} == {}
    for op in (
        "fwd ",
        "linear",
        "sorting",
        "betti",
        "permutahedron",
        "frames",
        "moments",
        "attention",
        "lowrank",
        "pairs",
    ):
        assert any(name.startswith(op) for name in found), op


def test_a_wrong_case_and_one_that_raises_are_told(monkeypatch, capsys) -> None:
    def raising(device):
        yield "fine", 0.5
        raise RuntimeError("no such kernel")

    for name in [n for n in vars(cases) if n.endswith("_errors")]:
        monkeypatch.setattr(cases, name, lambda device: iter(()))
    monkeypatch.setattr(cases, "_betti_errors", raising)
    monkeypatch.setattr(cases, "_lowrank_errors", lambda device: iter([("bad", math.nan)]))
    assert cases.main("cpu") == 1
    text = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in text and "bad: nan" in text
    assert "1 of 3 cases agree" in text


def test_times_are_written_case_by_case(tmp_path, monkeypatch) -> None:
    """Every planned time is a case, and the file is whole when a case takes the process along."""
    planned = set(_predictions.milliseconds())
    names = [c.name for c in _gpu_times.cases("cuda", False)]
    assert len(set(names)) == len(names) and planned == set(names)

    path = tmp_path / "times.json"

    def two(device, quick):
        yield _gpu_times.Timed("copy", lambda: lambda: None)
        yield _gpu_times.Timed("product", lambda: 1 / 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(_gpu_times, "cases", two)
    with pytest.raises(KeyboardInterrupt):
        _gpu_times.main(["--device", "cpu", "--json", str(path)])
    records = {r["case"]: r for r in json.loads(path.read_text())}
    assert set(records) == planned
    assert records["copy"]["status"] == "ok" and records["copy"]["ratio"] < 1
    assert records["product"]["reason"].startswith("ZeroDivisionError")
    assert all(r["status"] == "not reached" for n, r in records.items() if n not in names[:2])


def test_a_slow_case_is_where_to_look_first() -> None:
    slow = _gpu_times.Timed("copy", lambda: lambda: _wait(0.002))
    record = _gpu_times.measure(slow, "cpu", False)
    assert record["look_here_first"] and "LOOK HERE" in _gpu_times.line(record)
    assert "look here first" in _gpu_summary.time_line(record)


def _wait(seconds: float) -> None:
    import time

    time.sleep(seconds)


# --------------------------------------------------------------------------------------------------
# The script


def run(out: Path, *, path: Path | None = None, **environment: str) -> tuple[int, dict]:
    """Exit status and summary; `path` holds stand-ins for tools."""
    folders = [str(p) for p in (path, Path(sys.executable).parent) if p]
    env = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ["PATH"]]), **environment}
    done = subprocess.run(
        ["bash", SCRIPT, str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    summary = out / "summary.json"
    assert summary.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(summary.read_text())


def statuses(summary: dict) -> dict[str, str]:
    return {s["stage"]: s["status"] for s in summary["stages"]}


@needs_bash
def test_script_explains_its_use() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "OUT [WHEELS]" in done.stderr
    assert _gpu_summary.stages() == STAGES


@needs_bash
def test_without_a_device_every_stage_says_so(tmp_path: Path) -> None:
    status, summary = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert status == 0 and summary["ok"] and summary["complete"]
    assert [s["stage"] for s in summary["stages"]] == STAGES
    for stage in summary["stages"]:
        assert (stage["status"], stage["remark"]) == ("skipped", "no device"), stage
    assert {r["case"] for r in summary["times"]} == set(_predictions.milliseconds())
    kernels = [k for r in summary["times"] for k in r["kernels"]]
    assert sorted(k["kernel"] for k in kernels) == sorted(_gpu_kernels.kernels())
    for record in summary["times"] + kernels:
        assert record["predicted_ms"] > 0 and record["measured_ms"] is None


@pytest.mark.exhaustive
@needs_bash
def test_rehearsal_runs_the_commands_of_every_stage(tmp_path: Path) -> None:
    status, summary = run(tmp_path, CUDA_VISIBLE_DEVICES="", PYLOSS_GPU_CHECK_REHEARSE="1")
    assert status == 0 and summary["complete"], summary["stages"]
    for stage in summary["stages"][1:]:
        assert stage["remark"].startswith("no device; rehearsed"), stage
    assert all(r["status"] in ("rehearsed", "not reached") for r in summary["times"])
    assert summary["first"]["cases"] > 200 and not summary["first"]["wrong"]
    assert summary["tests"]["betti"]["tests"] > 5


# Stands for python3 on a machine with a device: torch is not asked, nothing is installed, and a
# stage named in $DIE ends as $HOW says.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *_gpu_summary.py* | *_gpu_kernels.py* | *sysconfig*) exec "$REAL" "$@" ;;
  *"$DIE"*)
    if [[ $HOW == script ]]; then
      read -r _ _ _ script _ </proc/$PPID/stat  # the parent is timeout
      kill -9 "$script"
    fi
    kill -9 $$ ;;
esac
exit 0
"""
SANITIZER = r"""#!/usr/bin/env bash
if [[ $1 == --help ]]; then echo "  --kernel-name arg"; exit 0; fi
printf '%s\n' "$@" >>"$ARGUMENTS"
[[ $2 == racecheck ]] && { echo "========= RACECHECK SUMMARY: 1 hazard"; exit 99; }
echo "9 of 9 cases agree with the reference"
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in {"python3": PYTHON, "compute-sanitizer": SANITIZER}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("REAL", sys.executable)
    monkeypatch.setenv("ARGUMENTS", str(tmp_path / "arguments"))
    monkeypatch.setenv("DIE", "nothing dies")
    monkeypatch.setenv("HOW", "")
    return folder


@needs_bash
def test_with_a_device_each_kernel_is_named_to_the_sanitizer(tmp_path, tools) -> None:
    status, summary = run(tmp_path / "out", path=tools)
    assert status == 1 and summary["failed"] == ["racecheck"]
    others = [s for s in STAGES if s != "racecheck"]
    assert [statuses(summary)[s] for s in others] == ["ok"] * len(others)
    remarks = {s["stage"]: s["remark"] for s in summary["stages"]}
    assert remarks["memcheck"] == "9 of 9 cases agree"
    assert "1 hazard" in remarks["racecheck"]
    arguments = (tmp_path / "arguments").read_text().splitlines()
    for kernel in _gpu_kernels.kernels():
        places = [i for i, a in enumerate(arguments) if a == f"kns={kernel}"]
        assert len(places) == 3  # memcheck, racecheck, synccheck
        assert all(arguments[i - 1] == "--kernel-name" for i in places)


@needs_bash
def test_a_stage_that_dies_takes_no_other_along(tmp_path, tools, monkeypatch) -> None:
    monkeypatch.setenv("DIE", "betti_matching_gpu.py tests/test_permutahedron")
    status, summary = run(tmp_path / "out", path=tools)
    assert status == 1 and "betti" in summary["failed"]
    assert statuses(summary)["first"] == statuses(summary)["times"] == "ok"


@needs_bash
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_results_outlive_the_script(tmp_path, tools, monkeypatch) -> None:
    monkeypatch.setenv("DIE", " tests/test_gpu_accuracy.py")
    monkeypatch.setenv("HOW", "script")
    _, summary = run(tmp_path / "out", path=tools)
    found = statuses(summary)
    assert found["build"] == found["betti"] == found["tests_gpu"] == "ok"
    assert found["accuracy"] == found["times"] == found["bench"] == "not reached"
    assert not summary["complete"]
    assert {r["case"] for r in summary["times"]} == set(_predictions.milliseconds())


@needs_bash
def test_a_spent_budget_leaves_the_rest_out(tmp_path, tools) -> None:
    status, summary = run(tmp_path / "out", path=tools, PYLOSS_GPU_CHECK_SECONDS="30")
    assert status in (0, 1)
    remarks = {s["stage"]: s["remark"] for s in summary["stages"]}
    assert remarks["build"] == remarks["first"] == "out of time"
    assert summary["complete"]


def test_summary_reads_what_the_stages_left(tmp_path, capsys) -> None:
    (tmp_path / "tests_gpu.xml").write_text(
        '<testsuites><testsuite tests="3" skipped="1" failures="1">'
        '<testcase classname="tests.test_gpu" name="a"/>'
        '<testcase classname="tests.test_gpu" name="b"><skipped/></testcase>'
        '<testcase classname="tests.test_x" name="c"><failure/></testcase>'
        "</testsuite></testsuites>"
    )
    (tmp_path / "betti.xml").write_text("<testsuites><testsuite")
    (tmp_path / "times.json").write_text('[{"case": "copy", "predicted_ms": 0.5, "measured_ms": 1}')
    steps = tmp_path / "steps.tsv"
    steps.write_text("build\tok\t12\t\nracecheck\tskipped\t1\tdevice not supported\n")
    assert _gpu_summary.main(str(steps), str(tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"] and not summary["complete"]
    assert summary["tests"]["tests_gpu"]["failed"] == ["tests.test_x::c"]
    assert "unreadable" in summary["tests"]["betti"]
    assert {r["case"] for r in summary["times"]} == set(_predictions.milliseconds())
    assert capsys.readouterr().out.endswith("result: ok\n")
    steps.write_text("tests_gpu\tfailed\t12\tsee tests_gpu.log\n")
    assert _gpu_summary.main(str(steps), str(tmp_path), "--quiet") == 1
    assert capsys.readouterr().out == ""
