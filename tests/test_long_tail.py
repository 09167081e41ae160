"""Long-tailed classes: limits, the modules, what adjusting does. What every function promises:
tests/specs/long_tail.py."""

from __future__ import annotations

import copy
import pickle

import torch

import pyloss
from pyloss.functional import (
    class_balanced_weight,
    logit_adjusted_cross_entropy,
    logit_adjustment,
)
from pyloss.nn import LogitAdjustedCrossEntropyLoss


def test_weights_near_the_limits() -> None:
    """Where 1 - beta^n has lost its digits: 1e7 samples at beta 1 - 1e-9, and one sample."""
    counts = torch.tensor([10_000_000, 1])
    found = class_balanced_weight(counts.double(), 1 - 1e-9, normalize=False)
    torch.testing.assert_close(found[0] * 1e7, torch.tensor(1.005, dtype=torch.float64),
                               rtol=1e-4, atol=0)  # fmt: skip
    torch.testing.assert_close(found[1], torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert class_balanced_weight(counts).sum() == 2
    assert class_balanced_weight(counts).dtype == torch.float32


def test_adjusted_training_and_adjusted_prediction_agree() -> None:
    """The loss of x + a, and the label that is best on the average of the classes."""
    counts = torch.tensor([90, 9, 1])
    a = logit_adjustment(counts)
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    expected = torch.nn.functional.cross_entropy(x + a, y)
    torch.testing.assert_close(logit_adjusted_cross_entropy(x, y, counts), expected)
    # A model of the joint distribution that knows nothing of x: no class is preferred.
    prior = counts / counts.sum()
    torch.testing.assert_close(prior.log() - a, torch.zeros(3))
    plain = logit_adjusted_cross_entropy(x, y, counts, 0.0)
    torch.testing.assert_close(plain, pyloss.fused_cross_entropy(x, y))


def test_module() -> None:
    counts, weight = [90, 9, 1], class_balanced_weight([90, 9, 1])
    module = LogitAdjustedCrossEntropyLoss(counts, 0.7, weight, label_smoothing=0.1)
    x, y = torch.randn(6, 3), torch.arange(6) % 3
    expected = logit_adjusted_cross_entropy(x, y, counts, 0.7, weight=weight, label_smoothing=0.1)
    assert torch.equal(module(x, y), expected)
    loss, stats = module(x, y, return_stats=["correct"])
    assert torch.equal(loss, expected) and stats.correct.dtype == torch.bool
    fresh = LogitAdjustedCrossEntropyLoss([1, 1, 1], 0.7, torch.ones(3), label_smoothing=0.1)
    fresh.load_state_dict(module.state_dict())
    for twin in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, y), expected) and repr(twin) == repr(module)
    assert "adjustment_tau=0.7, label_smoothing=0.1" in repr(module)
    assert set(module.state_dict()) == {"adjustment", "weight"}
