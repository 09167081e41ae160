"""Writes docs/export_table.md: which functions of pyloss go into which kind of graph.

    python tests/export_survey.py

It takes the first sample of every Spec that calls an op, in float32, and compares each graph with
the function itself. ONNX needs onnxscript and onnxruntime. Half an hour of one core.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from specs import SPECS
from specs._spec import F32
from test_export import OfSpec, close, onnx_model
from torch.export import Dim, ExportedProgram, export
from torch.utils._python_dispatch import TorchDispatchMode

import pyloss

PAGE = Path(__file__).resolve().parents[1] / "docs/export_table.md"
COLUMNS = ("torch.export", "sizes that stay open", "decompose", "ONNX")
LIMIT_S = 150  # a column


class _Ops(TorchDispatchMode):
    """Notes whether an op of pyloss ran."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= func.namespace == "pyloss"
        return func(*args, **(kwargs or {}))


def calls_an_op(spec) -> bool:
    sample = spec.first()
    with _Ops() as ops:
        try:
            spec.call(sample)
        except RuntimeError:  # some take no mode of dispatch
            pass
    return ops.found


def row(spec) -> dict[str, str]:
    """What came of each column: "yes", the open sizes, or the error."""
    sample = spec.first()
    module = OfSpec(spec, spec.cast(sample, F32) if F32 in spec.dtypes else sample)
    want, found, graphs = module(*module.given), {}, {}

    def column(name: str, attempt: Callable) -> None:
        signal.alarm(LIMIT_S)
        try:
            graphs[name] = attempt()
            found[name] = graphs[name] if isinstance(graphs[name], str) else "yes"
        except Exception as error:
            found[name] = str(error)
        finally:
            signal.alarm(0)

    def checked(program: ExportedProgram) -> ExportedProgram:
        close(program.module()(*module.given), want)
        return program

    def open_sizes() -> str:
        shapes = tuple(dict.fromkeys(range(t.dim()), Dim.AUTO) for t in module.given)
        graph = checked(export(module, module.given, dynamic_shapes=(shapes,))).graph
        values = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
        return "; ".join(
            "×".join("n" if isinstance(size, torch.SymInt) else str(size) for size in t.shape)
            for t in values
            if isinstance(t, torch.Tensor)
        )

    def onnx() -> None:
        import onnxruntime

        program = graphs["decompose"]
        model = onnx_model(program, module.given).SerializeToString()
        session = onnxruntime.InferenceSession(model)
        names = {i.name for i in session.get_inputs()}
        given = zip((i.arg.name for i in program.graph_signature.input_specs), module.given)
        got = session.run(None, {name: t.numpy() for name, t in given if name in names})
        for a, b in zip(got, want):
            close(torch.from_numpy(numpy.array(a)), b.detach(), rtol=1e-3, atol=1e-4)

    column(COLUMNS[0], lambda: checked(export(module, module.given)))
    if COLUMNS[0] in graphs:
        column(COLUMNS[1], open_sizes)
        column(COLUMNS[2], lambda: checked(pyloss.ops.decompose(graphs[COLUMNS[0]])))
    if COLUMNS[2] in graphs:
        column(COLUMNS[3], onnx)
    return found


_REASONS = {
    r"No ONNX function found for <OpOverload\(op='([^']*)', overload='(\w+)'": r"no: \1 (\2)",
    r"data-dependent": "no: reads numbers",
    r"algorithm on the values": "no: an algorithm on the values",
    r"where TRealOrUInt8|T_dim": "no: a type that the exporter does not take",
}


def reason(text: str) -> str:
    for pattern, words in _REASONS.items():
        if match := re.search(pattern, text):
            return match.expand(words).replace(" (default)", "").replace(" (Tensor)", "")
    return text if len(text) < 60 else "no: " + text.split("\n")[0][:60]


def write(rows: dict[str, dict[str, str]]) -> None:
    lines = ["# What can be exported", ""]
    lines += ["Written by `python tests/export_survey.py`, which runs the first sample of each "]
    lines[-1] += "Spec that calls an op and compares the numbers."
    counts = [sum(c in r and not reason(r[c]).startswith("no") for r in rows.values())
              for c in COLUMNS]  # fmt: skip
    total = f"Of {len(rows)}: {counts[0]} exported, {counts[2]} decomposed, {counts[3]} as ONNX."
    lines += [total, "", "| function | " + " | ".join(COLUMNS) + " |", "|---" * 5 + "|"]
    for name, found in rows.items():
        cells = (reason(found[c]) if c in found else "" for c in COLUMNS)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def _stop(*_) -> None:
    raise TimeoutError(f"no: more than {LIMIT_S} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _stop)
    write({name: row(spec) for name, spec in SPECS.items() if calls_an_op(spec)})
