"""One step of Lion-K for lists of tensors, in place, as one op.

    lion_k_    params and momenta of a step; `given`: dK(c) where it is not elementwise

Formulas: pyloss/reference/lion_k.py. Kernels: csrc/common/lion_k.h.

Paper: arXiv 2310.05898.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._registry import define_op
from pyloss.ops.lion_k import cpu, cuda, reference
from pyloss.ops.lion_k.records import KAPPAS, ROUNDINGS, Options

ELEMENTWISE = frozenset(KAPPAS) - {"given"}

# Of each list all tensors have one dtype and one device. `given` holds float32, or float64 beside
# float64 parameters. `lr`, `found_inf` and `step` stand in for numbers that are on the device.
# codes: kappa, rounding, maximize, seed, step; numbers: lr, beta1, beta2, weight_decay, e.
define_op(
    "lion_k_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] given, "
    "Tensor(c!)[] compensation, Tensor? lr, Tensor? found_inf, Tensor? step, SymInt[] codes, "
    "float[] numbers, SymInt[] positions) -> ()",
    fake=lambda *arguments: None,
    impls={"cpu": cpu.step, "cuda": cuda.step, "reference": reference.step},
    shards="the optimiser hands over what each process has",
)


def lion_k_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    options: Options,
    *,
    given: list[Tensor] = (),
    compensation: list[Tensor] = (),
    positions: list[int] = (),
    lr: Tensor | None = None,
    found_inf: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    """The step. ``positions``: which random numbers a tensor rounds with."""
    torch.ops.pyloss.lion_k_(
        params, grads, momenta, list(given), list(compensation), lr, found_inf, step,
        [options.kappa, options.rounding, int(options.maximize), options.seed, options.step],
        [options.lr, options.beta1, options.beta2, options.weight_decay, options.e],
        list(positions),
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        _written([*params, *momenta, *compensation])


def _written(tensors: list[Tensor]) -> None:
    """Tells autograd, which torch's own operations in place do by themselves."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except (TypeError, RuntimeError):
        # torch 2.6 takes one at a time; tensors of an inference have no version.
        for t in tensors:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)


__all__ = ["ELEMENTWISE", "KAPPAS", "ROUNDINGS", "Options", "lion_k_"]
