"""How a step of Lion-K is computed: by the op, or by lists of torch operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyloss.functional._checks import is_dtensor
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.lion_k import ELEMENTWISE, KAPPAS, ROUNDINGS, Options, lion_k_
from pyloss.ops.lion_k.rounding import round_compensated, round_stochastic, tensor_key
from pyloss.optim import _kappas

PLAIN = (torch.nn.Parameter, Tensor)
_BATCH = 1 << 20  # elements
_WITH_KERNEL = ("cpu", "cuda")
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float64, torch.float32, *_HALF)


class Entries(NamedTuple):
    """The parameters of a group that have a gradient, a list for each thing that is known of them.

    Lists and not an object a parameter: of a thousand small ones, a step is over in a millisecond.
    """

    x: list[Tensor]  # what this process has of it, as a real tensor; likewise the next three
    g: list[Tensor]
    m: list[Tensor]
    rest: list[Tensor | None]  # compensation
    place: list[int]  # number in the optimiser; of a DTensor's shards, another for each
    step: list[int | Tensor]
    parameter: list[Tensor]

    def xgm(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.x, self.g, self.m  # not a slice, on which Dynamo of torch 2.6 fails

    def chosen(self, which: list[int]) -> Entries:
        return Entries(*([part[at] for at in which] for part in self))


def check_parameter(p: Tensor, fused: bool | None) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise ValueError(f"parameters must be floating or complex, got {p.dtype}")
    if fused and p.device.type not in _WITH_KERNEL:
        raise RuntimeError(
            f"`fused=True` needs parameters on {' or '.join(_WITH_KERNEL)}, got {p.device.type}"
        )


def localised(entries: Entries) -> Entries:
    """With the local part of DTensors, and real views of complex tensors."""
    found = [_local(*e) for e in zip(*entries)]
    return Entries(*map(list, zip(*found)))


def _local(p: Tensor, g: Tensor, m: Tensor, rest: Tensor | None, place: int, step, _) -> tuple:
    parts = [p, g, m, rest]
    if is_dtensor(p):
        if any(placement.is_partial() for placement in p.placements):
            raise RuntimeError(f"a parameter must not be a Partial DTensor, got {p.placements}")
        if not is_dtensor(g) or g.placements != p.placements:
            raise RuntimeError(
                f"the gradient must lie as its parameter, by {p.placements}, got "
                f"{g.placements if is_dtensor(g) else 'a plain Tensor'}"
            )
        parts = [None if t is None else t.to_local() for t in parts]
        place += _shard_number(p) << 20  # more than an optimiser has parameters
    if p.is_complex():
        parts = [None if t is None else torch.view_as_real(t) for t in parts]
    return (*parts, place, step, p)


def _shard_number(p) -> int:
    """Of this process's shard of a DTensor; copies of a shard have one number, and round alike."""
    number = 0
    for at, placement in enumerate(p.placements):
        if placement.is_shard():
            number = number * p.device_mesh.size(at) + p.device_mesh.get_local_rank(at)
    return number


def update(entries: Entries, group: Mapping[str, Any], found_inf: Tensor | None) -> None:
    if any(type(p) not in PLAIN for p in entries.x) or any(
        t.is_complex for t in _dtypes(entries.x)
    ):
        entries = localised(entries)
    batches = _batches(entries, group)
    room = _room(batches, group)
    for part in batches:
        _update_batch(part, group, found_inf, room)


def _batches(entries: Entries, group: Mapping[str, Any]) -> list[Entries]:
    """All at once, where nothing is formed between gradient and step; else a few at a time."""
    if not _needs_tensors(group) or group["group"] == "global":
        return [entries]
    batches, size = [[]], 0
    for at, x in enumerate(entries.x):
        if batches[-1] and size + x.numel() > _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(at)
        size += x.numel()
    return [entries.chosen(batch) for batch in batches]


def _room(batches: list[Entries], group: Mapping[str, Any]) -> Tensor | None:
    """Memory for c of one batch after the other: new memory costs more than the arithmetic. A
    function may keep what it gets, and so gets its own."""
    if len(batches) == 1 or not isinstance(group["kappa"], str) or torch.compiler.is_compiling():
        return None
    kinds = {(x.device, accumulator_dtype(x.dtype)) for part in batches for x in part.x}
    if len(kinds) > 1:
        return None
    device, dtype = kinds.pop()
    size = max(sum(map(Tensor.numel, part.x)) for part in batches)
    return torch.empty(size, device=device, dtype=dtype)


def _needs_tensors(group: Mapping[str, Any]) -> bool:
    """Whether dK is not elementwise."""
    kappa = group["kappa"]
    return not isinstance(kappa, str) or _kappas.KAPPAS[kappa].of_group


def _update_batch(
    entries: Entries, group: Mapping[str, Any], found_inf: Tensor | None, room: Tensor | None
) -> None:
    given = _given(entries, group, room)
    for chosen in _of_one_kind(entries):
        part, directions = entries, given
        if chosen is not None:
            part, directions = entries.chosen(chosen), [given[i] for i in chosen if given]
        if _by_kernel(group, part):
            _update_by_kernel(part, directions, group, found_inf)
        # The skipped step of a GradScaler, which looks itself where a step cannot.
        elif found_inf is None or not found_inf.item():
            _update_by_lists(part, directions, group)


def _dtypes(tensors: list[Tensor]) -> set[torch.dtype]:
    return {t.dtype for t in tensors}


def _of_one_kind(entries: Entries) -> list[list[int] | None]:
    """Which entries share devices and dtypes; [None]: all."""
    kinds = [{x.device for x in entries.x}, *(_dtypes(part) for part in entries.xgm())]
    if all(len(kind) == 1 for kind in kinds):
        return [None]
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for at, (x, g, m) in enumerate(zip(*entries.xgm())):
        buckets[x.device, x.dtype, g.dtype, m.dtype].append(at)
    return list(buckets.values())


def _by_kernel(group: Mapping[str, Any], entries: Entries) -> bool:
    x, g, m = (part[0] for part in entries.xgm())
    if not all(t.dtype in _DTYPES for t in (x, g, m)):
        return False
    if group["fused"] is not None or group["foreach"] is not None:
        return bool(group["fused"])
    return x.device.type in _WITH_KERNEL and not torch.compiler.is_compiling()


# --------------------------------------------------------------------------------------------------
# Directions that need more than an element


def _mixed(x: Tensor, g: Tensor, m: Tensor, group: Mapping[str, Any], out: Tensor | None) -> Tensor:
    """c, of the accumulator's dtype."""
    wide, beta = accumulator_dtype(x.dtype), group["betas"][0]
    sign = -1 if group["maximize"] else 1
    return torch.mul(m.to(wide), beta, out=out).add_(g.to(wide), alpha=sign * (1 - beta))


def _places(tensors: list[Tensor], room: Tensor | None) -> list[Tensor | None]:
    """One after the other; None for what lies in an order of its own, which c shall have, too."""
    if room is None:
        return [None] * len(tensors)
    parts = room[: sum(map(Tensor.numel, tensors))].split([t.numel() for t in tensors])
    return [p.view(t.shape) if t.is_contiguous() else None for p, t in zip(parts, tensors)]


def _given(entries: Entries, group: Mapping[str, Any], room: Tensor | None) -> list[Tensor]:
    """dK(c) of each entry, where it is not elementwise; of the whole of a DTensor."""
    kappa, args, scope = group["kappa"], group["kappa_args"], group["group"]
    if not _needs_tensors(group):
        return []
    places = _places(entries.m, room)
    mixed = [
        _whole(_mixed(x, g, m, group, out), p)
        for (x, g, m, *_, p), out in zip(zip(*entries), places)
    ]
    if scope == "global" and len({c.device for c in mixed}) > 1:
        raise RuntimeError("group='global' needs all parameters of a group on one device")
    found = _kappas.gradients(mixed, kappa, args, scope)
    return [_part(d.to(c.dtype), p) for d, c, p in zip(found, mixed, entries.parameter)]


def _whole(c: Tensor, p: Tensor) -> Tensor:
    if not is_dtensor(p):
        return c
    from torch.distributed.tensor import DTensor

    whole = torch.Size([*p.shape, 2]) if p.is_complex() else p.shape
    stride = torch.empty(whole, device="meta").stride()
    placed = DTensor.from_local(
        c, p.device_mesh, p.placements, run_check=False, shape=whole, stride=stride
    )
    return placed.full_tensor()


def _part(d: Tensor, p: Tensor) -> Tensor:
    if not is_dtensor(p):
        return d
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    placed = DTensor.from_local(d, p.device_mesh, everywhere, run_check=False)
    return placed.redistribute(placements=p.placements).to_local()


# --------------------------------------------------------------------------------------------------
# The two ways


def _rounding(group: Mapping[str, Any], dtype: torch.dtype) -> str:
    return (group["rounding"] or "stochastic") if dtype in _HALF else "nearest"


def _update_by_kernel(
    entries: Entries,
    given: list[Tensor],
    group: Mapping[str, Any],
    found_inf: Tensor | None,
) -> None:
    rounding = _rounding(group, entries.x[0].dtype)
    lr, step = group["lr"], entries.step[0]
    on_device = isinstance(lr, Tensor) and not lr.is_cpu
    kappa = "given" if given else group["kappa"]
    options = Options(
        KAPPAS[kappa],
        ROUNDINGS[rounding],
        group["maximize"],
        0.0 if on_device else float(lr),
        *group["betas"],
        group["weight_decay"],
        group["kappa_args"].get("e", 0.0) if kappa in ELEMENTWISE else 0.0,
        group["seed"],
        0 if isinstance(step, Tensor) else step,
    )
    lion_k_(
        entries.x,
        entries.g,
        entries.m,
        options,
        given=given,
        compensation=entries.rest if rounding == "compensated" else [],
        positions=entries.place if rounding == "stochastic" else [],
        lr=lr if on_device else None,
        found_inf=found_inf,
        step=step if isinstance(step, Tensor) and rounding == "stochastic" else None,
    )


def _update_by_lists(entries: Entries, given: list[Tensor], group: Mapping[str, Any]) -> None:
    if group["foreach"] is False or group["fused"] is False and group["foreach"] is None:
        for at in range(len(entries.x)):
            _update_list(entries.chosen([at]), given[at : at + 1], group)
    else:
        _update_list(entries, given, group)


def _update_list(entries: Entries, given: list[Tensor], group: Mapping[str, Any]) -> None:
    params, grads, momenta, rests, places, numbers, _ = entries
    wide = accumulator_dtype(params[0].dtype)
    rounding = _rounding(group, params[0].dtype)
    beta1, beta2 = group["betas"]
    x, g, m = ([t.to(wide) for t in part] for part in (params, grads, momenta))
    if group["maximize"]:
        g = torch._foreach_neg(g)
    if given:
        d = given
    else:
        c = torch._foreach_mul(m, beta1)
        torch._foreach_add_(c, g, alpha=1 - beta1)
        d = _kappas.gradients(c, group["kappa"], group["kappa_args"], group["group"])
    if rounding == "compensated":
        x = [t + rest.to(wide) for t, rest in zip(x, rests)]
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(x[0].device, wide)
        torch._foreach_mul_(x, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(x, torch._foreach_mul(d, lr))
    else:
        if group["weight_decay"] != 0:
            torch._foreach_mul_(x, 1 - lr * group["weight_decay"])
        torch._foreach_add_(x, d, alpha=-lr)
    torch._foreach_mul_(m, beta2)
    torch._foreach_add_(m, g, alpha=1 - beta2)
    for at, p in enumerate(params):
        if momenta[at] is not m[at]:
            momenta[at].copy_(m[at])
        if p is x[at]:
            continue
        if rounding == "stochastic":
            step = numbers[at].long() if isinstance(numbers[at], Tensor) else numbers[at]
            key = tensor_key(group["seed"], step, places[at])
            p.copy_(round_stochastic(x[at].contiguous(), p.dtype, key))
        elif rounding == "compensated":
            kept, lost = round_compensated(x[at], p.dtype)
            p.copy_(kept)
            rests[at].copy_(lost)
        else:
            p.copy_(x[at])
