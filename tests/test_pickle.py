"""The modules of row losses beside those of torch, and in training.

That modules equal their functions, and survive copying, pickling and saving: `test_specs.py`.
"""

from __future__ import annotations

import torch

import pyloss
from pyloss.testing import make_logits, make_target

WEIGHT = torch.linspace(0.5, 2.0, 7)


def _sample():
    return make_logits((9, 7)), make_target((9, 7))


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
