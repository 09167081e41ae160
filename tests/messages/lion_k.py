"""Lion-K, its Lyapunov function, and the monitor of it."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.optim import Lion, LionK, LyapunovMonitor, lion_k_lyapunov

X, M = torch.tensor([0.5, -0.25, 0.0]), torch.tensor([1.0, -2.0, 0.5])
RATES = dict(betas=(0.9, 0.99), lr=1e-3, weight_decay=0.1)


def trained(optimizer=LionK, dtype=torch.float32, **options) -> torch.Tensor:
    x = X.to(dtype, copy=True).requires_grad_()
    x.grad = M.to(dtype)
    optimizer([x], **options).step()
    return x.detach()


def monitored(**options) -> None:
    LyapunovMonitor(LionK([X.clone().requires_grad_()], **options))


def gap(**options) -> torch.Tensor:
    return lion_k_lyapunov(0.0, [X], [M], **RATES | options).fenchel_gap


lp, topk, soft, huber = (partial(trained, kappa=name) for name in ("lp", "topk", "soft", "huber"))
SPARSE = torch.zeros(2, requires_grad=True)
SPARSE.grad = torch.ones(2).to_sparse()
ROWS = (
    refused(TypeError, "params argument given to the optimizer should be an iterable", LionK, X),
    refused(ValueError, "optimizer got an empty parameter list", Lion, []),
    refused(ValueError, "parameters must be floating or complex, got torch.int64",
            LionK, [torch.zeros(2, dtype=torch.int64)]),
    refused(RuntimeError, "LionK does not support sparse gradients", LionK([SPARSE]).step),
    refused(ValueError, "lr must be finite and >= 0, got -1", trained, lr=-1),
    refused(TypeError, "lr must be a number, got str", trained, lr="1"),
    refused(ValueError, "lr must hold one number, got shape [2]", trained, lr=torch.ones(2)),
    refused(ValueError, "betas must be two numbers, got 0.9", trained, betas=0.9),
    refused(ValueError, "betas[1] must be in [0, 1), got 1.0", trained, betas=(0.9, 1.0)),
    refused(TypeError, "betas[0] must be a number, got NoneType", trained, betas=(None, 0.9)),
    refused(ValueError, "weight_decay must be finite and >= 0, got nan",
            trained, weight_decay=float("nan")),
    refused(ValueError, "lr * weight_decay must be below 1, got 0.5 * 2",
            trained, lr=0.5, weight_decay=2.0),
    refused(ValueError, "lr * weight_decay must be below 1, got 0.5 * 2",
            trained, optimizer=Lion, lr=0.5, weight_decay=2.0),
    refused(ValueError, "rounding must be one of nearest, stochastic, compensated, got 'up'",
            trained, rounding="up"),
    refused(TypeError, "seed must be an integer, got float", trained, seed=0.5),
    refused(ValueError, "seed must be in [-2^63, 2^63), got 9223372036854775808",
            trained, seed=2**63),
    refused(TypeError, "momentum_dtype must be a torch.dtype, got str",
            trained, momentum_dtype="float32"),
    refused(ValueError, "momentum_dtype must be floating, got torch.int32",
            trained, momentum_dtype=torch.int32),
    refused(TypeError, "maximize must be a bool, got int", trained, maximize=1),
    refused(TypeError, "fused must be a bool, got str", trained, fused="yes"),
    refused(RuntimeError, "`fused` and `foreach` cannot be `True` together.",
            trained, fused=True, foreach=True),
    refused(ValueError, "kappa must be one of l1, lp, soft, huber, topk, smooth, or a function, "
            "got 'l2'", trained, kappa="l2"),
    refused(TypeError, "kappa must be a name or a function, got int", trained, kappa=2),
    refused(ValueError, "kappa must return a tensor of shape [3], got []",
            trained, kappa=torch.sum),
    refused(ValueError, "a kappa that is a function takes a tensor: no kappa_args, no group",
            trained, kappa=torch.sign, group="row"),
    refused(ValueError, "group must be one of tensor, row, global, got 'column'",
            trained, group="column"),
    refused(TypeError, "kappa_args must be a dict, got float", lp, kappa_args=2.0),
    refused(ValueError, "kappa 'lp' needs kappa_args with p, got {}", lp),
    refused(ValueError, "kappa 'l1' has no argument 'p'", trained, kappa_args=dict(p=2)),
    refused(ValueError, "kappa_args['p'] must be finite and > 1, got 1; p = 1 is kappa 'l1'",
            lp, kappa_args=dict(p=1)),
    refused(ValueError, "kappa_args['e'] must be finite and >= 0, got -1",
            soft, kappa_args=dict(e=-1)),
    refused(ValueError, "kappa_args['e'] must be finite and > 0, got 0",
            huber, kappa_args=dict(e=0)),
    refused(ValueError, "kappa_args['e'] must be a normal number of float32, got 1e-50",
            huber, kappa_args=dict(e=1e-50)),
    refused(ValueError, "kappa_args['e'] must be a normal number of float32, got 1e+300",
            soft, kappa_args=dict(e=1e300)),
    refused(ValueError, "kappa 'topk' needs kappa_args with k or fraction, got "
            "{'k': 1, 'fraction': 0.5}", topk, kappa_args=dict(k=1, fraction=0.5)),
    refused(TypeError, "kappa_args['k'] must be an integer, got float",
            topk, kappa_args=dict(k=1.5)),
    refused(ValueError, "kappa_args['k'] must be >= 1, got 0", topk, kappa_args=dict(k=0)),
    refused(ValueError, "kappa_args['fraction'] must be in (0, 1], got 1.5",
            topk, kappa_args=dict(fraction=1.5)),
    refused(ValueError, "weight_decay must be > 0: without it", gap, weight_decay=0),
    refused(ValueError, "lr must be finite and > 0, got 0", gap, lr=0),
    refused(ValueError, "a kappa that is a function has no K to evaluate", gap, kappa=torch.sign),
    refused(ValueError, "betas[1] must be in [0, 1), got 1.0", gap, betas=(0.9, 1.0)),
    refused(ValueError, "momenta must have the shapes of params, got []",
            lion_k_lyapunov, 0.0, [X], [], **RATES),
    refused(ValueError, "momenta must have the shapes of params, got [[1]]",
            lion_k_lyapunov, 0.0, [X], [M[:1]], **RATES),
    refused(ValueError, "grads must have the shapes of params, got []",
            lion_k_lyapunov, 0.0, [X], [M], [], **RATES),
    refused(TypeError, "params must be a sequence of tensors, got Tensor",
            lion_k_lyapunov, 0.0, X, M, **RATES),
    refused(ValueError, "f_value must hold one number, got shape [3]",
            lion_k_lyapunov, X, [X], [M], **RATES),
    refused(ValueError, "weight_decay must be > 0: without it", monitored),
    refused(ValueError, "a kappa that is a function has no K to evaluate",
            monitored, kappa=torch.sign, weight_decay=1.0),
    refused(ValueError, "maximize: minimise the negative loss", monitored, maximize=True,
            weight_decay=1.0),
    refused(TypeError, "optimizer must be a LionK, got SGD",
            LyapunovMonitor, torch.optim.SGD([X.clone()])),
    # Numbers and bools of numpy, tensors, lists
    accepted(trained, lr=(np.float64(0.1), 0.1), betas=([0.5, 0.9], (0.5, 0.9)),
             weight_decay=(np.float32(0.5), 0.5), maximize=(np.True_, True)),
    accepted(trained, lr=(torch.tensor(0.125), 0.125)),
    accepted(trained, lr=(torch.tensor([0.125]), 0.125)),
    accepted(partial(trained, dtype=torch.bfloat16), seed=(np.int64(3), 3), lr=(0.1, 0.1)),
    accepted(topk, kappa_args=(dict(k=np.int64(2)), dict(k=2)), lr=(1, 1.0)),
    accepted(lp, kappa_args=(dict(p=np.float32(3)), dict(p=3)), lr=(1, 1.0)),
    accepted(gap, betas=([0.9, 0.99], (0.9, 0.99))),
)  # fmt: skip
