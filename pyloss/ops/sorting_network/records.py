"""What crosses to csrc/bind/sorting_network.cpp, and the names that stand behind its codes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, address

# A name's place is its code in the ops and the kernels.
NETWORKS = ("bitonic", "odd_even", "batcher", "splitter_selection", "auto")
DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
KINDS = ("bce", "row_ce", "col_ce")
# What a loss's target holds: the ranks, or values whose equal ones keep their order or share ranks.
ORDERS = ("ranks", "values", "values_descending", "shared", "shared_descending")
REDUCTIONS = ("none", "mean", "sum")
TASKS = ("sort", "sort_bwd", "apply", "apply_bwd", "permutation", "permutation_bwd", "loss")

_AUTO, _SPLITTER = NETWORKS.index("auto"), NETWORKS.index("splitter_selection")


class Problem(NamedTuple):
    items: int
    n: int
    dtype: int
    network: int
    distribution: int
    steepness: float
    art_lambda: float
    x: int
    # Of splitter selection: pairs of wires, and where each layer starts.
    table: int
    comparators: int
    offsets: int
    layers: int


class Features(NamedTuple):
    f: int
    shared: bool  # by all items of the batch
    transpose: bool  # P^T f, else P f
    width: int


class Targets(NamedTuple):
    order: int
    target: int
    dtype: int
    count: int
    kind: int
    reduction: int


class Call(NamedTuple):
    """A task on CUDA; what it does not read or write is 0."""

    task: int
    features: Features
    kind: int
    g: int
    gy: int
    first: int
    count: int
    y: int
    out: int
    loss: int
    gx: int
    gf: int


RECORDS = (Problem, Features, Targets, Call)


@functools.cache  # never dropped: kernels read the tables by address
def splitter_table(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(pairs (C, 2), offsets of the layers (L + 1)), int32, of splitter selection."""
    from pyloss.kernels import _launch  # with its first use

    _launch.refuse_capture(device, f"splitter selection of {k} from {n}")
    from pyloss.reference.sorting_network import network  # with its first use

    layers = network("splitter_selection", n, k)
    pairs = [pair for layer in layers for pair in zip(layer.lo, layer.hi)]
    offsets = [0]
    for layer in layers:
        offsets.append(offsets[-1] + len(layer.lo))
    table = torch.tensor(pairs, dtype=torch.int32, device=device).reshape(-1, 2)
    return table, torch.tensor(offsets, dtype=torch.int32, device=device)


def _resolved(code: int, n: int) -> int:
    """The code of a network that the kernels know."""
    if code != _AUTO:
        return code
    from pyloss.reference.sorting_network import resolved  # with its first use

    return NETWORKS.index(resolved("auto", n))


def problem(x: Tensor, net: list[int], options: list[float]) -> Problem:
    """Of the arguments of an op; x is a contiguous (b, n)."""
    network, distribution, k = net
    steepness, art_lambda = options
    items, n = x.shape
    network = _resolved(network, n)
    table = comparators = offsets = layers = 0
    if network == _SPLITTER:
        pairs, starts = splitter_table(n, k, x.device)
        table, comparators = pairs.data_ptr(), len(pairs)
        offsets, layers = starts.data_ptr(), len(starts) - 1
    return Problem(
        items, n, DTYPE_CODES[x.dtype], network, distribution, steepness, art_lambda, x.data_ptr(),
        table, comparators, offsets, layers,
    )  # fmt: skip


def features(x: Tensor, f: Tensor, transpose: bool) -> Features:
    return Features(f.data_ptr(), f.shape[0] != x.shape[0], transpose, f.shape[2])


def targets(target: Tensor, count: Tensor | None, codes: list[int]) -> Targets:
    order, kind, reduction = codes
    return Targets(
        order, target.data_ptr(), DTYPE_CODES[target.dtype], address(count), kind, reduction
    )


_NO_FEATURES = Features(0, False, False, 0)


def call(
    task: str,
    *,
    features: Features = _NO_FEATURES,
    kind: int = 0,
    g: Tensor | None = None,
    gy: Tensor | None = None,
    first: Tensor | None = None,
    count: Tensor | None = None,
    y: Tensor | None = None,
    out: Tensor | None = None,
    loss: Tensor | None = None,
    gx: Tensor | None = None,
    gf: Tensor | None = None,
) -> Call:
    tensors = (g, gy, first, count, y, out, loss, gx, gf)
    return Call(TASKS.index(task), features, kind, *map(address, tensors))
