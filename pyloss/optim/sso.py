"""SSO: several steps of a model for each call of an expensive loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyloss.functional import _checks as checks
from pyloss.functional.surrogate import check_options, surrogate_of
from pyloss.optim._whole import WholeOptimizer
from pyloss.optim.lr_scheduler.recorder import total_norm

SCHEDULES = ("constant", "stochastic", "exponential", "adagrad")
INNER = ("sgd", "armijo")

# The line search of the paper's code.
_DECREASE, _SHRINK, _FIRST_STEP, _TRIALS = 0.5, 0.9, 10.0, 100
_SMALLEST_STEP = _SMALLEST_NORM = 1e-6

Closure = Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]


class SSO(WholeOptimizer):
    r"""Surrogate optimisation in the space of the outputs: for losses that cost more than a model.

    A step asks the loss once, for its gradient g at the outputs :math:`z_t` of the batch, and then
    takes ``inner_steps`` steps with the model on

    .. math:: \langle g, z(\theta) \rangle + \frac{1}{\eta_t} D(z(\theta), z_t)

    (:func:`pyloss.functional.target_surrogate_loss`). A simulator, a human or a remote service may
    stand behind the loss. With one step of ``"sgd"`` this is SGD; with many it approaches
    projected gradient descent on the outputs, whatever the condition of the model.

    Args:
        params: parameters or groups, as for every optimizer.
        inner: how the surrogate is minimised. ``"sgd"``: gradient steps of size ``lr``.
            ``"armijo"``: those with a backtracking line search, which needs no ``lr``, but looks at
            numbers and so waits for a device, and in several processes goes apart. Or a function of
            the list of parameters that makes an optimizer, such as
            ``lambda p: torch.optim.LBFGS(p)``; each surrogate gets a fresh one.
        inner_steps: of ``inner``, for each call of the loss.
        eta: > 0: step size in the space of outputs; for a loss that is L-smooth there, 1 / L.
        eta_schedule: of the steps t = 0, 1, ...: ``"constant"``; ``"stochastic"``,
            :math:`\eta / \sqrt{t + 1}`; ``"exponential"``, :math:`\eta\, T^{-t / T}`, with
            ``total_steps`` T; ``"adagrad"``, :math:`\eta / \sqrt{\sum_{s \le t} \lVert g_s
            \rVert^2}`; or a function of t that returns what ``eta`` is multiplied by.
        divergence: D, ``"l2"`` or ``"kl"``.
        lr: of ``"sgd"``; of each group, and so schedules may change it.
        total_steps: T of ``"exponential"``, > 0.

    The closure of :meth:`step` must give the same outputs for the same parameters within a step: it
    is called several times. Take the batch outside; dropout draws anew in each call (a warning of
    the first step says so), and batch norm in training mode moves its averages in each.

    Raises:
        TypeError: an option, or what the closure returns, of the wrong type.
        ValueError: an option out of range; outputs that change their shape.
        RuntimeError: outputs without a gradient; a loss that is no scalar; sparse gradients.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(32, 4), torch.randint(3, (32,))
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = pyloss.optim.SSO(model.parameters(), "armijo", inner_steps=5, eta=8.0)
        >>> def closure():
        ...     return model(x), lambda z: torch.nn.functional.cross_entropy(z, y)
        >>> losses = [optimizer.step(closure) for _ in range(10)]
        >>> bool(losses[-1] < losses[0])
        True

    Reference:
        Lavington et al. Target-based Surrogates for Stochastic Optimization. arXiv 2302.02607.
    """

    _options = ("inner", "inner_steps", "eta", "eta_schedule", "total_steps", "divergence")
    _wide = ("grad_square",)

    def __init__(
        self,
        params: Iterable[Any],
        inner: str | Callable[[list[Tensor]], Optimizer] = "sgd",
        inner_steps: int = 10,
        eta: float = 1.0,
        eta_schedule: str | Callable[[int], float] = "constant",
        divergence: str = "l2",
        *,
        lr: float | Tensor = 1e-3,
        total_steps: int | None = None,
    ) -> None:
        if not callable(inner):
            checks.check_one_of("inner", inner, INNER)
        inner_steps = checks.checked_integer("inner_steps", inner_steps)
        if inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, got {inner_steps}")
        if isinstance(eta, Tensor):
            raise TypeError("eta must be a number, got Tensor")
        check_options(divergence, eta)
        if not callable(eta_schedule):
            checks.check_one_of("eta_schedule", eta_schedule, SCHEDULES)
        if (eta_schedule == "exponential") != (total_steps is not None):
            raise ValueError(
                "total_steps is for eta_schedule='exponential', which needs it, got "
                f"{total_steps} and {eta_schedule!r}"
            )
        if total_steps is not None and checks.checked_integer("total_steps", total_steps) < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if not isinstance(lr, Tensor):
            checks.check_range("lr", lr, 0.0)
        super().__init__(params, dict(lr=lr))
        self.inner, self.inner_steps = inner, inner_steps
        self.eta, self.eta_schedule, self.total_steps = eta, eta_schedule, total_steps
        self.divergence = divergence

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """Asks the loss once, and takes ``inner_steps`` steps on its surrogate.

        Args:
            closure: returns ``(outputs, loss_fn)``: the outputs of the model, with their graph, and
                a function that takes them to a scalar. It is called for each evaluation of the
                surrogate, and the ``loss_fn`` of the first call once. It needs neither zero_grad
                nor backward.

        Returns:
            The loss before the step, without a graph.
        """
        if not callable(closure):
            raise TypeError(f"step needs a closure, got {type(closure).__name__}")
        state = self._progress()
        watched = state["step"] == 0 and (self.inner_steps > 1 or self.inner == "armijo")
        random = _random_states(self._parameters()) if watched else None
        with torch.enable_grad():
            outputs, loss_fn = _called(closure)
            target = outputs.detach().requires_grad_()
            loss = loss_fn(target)
            if not isinstance(loss, Tensor) or loss.dim():
                shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise RuntimeError(f"loss_fn must return a scalar Tensor, got {shape}")
            if not loss.requires_grad:
                raise RuntimeError("loss_fn must return a function of its argument, with a graph")
            (grad,) = torch.autograd.grad(loss, target)
        if random is not None and not _same(random, _random_states(self._parameters())):
            warnings.warn(
                "the closure of SSO draws random numbers: its inner steps see another function in "
                "each call. Call model.eval() where that is dropout, and take the batch outside",
                stacklevel=2,
            )
        surrogate = surrogate_of(target, grad, self._eta(state, grad), self.divergence)
        evaluation = _Evaluation(self._parameters(), closure, surrogate, outputs)
        if self.inner == "armijo":
            _line_searches(evaluation, self.inner_steps)
        else:
            inner = self._inner()
            for _ in range(self.inner_steps):
                inner.step(evaluation)
        state["step"] += 1
        return loss.detach()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _eta(self, state: dict[str, Any], grad: Tensor) -> float | Tensor:
        step, schedule = state["step"], self.eta_schedule
        if callable(schedule):
            factor = schedule(step)
            if not isinstance(factor, Tensor):
                checks.check_range("what eta_schedule returns", factor, 0.0, open_low=True)
            return self.eta * factor
        if schedule == "stochastic":
            return self.eta / math.sqrt(step + 1)
        if schedule == "exponential":
            return self.eta * self.total_steps ** (-step / self.total_steps)
        if schedule == "adagrad":
            wide = torch.promote_types(grad.dtype, torch.float32)
            state["grad_square"] = state.get("grad_square", 0) + grad.to(wide).square().sum()
            return self.eta * state["grad_square"].rsqrt()
        return self.eta

    def _inner(self) -> Optimizer:
        if callable(self.inner):
            made = self.inner(self._parameters())
            if not isinstance(made, Optimizer):
                raise TypeError(f"inner must make an Optimizer, got {type(made).__name__}")
            return made
        groups = [{"params": g["params"], "lr": g["lr"]} for g in self.param_groups]
        return torch.optim.SGD(groups, lr=0.0)


def _called(closure: Closure) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    found = closure()
    if not (isinstance(found, tuple) and len(found) == 2 and callable(found[1])):
        raise TypeError(f"closure must return (outputs, loss_fn), got {_described(found)}")
    checks.check_floating("outputs", found[0])
    if not found[0].requires_grad:
        raise RuntimeError("outputs must require a gradient: the closure returned some without")
    return found


def _described(found: Any) -> str:
    if not isinstance(found, tuple):
        return type(found).__name__
    return f"({', '.join(type(part).__name__ for part in found)})"


class _Evaluation:
    """The surrogate and its gradient at the present parameters: a closure of torch.optim."""

    def __init__(
        self,
        params: list[Tensor],
        closure: Closure,
        surrogate: Callable[[Tensor], Tensor],
        outputs: Tensor,
    ) -> None:
        self.params, self.closure, self.surrogate = params, closure, surrogate
        self.shape, self.outputs = outputs.shape, outputs  # those of the first call are there

    def value(self) -> Tensor:
        """With its graph."""
        with torch.enable_grad():
            outputs, self.outputs = self.outputs, None
            if outputs is None:
                outputs, _ = _called(self.closure)
                if outputs.shape != self.shape:
                    raise ValueError(
                        f"outputs had the shape {list(self.shape)} when the step began, and now "
                        f"have {list(outputs.shape)}"
                    )
            return self.surrogate(outputs)

    def backward(self, value: Tensor) -> None:
        for p in self.params:
            p.grad = None
        value.backward()
        for p in self.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(f"gradients must be dense, got one of layout {p.grad.layout}")

    def __call__(self) -> Tensor:
        value = self.value()
        self.backward(value)
        return value.detach()


def _line_searches(evaluation: _Evaluation, steps: int) -> None:
    """Gradient steps, each as long as Armijo's condition allows; a search begins with the step of
    the one before. The graph of the trial that is taken serves the next gradient."""
    size, value = _FIRST_STEP, evaluation.value()
    for _ in range(steps):
        evaluation.backward(value)
        params = [p for p in evaluation.params if p.grad is not None]
        grads = [p.grad for p in params]
        norm = total_norm(grads).item()
        if not norm > _SMALLEST_NORM:
            return
        start, begin = value.item(), [p.clone() for p in params]
        for _ in range(_TRIALS):
            torch._foreach_copy_(params, begin)
            torch._foreach_add_(params, grads, alpha=-size)
            value = evaluation.value()
            if value.item() <= start - _DECREASE * size * norm**2:
                break
            size *= _SHRINK
            if size < _SMALLEST_STEP:
                break
        else:
            size = 0.0
        if size < _SMALLEST_STEP:  # none was taken
            torch._foreach_copy_(params, begin)
            return


def _random_states(params: list[Tensor]) -> list[Tensor]:
    """Of torch's generators on the CPU and on the devices of the parameters."""
    devices = dict.fromkeys(p.device for p in params if p.device.type not in ("cpu", "meta"))
    found = [torch.get_rng_state()]
    for device in devices:
        ask = getattr(getattr(torch, device.type, None), "get_rng_state", None)
        if ask is not None:  # MPS is one device, and its function takes none
            found.append(ask() if device.type == "mps" else ask(device))
    return found


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(map(torch.equal, before, after))
