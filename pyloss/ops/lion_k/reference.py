"""The step on the reference."""

from __future__ import annotations

import torch

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.lion_k.records import KAPPAS, ROUNDINGS, Options
from pyloss.ops.lion_k.rounding import round_compensated, round_stochastic, tensor_key

_NAMES = {code: name for name, code in KAPPAS.items()}


def step(
    params, grads, momenta, given, compensation, lr, found_inf, step, codes, numbers, positions
) -> None:
    from pyloss.reference.lion_k import lion_k

    o = Options(*codes[:2], bool(codes[2]), *numbers, *codes[3:])
    number = o.step if step is None else step.long()
    for at, (x, g, m) in enumerate(zip(params, grads, momenta)):
        wide = accumulator_dtype(x.dtype)
        start = x.to(wide)
        if compensation:
            start = start + compensation[at].to(wide)
        new, momentum = lion_k(
            start,
            g.to(wide),
            m.to(wide),
            lr=o.lr if lr is None else lr.to(wide),
            betas=(o.beta1, o.beta2),
            weight_decay=o.weight_decay,
            kappa=(lambda c, at=at: given[at]) if given else _NAMES[o.kappa],
            kappa_args=dict(e=o.e),
            maximize=o.maximize,
        )
        written = [(m, momentum.to(m.dtype))]
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half and o.rounding == ROUNDINGS["stochastic"]:
            key = tensor_key(o.seed, number, positions[at])
            written.append((x, round_stochastic(new, x.dtype, key)))
        elif compensation:
            kept, lost = round_compensated(new, x.dtype)
            written += [(x, kept), (compensation[at], lost)]
        else:
            written.append((x, new.to(x.dtype)))
        for old, value in written:
            if found_inf is not None:
                value = torch.where(found_inf.to(x.device) > 0, old, value)
            old.copy_(value)
