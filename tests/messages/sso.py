"""SSO and target surrogates."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import target_surrogate_loss
from pyloss.optim import SSO

Z, REF, GRAD = torch.arange(18.0).reshape(3, 2, 3)
X = torch.eye(2)


def trained(loss=lambda z: z.square().sum(), **options) -> torch.Tensor:
    weight = torch.ones(2, requires_grad=True)
    SSO([weight], **options).step(lambda: (X @ weight, loss))
    return weight.detach()


ROWS = (
    refused(TypeError, "params argument given to the optimizer should be an iterable", SSO, Z),
    refused(ValueError, "optimizer got an empty parameter list", SSO, []),
    refused(ValueError, "inner must be one of sgd, armijo, got None", trained, inner=None),
    refused(ValueError, "eta_schedule must be one of constant, stochastic, exponential, adagrad, "
            "got 'linear'", trained, eta_schedule="linear"),
    refused(ValueError, "total_steps must be at least 1, got 0", trained, total_steps=0,
            eta_schedule="exponential"),
    refused(TypeError, "total_steps must be an integer, got float", trained, total_steps=1.5,
            eta_schedule="exponential"),
    refused(ValueError, "what eta_schedule returns must be finite and > 0, got 0",
            trained, eta_schedule=lambda t: 0),
    refused(TypeError, "inner must make an Optimizer, got list", trained, inner=list),
    refused(RuntimeError, "loss_fn must return a function of its argument, with a graph",
            trained, loss=lambda z: z.detach().sum()),
    refused(ValueError, "eta must be finite and > 0, got inf",
            target_surrogate_loss, Z, REF, GRAD, float("inf")),
    refused(ValueError, "output must have at least one dimension, got a 0-d tensor",
            target_surrogate_loss, Z[0, 0], REF[0, 0], GRAD[0, 0], 1.0, divergence="kl"),
    # Numbers of numpy
    accepted(lambda **o: target_surrogate_loss(Z, REF, GRAD, **o), eta=(np.float32(0.5), 0.5)),
    accepted(lambda **o: target_surrogate_loss(Z, REF, GRAD, **o), eta=(torch.tensor(0.5), 0.5)),
    accepted(trained, inner_steps=(np.int64(2), 2), eta=(np.float64(0.5), 0.5),
             lr=(np.float64(0.1), 0.1)),
    accepted(trained, lr=(torch.tensor(0.1), 0.1)),
)  # fmt: skip
