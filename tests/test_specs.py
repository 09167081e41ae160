"""Every public callable through every check that its Spec promises; `-k` takes either name."""

from __future__ import annotations

import pytest
import torch

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
        pytest.param(spec, name, id=f"{spec.name}-{name}")
        for spec in SPECS.values()
        for name, (applies, _) in CHECKS.items()
        if applies(spec)
    ],
)
def test_spec(spec, check):
    assert_spec(spec, check)


# --------------------------------------------------------------------------------------------------
# The tester itself


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
