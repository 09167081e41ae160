"""One rank of the tests of processes in test_contrastive_distributed.py: what the ranks compute of
their own rows is what one process computes of all. How it runs: gloo.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from gloo import raises, run
from torch import Tensor

from pyloss import distributed
from pyloss.functional import _contrastive_group as of_group
from pyloss.ops.similarity_softmax import pair_sums, similarity_softmax

F64 = torch.float64
DIM = 5


def sizes() -> list[int]:
    """Of the ranks' batches: uneven."""
    return [4, 2, 3][: dist.get_world_size()]


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

TOTAL = 9
MASKS = {
    "plain": dict(target="own", columns=True),
    "self": dict(first=0, target="next", mean=True),
    "negatives": dict(first=0, target="next", denominator="negatives", mean=True),
    "labels": dict(first=0, same="positive", columns=True),
    "false negatives": dict(target="own", same="drop", columns=True, denominator="negatives"),
}


def masks_of(options: dict, rows: slice, whole: bool) -> dict:
    """For all ranks' rows, or for one's own; targets within the rank that has the row."""
    options = dict(options)
    ids = torch.arange(TOTAL) % 3
    target = torch.arange(sum(sizes()))
    if options.get("target") == "next":
        begin = 0
        for size in sizes():
            target[begin : begin + size] = begin + (torch.arange(size) + 1) % size
            begin += size
    if "target" in options:
        options["target"] = target if whole else target[rows] - rows.start
    if "same" in options:
        options["query_ids"] = options["key_ids"] = ids[: sum(sizes())] if whole else ids[rows]
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


def cases() -> dict[str, Callable]:
    found = {
        "gather": gather_with_gradient,
        "gather of what differs": gather_of_what_differs,
    }
    for ring in (False, True):
        for name in MASKS:
            scales = "rows" if name in ("self", "negatives") else "one"
            found[f"{name}, ring {ring}"] = partial(statistics, name, ring, scales)
        found[f"sigmoid, ring {ring}"] = partial(sigmoid_sums, ring)
    return found


if __name__ == "__main__":
    run(cases)
