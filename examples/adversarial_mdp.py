"""Losses that an adversary changes: regret against the number of episodes, by three algorithms.

A process of 4 states, 3 actions, 3 steps and 6 features, two tables of losses that alternate in
eight parts; log-barrier FTRL, Hedge on the magnitude-reduced estimate of Q, and Hedge on the usual
one, beside a policy that never learns. Then how negative the two estimates become.
Run: python examples/adversarial_mdp.py [--episodes 100 200 400 800] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.research.mdp import (
    AdversarialLinearMDP,
    LinearQMDP,
    magnitude_reduced_estimator,
)

S, A, H, DIMENSIONS = 4, 3, 3, 6
LEARNERS = {
    "log-barrier FTRL": dict(algorithm="log_barrier"),
    "Hedge, reduced": dict(algorithm="hedge_mr"),
    "Hedge, usual": dict(algorithm="hedge"),
    "uniform": dict(algorithm="hedge", eta=1e-12),
}


def regret(options: dict, episodes: int, seed: int, args) -> float:
    """After the last episode, the mean of some runs on one process."""
    generator = torch.Generator().manual_seed(seed)
    mdp = LinearQMDP(S, A, H, DIMENSIONS, generator)
    learner = AdversarialLinearMDP(mdp, rollouts=args.rollouts, generator=generator, **options)
    return float(learner.run(episodes, args.runs).regret[:, -1].mean())


def least_estimates(seed: int) -> tuple[float, float, float]:
    """Of the usual and of the reduced estimate, over all pairs that may be visited and losses of 0
    and H, with the exact covariance of a policy that takes one action seldom; and the bound."""
    generator = torch.Generator().manual_seed(seed)
    mdp = LinearQMDP(S, A, H, DIMENSIONS, generator)
    policy = torch.rand(H, S, A, generator=generator, dtype=torch.float64)
    policy[..., 0] /= 50
    policy /= policy.sum(-1, keepdim=True)
    weight, phi = mdp.occupancy(policy)[1].flatten(), mdp.features.flatten(0, 1)
    w: Tensor = phi @ torch.linalg.inv(phi.T @ (weight[:, None] * phi)) @ phi.T
    mean = (w.clamp(max=0) @ weight)[:, None]
    reduced = [
        float(magnitude_reduced_estimator(w[:, v], L, mean, H).min())
        for v in range(S * A)
        for L in (0.0, float(H))
    ]
    return float(H * w.min()), min(reduced), float(-H * w.diagonal().sqrt().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--episodes", type=int, nargs="+", default=[100, 200, 400, 800])
    add("--rollouts", type=int, default=32, help="of the simulator, for each episode")
    add("--runs", type=int, default=4, help="on each process")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/adversarial_mdp.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.episodes, args.runs, args.seeds = [8, 16], 2, 2
    torch.set_num_threads(args.threads)

    rows: list[list[str]] = []
    lines: dict[str, list[list[float]]] = {}
    for name, options in LEARNERS.items():
        lines[name] = [[] for _ in range(args.seeds)]
        progress = Progress(name, args.seeds * len(args.episodes))
        for seed in range(args.seeds):
            for episodes in args.episodes:
                lines[name][seed].append(regret(options, episodes, seed, args))
                done = seed * len(args.episodes) + len(lines[name][seed])
                progress.update(done, f"regret {lines[name][seed][-1]:.1f}")
        growth = [run[-1] / run[-3 if len(run) > 2 else 0] for run in lines[name]]
        rows.append([name, *(spread(column) for column in zip(*lines[name])), spread(growth, 2)])
    print(
        f"\nRegret to the best policy of hindsight, {args.seeds} processes, {args.runs} runs each"
    )
    last = f"K = {args.episodes[-1]} / {args.episodes[-3 if len(args.episodes) > 2 else 0]}"
    print(table(["policy", *(f"K = {k}" for k in args.episodes), last], rows))
    found = list(zip(*(least_estimates(seed) for seed in range(args.seeds))))
    print("\nThe least estimate of Q, true values in [0, 3]")
    names = ("usual", "magnitude-reduced", "its bound")
    print(table(["estimate", "least"], [[n, spread(v, 2)] for n, v in zip(names, found)]))
    panels = [Panel("adversarial MDP", "episodes K", "regret after K", args.episodes, lines)]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
