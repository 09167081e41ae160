"""What comp-sum losses say of the zero-one risk: gaps and bounds on scikit-learn's digits.

For each tau a linear classifier whose scores are bounded is trained, which takes its risk near the
least of its class, and the analysis gives the minimizability gap, the constant of the bound and the
bound itself, beside the error that there is.
Run: python examples/comp_sum_bounds.py [--classes 10] [--steps 300] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import pyloss
from pyloss.analysis.comp_sum import analyze
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread


def digits(classes: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y).long()
    return x[y < classes], y[y < classes]


def scores_of(tau: float, seed: int, x: Tensor, y: Tensor, args, progress: Progress) -> Tensor:
    """Logits in [-L, L] of the classifier that has been trained with the loss of tau."""
    torch.manual_seed(seed)
    model = nn.Linear(x.shape[1], args.classes)

    def bounded() -> Tensor:
        return args.bound * torch.tanh(model(x) / args.bound)

    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    for step in range(1, args.steps + 1):
        loss = pyloss.comp_sum_loss(bounded(), y, tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.steps:
            progress.update(step, f"loss {loss.item():.4f}")
    with torch.no_grad():
        return bounded()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--classes", type=int, default=10, help="the first so many digits")
    add("--tau", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0])
    add("--bound", type=float, default=3.0, help="L of the scores")
    add("--steps", type=int, default=300)
    add("--rate", type=float, default=0.05)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/comp_sum_bounds.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.classes, args.steps, args.seeds = 3, 3, 2
    torch.set_num_threads(args.threads)

    x, y = digits(args.classes)
    rows: list[list[str]] = []
    lines: dict[str, list[list[float]]] = {
        name: [[] for _ in range(args.seeds)] for name in ("gap", "bound", "closed form", "error")
    }
    for tau in args.tau:
        cells: dict[str, list[float]] = {name: [] for name in lines}
        for seed in range(args.seeds):
            progress = Progress(f"tau {tau:g}, seed {seed}", args.steps)
            logits = scores_of(tau, seed, x, y, args, progress)
            risk = analyze(logits, y, tau).surrogate_risk
            found = analyze(logits, y, tau, score_bound=args.bound, best_risk=risk)
            for name, value in zip(
                lines, (found.gap, found.bound, found.bound_closed_form, found.zero_one_risk)
            ):
                cells[name].append(float(value))
                lines[name][seed].append(min(float(value), 1.0))
        rows.append([f"tau {tau:g}", *(spread(v, 3) for v in cells.values())])
    print(f"\n{args.classes} classes, scores in [-{args.bound:g}, {args.bound:g}], R* = R(h)")
    print(table(["loss", "gap", "bound", "closed form", "zero-one error"], rows))
    panels = [
        Panel("minimizability gap", "tau", "M", args.tau, {"gap": lines["gap"]}),
        Panel("zero-one error", "tau", "error", args.tau,
              {name: lines[name] for name in ("closed form", "bound", "error")}),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
