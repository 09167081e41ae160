"""Curricula: which samples a training sees first, and how fast the others follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from pyloss.functional import _checks as checks
from pyloss.functional import fused_cross_entropy

__all__ = ["CurriculumSampler", "Pacing", "difficulty_scores"]

# What is added to the first samples at the share s of the way, of all that are to come.
_GROWTH: dict[str, Callable[[float], float]] = {
    "linear": lambda s: s,
    "quad": lambda s: s * s,
    "root": math.sqrt,
    "step": math.floor,
    "exp": lambda s: math.expm1(10 * s) / math.expm1(10),
    "log": lambda s: 1 + math.log(s + math.exp(-10)) / 10,
}
ORDERS = ("curriculum", "anti", "random")
_ABOVE = 1 + 1e-12


class Pacing:
    r"""How many of N samples are in use at step t.

    .. math:: bN + (1 - b) N\, g\big(\min(1, \tfrac{t}{a T})\big), \qquad g(s) = s,\ s^2,\ \sqrt s,\
              \lfloor s \rfloor,\ \tfrac{e^{10 s} - 1}{e^{10} - 1},\ 1 + \tfrac{1}{10} \ln(s +
              e^{-10})

    rounded down, and at least 1: bN at the beginning, all of them from step aT on.

    Args:
        kind: g: ``"linear"``, ``"quad"``, ``"root"``, ``"step"``, ``"exp"``, ``"log"``.
        a: > 0, share of the steps after which all samples are in use; beyond 1 they never are.
        b: in (0, 1], share of the samples at the beginning.
        total_steps: T >= 1.

    Raises:
        TypeError: an argument of the wrong type. ValueError: one out of range.

    Example:
        >>> from pyloss.research.curriculum import Pacing
        >>> pacing = Pacing("linear", a=0.8, b=0.2, total_steps=10)
        >>> [pacing(step, 100) for step in range(0, 11, 2)]
        [20, 40, 60, 80, 100, 100]

    Reference:
        Vahidian et al. When Do Curricula Work in Federated Learning? arXiv 2212.12712.
    """

    def __init__(
        self, kind: str = "linear", a: float = 0.8, b: float = 0.2, total_steps: int = 100
    ) -> None:
        checks.check_one_of("kind", kind, _GROWTH)
        checks.check_range("a", a, 0.0, open_low=True)
        checks.check_number("b", b)
        if not 0 < b <= 1:
            raise ValueError(f"b must be in (0, 1], got {b}")
        self.kind, self.a, self.b = kind, a, b
        self.total_steps = checks.checked_count("total_steps", total_steps, 1)

    def __call__(self, step: int, n: int) -> int:
        """The number of samples out of n >= 1 at a step >= 0."""
        step = checks.checked_count("step", step)
        n = checks.checked_count("n", n, 1)
        # Just above: 0.29 * 100 is 28.99..., and 3 / (0.3 * 10) is 0.99...
        share = min(1.0, _ABOVE * step / (self.a * self.total_steps))
        grown = min(1.0, max(0.0, _GROWTH[self.kind](share)))
        size = n * (self.b + (1 - self.b) * grown)
        return min(n, max(1, math.floor(_ABOVE * size)))

    def __repr__(self) -> str:
        return f"Pacing(kind={self.kind!r}, a={self.a}, b={self.b}, total_steps={self.total_steps})"


class CurriculumSampler(Sampler[int]):
    r"""Shuffled indices out of the first samples in the order of their difficulty.

    An epoch at step t is a permutation of the first ``max(pacing(t, N), min_size)``.

    Args:
        scores: difficulty of each sample, ``(N,)``, as :func:`difficulty_scores` finds it.
        pacing: a :class:`Pacing`, or a function of the step and N that returns an integer.
        order: ``"curriculum"``, easy ones first; ``"anti"``, hard ones first; ``"random"``, an
            order that is drawn once: the control, in which only the number of samples grows.
        min_size: >= 1, the least number of samples; N if there are fewer.
        generator: for the shuffling and the random order; on the CPU.

    A sampler for a :class:`torch.utils.data.DataLoader`; :meth:`set_step` before an epoch moves
    it on.

    Raises:
        TypeError: an argument of the wrong type. ValueError: scores of another shape, none, or
            NaN; an option out of range.

    Example:
        >>> import torch
        >>> from pyloss.research.curriculum import CurriculumSampler, Pacing
        >>> scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
        >>> sampler = CurriculumSampler(scores, Pacing("linear", 1.0, 0.5, 2), min_size=1)
        >>> sorted(sampler)
        [1, 3]
        >>> sampler.set_step(1)
        >>> sorted(sampler)
        [1, 2, 3]

    Reference:
        Vahidian et al. When Do Curricula Work in Federated Learning? arXiv 2212.12712.
    """

    def __init__(
        self,
        scores: Tensor,
        pacing: Callable[[int, int], int],
        order: str = "curriculum",
        min_size: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        checks.check_tensor("scores", scores)
        if scores.dim() != 1 or scores.numel() == 0:
            raise ValueError(f"scores must be (N,) with N >= 1, got {list(scores.shape)}")
        if scores.isnan().any():
            raise ValueError("scores must not be NaN")
        if not callable(pacing):
            raise TypeError(f"pacing must be a Pacing or a function, got {type(pacing).__name__}")
        checks.check_one_of("order", order, ORDERS)
        checks.check_generator(generator)
        self.pacing, self.order, self.generator = pacing, order, generator
        self.min_size = checks.checked_count("min_size", min_size, 1)
        self.step = 0
        if order == "random":
            self._rank = torch.randperm(len(scores), generator=generator)
        else:
            self._rank = scores.detach().cpu().argsort(descending=order == "anti", stable=True)

    def set_step(self, step: int) -> None:
        """Moves the curriculum to a step >= 0, from the next epoch on."""
        self.step = checks.checked_count("step", step)

    def __len__(self) -> int:
        n = len(self._rank)
        return min(n, max(self.pacing(self.step, n), self.min_size))

    def __iter__(self) -> Iterator[int]:
        size = len(self)
        yield from self._rank[torch.randperm(size, generator=self.generator)].tolist()


@torch.no_grad()
def difficulty_scores(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of each sample under a model, which is in evaluation mode meanwhile.

    Args:
        model: takes a batch of inputs, gives logits. Inputs and targets go to the device of its
            first parameter.
        loader: batches ``(input, target)``, in the order in which the scores are wanted: no
            shuffling.
        loss: of output and target, one number for each sample; None:
            ``pyloss.fused_cross_entropy(..., reduction="none")``.

    Returns:
        ``(N,)``, on the device of the model.

    Raises:
        TypeError: a model that is no module. ValueError: no batches; a loss of another shape.

    Example:
        >>> import torch
        >>> from pyloss.research.curriculum import difficulty_scores
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(2)]
        >>> difficulty_scores(torch.nn.Linear(3, 2), batches).shape
        torch.Size([8])

    Reference:
        Vahidian et al. When Do Curricula Work in Federated Learning? arXiv 2212.12712.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    device = next((p.device for p in model.parameters()), None)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = [_losses(model, x.to(device), y.to(device), loss) for x, y in loader]
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ValueError("loader must give at least one batch")
    return torch.cat(found)


def _losses(model: nn.Module, x: Tensor, y: Tensor, loss: Callable | None) -> Tensor:
    """(N,)"""
    if loss is None:
        return cast(Tensor, fused_cross_entropy(model(x), y, reduction="none"))
    found = loss(model(x), y)
    if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"loss must give one number for each of {len(x)} samples, got {got}; torch's losses "
            "do with reduction='none'"
        )
    return found
