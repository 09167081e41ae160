"""What the kernels of Betti matching should take on an H200: traffic of each by hand, no run.

Elements of a graph fall to about a third a round, and so do the edges between them. What lies next
to each other moves at the copy rate; a place elsewhere costs a sector of 32 bytes. Chains longer
than a warp are read by one block, a step of 512 edges in about 1 us.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SECTOR = 32.0
ROUNDS = 1.5  # all rounds together, in elements of the first


class Batch(NamedTuple):
    """Pairs of images (float32), loss and gradient of the input."""

    items: int
    voxels: int
    axes: int  # 2, or 3: dimensions 0 and 2 of volumes
    scattered: float  # share of the links that leave the cache: little in smooth images

    @property
    def vertices(self) -> int:
        return 6 * self.items * self.voxels

    @property
    def rounds(self) -> int:
        return math.ceil(math.log2(self.voxels))

    @property
    def passes(self) -> int:
        """Of the sort by (chain, rank)."""
        return math.ceil((32 + math.log2(self.vertices)) / 8)


class Row(NamedTuple):
    kernel: str
    launches: int
    traffic: float  # bytes


def rows(b: Batch) -> list[Row]:
    g, n, d = b.vertices, b.items * b.voxels, b.axes
    far = SECTOR * b.scattered
    cells = 4 if d == 2 else 8
    volumes = [
        # Ranks of a square and of its neighbours come from the cache, once a matrix.
        Row("betti_columns_kernel", 1, 5 * n * 3 * (1 + 4) + 5 * n * 3 * 0.08 * 4),
        Row("betti_column_keys_kernel", 1, 5 * n * 3 * 0.08 * 24),
    ]
    return [
        Row("betti_rank_kernel", 1, 20 * n),
        Row("betti_fill_kernel", 5, n * 4 * 14 + g * 8 * d + (g * d if d == 3 else 0)),
        Row("betti_clear_kernel", 2, 8 * cells * n),
        Row("betti_first_edges_kernel", 1, g * (4 + 8)),
        Row("betti_link_kernel", b.rounds - 1, g * (ROUNDS - 1) * d * (16 + far)),
        Row("betti_root_kernel", b.rounds, g * ROUNDS * (12 + far)),
        Row("betti_jump_kernel", b.rounds, g * ROUNDS * (12 + 2 * far)),
        Row("betti_edges_kernel", b.rounds - 1, g * d * ROUNDS * (16 + 2 * far)),
        Row("betti_chain_kernel", 1, g * ROUNDS * (12 + 2 * far + 12)),
        Row("betti_sort_count_kernel", b.passes, g * (8 * d + 8 * (b.passes - 1))),
        Row("betti_sort_move_kernel", b.passes, g * (8 * d + 16 + 24 * (b.passes - 1))),
        Row("betti_sort_many_kernel", b.passes, g * d / 2048 * 256 * 8),
        Row("betti_bounds_kernel", 1, 8 * g),
        Row("betti_elder_kernel", b.rounds, g * (12 + 3 * far)),
        Row("betti_elder_long_kernel", b.rounds, 0),
        Row("betti_match_kernel", 1, 2 * n * 4),
        Row("betti_loss_kernel", 1, 2 * 2 * n * 8),
        Row("betti_loss_sum_kernel", 1, 0),
        Row("betti_gradient_kernel", 1, n * (4 * cells + 4)),
        *(volumes if d == 3 else []),
    ]


# Batch 8 of 512^2 and batch 4 of 96^3; smooth, noise.
IMAGES = {kind: Batch(8, 512**2, 2, far) for kind, far in (("smooth", 0.3), ("noise", 0.6))}
VOLUMES = {kind: Batch(4, 96**3, 3, far) for kind, far in (("smooth", 0.3), ("noise", 0.6))}
# The host's part of a volume of 96^3, a thread a matrix, by what 48^3 took on one thread of a Zen 5
# (166 and 530 ms for five matrices, the longest about half of it), times 8 log 96^3 / log 48^3.
HOST = {"smooth": 0.083 * 9.4, "noise": 0.265 * 9.4}


def seconds(b: Batch, copy: float, launch: float) -> dict[str, float]:
    """Of each kernel, in all its launches."""
    return {r.kernel: r.launches * launch + r.traffic / copy for r in rows(b)}


def chain_seconds(b: Batch, smooth: bool) -> float:
    """The longest chain of one block: in smooth images all of one."""
    return b.voxels / 512 * 1e-6 if smooth else 0.0


def cases(copy: float, launch: float) -> dict[str, float]:
    """Case of bench/_gpu_times.py -> predicted seconds."""
    found = {}
    for name, batches in (("8x512x512", IMAGES), ("4x96x96x96", VOLUMES)):
        for kind, b in batches.items():
            total = sum(seconds(b, copy, launch).values()) + chain_seconds(b, kind == "smooth")
            if b.axes == 3:
                total += HOST[kind]
            found[f"betti fwd+bwd {name} {kind}"] = total
    return found


def lines(copy: float, launch: float) -> list[str]:
    """Milliseconds of each kernel: 8 x 512^2 and 4 x 96^3, smooth and noise."""
    columns = [seconds(b, copy, launch) for group in (IMAGES, VOLUMES) for b in group.values()]
    head = f"{'':<28}" + "".join(f"{t:>11}" for t in ("8x512^2", "noise", "4x96^3", "noise"))
    names = [r.kernel for r in rows(VOLUMES["noise"])]
    body = []
    for name in names:
        times = (f"{1e3 * c[name]:11.3f}" if name in c else " " * 11 for c in columns)
        body.append(f"{name:<28}" + "".join(times))
    return [head, *body]
