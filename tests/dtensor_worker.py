"""One rank of test_dtensors.py. How it runs: gloo.py."""

from __future__ import annotations

from collections.abc import Callable

import lion_k_cases
import op_dtensor_cases
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import raises, run
from helpers import TORCH
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import loss_parallel

import pyloss

ROWS, CLASSES, LENGTH = 5, 7, 4  # nothing that two ranks share evenly but the length
F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    size = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    return torch.randint(CLASSES, size, generator=torch.Generator().manual_seed(seed))


def with_ignored(shape: tuple[int, ...], ignored: int) -> Tensor:
    """Of the first rank more than of the others: a mean of the ranks' means is another number."""
    y = labels_of(shape)
    y.view(-1)[: 2 * y[0].numel() if y.dim() else 1] = ignored
    return y


def mixup(shape: tuple[int, ...], lam: float | Tensor) -> tuple:
    return labels_of(shape), labels_of(shape, seed=5), lam


SHAPES = {"rows": (ROWS, CLASSES), "maps": (ROWS, CLASSES, LENGTH), "one row": (CLASSES,)}
WEIGHT = torch.linspace(0.5, 2.0, CLASSES, dtype=F64)
STATS = ("lse", "logprob", "entropy", "argmax", "correct", "z_loss")

# Arguments besides logits and labels; a callable is one of the logits' shape.
OPTIONS: dict[str, dict] = {
    "mean": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "ignored": dict(target=lambda s: with_ignored(s, -100)),
    "ignored, by its number": dict(target=lambda s: with_ignored(s, 2), ignore_index=2),
    "all ignored": dict(target=lambda s: labels_of(s) * 0, ignore_index=0),
    "all ignored, zero": dict(target=lambda s: labels_of(s) * 0, ignore_index=0, empty="zero"),
    "weight": dict(weight=WEIGHT, target=lambda s: with_ignored(s, -100)),
    "weight, smoothing": dict(weight=WEIGHT, label_smoothing=0.1),
    "weight, z-loss": dict(weight=WEIGHT, z_loss=0.1, softcap=3.0),
    "num_items": dict(num_items=11),
    "num_items, a tensor": dict(num_items=torch.tensor(11.0, dtype=F64)),
    "token weight": dict(token_weight=lambda s: normal(*labels_of(s).shape, seed=3).square()),
    "member of the family": dict(tau=1.5, temperature=2.0, logit_scale=0.5),
    "statistics": dict(return_stats=STATS, target=lambda s: with_ignored(s, -100)),
}
OF_WHOLE_CLASSES: dict[str, dict] = {
    "rank": dict(return_stats=("rank",)),
    "mixup": dict(target=lambda s: mixup(s, 0.3), weight=WEIGHT),
    "mixup of rows": dict(target=lambda s: mixup(s, normal(*labels_of(s).shape, seed=6).sigmoid())),
    "probabilities": dict(
        target=lambda s: normal(*s, seed=7).softmax(int(len(s) > 1)), weight=WEIGHT
    ),
}
# Those that are tried in maps and in one row too; and those of F.cross_entropy, where the other
# side is also torch on DTensors, as far as it goes.
OF_EVERY_SHAPE = ("mean", "none", "ignored", "weight, z-loss", "statistics")
OF_TORCH = ("mean", "sum", "none", "weight, smoothing", "probabilities")


def placements_of(t: Tensor, shape: tuple[int, ...], logits: list) -> list:
    """Where a tensor goes whose dimensions are those of the rows, or of the logits."""
    class_dim = len(shape) > 1
    if t.dim() == 0 or t is WEIGHT:
        return [Replicate()] * len(logits)
    if t.shape == shape:
        return [Replicate() if isinstance(p, Partial) else p for p in logits]
    found = []
    for p in logits:
        rows = isinstance(p, Shard) and p.dim != class_dim
        found.append(Shard(p.dim - (p.dim > class_dim)) if rows else Replicate())
    return found


def case(mesh, shape: tuple[int, ...], placements: list, name: str) -> None:
    options = dict({**OPTIONS, **OF_WHOLE_CLASSES}[name])
    target = options.pop("target", labels_of)(shape)
    if "token_weight" in options:
        options["token_weight"] = options["token_weight"](shape)
    x = normal(*shape, seed=2)

    def place(t):
        if isinstance(t, tuple):
            return tuple(map(place, t))
        if not isinstance(t, Tensor):
            return t
        return distribute_tensor(t, mesh, placements_of(t, shape, placements))

    whole = x.clone().requires_grad_()
    want = pyloss.fused_cross_entropy(whole, target, **options)
    given = _distributed(x, mesh, placements).requires_grad_()
    split = {k: place(v) for k, v in options.items()}
    result = pyloss.fused_cross_entropy(given, place(target), **split)

    split_rows = any(isinstance(p, Shard) and p.dim != (len(shape) > 1) for p in placements)
    scalar = options.get("reduction") != "none"
    loss, stats = result if isinstance(result, tuple) else (result, None)
    want, want_stats = want if isinstance(want, tuple) else (want, None)
    assert isinstance(loss, DTensor) and loss.dtype == want.dtype
    like = torch.empty(()) if scalar else labels_of(shape)
    expected = placements_of(like, shape, placements)
    if scalar and split_rows:
        rows = placements_of(labels_of(shape), shape, placements)
        expected = [Partial() if isinstance(p, Shard) else p for p in rows]
    assert list(loss.placements) == expected, (loss.placements, expected)
    close(loss.full_tensor(), want)
    total, want_total = loss.sum(), want.sum()
    for field, s, w in zip(stats._fields, stats, want_stats) if stats else ():
        assert (s is None) == (w is None)
        if s is not None:
            close(s.full_tensor(), w)
            if field in ("lse", "logprob", "entropy"):
                total, want_total = total + s.sum(), want_total + w.sum()
    total.backward()
    want_total.backward()
    kept = [Replicate() if isinstance(p, Partial) else p for p in placements]
    # Before 2.13 torch keeps the gradient of unequal shards whole on each rank.
    if TORCH >= (2, 13):
        assert list(given.grad.placements) == kept, given.grad.placements
    close(given.grad.full_tensor(), whole.grad)

    if name in OF_TORCH:
        other = _distributed(x, mesh, placements).requires_grad_()
        try:
            theirs = F.cross_entropy(other, place(target), **split)
        except (RuntimeError, ValueError) as error:  # "cannot be evenly sharded": a mean of means
            assert "evenly" in str(error) or (TORCH < (2, 10) and "sharding strategy" in str(error))
            return
        if TORCH < (2, 8) and any("avg" in repr(p) for p in theirs.placements):
            return  # Gloo has no such reduction, and torch asked for it
        close(loss.full_tensor(), theirs.full_tensor())
        theirs.sum().backward()
        close(given.grad.full_tensor(), other.grad.full_tensor())


def _distributed(x: Tensor, mesh, placements: list) -> DTensor:
    if any(isinstance(p, Partial) for p in placements):
        share = x / dist.get_world_size()
        return DTensor.from_local(share, mesh, placements, run_check=False)
    return distribute_tensor(x, mesh, placements)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def other_functions(mesh) -> None:
    """The other row losses, and a module, on split rows; tensors that are not placed like them."""
    x, y = normal(ROWS, CLASSES, seed=2), labels_of((ROWS, CLASSES))
    given, labels = (
        distribute_tensor(x, mesh, [Shard(0)]),
        distribute_tensor(y, mesh, [Replicate()]),
    )
    close(pyloss.focal_loss(given, labels).full_tensor(), pyloss.focal_loss(x, y))
    close(pyloss.comp_sum_loss(given, labels, 2.0).full_tensor(), pyloss.comp_sum_loss(x, y, 2.0))
    module = pyloss.nn.GeneralizedCrossEntropyLoss(weight=WEIGHT)
    close(module(given, labels).full_tensor(), module(x, y))
    classes = distribute_tensor(x, mesh, [Shard(1)])
    close(pyloss.focal_loss(classes, labels).full_tensor(), pyloss.focal_loss(x, y))
    close(pyloss.fused_cross_entropy(classes, y).full_tensor(), pyloss.fused_cross_entropy(x, y))
    p = normal(ROWS, CLASSES, seed=4).softmax(1)
    whole = p.clone().requires_grad_()
    placed = distribute_tensor(p, mesh, [Replicate()]).requires_grad_()
    pyloss.fused_cross_entropy(given, placed).backward()
    pyloss.fused_cross_entropy(x, whole).backward()
    close(placed.grad.full_tensor(), whole.grad)


def learned_weight(mesh) -> None:
    """The gradient of a class weight is the sum over the rows of all ranks."""
    x, p = normal(ROWS, CLASSES, seed=2), normal(ROWS, CLASSES, seed=4).softmax(1)
    given, target = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, p))
    weight = distribute_tensor(WEIGHT.clone(), mesh, [Replicate()]).requires_grad_()
    whole = WEIGHT.clone().requires_grad_()
    pyloss.fused_cross_entropy(given, target, weight, label_smoothing=0.1).backward()
    pyloss.fused_cross_entropy(x, p, whole, label_smoothing=0.1).backward()
    close(weight.grad.full_tensor(), whole.grad)
    raises(RuntimeError, "weight must be a DTensor",
           lambda: pyloss.fused_cross_entropy(given, target, whole))  # fmt: skip


def loss_parallel_cases() -> None:
    """What F.cross_entropy does there: the loss Replicate, the gradient split as the logits are.
    Target and class weight are plain, as torch takes them too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("mean", "sum", "none"):
        for options in ({}, dict(weight=WEIGHT)):
            # torch's has an IndexError for a weight and labels that are ignored.
            y = labels_of((ROWS, CLASSES)) if options else with_ignored((ROWS, CLASSES), -100)
            x = normal(ROWS, CLASSES, seed=2)
            given, other = (distribute_tensor(x, mesh, [Shard(-1)]).requires_grad_() for _ in "ab")
            with loss_parallel():
                want = F.cross_entropy(other, y, reduction=name, **options)
                found = pyloss.fused_cross_entropy(given, y, reduction=name, **options)
                assert found.placements == want.placements and found.dtype == want.dtype
                close(found.full_tensor(), want.full_tensor())
                want.sum().backward()
                found.sum().backward()
            if TORCH >= (2, 13):  # as above
                assert given.grad.placements == other.grad.placements == (Shard(1),)
            close(given.grad.full_tensor(), other.grad.full_tensor())


def compiled(mesh) -> None:
    """One graph, the denominator of split rows in it."""
    x, y = normal(4, CLASSES, seed=2), with_ignored((4, CLASSES), -100)
    given = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    labels = distribute_tensor(y, mesh, [Shard(0)])
    call = torch.compile(pyloss.fused_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = call(given, labels)
    whole = x.clone().requires_grad_()
    want = pyloss.fused_cross_entropy(whole, y)
    close(loss.full_tensor(), want)
    loss.backward()
    want.backward()
    close(given.grad.full_tensor(), whole.grad)


def refusals(mesh) -> None:
    x, y = normal(ROWS, CLASSES, seed=2), labels_of((ROWS, CLASSES))
    of_rows, of_classes = (distribute_tensor(x, mesh, [Shard(d)]) for d in (0, 1))
    labels, ce = distribute_tensor(y, mesh, [Shard(0)]), pyloss.fused_cross_entropy
    raises(RuntimeError, "target must be a DTensor", lambda: ce(of_rows, y))
    weights = torch.ones(ROWS, dtype=F64)
    raises(RuntimeError, "token_weight must be a DTensor",
           lambda: ce(of_rows, labels, token_weight=weights))  # fmt: skip
    raises(RuntimeError, "lam must be a DTensor", lambda: ce(of_rows, (labels, labels, weights)))
    raises(ValueError, "MixUp", lambda: ce(of_classes, (labels, labels, 0.5)))
    raises(ValueError, "probabilities", lambda: ce(of_classes, of_classes.softmax(1)))
    raises(ValueError, "rank", lambda: ce(of_classes, labels, return_stats=("rank",)))
    raises(ValueError, "inplace", lambda: ce(of_rows, labels, inplace=True))
    raises(ValueError, "avg", lambda: ce(of_rows, labels, reduction="avg"))
    # On all ranks, though the last ones alone have a wrong number of labels.
    fewer = distribute_tensor(y[:-1], mesh, [Shard(0)])
    raises(ValueError, f"({ROWS}) to match target batch_size ({ROWS - 1})",
           lambda: ce(of_rows, fewer))  # fmt: skip
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    elsewhere = distribute_tensor(y, other, [Replicate()] * 2)
    raises(RuntimeError, "on the mesh of input", lambda: ce(of_rows, elsewhere))
    twice = distribute_tensor(x, other, [Shard(1)] * 2)
    raises(RuntimeError, "split over two dimensions", lambda: ce(twice, elsewhere))


def cases() -> dict[str, Callable]:
    world = dist.get_world_size()
    if world != 4:
        mesh = init_device_mesh("cpu", (world,))
        ways = [[Replicate()], [Shard(0)], [Shard(1)], [Shard(2)], [Partial()]]
    else:
        mesh = init_device_mesh("cpu", (2, 2))
        ways = [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(2)], [Shard(0)] * 2]
    found: dict[str, Callable] = {}
    for kind, shape in SHAPES.items():
        class_dim = len(shape) > 1
        for placements in ways:
            if any(isinstance(p, Shard) and p.dim >= len(shape) for p in placements):
                continue
            splits = sum(isinstance(p, Shard) and p.dim == class_dim for p in placements)
            if splits > 1:
                continue  # refused
            names = OPTIONS if kind == "rows" else OF_EVERY_SHAPE
            for name in names if splits else [*names, *OF_WHOLE_CLASSES]:
                found[f"{kind}, {placements}, {name}"] = lambda s=shape, p=placements, n=name: case(
                    mesh, s, p, n
                )
    if world == 2:
        found |= {
            "other functions": lambda: other_functions(mesh),
            "learned weight": lambda: learned_weight(mesh),
            "compiled": lambda: compiled(mesh),
            "refusals": lambda: refusals(mesh),
        }
    found["loss_parallel"] = loss_parallel_cases
    if world != 3:  # their tensors are gathered, in equal parts
        found |= lion_k_cases.cases()
    return found | op_dtensor_cases.cases()


if __name__ == "__main__":
    run(cases)
