"""A short walk through the CUDA kernels, to be run under compute-sanitizer.

    compute-sanitizer --tool racecheck python -m bench._sanitizer_cases

A sanitizer slows a program down many times, so this is not the test suite: few rows, but every kind
of kernel (short, long, split, strided and misaligned rows, in-place, soft targets, second
derivative), the chunks and tiles of linear_cross_entropy, whose buffers are shared and cut, tensor
attention by rows, by pairs and with masks, the gathers and scans of its low-rank form, sweeps and
blocks of similarity_softmax, every op of sorting_network, in all its kernels, Betti matching, the
permutahedron, the other losses of rows with a label, and steps of Lion-K. Each result is compared
with the reference or with the CPU; exit status 1 if one differs.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pyloss
from bench import bench_linear_cross_entropy as linear
from bench import bench_tensor_attention_lowrank as lowrank
from bench.bench_row_softmax import Problem, all_options, pyloss_provider
from pyloss import backend

# The package's attribute of this name is the function.

# Columns: one warp's row, an odd width (rows not aligned to 16 bytes), rows of one block, rows that
# one multiprocessor cannot hold. Few rows of many columns are split over blocks.
SHAPES = (
    ((33, 7), "fp32"),
    ((5, 1000), "bf16"),
    ((3, 4099), "fp32"),
    ((150, 8192), "bf16"),
    ((2, 40000), "bf16"),
    ((2, 131072), "fp32"),
    ((2, 21, 5, 7), "fp32"),
    ((2, 24, 8, 8), "bf16"),
)


# N x V x D, with a last chunk that is shorter than the others, and rows that are not aligned.
LINEAR_SHAPES = (((33, 999, 24), "fp32"), ((20, 4104, 16), "bf16"))
LINEAR_CHUNK = 8

# Heads, n, d, degree of low-rank tensor attention: partial tiles, several ranges of tokens, a wide
# head with a degree of its own.
LOWRANK_SIZES = ((2, 65, 5, 3), (1, 2100, 16, 2), (1, 70, 100, 1))


def errors(device: str) -> Iterator[tuple[str, float]]:
    """Name and error in units of the tolerance of every case; what raises counts as infinite."""
    for group in (
        _betti_errors,
        _permutahedron_errors,
        _row_errors,
        _labelled_errors,
        _frame_errors,
        _optimiser_errors,
        _linear_errors,
        _sorting_errors,
        _attention_errors,
        _lowrank_errors,
        _pairs_errors,
    ):
        try:
            yield from group(device)
        except Exception as error:  # the other ops are still worth having
            traceback.print_exc()
            yield f"{group.__name__}: {type(error).__name__}: {str(error)[:200]}", math.inf


# Wires: registers, a warp and more of comparators, tiles in segments, more than a block holds.
SORTING_WIRES = (5, 20, 70, 300, 1100, 5000)


def _sorting_errors(device: str) -> Iterator[tuple[str, float]]:
    """The ops against themselves on the CPU, in units of a relative error of 1e-9."""
    for n in SORTING_WIRES:
        for network in range(3):
            if network == 1 and n > 300:  # odd_even: n layers
                continue
            host = _sorting_results("cpu", n, network)
            for name, found in _sorting_results(device, n, network).items():
                want = host[name]
                distance = (found.cpu() - want).abs().max() / want.abs().max()
                yield f"sorting network {network} n {n} {name}", distance.item() / 1e-9


def _sorting_results(device: str, n: int, network: int) -> dict[str, torch.Tensor]:
    import pyloss.functional.sorting  # noqa: F401 (registers the ops)

    ops, net, options = torch.ops.pyloss, [network, 3, 0], [2.0, 0.25]
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    x, gy, f, g = draw(3, n), draw(3, n), draw(1, n, 3), draw(3, n, 3)
    first = torch.arange(n, dtype=torch.int32, device=device).expand(3, n).contiguous()
    out = {
        "sort": ops.sorting_network_sort(x, net, options),
        "sort_bwd": ops.sorting_network_sort_bwd(gy, x, net, options),
        "apply": ops.sorting_network_apply(x, f, False, net, options),
    }
    gx, gf = ops.sorting_network_apply_bwd(g, x, f, True, net, options, True)
    out |= {"apply_bwd x": gx, "apply_bwd f": gf}
    if n > 300:  # the matrices are as large as the problem is slow
        return out
    _, p = ops.sorting_network_permutation(x, net, options)
    gp = p.cos()
    loss, gx = ops.sorting_network_loss(x, first, None, [0, 0, 0], net, options, True)
    gp_x = ops.sorting_network_permutation_bwd(gy, gp, x, net, options)
    return out | {"P": p, "P_bwd": gp_x, "loss": loss, "loss_bwd": gx}


def _linear_errors(device: str) -> Iterator[tuple[str, float]]:
    ways: dict[str, dict[str, Any]] = {"chunks": {"chunk": LINEAR_CHUNK}}
    if device == "cuda":  # Triton's
        ways |= {"tiles": {"strategy": "tiles"}, "filter": {"filter": 1e-6}}
    for shape, dtype in LINEAR_SHAPES:
        problem = linear.Problem(shape, dtype, device)
        for kind, options in {
            "plain": {},
            "per row": {"rows": True},
            "options": {"bias": True, "tau": 1.7, "z_loss": 1e-4, "softcap": 30.0},
            "smoothing": {"label_smoothing": 0.1},
        }.items():
            for way, how in ways.items():
                for mode in ("fwd", "fwd+bwd"):
                    provider = linear.pyloss_provider(problem, mode, how=how, **options)
                    yield f"linear {way} {kind} {mode} {shape} {dtype}", provider.build().check()


def _distance(found: Tensor, want: Tensor) -> float:
    """Largest deviation over the largest entry; infinite entries must be the same."""
    found, want = found.detach().cpu().double(), want.detach().cpu().double()
    finite = want.isfinite()
    if not torch.equal(found[~finite], want[~finite]):
        return math.inf
    return ((found - want)[finite].abs().max() / want[finite].abs().max().clamp_min(1e-30)).item()


def _with_gradients(fn: Any, *inputs: Tensor) -> list[Tensor]:
    """The value, and the gradients of a weighted sum of it."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = fn(*leaves)
    weights = torch.linspace(1, 2, value.numel()).to(value).view_as(value)
    return [value, *torch.autograd.grad(value, leaves, weights)]


# One voxel; lines both ways; more voxels than a block has threads; more items than one.
BETTI_SHAPES = ((1, 1, 1, 1), (1, 1, 1, 70), (1, 1, 300), (2, 2, 7, 5), (1, 1, 90, 110))
BETTI_SHAPES += ((1, 2, 24, 25, 26),)  # no smaller volume is the device's


def _betti_errors(device: str) -> Iterator[tuple[str, float]]:
    """Against the CPU, in units of a relative error of 1e-5."""
    for shape in BETTI_SHAPES:
        generator = torch.Generator().manual_seed(len(shape))
        x, y = torch.rand((2, *shape), generator=generator)
        ramp = torch.arange(x.numel()).view(shape) / x.numel()
        for kind, image in {"noise": x, "ties": (4 * x).floor() / 4, "ramp": ramp}.items():
            for what, options in {"": {}, "options": _BETTI_OPTIONS}.items():

                def loss(t: Tensor, target: Tensor = y, options: Any = options) -> Tensor:
                    target = target.to(t.device)
                    return pyloss.betti_matching_loss(t, target, reduction="none", **options)

                want, found = (_with_gradients(loss, image.to(at)) for at in ("cpu", device))
                error = max(_distance(a, b) for a, b in zip(found, want))
                yield f"betti {shape} {kind} {what}", error / 1e-5
            spatial = len(shape) - 2
            pairs = ([t.to(at) for t in (image, y)] for at in ("cpu", device))
            want, found = (pyloss.betti_matching(*pair, spatial) for pair in pairs)
            tables = ("matched", "unmatched_input", "unmatched_target")
            same = all(torch.equal(getattr(want, t), getattr(found, t).cpu()) for t in tables)
            yield f"betti {shape} {kind} rows", 0.0 if same else math.inf


_BETTI_OPTIONS = dict(
    filtration="sublevel",
    matched_weight=1.5,
    target_weight=0.3,
    unmatched="extreme",
    essential=True,
)


def _permutahedron_errors(device: str) -> Iterator[tuple[str, float]]:
    """Against the CPU in float64, in units of a relative error of 1e-10."""
    from pyloss import functional

    for shape in ((1, 1), (5, 33), (3, 1100)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for kind in ("l2", "kl"):
            for op in (functional.permutahedron_rank, functional.permutahedron_sort):
                fn = lambda t, op=op, kind=kind: op(t, kind, 0.3)  # noqa: E731
                want, found = (_with_gradients(fn, x.to(at)) for at in ("cpu", device))
                error = max(_distance(a, b) for a, b in zip(found, want))
                yield f"permutahedron {op.__name__} {kind} {shape}", error / 1e-10


# Adjacent classes, unaligned rows, a tile of positions.
POSITIONS = ((5, 33), (3, 20001), (2, 21, 40))


def _labelled_errors(device: str) -> Iterator[tuple[str, float]]:
    """Against the CPU in float64. ALDR: two searches may end a step apart."""
    from pyloss import functional as F

    losses: tuple[tuple[str, Callable[..., Tensor], Any, float], ...] = (
        ("moments", F.spherical_z_loss, POSITIONS, 1e-10),
        ("margin shift", lambda t, y: F.margin_shift(t, t.flip(1), y).sum(), POSITIONS, 1e-10),
        ("aldr", F.aldr_loss, POSITIONS[:2], 1e-6),
    )
    for name, loss, shapes, limit in losses:
        for shape in shapes:
            g = torch.Generator().manual_seed(1)
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
            fn = lambda t, y=y, loss=loss: loss(t, y.to(t.device))  # noqa: E731
            want, found = (_with_gradients(fn, x.to(at)) for at in ("cpu", device))
            error = max(_distance(a, b) for a, b in zip(found, want))
            yield f"{name} {shape}", error / limit


def _frame_errors(device: str) -> Iterator[tuple[str, float]]:
    """Against the CPU in float64: a group of small clouds, ragged ones, and large ones."""
    from pyloss import functional as F

    for sizes, d in (((7,) * 40, 3), ((5, 9, 4, 30), 2), ((2100, 2100), 3)):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(sum(sizes), d, generator=g, dtype=torch.float64) * torch.arange(1, d + 1)
        w = torch.rand(len(x), generator=g, dtype=torch.float64) + 0.1
        offsets = torch.tensor((0, *sizes)).cumsum(0)

        def fn(x: Tensor, w: Tensor, offsets: Tensor = offsets) -> Tensor:
            frames = F.pca_frames(x, weight=w, offsets=offsets.to(x.device), group="E")
            return frames.R[:, 0].sin().sum() + frames.t.sin().sum() + frames.gap.sum()

        want, found = (_with_gradients(fn, x.to(at), w.to(at)) for at in ("cpu", device))
        error = max(_distance(a, b) for a, b in zip(found, want))
        yield f"frames {len(sizes)} x {sizes[0]} x {d}", error / 1e-8


def _optimiser_errors(device: str) -> Iterator[tuple[str, float]]:
    """Two steps of Lion-K against the CPU: more tensors than one launch takes, unaligned ones."""
    from pyloss.optim import LionK

    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for kappa in ("l1", "smooth"):
            ends = []
            for at in ("cpu", device):
                g = torch.Generator().manual_seed(1)
                drawn = [torch.randn(n, generator=g).to(dtype) for n in (5000, *[7] * 70)]
                parameters = [t.to(at).requires_grad_() for t in drawn]
                args = {"e": 0.5} if kappa == "smooth" else {}
                optimizer = LionK(parameters, 0.01, weight_decay=0.5, kappa=kappa, kappa_args=args)
                for _ in range(2):
                    for p in parameters:
                        p.grad = torch.randn(len(p), generator=g).to(p)
                    optimizer.step()
                ends.append(torch.cat([p.detach().cpu().double() for p in parameters]))
            yield f"lion_k {kappa} {dtype}", _distance(ends[1], ends[0]) / limit


# Heads, n, d, options; whether there are masks: bool of (i, j), float with a gradient of (i, k).
ATTENTION_CASES: tuple[tuple[int, int, int, dict[str, Any], bool], ...] = (
    (2, 70, 32, {}, False),
    (1, 130, 64, {"is_causal": True}, False),
    (1, 100, 64, {"window": (9, 40), "is_causal": True}, True),
    (1, 40, 128, {}, True),
    (1, 33, 256, {"window": (5, 7)}, False),
)


def _attention_errors(device: str) -> Iterator[tuple[str, float]]:
    """Against float64 on the CPU."""
    for heads, n, d, options, masked in ATTENTION_CASES:
        generator = torch.Generator().manual_seed(n)
        tensors = [torch.randn((1, heads, n, d), generator=generator) for _ in range(5)]
        seen = torch.rand((n, n), generator=generator) < 0.8
        mask = [torch.randn((n, n), generator=generator)] if masked else []

        def attend(*t: Tensor, options: Any = options, seen: Any = seen) -> Tensor:
            masks = {"mask1": seen.to(t[0].device), "mask2": t[5]} if len(t) > 5 else {}
            return pyloss.tensor_attention(*t[:5], **masks, **options)

        for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 6e-2)):
            rounded = [t.to(dtype) for t in tensors] + mask
            want = _with_gradients(attend, *(t.double() for t in rounded))
            found = _with_gradients(attend, *(t.to(device) for t in rounded))
            error = max(_distance(a, b) for a, b in zip(found, want))
            yield f"attention {heads}x{n}x{d} {options} masks {masked} {dtype}", error / limit


# Rows of both tensors, features, a loss of them, two numbers for the labels: sweeps and blocks,
# whole rows and parts of them, a sum of one side and of both, columns, ids, scales of rows.
def _pairs_cases() -> Iterator[tuple[str, tuple[int, int, int], Callable[..., Tensor]]]:
    from pyloss import functional as F

    def labels(count: int, classes: int, device: torch.device) -> Tensor:
        return (torch.arange(count, device=device) * 7) % classes

    def queued(query: Tensor, queue: Tensor) -> Tensor:
        at = query.device
        ids, queue_ids = labels(len(query), 9, at), labels(len(queue), 9, at)
        key, temperature = query.flip(1), torch.linspace(0.5, 1.5, len(query), device=at)
        options = {"ids": ids, "queue_ids": queue_ids, "temperature": temperature}
        return F.info_nce(query, key, queue, **options, reduction="none")

    yield "nt_xent", (75, 75, 40), lambda a, b: F.nt_xent(a, b, reduction="none")
    yield "clip_loss", (300, 300, 72), lambda a, b: F.clip_loss(a, b, 5.0, reduction="none")
    yield "info_nce", (20, 999, 128), queued
    yield (
        "supervised_contrastive",
        (100, 100, 200),
        lambda a, b: F.supervised_contrastive(
            torch.cat([a, b]), labels(200, 9, a.device), reduction="none"
        ),
    )
    yield "dcl", (130, 130, 256), lambda a, b: F.dcl(a, b, reduction="none")
    yield "siglip_loss", (90, 90, 72), lambda a, b: F.siglip_loss(a, b, reduction="none")


def _pairs_errors(device: str) -> Iterator[tuple[str, float]]:
    """Against the reference in float64 on the CPU."""
    for name, (n, m, d), loss in _pairs_cases():
        generator = torch.Generator().manual_seed(n)
        tensors = [torch.randn((rows, d), generator=generator) for rows in (n, m)]
        for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 4e-2)):
            rounded = [t.to(dtype) for t in tensors]
            with backend("reference"):
                want = _with_gradients(loss, *(t.double() for t in rounded))
            found = _with_gradients(loss, *(t.to(device) for t in rounded))
            error = max(_distance(a, b) for a, b in zip(found, want))
            yield f"pairs {name} {n}x{m}x{d} {dtype}", error / limit


def _lowrank_errors(device: str) -> Iterator[tuple[str, float]]:
    for size in LOWRANK_SIZES:
        problem = lowrank.Problem(*size, device)
        for mode in ("fwd", "fwd+bwd"):
            yield f"lowrank {mode} {size}", lowrank.own_run(problem, mode).check()
        yield f"lowrank causal {size}", _causal_error(problem)


def _causal_error(problem: lowrank.Problem) -> float:
    """Against the CPU kernels in float64."""

    def run(tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = pyloss.tensor_attention(
            *leaves, scale="kronecker", method="lowrank", degree=problem.degree, is_causal=True
        )
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    got = run(problem.tensors, problem.upstream)
    want = run([t.double().cpu() for t in problem.tensors], problem.upstream.double().cpu())
    limits = [lowrank.OUT_LIMIT] + [lowrank.GRAD_LIMIT] * 5
    errors = [lowrank._relative(a.cpu(), b) / most for a, b, most in zip(got, want, limits)]
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def _row_errors(device: str) -> Iterator[tuple[str, float]]:
    for shape, dtype in SHAPES:
        problem = Problem(shape, dtype, device, probabilities=False)
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "fwd": ("fwd", {}),
            "fwd+bwd": ("fwd+bwd", {}),
            "inplace": ("bwd", {"inplace": True}),
            "options": ("fwd+bwd", all_options(problem)),
            "smoothing": ("fwd+bwd", {"label_smoothing": 0.1}),
        }
        for kind, (mode, options) in kinds.items():
            run = pyloss_provider(problem, mode, **options).build()
            yield f"{kind} {shape} {dtype}", run.check()
        soft = Problem(shape, dtype, device, probabilities=True)
        yield f"soft {shape} {dtype}", pyloss_provider(soft, "fwd+bwd").build().check()
        if dtype == "fp32":
            yield f"second derivative {shape}", _second_derivative_error(problem)


def _second_derivative_error(problem: Problem) -> float:
    from pyloss import fused_cross_entropy
    from pyloss.reference import row_softmax

    def product(loss_fn, x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_fn(leaf, problem.target), leaf, create_graph=True)
        direction = torch.linspace(-1.0, 1.0, x.numel(), device=x.device, dtype=x.dtype)
        return torch.autograd.grad((grad * direction.view_as(x)).sum(), leaf)[0].double()

    exact = product(row_softmax, problem.x.double())
    difference = product(fused_cross_entropy, problem.x) - exact
    return (difference.norm() / exact.norm()).item() / 1e-5


def main(device: str = "cuda") -> int:
    wrong = 0
    count = 0
    for name, error in errors(device):
        count += 1
        if not error <= 1.0:
            wrong += 1
            print(f"{name}: {error:.3g} times the tolerance")
    print(f"{count - wrong} of {count} cases agree with the reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
