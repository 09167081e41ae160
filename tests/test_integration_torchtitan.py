"""ChunkedLMHeadLoss: a sum over tokens divided by a global count, with the output layer inside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pyloss.integrations.torchtitan import ChunkedLMHeadLoss

VOCABULARY = 37


def case(bias: bool = False) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    head = nn.Linear(6, VOCABULARY, bias=bias, dtype=torch.float64)
    hidden = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (4, 5))
    labels[0, :3] = -100
    return head, hidden, labels


def loss_of(head: nn.Module, **options) -> ChunkedLMHeadLoss:
    made = ChunkedLMHeadLoss(**options)
    made.set_lm_head(head)
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [None, 41, torch.tensor(41)])
def test_sum_over_a_global_count(bias: bool, count: object) -> None:
    head, hidden, labels = case(bias)
    loss, metrics = loss_of(head, chunk=3)(hidden, labels, count)
    want = cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    want = want / (1 if count is None else 41)
    torch.testing.assert_close(loss, want)
    wrt = (hidden, *head.parameters())
    for got, expected in zip(torch.autograd.grad(loss, wrt), torch.autograd.grad(want, wrt)):
        torch.testing.assert_close(got, expected)
    assert metrics == {}


def test_micro_batches_add_up() -> None:
    head, hidden, labels = case()
    loss_fn = loss_of(head, metrics=("accuracy", "entropy", "z_loss"), z_loss=0.1)
    count = (labels != -100).sum()
    whole, of_whole = loss_fn(hidden, labels, count)
    parts = [loss_fn(h, y, count) for h, y in zip(hidden.split(1), labels.split(1))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    logits, kept = head(hidden).flatten(0, 1), labels.flatten() != -100
    log_p = logits.log_softmax(-1)
    means = {
        "accuracy/mean": (logits.argmax(-1) == labels.flatten())[kept].double().mean(),
        "entropy/mean": -(log_p.exp() * log_p).sum(-1)[kept].mean(),
        "z_loss/mean": 0.1 * logits.logsumexp(-1).square()[kept].mean(),
    }
    assert of_whole.keys() == means.keys()
    for name, want in means.items():
        torch.testing.assert_close(of_whole[name], want)
        torch.testing.assert_close(sum(m[name] for _, m in parts), want)
        assert not of_whole[name].requires_grad


def test_several_predictions() -> None:
    head, hidden, labels = case()
    loss_fn = loss_of(head, metrics=("accuracy",))
    other = torch.randn_like(hidden)
    loss, metrics = loss_fn((hidden, other), (labels, labels.flip(0)), 20)
    single = [loss_fn(h, y, 20) for h, y in ((hidden, labels), (other, labels.flip(0)))]
    torch.testing.assert_close(loss, single[0][0] + single[1][0])
    torch.testing.assert_close(metrics["accuracy/mean"], sum(m["accuracy/mean"] for _, m in single))


def test_nothing_to_learn_from_and_half_types() -> None:
    head, hidden, labels = case()
    loss, _ = loss_of(head)(hidden, torch.full_like(labels, -100), 7)
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()
    half = loss_of(copy.deepcopy(head).bfloat16())(hidden.bfloat16(), labels, 17)[0]
    assert half.dtype == torch.float32
    assert abs(half.item() - loss_of(head)(hidden, labels, 17)[0].item()) < 0.02


def test_the_output_layer_stays_the_models() -> None:
    head, hidden, labels = case()
    loss_fn = loss_of(head)
    assert not list(loss_fn.parameters()) and not loss_fn.state_dict()
    seen = []
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    loss_fn(hidden, labels)
    assert seen == ["before", "after"] and "forward" not in vars(head)
    assert repr(ChunkedLMHeadLoss(chunk=2)) == (
        "ChunkedLMHeadLoss(ignore_index=-100, metrics=(), chunk=2)"
    )


def test_errors() -> None:
    head, hidden, labels = case()
    with pytest.raises(RuntimeError, match="needs set_lm_head"):
        ChunkedLMHeadLoss()(hidden, labels)
    with pytest.raises(TypeError, match="lm_head must be a torch.nn.Linear, got Embedding"):
        loss_of(nn.Embedding(2, 2))
    with pytest.raises(TypeError, match="loss_options has 'reduction'; there are.*z_loss"):
        ChunkedLMHeadLoss(reduction="mean")
    with pytest.raises(ValueError, match="metrics must be of accuracy.*'recall'"):
        ChunkedLMHeadLoss(metrics=("recall",))
    loss_fn = loss_of(head)
    with pytest.raises(TypeError, match="two tuples of the same number"):
        loss_fn((hidden,), labels)
    with pytest.raises(ValueError, match=r"labels must have the shape.*\[4, 5\], got \[4, 4\]"):
        loss_fn(hidden, labels[:, 1:])
