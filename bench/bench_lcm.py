"""Cases, providers and targets of ``LCMAggregation``: sets reduced by a symmetrised GRU in a tree.

Peers: the dense one of torch_geometric, where it is installed, which pads all sets to the largest
of the batch; and one GRU along each set, ``torch.nn.GRU`` on a packed sequence, which takes as many
steps as the largest set has elements. The dense peer reduces its padding like elements, so that on
sets of unequal sizes its results are those of the padded sets: there it is checked on each set
alone, and timed on the batch. "products" is nothing but the matrix products of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target

UNIFORM, SKEWED = "uniform degrees", "power-law degrees"
WIDTHS = (32, 64)

TARGETS = [
    Target(
        f"{SKEWED}, fwd+bwd, speed-up over torch_geometric's dense LCM",
        "speedup",
        f"{SKEWED} .*",
        at_least=5.0,
    ),
    Target(
        f"{UNIFORM}, fwd+bwd, speed-up over torch_geometric's dense LCM",
        "speedup",
        f"{UNIFORM} .*",
        at_least=1.0,
    ),
    Target(
        f"{SKEWED}, fwd+bwd, speed-up over a GRU along each set",
        "gru_speedup",
        f"{SKEWED} .*",
        at_least=3.0,
    ),
]


def degrees(kind: str, quick: bool) -> Tensor:
    """Sizes of the sets: all 16, or of a tail with exponent 2.2, from 2 to 300."""
    count = 20 if quick else 1000
    if kind == UNIFORM:
        return torch.full((count,), 16)
    u = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * (1 - u) ** (-1 / 1.2)).long().clamp(max=40 if quick else 300)


class Problem:
    """Elements in sets, one cell for all, and what comes back to the results."""

    def __init__(self, lengths: Tensor, d: int, device: str):
        generator = torch.Generator().manual_seed(0)
        self.d, self.lengths = d, lengths.to(device)
        self.offsets = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
        self.index = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        self.x = torch.randn(len(self.index), d, generator=generator).to(device)
        self.g = torch.randn(len(lengths), d, generator=generator).to(device)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.cell = nn.GRUCell(d, d).to(device)

    def weights(self) -> list[Tensor]:
        return list(self.cell.parameters())

    def step(self, fn: Callable[[Tensor], Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        x = self.x.detach().requires_grad_()
        y = fn(x)
        return (y.detach(), *torch.autograd.grad(y, [x, *weights], self.g))

    def exact(self) -> tuple[Tensor, ...]:
        """Set by set and pair by pair, in float64."""
        cell = nn.GRUCell(self.d, self.d).double()
        cell.load_state_dict(self.cell.state_dict())
        x = self.x.detach().cpu().double().requires_grad_()
        found = []
        for rows in x.split(self.lengths.tolist()):
            while len(rows) > 1:
                a, b = rows[: len(rows) // 2 * 2 : 2], rows[1::2]
                rest = rows[len(rows) // 2 * 2 :]
                rows = torch.cat([(cell(a, b) + cell(b, a)) / 2, rest])
            found.append(rows)
        y = torch.cat(found)
        return (y.detach(), *torch.autograd.grad(y, [x, *cell.parameters()], self.g.cpu().double()))


def worst(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    errors = [
        (a.cpu().double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
        for a, b in zip(found, exact)
    ]
    return max(errors).item() / 1e-4


def ours(problem: Problem) -> Run:
    from pyloss.functional import segment_gru_reduce

    cell = problem.cell
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]

    def call() -> tuple[Tensor, ...]:
        return problem.step(lambda x: segment_gru_reduce(x, problem.offsets, *weights), weights)

    return Run(call=call, check=lambda: worst(call(), problem.exact()))


def dense(problem: Problem) -> Run:
    try:
        from torch_geometric.nn.aggr import LCMAggregation
    except ImportError as error:
        raise Skip("torch_geometric is not installed") from error
    peer: Any = LCMAggregation(problem.d, problem.d, project=False).to(problem.x.device)
    peer.gru_cell = problem.cell

    def call(x: Tensor | None = None) -> Any:
        count = len(problem.lengths)
        return problem.step(lambda x: peer(x, problem.index, dim_size=count), problem.weights())

    def check() -> float:
        if bool((problem.lengths == problem.lengths[0]).all()):
            return worst(call(), problem.exact())
        with torch.no_grad():
            alone = [
                peer(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
                for rows in problem.x.split(problem.lengths.tolist())
            ]
        return worst((torch.cat(alone),), problem.exact()[:1])

    return Run(call=call, check=check)


def recurrent(problem: Problem) -> Run:
    """Another function of the set, of as many products: it has no value to be checked against."""
    layer = nn.GRU(problem.d, problem.d).to(problem.x.device)
    lengths = problem.lengths.tolist()
    order = problem.lengths.argsort(descending=True)
    # Elements in the order of a packed sequence: the first of all sets, then the second, ...
    batch_sizes = torch.stack([(problem.lengths > t).sum() for t in range(max(lengths))]).cpu()
    places = torch.cat([problem.offsets[order[:n]] + t for t, n in enumerate(batch_sizes.tolist())])
    weights = list(layer.parameters())

    def run(x: Tensor) -> Tensor:
        packed = nn.utils.rnn.PackedSequence(x[places], batch_sizes)
        return layer(packed)[1][0][order.argsort()]

    return Run(call=lambda: problem.step(run, weights))


def products(problem: Problem) -> Run:
    """Those of the forward, and twice as many of the backward, of all pairs at once."""
    rows = 2 * int((problem.lengths - 1).clamp(min=0).sum())
    d, cell = problem.d, problem.cell
    x = torch.randn(rows, d, device=problem.x.device)
    weight = torch.cat([cell.weight_ih, cell.weight_hh]).detach()

    def call() -> None:
        both = x @ weight.mT
        both @ weight
        both.mT @ x

    return Run(call=call)


def cases(ctx: Context) -> Iterator[Case]:
    for kind in (UNIFORM, SKEWED):
        for d in WIDTHS:
            lengths = degrees(kind, ctx.quick)
            yield Case(
                name=f"{kind} {len(lengths)} sets, {int(lengths.sum())} x {d}",
                group="fwd+bwd",
                mode="fwd+bwd",
                shape=(int(lengths.sum()), d),
                dtype="fp32",
                useful_bytes=0,  # matrix products, not a stream
                tensor_bytes=4 * int(lengths.sum()) * d,
                open=lambda lengths=lengths, d=d: _providers(Problem(lengths, d, ctx.device)),
                baseline="torch_geometric",
                products="products",
                against={"gru_speedup": "GRU along the set"},
                rounds=5,
            )


def _providers(problem: Problem) -> list[Provider]:
    return [
        Provider("pyloss", lambda: ours(problem)),
        Provider("torch_geometric", lambda: dense(problem)),
        Provider("GRU along the set", lambda: recurrent(problem)),
        Provider("products", lambda: products(problem)),
    ]
