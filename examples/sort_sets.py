"""Numbers sorted by pointing at them: a set encoder (read, process) and a pointer decoder (write).

The sorting experiment of Order Matters (1511.06391), shorter: N random numbers in, their order out,
with and without process steps and glimpses. The decoder starts from the state of the process block;
without steps that is empty, and what it knows of the set comes through its glimpses and pointers.
Printed: shares of held-out sets that are wholly right, and of elements at their place, both
when the model goes on from what it wrote itself. Nothing keeps it from pointing at an element
twice: with --mask-used any score that falls with the number sorts, and 100 steps give 100 %.
Run: python examples/sort_sets.py [--n 5 10] [--process 0 5] [--steps 400] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.nn import ReadProcessWrite


def train(
    n: int, process: int, glimpses: int, seed: int, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """(sets right, elements right), per cent, at every measurement."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    test = torch.rand(args.test_sets, n, 1, generator=torch.Generator().manual_seed(1234))
    model = ReadProcessWrite(
        1, args.hidden, steps=process, glimpses=glimpses, mask_used=args.mask_used
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    progress = Progress(f"N {n}, {process} steps, {glimpses} glimpses, seed {seed}", args.steps)
    exact, element = [], []
    for step in range(args.steps):
        x = torch.rand(args.batch, n, 1, generator=generator)
        truth = x.squeeze(2).argsort(1)
        logits, _ = model(x, target=truth)
        loss = F.cross_entropy(logits.mT, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            with torch.no_grad():
                right = model(test).order == test.squeeze(2).argsort(1)
            exact.append(100 * right.all(1).float().mean().item())
            element.append(100 * right.float().mean().item())
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return exact, element


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--n", type=int, nargs="+", default=[5, 10], help="numbers in a set")
    add("--process", type=int, nargs="+", default=[0, 5], help="process steps")
    add("--glimpses", type=int, nargs="+", default=[0, 1])
    add("--steps", type=int, default=400, help="of the training")
    add("--batch", type=int, default=64)
    add("--hidden", type=int, default=64)
    add("--rate", type=float, default=3e-3)
    add("--seeds", type=int, default=3)
    add("--test-sets", type=int, default=1000)
    add("--every", type=int, default=40, help="steps between measurements")
    add("--mask-used", action="store_true", help="an element is pointed at once")
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/sort_sets.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.n, args.process, args.steps, args.batch, args.hidden = [3, 4], [0, 1], 2, 4, 8
        args.seeds, args.test_sets = 2, 20
    torch.set_num_threads(args.threads)

    rows, panels = [], []
    for n in args.n:
        lines = {}
        for process in args.process:
            for glimpses in args.glimpses:
                runs = [train(n, process, glimpses, seed, args) for seed in range(args.seeds)]
                exact, element = [list(curves) for curves in zip(*runs, strict=True)]
                name = f"{process} steps, {glimpses} glimpse" + "s" * (glimpses != 1)
                lines[name] = exact
                cells = [spread([curve[-1] for curve in c], 1, " %") for c in (exact, element)]
                rows.append([f"N = {n}, {name}", *cells])
        measured = len(exact[0])
        x = [min(args.steps, (i + 1) * args.every) for i in range(measured)]
        panels.append(Panel(f"N = {n}", "training step", "sets in order, %", x, lines))
    print(f"\n{args.test_sets} held-out sets, mean +- standard deviation over {args.seeds} seeds")
    print(table(["", "sets in order", "elements at their place"], rows))
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
