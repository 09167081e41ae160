"""Lion-K: a family of sign-like optimisers, each of which solves a problem with a constraint.

Lion is the one whose K is the l1 norm. Paper: Chen, Liu, Liang, Liu, arXiv 2310.05898.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyloss.functional._checks import (
    check_number,
    check_range,
    checked_flag,
    checked_integer,
    is_dtensor,
)
from pyloss.ops.lion_k import ROUNDINGS
from pyloss.optim import _kappas
from pyloss.optim import _lion_k_step as steps

_HALF = (torch.bfloat16, torch.float16)
_FLAGS = ("maximize", "capturable")
_ENGINES = ("foreach", "fused")


class LionK(Optimizer):
    r"""Lion-:math:`\mathcal K`: momentum through the gradient of a convex function K.

    .. math::

        c &= \beta_1 m + (1 - \beta_1)\, g \\
        x &\leftarrow x - \eta\,(\nabla K(c) + \lambda x) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2)\, g

    It minimises :math:`f(x) + K^*(\lambda x) / \lambda`: the weight decay is the inverse size of a
    ball that the parameters end in, and K is its shape.

    ============ ================================== ============================================
    ``kappa``    :math:`\nabla K(c)`                what is solved
    ============ ================================== ============================================
    ``"l1"``     sign(c): Lion                      min f, all \|x\| <= 1/lambda
    ``"lp"``     sign(c) (\|c\| / norm_p)^(p-1)     min f, norm_q(x) <= 1/lambda, 1/p + 1/q = 1
    ``"soft"``   sign(c) where \|c\| > e, else 0    min f + e norm_1(x), all \|x\| <= 1/lambda
    ``"huber"``  clip(c, -e, e) / e                 min f + (e lambda / 2) norm_2(x)^2, same box
    ``"topk"``   sign(c) of the k largest \|c\|     min f, norm_1(x) <= k/lambda, same box
    ``"smooth"`` c / sqrt(c^2 + e^2)                min f + (1/lambda) sum(e - e sqrt(1 -
                                                    (lambda x)^2)), same box
    a function   what it returns for c
    ============ ================================== ============================================

    One buffer a parameter, ``exp_avg``, half of Adam's; and ``step``, which counts calls. Rates are
    usually 3 to 10 times smaller, and decays as many times larger, than for AdamW. In float32 the
    step of ``"l1"`` has the bits of the plain loop ``x *= 1 - lr * decay; x -= lr * sign(c)``.

    Not offered: ``differentiable``. Sparse gradients are refused. NaN in a gradient makes NaN of
    its element, for ``"lp"`` and ``"topk"`` of its group. Complex parameters are pairs of reals.

    Args:
        params: parameters, named parameters, or groups of them; every option may differ by group.
        lr: step size; a tensor is read on its device.
        betas: of the two averages, each in [0, 1).
        weight_decay: lambda, decoupled. ``lr * weight_decay`` must be below 1.
        kappa: a name, or a function of one tensor c (float32 where the parameter is of a half type;
            the whole of it where the parameter is a DTensor) that returns a tensor of its shape.
        kappa_args: ``dict(p=...)``, p > 1; ``dict(e=...)``, e > 0 (``"soft"``: >= 0);
            ``dict(k=...)`` or ``dict(fraction=...)`` of the elements of a group.
        group: what the norms of ``"lp"`` and ``"topk"`` are of: each ``"tensor"``, each ``"row"``
            of one (a slice along its first dimension), or all tensors of a parameter group with a
            gradient, ``"global"``.
        rounding: of bfloat16 and float16 parameters, beside which a small step is lost when it is
            rounded to ``"nearest"``. ``"stochastic"``, the default (``None``), keeps the mean of
            steps of any size; ``"compensated"`` keeps what was rounded away in a buffer of the
            parameter's dtype, and so twice the digits, without chance.
        seed: of stochastic rounding, whose random bits depend on it, the step, and the place of the
            element: not on threads, and not on the global generator.
        momentum_dtype: of ``exp_avg``; default: that of the parameter.
        maximize: go up.
        foreach, fused: which implementation. Default: one call of a kernel for all tensors where
            there is one (CPU, CUDA), and lists of torch operations elsewhere and under
            ``torch.compile``. ``foreach=False`` or ``fused=False`` alone: one tensor at a time, or
            lists.
        capturable: ``step`` is a tensor on the device, for CUDA graphs.

    Raises:
        ValueError: an option out of range, or ``lr * weight_decay >= 1``. (Where a schedule comes
            there later, a warning.)
        TypeError: an option of a wrong type.
        RuntimeError: sparse gradients; ``fused`` and ``foreach`` at once.

    Example:
        >>> import pyloss, torch
        >>> x = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = pyloss.optim.LionK([x], lr=0.1, weight_decay=2.0)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = (x - torch.tensor([5.0, 0.1, -5.0])).square().sum()
        ...     loss.backward()
        ...     _ = optimizer.step()
        >>> x.detach()[[0, 2]]  # the box of 1 / weight_decay
        tensor([ 0.5000, -0.5000])

    Reference:
        Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov
        Predicts", arXiv 2310.05898.
    """

    _warned = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kappa: str | Callable[[Tensor], Tensor] = "l1",
        kappa_args: Mapping[str, float] | None = None,
        group: str = "tensor",
        rounding: str | None = None,
        seed: int = 0,
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            kappa=kappa,
            kappa_args=kappa_args,
            group=group,
            rounding=rounding,
            seed=seed,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
        )
        # Before anything else: a wrong default is wrong though every group has its own.
        defaults |= _checked(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimiser; options that the group lacks are those of the constructor."""
        if isinstance(param_group, dict):
            param_group = param_group | _checked(self.defaults | param_group)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for p in added["params"]:
            steps.check_parameter(p, added["fused"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler: the step takes ``grad_scale`` and ``found_inf`` itself, without waiting."""
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimiser; ``exp_avg`` keeps ``momentum_dtype``, on any device."""
        seen: dict[str, Any] = {}
        # After the hooks of the user, which may put another state_dict in its place.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: seen.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = chain.from_iterable(g["params"] for g in seen["param_groups"])
        for group in self.param_groups:
            for p in group["params"]:
                saved, state = seen["state"].get(next(ids)), self.state.get(p)
                if saved and state:
                    _restore(p, saved, state, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; gives what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_capture(self)
        found_inf = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.is_cpu and found_inf.item():
            return loss
        first = 0
        for group in self.param_groups:
            self._step_group(group, first, scale, found_inf)
            first += len(group["params"])
        return loss

    def _step_group(
        self, group: dict[str, Any], first: int, scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        places = [at for at, p in enumerate(group["params"]) if p.grad is not None]
        params = [group["params"][at] for at in places]
        grads = [p.grad for p in params]
        if not params:
            return
        if {g.layout for g in grads} != {torch.strided}:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        momenta, rests, numbers, counts = [], [], [], []
        comp = group["rounding"] == "compensated"
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                self._start(p, state, group)
            number = state["step"]
            if isinstance(number, Tensor):  # torch.compile makes it one, whatever `capturable` says
                counts.append(number)
            else:
                number = state["step"] = number + 1
            momenta.append(state["exp_avg"])
            rests.append(state["compensation"] if comp and p.dtype in _HALF else None)
            numbers.append(number)
        if counts:
            torch._foreach_add_(counts, 1)
            if found_inf is not None:
                torch._foreach_sub_(counts, [found_inf.to(t) for t in counts])
        if scale is not None:
            _unscale(grads, scale)
        self._warn_of_decay(group)
        places = [first + at for at in places]
        entries = steps.Entries(params, grads, momenta, rests, places, numbers, params)
        steps.update(entries, group, found_inf)

    def _start(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        device = dict(dtype=torch.float32, device=p.device)
        state["step"] = torch.zeros((), **device) if group["capturable"] else 0
        dtype = group["momentum_dtype"]
        if dtype is not None and p.is_complex():
            dtype = dtype.to_complex()
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if group["rounding"] == "compensated" and p.dtype in _HALF:
            state["compensation"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _warn_of_decay(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if self._warned or isinstance(lr, Tensor) or lr * group["weight_decay"] < 1:
            return
        self._warned = True
        warnings.warn(
            f"lr * weight_decay is {lr * group['weight_decay']:g}: from 1 on the decay turns the "
            "sign of the parameters, and no constraint is kept",
            stacklevel=5,
        )


class Lion(LionK):
    r"""Lion: :class:`LionK` with the l1 norm, so that the step is a sign.

    .. math::

        x \leftarrow x - \eta\,(\mathrm{sign}(\beta_1 m + (1 - \beta_1)\, g) + \lambda x), \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2)\, g

    Args:
        params, lr, betas, weight_decay, rounding, seed, momentum_dtype, maximize, foreach, fused,
            capturable: as of :class:`LionK`.

    Raises:
        as of :class:`LionK`.

    Example:
        >>> import pyloss, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = pyloss.optim.Lion(model.parameters(), lr=3e-4, weight_decay=0.1)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()

    Reference:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        rounding: str | None = None,
        seed: int = 0,
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            rounding=rounding,
            seed=seed,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
        )


def check_betas(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for at, beta in enumerate(betas):
        check_number(f"betas[{at}]", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{at}] must be in [0, 1), got {beta}")


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are kept in another form than given; raises where one is wrong."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must hold one number, got shape {list(lr.shape)}")
        lr = float(lr)
    check_range("lr", lr, 0)
    betas = options["betas"]
    check_betas(betas)
    check_range("weight_decay", options["weight_decay"], 0)
    if lr * options["weight_decay"] >= 1:
        raise ValueError(
            f"lr * weight_decay must be below 1, got {lr:g} * {options['weight_decay']:g}"
        )
    if options["rounding"] not in (None, *ROUNDINGS):
        raise ValueError(
            f"rounding must be one of {', '.join(ROUNDINGS)}, got {options['rounding']!r}"
        )
    dtype = options["momentum_dtype"]
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"momentum_dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"momentum_dtype must be floating, got {dtype}")
    for name in _ENGINES:
        if options[name] is not None:
            checked_flag(name, options[name])
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    seed = checked_integer("seed", options["seed"])
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")
    return dict(
        betas=tuple(betas),
        kappa_args=_kappas.checked(options["kappa"], options["kappa_args"], options["group"]),
        seed=seed,
        **{name: checked_flag(name, options[name]) for name in _FLAGS},
    )


def _restore(p: Tensor, saved: Mapping, state: dict[str, Any], group: Mapping) -> None:
    """The momentum in its own dtype, which torch casts to the parameter's; `step` as it is kept."""
    dtype = group["momentum_dtype"]
    if dtype is not None and not p.is_complex() and isinstance(saved.get("exp_avg"), Tensor):
        state["exp_avg"] = saved["exp_avg"].to(p.device, dtype, copy=True)
    step = state.get("step")
    if group["capturable"] and step is not None:
        state["step"] = torch.as_tensor(step, dtype=torch.float32, device=p.device)
    elif isinstance(step, Tensor):
        state["step"] = int(step)


def _unscale(grads: list[Tensor], scale: Tensor) -> None:
    """The gradients themselves, as the fused optimisers of torch leave them."""
    for g in grads:
        g = g.to_local() if is_dtensor(g) else g
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        g.mul_(scale.double().reciprocal().to(g.device, wide))


def _check_capture(optimizer: LionK) -> None:
    """Of a CUDA graph; under its name in the torch at hand."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    if check is None:
        check = optimizer._cuda_graph_capture_health_check
    check()
