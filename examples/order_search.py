"""A model that writes a set finds the order in which that is easy; in a fixed bad order it cannot.

Five variables of a Markov chain, each a step of 0 or 1 from the one before, round a circle of
eight values. A target is the set of all five (which variable, which value); the model is a bigram:
the next element from the last one alone. Along the chain it can be exact; when the variables are
written as 1, 4, 2, 5, 3, whatever is written last says little of what comes next. Printed: nats
of held-out sets (negative log-likelihood), in the order that the model stands for, the fixed one or
the best of all 120; and of the set itself, in any order.
Run: python examples/order_search.py [--steps 400] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import order_search_loss
from pyloss.nn import OrderSearchSchedule

VARIABLES, VALUES = 5, 8
STAY = 0.8  # probability of a step of 0
GOOD, BAD = (0, 1, 2, 3, 4), (0, 3, 1, 4, 2)
SEARCHES = ("sample", "greedy", "beam", "exhaustive")


def sets(count: int, generator: torch.Generator) -> Tensor:
    """(count, 5): elements variable * 8 + value, in the order of the chain."""
    steps = (torch.rand(count, VARIABLES, generator=generator) > STAY).long()
    steps[:, 0] = torch.randint(VALUES, (count,), generator=generator)
    return steps.cumsum(1) % VALUES + VALUES * torch.arange(VARIABLES)


def nats_of_chain(written: Tensor) -> float:
    """What the chain itself gives these sets: a model comes below it by luck alone."""
    moved = (written.diff(dim=1) != VALUES).float().mean().item()
    step = -(1 - moved) * math.log(STAY) - moved * math.log(1 - STAY)
    return math.log(VALUES) + (VARIABLES - 1) * step


class Bigram(nn.Module):
    """Logarithms of the probabilities of the next element, by the last one."""

    def __init__(self) -> None:
        super().__init__()
        elements = VARIABLES * VALUES
        self.table = nn.Parameter(0.1 * torch.randn(elements + 1, elements))

    def forward(self, prefix: Tensor) -> Tensor:
        start = torch.full((len(prefix),), len(self.table) - 1)
        last = prefix[:, -1] if prefix.shape[1] else start
        return self.table[last].log_softmax(-1)


def fixed_loss(model: Bigram, target: Tensor, order: tuple[int, ...]) -> Tensor:
    """Of one order for all sets."""
    written = target[:, list(order)]
    terms = [
        model(written[:, :t]).gather(1, written[:, t : t + 1]) for t in range(written.shape[1])
    ]
    return -torch.cat(terms, 1).sum(1).mean()


def train(
    name: str, warmup: int, temperature: float, seed: int, args: argparse.Namespace
) -> list[tuple[float, float]]:
    """What `judge` says of held-out sets at every measurement."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model, test = Bigram(), sets(args.test_sets, torch.Generator().manual_seed(1234))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    order = {"fixed, good": GOOD, "fixed, bad": BAD}.get(name)
    mode = name.split(",")[0].split()[0]
    schedule = None if order else OrderSearchSchedule(warmup, mode)
    progress = Progress(f"{name}, seed {seed}", args.steps)
    found = []
    for step in range(args.steps):
        # The elements come in no order: the set says nothing of the chain.
        target = sets(args.batch, generator)
        if schedule is None:
            loss = fixed_loss(model, target, order)
        else:
            shuffled = target[:, torch.randperm(VARIABLES, generator=generator)]
            loss, _ = order_search_loss(
                model,
                shuffled,
                mode=schedule.step(),
                temperature=temperature,
                generator=generator,
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            found.append(judge(model, test, order))
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return found


@torch.no_grad()
def judge(model: Bigram, test: Tensor, order: tuple[int, ...] | None) -> tuple[float, float]:
    """Of the order that the model stands for, and of the set: the sum over all orders."""
    written = test[:, torch.tensor(list(itertools.permutations(range(VARIABLES))))]
    start = torch.full_like(written[..., :1], len(model.table) - 1)
    before = torch.cat([start, written[..., :-1]], -1)
    each = model.table.log_softmax(-1)[before, written].sum(-1)
    own = each.amax(1).neg().mean().item() if order is None else fixed_loss(model, test, order)
    return float(own), each.logsumexp(1).neg().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=400)
    add("--warmup", type=int, default=100, help="steps with random orders before a search")
    add("--batch", type=int, default=64)
    add("--rate", type=float, default=0.05)
    add("--seeds", type=int, default=3)
    add("--test-sets", type=int, default=200)
    add("--every", type=int, default=50, help="steps between measurements")
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/order_search.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.warmup, args.batch, args.seeds, args.test_sets = 4, 2, 8, 2, 8
    torch.set_num_threads(args.threads)

    ways = {"fixed, good": (0, 1.0), "fixed, bad": (0, 1.0), "uniform": (0, 1.0)}
    ways |= {f"{mode}, no warm-up": (0, 1.0) for mode in SEARCHES}
    ways |= {f"{mode}, warm-up": (args.warmup, 1.0) for mode in SEARCHES}
    ways["sample at 0.2, warm-up"] = args.warmup, 0.2
    curves = {
        name: [train(name, *way, seed, args) for seed in range(args.seeds)]
        for name, way in ways.items()
    }
    best = nats_of_chain(sets(args.test_sets, torch.Generator().manual_seed(1234)))
    rows = [
        [name, *(spread([run[-1][i] for run in runs], 2) for i in (0, 1))]
        for name, runs in curves.items()
    ]
    print(f"\nnats per held-out set, mean +- standard deviation over {args.seeds} seeds")
    print(f"the chain itself: {best:.2f}")
    print(table(["trained on", "in its order", "in any order"], rows))
    x = [min(args.steps, (i + 1) * args.every) for i in range(len(curves["uniform"][0]))]
    panels = []
    for i, title in enumerate(("in its order", "in any order")):
        lines: dict = {
            name: [[point[i] for point in run] for run in runs]
            for name, runs in curves.items()
            if "no warm-up" not in name
        }
        lines["the chain itself"] = best
        panels.append(Panel(f"Held-out sets, {title}", "step", "nats per set", x, lines))
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
