"""Cases, providers and targets of ``sorting_network``: losses on the soft permutation, the matrix
itself, sorted values and ranks; beside diffsort, difftopk and torchsort.

    fused        mean BCE(P, Q) and its gradient, Q a permutation; diffsort forms P
    permutation  P returned, and a gradient through it
    values       sorted values, or ranks, and a gradient through them; torchsort projects instead
    matrices     NeuralSort, SoftSort, top-k

The issue's numbers are those of one thread: run it with ``--threads 1``. diffsort takes up to a
minute per call and several GB. Float64 answers come from the reference; where that would store too
much, from this package's float64 permutation, whose own tests compare it with the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bench_permutahedron as permutahedron
from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target
from bench.bench_gemm import PEAK
from pyloss import _C

FUSED = {  # (batch, n): least speed-up over diffsort, bitonic and odd_even
    (64, 32): (30, 30),
    (64, 128): (60, 100),
    (16, 256): (100, 150),
    (4, 512): (150, 250),
}
NETWORKS = ("bitonic", "odd_even")
STEEPNESS = 10.0
# Of a comparator on one row of P: 7 forwards, which keeps the difference of the wires, 9 backwards.
# All rows are counted, also those on which the wires hold nothing but zeros, which are left out.
MIX_FLOP = 16
_REFERENCE_BYTES = 600 << 20
_EXACT_BYTES = 64 << 20

TARGETS = [
    *(
        Target(
            f"fused BCE {net} ({b}, {n}), fwd+bwd, speed-up over diffsort",
            "speedup",
            f"fused {net} {b}x{n}",
            at_least=least,
        )
        for (b, n), speedups in FUSED.items()
        for net, least in zip(NETWORKS, speedups)
    ),
    Target(
        "fused BCE bitonic (64, 128), one thread, of the multiply-adds that the core can do",
        "pct_products",
        "fused bitonic 64x128",
        at_least=25,
        unit="%",
    ),
    Target(
        "P returned, bitonic (64, 128), fwd+bwd through P, speed-up over diffsort",
        "speedup",
        "permutation bitonic 64x128",
        at_least=25,
    ),
    *(
        Target(
            f"{op} by the network, values (64, 128), fwd+bwd, speed-up over torchsort's projection",
            "speedup",
            f"values {op} 64x128",
            at_least=1 / 3,
        )
        for op in ("soft_sort", "soft_rank")
    ),
    *permutahedron.TARGETS,
    Target(
        "peak memory of the fused BCE, bitonic (64, 1024), beyond the gradient",
        "extra_mb",
        "fused bitonic 64x1024",
        at_most=100,
        unit="MB",
    ),
    Target(
        "GPU fused BCE bitonic (64, 1024), fwd+bwd, speed-up over diffsort",
        "speedup",
        "fused bitonic 64x1024",
        at_least=100,
        device="cuda",
    ),
    Target(
        "GPU fused BCE bitonic (16, 4096), fwd+bwd: it runs; time",
        "median_ms",
        "fused bitonic 16x4096",
        at_most=10_000,
        unit="ms",
        device="cuda",
    ),
]


def layer_count(net: str, n: int) -> int:
    from pyloss.reference import sorting_network as reference

    return max(1, len(reference.network(net, n)))


def comparator_count(net: str, n: int) -> int:
    from pyloss.reference import sorting_network as reference

    return sum(len(layer.lo) for layer in reference.network(net, n))


def fused_flop(net: str, b: int, n: int) -> int:
    return b * n * MIX_FLOP * comparator_count(net, n)


class Problem:
    """Scores, true ranks, cotangents; and answers in float64 for the first items of the batch."""

    def __init__(self, net: str, b: int, n: int, device: str):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.net, self.b, self.n = net, b, n
        self.x = normal(b, n).to(device)
        self.order = torch.stack([torch.randperm(n, generator=generator) for _ in range(b)])
        self.ranks = self.order.argsort(1).to(device)
        self.g = normal(b, n).to(device)
        self.gp = normal(1, n, n).to(device) if n <= 256 else None
        # The reference stores about four doubles per entry of P and layer.
        by_reference = _REFERENCE_BYTES // (32 * n * n * layer_count(net, n))
        self.by_reference = by_reference > 0
        self.items = min(b, by_reference or max(1, _EXACT_BYTES // (8 * n * n)))

    @functools.cached_property
    def q(self) -> Tensor:
        """Q[i, rank of i] = 1, which diffsort's loss wants; made once, outside the timing."""
        return F.one_hot(self.ranks, self.n).to(self.x.dtype)

    def leaf(self) -> Tensor:
        return self.x.detach().requires_grad_()

    def _exact_permutation(self) -> tuple[Tensor, Tensor]:
        """(leaf, P) in float64 on the CPU, of the first items."""
        import pyloss

        x = self.x[: self.items].cpu().double().requires_grad_()
        return x, pyloss.soft_permutation(x, network=self.net, steepness=STEEPNESS)

    def _gradient_of(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        import pyloss

        with pyloss.backend("reference" if self.by_reference else None):
            x, p = self._exact_permutation()
            return torch.autograd.grad(loss(p), x)[0]

    @functools.cached_property
    def bce_gradient(self) -> Tensor:
        q = self.q[: self.items].cpu().double()
        scale = self.items / self.b
        return self._gradient_of(lambda p: scale * F.binary_cross_entropy(p.clamp(0, 1), q))

    @functools.cached_property
    def permutation_gradient(self) -> Tensor:
        return self._gradient_of(lambda p: (p * self.gp.cpu().double()).sum())

    def gradient_error(self, found: Tensor, exact: Tensor, rtol: float) -> float:
        found = found[: self.items].cpu().double()
        return ((found - exact).norm() / exact.norm()).item() / rtol


# --- providers ----------------------------------------------------------------------------------


def _diffsort_net(p: Problem) -> Any:
    try:
        import diffsort
    except ImportError as error:
        raise Skip(f"not installed: {error}") from error
    saved = 4 * layer_count(p.net, p.n) * p.n**2 * (p.b + 2)
    if saved > (5 if p.x.device.type == "cpu" else 60) << 30:
        raise Skip(f"it would save {saved / 1e9:.3g} GB for the backward")
    return diffsort.DiffSortNet(p.net, p.n, device=p.x.device, steepness=STEEPNESS)


def _pyloss_net(p: Problem) -> Any:
    import pyloss

    return pyloss.DiffSortNet(p.net, p.n, steepness=STEEPNESS)


def _step(p: Problem, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = p.leaf()
    value = loss(x)
    (dx,) = torch.autograd.grad(value, x)
    return value.detach(), dx


def fused_providers(p: Problem, checked_peer: bool) -> list[Provider]:
    def run(loss: Callable[[Tensor], Tensor], check: bool = True) -> Run:
        def call() -> tuple[Tensor, Tensor]:
            return _step(p, loss)

        def error() -> float:
            return p.gradient_error(call()[1], p.bce_gradient, 1e-4)

        return Run(call=call, check=error if check else None)

    def ours(target: Tensor, target_is: str) -> Run:
        import pyloss

        return run(
            lambda x: pyloss.sorting_cross_entropy(
                x, target, target_is=target_is, network=p.net, steepness=STEEPNESS
            )
        )

    def unfused() -> Run:
        net = _pyloss_net(p)
        return run(lambda x: F.binary_cross_entropy(net(x)[1].clamp(0, 1), p.q))

    def theirs() -> Run:
        net = _diffsort_net(p)
        p.q  # noqa: B018  made here, not in the timed call
        return run(lambda x: F.binary_cross_entropy(net(x)[1].clamp(0, 1), p.q), checked_peer)

    found = [
        Provider("pyloss", lambda: ours(p.ranks, "ranks")),
        Provider("pyloss from values", lambda: ours(p.ranks.to(p.x.dtype), "values")),
        Provider("diffsort", theirs),
    ]
    if p.n <= 256:
        found.insert(2, Provider("pyloss unfused", unfused))
    flop = fused_flop(p.net, p.b, p.n)
    if p.x.device.type == "cpu" and flop >= 1 << 24:  # the yardstick counts in large steps
        found.append(Provider(PEAK, lambda: Run(call=lambda: _C.multiply_adds(1, flop))))
    return found


def permutation_providers(p: Problem) -> list[Provider]:
    def run(net: Any) -> Run:
        def call() -> tuple[Tensor, Tensor]:
            return _step(p, lambda x: (net(x)[1] * p.gp).sum())

        return Run(
            call=call, check=lambda: p.gradient_error(call()[1], p.permutation_gradient, 1e-4)
        )

    return [
        Provider("pyloss", lambda: run(_pyloss_net(p))),
        Provider("diffsort", lambda: run(_diffsort_net(p))),
    ]


def values_providers(op: str, p: Problem) -> list[Provider]:
    """Sorted values or ranks by the network; torchsort's are another relaxation of the same."""
    rank = op == "soft_rank"
    projection = permutahedron.Problem(p.b, p.n, p.x.device.type)

    def run(fn: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]) -> Run:
        return permutahedron.make_run(projection, fn, exact, 1e-4)

    def network(x: Tensor) -> Tensor:
        import pyloss

        return getattr(pyloss, op)(x, network=p.net, steepness=STEEPNESS)

    def network_exact(x: Tensor) -> Tensor:
        import pyloss

        with pyloss.backend("reference"):
            return network(x)

    def diffsort() -> Run:
        if rank:
            raise Skip("diffsort returns no ranks")
        net = _diffsort_net(p)
        return run(lambda x: net(x)[0], network_exact)

    ours, theirs = permutahedron.providers(projection, rank, "l2")
    ours.name = "pyloss permutahedron"
    return [
        Provider("pyloss", lambda: run(network, network_exact)),
        ours,
        theirs,
        Provider("diffsort", diffsort),
    ]


def _difftopk() -> Any:
    try:
        import difftopk
    except ImportError as error:
        raise Skip(f"not installed: {error}") from error
    return difftopk


def matrix_providers(kind: str, p: Problem) -> list[Provider]:
    """NeuralSort, SoftSort or the columns of the top 5, and a gradient through them."""
    width = 5 if kind == "top 5" else p.n
    width = min(width, p.n)
    g = torch.randn(p.b, p.n, width, generator=torch.Generator().manual_seed(1)).to(p.x.device)

    def make(package: Any) -> Callable[[Tensor], Tensor]:
        ours = package.__name__ == "pyloss"
        if kind == "top 5":
            net = package.DiffTopkNet(p.net, p.n, width, device=p.x.device, steepness=STEEPNESS)
            return lambda x: net(x)[1]
        module = getattr(package.nn if ours else package, kind)(0.1)
        if ours and kind == "NeuralSort":  # rows are elements in difftopk, smallest first
            return lambda x: module(-x).mT
        return module

    def run(package: Any) -> Run:
        fn = make(package)

        def call() -> tuple[Tensor, Tensor]:
            return _step(p, lambda x: (fn(x) * g).sum())

        def check() -> float:
            import pyloss

            exact = make(pyloss)
            x = p.x.cpu().double().requires_grad_()
            with pyloss.backend("reference"):
                (dx,) = torch.autograd.grad((exact(x) * g.cpu().double()).sum(), x)
            found = call()[1].cpu().double()
            return ((found - dx).norm() / dx.norm()).item() / 1e-4

        return Run(call=call, check=check)

    def ours() -> Run:
        import pyloss

        return run(pyloss)

    return [Provider("pyloss", ours), Provider("difftopk", lambda: run(_difftopk()))]


# --- cases --------------------------------------------------------------------------------------


def _case(
    name: str,
    ctx: Context,
    size: tuple[int, int],
    open_: Callable[[Problem], list[Provider]],
    net: str = "bitonic",
    **options: Any,
) -> Case:
    b, n = (min(size[0], 4), min(size[1], 16)) if ctx.quick else size
    return Case(
        name=f"{name} {size[0]}x{size[1]}",
        group=name.split()[0],
        mode="fwd+bwd",
        shape=(b, n),
        dtype="fp32",
        useful_bytes=0,  # arithmetic, not a stream
        tensor_bytes=4 * b * n,
        open=lambda: open_(Problem(net, b, n, ctx.device)),
        result_bytes=4 * b * n,
        **options,
    )


def _fused_case(net: str, b: int, n: int, ctx: Context, rounds: int | None) -> Case:
    # The check of diffsort costs one more call of it.
    checked = n < 256 or (n, net) == (256, "bitonic")
    return _case(
        f"fused {net}",
        ctx,
        (b, n),
        lambda p: fused_providers(p, checked),
        net,
        baseline="diffsort",
        rounds=rounds,
        products=PEAK,
        flop=0 if ctx.quick else fused_flop(net, b, n),
    )


def cases(ctx: Context) -> Iterator[Case]:
    cuda = ctx.device == "cuda"
    for (b, n), net in ((size, net) for size in FUSED for net in NETWORKS):
        rounds = None if n < 128 else (7 if n == 128 else 3)
        yield _fused_case(net, b, n, ctx, rounds)
    yield _fused_case("bitonic", 64, 1024, ctx, 3)
    if cuda:
        yield _fused_case("bitonic", 16, 4096, ctx, 3)
    for net in NETWORKS:
        yield _case(
            f"permutation {net}", ctx, (64, 128), permutation_providers, net,
            baseline="diffsort", rounds=7,
        )  # fmt: skip
    for op in ("soft_sort", "soft_rank"):
        yield _case(
            f"values {op}", ctx, (64, 128), functools.partial(values_providers, op),
            baseline="torchsort",
        )  # fmt: skip
    for kind in ("NeuralSort", "SoftSort", "top 5"):
        yield _case(
            f"matrices {kind}", ctx, (64, 128), functools.partial(matrix_providers, kind),
            baseline="difftopk", rounds=7 if kind == "top 5" else None,
        )  # fmt: skip
    for case in permutahedron.cases(ctx):
        if case.name.endswith(" 64x128"):
            yield case
