"""Learnable commutative monoids: trees, what they do not depend on, and the peer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyloss
from pyloss.functional import _tree, segment_gru_reduce, segment_tree_reduce
from pyloss.functional.aggregation import shuffled
from pyloss.nn import LCMAggregation
from pyloss.regularizers import associativity_loss, commutativity_loss
from pyloss.segment import offsets_from_lengths

LENGTHS = torch.tensor([0, 1, 2, 3, 0, 4, 5, 7, 8, 9, 64, 17, 0])
OPS = ("gru", "mlp", "pullback", "sum", "max", "logsumexp", "prod")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(*sizes, **options) -> LCMAggregation:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LCMAggregation(*sizes, **options).double()


@pytest.mark.parametrize("known", [True, False])
def test_tree(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth and number of pairs, and the bounds where no length can be read."""
    monkeypatch.setattr(_tree, "can_look_at", lambda offsets: known)
    for lengths in (LENGTHS, torch.full((5,), 6), torch.tensor([33]), torch.ones(4).long()):
        total = int(lengths.sum())
        tree = _tree.tree_of(offsets_from_lengths(lengths), total)
        depth = math.ceil(math.log2(int(lengths.max()) if known else total))
        assert len(tree.levels) == depth
        pairs = torch.cat([*tree.levels, torch.empty(0, 2).long()])
        real = pairs[(pairs < total).all(1)]
        assert len(real) == total - int((lengths > 0).sum())
        assert len(real[:, 1].unique()) == len(real)  # no row is a right child twice
        assert len(pairs) == len(real) if known else len(pairs) < 1.3 * total


def test_without_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU and a compiled graph do: rows that count nowhere change nothing. The length of the
    longest segment saves levels."""
    offsets, layer = offsets_from_lengths(LENGTHS), made(5, 5, project=False)
    x = random(int(offsets[-1]), 5).requires_grad_()

    def found() -> tuple[torch.Tensor, ...]:
        y = layer(x, offsets=offsets)
        return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    expected = found()
    monkeypatch.setattr(_tree, "can_look_at", lambda offsets: False)
    torch.testing.assert_close(found(), expected, rtol=1e-12, atol=1e-12)
    assert len(_tree.tree_of(offsets, len(x), 64).levels) == 6
    weights = (
        getattr(layer.gru_cell, f"{k}_{p}") for k in ("weight", "bias") for p in ("ih", "hh")
    )
    told = segment_gru_reduce(x, offsets, *weights, max_length=64)
    torch.testing.assert_close(told, expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_is_the_cell(symmetric: bool) -> None:
    offsets = offsets_from_lengths(LENGTHS)
    cell = made(6, 6).gru_cell
    x, e = random(int(offsets[-1]), 6).requires_grad_(), random(6, seed=1).requires_grad_()
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)

    def op(a, b):
        return (cell(a, b) + cell(b, a)) / 2 if symmetric else cell(a, b)

    results = (
        segment_gru_reduce(x, offsets, *weights, identity=e, symmetric=symmetric),
        segment_tree_reduce(x, offsets, op, identity=e),
    )
    g = random(len(LENGTHS), 6, seed=2)
    for a, b in zip(*((y, *torch.autograd.grad(y, [x, e, *weights], g)) for y in results)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_a_set_does_not_see_the_others(op: str) -> None:
    """In a batch with larger ones it is what it is alone; so is its gradient."""
    layer, x = made(4, 6, op=op), random(5 + 64 + 3, 4)
    alone = layer(x[:5])
    both = layer(x, ptr=torch.tensor([0, 5, 69, 69, 72]))
    torch.testing.assert_close(both[:1], alone, rtol=1e-12, atol=1e-12)
    index = torch.repeat_interleave(torch.tensor([0, 1, 3]), torch.tensor([5, 64, 3]))
    assert torch.equal(layer(x, index), both)
    assert torch.equal(layer(x, index, dim_size=6)[4:], both[2:3].expand(2, -1))
    empty = layer.phi(both.new_zeros(6), inverse=True) if op == "pullback" else layer.identity
    torch.testing.assert_close(both[2], empty)
    plain = made(4, 6, op=op, identity="zero")
    assert not plain(x, index)[2].any() and plain.identity is None


@pytest.mark.parametrize(
    ("op", "of_rows"),
    [("sum", lambda x: x.sum(0)), ("max", lambda x: x.amax(0)),
     ("logsumexp", lambda x: x.logsumexp(0)), ("prod", lambda x: x.prod(0))],
)  # fmt: skip
def test_named_operators(op: str, of_rows) -> None:
    offsets = offsets_from_lengths(LENGTHS)
    x, layer = random(int(offsets[-1]), 3), made(3, 3, op=op, project=False)
    ends = offsets.tolist()
    expected = [of_rows(x[a:b]) if a < b else torch.zeros(3) for a, b in zip(ends, ends[1:])]
    expected = torch.stack([t.double() for t in expected])
    torch.testing.assert_close(layer(x, offsets=offsets), expected, rtol=1e-12, atol=1e-12)
    tree = segment_tree_reduce(x, offsets, layer.combine, identity=0.0)
    torch.testing.assert_close(tree, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_what_is_exact(op: str) -> None:
    """Every operator is commutative; all but those that learn it are associative."""
    layer, x, offsets = made(4, 6, op=op), random(40, 6), torch.tensor([0, 3, 40])
    generator = torch.Generator().manual_seed(0)
    assert commutativity_loss(layer.combine, x, offsets, generator=generator) < 1e-28
    apart = associativity_loss(layer.combine, x, offsets, generator=generator)
    assert (apart > 1e-4) if op in ("gru", "mlp") else (apart < 1e-10)


def test_triples_of_all_levels() -> None:
    """Of one segment of 12: nodes of one, two and four elements, each of them once at most."""
    seen = set()

    def op(a, b):
        return a + b

    x = (2.0 ** torch.arange(12, dtype=torch.float64)).unsqueeze(1)  # a sum says what is in it
    offsets, generator = torch.tensor([0, 12]), torch.Generator().manual_seed(0)
    nodes, valid = pyloss.regularizers.monoids._sampled_nodes(
        op, x, offsets, 3, 200, generator, "mean"
    )
    assert valid.all()
    for triple in nodes.squeeze(2).long().tolist():
        sizes = [bin(t).count("1") for t in triple]
        assert len(set(sizes)) == 1 and triple[0] | triple[1] | triple[2] == sum(triple)
        seen.add(sizes[0])
    assert seen == {1, 2, 4}


def test_shuffled() -> None:
    offsets = offsets_from_lengths(LENGTHS)
    total, generator = int(offsets[-1]), torch.Generator().manual_seed(0)
    order = shuffled(offsets, total, generator)
    assert torch.equal(order.sort().values, torch.arange(total))
    ids = pyloss.segment.segment_ids(offsets, total)
    assert torch.equal(ids[order], ids) and not torch.equal(order, torch.arange(total))
    layer, x = made(4, 4, shuffle=True), random(9, 4)
    first, again = (layer(x, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(first, again)
    layer.eval()
    assert torch.equal(layer(x), made(4, 4)(x))


def test_the_penalty_makes_order_matter_less() -> None:
    """100 steps on the second smallest of 8 numbers: the spread over permutations. The operator
    begins far from associative, or there would be little to see after so few steps."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(12, 8, generator=generator)
    y, offsets = x.sort(1).values[:, 1], 8 * torch.arange(13)
    orders = torch.rand(8, 8, generator=generator).argsort(1)

    def spread(strength: float) -> tuple[float, float]:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            layer, head = LCMAggregation(1, 8), nn.Linear(8, 1)
        with torch.no_grad():
            for p in layer.gru_cell.parameters():
                p *= 3
        draws = torch.Generator().manual_seed(2)
        optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(100):
            loss = nn.functional.mse_loss(head(layer(x.view(-1, 1), offsets=offsets))[:, 0], y)
            penalty = 0.0
            if strength:
                elements = layer.elements(x.view(-1, 1))
                penalty = strength * associativity_loss(
                    layer.combine, elements, offsets, samples=32, generator=draws
                )
            optimiser.zero_grad()
            (loss + penalty).backward()
            optimiser.step()
        with torch.no_grad():
            found = [head(layer(x[:, o].reshape(-1, 1), offsets=offsets)) for o in orders]
        return torch.stack(found).std(0).mean().item(), loss.item()

    plain, plain_loss = spread(0.0)
    taught, taught_loss = spread(1.0)
    assert taught < 0.5 * plain, (plain, taught)
    assert taught_loss < plain_loss + 0.01


# --------------------------------------------------------------------------------------------------
# torch_geometric


def test_equals_the_dense_peer_on_equal_degrees() -> None:
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    peer = aggr.LCMAggregation(4, 6).double()
    ours = pyloss.nn.LCMAggregation(4, 6).double()
    assert ours.load_state_dict(peer.state_dict(), strict=False).missing_keys == ["identity"]
    x = random(7 * 11, 4).requires_grad_()
    index = torch.arange(7).repeat_interleave(11)
    found, expected = ours(x, index), peer(x, index)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    g = random(7, 6, seed=1)
    for p, q in zip([x, *peer.parameters()], [x, *(ours.get_parameter(n) for n, _ in
                                                   peer.named_parameters())]):  # fmt: skip
        a, b = (
            torch.autograd.grad(expected, p, g, retain_graph=True),
            torch.autograd.grad(found, q, g, retain_graph=True),
        )
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # A larger set beside it: the peer's answer changes by more than half, ours not at all.
    x, index = torch.cat([x, random(64, 4, seed=2)]), torch.cat([index, torch.full((64,), 7)])
    assert (peer(x, index)[:7] - expected).abs().max() > 0.1
    torch.testing.assert_close(ours(x, index)[:7], found, rtol=1e-12, atol=1e-12)


def test_in_message_passing() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    from pyloss.integrations import torch_geometric as bridge

    layer = geometric.SimpleConv(aggr=bridge.LCMAggregation(4, 4, op="sum", project=False))
    edges = torch.tensor([[0, 2, 1, 3, 0], [0, 0, 2, 2, 2]])
    x = torch.randn(4, 4)
    plain = geometric.SimpleConv(aggr="sum")
    torch.testing.assert_close(layer(x, edges), plain(x, edges))
    with pytest.raises(ValueError, match="index must not decrease"):
        layer(x, edges.flip(1))
    assert "op='sum', project=False" in repr(layer.aggr_module)
    layer.aggr_module.reset_parameters()
