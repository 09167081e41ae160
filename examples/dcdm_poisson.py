"""Poisson's equation on a grid: conjugate gradients beside directions of a trained network.

The network is trained on random sums of Ritz vectors and solves right-hand sides that it has not
seen. Beside it: plain conjugate gradients, the same with the diagonal as preconditioner (which is
constant here, and so changes nothing) and with an incomplete Cholesky factor.
Run: python examples/dcdm_poisson.py [--grid 24] [--steps 600] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import conjugate_direction_loss, dcdm_solve, lanczos_ritz_dataset
from pyloss.nn import PoissonNet2d

F64 = torch.float64
DENSE = "CG, incomplete Cholesky"


def laplace(v: Tensor) -> Tensor:
    """The five-point stencil, zero outside of the grid: (B, H, W)."""
    p = F.pad(v, (1, 1, 1, 1))
    return 4 * v - p[:, 2:, 1:-1] - p[:, :-2, 1:-1] - p[:, 1:-1, 2:] - p[:, 1:-1, :-2]


def right_hand_sides(n: int, seed: int) -> dict[str, Tensor]:
    """(1, n, n) each."""
    g = torch.Generator().manual_seed(1000 + seed)
    dipole = torch.zeros(1, n, n, dtype=F64)
    dipole[0, n // 4, n // 4], dipole[0, n - 1 - n // 4, n // 2] = 1.0, -1.0
    return {
        "as in training": lanczos_ritz_dataset(laplace, (n, n), 1, generator=g, dtype=F64),
        "dipole": dipole,
        "constant": torch.ones(1, n, n, dtype=F64),
        "noise": torch.randn(1, n, n, dtype=F64, generator=g),
    }


def incomplete_cholesky(n: int) -> Callable[[Tensor], Tensor]:
    """r -> (L L^T)^-1 r, with L on the places of the lower half of A alone.

    L is kept as a dense matrix: the triangular solves of a small grid are quick enough that way.
    """
    a = laplace(torch.eye(n * n, dtype=F64).view(-1, n, n)).view(n * n, -1)
    low = torch.zeros_like(a)
    for i in range(n * n):
        places = [j for j in (i - n, i - 1) if j >= 0 and a[i, j] != 0]
        for j in places:
            low[i, j] = (a[i, j] - low[i, :j] @ low[j, :j]) / low[j, j]
        low[i, i] = (a[i, i] - low[i, :i] @ low[i, :i]).sqrt()

    def apply(r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.reshape(-1, 1), low).view(r.shape)

    return apply


def conjugate_gradients(
    b: Tensor, precondition: Callable[[Tensor], Tensor], tol: float, maxiter: int
) -> tuple[int, Tensor]:
    """(iterations, x), as in every textbook."""
    x, r = torch.zeros_like(b), b
    z = precondition(r)
    p, inner = z, (r * z).sum()
    limit = tol * b.norm()
    for k in range(1, maxiter + 1):
        image = laplace(p)
        step = inner / (p * image).sum()
        x, r = x + step * p, r - step * image
        if r.norm() <= limit:
            return k, x
        z = precondition(r)
        inner, last = (r * z).sum(), inner
        p = z + inner / last * p
    return maxiter, x


def train(seed: int, args: argparse.Namespace, progress: Progress) -> PoissonNet2d:
    g = torch.Generator().manual_seed(seed)
    data = lanczos_ritz_dataset(laplace, (args.grid, args.grid), args.data, generator=g)
    torch.manual_seed(seed)
    net = PoissonNet2d(args.channels, args.blocks, args.levels)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps)
    for step in range(args.steps):
        b = data[torch.randint(len(data), (args.batch,), generator=g)]
        loss = conjugate_direction_loss(b, net(b), laplace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.1e}")
    return net


def timed(solve: Callable[[], tuple[int, Tensor]], repeats: int) -> tuple[int, float, Tensor]:
    """(iterations, milliseconds: the best of some calls, x)."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        iterations, x = solve()
        best = min(best, time.perf_counter() - start)
    return iterations, 1e3 * best, x


def solvers(
    net: PoissonNet2d, args: argparse.Namespace, factor: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[Tensor], tuple[int, Tensor]]]:
    def directions(b: Tensor) -> tuple[int, Tensor]:
        found = dcdm_solve(
            laplace, b, lambda r: net(r.float()).double(), tol=args.tol, maxiter=args.most
        )
        return int(found.iterations), found.x

    def gradients(precondition: Callable[[Tensor], Tensor]):
        return lambda b: conjugate_gradients(b, precondition, args.tol, args.most)

    return {
        "CG": gradients(lambda r: r),
        "CG, Jacobi": gradients(lambda r: r / 4),
        DENSE: gradients(factor),
        "DCDM": directions,
    }


def residual_norms(net: PoissonNet2d, b: Tensor, args: argparse.Namespace) -> dict[str, list]:
    """Relative, after each of `marks` iterations, of both methods."""
    found = {}
    for name, f in (("CG", lambda r: r), ("DCDM", lambda r: net(r.float()).double())):
        norms = dcdm_solve(laplace, b, f, tol=1e-12, maxiter=args.marks).residual_norms[:, 0]
        norms = (norms / norms[0]).log10().tolist()
        found[name] = norms + norms[-1:] * (args.marks + 1 - len(norms))
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--grid", type=int, default=24, help="points on a side")
    add("--channels", type=int, default=16)
    add("--blocks", type=int, default=2)
    add("--levels", type=int, default=1)
    add("--data", type=int, default=5000, help="right-hand sides to train with")
    add("--steps", type=int, default=600)
    add("--batch", type=int, default=10)
    add("--rate", type=float, default=2e-3)
    add("--tol", type=float, default=1e-4)
    add("--most", type=int, default=500, help="iterations")
    add("--marks", type=int, default=60, help="iterations of the plot")
    add("--repeats", type=int, default=25, help="of a solution, for its time")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/dcdm_poisson.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.grid, args.channels, args.blocks, args.data, args.steps, args.seeds = 6, 4, 1, 20, 4, 2
        args.marks, args.repeats, args.most = 4, 1, 20
    torch.set_num_threads(args.threads)
    factor = incomplete_cholesky(args.grid)
    cells: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    lines: dict[str, list[list[float]]] = {}
    seconds = []
    for seed in range(args.seeds):
        start = time.perf_counter()
        net = train(seed, args, Progress(f"network, seed {seed}", args.steps))
        seconds.append(time.perf_counter() - start)
        sides = right_hand_sides(args.grid, seed)
        for side, b in sides.items():
            for name, solve in solvers(net, args, factor).items():
                k, ms, x = timed(lambda solve=solve, b=b: solve(b), args.repeats)
                off = ((b - laplace(x)).norm() / b.norm()).item()
                assert off <= 2 * args.tol or k == args.most, (name, side, off)
                iterations, times = cells.setdefault((name, side), ([], []))
                iterations.append(k)
                times.append(ms)
        for name, norms in residual_norms(net, sides["noise"], args).items():
            lines.setdefault(name, []).append(norms)
    sides = list(dict.fromkeys(side for _, side in cells))
    for what, at, digits in (("iterations", 0, 1), ("milliseconds", 1, 2)):
        print(f"\n{what} to a residual of {args.tol:g}, mean +- deviation of {args.seeds} seeds")
        rows = [
            [name, *(spread(cells[name, side][at], digits) for side in sides)]
            for name in dict.fromkeys(name for name, _ in cells)
            if what == "iterations" or name != DENSE  # whose time is that of dense triangles
        ]
        print(table([what, *sides], rows))
    print(f"\nTraining took {spread(seconds, 0, ' s')} a network, on {args.threads} thread(s).")
    x = list(range(args.marks + 1))
    print(
        draw(
            args.plot,
            [Panel("noise on the right", "iterations", "log10 of ||r|| / ||b||", x, lines)],
        )
    )


if __name__ == "__main__":
    main()
