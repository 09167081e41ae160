"""Deep networks below, at and above their critical initialisation: what theory says of their
second moments, what networks that are drawn have, and how digits are learned.

Of each activation, networks are drawn by nn.init.critical_, with weights that are scaled for the
variances beside the critical one, and their preactivations are compared with kernel_flow: the mean
over networks, and how much they differ, which grows with depth over width.
Run: python examples/critical_depth.py [--depth 50] [--width 200] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import pyloss
from pyloss.analysis import criticality, kernel_flow, optimal_depth
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import spread
from pyloss.nn.init import critical_

ACTIVATIONS = {"relu": (nn.ReLU(), 0.2), "tanh": (nn.Tanh(), 0.1)}  # how far C_W is moved


def moments(name: str, C_Ws: list[float], x: Tensor, args, seed: int) -> Tensor:
    """Second moment of each layer, (len(C_Ws), networks, depth): the same draws for each C_W."""
    s, generator = ACTIVATIONS[name][0], torch.Generator().manual_seed(seed)
    first = nn.Linear(x.shape[1], args.width, bias=False)
    layers = [nn.Linear(args.width, args.width, bias=False) for _ in range(args.depth - 1)]
    net = nn.ModuleList([first, *layers])
    scale = (torch.tensor(C_Ws) / criticality(name).C_W).float().sqrt().unsqueeze(1)
    progress, found = Progress(f"{name}, seed {seed}", args.networks), []
    with torch.no_grad():
        for number in range(1, args.networks + 1):
            critical_(net, name, generator=generator)
            z = scale * first(x)
            each = [z.square().mean(1)]
            for layer in layers:
                z = scale * layer(s(z))
                each.append(z.square().mean(1))
            found.append(torch.stack(each, 1))
            if number % 20 == 0 or number == args.networks:
                progress.update(number)
    return torch.stack(found, 1).double()


def accuracy(name: str, critical: bool, data: tuple[Tensor, ...], args, seed: int) -> float:
    """Per cent of test digits after the training of a deep and narrow network."""
    torch.manual_seed(seed)
    sizes = [64, *[64] * (args.train_depth - 1), 10]
    parts = [p for a, b in zip(sizes, sizes[1:]) for p in (nn.Linear(a, b), ACTIVATIONS[name][0])]
    net = nn.Sequential(*parts[:-1])
    if critical:
        critical_(net, name)
    x, y, x_test, y_test = data
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    for _ in range(args.steps):
        pick = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(net(x[pick]), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * (net(x_test).argmax(1) == y_test).float().mean().item()


def digits() -> tuple[Tensor, ...]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    x = (x - x.mean()) / x.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def picture(path: Path, width: int, flows: dict, measured: dict) -> str:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    figure = Figure(figsize=(8.8, 6.2), layout="constrained")
    FigureCanvasAgg(figure)  # no display
    for axes, name in zip(figure.subplots(len(ACTIVATIONS), 2), ACTIVATIONS):
        pyloss.visualize.draw_kernel_flow(
            flows[name], width=width, measured=measured[name], axes=axes
        )
        axes[0].set_ylabel(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return f"Plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--depth", type=int, default=50)
    add("--width", type=int, default=200)
    add("--networks", type=int, default=100, help="of each seed")
    add("--train-depth", type=int, default=30, help="layers of the networks that learn digits")
    add("--steps", type=int, default=150)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/critical_depth.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.depth, args.width, args.networks, args.seeds = 5, 20, 3, 2
        args.train_depth, args.steps = 3, 2
    torch.set_num_threads(args.threads)

    x = torch.ones(1, 64)
    flows: dict[str, dict] = {}
    measured: dict[str, dict] = {}
    rows = []
    for name, (_, off) in ACTIVATIONS.items():
        critical = float(criticality(name).C_W)
        C_Ws = [critical - off, critical, critical + off]
        runs = [moments(name, C_Ws, x, args, seed) for seed in range(args.seeds)]
        flows[name], measured[name] = {}, {}
        for i, C_W in enumerate(C_Ws):
            label = f"C_W = {C_W:g}"
            flow = kernel_flow(name, x, args.depth, C_b=0.0, C_W=C_W)
            flows[name][label] = flow
            measured[name][label] = torch.cat([r[i] for r in runs])
            K, V, G1 = (float(t[-1]) for t in (flow.K, flow.V, flow.G1))
            ratio = [float(r[i, :, -1].mean()) / K for r in runs]
            differ = [float(r[i, :, -1].var()) / float(r[i, :, -1].mean()) ** 2 for r in runs]
            rows.append(
                [
                    f"{name}, {label}",
                    f"{float(flow.K[0]):.1f} to {K:.2g}",
                    f"{1 + G1 / (args.width * K):.2f}",
                    spread(ratio, 2),
                    f"{V / (args.width * K**2):.2f}",
                    spread(differ, 2),
                ]
            )
    header = ["", "K", "mean / K", "measured", "relative variance", "measured"]
    print(f"\n{args.depth} layers of width {args.width}, {args.networks} networks a seed")
    print(table(header, rows))
    best = {name: optimal_depth(name, args.width, n_out=10) for name in ACTIVATIONS}
    print(f"best depths of width {args.width} with 10 outputs: {best}")

    data, rows = digits(), []
    for name in ACTIVATIONS:
        for critical, label in ((False, "torch's default"), (True, "critical_")):
            found = [accuracy(name, critical, data, args, seed) for seed in range(args.seeds)]
            rows.append([f"{name}, {label}", spread(found, 1, " %")])
    print(f"\ndigits, {args.train_depth} layers of width 64, {args.steps} steps of Adam")
    print(table(["", "accuracy"], rows))
    print(picture(args.plot, args.width, flows, measured))


if __name__ == "__main__":
    main()
