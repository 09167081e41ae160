"""Modules: equal to the functions, copied, pickled, saved and printed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import pyloss
from pyloss.testing import make_logits, make_target

WEIGHT = torch.linspace(0.5, 2.0, 7)

# name -> (module, the same as a function of logits and target)
CASES = {
    "cross_entropy": (lambda: pyloss.nn.CrossEntropyLoss(), lambda x, y: _ce(x, y)),
    "cross_entropy_options": (
        lambda: pyloss.nn.CrossEntropyLoss(
            WEIGHT, ignore_index=3, reduction="sum", label_smoothing=0.1, z_loss=0.1
        ),
        lambda x, y: _ce(
            x, y, WEIGHT, ignore_index=3, reduction="sum", label_smoothing=0.1, z_loss=0.1
        ),
    ),
    "comp_sum": (
        lambda: pyloss.nn.CompSumLoss(1.5),
        lambda x, y: pyloss.comp_sum_loss(x, y, 1.5),
    ),
    "comp_sum_weight": (
        lambda: pyloss.nn.CompSumLoss(0.5, weight=WEIGHT, reduction="none"),
        lambda x, y: _ce(x, y, WEIGHT, tau=0.5, reduction="none"),
    ),
    "gce": (
        lambda: pyloss.nn.GeneralizedCrossEntropyLoss(),
        lambda x, y: _ce(x, y, tau=1.7),
    ),
    "gce_truncated": (
        lambda: pyloss.nn.GeneralizedCrossEntropyLoss(q=0.5, k=0.3),
        lambda x, y: _ce(x, y, tau=1.5, truncate=0.3),
    ),
    "focal": (lambda: pyloss.nn.FocalLoss(), lambda x, y: pyloss.focal_loss(x, y, 2.0)),
    "focal_gamma": (
        lambda: pyloss.nn.FocalLoss(0.5, reduction="none"),
        lambda x, y: pyloss.focal_loss(x, y, 0.5, reduction="none"),
    ),
}


def _ce(*args, **kwargs):
    return pyloss.fused_cross_entropy(*args, **kwargs)


@pytest.fixture(params=CASES)
def case(request):
    build, function = CASES[request.param]
    return build(), function


def _sample():
    return make_logits((9, 7)), make_target((9, 7))


def test_module_equals_function(case):
    module, function = case
    x, y = _sample()
    assert torch.equal(module(x, y), function(x, y))
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())


def test_deepcopy_and_pickle(case):
    module, _ = case
    x, y = _sample()
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(clone) is type(module) and repr(clone) == repr(module)
        assert torch.equal(clone(x, y), module(x, y))


def test_torch_save(case):
    module, _ = case
    x, y = _sample()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    clone = torch.load(file, weights_only=False)
    assert torch.equal(clone(x, y), module(x, y))


def test_state_dict(case):
    module, _ = case
    state = module.state_dict()
    clone = copy.deepcopy(module)
    clone.load_state_dict(state)
    x, y = _sample()
    assert torch.equal(clone(x, y), module(x, y))


def test_state_dict_is_that_of_torch():
    """Class weights are a buffer of the same name, so that checkpoints can be exchanged."""
    ours = pyloss.nn.CrossEntropyLoss(WEIGHT)
    theirs = torch.nn.CrossEntropyLoss(WEIGHT)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    assert pyloss.nn.CrossEntropyLoss().state_dict().keys() == (
        torch.nn.CrossEntropyLoss().state_dict().keys()
    )


def test_weight_moves_with_the_module():
    module = pyloss.nn.CrossEntropyLoss(WEIGHT).double()
    x, y = _sample()
    expected = pyloss.fused_cross_entropy(x.double(), y, WEIGHT.double())
    assert torch.equal(module(x.double(), y), expected)


def test_repr():
    text = repr(pyloss.nn.CompSumLoss(1.5, label_smoothing=0.25))
    assert text.startswith("CompSumLoss(") and "1.5" in text and "0.25" in text
    text = repr(pyloss.nn.GeneralizedCrossEntropyLoss(q=0.625, k=0.3))
    assert "0.625" in text and "0.3" in text
    assert "3.5" in repr(pyloss.nn.FocalLoss(3.5))
    assert repr(pyloss.nn.CrossEntropyLoss(ignore_index=17)).count("17") == 1


def test_accepts_the_arguments_of_torch():
    x, y = _sample()
    options = dict(weight=WEIGHT, ignore_index=2, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(
        pyloss.nn.CrossEntropyLoss(**options)(x, y), torch.nn.CrossEntropyLoss(**options)(x, y)
    )


def test_as_the_loss_of_a_model():
    model = torch.nn.Linear(5, 7)
    loss = pyloss.nn.CrossEntropyLoss()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, y = make_logits((32, 5)), make_target((32, 7))
    first = None
    for _ in range(20):
        value = loss(model(inputs), y)
        first = first or value.item()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert value.item() < first
