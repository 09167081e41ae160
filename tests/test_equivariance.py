"""EquivarianceRegularizer and its groups: ranks, projectors, what a penalty of 0 means, tuning."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from pyloss.functional import equivariance_error
from pyloss.regularizers import EquivarianceRegularizer, SymmetryType

F64 = torch.float64
EXAMPLES = Path(__file__).parent.parent / "examples"
SCALAR, VECTOR, TENSOR = [(1, "scalar")], [(1, "vector")], [(1, "tensor2")]
HIDDEN = [(2, "scalar"), (3, "vector"), (1, "tensor2")]
G = SymmetryType
GROUPS = (
    G.SO(3), G.O(3), G.O2("xy"), G.SO2("yz"), G.scaling(3), G.SL(3), G.GL(2), G.permutation(3),
    G.translation(2), G.SO(3) * G.scaling(3),
)  # fmt: skip


def names(groups) -> dict:
    return dict(argvalues=groups, ids=lambda g: g.name)


@pytest.mark.parametrize(
    ("group", "rep_in", "rep_out", "rank"),
    [
        (G.SO(3), [(2, "vector")], TENSOR, 2),
        (G.SO2("xy"), VECTOR, VECTOR, 3),
        (G.scaling(3), VECTOR, TENSOR, 0),
        (G.scaling(3), VECTOR, VECTOR, 9),
        (G.O(3), VECTOR, TENSOR, 0),  # the cross product is of rotations alone
        (G.O(3), TENSOR, TENSOR, 3),  # trace, symmetric, antisymmetric part
        (G.permutation(4), TENSOR, TENSOR, 15),  # Bell numbers
        (G.permutation(4), VECTOR, VECTOR, 2),
        (G.GL(2), TENSOR, TENSOR, 2),  # Schur and Weyl: the permutations of two places
        (G.SL(2), SCALAR, TENSOR, 1),  # the determinant
        (G.SL(2), [(1, "covector")], VECTOR, 1),  # and what it makes of a covector
        (G.GL(2), [(1, "covector")], VECTOR, 0),
        (G.translation(2), SCALAR, [(1, "covector")], 1),  # the coordinate that is 1
        (G.SO(3) * G.scaling(3), VECTOR, VECTOR, 1),
    ],
)
def test_ranks(group: G, rep_in, rep_out, rank: int):
    assert group.rank(rep_in, rep_out) == rank


@pytest.mark.parametrize("group", **names(GROUPS))
def test_projectors(group: G):
    """P is an orthogonal projector of the right rank, and what it leaves is equivariant."""
    rep_in, rep_out = [(1, "scalar"), (1, "vector")], [(1, "vector"), (1, "covector"), (1, (1, 1))]
    p = group.projector(rep_in, rep_out)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, p.t(), rtol=0, atol=1e-12)
    assert round(p.trace().item()) == group.rank(rep_in, rep_out)
    into, out = group.sample(rep_in, rep_out, n=5, generator=torch.Generator().manual_seed(0))
    w = (p @ torch.randn(len(p), dtype=F64)).view(out.shape[-1], into.shape[-1])
    torch.testing.assert_close(w @ into, out @ w, rtol=1e-9, atol=1e-9)


def test_the_average_over_a_compact_group_is_the_projector():
    """Reynolds: over permutations, and over rotations by multiples of a small angle."""
    rep_in, rep_out = [(1, "vector"), (1, "tensor2")], [(1, "scalar"), (1, "vector")]

    def average(elements):
        total = 0.0
        for g in elements:
            into = torch.block_diag(g, torch.kron(g, g))
            out = torch.block_diag(torch.ones(1, 1, dtype=F64), g)
            total = total + torch.kron(out, into.inverse().t().contiguous())
        return total / len(elements)

    eye = torch.eye(3, dtype=F64)
    permutations = [eye[list(order)] for order in itertools.permutations(range(3))]
    turns = [torch.linalg.matrix_exp(2 * math.pi * i / 8 * G.SO2("xy").lie[0]) for i in range(8)]
    flip = G.O2("xy").discrete[0]
    for group, elements in (
        (G.permutation(3), permutations),
        (G.SO2("xy"), turns),  # tensors have frequencies up to 3
        (G.O2("xy"), turns + [flip @ t for t in turns]),
    ):
        found = group.projector(rep_in, rep_out)
        torch.testing.assert_close(found, average(elements), rtol=0, atol=1e-12)


def layer(rep_in=HIDDEN, rep_out=HIDDEN, bias: bool = True, dim: int = 3) -> nn.Linear:
    sizes = {"scalar": 1, "vector": dim, "tensor2": dim * dim}
    into, out = (sum(n * sizes[kind] for n, kind in rep) for rep in (rep_in, rep_out))
    return nn.Linear(into, out, bias, dtype=F64)


@pytest.mark.parametrize("group", **names([G.O(3), G.SO2("xy"), G.scaling(3), G.SL(2)]))
def test_blocks_are_the_dense_projector(group: G):
    rep = [(2, "scalar"), (2, "vector")]
    one = layer(rep, rep, dim=group.dim)
    penalty = EquivarianceRegularizer([(one, rep, rep)], [group])
    w, b = one.weight.detach().flatten().clone(), one.bias.detach()
    dense = (w - group.projector(rep, rep) @ w).square().sum()
    dense = (dense + (b - group.projector(SCALAR, rep) @ b).square().sum()) / 2
    torch.testing.assert_close(penalty(), dense, rtol=1e-12, atol=1e-12)
    without = EquivarianceRegularizer([(one, rep, rep)], [group], include_bias=False)
    dense = (w - group.projector(rep, rep) @ w).square().sum() / 2
    torch.testing.assert_close(without(), dense, rtol=1e-12, atol=1e-12)
    target = group.projector(rep, rep) @ w
    penalty.project_(0, 0.25)
    torch.testing.assert_close(one.weight.flatten(), 0.75 * w + 0.25 * target)


def test_zero_where_the_layer_is_equivariant_and_nowhere_else():
    one = layer()
    types = (G.O(3), G.O2("xy"), G.O2("yz"))
    penalty = EquivarianceRegularizer([(one, HIDDEN, HIDDEN)], types)
    x = torch.randn(7, 20, dtype=F64)

    def errors():
        return [equivariance_error(one, x, *t.sample(HIDDEN, HIDDEN, n=4)).item() for t in types]

    assert penalty.per_type().min() > 0.1 and min(errors()) > 0.1
    penalty.project_("O(2) xy")
    r, e = penalty.per_type(), errors()
    assert r[1] < 1e-24 and e[1] < 1e-12
    assert r[0] > 0.01 and r[2] > 0.01 and e[0] > 0.01 and e[2] > 0.01
    penalty.project_(0)
    assert penalty.per_type().max() < 1e-24 and max(errors()) < 1e-12


def test_the_error_has_no_unit():
    """Squares of its norms would be infinite, or 0."""
    rho = G.SO(3).sample(VECTOR, n=4, generator=torch.Generator().manual_seed(0))[0]
    x, scale = torch.randn(5, 3), torch.tensor([1.0, 2.0, 3.0])
    expected = equivariance_error(lambda v: v * scale, x, rho, rho)
    for size in (1e-30, 1e30):
        found = equivariance_error(lambda v: v * scale, x * size, rho, rho)
        torch.testing.assert_close(found, expected)
    assert equivariance_error(lambda v: v[:, :0], x, rho, rho[:, :0, :0]) == 0


def test_its_gradient_leads_to_the_projection():
    one = layer()
    penalty = EquivarianceRegularizer([(one, HIDDEN, HIDDEN)], [G.O(3)])
    before = copy.deepcopy(one)
    penalty().backward()
    with torch.no_grad():  # of half a squared distance
        one.weight -= one.weight.grad
        one.bias -= one.bias.grad
    EquivarianceRegularizer([(before, HIDDEN, HIDDEN)], [G.O(3)]).project_()
    torch.testing.assert_close(one.weight, before.weight)
    torch.testing.assert_close(one.bias, before.bias)


def made(strength=(0.0, 0.3, 0.3), warmup: int = 2) -> tuple[nn.Linear, EquivarianceRegularizer]:
    one = layer(VECTOR, VECTOR)
    types = [G.O(3), G.O2("xy"), G.O2("xz")]
    layers = [(one, VECTOR, VECTOR)]
    return one, EquivarianceRegularizer(layers, types, strength=strength, warmup=warmup)


def test_retune_on_fixed_numbers():
    _, penalty = made()
    penalty.recorded.copy_(torch.tensor([0.001, 0.0033, 0.199]))
    found = penalty.retune_(2.0)  # the first, of strength 0, is not the smallest
    torch.testing.assert_close(found, torch.tensor([0, 0.3, 0.3 * (0.0033 / 0.199) ** 2]).double())
    assert found is penalty.strength and penalty.recorded.isinf().all()
    penalty.recorded.copy_(torch.tensor([0.0, 0.0, 0.5]))
    torch.testing.assert_close(penalty.retune_(1.0), torch.tensor([0, 0.3, 0]).double())


def test_a_layer_may_have_no_bias():
    one = nn.Module()
    one.weight = nn.Parameter(torch.randn(3, 3))
    other = nn.Linear(3, 3, bias=False)
    other.weight = one.weight
    found, expected = (
        EquivarianceRegularizer([(m, VECTOR, VECTOR)], [G.O(3)]) for m in (one, other)
    )
    assert torch.equal(found(), expected())


def test_observe_keeps_a_vector_in_which_something_is_smallest():
    one, penalty = made()
    bias = one.bias.data.zero_()
    seen = []

    def at(*diagonal: float):
        one.weight.data.copy_(torch.diag(torch.tensor(diagonal, dtype=F64)))
        seen.append(penalty.observe_().double())

    at(1, 1, 1), at(1, 2, 2)  # the warmup: nothing is kept
    assert penalty.recorded.isinf().all() and penalty.observed == 2
    at(1, 2, 4)
    torch.testing.assert_close(penalty.recorded, seen[2])
    at(1, 3, 5)  # larger in xy and xz
    torch.testing.assert_close(penalty.recorded, seen[2])
    at(1, 1.5, 9)  # smaller in xy, larger in xz
    torch.testing.assert_close(penalty.recorded, seen[4])
    torch.testing.assert_close(penalty.minimum[2], seen[2][2])
    bias[0] = math.nan
    penalty.observe_()
    torch.testing.assert_close(penalty.recorded, seen[4])
    strength = penalty.retune_()
    assert strength[1] == 0.3 and strength[2] < 0.01 and strength[0] == 0


def test_state_and_copies():
    one, penalty = made()
    for _ in range(4):
        penalty.observe_()
    assert set(penalty.state_dict()) == {"strength", "minimum", "recorded", "observed"}
    assert not list(penalty.parameters())
    other_layer, other = made(strength=1.0)
    other.load_state_dict(penalty.state_dict())
    torch.testing.assert_close(other.retune_(), penalty.retune_())
    # A copy with its model belongs to the copied model.
    model = nn.ModuleDict(dict(layer=one, penalty=penalty))
    twin = copy.deepcopy(model)
    twin["penalty"].project_(1)
    twin["penalty"].strength.fill_(1)
    assert twin["penalty"].per_type()[1] < 1e-24 and penalty.per_type()[1] > 1e-3
    # In half precision the layers are rounded, and the projectors are not.
    half = copy.deepcopy(model).bfloat16()["penalty"]
    assert half.strength.dtype == F64 and half().dtype == torch.float32
    torch.testing.assert_close(half().double(), penalty(), rtol=0.02, atol=0)


def test_trains_beside_a_loss_under_autocast():
    """And symmetry is found: data of an O(2), a layer that could be anything."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.diag(torch.tensor([1.0, 1.0, -2.0]))
    x = torch.randn(64, 3, generator=generator)
    model = nn.Linear(3, 3)
    types = [G.O2("xy"), G.O2("yz")]
    penalty = EquivarianceRegularizer([(model, VECTOR, VECTOR)], types, strength=0.1, warmup=0)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for step in range(120):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - x @ truth).square().mean() + penalty()
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalty.observe_()
        if step == 60:
            penalty.retune_()
    assert penalty.strength[0] == 0.1 and penalty.strength[1] < 1e-3
    assert (model.weight - truth).abs().max() < 0.2


def test_in_data_parallel_training(tmp_path):
    """The penalty's gradient goes through DDP's hooks with that of the loss."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        one, penalty = made(strength=1.0)
        parallel = nn.parallel.DistributedDataParallel(one)
        x = torch.randn(4, 3, dtype=F64)
        (parallel(x).square().sum() + penalty()).backward()
        found = one.weight.grad.clone()
    finally:
        dist.destroy_process_group()
    one.zero_grad()
    (one(x).square().sum() + penalty()).backward()
    torch.testing.assert_close(found, one.weight.grad)


def test_sample_draws_elements_of_the_group():
    generator = torch.Generator().manual_seed(0)
    one, two = G.O(3).sample(VECTOR, TENSOR, n=20, generator=generator)
    torch.testing.assert_close(one @ one.mT, torch.eye(3, dtype=F64).expand(20, 3, 3))
    torch.testing.assert_close(two, torch.stack([torch.kron(g, g) for g in one]))
    assert {-1, 1} == {round(d) for d in torch.linalg.det(one).tolist()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(5))
def test_the_axis_that_is_different_keeps_the_largest_strength(seed: int):
    """The example at full length."""
    example = runpy.run_path(str(EXAMPLES / "mixed_symmetries.py"))
    options = dict(axis="z", samples=100, channels=16, steps=1200, retune_at=700, warmup=50,
                   power=4.0, strength=1.0, rate=5e-3, batch=50, every=1200)  # fmt: skip
    x, y, z = example["run"]("retuned", seed, argparse.Namespace(**options))["strength"]
    assert z == 1 and max(x, y) < 0.5
