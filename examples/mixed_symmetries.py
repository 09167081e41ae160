"""Which symmetries data have: the moment of inertia with an axis that is not like the others.

A network of linear layers learns the inertia tensor of five bodies, to which the target adds a part
along one axis. Rotations and reflections about that axis still hold, those about the other two do
not. `EquivarianceRegularizer` asks for all three; `retune_` looks once at what the layers could
keep, and turns off what they could not. Beside it: no penalty, and the penalty of all rotations,
which is wrong.
Run: python examples/mixed_symmetries.py [--axis z] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import equivariance_error
from pyloss.regularizers import EquivarianceRegularizer, SymmetryType

BODIES = 5
AXES = "xyz"
IN, OUT = [(BODIES, "scalar"), (BODIES, "vector")], [(1, "tensor2")]
PLANES = {"x": "yz", "y": "xz", "z": "xy"}  # turned about this axis


def inertia(count: int, axis: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mass = F.softplus(torch.randn(count, BODIES, generator=generator))
    place = torch.randn(count, BODIES, 3, generator=generator)
    square = place.square().sum(-1)[..., None, None] * torch.eye(3)
    tensor = (mass[..., None, None] * (square - place[..., :, None] * place[..., None, :])).sum(1)
    e = torch.eye(3)[AXES.index(axis)]
    target = tensor + 0.3 * (tensor @ e)[:, :, None] * e
    return torch.cat([mass, place.flatten(1)], 1), target.flatten(1)


class Network(nn.Module):
    """Scalars, vectors and tensors in one hidden layer of products: squares of numbers, and of
    vectors, are what an inertia tensor is made of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = [(channels, "scalar"), (channels, "vector")]
        self.after = [(2 * channels, "scalar"), (channels, "tensor2")]
        self.first = nn.Linear(BODIES * 4, channels * 4)
        self.last = nn.Linear(channels * 11, 9)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scalars, vectors = x[:, : self.channels], x[:, self.channels :].unflatten(1, (-1, 3))
        gate = F.softplus(scalars)
        products = gate[..., None, None] * vectors[..., :, None] * vectors[..., None, :]
        lengths = gate * vectors.square().sum(-1)
        return self.last(torch.cat([gate, lengths, products.flatten(1)], 1))


def run(kind: str, seed: int, args: argparse.Namespace) -> dict:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    train, test = (inertia(n, args.axis, generator) for n in (args.samples, 1000))
    scale = train[1].std()
    model = Network(args.channels)
    layers = [(model.first, IN, model.hidden), (model.last, model.after, OUT)]
    types = [SymmetryType.O2(PLANES[axis]) for axis in AXES]
    strength = args.strength
    if kind == "all rotations":
        types = [SymmetryType.O(3)]
    elif kind == "none":
        strength = 0.0
    penalty = EquivarianceRegularizer(layers, types, strength=strength, warmup=args.warmup)
    optimizer = torch.optim.Adam(model.parameters(), args.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    history = []
    for step in range(args.steps):
        index = torch.randint(args.samples, (args.batch,), generator=generator)
        loss = F.mse_loss(model(train[0][index]), train[1][index] / scale) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if kind == "retuned":
            if step < args.retune_at:
                penalty.observe_()
            elif step == args.retune_at:
                penalty.retune_(args.power)
        if step % args.every == args.every - 1:
            history.append(penalty.per_type().tolist())
    with torch.no_grad():
        rho = SymmetryType.O2(PLANES[args.axis]).sample(IN, OUT, generator=generator)
        return {
            "error": (scale**2 * F.mse_loss(model(test[0]), test[1] / scale)).sqrt().item(),
            "kept": equivariance_error(model, test[0][:100], *rho).item(),
            "strength": penalty.strength.tolist(),
            "history": history,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--axis", choices=list(AXES), default="z", help="the one that is not like the others")
    add("--samples", type=int, default=100, help="of the training")
    add("--channels", type=int, default=16)
    add("--steps", type=int, default=1200)
    add("--retune-at", type=int, default=700)
    add("--warmup", type=int, default=50)
    add("--power", type=float, default=4.0)
    add("--strength", type=float, default=1.0)
    add("--rate", type=float, default=5e-3)
    add("--batch", type=int, default=50)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/mixed_symmetries.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.retune_at, args.warmup, args.channels = 2, 20, 10, 2, 4
    args.every = max(1, args.steps // 40)
    torch.set_num_threads(args.threads)

    kinds = ("none", "all rotations", "three axes", "retuned")
    progress, found = Progress("penalties", len(kinds)), {}
    for kind in kinds:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        found[kind] = [run(kind, seed, args) for seed in seeds]
        progress.update(len(found), kind)

    rows = []
    for kind, results in found.items():
        cells = [spread([r["error"] for r in results], 3), spread([r["kept"] for r in results], 4)]
        strengths = list(zip(*(r["strength"] for r in results)))
        shown = [" ".join(f"{s:.1g}" for s in axis) for axis in strengths]
        rows.append([kind, *cells, *(shown if len(shown) == 3 else ["", "", ""])])
    print(f"\ninertia with a different {args.axis} axis, mean +- standard deviation over "
          f"{args.seeds} seeds;\nstrengths after the training, seed by seed")  # fmt: skip
    header = ["penalty", "test error (RMS)", f"error of O(2) about {args.axis}"]
    print(table([*header, *(f"strength {axis}" for axis in AXES)], rows))
    steps = [args.every * (i + 1) for i in range(len(found["retuned"][0]["history"]))]
    panels = [
        Panel(f"Penalties, {kind}", "step", "R", steps,
              {f"about {axis}": [[r[i] for r in result["history"]] for result in found[kind]]
               for i, axis in enumerate(AXES)})
        for kind in ("three axes", "retuned")
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
