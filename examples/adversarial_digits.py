"""Adversarial training on scikit-learn's digits: clean, robust, and worst-class robust accuracy.

A small network is trained plainly, on attacked inputs (PGD), with TRADES, with the smooth
adversarial comp-sum loss, and doubly robustly (the attacked inputs under the worst weights of the
samples), and each is judged by a stronger attack on held-out digits.
Run: python examples/adversarial_digits.py [--eps 0.1] [--epochs 25] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.adversarial import AdvCompSum, DoublyRobustATLoss, pgd_attack, trades_loss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread

CLIP = (0.0, 1.0)


def digits(held_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) for training and held out, values in [0, 1], shuffled alike for every seed."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x).float()[order] / 16, torch.from_numpy(y).long()[order]
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


def methods(args: argparse.Namespace) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """New ones for each run: two of them keep state."""
    attack = dict(eps=args.eps, steps=args.steps, clip=CLIP)
    starts = torch.Generator().manual_seed(0)

    def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def attacked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moved = pgd_attack(model, x, y, **attack, generator=starts)
        return nn.functional.cross_entropy(model(moved), y)

    def trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return trades_loss(model, x, y, **attack, beta=args.beta, generator=starts)

    return {
        "plain": plain,
        "PGD training": attacked,
        "TRADES": trades,
        "adversarial comp-sum": AdvCompSum(1.0, args.rho, args.nu, **attack),
        "doubly robust": DoublyRobustATLoss(args.r, **attack),
    }


def judge(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> list[float]:
    """Accuracy in per cent: clean, robust, and robust of the worst class."""
    model.eval()
    moved = pgd_attack(
        model, x, y, args.eps, steps=args.judge_steps, clip=CLIP, restarts=2,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    with torch.no_grad():
        clean, robust = (model(z).argmax(1) == y for z in (x, moved))
    of_class = [robust[y == c].float().mean() for c in y.unique()]
    return [100 * float(v) for v in (clean.float().mean(), robust.float().mean(), min(of_class))]


def train(name: str, seed: int, data, args: argparse.Namespace) -> list[list[float]]:
    """What judge says after each mark."""
    torch.manual_seed(seed)
    x, y, held_x, held_y = data
    width = args.width
    model = nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip
    loss_of = methods(args)[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    progress, found = Progress(f"{name}, seed {seed}", args.epochs), []
    for epoch in range(1, args.epochs + 1):
        model.train()
        for batch in torch.randperm(len(x)).split(args.batch):
            loss = loss_of(model, x[batch], y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % max(1, args.epochs // args.marks) == 0:
            found.append(judge(model, held_x, held_y, args))
        progress.update(epoch, f"loss {loss.item():.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--eps", type=float, default=0.1, help="radius of the attacks, l_inf, of values in [0, 1]")
    add("--steps", type=int, default=5, help="of an attack in training")
    add("--judge-steps", type=int, default=20, help="of an attack that judges; two starts each")
    add("--beta", type=float, default=6.0, help="of TRADES")
    add("--rho", type=float, default=1.0, help="of the comp-sum loss")
    add("--nu", type=float, default=0.3, help="of the comp-sum loss")
    add("--r", type=float, default=1.0, help="of the doubly robust loss; large: PGD training")
    add("--epochs", type=int, default=25)
    add("--marks", type=int, default=5, help="points of the plot")
    add("--batch", type=int, default=64)
    add("--width", type=int, default=64)
    add("--rate", type=float, default=2e-3)
    add("--held-out", type=int, default=600)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/adversarial_digits.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.marks, args.seeds, args.batch, args.width = 1, 1, 2, 400, 16
        args.steps = args.judge_steps = 2
    torch.set_num_threads(args.threads)

    data, rows, lines = digits(args.held_out), [], {}
    for name in methods(args):
        runs = [train(name, seed, data, args) for seed in range(args.seeds)]
        last = list(zip(*(run[-1] for run in runs)))
        rows.append([name, *(spread(list(cell), 1, " %") for cell in last)])
        lines[name] = runs
    print(f"\nl_inf {args.eps:g}, {args.held_out} held-out digits, {args.seeds} seeds")
    print(table(["training", "clean", "robust", "robust, worst class"], rows))
    each = max(1, args.epochs // args.marks)
    x = [each * k for k in range(1, args.epochs // each + 1)]
    panels = [
        Panel(title, "epochs", "per cent", x,
              {name: [[m[i] for m in run] for run in runs] for name, runs in lines.items()})
        for i, title in enumerate(["clean accuracy", "robust accuracy", "robust, worst class"])
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
