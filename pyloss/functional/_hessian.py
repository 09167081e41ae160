"""Products with the Hessian of a loss, and what its largest eigenvalue says of rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks

Params = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


class HessianOperator:
    r"""v -> H v, of :func:`pyloss.analysis.hvp`: one flat vector of all parameters to another.

    Attributes:
        dim: P, the number of parameters.
        dtype: of the vectors: the widest of the parameters, float32 for half types.
        device: of the parameters.

    Example:
        >>> import torch, pyloss
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = pyloss.analysis.hvp(lambda: (w**3).sum(), [w])
        >>> hessian(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        params: Params,
        batches: Iterable[Any] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        self.params = trainable(params)
        first = self.params[0]
        self.device, self.dtype = first.device, torch.float32
        for p in self.params:
            checks.check_device("a parameter", p, first, "another")
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.dim = sum(p.numel() for p in self.params)
        self.loss_fn, self.batches, self.weights = loss_fn, batches, weights
        if batches is None:
            if weights is not None:
                raise ValueError("weights are for batches, got no batches")
            self.grads = _gradients(loss_fn(), self.params)
            return
        try:
            once = iter(batches) is batches
        except TypeError:
            raise TypeError(f"batches must be an iterable, got {type(batches).__name__}") from None
        if once:
            raise TypeError(
                "batches are gone through in every product: a list or a DataLoader, got "
                f"{type(batches).__name__}"
            )
        if weights is not None:
            self.weights = weights.tolist() if isinstance(weights, Tensor) else list(weights)
            for at, weight in enumerate(self.weights):
                checks.check_range(f"weights[{at}]", weight, 0.0)

    def __call__(self, v: Tensor) -> Tensor:
        checks.check_floating("v", v)
        if v.shape != (self.dim,):
            raise ValueError(f"v must have the shape {[self.dim]}, got {list(v.shape)}")
        checks.check_device("v", v, self.params[0], "the parameters")
        if self.batches is None:
            return self._product(self.grads, v, keep=True).to(v.dtype)
        total, whole = torch.zeros_like(v, dtype=self.dtype), 0.0
        for weight, batch in self._weighted():
            grads = _gradients(self.loss_fn(batch), self.params)
            total.add_(self._product(grads, v, keep=False), alpha=weight)
            whole += weight
        if whole == 0:
            raise ValueError("batches must hold a batch of a weight above 0, got none")
        return (total / whole).to(v.dtype)

    def __repr__(self) -> str:
        return f"HessianOperator(dim={self.dim}, dtype={self.dtype}, device={self.device})"

    def _weighted(self) -> Iterator[tuple[float, Any]]:
        if self.weights is None:
            for batch in self.batches:
                yield 1.0, batch
            return
        count = 0
        for count, batch in enumerate(self.batches, 1):
            if count > len(self.weights):
                break
            yield float(self.weights[count - 1]), batch
        if count != len(self.weights):
            raise ValueError(f"weights must be as many as batches, got {len(self.weights)}")

    def _product(self, grads: Sequence[Tensor], v: Tensor, keep: bool) -> Tensor:
        parts = v.detach().split([p.numel() for p in self.params])
        pairs = [(g, part.view_as(g).to(g.dtype)) for g, part in zip(grads, parts)
                 if g.requires_grad]  # fmt: skip
        if not pairs:  # the loss is linear
            return torch.zeros_like(v, dtype=self.dtype)
        outputs, along = zip(*pairs)
        found = torch.autograd.grad(
            outputs, self.params, along, retain_graph=keep, materialize_grads=True
        )
        return flat(found, self.dtype)


def flat(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])


def trainable(params: Params) -> list[Tensor]:
    """Those that want a gradient, each once."""
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, Mapping):
        params = params.values()
    elif isinstance(params, Tensor):
        raise TypeError("params must be an iterable of Tensors or a Module, got a Tensor")
    elif not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of Tensors or a Module, got {type(params).__name__}"
        )
    found = {}
    for p in params:
        checks.check_tensor("a parameter", p)
        if p.requires_grad:
            checks.check_floating("a parameter", p)
            found.setdefault(id(p), p)
    if not found:
        raise ValueError("params must hold a Tensor that requires a gradient, got none")
    return list(found.values())


def _gradients(loss, params: list[Tensor]) -> tuple[Tensor, ...]:
    """With their graph."""
    check_loss(loss)
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    for g in grads:
        if g.layout != torch.strided:
            raise RuntimeError(f"gradients must be dense, got one of layout {g.layout}")
    return grads


def check_loss(loss) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise RuntimeError(f"the loss must be a scalar Tensor, got {shape}")
    if not loss.requires_grad:
        raise RuntimeError("the loss must have a graph that leads to the parameters, got none")


# --------------------------------------------------------------------------------------------------
# Laws of the batch size, of float64 tensors


def effective_batch(batch_size: Tensor, population: float) -> Tensor:
    """B / (1 - B / N): without end where the batch is all there is."""
    return batch_size / (1 - batch_size / population)


def spike(lam: Tensor, noise: Tensor, batch: Tensor) -> Tensor:
    """The largest eigenvalue of a batch's Hessian; noise is P sigma^2."""
    radius = (noise / batch).sqrt()
    found = torch.where(lam > radius, lam + noise / (batch * lam), 2 * radius)
    return torch.where(lam.isnan(), lam, found)


def unspike(lam_batch: Tensor, noise: Tensor, batch: Tensor) -> Tensor:
    """lam of the spike law; in the noise and at its edge the threshold, which lam is below."""
    square = (lam_batch.square() - 4 * noise / batch).clamp(min=0)
    return (lam_batch + square.sqrt()) / 2


def mean_square_curvature(
    lam: Tensor, noise: Tensor, batch: Tensor, momentum: float = 0.0
) -> Tensor:
    """2 (1 + momentum) over this is the largest rate of SGD that draws a batch in each step.

    At more E|x|^2 grows, on a quadratic of curvature lam in every direction. Without momentum it is
    the eigenvalue of the spike law, continued below the threshold."""
    lam, strength = lam.clamp(min=0), noise / batch
    share = torch.where(strength == 0, 0.0, strength / lam)
    return lam + share * ((1 + momentum) / (1 - momentum))


def checked_population(population: float | None, batch_size: float) -> float:
    if population is None:
        return math.inf
    checks.check_number("population", population)
    if not population >= batch_size:
        raise ValueError(f"population must be at least the batch, {batch_size}, got {population}")
    return float(population)


def checked_momentum(momentum: float) -> float:
    checks.check_range("momentum", momentum, 0.0)
    if momentum >= 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    return float(momentum)
