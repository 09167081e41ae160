"""What the threshold-consistent margin does to OPIS, on classes of unequal spread.

Points lie around the centre of their class, in some classes close by, in others far away, and are
seen through a fixed random network. An encoder is trained with a loss of metric learning, with and
without TCM, and judged on classes that it has never seen: how unequally one threshold of the
distance serves them (OPIS), and how often the nearest neighbour is of the same class.
Run: python examples/tcm_opis.py [--classes 40] [--steps 400] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss import metrics
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.nn import ContrastivePairLoss, MultiSimilarityLoss, ThresholdConsistentMarginLoss

LATENT, SEEN, CODE = 16, 32, 16
SPREADS = (0.2, 0.8)  # of the classes, beside centres of a variance of 1
BASES = {
    "contrastive": ContrastivePairLoss(neg_margin=1.0),
    "multi-similarity": MultiSimilarityLoss(alpha=2.0, beta=50.0),
}


def points(classes: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """(what is seen of each point, its class); the first half of the classes is for training."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, LATENT, generator=g)
    # Both halves have all spreads.
    scale = torch.linspace(*SPREADS, (classes + 1) // 2).repeat(2)[:classes]
    labels = torch.arange(classes).repeat_interleave(each)
    z = centre[labels]
    z = z + scale[labels].unsqueeze(1) * torch.randn(z.shape, generator=g)
    mix = torch.randn(LATENT, SEEN, generator=g) / LATENT**0.5
    return torch.tanh(z @ mix), labels


def recall_at_1(codes: Tensor, labels: Tensor) -> float:
    """Per cent."""
    d = torch.cdist(codes, codes).fill_diagonal_(torch.inf)
    return 100 * (labels[d.argmin(1)] == labels).float().mean().item()


def train(
    loss_of: Callable[[Tensor, Tensor], Tensor], data: tuple[Tensor, Tensor], seed: int,
    args: argparse.Namespace, progress: Progress,
) -> tuple[list[float], float, float]:  # fmt: skip
    """(1000 OPIS at each mark, 1000 epsilon-OPIS, recall at 1), of classes that were not seen."""
    torch.manual_seed(seed)
    x, y = data
    held = y >= args.classes // 2
    encoder = nn.Sequential(nn.Linear(SEEN, 128), nn.ReLU(), nn.Linear(128, CODE))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=args.rate)
    train_x, train_y = x[~held], y[~held]
    found = []
    for step in range(args.steps + 1):
        if step % (args.steps // args.marks) == 0:
            with torch.no_grad():
                codes = nn.functional.normalize(encoder(x[held]), dim=1)
            curves = metrics.opis(codes, y[held], return_curves=True)
            found.append(1e3 * curves.opis.item())
        batch = torch.randint(len(train_x), (args.batch,))
        loss = loss_of(encoder(train_x[batch]), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update(min(step + 1, args.steps), f"loss {loss.item():.3f}")
    return found, 1e3 * curves.epsilon_opis.item(), recall_at_1(codes, y[held])


def losses(args: argparse.Namespace) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found = {}
    for name, base in BASES.items():
        found[name] = base
        for m_pos in args.m_pos:
            tcm = ThresholdConsistentMarginLoss(m_pos=m_pos, m_neg=args.m_neg)
            found[f"{name} + TCM {m_pos:g}"] = lambda x, y, base=base, tcm=tcm: (
                base(x, y) + args.weight * tcm(x, y)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--classes", type=int, default=40, help="half of them for training, half held out")
    add("--each", type=int, default=40, help="points of a class")
    add("--weight", type=float, default=2.0, help="of TCM")
    add("--m-pos", type=float, nargs="+", default=[0.9, 0.7], help="thresholds of positives")
    add("--m-neg", type=float, default=0.5, help="threshold of negatives")
    add("--steps", type=int, default=400)
    add("--marks", type=int, default=8, help="points of the plot")
    add("--batch", type=int, default=128)
    add("--rate", type=float, default=1e-3)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/tcm_opis.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.classes, args.each, args.steps, args.marks, args.batch, args.seeds = 8, 6, 2, 2, 16, 2
    torch.set_num_threads(args.threads)

    rows, lines = [], {}
    for name, loss_of in losses(args).items():
        runs = [
            train(loss_of, points(args.classes, args.each, seed), seed, args,
                  Progress(f"{name}, seed {seed}", args.steps))
            for seed in range(args.seeds)
        ]  # fmt: skip
        lines[name] = [marks for marks, _, _ in runs]
        cells = [[marks[-1] for marks, _, _ in runs], *([r[i] for r in runs] for i in (1, 2))]
        rows.append([name, spread(cells[0], 2), spread(cells[1], 1), spread(cells[2], 1, " %")])
    print(
        f"\n{args.classes // 2} held-out classes, mean +- standard deviation of {args.seeds} seeds"
    )
    print(table(["loss", "1000 OPIS", "1000 eps-OPIS", "recall at 1"], rows))
    x = [args.steps // args.marks * k for k in range(args.marks + 1)]
    panels = [
        Panel(name, "steps", "1000 OPIS, held-out classes", x,
              {n: run for n, run in lines.items() if n.startswith(name)})
        for name in BASES
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
