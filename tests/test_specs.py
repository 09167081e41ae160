"""Every public callable through every check that its Spec promises; `-k` takes either name."""

from __future__ import annotations

import pytest
import torch

import pyloss
import pyloss.functional
import pyloss.metrics
import pyloss.nn
import pyloss.nn.lie
import pyloss.optim
import pyloss.optim.lr_scheduler
import pyloss.regularizers

pytest.register_assert_rewrite("specs._checks")

from specs import SPECS  # noqa: E402
from specs._broken import KEPT, WRONG  # noqa: E402
from specs._checks import CHECKS, assert_spec  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads) -> None:
    """The samples are small: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("spec", "check"),
    [
        pytest.param(
            spec,
            name,
            id=f"{spec.name}-{name}",
            marks=[pytest.mark.exhaustive] if name in spec.exhaustive else [],
        )
        for spec in SPECS.values()
        for name, (applies, _) in CHECKS.items()
        if applies(spec)
    ],
)
def test_spec(spec, check):
    assert_spec(spec, check)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS.values()])
def test_value_on_a_gpu(spec):
    assert_spec(spec, "value", device="cuda")


# --------------------------------------------------------------------------------------------------
# The tester itself


def test_checks_left_to_the_exhaustive_run_exist():
    for spec in SPECS.values():
        assert all(name in CHECKS and CHECKS[name][0](spec) for name in spec.exhaustive), spec.name


@pytest.mark.parametrize("check", CHECKS)
def test_a_loss_that_keeps_its_promises_passes(check):
    assert CHECKS[check][0](KEPT)
    assert_spec(KEPT, check)


@pytest.mark.parametrize(
    ("check", "spec"),
    [
        pytest.param(check, spec, id=f"{check}-{what}")
        for check, wrong in WRONG.items()
        for what, spec in wrong.items()
    ],
)
def test_a_broken_promise_is_seen(check, spec):
    with pytest.raises(AssertionError, match=f"^spec {spec.name}, check {check}: "):
        assert_spec(spec, check)


def test_every_check_has_been_seen_to_fail():
    assert set(WRONG) == set(CHECKS)


# --------------------------------------------------------------------------------------------------
# Nothing public without a Spec

WITHOUT_SPEC = {
    # containers of results
    "BettiMatching": "its loss and its tables are the results of betti_matching",
    "BettiTarget": "stands in for a target: tests/test_betti_target.py",
    "DCDMResult": "the result of dcdm_solve",
    "DPOMetrics": "a result of dpo_loss",
    "GRPOMetrics": "a result of grpo_loss",
    "GL": "groups: tests/test_lie.py, tests/messages/lie.py",
    "SL": "likewise",
    "SO": "likewise",
    "GroupSample": "the result of their sample",
    "Polar": "the result of polar",
    "SymmetryType": "a group: tests/test_equivariance.py",
    "resample_": "draws samples: tests/test_lie.py",
    "Frames": "the result of pca_frames",
    "GatedFlops": "the result of gated_flops",
    "GradCache": "calls encoders: tests/test_grad_cache.py",
    "LionKLyapunov": "the result of lion_k_lyapunov",
    "LyapunovMonitor": "records of a run: tests/test_lion_k_theory.py",
    "NeuralCollapse": "the result of NeuralCollapseMetrics",
    "OPISCurves": "the result of opis",
    "OptimalBagSize": "the result of optimal_bag_size",
    "PersistencePairs": "the result of persistence_pairs",
    "RankingAccuracy": "the result of ranking_accuracy",
    "RowSoftmaxStats": "the result of row_softmax_stats",
    "RowStats": "a result of fused_cross_entropy",
    "SogCLRStats": "a result of sogclr_loss",
    "TensorAttentionCost": "the result of tensor_attention_cost",
    "OrderSearchSchedule": "counts steps: tests/test_sets.py",
    "Pointers": "the result of PointerDecoder",
    # means over batches
    "BettiMatchingError": "accumulates betti_matching_error: tests/test_betti_matching.py",
    "Alignment": "accumulates alignment: tests/test_embedding_metrics.py",
    "NeuralCollapseMetrics": "NC1 to NC4 of batches: tests/test_neural_collapse_metrics.py",
    "OPIS": "accumulates opis: tests/test_embedding_metrics.py",
    "Tolerance": "accumulates tolerance: tests/test_embedding_metrics.py",
    "Uniformity": "accumulates uniformity: tests/test_embedding_metrics.py",
    "BettiNumberError": "accumulates betti_number_error: tests/test_betti_matching.py",
    # reports about a call, in Python numbers
    "gated_flops": "counts of operations: tests/test_gating.py",
    "tensor_attention_cost": "counts of operations: tests/test_tensor_attention_api.py",
    "tensor_attention_error": "a dict of bounds: tests/test_tensor_attention_lowrank_api.py",
    # numbers by an epoch, and data that are drawn
    "aggregate_risk": "of Python numbers, by simulation: tests/test_aggregate.py",
    "balanced_loss_weight": "a Python number: tests/test_dataset_distillation.py",
    "clip_schedule": "a Python number: tests/test_dataset_distillation.py",
    "dp_aggregate": "draws noise: tests/test_aggregate.py",
    "optimal_bag_size": "of Python numbers, by simulation: tests/test_aggregate.py",
    "lanczos_ritz_dataset": "draws a data set: tests/test_dcdm.py",
    # settings
    "backend": "a context manager: test_backends_agree and its like of every op",
    "show_config": "a printed text: its example in tests/test_public_api.py",
}


def public_callables() -> dict[str, object]:
    modules = (pyloss, pyloss.functional, pyloss.nn, pyloss.metrics)
    modules += (pyloss.nn.lie, pyloss.optim, pyloss.optim.lr_scheduler)
    modules += (pyloss.aggregate, pyloss.regularizers)
    named = {name: getattr(m, name) for m in modules for name in m.__all__}
    return {name: value for name, value in named.items() if callable(value)}


def test_every_public_callable_has_a_spec():
    specs = SPECS.values()
    covered = [x for s in specs for x in (s.function, s.module, *s.covers) if x is not None]
    missing = [n for n, value in public_callables().items()
               if not any(value is x for x in covered) and n not in WITHOUT_SPEC]  # fmt: skip
    assert not missing, f"write a Spec in tests/specs for {', '.join(missing)}"


def test_every_spec_says_what_nothing_and_nan_do():
    def may_hold_nan(spec):
        return any(t.is_floating_point() for t in spec.first().inputs.values())

    assert not [s.name for s in SPECS.values() if not s.empty or (not s.nan and may_hold_nan(s))]


def test_exemptions_are_needed():
    covered = {getattr(s.function, "__name__", "") for s in SPECS.values()}
    assert set(WITHOUT_SPEC) <= set(public_callables())
    assert not set(WITHOUT_SPEC) & covered
