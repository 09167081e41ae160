"""One rank of the tests of processes in test_contrastive_distributed.py: what the ranks compute of
their own rows is what one process computes of all. How it runs: gloo.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from gloo import raises, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyloss
from pyloss import distributed
from pyloss.functional import _contrastive_group as of_group
from pyloss.functional import dcl, sogclr_loss
from pyloss.ops.similarity_softmax import pair_sums, similarity_softmax

F64 = torch.float64
DIM = 5


def sizes() -> list[int]:
    """Of the ranks' batches: uneven, and of three one is empty."""
    return {2: [4, 3], 3: [4, 0, 3]}[dist.get_world_size()]


def mine() -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes()[:rank]), sum(sizes()[: rank + 1]))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(found, expected, what: str = "") -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


# --------------------------------------------------------------------------------------------------
# Rows of all ranks


def gather_with_gradient() -> None:
    total, rank, world = sum(sizes()), dist.get_rank(), dist.get_world_size()
    own = draw(total, 2, 3, seed=1)[mine()].requires_grad_()
    every = distributed.all_gather_with_grad(own)
    close(every, draw(total, 2, 3, seed=1))
    weights = [draw(total, 2, 3, seed=10 + r) for r in range(world)]  # each rank has its own loss
    (grad,) = torch.autograd.grad((every.square() * weights[rank]).sum(), own, create_graph=True)
    close(grad, (2 * sum(weights) * every.detach())[mine()])
    (second,) = torch.autograd.grad(grad.sum(), own)
    close(second, 2 * sum(weights)[mine()])
    given = distributed.all_gather_with_grad(own.bfloat16(), sizes=sizes())
    close(given, every.bfloat16())
    labels = torch.arange(total)[mine()]
    close(distributed.all_gather_with_grad(labels), torch.arange(total))


def gather_of_what_differs() -> None:
    rank = dist.get_rank()
    raises(ValueError, "input must be alike on every rank",
           lambda: distributed.all_gather_with_grad(torch.zeros(2, 3 + rank)))  # fmt: skip
    raises(ValueError, "sizes must be one number of rows for each",
           lambda: distributed.all_gather_with_grad(torch.zeros(2, 3), sizes=[2]))  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The statistics under every loss

MASKS = {
    "plain": dict(target="own", columns=True),
    "self": dict(first=0, target="next", mean=True),
    "negatives": dict(first=0, target="next", denominator="negatives", mean=True),
    "labels": dict(first=0, same="positive", columns=True),
    "no negatives": dict(
        target="own", same="drop", columns=True, denominator="negatives", mean=True, classes=1
    ),
    "false negatives": dict(target="own", same="drop", columns=True, denominator="negatives"),
}


def masks_of(options: dict, rows: slice, whole: bool) -> dict:
    """For all ranks' rows, or for one's own; targets within the rank that has the row."""
    options = dict(options)
    total = sum(sizes())
    ids, target = torch.arange(total) % options.pop("classes", 3), torch.arange(total)
    if options.get("target") == "next":
        begin = 0
        for size in sizes():
            target[begin : begin + size] = begin + (torch.arange(size) + 1) % size
            begin += size
    if "target" in options:
        options["target"] = target if whole else target[rows] - rows.start
    if "same" in options:
        options["query_ids"] = options["key_ids"] = ids if whole else ids[rows]
    return options


def statistics(name: str, ring: bool, scales: str) -> None:
    rows, total = mine(), sum(sizes())
    every = [draw(total, DIM, seed=s).requires_grad_() for s in (1, 2)]
    own = [x.detach()[rows].requires_grad_() for x in every]
    if scales == "rows":
        every.append((draw(total, seed=3) + 3).requires_grad_())
        own.append(every[2].detach()[rows].requires_grad_())
    else:
        every.append(torch.tensor(1.5, dtype=F64, requires_grad=True))
        own.append(every[2].detach().clone().requires_grad_())
    expected = similarity_softmax(*every, **masks_of(MASKS[name], rows, True))
    found = of_group.statistics(
        *own, group=dist.group.WORLD, ring=ring, **masks_of(MASKS[name], rows, False)
    )
    loss, own_loss = 0.0, 0.0
    for field, theirs, ours in zip(expected._fields, expected, found):
        assert (theirs is None) == (ours is None), field
        if theirs is not None:
            close(ours, theirs[rows], field)
        if theirs is not None and theirs.requires_grad:
            weight = draw(total, seed=len(field))
            loss = loss + (weight * theirs).sum()
            own_loss = own_loss + (weight[rows] * ours).sum()
    gradients = torch.autograd.grad(own_loss, own)
    for at, whole in enumerate(torch.autograd.grad(loss, every)):
        grad = gradients[at]
        if at == 2 and scales != "rows":
            dist.all_reduce(grad)
            close(grad, whole, "scale")
        else:
            close(grad, whole[rows], ("queries", "keys", "scales")[at])


def sigmoid_sums(ring: bool) -> None:
    rows, total = mine(), sum(sizes())
    every = [draw(total, DIM, seed=s) for s in (1, 2)]
    every += [torch.tensor(x, dtype=F64) for x in (2, -1)]
    own = [(x[rows] if x.dim() else x.clone()).requires_grad_() for x in every]
    every = [x.requires_grad_() for x in every]
    expected = pair_sums(*every, target=torch.arange(total))
    found = of_group.sums(*own, group=dist.group.WORLD, ring=ring, target=torch.arange(len(own[0])))
    close(found, expected[rows])
    weight = draw(total, seed=7)
    whole = torch.autograd.grad((weight * expected).sum(), every)
    for theirs, grad in zip(whole, torch.autograd.grad((weight[rows] * found).sum(), own)):
        if not grad.dim():
            dist.all_reduce(grad)
        close(grad, theirs[rows] if grad.dim() else theirs)


# --------------------------------------------------------------------------------------------------
# Losses under DDP: parameters get the gradients of one process with the joined batch


class Model(nn.Module):
    """Two views, and a number that is learned."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, DIM), nn.Dropout(dropout)).double()
        self.number = nn.Parameter(torch.tensor(0.4, dtype=F64))

    def forward(self, x1: Tensor, x2: Tensor):
        return self.net(x1), self.net(x2), self.number * 1.0


def with_queue(z1, z2, number, ids, **group):
    queue = draw(3, DIM, seed=20)
    return pyloss.info_nce(
        z1, z2, queue, temperature=number, ids=ids, queue_ids=torch.tensor([0, 7, 8]), **group
    )


def moco(z1, z2, number, ids, **group):
    queue = draw(3, DIM, seed=20)
    return pyloss.info_nce(z1, z2, queue, temperature=number, in_batch=False, **group)


LOSSES = {
    "info_nce": lambda a, b, t, ids, **g: pyloss.info_nce(a, b, temperature=t, symmetric=True, **g),
    "info_nce, temperatures": lambda a, b, t, ids, **g: pyloss.info_nce(
        a, b, temperature=t * (1 + ids), target=torch.arange(len(a)).flip(0), **g
    ),
    "info_nce, queue": with_queue,
    "MoCo": moco,
    "nt_xent": lambda a, b, t, ids, **g: pyloss.nt_xent(a, b, temperature=t, **g),
    "clip_loss": lambda a, b, t, ids, **g: pyloss.clip_loss(a, b, 1 / t, **g),
    "supervised_contrastive": lambda a, b, t, ids, **g: pyloss.supervised_contrastive(
        torch.stack([a, b], 1), ids, temperature=t, **g
    ),
    "supervised, some alone": lambda a, b, t, ids, **g: pyloss.supervised_contrastive(
        a, ids.clamp(max=1), temperature=t, **g
    ),
    "dcl": lambda a, b, t, ids, **g: dcl(a, b, temperature=t, sigma=0.5, **g),
    "siglip_loss": lambda a, b, t, ids, **g: pyloss.siglip_loss(a, b, 1 / t, t - 2, **g),
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    total = sum(sizes())
    return draw(total, 6, seed=11), draw(total, 6, seed=12), torch.tensor([0, 1, 0, 2, 1, 0, 3])


def compare(model: nn.Module, twin: nn.Module, loss: Tensor, whole: Tensor) -> None:
    """Of a rank's model under DDP, and of one process."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    close(mean / dist.get_world_size(), whole.detach(), "loss")
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        close(p.grad, q.grad, name)


def under_ddp(name: str, ring: bool) -> None:
    rows, (x1, x2, ids) = mine(), inputs()
    model, twin = DistributedDataParallel(Model()), Model()
    loss = LOSSES[name](*model(x1[rows], x2[rows]), ids[rows], group=dist.group.WORLD, ring=ring)
    loss.backward()
    if name == "info_nce, temperatures":
        a, b, t = twin(x1, x2)
        begin = torch.cat([torch.full((s,), sum(sizes()[:r])) for r, s in enumerate(sizes())])
        target = begin + torch.cat([torch.arange(s).flip(0) for s in sizes()])
        whole = pyloss.info_nce(a, b, temperature=t * (1 + ids), target=target)
    else:
        whole = LOSSES[name](*twin(x1, x2), ids)
    whole.backward()
    compare(model, twin, loss, whole)


def averages(bimodal: bool, ring: bool) -> None:
    """iSogCLR: the state of all ranks is that of one process, samples on several ranks included."""
    options = dict(bimodal=bimodal, rho=0.3, gamma=0.6, temperature=0.05)
    rows, (x1, x2, _) = mine(), inputs()
    model, twin = DistributedDataParallel(Model()), Model()
    criterion = pyloss.nn.ISogCLRLoss(9, group=dist.group.WORLD, ring=ring, **options).double()
    alone = pyloss.nn.ISogCLRLoss(9, **options).double()
    for index in (torch.tensor([3, 1, 3, 8, 0, 3, 1]), torch.tensor([1, 2, 4, 3, 8, 5, 0])):
        model.zero_grad(), twin.zero_grad()
        z1, z2, number = model(x1[rows], x2[rows])
        loss = criterion(z1, z2, index[rows]) + 0 * number  # which has no part in it
        loss.backward()
        z1, z2, number = twin(x1, x2)
        whole = alone(z1, z2, index) + 0 * number
        whole.backward()
        compare(model, twin, loss, whole)
        close(criterion.last_value, alone.last_value)
        for key, state in alone.state_dict().items():
            close(criterion.state_dict()[key], state, key)
            every = distributed.all_gather_with_grad(criterion.state_dict()[key].unsqueeze(0))
            assert (every == every[0]).all(), f"{key} differs between ranks"


def temperatures_of_samples() -> None:
    """ALDR: the state of all ranks is that of one process, at each step or when they are told."""
    rows, x = mine(), draw(7, 5, seed=3)
    y, index = torch.arange(7) % 5, torch.tensor([3, 1, 3, 8, 0, 3, 1])
    alone = pyloss.nn.ALDRLoss(num_samples=9).double()
    alone(x, y, index)
    at_once = pyloss.nn.ALDRLoss(num_samples=9, group=dist.group.WORLD).double()
    at_once(x[rows], y[rows], index[rows])
    close(at_once.lam, alone.lam)

    apart = torch.tensor([3, 1, 3, 8, 0, 5, 2])  # no sample on several ranks
    alone = pyloss.nn.ALDRLoss(num_samples=9).double()
    alone(x, y, apart)
    later = pyloss.nn.ALDRLoss(num_samples=9, group=dist.group.WORLD, sync="manual").double()
    later(x[rows], y[rows], apart[rows])
    assert not torch.equal(later.lam, alone.lam)
    later.synchronize()
    close(later.lam, alone.lam)


def half_types(ring: bool) -> None:
    rows, (x1, x2, _) = mine(), inputs()
    own, whole = (
        [x[at].bfloat16().requires_grad_() for x in (x1, x2)] for at in (rows, slice(None))
    )
    loss = pyloss.nt_xent(*own, group=dist.group.WORLD, ring=ring)
    expected = pyloss.nt_xent(*whole)
    assert loss.dtype == torch.bfloat16
    for ours, theirs in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, whole)):
        torch.testing.assert_close(ours / dist.get_world_size(), theirs[rows], rtol=2e-2, atol=1e-4)


def ring_on_the_reference() -> None:
    with pyloss.backend("reference"):
        for name in ("plain", "negatives"):
            statistics(name, True, "rows" if name == "negatives" else "one")
        sigmoid_sums(True)


def second_derivatives() -> None:
    """Those of one process, or an error: never the part of them that needs no other rank."""
    rows, (x1, x2, _) = mine(), inputs()
    own, whole = x1[rows].clone().requires_grad_(), x1.clone().requires_grad_()

    def twice(z, other, **group):
        (grad,) = torch.autograd.grad(pyloss.nt_xent(z, other, **group), z, create_graph=True)
        return grad

    world = dist.get_world_size()
    grad = twice(own, x2[rows], group=dist.group.WORLD) / world
    (found,) = torch.autograd.grad(grad.square().sum(), own)
    (expected,) = torch.autograd.grad(twice(whole, x2).square().sum(), whole)
    close(found, expected[rows])
    raises(RuntimeError, "ring=True has no second derivative",
           lambda: twice(own, x2[rows], group=dist.group.WORLD, ring=True))  # fmt: skip


def a_group_of_some() -> None:
    """The last ranks, whose numbers in the group are others."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group([*range(1, world)])
    whole = draw(2 * world - 2, DIM, seed=30).requires_grad_()
    if rank == 0:
        raises(RuntimeError, "this process is not in the group",
               lambda: pyloss.clip_loss(whole, whole, group=group))  # fmt: skip
        return
    rows = slice(2 * rank - 2, 2 * rank)
    for ring in (False, True):
        own = whole.detach()[rows].requires_grad_()
        loss = pyloss.clip_loss(own, own.square(), group=group, ring=ring)
        (found,) = torch.autograd.grad(loss, own)
        (expected,) = torch.autograd.grad(pyloss.clip_loss(whole, whole.square()), whole)
        close(found / (world - 1), expected[rows])


def one_sample_in_all() -> None:
    z = draw(int(dist.get_rank() == 0), DIM, seed=1)
    raises(ValueError, "one sample, which has no negatives",
           lambda: sogclr_loss(z, z, torch.zeros(len(z)), group=dist.group.WORLD))  # fmt: skip


def cached_gradients() -> None:
    """Chunks, of which the ranks have different numbers, under DDP; dropout is replayed."""
    rows, (x1, x2, _) = mine(), inputs()
    model, twin = Model(dropout=0.4), Model(dropout=0.4)
    cached = DistributedDataParallel(pyloss.nn.GradCache(model.net, chunk_size=2))
    torch.manual_seed(dist.get_rank())
    loss = pyloss.nt_xent(*cached(x1[rows], x2[rows]), group=dist.group.WORLD)
    loss.backward()
    torch.manual_seed(dist.get_rank())
    views = [torch.cat([twin.net(c) for c in x[rows].split(2)]) for x in (x1, x2)]
    expected = pyloss.nt_xent(*views, group=dist.group.WORLD)
    expected.backward()
    close(loss, expected)
    for p, q in zip(model.net.parameters(), twin.net.parameters()):
        dist.all_reduce(q.grad)
        close(p.grad, q.grad / dist.get_world_size())


def cached_gradients_of_the_joined_batch() -> None:
    rows, (x1, x2, _) = mine(), inputs()
    twin = Model()
    cached = DistributedDataParallel(pyloss.nn.GradCache(Model().net, chunk_size=2))
    loss = pyloss.clip_loss(*cached(x1[rows], x2[rows]), group=dist.group.WORLD, ring=True)
    loss.backward()
    whole = pyloss.clip_loss(*twin(x1, x2)[:2])
    whole.backward()
    compare(cached, twin.net, loss, whole)


def robust_over_samples(eta: float) -> None:
    every, own = draw(sum(sizes()), seed=7).abs(), mine()
    scale = nn.Parameter(torch.ones((), dtype=F64))
    module = pyloss.nn.KLDROLoss(0.3, eta, group=dist.group.WORLD).double()
    twin = pyloss.nn.KLDROLoss(0.3, eta).double()
    for step in (1, 2):
        loss, whole = module(step * scale * every[own]), twin(step * scale * every)
        close(loss, whole, "loss")
        found, expected = (torch.autograd.grad(v, scale)[0] for v in (loss, whole))
        dist.all_reduce(found)  # as DDP does
        close(found / dist.get_world_size(), expected, "gradient")
        close(module.log_u, twin.log_u, "average")


def naive_bayes() -> None:
    x, y = draw(sum(sizes()), 3, seed=8), torch.arange(sum(sizes())) % 2
    twin = pyloss.nn.GaussianNaiveBayes(3, 3)
    module = pyloss.nn.GaussianNaiveBayes(3, 3, group=dist.group.WORLD)
    for step in (1, 2):  # one of the ranks may have no samples
        module.partial_fit(step * x[mine()], y[mine()])
        twin.partial_fit(step * x, y)
    for found, expected in zip(module.buffers(), twin.buffers()):
        close(found, expected)


def neural_collapse(scatter: bool) -> None:
    x, y = 100 + draw(sum(sizes()), 3, seed=9), torch.arange(sum(sizes())) % 2
    logits, weight = draw(sum(sizes()), 3, seed=10), draw(3, 3, seed=11)
    twin = pyloss.metrics.NeuralCollapseMetrics(3, 3, scatter=scatter)
    own = pyloss.metrics.NeuralCollapseMetrics(3, 3, scatter=scatter, group=dist.group.WORLD)
    raises(RuntimeError, "before update() of any rank", own.compute)
    for step in (1, 2):
        twin.update(step * x, y)
        if x[mine()].numel():  # a rank may have none at all
            own.update(step * x[mine()], y[mine()])
        close(own.compute(weight)._replace(nc4=None), twin.compute(weight)._replace(nc4=None))
    twin.compare(logits, x)
    if x[mine()].numel():
        own.compare(logits[mine()], x[mine()])
    found = own.compute(weight)
    close(found, twin.compute(weight))
    assert 0 < found.nc4 < 1 and found.nc1.isnan() == (not scatter)


def cases() -> dict[str, Callable]:
    found = {
        "gather": gather_with_gradient,
        "gather of what differs": gather_of_what_differs,
        "ALDR": temperatures_of_samples,
        "some ranks": a_group_of_some,
        "one sample": one_sample_in_all,
        "cached gradients, dropout": cached_gradients,
        "half, gathered": partial(half_types, False),
        "half, ring": partial(half_types, True),
        "ring on the reference": ring_on_the_reference,
        "second derivatives": second_derivatives,
        "naive Bayes": naive_bayes,
        "neural collapse": partial(neural_collapse, True),
        "neural collapse, no scatter": partial(neural_collapse, False),
        "robust": partial(robust_over_samples, 1.0),
        "robust, average": partial(robust_over_samples, 0.4),
        "cached gradients": cached_gradients_of_the_joined_batch,
    }
    for ring in (False, True):
        for name in MASKS:
            scales = "rows" if name in ("self", "negatives") else "one"
            found[f"{name}, ring {ring}"] = partial(statistics, name, ring, scales)
        found[f"sigmoid, ring {ring}"] = partial(sigmoid_sums, ring)
        for name in LOSSES:
            found[f"{name} under DDP, ring {ring}"] = partial(under_ddp, name, ring)
        for bimodal in (False, True):
            found[f"iSogCLR, bimodal {bimodal}, ring {ring}"] = partial(averages, bimodal, ring)
    return found


if __name__ == "__main__":
    run(cases)
