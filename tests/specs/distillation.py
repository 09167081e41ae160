"""linear_distillation_loss, against the formula on whole logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import linear_distillation_loss
from pyloss.testing import make_logits, make_target
from specs._spec import BF16, F16, F64, Bad, Empty, Sample, Spec

STUDENT = ("student_hidden", "student_weight", "student_bias")
N, V, D, E = 5, 7, 3, 4


def rows_of(
    student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias=None,
    teacher_bias=None, temperature=1.0, target=None, ce_weight=0.0, direction="forward", beta=0.5,
    scale_by_temperature=True, **_,
) -> Tensor:  # fmt: skip
    """The definition, row by row on whole logits, in the dtype of the arguments."""
    x = F.linear(student_hidden, student_weight, student_bias)
    t = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    p, q = (t / temperature).softmax(-1), (x / temperature).softmax(-1)
    if direction == "jsd":
        m = beta * p + (1 - beta) * q
        d = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    else:
        d = p * (p / q).log() if direction == "forward" else q * (q / p).log()
    rows = (1 - ce_weight) * (temperature**2 if scale_by_temperature else 1) * d.sum(-1)
    if ce_weight:
        nll = F.cross_entropy(x, target.clamp(min=0).reshape(-1), reduction="none")
        rows = rows + ce_weight * nll
    return rows if target is None else torch.where(target != -100, rows, 0.0)


def reference(reduction="mean", num_items=None, **arguments) -> Tensor:
    rows = rows_of(**arguments)
    if reduction == "none":
        return rows
    target = arguments.get("target")
    count = len(rows) if target is None else (target != -100).sum()
    divisor = {"mean": num_items or count, "sum": 1, "batchmean": len(rows)}[reduction]
    return rows.sum() / divisor


def sample(n: int = N, targets: bool = False, **options) -> Sample:
    shapes = dict(
        student_hidden=(n, D), student_weight=(V, D), student_bias=(V,),
        teacher_hidden=(n, E), teacher_weight=(V, E), teacher_bias=(V,),
    )  # fmt: skip
    x = {k: make_logits(s, F64, seed=i, scale=0.7) for i, (k, s) in enumerate(shapes.items())}
    if targets:
        x["target"] = make_target((n, V), ignore_fraction=0.4)
    return Sample(x, options)


H, W = torch.zeros(5, 3), torch.zeros(7, 3)

SPECS = (
    Spec(
        function=linear_distillation_loss,
        samples={
            "forward": sample,
            "reverse": lambda: sample(targets=True, direction="reverse", temperature=2.5),
            "jsd": lambda: sample(direction="jsd", beta=0.3, ce_weight=0.0, reduction="none"),
            "cross entropy": lambda: sample(
                targets=True, ce_weight=0.3, temperature=1.7, reduction="none", chunk=2
            ),
            "jsd and cross entropy": lambda: sample(
                targets=True, direction="jsd", ce_weight=0.2, chunk=2, num_items=7.0
            ),
            "batchmean": lambda: sample(reduction="batchmean", scale_by_temperature=False),
        },
        reference=reference,
        gradients=STUDENT,
        result="wide",
        rounded=False,  # the logits of half types are products in that type
        # What is left of two softmaxes. The tight bound is in tests/test_linear_distillation.py: no
        # worse than whole logits.
        tolerances={BF16: (0.05, 0.05), F16: (0.01, 0.01)},
        autocast_rounds=True,
        empty={
            "mean": Empty(lambda: sample(0), math.nan),
            "sum": Empty(lambda: sample(0, reduction="sum"), 0.0),
            "all ignored, zero": Empty(
                lambda: Sample(
                    {**sample().inputs, "target": torch.full((N,), -100)}, {"empty": "zero"}
                ),
                0.0,
            ),
            "none": Empty(lambda: sample(0, reduction="none"), 0.0, (0,)),
        },
        compile_samples=("jsd and cross entropy",),
        vmap=("student_hidden", "teacher_hidden"),
        nan={"student_hidden": "all", "teacher_hidden": "all", "student_weight": "all"},
        large=lambda: sample(600, targets=True, ce_weight=0.5, chunk=100),
        errors=(
            Bad(TypeError, "student_hidden must be a Tensor, got list", dict(student_hidden=[1.0])),
            Bad(TypeError, "teacher_weight must be a Tensor, got NoneType",
                dict(teacher_weight=None)),
            Bad(RuntimeError, r"\(V, 5\).*\[7, 3\]", dict(student_hidden=torch.zeros(5, 5))),
            Bad(RuntimeError, r"7 and 9.*weight\[:7\]",
                dict(teacher_weight=torch.zeros(9, 4), teacher_bias=None)),
            Bad(RuntimeError, r"\[5, 3\] and \[2, 4\]", dict(teacher_hidden=torch.zeros(2, 4))),
            Bad(RuntimeError, r"student_bias.*\(7,\), got \[4\]",
                dict(student_bias=torch.zeros(4))),
            Bad(RuntimeError, "student_weight.*got torch.float64",
                dict(student_weight=W.double())),
            Bad(RuntimeError, "teacher_weight must have the dtype",
                dict(teacher_hidden=torch.zeros(5, 4).half())),
            Bad(NotImplementedError, "'Long'.*student_hidden", dict(student_hidden=H.long())),
            Bad(RuntimeError, "no classes",
                dict(student_weight=W[:0], teacher_weight=torch.zeros(0, 4), student_bias=None,
                     teacher_bias=None)),
            Bad(TypeError, "target must be a Tensor", dict(target=[1])),
            Bad(RuntimeError, "Long or Byte, but got Float", dict(target=torch.zeros(5))),
            Bad(RuntimeError, r"target must have.*\[5\], got \[2\]",
                dict(target=torch.zeros(2).long())),
            Bad(IndexError, "Target 7 is out of bounds",
                dict(target=torch.tensor([0, 7, 1, 1, 1]))),
            Bad(IndexError, "Target -1 is out of bounds",
                dict(target=torch.tensor([0, -1, 1, 1, 1]))),
            Bad(ValueError, "ce_weight needs target", dict(ce_weight=0.5)),
            Bad(ValueError, r"ce_weight must be in \[0, 1\], got 1.5", dict(ce_weight=1.5)),
            Bad(ValueError, "temperature must be finite and > 0", dict(temperature=0.0)),
            Bad(ValueError, "direction must be one of forward.*'up'", dict(direction="up")),
            Bad(ValueError, r"beta must be in \(0, 1\), got 1.0", dict(direction="jsd", beta=1.0)),
            Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
            Bad(ValueError, "num_items", dict(num_items=0)),
            Bad(ValueError, "num_items must be one number", dict(num_items=torch.ones(2))),
            Bad(ValueError, "empty must be 'nan' or 'zero', got 'one'", dict(empty="one")),
            Bad(ValueError, r"shift must be in \[0, 5\].*got 6", dict(shift=6)),
            Bad(ValueError, "shift must be in", dict(shift=-1)),
            Bad(TypeError, "shift must be an integer, got float", dict(shift=1.0)),
            Bad(ValueError, "chunk must be at least 1, got 0", dict(chunk=0)),
            Bad(TypeError, "chunk must be 'auto' or a number of rows, got 'big'",
                dict(chunk="big")),
            Bad(TypeError, "chunk must be 'auto' or a number of rows, got 2.0", dict(chunk=2.0)),
        ),
    ),
)  # fmt: skip
