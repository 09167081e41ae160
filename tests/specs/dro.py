"""Distributionally robust losses: the references exponentiate as it stands."""

from __future__ import annotations

import torch

import pyloss
from pyloss.functional import kl_dro_loss
from pyloss.testing import make_logits
from specs._spec import F64, Bad, Empty, Sample, Spec


def reference(losses, r=1.0, *, log_u=None, eta=1.0):
    g = (losses.flatten() / r).exp().mean()
    u = g.detach() if log_u is None or log_u == -torch.inf else log_u.exp().reshape(())
    u = (1 - eta) * u + eta * g.detach()
    value = r * g.log()
    pull = ((losses / r).exp().detach() / u * losses).mean()
    return value.detach() + (pull - pull.detach()), u.log()


def sample(*shape: int, **options) -> Sample:
    losses = make_logits(shape or (6,), F64, scale=1.0)
    if "log_u" in options:
        options["log_u"] = torch.tensor(options["log_u"], dtype=F64)
    return Sample(dict(losses=losses), dict(r=0.7) | options)


SPECS = (
    Spec(
        function=kl_dro_loss,
        covers=(pyloss.nn.KLDROLoss,),
        samples={
            "batch": sample,
            "no average yet": lambda: sample(2, 3, r=3.0, log_u=-torch.inf, eta=0.3),
            "average": lambda: sample(r=2.0, log_u=[0.4], eta=0.3),
            "average, unused": lambda: sample(r=0.4, log_u=0.4),
        },
        # With an average of other batches it is no function of this one.
        derivative_samples=("batch", "no average yet", "average, unused"),
        compile_samples=("batch", "average"),
        reference=reference,
        gradients=("losses",),
        wide=("log_u",),
        empty={"no losses": Empty(lambda: sample(0), torch.nan)},
        vmap=("losses",),
        nan={"losses": "all"},
        large=lambda: sample(20000),
        errors=(
            Bad(TypeError, "losses must be a Tensor, got list", dict(losses=[1.0])),
            Bad(TypeError, "losses must be floating, got torch.int64",
                dict(losses=torch.arange(3))),
            Bad(ValueError, "r must be finite and > 0, got 0", dict(r=0)),
            Bad(ValueError, "r must be finite and > 0, got nan", dict(r=float("nan"))),
            Bad(TypeError, "r must be a number, got Tensor", dict(r=torch.tensor(1.0))),
            Bad(ValueError, r"eta must be in \(0, 1\], got 1.5", dict(eta=1.5)),
            Bad(ValueError, "eta must be finite and > 0, got 0.0", dict(eta=0.0)),
            Bad(TypeError, "log_u must be a Tensor, got float", dict(log_u=0.0)),
            Bad(ValueError, r"log_u must be one number, got shape \[3\]",
                dict(log_u=torch.ones(3))),
        ),
    ),
)  # fmt: skip
