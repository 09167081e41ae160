"""Statistics of rows: the reference is torch's own log_softmax."""

from __future__ import annotations

import torch

from pyloss.functional import row_softmax_stats
from pyloss.testing import make_logits
from specs._spec import F64, Bad, Sample, Spec


def reference(
    input, target=None, *, scale=None, margin=None, mask=None, without_target=False,
    ignore_index=-100,
):  # fmt: skip
    rows, classes = input.shape[:-1], torch.arange(input.shape[-1])
    y = torch.full(rows, -100) if target is None else target.long()
    label = classes == y.unsqueeze(-1)
    z = input
    if margin is not None:
        z = z + torch.where(
            label, 0.0, torch.as_tensor(margin, dtype=z.dtype).expand(rows)[..., None]
        )
    if scale is not None:
        z = z * torch.as_tensor(scale, dtype=z.dtype).expand(rows).unsqueeze(-1)
    keep = torch.ones_like(z, dtype=torch.bool) if mask is None else mask.expand(z.shape)
    at = torch.where(label, torch.where(keep, z, -torch.inf), 0.0).sum(-1)
    hidden = (label & ~keep).any(-1)
    keep = keep & ~label if without_target else keep
    counts = keep.any(-1)
    # A row of nothing, without NaN: of zeros, and then left out.
    z = torch.where(keep, z, -torch.inf)
    safe = torch.where(counts.unsqueeze(-1), z, 0.0)
    logp = safe.log_softmax(-1)
    finite = torch.where(keep, logp, 0.0)
    entropy = torch.where(counts, -(logp.exp() * finite).sum(-1), 0.0)
    lse = torch.where(counts, safe.logsumexp(-1), -torch.inf)
    used = y != ignore_index if target is not None else torch.ones(rows, dtype=torch.bool)
    count = torch.where(used, keep.sum(-1), 0)
    mean = torch.where(counts, lse - entropy, -torch.inf)
    each = [torch.where(used, t, 0.0) for t in (lse, mean, entropy)]
    if target is None:
        return (*each, count)
    nll = torch.where(hidden, torch.inf, -torch.where(label & keep, logp, 0.0).sum(-1))
    nll = lse - at if without_target else nll
    return (*each, torch.where(used, at, 0.0), torch.where(used, nll, 0.0), count)


def sample(*shape: int, target: bool = True, **options) -> Sample:
    shape = shape or (4, 5)
    inputs = dict(input=make_logits(shape, F64, scale=2.0))
    if target:
        g = torch.Generator().manual_seed(1)
        inputs["target"] = torch.randint(shape[-1], shape[:-1], generator=g)
    for name in ("scale", "margin", "mask"):
        if isinstance(options.get(name), torch.Tensor):
            inputs[name] = options.pop(name)
    return Sample(inputs, options)


def of_rows(*shape: int) -> torch.Tensor:
    return make_logits(shape, F64, scale=0.2, seed=2).exp()


def mask(*shape: int) -> torch.Tensor:
    found = make_logits(shape, F64, seed=3) > -1
    found.view(-1, shape[-1])[:, 0] = True
    return found


S = sample().inputs
SPECS = (
    Spec(
        function=row_softmax_stats,
        samples={
            "plain": sample,
            "no target": lambda: sample(2, 3, 4, target=False, scale=0.5, mask=mask(4)),
            "rows": lambda: sample(
                2, 3, 4, scale=of_rows(2, 3), margin=of_rows(3), ignore_index=0
            ),
            "without target": lambda: sample(
                4, 5, scale=of_rows(4), margin=of_rows(4), mask=torch.arange(5) != 2,
                without_target=True, ignore_index=3,
            ),
            "masked": lambda: sample(3, 6, scale=of_rows(3, ), margin=0.3, mask=mask(3, 6)),
        },
        compile_samples=("plain", "masked"),
        reference=reference,
        gradients=("input", "scale"),
        refused=("margin",),
        result="wide",
        wide=("scale", "margin"),
        vmap=("input",),
        nan={"input": "row"},
        large=lambda: sample(900, 1000, scale=of_rows(900)),
        errors=(
            Bad(TypeError, "input must be a Tensor, got list", dict(input=[1.0])),
            Bad(TypeError, "input must be floating, got torch.int64",
                dict(input=torch.ones(4, 5, dtype=torch.int64))),
            Bad(ValueError, r"input must have at least one class, got \[4, 0\]",
                dict(input=torch.ones(4, 0))),
            Bad(ValueError, r"target must have the shape of the rows, \[4\], got \[3\]",
                dict(target=S["target"][:3])),
            Bad(RuntimeError, "expected target dtype to be Long or Byte, but got Float",
                dict(target=torch.ones(4))),
            Bad(IndexError, "Target 5 is out of bounds", dict(target=torch.full((4,), 5))),
            Bad(IndexError, "Target 5 is out of bounds",
                dict(target=torch.full((4,), 5), mask=mask(5), margin=0.1)),
            Bad(ValueError, "scale must be finite and > 0, got 0", dict(scale=0)),
            Bad(ValueError, r"scale of shape \[3\] does not broadcast to the rows, \[4\]",
                dict(scale=torch.ones(3))),
            Bad(TypeError, "scale must be floating", dict(scale=torch.ones(4).long())),
            Bad(ValueError, "margin must be finite and >= 0, got -1", dict(margin=-1)),
            Bad(ValueError, "give a target", dict(target=None, margin=0.1)),
            Bad(ValueError, "without_target is about other classes than the target's",
                dict(target=None, without_target=True)),
            Bad(TypeError, "without_target must be a bool, got int", dict(without_target=1)),
            Bad(TypeError, "mask must be bool, True at what counts, got torch.float32",
                dict(mask=torch.ones(4, 5))),
            Bad(ValueError, r"mask of shape \[4\] does not broadcast to input, \[4, 5\]",
                dict(mask=torch.ones(4, dtype=torch.bool))),
            Bad(TypeError, "ignore_index must be an integer", dict(ignore_index=1.5)),
        ),
    ),
)  # fmt: skip
