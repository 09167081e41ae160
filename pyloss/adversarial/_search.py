"""Projected gradient ascent in a ball around each input, which leaves the model as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyloss.adversarial._checks import Search, check_logits

_NEAR = 0.001  # spread of the start "near", as in the code of TRADES

# (logits at the point, y) -> what is maximised, of as many rows as there are inputs
Objective = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def attacking(model: Callable, x: Tensor) -> Iterator[Callable]:
    """The model to attack, in eval mode meanwhile, with gradients on.

    In eval mode nothing moves the statistics of a batch norm and no dropout draws numbers; of a
    model that draws some all the same, the global generators are put back. Of the distributed
    wrapper the module inside is called: the wrapper would wait for gradients of the
    parameters, of which there are none.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        # Tensors that are made in inference mode can be in no graph.
        with (
            torch.random.fork_rng([x.device] if x.is_cuda else []),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield model
    finally:
        for module, flag in zip(modules, flags):
            module.training = flag


def noise_like(x: Tensor, generator: torch.Generator | None) -> torch.Generator:
    """Where random numbers on the device of x come from: of `generator`, or of a copy of the
    global one on the CPU, which stays where it was."""
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type == x.device.type:
        return generator
    if generator is None:
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        if x.device.type == "cpu":
            return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(x.device).manual_seed(seed)


class Ball(NamedTuple):
    """The points around x that count, as differences to it."""

    norm: str
    eps: float
    low: Tensor | float  # of each entry
    high: Tensor | float

    @staticmethod
    def around(x: Tensor, search: Search) -> Ball:
        low, high = -math.inf, math.inf
        if search.norm == "linf":
            low, high = -search.eps, search.eps
        if search.clip is not None:
            low = (search.clip[0] - x).clamp(min=low)
            high = (search.clip[1] - x).clamp(max=high)
        return Ball(search.norm, search.eps, low, high)

    def project(self, delta: Tensor) -> Tensor:
        if self.norm == "l2":
            length = lengths(delta)
            delta = delta * torch.where(length > self.eps, self.eps / length, 1.0)
        return delta.clamp(self.low, self.high)

    def ascent(self, g: Tensor) -> Tensor:
        """The steepest direction, of length 1; 0 where the gradient is 0."""
        if self.norm == "linf":
            return g.sign()
        # Of a model that is sure of itself gradients are 1e-25, and their squares 0.
        most = g.abs()
        for dim in range(1, g.dim()):
            most = most.amax(dim, keepdim=True)
        g = g / torch.where(most > 0, most, 1.0)
        length = lengths(g)
        return g / torch.where(length > 0, length, 1.0)

    def start(self, kind: str, x: Tensor, generator: torch.Generator) -> Tensor:
        if kind == "clean":
            return torch.zeros_like(x)
        delta = torch.empty_like(x)
        if kind == "near":
            return self.project(_NEAR * delta.normal_(generator=generator))
        if self.norm == "linf":
            return self.project(self.eps * delta.uniform_(-1, 1, generator=generator))
        delta = delta.normal_(generator=generator)
        radius = torch.rand((x.shape[0],), generator=generator, device=x.device, dtype=x.dtype)
        radius = radius.pow(1 / max(1, x[0].numel())).view(-1, *(1,) * (x.dim() - 1))
        return self.project(self.ascent(delta) * (self.eps * radius))


def lengths(t: Tensor) -> Tensor:
    """Of each row, of a shape that broadcasts."""
    length = torch.linalg.vector_norm(t.flatten(1), dim=1)
    return length.view(-1, *(1,) * (t.dim() - 1))


def per_row(values: Tensor, rows: int) -> Tensor:
    """The sum over all but the first dimension, (N,)."""
    if not isinstance(values, Tensor) or values.dim() == 0 or values.shape[0] != rows:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"an objective must give a value for each of the {rows} rows, got {found}")
    return values if values.dim() == 1 else values.flatten(1).sum(1)


class _Watch:
    """Finds NaN without waiting for the device at every step, only once at the end."""

    def __init__(self) -> None:
        self.where: list[str] = []
        self.flags: list[Tensor] = []

    def see(self, where: str, t: Tensor) -> None:
        self.where.append(where)
        self.flags.append(t.isnan().any())

    def check(self) -> None:
        found = torch.stack(self.flags).tolist()
        if True in found:
            raise RuntimeError(f"{self.where[found.index(True)]}: the attack cannot go on")


def clean_logits(model: Callable, x: Tensor) -> Tensor:
    """Of the inputs as they are, without a gradient."""
    # Not under no_grad: autocast would keep the weights that it casts there, without a graph, for
    # the training step that follows.
    z = model(x)
    check_logits(z, x)
    watch = _Watch()
    watch.see("the model returned NaN for the inputs as they are, step 0", z)
    watch.check()
    return z.detach()


def maximise(
    model: Callable,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    search: Search,
    start: str,
    generator: torch.Generator | None,
    won: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Points of the balls around x where the objective is large, without a gradient.

    `won`, of logits and y, is what counts before the objective where there are several restarts.
    """
    y = None if y is None else y.clone()  # that made in inference mode can be in no graph
    base = x.double() if x.dtype == torch.float64 else x.float()
    ball = Ball.around(base, search)
    draw = noise_like(x, generator)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(search.restarts):
        delta = _ascend(model, x, y, objective, search, ball, ball.start(start, base, draw))
        if search.restarts == 1:
            return _point(x, base, delta, search)
        z = model(_point(x, base, delta, search))
        value = per_row(objective(z, y), x.shape[0]).detach()
        success = torch.zeros_like(value)
        if won is not None:
            success = won(z.detach(), y).reshape(x.shape[0], -1).to(value).mean(1)
        if best is None:
            best = delta, success, value
            continue
        better = (success > best[1]) | ((success == best[1]) & (value > best[2]))
        rows = better.view(-1, *(1,) * (x.dim() - 1))
        best = (
            torch.where(rows, delta, best[0]),
            torch.where(better, success, best[1]),
            torch.where(better, value, best[2]),
        )
    return _point(x, base, best[0], search)


def _point(x: Tensor, base: Tensor, delta: Tensor, search: Search) -> Tensor:
    point = base + delta
    if search.clip is not None:
        point = point.clamp(*search.clip)
    return point.to(x.dtype)


def _ascend(model, x, y, objective, search: Search, ball: Ball, delta: Tensor) -> Tensor:
    watch, base = _Watch(), x.to(delta.dtype)
    for step in range(1, search.steps + 1):
        point = _point(x, base, delta, search).requires_grad_()
        z = model(point)
        check_logits(z, x)
        values = per_row(objective(z, y), x.shape[0])
        if not values.requires_grad:
            raise RuntimeError("the objective does not depend on x: nothing has a gradient")
        (g,) = torch.autograd.grad(values.sum(), point)
        of = f"at step {step} of {search.steps}"
        watch.see(f"the model returned NaN {of}", z)
        watch.see(f"the gradient with respect to the input is NaN {of}", g)
        delta = ball.project(delta + search.step * ball.ascent(g.to(delta.dtype)))
    watch.check()
    return delta.detach()
