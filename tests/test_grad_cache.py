"""GradCache: gradients of the whole batch, activations of one chunk. Under DDP:
tests/test_contrastive_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyloss
from pyloss.nn import GradCache

F64 = torch.float64


def encoder(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 4)
    return nn.Sequential(*layers).double()


def gradients(loss: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for m in modules for p in m.parameters()]))


LOSSES = {
    "NT-Xent": lambda: pyloss.nt_xent,
    "InfoNCE, both ways": lambda: lambda a, b: pyloss.info_nce(a, b, symmetric=True),
    "SigLIP": lambda: pyloss.siglip_loss,
    "iSogCLR": lambda: (
        lambda criterion: lambda a, b: criterion(a, b, torch.arange(len(a)))
    )(pyloss.nn.ISogCLRLoss(50).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_gradients_are_those_of_the_batch(name: str, chunk_size: int) -> None:
    net, (x1, x2) = encoder(), torch.randn(2, 11, 6, dtype=F64)
    expected = LOSSES[name]()(net(x1), net(x2))
    found = LOSSES[name]()(*GradCache(net, chunk_size=chunk_size)(x1, x2))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, net), gradients(expected, net))


def test_an_encoder_for_each_input_and_inputs_of_several_parts() -> None:
    image, text = encoder(), encoder()
    x, tokens = torch.randn(7, 6, dtype=F64), torch.randn(7, 6, dtype=F64, requires_grad=True)
    mask = torch.rand(7, 1, dtype=F64)

    def read(tokens, mask, scale):
        return text(tokens * mask * scale)

    def of(z1, z2):
        return pyloss.clip_loss(z1, z2, 5.0)

    cache = GradCache(image, read, chunk_size=2)
    z1, z2 = cache(x, dict(tokens=tokens, mask=mask, scale=2.0))
    found, expected = of(z1, z2), of(image(x), read(tokens, mask, 2.0))
    assert torch.equal(GradCache(read, chunk_size=3)((tokens, mask, 2.0)), z2)
    for wanted in ([*image.parameters()], [*text.parameters()], [tokens]):
        torch.testing.assert_close(
            torch.autograd.grad(found, wanted, retain_graph=True),
            torch.autograd.grad(expected, wanted, retain_graph=True),
        )
    assert {id(p) for p in cache.parameters()} == {id(p) for p in image.parameters()}


def test_dropout_is_replayed() -> None:
    net, x = encoder(0.5), torch.randn(10, 6, dtype=F64)
    torch.manual_seed(3)
    expected = torch.cat([net(c) for c in x.split(4)])
    following = torch.rand(1)
    torch.manual_seed(3)
    found = GradCache(net, chunk_size=4)(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.rand(1), following)
    torch.rand(5)  # the backward has its own numbers, and gives back these
    state = torch.get_rng_state()
    labels = torch.arange(10) % 3
    losses = [pyloss.supervised_contrastive(z, labels) for z in (found, expected)]
    torch.testing.assert_close(*(gradients(loss, net) for loss in losses))
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_is_that_of_the_forward() -> None:
    net, (x1, x2) = encoder().float(), torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = pyloss.nt_xent(*(torch.cat([net(c) for c in x.split(4)]) for x in (x1, x2)))
        z1, z2 = GradCache(net, chunk_size=4)(x1, x2)
        found = pyloss.nt_xent(z1, z2)
    assert z1.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, net), gradients(expected, net))


def test_one_chunk_at_a_time() -> None:
    """Its activations are formed in the backward, used, and gone before those of the next."""
    events = []

    class Log(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            events.append(f"forward {int(x[0, 0])}")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            events.append(f"backward {int(x[0, 0])}")
            return grad

    weight = torch.ones(1, requires_grad=True)
    x = torch.arange(6.0).unsqueeze(1)
    z = GradCache(lambda x: Log.apply(x * weight), chunk_size=2)(x)
    z.square().sum().backward()
    assert events[:3] == ["forward 0", "forward 2", "forward 4"]
    assert events[3:] == [f"{what} {at}" for at in (4, 2, 0) for what in ("forward", "backward")]


def test_second_derivatives() -> None:
    net, x = encoder(), torch.randn(7, 6, dtype=F64, requires_grad=True)
    cache = GradCache(net, chunk_size=3)
    labels = torch.arange(7) % 3

    def twice(encode):
        loss = pyloss.supervised_contrastive(encode(x), labels)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradients(grad.square().sum(), net[0])

    torch.testing.assert_close(twice(cache), twice(net))


@pytest.mark.exhaustive
def test_compiled_graphs() -> None:
    net, x = encoder(), torch.randn(7, 6, dtype=F64)
    cache = GradCache(net, chunk_size=3)
    compiled = torch.compile(cache, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(pyloss.nt_xent(*f(x, -x)), net) for f in (compiled, cache))
    torch.testing.assert_close(found, expected)


def test_without_gradients_and_without_rows() -> None:
    net = encoder()
    cache = GradCache(net, chunk_size=2)
    with torch.no_grad():
        z = cache(torch.randn(5, 6, dtype=F64))
    assert z.shape == (5, 4) and not z.requires_grad
    empty = cache(torch.randn(0, 6, dtype=F64))
    empty.sum().backward()
    assert empty.shape == (0, 4) and not net[0].weight.grad.any()


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "needs an encoder", lambda net, x: GradCache(chunk_size=2)),
        (ValueError, "chunk_size must be at least 1, got 0",
         lambda net, x: GradCache(net, chunk_size=0)),
        (TypeError, "chunk_size must be an integer", lambda net, x: GradCache(net, chunk_size=2.5)),
        (TypeError, "must be callable, got int", lambda net, x: GradCache(net, 3, chunk_size=2)),
        (ValueError, "an input for each of 2 encoders",
         lambda net, x: GradCache(net, net, chunk_size=2)(x)),
        (ValueError, "got 0 inputs", lambda net, x: GradCache(net, chunk_size=2)()),
        (TypeError, "input 0 must be a Tensor with rows",
         lambda net, x: GradCache(net, chunk_size=2)(3)),
        (ValueError, r"different numbers of rows: \[3, 4\]",
         lambda net, x: GradCache(net, chunk_size=2)((x, x[:3]))),
        (TypeError, "must return a Tensor, got tuple",
         lambda net, x: GradCache(lambda x: (x,), chunk_size=2)(x)),
        (ValueError, "as many rows as input 0 has, 4, got 2",
         lambda net, x: GradCache(lambda x: x[:1], chunk_size=2)(x)),
    ],
)  # fmt: skip
def test_bad_calls(error, words, call) -> None:
    with pytest.raises(error, match=words):
        call(encoder(), torch.randn(4, 6, dtype=F64))
