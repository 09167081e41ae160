"""The ops on DTensors against one process, through the functions that stand on them: cases of
dtensor_worker.py.

A case names the dimensions of its tensors by letters, as the rules of the ops do
(pyloss/ops/_shards.py). Each capital is split in turn; a split that no rule knows must give the
same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from gloo import raises
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import pyloss
import pyloss.functional as F
from pyloss.ops._dtensors import torch_version

B, N, D = 5, 6, 3  # items that no number of processes shares evenly
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(*shape: int) -> Tensor:
    """The first ones are ignored: a mean of the processes' means is another number."""
    y = torch.randint(N, shape, generator=torch.Generator().manual_seed(1))
    y[:2] = -100
    return y


class Case(NamedTuple):
    function: Callable[..., Any]
    tensors: list[tuple[Tensor, str]]
    # Of the first result; "+": a sum, Partial where its terms are split; None: as torch places it.
    result: str | None = None
    options: dict[str, Any] = {}
    unknown: str = ""  # a letter that no rule splits


def attention(q: str, *others: tuple[tuple[int, ...], str]) -> list[tuple[Tensor, str]]:
    return [
        (normal(B, 4, N, D), q),
        *((0.5 * normal(*shape, seed=i), term) for i, (shape, term) in enumerate(others, 1)),
    ]


HEADS = (
    ((B, 4, 5, D), "BHjd"), ((B, 4, 7, D), "BHkd"), ((B, 4, 5, 2), "BHje"), ((B, 4, 7, 2), "BHke"),
)  # fmt: skip
SQUARE = (
    ((B, 4, N, D), "BHjd"), ((B, 4, N, D), "BHkd"), ((B, 4, N, 2), "BHje"), ((B, 4, N, 2), "BHke"),
)  # fmt: skip
ONE_HEAD = (
    ((B, 1, 5, D), "B1jd"), ((B, 1, 7, D), "B1kd"), ((B, 1, 5, 2), "B1je"), ((B, 1, 7, 2), "B1ke"),
)  # fmt: skip
ROWS = [(normal(B, N), "Bn")]
SCORES = [(normal(B, N, D), "BcD"), (labels(B, D), "BD")]
FLAT = [(normal(B, N), "Bc"), (labels(B), "B")]
VIEWS = [(normal(B, D), "Bd"), (normal(B, D, seed=1), "Bd")]
OFFSETS = (torch.tensor([0, 2, 3, N]), "s")

CASES = {
    "sort": Case(F.soft_sort, ROWS, "Bn", unknown="n"),
    "rank": Case(F.soft_rank, ROWS, "Bn"),
    "permutation": Case(F.soft_permutation, ROWS, "Bmn"),
    "permute": Case(F.soft_permute, [*ROWS, (normal(B, N, 4), "BnD")], "BnD"),
    "permute, features of all": Case(F.soft_permute, [*ROWS, (normal(1, N, 4), "xnD")], "BnD"),
    "sorting loss": Case(
        F.sorting_cross_entropy, [*ROWS, (normal(B, N, seed=1), "Bn")], unknown="n"
    ),
    "sorting loss, sum": Case(
        F.sorting_cross_entropy, [*ROWS, (normal(B, N, seed=1), "Bn")], "+", dict(reduction="sum")
    ),
    "permutahedron": Case(F.permutahedron_rank, ROWS, "Bn", unknown="n"),
    "permutahedron, kl": Case(F.permutahedron_sort, ROWS, "Bn", dict(regularization="kl")),
    "attention": Case(F.tensor_attention, attention("BHNd", *HEADS), "BHNe", unknown="d"),
    "attention, causal": Case(
        F.tensor_attention, attention("BHnd", *SQUARE), "BHne", dict(is_causal=True), unknown="n"
    ),
    "attention, masks": Case(
        lambda q, k1, k2, v1, v2, m1, m2: F.tensor_attention(q, k1, k2, v1, v2, mask1=m1, mask2=m2),
        attention("BHNd", *HEADS, ((B, 1, N, 5), "BxNj"), ((1, 4, 1, 7), "xHyk")), "BHNe",
    ),
    "attention, one head of keys": Case(
        F.tensor_attention, attention("BHnd", *ONE_HEAD), "BHne", dict(enable_gqa=True)
    ),
    "attention, low rank": Case(
        F.tensor_attention, attention("BHnd", *HEADS), "BHne",
        dict(method="lowrank", degree=2, check="none"), unknown="d",
    ),
    "betti": Case(
        lambda x, y: F.betti_matching_loss(x, y.detach()),
        [(normal(B, 3, 4, 3).sigmoid(), "BCxy"), (normal(B, 3, 4, 3, seed=1).sigmoid(), "BCxy")],
        unknown="x",
    ),
    "taylor": Case(F.taylor_softmax_loss, SCORES, unknown="c"),
    "one hot": Case(F.one_hot_mse_loss, SCORES, "BD", dict(reduction="none")),
    "margin shift": Case(
        F.margin_shift, [SCORES[0], (normal(B, N, D, seed=1), "BcD"), SCORES[1]], "BD", unknown="c"
    ),
    "smooth adversarial": Case(
        F.smooth_adversarial_comp_sum, [FLAT[0], (normal(B, N, seed=1), "Bc"), FLAT[1]]
    ),
    "aldr": Case(F.aldr_loss, FLAT, unknown="c"),
    "aldr, none": Case(F.aldr_loss, FLAT, "B", dict(reduction="none")),
    "ldr": Case(F.ldr_loss, FLAT, "+", dict(margin=0.1), unknown="c"),
    "statistics": Case(
        F.row_softmax_stats, [(normal(B, D, N), "BDc"), SCORES[1]], "BD", dict(margin=0.2), "c"
    ),
    "normalized": Case(F.normalized_logistic_loss, SCORES),
    "segments": Case(
        F.segment_reduce, [(normal(N, B), "nB"), OFFSETS], "sB", dict(reduce="logsumexp"), "n"
    ),
    "segment softmax": Case(F.segment_softmax, [(normal(N, B), "nB"), OFFSETS], "nB"),
    "contrast": Case(F.info_nce, VIEWS, unknown="B"),
    "simple contrast": Case(F.simple_contrastive, VIEWS),
    "frames": Case(lambda x: F.pca_frames(x).R, [(normal(B, N, D), "bnd")], unknown="b"),
    "distillation": Case(
        F.linear_distillation_loss,
        [(normal(B, D), "Bd"), (normal(N, D, seed=1), "cd"), (normal(B, 2), "Be"),
         (normal(N, 2, seed=1), "ce")],
        unknown="B",
    ),
}  # fmt: skip


# For which torch 2.10 lacks a rule of its own.
LACKING = ("normalized", "frames")


def placement(term: str, letter: str | None) -> Shard | Replicate:
    split = letter is not None and letter in term
    return Shard(term.index(letter)) if split else Replicate()


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def against_one_process(mesh, case: Case, letters: tuple[str | None, ...]) -> None:
    plain, placed = [], []
    for t, term in case.tensors:
        plain.append(t.clone().requires_grad_(t.is_floating_point()))
        d = distribute_tensor(t, mesh, [placement(term, letter) for letter in letters])
        placed.append(d.requires_grad_(t.is_floating_point()))
    want = first(case.function(*plain, **case.options))
    found = first(case.function(*placed, **case.options))
    assert isinstance(found, DTensor)
    close(found.full_tensor(), want)
    if case.result is not None and case.unknown not in letters:
        # Sums and means of what is split are Partial.
        expected = [
            Partial() if letter and letter not in case.result else placement(case.result, letter)
            for letter in letters
        ]
        assert list(found.placements) == expected, (found.placements, expected)
    if not want.requires_grad:
        return
    if want.dim():
        want, found = want.square().sum(), found.square().sum()
    want.backward()
    found.backward()
    for p, d in zip(plain, placed):
        assert (p.grad is None) == (d.grad is None)
        if p.grad is not None:
            close(d.grad.full_tensor(), p.grad)


def late(mesh) -> None:
    """Ops that are called by name, the plain tensors among the arguments being alike everywhere."""
    queries, keys = normal(B, D), normal(N, D, seed=1)
    placed = distribute_tensor(queries, mesh, [Shard(0)] + [Replicate()] * (mesh.ndim - 1))
    values, index = torch.ops.pyloss.similarity_topk(placed, keys, 2, -1)
    assert values.placements == index.placements == placed.placements
    want = torch.ops.pyloss.similarity_topk(queries, keys, 2, -1)
    close(values.full_tensor(), want[0])
    assert torch.equal(index.full_tensor(), want[1])


def elsewhere() -> None:
    world = dist.get_world_size()
    one, two = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world))
    x = distribute_tensor(normal(B, N), one, [Shard(0)])
    y = distribute_tensor(normal(B, N), two, [Replicate()] * 2)
    raises(RuntimeError, "x_adv must be on the mesh of x",
           lambda: F.margin_shift(x, y, distribute_tensor(labels(B), one, [Shard(0)])))  # fmt: skip
    raises(RuntimeError, "data is written to, and cannot be so as (Partial(sum)",
           lambda: torch.ops.pyloss.scale_(DTensor.from_local(torch.ones(2), one, [Partial()]),
                                           torch.ones(())))  # fmt: skip


def compiled(mesh) -> None:
    x = distribute_tensor(normal(4, N), mesh, [Shard(0)]).requires_grad_()
    found = torch.compile(F.soft_rank, fullgraph=True, backend="aot_eager")(x)
    whole = normal(4, N).requires_grad_()
    want = F.soft_rank(whole)
    assert found.placements == x.placements
    close(found.full_tensor(), want)
    found.square().sum().backward()
    want.square().sum().backward()
    close(x.grad.full_tensor(), whole.grad)


def refused(mesh) -> None:
    x = distribute_tensor(normal(B, N), mesh, [Shard(0)])
    raises(NotImplementedError, "takes DTensors with PyTorch 2.10 or newer", lambda: F.soft_sort(x))


def cases() -> dict[str, Callable[[], None]]:
    pyloss.ops.load_all()
    world, version = dist.get_world_size(), torch_version()
    if version < (2, 10):
        return {"op, refused": lambda: refused(init_device_mesh("cpu", (world,)))}
    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (world,))
    found: dict[str, Callable[[], None]] = {}
    for name, case in CASES.items():
        if name in LACKING and version < (2, 13):
            continue
        capitals = {letter for _, term in case.tensors for letter in term if letter.isupper()}
        ways = {*sorted(capitals), case.unknown or None, None}
        for letters in itertools.product(sorted(ways, key=str), repeat=mesh.ndim):
            found[f"op, {name}, {letters}"] = lambda c=case, s=letters: against_one_process(
                mesh, c, s
            )
    found |= {"op, by name": lambda: late(mesh), "op, elsewhere": elsewhere}
    if world == 3:  # with --exhaustive alone: it takes seconds
        found["op, compiled"] = lambda: compiled(mesh)
    return found
