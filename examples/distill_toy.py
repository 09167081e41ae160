"""A data set of 600 points distilled to one point a class, by matching the steps of experts.

Points around a few centres, three classes, ten dimensions. Experts are trained on all of them; then
one point a class is moved so that a student that is trained on these three ends where an expert
does. Judged by students that begin anew: their accuracy on a test set, beside students of real
points. Run: python examples/distill_toy.py [--iterations 600] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import (
    balanced_loss_weight,
    clip_schedule,
    lipschitz_gradient_penalty,
    perturb_weights,
    representative_indices,
    trajectory_matching_loss,
)

CLASSES, FEATURES, CENTRES = 3, 10, 2
MOMENTUM = 0.9


def points(seed: int, each: int, noise: float) -> tuple[Tensor, Tensor]:
    """(points, classes); the centres belong to the seed, the points to `each` as well."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, CENTRES, FEATURES, generator=g)
    centres = centres + torch.randn(CLASSES, 1, FEATURES, generator=g)
    g.manual_seed(10_000 * each + seed)
    labels = torch.arange(CLASSES).repeat_interleave(each)
    which = torch.randint(CENTRES, labels.shape, generator=g)
    return centres[labels, which] + noise * torch.randn(len(labels), FEATURES, generator=g), labels


class DatasetDistiller:
    """Experts, and the synthetic points that are matched to them."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, seed: int):
        self.model, self.x, self.y, self.args = model, x, y, args
        self.names = [name for name, _ in model.named_parameters()]
        self.generator = torch.Generator().manual_seed(seed)
        self.experts = [self.expert() for _ in range(args.experts)]

    def logits(self, theta: list[Tensor], x: Tensor) -> Tensor:
        return functional_call(self.model, dict(zip(self.names, theta)), (x,))

    def fresh(self) -> list[Tensor]:
        return [
            torch.randn(p.shape, generator=self.generator) / p.shape[-1] ** 0.5
            for p in self.model.parameters()
        ]

    def expert(self) -> list[list[Tensor]]:
        """Parameters before the first and after every epoch."""
        theta = self.fresh()
        speed = [torch.zeros_like(p) for p in theta]
        found = [theta]
        for epoch in range(self.args.epochs):
            factor = clip_schedule(epoch) if self.args.clip else 1.0
            order = torch.randperm(len(self.x), generator=self.generator)
            for batch in order.split(self.args.batch):
                theta = [p.detach().requires_grad_() for p in theta]
                x, y = self.x[batch], self.y[batch]
                loss = factor * F.cross_entropy(self.logits(theta, x), y)
                if self.args.penalty:
                    loss = loss + lipschitz_gradient_penalty(
                        x, lambda x, theta=theta: self.logits(theta, x), self.args.penalty
                    )
                grads = torch.autograd.grad(loss, theta)
                speed = [MOMENTUM * s + g for s, g in zip(speed, grads)]
                theta = [(p - self.args.expert_rate * s).detach() for p, s in zip(theta, speed)]
            found.append(theta)
        return found

    def largest_epoch(self) -> float:
        """The longest way that an expert went in one epoch."""
        return max(
            sum((a - b).square().sum() for a, b in zip(first, then)).sqrt().item()
            for trajectory in self.experts
            for first, then in zip(trajectory, trajectory[1:])
        )

    def real(self, representative: bool) -> tuple[Tensor, Tensor]:
        """One point a class: next to the centre of its logits, or any."""
        if representative:
            logits = self.logits(self.experts[0][-1], self.x)
            index = representative_indices(logits, self.y, 1, generator=self.generator)
        else:
            order = torch.randperm(len(self.x), generator=self.generator)
            index = torch.stack([order[self.y[order] == c][0] for c in range(CLASSES)])
        return self.x[index].clone(), self.y[index]

    def student(
        self, theta: list[Tensor], x: Tensor, y: Tensor, rate: Tensor, weight: float = 1.0
    ) -> list[list[Tensor]]:
        """Parameters before the first and after every step, as functions of x and rate."""
        found, speed = [theta], [torch.zeros_like(p) for p in theta]
        for _ in range(self.args.student_steps):
            loss = weight * F.cross_entropy(self.logits(theta, x), y)
            grads = torch.autograd.grad(loss, theta, create_graph=x.requires_grad)
            speed = [MOMENTUM * s + g for s, g in zip(speed, grads)]
            theta = [p - rate * s for p, s in zip(theta, speed)]
            found.append(theta)
        return found

    def loss(self, x: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        args = self.args
        pick = torch.randint(len(self.experts), (1,), generator=self.generator).item()
        start = int(torch.randint(args.max_start + 1, (1,), generator=self.generator))
        trajectory, ahead = self.experts[pick], args.expert_epochs
        begin = perturb_weights(
            trajectory[start], args.perturb, min_dim=2, generator=self.generator
        )
        begin = [p.requires_grad_() for p in begin]
        weight = balanced_loss_weight(start, args.max_start)
        thetas = self.student(begin, x, y, rate, weight)
        mids = [
            (thetas[args.student_steps // ahead * i], trajectory[start + i])
            for i in range(1, ahead)
        ]
        return trajectory_matching_loss(
            thetas[-1], trajectory[start + ahead], begin, mids, mid_weight=args.mid_weight
        )

    def distil(
        self, x: Tensor, y: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, list[float]]:
        """(points, rate of the student, losses)."""
        x = x.clone().requires_grad_()
        log_rate = torch.tensor(self.args.student_rate).log().requires_grad_()
        optimizer = torch.optim.SGD(
            [{"params": [x], "lr": self.args.point_rate}, {"params": [log_rate], "lr": 1e-3}],
            momentum=0.5,
        )
        losses = []
        for step in range(self.args.iterations):
            loss = self.loss(x, y, log_rate.exp())
            optimizer.zero_grad()
            loss.backward()
            # Gradients through many steps are large at times: without this it diverges.
            for leaf in (x, log_rate):
                nn.utils.clip_grad_norm_([leaf], self.args.clip_grad)
            optimizer.step()
            losses.append(loss.item())
            progress.update(step + 1, f"loss {losses[-1]:.2f}")
        return x.detach(), log_rate.detach().exp(), losses

    def accuracy(self, x: Tensor, y: Tensor, rate: Tensor, test: tuple[Tensor, Tensor]) -> float:
        """Per cent, the mean of a few students that begin anew."""
        found = []
        for _ in range(5):
            theta = [p.requires_grad_() for p in self.fresh()]
            theta = self.student(theta, x, y, rate)[-1]
            with torch.no_grad():
                right = self.logits(theta, test[0]).argmax(1) == test[1]
            found.append(100 * right.float().mean().item())
        return sum(found) / len(found)


def experiment(seed: int, args: argparse.Namespace) -> tuple[dict[str, float], list[float], float]:
    """(accuracies, losses of the distillation, longest epoch of an expert)."""
    x, y = points(seed, args.each, args.noise)
    test = points(seed, 1000, args.noise)
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    distiller = DatasetDistiller(model, x, y, args, seed)
    found = {}
    for name, representative in (("random", False), ("representative", True)):
        real = distiller.real(representative)
        # At the best of some rates, as the distilled points have learned theirs.
        found[f"real, {name}"] = max(
            distiller.accuracy(*real, torch.tensor(rate), test)
            for rate in (0.02, 0.05, 0.1, 0.2, 0.5)
        )
    start = distiller.real(args.representative)
    made, rate, losses = distiller.distil(*start, Progress(f"seed {seed}", args.iterations))
    found["distilled"] = distiller.accuracy(made, start[1], rate, test)
    with torch.no_grad():
        right = distiller.logits(distiller.experts[0][-1], test[0]).argmax(1) == test[1]
    found[f"all {len(x)} (an expert)"] = 100 * right.float().mean().item()
    return found, losses, distiller.largest_epoch()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, switch = found.add_argument, argparse.BooleanOptionalAction
    add("--each", type=int, default=200, help="points of a class")
    add("--noise", type=float, default=1.0, help="around the centres")
    add("--experts", type=int, default=4)
    add("--epochs", type=int, default=12, help="of an expert")
    add("--batch", type=int, default=64)
    add("--expert-rate", type=float, default=0.01)
    add("--clip", action=switch, default=True, help="clip_schedule in the first epochs")
    add("--penalty", type=float, default=0.0, help="weight of lipschitz_gradient_penalty")
    add("--max-start", type=int, default=8, help="largest epoch that a student starts from")
    add("--expert-epochs", type=int, default=3, help="to match")
    add("--student-steps", type=int, default=20)
    add("--student-rate", type=float, default=0.05, help="at first: it is learned")
    add("--mid-weight", type=float, default=1.0)
    add("--perturb", type=float, default=0.1, help="alpha of perturb_weights")
    add("--representative", action=switch, default=True, help="points to begin with")
    add("--iterations", type=int, default=600)
    add("--point-rate", type=float, default=0.5)
    add("--clip-grad", type=float, default=0.2)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/distill_toy.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.each, args.epochs, args.max_start, args.iterations, args.seeds = 20, 5, 2, 3, 2
    torch.set_num_threads(args.threads)
    runs = [experiment(seed, args) for seed in range(args.seeds)]
    args.clip = not args.clip
    other = [
        DatasetDistiller(
            nn.Sequential(nn.Linear(FEATURES, CLASSES)), *points(s, args.each, args.noise), args, s
        ).largest_epoch()
        for s in range(args.seeds)
    ]
    print(f"\ntest accuracy, mean +- standard deviation of {args.seeds} seeds")
    names = list(runs[0][0])
    print(table(["trained on", "accuracy"],
                [[n, spread([run[0][n] for run in runs], 1, " %")] for n in names]))  # fmt: skip
    ways = [[run[2] for run in runs], other]
    with_it, without = ways if not args.clip else ways[::-1]
    print(f"longest epoch of an expert: {spread(with_it, 2)} with the clip schedule, "
          f"{spread(without, 2)} without")  # fmt: skip
    size = max(1, args.iterations // 30)
    smooth = [torch.tensor(run[1])[: len(run[1]) // size * size].view(-1, size).mean(1).log10()
              for run in runs]  # fmt: skip
    x = [size * (k + 1) for k in range(len(smooth[0]))]
    lines = {"matching loss": [s.tolist() for s in smooth]}
    print(draw(args.plot, [Panel("distillation", "iterations", "log10 of the loss", x, lines)]))


if __name__ == "__main__":
    main()
