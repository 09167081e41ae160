"""Lion-K: one step, and the Lyapunov function."""

from __future__ import annotations

import torch
from torch import Tensor

import pyloss
from pyloss.reference.lion_k import lion_k
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

G = torch.Generator().manual_seed(0)
X, GRAD, M = torch.randn(3, 4, 5, generator=G, dtype=F64)


def lion_k_step(param: Tensor, grad: Tensor, momentum: Tensor, *, lion: bool = False, **options):
    """(param, momentum) after a step of LionK, or of Lion."""
    p = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    p.grad = grad.detach().clone()
    options = {"lr": 0.1, "weight_decay": 0.5, "rounding": "nearest", **options}
    optimizer = (pyloss.optim.Lion if lion else pyloss.optim.LionK)([p], **options)
    optimizer.state[p] = {"exp_avg": momentum.detach().clone(), "step": 0}
    optimizer.step()
    return p.detach(), optimizer.state[p]["exp_avg"]


def step_reference(
    param, grad, momentum, *, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, lion=False, **options
):
    options = {k: v for k, v in options.items() if k not in ("foreach", "fused")}
    numbers = dict(lr=lr, betas=betas, weight_decay=weight_decay)
    return lion_k(param, grad, momentum, **numbers, **options)


def sample(rows: int | None = None, **options) -> Sample:
    inputs = dict(param=X, grad=GRAD, momentum=M)
    if rows is not None:
        inputs = {k: torch.randn(rows, 5, dtype=F64) for k in inputs}
    return Sample(inputs, options)


def of(kappa: str, group: str = "tensor", **args) -> dict:
    return dict(kappa=kappa, group=group, kappa_args=args)


def lyapunov(f_value: Tensor, param: Tensor, momentum: Tensor, grad: Tensor, **options):
    options = {"betas": (0.9, 0.98), "lr": 0.01, "weight_decay": 0.2, **options}
    found = pyloss.optim.lion_k_lyapunov(f_value, [param], [momentum], [grad], **options)
    return tuple(found)[:4]


def lyapunov_reference(f_value, param, momentum, grad, *, kappa="l1", kappa_args=None, **_):
    """As written in the paper, with its gamma = alpha and its sign of m; H / gamma."""
    lam, gamma, eps = 0.2, 0.02 / 0.01, 0.1 * 0.01 / 0.02
    y, m = lam * param, -momentum
    e = (kappa_args or {}).get("e")
    at_m = {
        "l1": lambda: m.abs().sum(),
        "lp": lambda: m.norm(),
        "huber": lambda: torch.nn.functional.huber_loss(m, 0 * m, delta=e, reduction="sum") / e,
        "smooth": lambda: ((m**2 + e**2).sqrt() - e).sum(),
    }[kappa]()
    at_y = {
        "huber": lambda: e / 2 * (y**2).sum(),
        "smooth": lambda: (e - e * (1 - y**2).sqrt()).sum(),
    }
    conjugate = at_y.get(kappa, lambda: y.new_zeros(()))()
    gap = conjugate + at_m - (m * y).sum()
    composite = f_value + conjugate / lam
    outside = (y.norm() if kappa == "lp" else y.abs().amax()) - 1
    H = gamma * f_value + gamma / lam * conjugate + (1 - eps * gamma) / (1 + eps * lam) * gap
    return H / gamma, composite, gap, outside.clamp_min(0)


def lyapunov_sample(**options) -> Sample:
    value = torch.tensor(1.5, dtype=F64)
    return Sample(dict(f_value=value, param=X, momentum=M, grad=GRAD), options)


SPECS = (
    Spec(
        function=lion_k_step,
        covers=(pyloss.optim.LionK, pyloss.optim.Lion),
        samples={
            "l1": sample,
            "lp": lambda: sample(**of("lp", p=3.0)),
            "lp, rows": lambda: sample(**of("lp", "row", p=1.5), betas=(0.5, 0.8)),
            "soft": lambda: sample(**of("soft", e=0.5), maximize=True),
            "huber": lambda: sample(**of("huber", e=0.5), foreach=True),
            "topk": lambda: sample(**of("topk", k=3)),
            "topk, rows": lambda: sample(**of("topk", "row", fraction=0.3), fused=False),
            "smooth": lambda: sample(**of("smooth", e=0.5), weight_decay=0.0),
            "Lion": lambda: sample(lion=True, lr=0.01),
        },
        reference=step_reference,
        # The optimizer of a compiled function stands outside of it: test_compiled.
        compile="constructor",  # of Parameter
        autocast={},
        empty={"no elements": Empty(lambda: sample(0), 0.0, (0, 5))},
        nan={"param": "any", "grad": "any", "momentum": "any"},
        large=lambda: sample(20000),
        errors=(
            Bad(ValueError, "lr must be finite and >= 0, got -1", dict(lr=-1)),
            Bad(ValueError, r"betas\[1\] must be in \[0, 1\), got 1", dict(betas=(0.9, 1))),
            Bad(ValueError, "betas must be two numbers, got 0.9", dict(betas=0.9)),
            Bad(ValueError, "weight_decay must be finite and >= 0, got -0.1",
                dict(weight_decay=-0.1)),
            Bad(ValueError, r"lr \* weight_decay must be below 1, got 0.1 \* 10",
                dict(weight_decay=10.0)),
            Bad(ValueError, "kappa must be one of l1, lp, .*, or a function, got 'l2'",
                dict(kappa="l2")),
            Bad(TypeError, "kappa must be a name or a function, got int", dict(kappa=2)),
            Bad(ValueError, "kappa 'lp' needs kappa_args with p, got {}", dict(kappa="lp")),
            Bad(ValueError, r"kappa_args\['p'\] must be finite and > 1, got 1", of("lp", p=1)),
            Bad(ValueError, r"kappa_args\['e'\] must be finite and > 0, got 0", of("huber", e=0)),
            Bad(ValueError, r"kappa_args\['k'\] must be >= 1, got 0", of("topk", k=0)),
            Bad(TypeError, r"kappa_args\['k'\] must be an integer", of("topk", k=1.5)),
            Bad(ValueError, r"kappa_args\['fraction'\] must be in \(0, 1\], got 2",
                of("topk", fraction=2)),
            Bad(ValueError, "needs kappa_args with k or fraction, got {'k': 1, 'fraction': 1}",
                of("topk", k=1, fraction=1)),
            Bad(ValueError, "kappa 'l1' has no argument 'p'", of("l1", p=2)),
            Bad(TypeError, "kappa_args must be a dict, got int", dict(kappa_args=3)),
            Bad(ValueError, "group must be one of tensor, row, global, got 'all'",
                dict(group="all")),
            Bad(ValueError, "takes a tensor: no kappa_args, no group",
                dict(kappa=torch.sign, group="row")),
            Bad(ValueError, r"kappa must return a tensor of shape \[4, 5\], got \[\]",
                dict(kappa=torch.sum)),
            Bad(ValueError, "rounding must be one of nearest, .*, got 'up'", dict(rounding="up")),
            Bad(TypeError, "seed must be an integer, got float", dict(seed=0.5)),
            Bad(TypeError, "momentum_dtype must be a torch.dtype, got str",
                dict(momentum_dtype="bf16")),
            Bad(ValueError, "momentum_dtype must be floating, got torch.int64",
                dict(momentum_dtype=torch.int64)),
            Bad(RuntimeError, "cannot be `True` together", dict(fused=True, foreach=True)),
            Bad(TypeError, "fused must be a bool, got int", dict(fused=1)),
            Bad(ValueError, r"lr must hold one number, got shape \[2\]",
                dict(lr=torch.ones(2))),
        ),
    ),
    Spec(
        function=lyapunov,
        covers=(pyloss.optim.lion_k_lyapunov,),
        name="lion_k_lyapunov",
        samples={
            "l1": lyapunov_sample,
            "lp": lambda: lyapunov_sample(kappa="lp", kappa_args=dict(p=2.0)),
            "huber": lambda: lyapunov_sample(kappa="huber", kappa_args=dict(e=0.5)),
            "smooth": lambda: lyapunov_sample(kappa="smooth", kappa_args=dict(e=0.5)),
        },
        reference=lyapunov_reference,
        result=F64,
        rounded=False,
        dtypes=(F64, F32),
        autocast={},
        empty={"no elements": Empty(
            lambda: lyapunov_sample().replace(
                {k: torch.ones(0, dtype=F64) for k in ("param", "momentum", "grad")}
            ), 1.5)},
        nan={"param": "all", "momentum": "all", "f_value": "all"},
        errors=(
            Bad(ValueError, "weight_decay must be > 0", dict(weight_decay=0)),
            Bad(ValueError, "lr must be finite and > 0, got 0", dict(lr=0)),
            Bad(ValueError, "a kappa that is a function has no K", dict(kappa=torch.sign)),
        ),
    ),
)  # fmt: skip
