"""Gated convolutions: masks where the published code fails, gradients, counts, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.functional import mask_prediction_loss, mass_topk_mask
from pyloss.nn import DynamicGate, GatedConv, gated_flops

# --------------------------------------------------------------------------------------------------
# Masks


def test_one_channel_that_dominates_is_kept() -> None:
    act = torch.tensor([[0.1, 9.0, 0.1, 0.1]])
    assert not mass_topk_mask(act, 0.9, min_channels=0).any()  # as published: nothing is left
    assert mass_topk_mask(act, 0.9).tolist() == [[False, True, False, False]]
    assert mass_topk_mask(act, 0.9, inclusive=True, min_channels=0).equal(mass_topk_mask(act, 0.9))


def test_a_sample_without_activation_keeps_the_first_channels() -> None:
    act = torch.stack([torch.zeros(4, 2, 2), torch.ones(4, 2, 2)])
    for r in (0.0, 0.5, 0.99, 1.0):
        found = mass_topk_mask(act, r, min_channels=2)
        assert found[0].tolist() == [True, True, False, False]
    assert found[1].all()


def test_a_sum_that_is_r_but_for_rounding_stays() -> None:
    assert (torch.ones(6) / 6).cumsum(0)[4] > 5 / 6
    assert mass_topk_mask(torch.ones(1, 6), 5 / 6).sum() == 5


def test_the_mask_grows_with_r() -> None:
    act = torch.randn(8, 16, 5, 5, generator=torch.Generator().manual_seed(0)).relu()
    counts, last = {}, torch.zeros(8, 16, dtype=torch.bool)
    for r in (0.0, 0.3, 0.6, 0.9, 0.99, 1.0):
        found = mass_topk_mask(act, r)
        assert (found | ~last).all()
        counts[r], last = found.sum(1), found
    for r, low, high in ((0.3, 2, 4), (0.9, 12, 14), (0.99, 15, 15), (1.0, 16, 16)):
        assert counts[r].ge(low).all() and counts[r].le(high).all(), counts[r]


def test_sizes_whose_sum_overflows() -> None:
    act = torch.tensor([[3e38, 3e38, 1e30]])
    assert mass_topk_mask(act, 0.9, inclusive=True).tolist() == [[True, True, False]]
    infinite = torch.tensor([[torch.inf, 1.0, 2.0]])
    assert mass_topk_mask(infinite, 0.5).all()


# --------------------------------------------------------------------------------------------------
# Layers


def layer(*options, out: int = 4, **more) -> GatedConv:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, out, 3, padding=1), nn.BatchNorm2d(out)
    return GatedConv(conv, norm, nn.ReLU(), *options, **more)


def test_it_begins_as_the_plain_layer() -> None:
    gated, x = layer(ratio=0.3), torch.randn(2, 3, 5, 5)
    plain = nn.Sequential(gated.conv, gated.bn, gated.act)
    for mode in (True, False):
        gated.train(mode)
        assert torch.equal(gated(x), plain(x)) and gated.mask.all()


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_the_gate_reaches_the_input_only_when_joint(mode: str) -> None:
    gated, x = layer(mode=mode), torch.randn(2, 3, 5, 5, requires_grad=True)
    nn.init.normal_(gated.gate.weight)
    gated(x)
    alone, of_mask = (
        torch.autograd.grad(of, x, allow_unused=True, retain_graph=True)[0]
        for of in (gated.logits.sum(), gated.mask_loss())
    )
    assert (alone is None, of_mask is None) == ((True, True) if mode == "decoupled" else
                                                (False, False))  # fmt: skip


def test_straight_through() -> None:
    """The task's gradient goes to the scores as if they had been let through by their sigmoid."""
    gated, x = layer(), torch.randn(2, 3, 5, 5)
    nn.init.constant_(gated.gate.bias, -0.4)
    out = gated(x)
    assert not out.any() and not gated.mask.any()
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, gated.gate.bias, upstream)[0]
    passed = (upstream * gated.act(gated.bn(gated.conv(x)))).sum((2, 3))
    likely = torch.tensor(-0.4).sigmoid()
    torch.testing.assert_close(found, passed.sum(0) * likely * (1 - likely))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    conv = getattr(nn, f"Conv{dims}d")(2, 3, 2)
    x = torch.randn(2, 2, *[4] * dims)
    assert GatedConv(conv)(x).shape == conv(x).shape


def test_copies_after_a_forward() -> None:
    gated, x = layer(), torch.randn(2, 3, 5, 5)
    gated(x)
    assert gated.logits.grad_fn is not None and gated.target.shape == (2, 4)
    for clone in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert clone.logits is None and clone.target is None and clone.mask is None
        with pytest.raises(RuntimeError, match="mask_loss needs a forward in training mode"):
            clone.mask_loss()
    gated.eval()(x)
    assert gated.target is None


def test_half_inputs_under_autocast() -> None:
    gated, x = layer(), torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated(x)
        loss = out.float().square().mean() + gated.mask_loss()
    assert out.dtype == torch.bfloat16 and gated.mask_loss().dtype == torch.float32
    loss.backward()
    assert gated.gate.bias.grad.isfinite().all()
    assert gated.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_refused() -> None:
    with pytest.raises(TypeError, match="conv must be a convolution of torch.nn, got Linear"):
        GatedConv(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"gate must return \[2, 4\], .* got \[2, 5\]"):
        layer(DynamicGate(3, 5))(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="model must have a GatedConv, and has none"):
        gated_flops(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match="masks must be one of target, predicted, got 'all'"):
        gated_flops(layer(), torch.randn(1, 3, 5, 5), masks="all")


# --------------------------------------------------------------------------------------------------
# What is counted


def test_flops() -> None:
    first = layer(ratio=0.7)
    second = GatedConv(nn.Conv2d(4, 6, 3, stride=2, groups=2), act=nn.ReLU(), ratio=0.5)
    model = nn.Sequential(first, nn.MaxPool2d(2), second)
    second.gate.eval()
    x = torch.randn(5, 3, 12, 12)
    model(x)
    last, state = first.logits, copy.deepcopy(model.state_dict())
    flops = gated_flops(model, x)
    # Nothing has changed by it.
    assert first.logits is last and first.training and not second.gate.training
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))

    model.eval()
    opened = mass_topk_mask(first.act(first.bn(first.conv(x))), 0.7)
    hidden = F.max_pool2d(first.act(first.bn(first.conv(x))) * opened[:, :, None, None], 2)
    later = mass_topk_mask(second.act(second.conv(hidden)), 0.5)
    gated = opened.sum(1).mul(3 * 12 * 12 * 9).double().mean().item()
    of_second = (opened.sum(1) * later.sum(1)).double().mean().item() * 2 * 2 * 9 / 2
    assert flops.layers == {
        "0": (4 * 12 * 12 * 3 * 9, pytest.approx(gated)),
        "2": (6 * 2 * 2 * 4 / 2 * 9, pytest.approx(of_second)),
    }
    assert flops.gates == 3 * 4 + 4 * 6
    assert flops.saved == pytest.approx(1 - (flops.gated + flops.gates) / flops.dense)
    # Gates are open before they are trained.
    everything = gated_flops(model, x, masks="predicted")
    assert everything.gated == everything.dense == flops.dense


def blobs(generator: torch.Generator, count: int = 400) -> tuple[Tensor, Tensor]:
    """Images of a spot in one of four places."""
    y = torch.randint(4, (count,), generator=generator)
    places = torch.tensor([[2.0, 2.0], [2.0, 5.0], [5.0, 2.0], [5.0, 5.0]])[y]
    places = places + 0.5 * torch.randn(count, 2, generator=generator)
    pixels = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    spots = torch.exp(-torch.cdist(places, pixels).square() / 3).view(count, 1, 8, 8)
    return spots + 0.2 * torch.randn(spots.shape, generator=generator), y


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_gated_network_learns_as_well_with_less_work(keep_num_threads, seed: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    (x, y), (test, truth) = blobs(generator), blobs(generator)

    def trained(gated: bool) -> tuple[nn.Sequential, float]:
        torch.manual_seed(seed)

        def block(width: int, stride: int) -> nn.Module:
            conv = nn.Conv2d(width, 12, 3, stride, padding=1, bias=False)
            if gated:
                return GatedConv(conv, nn.BatchNorm2d(12), nn.ReLU(), ratio=0.9)
            return nn.Sequential(conv, nn.BatchNorm2d(12), nn.ReLU())

        model = nn.Sequential(
            block(1, 1), block(12, 2), block(12, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
        )
        gates = [m for m in model if isinstance(m, GatedConv)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(45):
            batch = torch.randint(400, (32,), generator=generator)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            if gates and step < 25:
                pairs = [(m.logits, m.target) for m in gates]
                loss = loss + mask_prediction_loss(*zip(*pairs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (model.eval()(test).argmax(1) == truth).float().mean().item()
        return model, 100 * right

    _, plain = trained(False)
    model, accuracy = trained(True)
    assert accuracy > plain - 2 and plain > 90
    assert gated_flops(model, test, masks="predicted").saved > 0.3
