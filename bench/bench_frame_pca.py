"""Cases, providers and targets of the frames of point clouds: the op ``frame_pca``, the frames that
``pca_frames`` makes of its axes, and ``FrameAverage`` around a small network.

The floor of the op, forward and backward: the points are read twice and their gradient is written
once. Plain PyTorch is the same centre and axes by ``torch.linalg.eigh`` of the covariances, as one
writes them; the yardstick is that call alone, with its gradient, of covariances that are there. The
frames are 2^d signed copies of the axes, new memory for all. The peer of ``FrameAverage`` is a loop
over the frames, a call of the network for each, on frames that are computed the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

EIGH = "torch.linalg.eigh alone"
SHAPES = ((4096, 64, 3), (4096, 64, 2), (256, 2048, 3), (4096, 5, 3))
# Five bodies, and the depth and width of the paper's network for them.
BATCH, POINTS, HIDDEN, LAYERS = 16, 5, 60, 4

TARGETS = [
    Target(
        "frame_pca, fwd+bwd 4096 x 64 x 3, speed-up over centre and axes by torch.linalg.eigh",
        "speedup",
        "axes fwd\\+bwd 4096x64x3",
        at_least=5.0,
    ),
    Target(
        "the same over torch.linalg.eigh of given covariances alone, fwd+bwd",
        "speedup_over_eigh",
        "axes fwd\\+bwd 4096x64x3",
        at_least=5.0,
    ),
    Target(
        "pca_frames with its 8 frames, fwd+bwd 4096 x 64 x 3, speed-up over plain PyTorch",
        "speedup",
        "frames fwd\\+bwd 4096x64x3",
        at_least=5.0,
    ),
    Target(
        "FrameAverage of a small network, fwd+bwd, speed-up over a loop over the frames",
        "speedup",
        "average fwd\\+bwd .*",
        at_least=3.0,
    ),
]


def plain_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(axes, centre) as one writes them in PyTorch."""
    centre = x.mean(1)
    away = x - centre.unsqueeze(1)
    axes = torch.linalg.eigh(away.mT @ away)[1]
    return axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign(), centre


def plain_frames(x: Tensor) -> tuple[Tensor, Tensor]:
    axes, centre = plain_axes(x)
    signs = itertools.product((1.0, -1.0), repeat=x.shape[2])
    frames = axes.unsqueeze(1) * torch.tensor(list(signs), dtype=x.dtype).to(x.device).unsqueeze(1)
    return frames, centre


def our_frames(x: Tensor) -> tuple[Tensor, Tensor]:
    from pyloss import functional

    return functional.pca_frames(x, group="E")[:2]


class Clouds:
    def __init__(self, shape: tuple[int, ...], device: str):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=g) * torch.arange(1, shape[2] + 1) + 1
        # Of five points alone: no gap is small, so that float32 can be compared with float64.
        spread = torch.tensor([[-2.0, -1, 0, 1, 2], [1, -1, 1, -1, 1], [0, 2, 0, -2, 1]])
        self.x = (x + 4 * spread[: shape[2]].T if shape[1] == 5 else x).to(device).requires_grad_()
        self.upstream = torch.randn(shape[0], 2 ** shape[2], *[shape[2]] * 2, generator=g)
        self.upstream = self.upstream.to(device)
        self.shift = torch.randn(shape[0], shape[2], generator=g).to(device)

    def step(self, fn: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
        found = fn(x)
        upstream = self.upstream if found[0].dim() == 4 else self.upstream[:, 0]
        upstream = upstream.to(x.dtype), self.shift.to(x.dtype)
        return [*(t.detach() for t in found), *torch.autograd.grad(found, x, upstream)]

    def run(self, step: Callable[[], list[Tensor]], plain=plain_frames) -> Run:
        def check() -> float:
            want = self.step(plain, self.x.detach().double().requires_grad_())
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(step(), want)]
            return max(errors) / 1e-4

        return Run(call=step, check=check)

    def op(self) -> Run:
        """Both kernels, as autograd calls them."""
        import pyloss

        pyloss.ops.load_all()
        ops, (clouds, _, d) = torch.ops.pyloss, self.x.shape
        points = self.x.detach().flatten(0, 1)
        grad = torch.zeros(clouds, d * d + 2 * d + 1, device=points.device)
        grad[:, : d * d] = self.upstream[:, 0].flatten(1)
        grad[:, d * d : d * d + d] = self.shift

        def step() -> list[Tensor]:
            rows = ops.frame_pca_fwd(points, None, None, clouds, True)
            (dx,) = ops.frame_pca_bwd(grad, points, None, None, rows, True, 1e-4)
            axes, centre = rows[:, : d * d].unflatten(1, (d, d)), rows[:, d * d : d * d + d]
            return [axes, centre, dx.view_as(self.x)]

        return self.run(step, plain_axes)

    def eigh(self) -> Run:
        away = self.x.detach() - self.x.detach().mean(1, keepdim=True)
        products = (away.mT @ away).requires_grad_()
        upstream = self.upstream[:, 0]

        def call() -> Tensor:
            axes = torch.linalg.eigh(products)[1]
            return torch.autograd.grad(axes, products, upstream)[0]

        return Run(call=call)


class Average:
    """Of forces by a network without symmetry."""

    def __init__(self, device: str):
        g = torch.Generator().manual_seed(0)
        size = POINTS * 3
        hidden = [nn.Linear(HIDDEN, HIDDEN) if i % 2 else nn.SiLU() for i in range(2 * LAYERS - 1)]
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(size, HIDDEN), *hidden,
            nn.Linear(HIDDEN, size), nn.Unflatten(1, (POINTS, 3)),
        ).to(device)  # fmt: skip
        self.x = (torch.randn(BATCH, POINTS, 3, generator=g) * torch.tensor([1.0, 2, 3])).to(device)

    def loop(self, x: Tensor) -> Tensor:
        frames, centre = our_frames(x)
        away, total = x - centre.unsqueeze(1), torch.zeros_like(x)
        for axes in frames.unbind(1):
            total = total + self.net(away @ axes) @ axes.mT
        return total / frames.shape[1]

    def run(self, fn: Callable[[Tensor], Tensor]) -> Run:
        weights = list(self.net.parameters())

        def step() -> list[Tensor]:
            y = fn(self.x)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), weights)]

        def check() -> float:
            want = self.loop(self.x)
            want = [want.detach(), *torch.autograd.grad(want.square().sum(), weights)]
            # Together: the gradient of the last bias is 0, as the frames have it.
            a, b = (torch.cat([t.flatten() for t in all]) for all in (step(), want))
            return ((a - b).norm() / b.norm()).item() / 1e-4

        return Run(call=step, check=check)

    def ours(self) -> Run:
        from pyloss.nn import FrameAverage

        return self.run(FrameAverage(self.net, "E", out_type="vector"))


def cases(ctx: Context) -> Iterator[Case]:
    def axes(shape: tuple[int, ...]) -> list[Provider]:
        problem = Clouds(shape, ctx.device)
        return [
            Provider("pyloss", problem.op),
            Provider(
                "torch",
                lambda: problem.run(lambda: problem.step(plain_axes, problem.x), plain_axes),
            ),
            Provider(EIGH, problem.eigh),
        ]

    def frames(shape: tuple[int, ...]) -> list[Provider]:
        problem = Clouds(shape, ctx.device)
        return [
            Provider("pyloss", lambda: problem.run(lambda: problem.step(our_frames, problem.x))),
            Provider("torch", lambda: problem.run(lambda: problem.step(plain_frames, problem.x))),
        ]

    planned = [("axes", shape, axes, {"speedup_over_eigh": EIGH}) for shape in SHAPES]
    for name, shape, opened, against in [*planned, ("frames", SHAPES[0], frames, {})]:
        title = f"{name} fwd+bwd {'x'.join(map(str, shape))}"
        shape = (7, min(shape[1], 70), shape[2]) if ctx.quick else shape
        count = torch.Size(shape).numel()
        yield Case(
            name=title,
            group=name,
            mode="fwd+bwd",
            shape=shape,
            dtype="fp32",
            useful_bytes=3 * 4 * count,
            tensor_bytes=4 * count,
            open=lambda shape=shape, opened=opened: opened(shape),
            against=against,
        )

    def averages() -> list[Provider]:
        problem = Average(ctx.device)
        return [
            Provider("pyloss", problem.ours),
            Provider("torch", lambda: problem.run(problem.loop)),
        ]

    yield Case(
        name=f"average fwd+bwd {BATCH}x{POINTS}x3",
        group="average",
        mode="fwd+bwd",
        shape=(BATCH, POINTS, 3),
        dtype="fp32",
        useful_bytes=0,  # calls of a few microseconds
        tensor_bytes=4 * BATCH * POINTS * 3,
        open=averages,
        inner=10,
    )
