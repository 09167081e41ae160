"""Random small images, and the matching of both implementations on them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import pyloss
import pyloss.ops.betti_matching  # registers the ops, which are called by name
from pyloss.reference import betti_matching as reference

KINDS = ("matched", "unmatched_input", "unmatched_target")


def image(rng: random.Random, shape: tuple[int, ...], levels: int, dtype=torch.float64) -> Tensor:
    """Values of `levels` grey levels in [0, 1]; 0: all different."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if levels == 0:
        count = torch.Size(shape).numel()
        x = torch.randperm(count, generator=generator).double() / count
        return x.view(shape).to(dtype)
    x = torch.randint(levels, shape, generator=generator).double() / max(levels - 1, 1)
    return x.to(dtype)


def _images(rng: random.Random, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An input, at times beyond the values of its target as logits are, and a target."""
    dtype = rng.choice([torch.float32, torch.float64])
    x = image(rng, (1, *shape), rng.choice([0, 0, 2, 3, 4, 5]), dtype)
    y = image(rng, (1, *shape), rng.choice([0, 1, 2, 2, 3, 5]), dtype)
    return (2 * x - 0.5 if rng.random() < 0.25 else x), y


def random_pair(rng: random.Random) -> tuple[Tensor, Tensor, bool]:
    """(input, target, superlevel) with ties, two values, length-1 axes in the usual mix."""
    spatial = rng.choice([1, 2, 2, 2])
    shape = (rng.randint(1, 24),) if spatial == 1 else (rng.randint(1, 9), rng.randint(1, 9))
    return *_images(rng, shape), rng.random() < 0.5


def random_volumes(rng: random.Random, most: int = 3) -> tuple[Tensor, Tensor, bool]:
    """The same in three dimensions, of axes up to `most`."""
    shape = tuple(rng.choice([1, *range(2, most + 1), *range(2, most + 1)]) for _ in range(3))
    return *_images(rng, shape), rng.random() < 0.5


def check_pair(x: Tensor, y: Tensor, superlevel: bool) -> None:
    """All rows, cells included, equal those of the reference."""
    dims = list(range(x.dim() - 1))
    found = torch.ops.pyloss.betti_matching(x, y, superlevel, dims)
    exact = reference.betti_matching(x, y, superlevel, dims)
    for kind, a, b in zip(KINDS, found, exact):
        assert torch.equal(a, b), (kind, superlevel, x, y, a, b)
    pairs = torch.ops.pyloss.persistence_pairs(x, superlevel, dims, True)
    assert torch.equal(pairs, reference.persistence_pairs(x, superlevel, dims, True))


def fields(n: int, seed: int = 0, spatial: int = 2) -> tuple[Tensor, Tensor]:
    """A smooth random prediction and a mask like it, (1, 1, n, n); of a volume (1, 1, n, n, n)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 1, *(n + 12,) * spatial, generator=generator)
    pool = torch.nn.functional.avg_pool2d if spatial == 2 else torch.nn.functional.avg_pool3d
    smooth = pool(pool(noise, 7, 1), 7, 1) * (1 if spatial == 2 else 7)
    y = (smooth > smooth.median()).float()
    noise = torch.randn(1, 1, *(n,) * spatial, generator=generator)
    return (smooth * 8 + 0.3 * noise).sigmoid(), y


def rows(matching: pyloss.BettiMatching) -> list[list[list[int]]]:
    return [getattr(matching, kind).tolist() for kind in KINDS]
