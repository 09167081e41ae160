"""Cases, providers and targets of ``lion_k``: one step of the optimiser, in place.

Peers: the loop of lion-pytorch where it is installed (``pip install --no-deps lion-pytorch``); the
same operations written here, "plain loop"; torch's fused AdamW, which has one buffer more to read
and write. "streams" is the floor: torch reads what a step reads and writes what it writes,
``x += g; m = -m``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import nn

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target

LR, DECAY = 1e-4, 0.1
# (tensors, elements of each): a large model, and many small parameters
SIZES = ((200, 500_000), (1000, 1000))
LARGE, SMALL = (f"step {count}x{n}" for count, n in SIZES)
# Of the other functions K, on the large model.
KAPPAS = {"smooth": dict(e=1e-3), "lp": dict(p=2.0)}

TARGETS = [
    Target(f"{LARGE}, time over the floor of its 5 streams", "x_products", LARGE, at_most=1.25),
    Target(f"{LARGE}, speed-up over lion-pytorch's loop", "speedup", LARGE, at_least=3.0),
    Target(f"{LARGE}, speed-up over torch's fused AdamW", "adamw_speedup", LARGE, at_least=1.5),
    Target(f"{SMALL}, speed-up over lion-pytorch's loop", "speedup", SMALL, at_least=5.0),
]


class Problem:
    """Parameters and momenta on which all providers step, one after the other."""

    def __init__(self, count: int, n: int, device: str):
        g = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(n, generator=g).to(device)) for _ in range(count)]
        for p in self.params:
            p.grad = torch.randn(n, generator=g).to(device)
        self.momenta = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def plain(self) -> None:
        """The operations of lion-pytorch's update, in their order."""
        for p, m in zip(self.params, self.momenta):
            p.mul_(1 - LR * DECAY)
            c = m.clone().mul_(0.9).add(p.grad, alpha=1 - 0.9).sign_()
            p.add_(c, alpha=-LR)
            m.mul_(0.99).add_(p.grad, alpha=1 - 0.99)

    @torch.no_grad()
    def streams(self) -> None:
        for p, m in zip(self.params, self.momenta):
            p.add_(p.grad)
            m.neg_()


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def stepping(problem: Problem, make: Make, exact: Make | None = None) -> Run:
    """Steps of an optimiser with the momenta of the problem, checked against ``exact`` or, where
    that is None, the plain loop."""
    optimizer = make(problem.params)
    if "betas" in optimizer.defaults and not isinstance(optimizer, torch.optim.AdamW):
        for p, m in zip(problem.params, problem.momenta):
            optimizer.state[p] |= {"exp_avg": m, "step": 0}

    def check() -> float:
        ours, theirs = Problem(3, 1001, "cpu"), Problem(3, 1001, "cpu")
        step = make(ours.params).step
        other = theirs.plain if exact is None else exact(theirs.params).step
        for _ in range(2):
            step(), other()
        error = max((a - b).abs().max().item() for a, b in zip(ours.params, theirs.params))
        return error / 1e-6

    return Run(call=optimizer.step, check=check)


def lion_pytorch() -> Make:
    try:
        from lion_pytorch import Lion
    except ImportError as error:
        raise Skip(f"cannot be imported: {error}") from error
    return lambda params: Lion(params, lr=LR, weight_decay=DECAY)


def providers(problem: Problem) -> list[Provider]:
    from pyloss import optim

    def ours(**options) -> Make:
        return lambda params: optim.LionK(params, LR, weight_decay=DECAY, **options)

    def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, fused=True)

    found = [
        Provider("pyloss", lambda: stepping(problem, ours())),
        Provider("pyloss lists", lambda: stepping(problem, ours(foreach=True))),
        Provider("lion-pytorch", lambda: stepping(problem, lion_pytorch())),
        Provider("plain loop", lambda: Run(call=problem.plain)),
        Provider("torch AdamW fused", lambda: stepping(problem, adamw, adamw)),
        Provider("streams", lambda: Run(call=problem.streams)),
    ]
    for kappa, args in KAPPAS.items():
        kind = dict(kappa=kappa, kappa_args=args)
        by_lists = ours(**kind, foreach=True)
        found.append(
            Provider(
                f"pyloss {kappa}",
                lambda kind=kind, by_lists=by_lists: stepping(problem, ours(**kind), by_lists),
            )
        )
    return found


def cases(ctx: Context) -> Iterator[Case]:
    for count, n in SIZES:
        yield _case(count, n, ctx)


def _case(count: int, n: int, ctx: Context) -> Case:
    name = f"step {count}x{n}"
    count, n = (min(count, 5), min(n, 500)) if ctx.quick else (count, n)
    installed = importlib.util.find_spec("lion_pytorch") is not None
    return Case(
        name=name,
        group="step",
        mode="step",
        shape=(count, n),
        dtype="fp32",
        useful_bytes=5 * 4 * count * n,
        tensor_bytes=4 * count * n,
        open=lambda: providers(Problem(count, n, ctx.device)),
        baseline="lion-pytorch" if installed else "plain loop",
        products="streams",
        against={"adamw_speedup": "torch AdamW fused"},
        rounds=6 if count * n > 10**7 else 20,
    )
