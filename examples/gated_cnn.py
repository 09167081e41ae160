"""A gated CNN on digits: accuracy against the work that its gates leave.

Three convolutions, whose gates learn which channels each image needs (mass_topk_mask with several
r), beside the same network without gates and narrower ones of about as many multiply-adds.
`gated_flops` says before the gates are trained what they will save, and afterwards what they do.
The second picture shows how many channels of each layer are open by digit.
Run: python examples/gated_cnn.py [--epochs 12] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.demo.digits import moved
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits
from pyloss.functional import mask_prediction_loss
from pyloss.nn import DynamicGate, GatedConv, gated_flops


class Network(nn.Sequential):
    """Of images (N, 1, 8, 8); `ratio` None: without gates."""

    def __init__(self, width: int, ratio: float | None) -> None:
        def block(before: int, after: int, stride: int) -> nn.Module:
            conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            parts = conv, nn.BatchNorm2d(after), nn.ReLU()
            # Without gates: those that never shut, so that both are counted alike.
            return GatedConv(*parts, ratio=-1.0 if ratio is None else ratio)

        super().__init__(
            block(1, width, 1), block(width, 2 * width, 2), block(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
        )  # fmt: skip
        self.gated = [layer for layer in self if isinstance(layer, GatedConv)]
        self.gates = [p for m in self.modules() if isinstance(m, DynamicGate)
                      for p in m.parameters()]  # fmt: skip
        if ratio is None:
            for p in self.gates:
                p.requires_grad_(False)


class Task:
    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        self.seed, self.args = seed, args
        generator = torch.Generator().manual_seed(1000 + seed)
        self.train, test = load_digits()
        self.test = moved(test.images, generator), test.labels

    def run(self, width: int, ratio: float | None) -> dict[str, float | list[float]]:
        args, images, labels = self.args, self.train.images, self.train.labels
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        model = Network(width, ratio)
        ours = set(model.gates)
        others = [p for p in model.parameters() if p not in ours]
        groups = [{"params": others, "weight_decay": 1e-4}]
        if ratio is not None:  # the paper's rate for gates, and no decay
            groups.append({"params": model.gates, "lr": 0.1})
        optimizer = torch.optim.SGD(groups, lr=args.rate, momentum=0.9)
        steps = 8 if args.quick else args.epochs * (len(images) // args.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        foreseen = 0.0
        for step in range(steps):
            index = torch.randint(len(images), (args.batch,), generator=generator)
            loss = F.cross_entropy(model(moved(images[index], generator)), labels[index])
            if ratio is not None and step < args.cooldown * steps:
                masks = [(layer.logits, layer.target) for layer in model.gated]
                loss = loss + mask_prediction_loss(*zip(*masks))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step == steps // 10:
                foreseen = gated_flops(model, self.test[0]).saved
        return self.judge(model, ratio) | {"foreseen": 100 * foreseen}

    @torch.no_grad()
    def judge(self, model: Network, ratio: float | None) -> dict[str, float | list[float]]:
        x, y = self.test
        right = (model.eval()(x).argmax(1) == y).float().mean().item()
        opened = [by_digit(layer.mask, y) for layer in model.gated]
        flops = gated_flops(model, x, masks="predicted")
        paid = flops.dense if ratio is None else flops.gated + flops.gates
        saved = 100 * (1 - paid / flops.dense)
        return {"accuracy": 100 * right, "flops": paid / 1000, "saved": saved, "opened": opened}


def by_digit(mask: Tensor, labels: Tensor) -> list[float]:
    """Open channels, per cent."""
    return [100 * mask[labels == digit].float().mean().item() for digit in range(10)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--width", type=int, default=16, help="channels of the first layer")
    add("--narrower", type=int, nargs="*", default=[12, 8], help="widths without gates")
    add("--ratios", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.6], help="r of the masks")
    add("--epochs", type=int, default=12)
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=0.05)
    add("--cooldown", type=float, default=0.5, help="share of the epochs with the mask loss")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/gated_cnn.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.ratios, args.narrower, args.width = 2, [0.9], [], 4
    torch.set_num_threads(args.threads)

    tasks = [Task(seed, args) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    kinds = {f"{width} channels": (width, None) for width in (args.width, *args.narrower)}
    kinds |= {f"{args.width} channels, r = {r:g}": (args.width, r) for r in args.ratios}
    progress, found = Progress("networks", len(kinds)), {}
    for name, (width, ratio) in kinds.items():
        found[name] = [task.run(width, ratio) for task in tasks]
        progress.update(len(found), name)

    keys = ("accuracy", "flops", "saved", "foreseen")
    rows = []
    for name, results in found.items():
        cells = [spread([result[key] for result in results], 1) for key in keys]
        rows.append([name, *(cells if "r =" in name else [*cells[:2], "", ""])])
    print(f"\nheld-out digits, mean +- standard deviation over {args.seeds} seeds")
    print(table(["network", "accuracy, %", "1000 multiply-adds", "saved, %", "foreseen, %"], rows))

    gated = [found[f"{args.width} channels, r = {r:g}"] for r in args.ratios]
    cost = [sum(r["flops"] for r in results) / len(results) for results in gated]
    runs = [[results[seed]["accuracy"] for results in gated] for seed in range(args.seeds)]
    plain = found[f"{args.width} channels"]
    level = sum(r["accuracy"] for r in plain) / args.seeds
    middle = len(gated) // 2
    panels = [
        Panel("Gated CNN on digits", "1000 multiply-adds", "accuracy, %", cost,
              {"gated": runs, f"no gates, {plain[0]['flops']:.0f}": level}),
        Panel(f"Open channels, r = {args.ratios[middle]:g}", "digit", "open, %", range(10),
              {f"layer {i + 1}": [r["opened"][i] for r in gated[middle]] for i in range(3)}),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
