"""Five listwise losses on made queries, judged by NDCG@10, beside a pointwise one.

A query has 20 documents of ten features. How good one is says scikit-learn's `make_friedman1`, with
noise; its grade, 0 to 4, is its place in the query: one document has a 4, ten have a 0. Then the
features of all its documents are moved by an offset of the query's own. A small network scores
each document by itself; the squared error of the grades stands beside the losses of lists.
Run: python examples/rank_queries.py [--noise 2] [--steps 300] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from pyloss import functional as F
from pyloss import metrics
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread

DOCUMENTS, FEATURES = 20, 10
GRADES = torch.tensor([4] + 2 * [3] + 3 * [2] + 4 * [1] + 10 * [0])  # best document first


def squared_error(scores: Tensor, relevance: Tensor) -> Tensor:
    return TF.mse_loss(scores, relevance.float())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared error": squared_error,
    "list_net": F.list_net,
    "list_mle": F.list_mle,
    "approx_ndcg": F.approx_ndcg_loss,
    "neural_ndcg": F.neural_ndcg_loss,
    "lambda_loss": F.lambda_loss,
}


def queries(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features (count, 20, 10) and grades (count, 20)."""
    from sklearn.datasets import make_friedman1

    features, good = make_friedman1(
        count * DOCUMENTS, n_features=FEATURES, noise=noise, random_state=seed
    )
    features = torch.from_numpy(features).float().view(count, DOCUMENTS, FEATURES)
    place = torch.from_numpy(good).view(count, DOCUMENTS).argsort(1, descending=True).argsort(1)
    # A query's own taste: its documents are all a little better or worse in every feature.
    own = 0.3 * torch.randn(count, 1, FEATURES, generator=torch.Generator().manual_seed(seed))
    return features + own, GRADES[place]


def train(name: str, seed: int, args: argparse.Namespace) -> list[float]:
    """NDCG@10, per cent, of held-out queries at every measurement."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = queries(args.queries, args.noise, seed)
    test_x, test_y = queries(args.test_queries, args.noise, 1234)
    model = nn.Sequential(
        nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    progress = Progress(f"{name}, seed {seed}", args.steps)
    found = []
    for step in range(args.steps):
        batch = torch.randint(len(x), (args.batch,), generator=generator)
        loss = LOSSES[name](model(x[batch]).squeeze(2), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            with torch.no_grad():
                scores = model(test_x).squeeze(2)
            found.append(100 * metrics.ndcg(scores, test_y, 10, gain="exponential").item())
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--queries", type=int, default=200)
    add("--test-queries", type=int, default=500)
    add("--noise", type=float, default=2.0, help="of how good a document is")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=32, help="queries")
    add("--rate", type=float, default=3e-3)
    add("--seeds", type=int, default=3)
    add("--every", type=int, default=25, help="steps between measurements")
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/rank_queries.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.queries, args.test_queries, args.steps, args.batch, args.seeds = 6, 6, 2, 3, 2
    torch.set_num_threads(args.threads)

    curves = {name: [train(name, seed, args) for seed in range(args.seeds)] for name in LOSSES}
    rows = [[name, spread([r[-1] for r in runs], 2)] for name, runs in curves.items()]
    print(
        f"\nNDCG@10 (gain 2^y - 1) of {args.test_queries} held-out queries, per cent, "
        f"mean +- standard deviation over {args.seeds} seeds"
    )
    print(table(["loss", "NDCG@10"], rows))
    x = [min(args.steps, (i + 1) * args.every) for i in range(len(next(iter(curves.values()))[0]))]
    print(draw(args.plot, [Panel("Held-out queries", "step", "NDCG@10, %", x, curves)]))


if __name__ == "__main__":
    main()
