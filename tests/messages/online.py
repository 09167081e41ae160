"""Online learning in pyloss.research: mirror descent, adversarial MDPs, bandits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from messages._table import accepted, refused
from pyloss.research.bandits import NeuralBandit, inverse_gap_weighting
from pyloss.research.mdp import (
    AdversarialLinearMDP,
    LinearQMDP,
    log_barrier_ftrl,
    magnitude_reduced_estimator,
)
from pyloss.research.online import (
    OptimisticOMD,
    dynamic_regret,
    metric_projection,
    path_length,
    project_ball,
    project_box,
    project_simplex,
    regret_exponent,
    static_regret,
)

X = torch.tensor([0.3, -0.2, 0.5])


def stepped(params=None, grad=X, **options) -> torch.Tensor:
    x = X.clone().requires_grad_() if params is None else params[0]
    optimizer = OptimisticOMD(params or [x], **dict(D=2.0, G=1.0) | options)
    x.grad = grad
    optimizer.step()
    return x.detach()


def mdp(S=2, A=2, H=2, d=3, generator=None) -> LinearQMDP:
    return LinearQMDP(S, A, H, d, generator)


def learner(algorithm="hedge", **options) -> AdversarialLinearMDP:
    return AdversarialLinearMDP(mdp(), algorithm, **options)


def bandit(net=None, kind="square", gamma=1.0, **options) -> NeuralBandit:
    return NeuralBandit(nn.Linear(3, 1) if net is None else net, kind, gamma, **options)


def updated(context=None, arm=0, loss=0.5, **options) -> torch.Tensor:
    context = torch.ones(2, 3) if context is None else context
    return bandit(**options).update(context, arm, loss)


POLICY = torch.full((2, 2, 2), 0.5)

ROWS = (
    # Mirror descent
    refused(ValueError, "geometry must be one of euclidean, strongly_convex, exp_concave, got",
            stepped, geometry="flat"),
    refused(ValueError, "D must be finite and > 0, got 0", stepped, D=0),
    refused(TypeError, "G must be a number, got NoneType", stepped, G=None),
    refused(ValueError, "delta must be finite and >= 0, got -1.0", stepped, delta=-1.0),
    refused(ValueError, "geometry='strongly_convex' needs mu", stepped, geometry="strongly_convex"),
    refused(ValueError, "geometry='exp_concave' needs alpha", stepped, geometry="exp_concave"),
    refused(ValueError, "mu is for geometry='strongly_convex', got 'euclidean'", stepped, mu=1.0),
    refused(ValueError, "L is for geometry='euclidean', got 'strongly_convex'", stepped, L=1.0,
            mu=1.0, geometry="strongly_convex"),
    refused(ValueError, "projection must be one of ball, box, simplex, got 'cube'", stepped,
            projection="cube"),
    refused(ValueError, "projection must return a vector of the shape [3], got [1]", stepped,
            projection=lambda x: x[:1]),
    refused(ValueError, "parameters of a group must share dtype and device, got torch.float32 on "
            "cpu and torch.float64 on cpu", stepped, [X.clone(), X.double()]),
    refused(TypeError, "parameters must be floating, got torch.complex64", stepped,
            [torch.ones(2, dtype=torch.complex64)]),
    refused(RuntimeError, "gradients must be dense, got one of layout torch.sparse_coo", stepped,
            grad=X.to_sparse()),
    refused(ValueError, "radius must be finite and > 0, got 0", project_ball, X, 0),
    refused(ValueError, "low must be <= high, got 1 and 0", project_box, X, 1, 0),
    refused(ValueError, "x must not be empty along dim -1, got [3, 0]", project_simplex,
            X.new_empty(3, 0)),
    refused(TypeError, "x must be floating, got torch.int64", project_simplex, X.long()),
    refused(ValueError, "point and metric must be (D,) and (D, D), got [3] and [2, 2]",
            metric_projection, X, torch.eye(2), project_ball),
    refused(TypeError, "projection must be a function, got str", metric_projection, X, torch.eye(3),
            "ball"),
    refused(ValueError, "losses and fixed must be (T,) and (T,) or (T, N), got [3] and [2]",
            static_regret, X, X[:2]),
    refused(ValueError, "losses and comparators must be (T,) and (T,), got [3] and [3, 1]",
            dynamic_regret, X, X[:, None]),
    refused(ValueError, "points must be (T, D), got [3]", path_length, X),
    refused(ValueError, "rounds and regret must be (N,) and (*, N) with N >= 2, got [3] and [2]",
            regret_exponent, X, X[:2]),
    accepted(stepped, D=(np.float32(2.0), 2.0), L=(np.int64(3), 3.0), projection=("ball", None)),
    accepted(stepped, delta=(4.0, None)),  # 4 G^2
    # Adversarial MDPs
    refused(TypeError, "cost must be floating, got torch.int64", log_barrier_ftrl, X.long(), 1.0),
    refused(ValueError, "cost must have at least one dimension", log_barrier_ftrl, X[0], 1.0),
    refused(ValueError, "eta must be finite and > 0, got 0.0", log_barrier_ftrl, X, 0.0),
    refused(ValueError, "w_samples must have the shape of w and M > 0, [3, 'M'], got [3]",
            magnitude_reduced_estimator, X, 0.5, X, 2),
    refused(ValueError, "L must be in [0, H] = [0, 2], got 2.5", magnitude_reduced_estimator, X,
            2.5, X[:, None], 2),
    refused(ValueError, "S must be >= 1, got 0", mdp, 0),
    refused(ValueError, "d must be at most S * A = 4, got 5", mdp, d=5),
    refused(TypeError, "generator must be a torch.Generator, got int", mdp, generator=0),
    refused(ValueError, "policy must be (*, 2, 2, 2), got [2, 2]",
            lambda: mdp().occupancy(POLICY[0])),
    refused(ValueError, "theta must be (*, 2, 3), got [2, 2]",
            lambda: mdp().value(POLICY, torch.ones(2, 2))),
    refused(TypeError, "mdp must be a LinearQMDP, got int", AdversarialLinearMDP, 3),
    refused(ValueError, "algorithm must be one of log_barrier, hedge_mr, hedge, got 'ucb'", learner,
            "ucb"),
    refused(ValueError, "gamma must be finite and > 0, got 0.0", learner, gamma=0.0),
    refused(ValueError, "rollouts must be >= 1, got 0", learner, rollouts=0),
    refused(ValueError, "K must be >= 1, got 0", learner().run, 0),
    refused(ValueError, "theta must be [1, 2, 2, 3], got [2, 3]", learner().run, 2,
            theta=torch.ones(2, 3)),
    refused(ValueError, "theta must be in [0, 1], got nan", learner().run, 1,
            theta=torch.full((1, 1, 2, 3), math.nan)),
    # Bandits
    refused(ValueError, "kind must be one of square, fast, got 'linear'", inverse_gap_weighting, X,
            1.0, "linear"),
    refused(ValueError, "gamma must be >= 0, got nan", inverse_gap_weighting, X, math.nan),
    refused(ValueError, "pred must be >= 0 for kind='fast', got -0.2", inverse_gap_weighting,
            X, 1.0, "fast"),
    refused(TypeError, "net must be a Module, got function", bandit, lambda x: x),
    refused(ValueError, "net must have parameters that require a gradient, got none", bandit,
            nn.Identity()),
    refused(ValueError, "S must be >= 0, got -1", bandit, S=-1),
    refused(ValueError, "radius must be finite and > 0, got 0", bandit, radius=0),
    refused(ValueError, "net must return (1,) or (1, 1), got [1, 2]", updated, net=nn.Linear(3, 2)),
    refused(ValueError, "contexts must be (*, K, D) with K > 0, got [3]", updated, torch.ones(3)),
    refused(ValueError, "loss must be in [0, 1], got 1.5", updated, loss=1.5),
    refused(ValueError, "arm and loss must have the shape [], got [2] and []", updated,
            arm=torch.tensor([0, 1])),
    refused(IndexError, "arm must be in [0, 2), got 2", updated, arm=2),
    refused(TypeError, "arm must hold integers, got torch.float32", updated, arm=0.0),
)  # fmt: skip
