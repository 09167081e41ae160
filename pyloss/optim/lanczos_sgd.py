"""SGD that measures the curvature as it goes, and takes its rate and its damping from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _hessian as laws
from pyloss.functional._lanczos import eigen, lanczos
from pyloss.optim._whole import WholeOptimizer

Closure = Callable[[], Tensor]


class LanczosSGD(WholeOptimizer):
    r"""SGD whose rate and damping come from a few steps of Lanczos, every so many steps.

    .. math::
        \eta = \text{lr} \cdot \frac{2 (1 - \mu)}{\lambda' + \delta}, \qquad
        \delta = \max(0, -\lambda_{\min})

    :math:`\lambda'` is the largest eigenvalue of the Hessian of a batch, and the rate at
    ``lr = 1`` the largest at which SGD is sure to be stable with batches of that size, whatever
    part of the eigenvalue is noise (:func:`pyloss.analysis.max_learning_rate`). The damping is the
    size of the most negative eigenvalue, where a quadratic says little; in the random matrix model
    it is the edge of the noise. The update itself is that of ``torch.optim.SGD``, hence the name.

    With ``noise`` and both batch sizes the curvature may be measured on other batches than those of
    the steps (cheaper ones), and the batch size may change in a run: set
    ``optimizer.batch_size``. Then the rate is

    .. math:: \text{lr} \cdot \frac{2 (1 + \mu)}{\lambda + \frac{1 + \mu}{1 - \mu} \frac{P
              \sigma^2}{b \lambda} + \delta}, \qquad \lambda = \tfrac12 \Big(\lambda' +
              \sqrt{\lambda'^2 - 4 P \sigma^2 / b'}\Big)

    A measurement costs ``steps`` products with the Hessian, two to three gradients each, and holds
    the graph of a gradient and as many vectors as steps; by default ten products in a hundred
    steps.

    Args:
        params: parameters or groups, as for every optimizer. The curvature is that in all together.
        lr: in units of the largest stable rate, and so of the order of 1; of each group, and
            schedules may change it.
        every: steps from one measurement to the next.
        steps: of Lanczos.
        momentum: mu in [0, 1), of each group: heavy ball.
        damping: delta, ``"auto"`` as above, or a number >= 0.
        weight_decay: >= 0, of each group: added to the gradient, and to the curvature.
        noise: P sigma^2, of :func:`pyloss.analysis.hessian_noise`.
        batch_size: b, of the steps.
        curvature_batch_size: b', of the batches that the curvature is measured on.
        population: N samples, for batches that are drawn without replacement.
        seed: of the first vectors of Lanczos, together with the number of the step.

    The closure of :meth:`step` returns the loss with its graph and calls no ``backward``.
    A measurement that is not finite is dropped, and the rate stays; a gradient that is not finite
    reaches the parameters, as in ``torch.optim.SGD``. Where no curvature is found (a loss that is
    linear) the rate stays, too, and in the first step is ``lr`` itself. Measuring waits for the
    device; other steps do not. Several processes would each have their own rate: under
    DistributedDataParallel gradients would not be averaged.

    Attributes:
        curvature: the largest and smallest eigenvalue of the last measurement, float64, (2,), or
            None before the first.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.
        RuntimeError: a loss that is no scalar or has no graph; sparse gradients.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(),
        ...                             torch.nn.Linear(16, 1))
        >>> optimizer = pyloss.optim.LanczosSGD(model.parameters(), every=10)
        >>> def closure():
        ...     return (model(x) - y).square().mean()
        >>> losses = [optimizer.step(closure) for _ in range(30)]
        >>> bool(losses[-1] < losses[0])
        True

    Reference:
        Granziol, Zohren, Roberts. Learning Rates as a Function of Batch Size: A Random Matrix
        Theory Approach to Neural Network Training. arXiv 2006.09092.
    """

    _options = ("every", "steps", "damping", "noise", "batch_size", "curvature_batch_size",
                "population", "seed")  # fmt: skip
    _wide = ("curvature",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.5,
        *,
        every: int = 100,
        steps: int = 10,
        momentum: float = 0.0,
        damping: float | str = "auto",
        weight_decay: float = 0.0,
        noise: float | None = None,
        batch_size: float | None = None,
        curvature_batch_size: float | None = None,
        population: float | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(lr, Tensor):
            checks.check_range("lr", lr, 0.0)
        self.every = checks.checked_count("every", every, 1)
        self.steps = checks.checked_count("steps", steps, 1)
        if damping != "auto":
            if isinstance(damping, str):
                raise ValueError(f"damping must be 'auto' or a number, got {damping!r}")
            checks.check_range("damping", damping, 0.0)
        self.damping, self.seed = damping, checks.checked_integer("seed", seed)
        sizes = batch_size, curvature_batch_size
        if any((given is None) != (noise is None) for given in sizes):
            raise ValueError(
                "noise, batch_size and curvature_batch_size go together, got "
                f"{noise}, {batch_size} and {curvature_batch_size}"
            )
        if noise is not None:
            checks.check_range("noise", noise, 0.0)
            for name, size in zip(("batch_size", "curvature_batch_size"), sizes):
                checks.check_range(name, size, 0.0, open_low=True)
                laws.checked_population(population, size)
        elif population is not None:
            raise ValueError(f"population goes with noise, got {population} and no noise")
        self.noise, self.population = noise, population
        self.batch_size, self.curvature_batch_size = sizes
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer; the options of the group are checked."""
        group = self.defaults | param_group
        laws.checked_momentum(group["momentum"])
        checks.check_range("weight_decay", group["weight_decay"], 0.0)
        super().add_param_group(param_group)

    @property
    def curvature(self) -> Tensor | None:
        found = self.state.get(self.param_groups[0]["params"][0], {}).get("curvature")
        return None if found is None else found.clone()

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One step; every so often a measurement before it.

        Args:
            closure: returns the loss with its graph. It is called once, and needs neither zero_grad
                nor backward.

        Returns:
            The loss before the step, without a graph.
        """
        if not callable(closure):
            raise TypeError(f"step needs a closure, got {type(closure).__name__}")
        state = self._progress()
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        with torch.enable_grad():
            loss = closure()
            if state["step"] % self.every == 0 and params:
                hessian = laws.HessianOperator(lambda: loss, params)
                grads = hessian.grads
                self._measure(hessian, state)
            else:
                laws.check_loss(loss)
                grads = ()
                if params:
                    grads = torch.autograd.grad(loss, params, materialize_grads=True)
        for p, grad in zip(params, grads):
            if grad.layout != torch.strided:
                raise RuntimeError(f"gradients must be dense, got one of layout {grad.layout}")
            p.grad = grad.detach()
        for group in self.param_groups:
            self._move(group, state.get("curvature"))
        state["step"] += 1
        return loss.detach()

    def rate(self, group: int = 0) -> float:
        """The present rate of a group: what is subtracted is this times its buffer, or gradient.
        Waits for the device."""
        return float(self._rate(self.param_groups[group], self._progress().get("curvature")))

    def _measure(self, hessian: laws.HessianOperator, state: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(self.seed + state["step"])
        start = torch.randn(hessian.dim, generator=generator, dtype=hessian.dtype)
        values, _ = eigen(lanczos(hessian, start.to(hessian.device), self.steps))
        found = torch.stack([values[-1], values[0]])
        largest, delta = self._damped(found)
        if bool(found.isfinite().all()) and bool(largest + delta > 0):
            state["curvature"] = found

    def _damped(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        largest, smallest = curvature
        delta = self.damping
        if delta == "auto":
            delta = -smallest.clamp(max=0)
        return largest.clamp(min=0), torch.as_tensor(delta).to(curvature)

    def _rate(self, group: dict[str, Any], curvature: Tensor | None) -> float | Tensor:
        lr, mu = group["lr"], group["momentum"]
        if curvature is None:
            return lr
        lam, delta = self._damped(curvature)
        delta = delta + group["weight_decay"]
        if self.noise is None:
            return lr * 2 * (1 - mu) / (lam + delta)
        noise, own, theirs = (
            lam.new_tensor(float(x))
            for x in (self.noise, self.batch_size, self.curvature_batch_size)
        )
        if self.population is not None:
            own, theirs = (laws.effective_batch(b, self.population) for b in (own, theirs))
        lam = laws.unspike(lam, noise, theirs)
        curvature = laws.mean_square_curvature(lam, noise, own, mu)
        return lr * 2 * (1 + mu) / (curvature + delta)

    def _move(self, group: dict[str, Any], curvature: Tensor | None) -> None:
        params = [p for p in group["params"] if p.requires_grad]
        if not params:
            return
        moves, mu = [p.grad for p in params], group["momentum"]
        if group["weight_decay"]:
            moves = torch._foreach_add(moves, params, alpha=float(group["weight_decay"]))
        if mu:
            buffers = []
            for p, move in zip(params, moves):
                own = self.state[p]
                if "momentum_buffer" not in own:
                    own["momentum_buffer"] = torch.zeros_like(move)
                buffers.append(own["momentum_buffer"])
            torch._foreach_mul_(buffers, float(mu))
            torch._foreach_add_(buffers, moves)
            moves = buffers
        rate = self._rate(group, curvature)
        if not isinstance(rate, Tensor):
            torch._foreach_add_(params, moves, alpha=-rate)
            return
        for p, move in zip(params, moves):  # a number on a device is not waited for
            p.sub_((move * rate.to(p.device)).to(p.dtype))
