"""Devices for which pyloss has no kernel: shapes and dtypes on `meta`, numbers on one in Python
(fake_device.py), where everything runs on the reference and stays on the device."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specs import SPECS
from specs._checks import run
from specs._spec import F32, F64

import pyloss
from pyloss.ops import _launch
from pyloss.ops._registry import plain_forms

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# meta: no numbers

BY_VALUES = "(item|copy out|data-dependent|nonzero|no fake impl)"
# Spec -> its samples whose results, or their shapes, depend on numbers; None: all of them.
BY_NUMBERS = {
    **dict.fromkeys(("betti_matching", "betti_matching_loss", "betti_matching_loss of logits")),
    **dict.fromkeys(("betti_numbers", "betti_number_error", "betti_matching_error")),
    **dict.fromkeys(("persistence_pairs", "representative_indices", "opis", "dcdm_solve")),
    **dict.fromkeys(("laplacian_sort_frame", "LanczosSGD", "refine_schedule")),
    **dict.fromkeys(("hungarian_set_loss", "order_search_loss")),
    # The longest list, and the next step of a skeleton
    **dict.fromkeys(("list_net", "list_mle", "approx_ndcg_loss", "lambda_loss"), ("offsets",)),
    **dict.fromkeys(("ndcg", "mrr", "precision_at_k"), ("offsets",)),
    **dict.fromkeys(("chamfer_set_loss", "sinkhorn_set_loss"), ("offsets",)),
    "neural_ndcg_loss": ("mask", "offsets", "hidden"),
    "cl_dice": ("index",),
    "sorting_cross_entropy": ("ranks", "positions"),  # the check, without validate=False
}
ON_HOST = {"lr_schedulers": "factors are on the CPU"}


def on_meta(name: str, sample: str) -> None:
    spec = SPECS[name]
    given = spec.cast(spec.samples[sample](), F32 if F32 in spec.dtypes else F64)
    there = given.each(lambda _, t: t.to("meta"))
    where = BY_NUMBERS.get(name, ())
    if where is None or sample in where:
        with pytest.raises((RuntimeError, NotImplementedError), match=BY_VALUES):
            run(spec, there)
        return
    expected, found = run(spec, given), run(spec, there)
    assert found.keys() == expected.keys()
    for k, t in found.items():
        assert (t.shape, t.dtype) == (expected[k].shape, expected[k].dtype), k
        assert t.is_meta, f"{k} is on {t.device}"


SAMPLES = [(name, sample) for name, spec in SPECS.items() for sample in spec.samples]
# One that stands on each op
QUICK = (
    *("aldr_loss", "betti_matching_loss", "fused_cross_entropy", "fused_linear_cross_entropy"),
    *("hard_info_nce", "linear_distillation_loss", "lion_k_step", "margin_shift", "pca_frames"),
    *("permutahedron_rank", "row_softmax_stats", "segment_reduce", "siglip_loss", "soft_permute"),
    "tensor_attention",
)


@pytest.mark.parametrize("name", QUICK)
def test_meta(name: str) -> None:
    on_meta(name, next(iter(SPECS[name].samples)))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "sample"), [pair for pair in SAMPLES if pair[0] not in ON_HOST])
def test_meta_of_every_sample(name: str, sample: str) -> None:
    on_meta(name, sample)


# --------------------------------------------------------------------------------------------------
# A device with numbers

needs_python_backends = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch makes no device in Python",
)
LSTM = "_thnn_fused_lstm_cell"  # of torch, which each device brings; the CPU has none to stand in
REFUSED = {
    **dict.fromkeys(("read_process", "pointer_decoder", "read_process_write"), LSTM),
    **dict.fromkeys(("refine_schedule", "lr_schedulers"), "on another device"),  # made on the CPU
}
# float64 is what they are about: their buffers, or that less gives a wrong number.
NEED_FLOAT64 = (
    *("EquivarianceRegularizer", "SphericalLinear", "gaussian_naive_bayes", "perturb_weights"),
    *("cdnv", "equiangle", "equinorm", "nc1", "nc2", "nc3", "nc4"),
)
# Pairs are drawn by numbers that are rounded otherwise.
DRAWN = ("associativity_loss", "commutativity_loss")
# What looks at numbers on the host: algorithms there, lists whose longest is asked for, labels that
# the reference checks, and steps until something has converged.
READ_BACK = {
    *("betti_matching", "betti_matching_error", "betti_matching_loss"),
    *("betti_matching_loss of logits", "betti_number_error", "betti_numbers", "persistence_pairs"),
    *("permutahedron_rank", "permutahedron_sort", "soft_rank", "soft_sort", "spearman_loss"),
    *("topk_cross_entropy", "hungarian_set_loss", "laplacian_sort_frame", "refine_schedule"),
    *("lr_schedulers", "representative_indices"),
    *("approx_ndcg_loss", "lambda_loss", "list_mle", "list_net", "mrr", "ndcg", "precision_at_k"),
    *("neural_ndcg_loss", "chamfer_set_loss", "sinkhorn_set_loss"),
    *("fused_cross_entropy", "comp_sum_loss", "focal_loss", "poly1_loss", "label_relaxation_loss"),
    "fused_linear_cross_entropy",
    *("LanczosSGD", "cl_dice", "dcdm_solve", "sorting_cross_entropy"),
}


@functools.cache
def on_device(*arguments: str) -> dict:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "device_worker.py"), *arguments],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_python_backends
def test_every_op_runs_on_the_reference_of_a_device_without_float64() -> None:
    found = on_device(*QUICK)
    assert {k: v for k, v in found["problems"].items() if v} == {}
    assert len(found["problems"]) == len(QUICK)
    assert set(found["read_back"]) <= READ_BACK


@needs_python_backends
@pytest.mark.exhaustive
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_every_sample_on_a_device(wide: bool) -> None:
    found = on_device(*["--float64"] * wide)
    wrong, refused = {}, set()
    for case, problem in found["problems"].items():
        name = case.split(":")[0]
        expected = REFUSED.get(name)
        if not wide and name in NEED_FLOAT64:
            expected = "has no torch.float64"
        elif not wide and name in DRAWN:
            expected = "out of tolerance"
        elif name == "EquivarianceRegularizer":
            expected = EXPANDED
        if problem and expected and expected in problem:
            refused.add(name)
        elif problem:
            wrong[case] = problem
    assert not wrong
    assert {*REFUSED, *(() if wide else NEED_FLOAT64)} <= refused
    assert set(found["read_back"]) == READ_BACK


# Of the stand-in, whose views torch does not know: an addition in place of what was expanded.
EXPANDED = "AddBackward0 returned an invalid gradient"


def test_other_devices_take_the_composite_kernel() -> None:
    """As the dispatcher has it: of MPS, XPU, XLA and devices of others, for every op."""
    pyloss.ops.load_all()
    for name in plain_forms:
        for key in ("MPS", "XPU", "XLA", "PrivateUse1"):
            full = f"pyloss::{name}"
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(full, key), (name, key)
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(full, key), (name, key)


def test_sums_on_mps_are_float32() -> None:
    assert _launch.widest(torch.device("mps")) == torch.float32
    assert all(_launch.widest(torch.device(d)) == torch.float64 for d in ("cpu", "cuda", "meta"))


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_backends_say_why_not(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyloss import backends

    assert backends.choose("row_softmax_fwd", device, ("reference", "cpu", "cuda")) == "reference"
    with pyloss.backend("cpu"), pytest.raises(RuntimeError, match="needs cpu tensors"):
        backends.choose("row_softmax_fwd", device, ("reference", "cpu", "cuda"))
    monkeypatch.setenv("PYLOSS_STRICT", "1")
    with pytest.raises(RuntimeError, match="would run on the reference"):
        backends.choose("row_softmax_fwd", device, ("reference", "cpu", "cuda"))
