"""Five-way few-shot learning of digits: ICNN and Proto-Triplet beside prototypical networks.

Digits turned by 0, 90, 180 and 270 degrees are 40 classes, and each image is lit in its own way: a
smooth pattern is laid over it. An encoder is trained in episodes on the classes of five digits, and
judged by the nearest prototype on those of the other five, which it has never seen: one and five
images of each of five classes are given, ten of each are to be named.
Run: python examples/few_shot.py [--steps 300] [--episodes 200] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits
from pyloss.functional import icnn_loss, proto_triplet_loss, prototypes

WAY = 5


def lit(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """(n, 64): with a mixture of the nine slowest cosines of the image over each."""
    at = (torch.arange(8) + 0.5) * torch.pi / 8
    waves = torch.stack([torch.cos(k * at) for k in range(3)])
    patterns = torch.einsum("ux,vy->uvxy", waves, waves).reshape(9, 64)
    weights = strength * torch.randn(len(images), 9, generator=generator)
    return images.flatten(1) + weights @ patterns


def classes_of(digits: list[int], strength: float) -> list[Tensor]:
    """Images (n, 64) of each digit in each of four orientations."""
    generator = torch.Generator().manual_seed(0)
    parts = load_digits()
    images = torch.cat([part.images for part in parts])
    labels = torch.cat([part.labels for part in parts])
    return [
        lit(images[labels == digit].rot90(turns, (1, 2)), strength, generator)
        for digit in digits
        for turns in range(4)
    ]


def episode(classes: list[Tensor], shots: int, queries: int, generator) -> tuple[Tensor, Tensor]:
    """(support (way * shots, 64), queries (way * queries, 64)), class by class."""
    chosen = torch.randperm(len(classes), generator=generator)[:WAY].tolist()
    both = [
        classes[c][torch.randperm(len(classes[c]), generator=generator)[: shots + queries]]
        for c in chosen
    ]
    return torch.cat([x[:shots] for x in both]), torch.cat([x[shots:] for x in both])


def labels_of(count: int) -> Tensor:
    return torch.arange(WAY).repeat_interleave(count)


def cross_entropy(s: Tensor, y: Tensor, q: Tensor, z: Tensor) -> Tensor:
    """Of the squared distances to the prototypes."""
    return F.cross_entropy(-torch.cdist(q, prototypes(s, y, WAY)).square(), z)


def proto_triplet(s: Tensor, y: Tensor, q: Tensor, z: Tensor) -> Tensor:
    return proto_triplet_loss(q, z, prototypes(s, y, WAY))


def icnn(s: Tensor, y: Tensor, q: Tensor, z: Tensor) -> Tensor:
    """Of the whole episode."""
    each = (len(y) + len(z)) // WAY
    return icnn_loss(torch.cat([s, q]), torch.cat([y, z]), neighbours=max(each, 4))


LOSSES: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "cross entropy": (cross_entropy,),
    "Proto-Triplet": (proto_triplet,),
    "ICNN": (icnn,),
    "ICNN + Proto-Triplet": (icnn, proto_triplet),
    "all three": (cross_entropy, icnn, proto_triplet),
}


def accuracy(encoder: nn.Module, classes: list[Tensor], shots: int, episodes: int) -> float:
    """Per cent, over the same episodes in every call."""
    generator, right = torch.Generator().manual_seed(99), []
    with torch.no_grad():
        for _ in range(episodes):
            s, q = (encoder(x) for x in episode(classes, shots, 10, generator))
            p = prototypes(s, labels_of(shots), WAY)
            right.append((torch.cdist(q, p).argmin(1) == labels_of(10)).float().mean())
    return 100 * torch.stack(right).mean().item()


def train(
    losses: tuple[Callable[..., Tensor], ...], seen: list[Tensor], unseen: list[Tensor],
    seed: int, args: argparse.Namespace, progress: Progress,
) -> tuple[list[float], float]:  # fmt: skip
    """(five-shot accuracy at each mark, one-shot accuracy) on classes that were not seen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=args.rate)
    y, z = labels_of(args.shots), labels_of(args.queries)
    found = []
    for step in range(args.steps + 1):
        if step % (args.steps // args.marks) == 0:
            found.append(accuracy(encoder, unseen, 5, args.episodes))
        s, q = (encoder(x) for x in episode(seen, args.shots, args.queries, generator))
        loss = sum(one(s, y, q, z) for one in losses) / len(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update(min(step + 1, args.steps), f"loss {loss.item():.3f}")
    return found, accuracy(encoder, unseen, 1, args.episodes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=300, help="episodes of training")
    add("--shots", type=int, default=5, help="given images of a class, in training")
    add("--queries", type=int, default=10, help="images of a class to be named, in training")
    add("--light", type=float, default=0.3, help="strength of the patterns")
    add("--episodes", type=int, default=200, help="on which is judged")
    add("--marks", type=int, default=5, help="points of the plot")
    add("--rate", type=float, default=1e-3)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/few_shot.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.episodes, args.marks, args.seeds = 2, 3, 2, 2
    torch.set_num_threads(args.threads)

    rows, lines = [], {}
    splits = []  # which five digits are seen, by seed
    for seed in range(args.seeds):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
        splits.append((classes_of(order[:5], args.light), classes_of(order[5:], args.light)))
    pixels = [
        [accuracy(nn.Identity(), unseen, shots, args.episodes) for _, unseen in splits]
        for shots in (1, 5)
    ]
    rows.append(["pixels", *(spread(values, 1, " %") for values in pixels)])
    for name, losses in LOSSES.items():
        runs = [
            train(losses, *splits[seed], seed, args, Progress(f"{name}, seed {seed}", args.steps))
            for seed in range(args.seeds)
        ]
        lines[name] = [marks for marks, _ in runs]
        cells = [[one for _, one in runs], [marks[-1] for marks, _ in runs]]
        rows.append([name, *(spread(values, 1, " %") for values in cells)])
    print(f"\n{WAY} of 20 unseen classes, mean +- standard deviation of {args.seeds} seeds")
    print(table(["loss", "1 shot", "5 shots"], rows))
    lines["pixels"] = sum(pixels[1]) / len(pixels[1])
    x = [args.steps // args.marks * k for k in range(args.marks + 1)]
    print(draw(args.plot, [Panel("5 shots", "episodes", "accuracy, unseen classes, %", x, lines)]))


if __name__ == "__main__":
    main()
