"""Classes that come one task after the other: a recursive ridge against fine-tuning, on digits.

A small network is trained on the base classes and frozen. The others come in tasks that hold new
classes together with samples of old ones (generalised class-incremental learning), and no sample
may be kept. The analytic classifier ends where ridge regression on all samples at once does;
stochastic gradient descent on task after task does not.
Run: python examples/analytic_continual.py [--tasks 5] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.research.continual import AnalyticClassifier

METHODS = ("analytic", "joint ridge", "fine-tuned head", "fine-tuned network", "network, joint")


class Data(NamedTuple):
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(x).float()[order] / 16, torch.from_numpy(y).long()[order]
    return Data(x[:1200], y[:1200], x[1200:], y[1200:])


def stream(y: Tensor, tasks: int, blur: float, generator: torch.Generator) -> list[Tensor]:
    """Indices of each task: the classes in equal parts, each sample moved to a random task with
    the probability blur."""
    home = torch.randperm(10, generator=generator) * tasks // 10
    task = home[y]
    moved = torch.rand(len(y), generator=generator) < blur
    task = torch.where(moved, torch.randint(tasks, (len(y),), generator=generator), task)
    return [(task == t).nonzero()[:, 0] for t in range(tasks)]


def train(parts: list[nn.Module], x: Tensor, y: Tensor, epochs: int, g: torch.Generator) -> None:
    """SGD on the parameters of all parts, one after the other applied."""
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=g).split(32):
            logits = x[batch]
            for part in parts:
                logits = part(logits)
            optimizer.zero_grad()
            pyloss.fused_cross_entropy(logits, y[batch]).backward()
            optimizer.step()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())


@torch.no_grad()
def accuracy(logits: Tensor, y: Tensor, seen: Tensor) -> float:
    """On test samples of the classes that were there, in percent."""
    keep = torch.isin(y, seen)
    return 100 * (logits.argmax(1) == y)[keep].double().mean().item()


def joint_weights(model: AnalyticClassifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of ridge regression on all samples, by the normal equations; and what gives features."""
    features = (model.backbone(x.double()) @ model.expansion.mT).relu()
    eye = torch.eye(features.shape[1], dtype=torch.float64)
    target = nn.functional.one_hot(y, 10).double()
    return torch.linalg.solve(
        features.mT @ features + model.ridge.gamma * eye, features.mT @ target
    )


def run(blur: float, seed: int, args, progress: Progress) -> tuple[dict[str, list[float]], float]:
    """Accuracy after each task by method; the largest difference of a weight from the joint one."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data = digits(seed)
    body, base_head = network(), nn.Linear(64, 10)
    base = data.y < args.base
    train([body, base_head], data.x[base], data.y[base], args.epochs, g)
    # In float64: what rounds a sample by the size of its batch is no longer joint training.
    frozen = copy.deepcopy(body).double()
    model = AnalyticClassifier(frozen, 64, args.buffer, args.gamma, g)
    head, own_body, own_head = nn.Linear(64, 10), copy.deepcopy(body), nn.Linear(64, 10)
    body.requires_grad_(False)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    so_far = torch.zeros(0, dtype=torch.int64)
    for t, part in enumerate(stream(data.y, args.tasks, blur, g)):
        x, y = data.x[part], data.y[part]
        so_far = torch.cat([so_far, part])
        for batch in torch.arange(len(part)).split(32):
            model.fit_batch(x[batch].double(), y[batch])
        train([body, head], x, y, args.epochs, g)
        train([own_body, own_head], x, y, args.epochs, g)
        whole, whole_head = network(), nn.Linear(64, 10)
        train([whole, whole_head], data.x[so_far], data.y[so_far], args.epochs, g)
        joint = joint_weights(model, data.x[so_far], data.y[so_far])
        features = (model.backbone(data.x_test.double()) @ model.expansion.mT).relu()
        for name, logits in zip(METHODS, (
            model(data.x_test.double()), features @ joint, head(body(data.x_test)),
            own_head(own_body(data.x_test)), whole_head(whole(data.x_test)),
        )):  # fmt: skip
            found[name].append(accuracy(logits, data.y_test, data.y[so_far].unique()))
        progress.update(t + 1, f"analytic {found['analytic'][-1]:.1f} %")
    classes = model.num_classes
    return found, float((model.ridge.W - joint[:, :classes]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", type=int, default=5)
    add("--base", type=int, default=4, help="classes that the network is trained on first")
    add("--blur", type=float, nargs="+", default=[0.0, 0.1, 0.3],
        help="share of the samples that come with another task than their class")  # fmt: skip
    add("--buffer", type=int, default=1000, help="random features")
    add("--gamma", type=float, default=0.1)
    add("--epochs", type=int, default=15)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/analytic_continual.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.blur, args.buffer, args.epochs, args.seeds = 2, [0.1], 50, 1, 2
    torch.set_num_threads(args.threads)

    panels, rows = [], [[name] for name in METHODS]
    rows.append(["largest difference of a weight from joint ridge"])
    for blur in args.blur:
        runs, off = [], 0.0
        for seed in range(args.seeds):
            progress = Progress(f"blur {blur:g}, seed {seed}", args.tasks)
            found, difference = run(blur, seed, args, progress)
            runs.append(found)
            off = max(off, difference)
        for row, name in zip(rows, METHODS):
            row.append(spread([found[name][-1] for found in runs], 1))
        rows[-1].append(f"{off:.0e}")
        panels.append(
            Panel(f"{100 * blur:g} % of the samples elsewhere", "task",
                  "accuracy on the classes so far, %", range(1, args.tasks + 1),
                  {name: [found[name] for found in runs] for name in METHODS})
        )  # fmt: skip
    print(f"\nAccuracy after {args.tasks} tasks, all classes, %")
    print(table(["", *(f"blur {blur:g}" for blur in args.blur)], rows))
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
