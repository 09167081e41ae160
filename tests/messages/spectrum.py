"""Spectra, learning rates, lazy training."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss import analysis
from pyloss.optim import LanczosSGD

W = torch.ones(2, requires_grad=True)
NET, X = torch.nn.Linear(3, 2), torch.arange(6.0).view(2, 3)
K = X @ X.T


def double(v: torch.Tensor) -> torch.Tensor:
    return 2 * v


def square(b: float = 1.0) -> torch.Tensor:
    return b * W.square().sum()


def trained(loss=square, **options) -> torch.Tensor:
    with torch.no_grad():
        W.fill_(1.0)
    LanczosSGD([W], **options).step(loss)
    return W.detach().clone()


ROWS = (
    # Products
    refused(TypeError, "loss_fn must be callable, got Tensor", analysis.hvp, X, [W]),
    refused(TypeError, "params must be an iterable of Tensors or a Module, got a Tensor",
            analysis.hvp, square, W),
    refused(ValueError, "params must hold a Tensor that requires a gradient, got none",
            analysis.hvp, square, [X]),
    refused(TypeError, "a parameter must be a Tensor, got str", analysis.hvp, square, ["weight"]),
    refused(RuntimeError, "the loss must be a scalar Tensor, got [2]",
            analysis.hvp, lambda: W.square(), [W]),
    refused(RuntimeError, "the loss must be a scalar Tensor, got float",
            analysis.hvp, lambda: 1.0, [W]),
    refused(RuntimeError, "the loss must have a graph that leads to the parameters, got none",
            analysis.hvp, lambda: W.detach().sum(), [W]),
    refused(TypeError, "gone through in every product: a list or a DataLoader, got list_iterator",
            analysis.hvp, square, [W], iter([1.0])),
    refused(ValueError, "weights are for batches, got no batches",
            analysis.hvp, square, [W], weights=[1.0]),
    refused(TypeError, "weights[1] must be a number, got str",
            analysis.hvp, square, [W], [1.0, 2.0], weights=[1, "a"]),
    refused(ValueError, "weights[0] must be finite and >= 0, got -1",
            analysis.hvp, square, [W], [1.0, 2.0], weights=[-1, 1]),
    refused(TypeError, "batches must be an iterable, got int", analysis.hvp, square, [W], 3),
    refused(TypeError, "params must be an iterable of Tensors or a Module, got int",
            analysis.hvp, square, 3),
    refused(ValueError, "weights must be as many as batches, got 3",
            lambda: analysis.hvp(square, [W], [1.0, 2.0], weights=[1, 1, 1])(X[0, :2])),
    refused(ValueError, "weights must be as many as batches, got 1",
            lambda: analysis.hvp(square, [W], [1.0, 2.0], weights=[1])(X[0, :2])),
    refused(ValueError, "batches must hold a batch of a weight above 0, got none",
            lambda: analysis.hvp(square, [W], [])(X[0, :2])),
    refused(ValueError, "v must have the shape [2], got [3]",
            lambda: analysis.hvp(square, [W])(X[0])),
    refused(TypeError, "v must be floating, got torch.int64",
            lambda: analysis.hvp(square, [W])(torch.ones(2).long())),
    # Lanczos
    refused(TypeError, "what matvec returns must be floating, got torch.complex64",
            analysis.lanczos, lambda v: torch.ones(3, dtype=torch.complex64), 3, 3),
    refused(TypeError, "batch_size must be real, got torch.complex64",
            analysis.effective_batch_size, torch.ones(3, dtype=torch.complex64)),
    refused(TypeError, "lr must be floating, got torch.int64",
            analysis.scale_lr, torch.tensor(1), 2, 3),
    refused(TypeError, "matvec must be callable, got Tensor", analysis.lanczos, X, 3, 2),
    refused(ValueError, "dim must be >= 1, got 0", analysis.lanczos, double, 0, 2),
    refused(ValueError, "steps must be >= 1, got 0", analysis.lanczos, double, 3, 0),
    refused(ValueError, "v0 must have the shape [3], got [2]",
            analysis.lanczos, double, 3, 2, v0=X[0, :2]),
    refused(ValueError, "v0 must not be 0", analysis.lanczos, double, 3, 2, v0=0 * X[0]),
    refused(ValueError, "matvec must return the shape [3], got [2]",
            analysis.lanczos, lambda v: v[:2], 3, 2),
    refused(TypeError, "generator must be a torch.Generator, got int",
            analysis.lanczos, double, 3, 2, generator=0),
    refused(TypeError, "dim is needed: matvec has no dim of its own", analysis.slq_density, double),
    refused(ValueError, "dim must be that of matvec, 2, got 3",
            lambda: analysis.slq_density(analysis.hvp(square, [W]), 3)),
    refused(ValueError, "probes must be >= 1, got 0", analysis.slq_density, double, 3, probes=0),
    refused(ValueError, "sigma must be finite and > 0, got 0",
            analysis.slq_density, double, 3, sigma=0),
    refused(ValueError, "grid must have one dimension and points, got [2, 3]",
            analysis.slq_density, double, 3, grid=X),
    refused(ValueError, "grid must be >= 2, got 1", analysis.slq_density, double, 3, grid=1),
    refused(ValueError, "distribution must be one of rademacher, gaussian, got 'uniform'",
            analysis.slq_density, double, 3, distribution="uniform"),
    refused(TypeError, "progress must be a bool, got str",
            analysis.slq_density, double, 3, progress="yes"),
    refused(ValueError, "k must be at most steps and dim, 3, got 4",
            analysis.top_eigenvalues, double, 4, dim=3),
    # Batch sizes
    refused(ValueError, "batch_size must be > 0, got 0", analysis.effective_batch_size, 0),
    refused(ValueError, "batch_size must be at most the population, 8, got 9",
            analysis.effective_batch_size, 9, 8),
    refused(ValueError, "sigma must be >= 0, got -1",
            analysis.batch_extremal_eigenvalue, 1.0, 9, 2, -1.0),
    refused(TypeError, "lam must be a number, got str",
            analysis.batch_extremal_eigenvalue, "1", 9, 2, 1.0),
    refused(ValueError, "noise must be >= 0, got -1", analysis.full_batch_eigenvalue, 1.0, 2, -1.0),
    refused(ValueError, "small must be less than large, got 8 and 8",
            analysis.hessian_noise, 1.0, 8, 2.0, 8),
    refused(ValueError, "optimizer must be one of sgd, momentum, adaptive, got 'adam'",
            analysis.max_learning_rate, 1.0, 8, 2.0, optimizer="adam"),
    refused(ValueError, "criterion must be one of mean_square, eigenvalue, got 'loss'",
            analysis.max_learning_rate, 1.0, 8, 2.0, criterion="loss"),
    refused(ValueError, "momentum must be in [0, 1), got 1", analysis.max_learning_rate,
            1.0, 8, 2.0, optimizer="momentum", momentum=1.0),
    refused(ValueError, "rule must be one of linear, sqrt, rmt, got 'none'",
            analysis.scale_lr, 0.1, 8, 16, "none"),
    refused(ValueError, "rule='rmt' needs lam and noise, got 2.0 and None",
            analysis.scale_lr, 0.1, 8, 16, "rmt", lam=2.0),
    refused(ValueError, "lam, noise and population are for rule='rmt', got rule='linear'",
            analysis.scale_lr, 0.1, 8, 16, noise=2.0),
    refused(ValueError, "new_bs must be finite and > 0, got 0", analysis.scale_lr, 0.1, 8, 0),
    # The optimizer
    refused(ValueError, "optimizer got an empty parameter list", LanczosSGD, []),
    refused(ValueError, "momentum must be in [0, 1), got 2",
            LanczosSGD, [{"params": [W], "momentum": 2}]),
    refused(TypeError, "step needs a closure, got float", trained, 1.0),
    refused(RuntimeError, "the loss must be a scalar Tensor, got [2]",
            trained, lambda: W.square()),
    # Lazy training
    refused(TypeError, "module must be a Module, got function", analysis.LazyScale, double, 1.0),
    refused(ValueError, "alpha must be finite and > 0, got 0", analysis.LazyScale, NET, 0),
    refused(ValueError, "alpha must be finite and > 0, got -1", analysis.scaled_mse, X, X, -1),
    refused(TypeError, "center must be a bool, got int", analysis.LazyScale, NET, 1.0, 1),
    refused(TypeError, "the output of module must be a Tensor, got tuple",
            lambda: analysis.LazyScale(torch.nn.LSTM(3, 2), 1.0)(X)),
    refused(ValueError, "y must have the shape of pred, [2, 3], got [3]",
            analysis.scaled_mse, X, X[0], 1.0),
    refused(TypeError, "model must be a Module, got function", analysis.empirical_ntk, double, X),
    refused(ValueError, "chunk must be >= 1, got 0", analysis.empirical_ntk, NET, X, chunk=0),
    refused(ValueError, "outputs must be one of trace, full, got 'sum'",
            analysis.empirical_ntk, NET, X, outputs="sum"),
    refused(ValueError, "model must have a parameter that requires a gradient, got none",
            analysis.empirical_ntk, torch.nn.Tanh(), X),
    refused(ValueError, "model must return a Tensor with a row for each sample, got [2, 1]",
            analysis.empirical_ntk, torch.nn.Sequential(NET, torch.nn.Flatten(0),
                                                        torch.nn.Unflatten(0, (2, 1))), X),
    refused(ValueError, "K1 must be square, (*, n, n), got [2, 3]",
            analysis.kernel_alignment, X, K),
    refused(ValueError, "K1 and K2 must be of the same samples, got [2, 2] and [3, 3]",
            analysis.kernel_alignment, K, X.T @ X),
    refused(TypeError, "K2 must be floating, got torch.int64",
            analysis.kernel_alignment, K, K.long()),
    # Numbers of numpy
    accepted(lambda **o: torch.stack(analysis.lanczos(double, 3, v0=X[1], **o)[:1]),
             steps=(np.int64(2), 2)),
    accepted(lambda **o: analysis.max_learning_rate(1.0, 8, 2.0, **o),
             damping=(np.float32(0.5), 0.5)),
    accepted(trained, every=(np.int64(2), 2), lr=(np.float64(0.5), 0.5)),
    accepted(trained, lr=(torch.tensor(0.5), 0.5)),
)  # fmt: skip
