"""The second smallest number of a set: what an aggregator can learn of it.

The experiment of Learnable Commutative Monoids (2212.08541), shorter: sets of 2 to 8 numbers in
training, and of 16 and 32 in the test. The same encoder and head around each aggregator: sum and
max, which no training makes another; a GRU along the set; and learnable commutative monoids, with
and without the penalty that makes them associative. Printed: the root mean square error, and how
far the answer moves with the order of the elements.
Run: python examples/second_minimum.py [--steps 600] [--width 32] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.nn import LCMAggregation
from pyloss.regularizers import associativity_loss, identity_loss
from pyloss.segment import offsets_from_lengths, to_padded


class Recurrent(nn.Module):
    """The last state of a GRU along the set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        rows, _ = to_padded(x, offsets)
        last = (offsets.diff() - 1).view(-1, 1, 1).expand(-1, 1, rows.shape[2])
        return self.gru(rows)[0].gather(1, last).squeeze(1)


class Model(nn.Module):
    def __init__(self, aggregator: str, width: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width))
        options = dict(op=aggregator, project=False)
        recurrent = aggregator == "recurrent"
        self.aggregate = Recurrent(width) if recurrent else LCMAggregation(width, width, **options)
        self.decode = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """(answers, elements as they are aggregated)"""
        x = self.encode(x.unsqueeze(1))
        return self.decode(self.aggregate(x, offsets=offsets)).squeeze(1), x


def sets(lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers, offsets, the second smallest of each set)"""
    offsets = offsets_from_lengths(lengths)
    x = torch.rand(int(offsets[-1]), generator=generator)
    rows, mask = to_padded(x, offsets, fill=2.0)
    return x, offsets, rows.sort(1).values[:, 1]


def measured(model: Model, length: int, args: argparse.Namespace) -> tuple[float, float]:
    """(root mean square error, mean standard deviation over orders) on sets of one size."""
    generator = torch.Generator().manual_seed(1000 + length)
    x, offsets, y = sets(torch.full((args.test_sets,), length), generator)
    rows, answers = x.view(-1, length), []
    with torch.no_grad():
        for _ in range(8):
            answers.append(model(rows.reshape(-1), offsets)[0])
            order = torch.rand(rows.shape, generator=generator).argsort(1)
            rows = rows.gather(1, order)
    answers = torch.stack(answers)
    return (answers - y).square().mean().sqrt().item(), answers.std(0).mean().item()


def train(aggregator: str, strength: float, seed: int, args: argparse.Namespace) -> list:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = Model(aggregator, args.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    progress = Progress(f"{aggregator}, penalty {strength:g}, seed {seed}", args.steps)
    for step in range(args.steps):
        lengths = torch.randint(2, 9, (args.batch,), generator=generator)
        x, offsets, y = sets(lengths, generator)
        answers, elements = model(x, offsets)
        loss = (answers - y).square().mean()
        total = loss
        if strength:
            op = model.aggregate.combine
            apart = associativity_loss(op, elements, offsets, samples=256, generator=generator)
            total = loss + strength * apart
            if model.aggregate.identity is not None:
                total = total + strength * identity_loss(op, model.aggregate.identity, elements)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.5f}")
    return [measured(model, length, args) for length in args.lengths]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="of the training")
    add("--batch", type=int, default=64, help="sets")
    add("--width", type=int, default=32)
    add("--rate", type=float, default=3e-3)
    add("--penalty", type=float, default=0.01, help="weight of associativity and identity")
    add("--lengths", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="of the test's sets")
    add("--test-sets", type=int, default=500)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/second_minimum.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.width, args.seeds, args.test_sets = 2, 4, 8, 2, 10
        args.lengths = [2, 3, 4]
    torch.set_num_threads(args.threads)

    ways = [(name, 0.0) for name in ("sum", "max", "recurrent", "gru", "pullback")]
    ways.insert(4, ("gru", args.penalty))
    names = {"gru": "monoid, gru", "pullback": "monoid, pullback", "recurrent": "GRU along the set"}
    rows, errors, moves = [], {}, {}
    for way, strength in ways:
        runs = [train(way, strength, seed, args) for seed in range(args.seeds)]
        name = names.get(way, way) + (f", penalty {strength:g}" if strength else "")
        errors[name] = [[100 * error for error, _ in run] for run in runs]
        moves[name] = [[100 * move for _, move in run] for run in runs]
        cells = [spread(column, 2) for column in zip(*errors[name], strict=True)]
        rows.append([name, *cells, spread([run[2] for run in moves[name]], 2)])
    print(f"\nHundredths, mean +- standard deviation over {args.seeds} seeds; trained on 2 to 8")
    sizes = [f"error at {length}" for length in args.lengths]
    print(table(["", *sizes, f"by order at {args.lengths[2]}"], rows))
    titles = ("error", "standard deviation over orders")
    panels = [
        Panel(
            "Second smallest number", "size of a set", f"{title}, hundredths", args.lengths, lines
        )
        for title, lines in zip(titles, (errors, moves), strict=True)
    ]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
