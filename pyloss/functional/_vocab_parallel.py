"""Checks of losses whose classes are split over processes: DTensors, who holds what, options.

Imported with the first call that needs it.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _layers as layers
from pyloss.functional import _rows as rows
from pyloss.functional._checks import is_dtensor
from pyloss.functional._rows import RowStats
from pyloss.ops._transforms import functorch_active
from pyloss.ops.linear_cross_entropy import vocab_parallel as op

# --------------------------------------------------------------------------------------------------
# DTensors


def split_dim(name: str, t, dim: int) -> int | None:
    """The mesh dimension that splits dimension `dim` of a DTensor; None: nothing splits it."""
    found = None
    for at, placement in enumerate(t.placements):
        if placement.is_replicate():
            continue
        splits = placement.is_shard() and placement.dim in (dim, dim - t.dim())
        # A strided shard, what FSDP makes of a split weight, is not a contiguous range of classes.
        if not splits or type(placement).__name__ != "Shard":
            raise RuntimeError(
                f"{name} must be placed as Replicate, or as Shard({dim}) on one mesh dimension; "
                f"got {t.placements}"
            )
        if found is not None:
            raise RuntimeError(
                f"{name} is split over two dimensions of its mesh, {t.placements}; gather one of "
                "them first, as fully_shard does inside a forward"
            )
        found = at
    return found


def local(name: str, t):
    """The tensor of a DTensor that is the same everywhere; other things as they are."""
    if isinstance(t, tuple):
        return tuple(local(name, x) for x in t)
    if not is_dtensor(t):
        return t
    if not all(p.is_replicate() for p in t.placements):
        raise RuntimeError(f"{name} must be placed as Replicate, got {t.placements}")
    return t.to_local()


def laid_out(input, weight):
    """Hidden states with what no loss can split brought together: features, terms of a sum, and the
    rows along the dimension of the mesh that splits the classes, as in sequence parallelism.

    Other rows stay split. The weight's gradient, of rows or classes, is then of whole rows.
    """
    along = split_dim("linear_weight", weight, 0) if is_dtensor(weight) else None
    if along is not None and input.device_mesh != weight.device_mesh:
        return input  # another rank's rows or the same: by what the ranks tell each other
    from torch.distributed.tensor import Replicate

    features = input.dim() - 1
    placements = list(input.placements)
    for at, p in enumerate(placements):
        if at == along or p.is_partial() or p.is_shard(features):
            placements[at] = Replicate()
    return input.redistribute(placements=placements)


def _same_group(a, b) -> bool:
    ranks = torch.distributed.get_process_group_ranks
    return a is b or ranks(a) == ranks(b)


def _mesh_group(t, mesh_dim: int, group):
    """The group of a split DTensor."""
    own = t.device_mesh.get_group(mesh_dim)
    if group is not None and not _same_group(own, group):
        raise ValueError("group is not the group of the mesh over which the DTensor is split")
    return own


def localize(tensors, group):
    """(tensors, group, classes, rows_known) of a call whose tensors may be DTensors.

    `group` stays None where the layer is whole on each rank; `classes` is the number of classes of
    a DTensor that is split, None without one. `rows_known`: input is a DTensor, too, and so says
    that the ranks hold the same rows.

    Args:
        tensors: (input, linear_weight, target, linear_bias, token_weight, class weight).
    """
    input, weight, target, bias, token_weight, class_weight = tensors
    split = split_dim("linear_weight", weight, 0) if is_dtensor(weight) else None
    bias_split = split_dim("linear_bias", bias, 0) if is_dtensor(bias) else None
    differ = split != bias_split or split is not None and weight.device_mesh != bias.device_mesh
    if bias is not None and differ:
        raise RuntimeError(
            "linear_weight and linear_bias must be split in the same way, got "
            f"{shown(weight)} and {shown(bias)}"
        )
    if split is None and group is not None and (is_dtensor(weight) or is_dtensor(bias)):
        raise RuntimeError(
            "with a group, linear_weight and linear_bias are this rank's shards or split DTensors, "
            f"got {shown(weight)} and {shown(bias)}"
        )
    classes, rows_known = None, False
    if split is not None:
        group, classes = _mesh_group(weight, split, group), weight.shape[0]
        rows_known = is_dtensor(input) and input.device_mesh == weight.device_mesh
        weight, bias = (t if t is None else t.to_local() for t in (weight, bias))
    tensors = (
        local("input", input),
        local("linear_weight", weight),
        local("target", target),
        local("linear_bias", bias),
        local("token_weight", token_weight),
        local("weight", class_weight),
    )
    return tensors, group, classes, rows_known


def shown(t) -> str:
    return str(t.placements) if is_dtensor(t) else "a plain tensor"


# --------------------------------------------------------------------------------------------------
# Who holds what


def checked_group(group):
    dist = torch.distributed
    if not dist.is_available():
        raise RuntimeError("vocab-parallel losses need a PyTorch with torch.distributed")
    if not dist.is_initialized():
        raise RuntimeError(
            "vocab-parallel losses need torch.distributed: call init_process_group first"
        )
    if functorch_active():
        raise RuntimeError("vocab-parallel losses do not run under the transforms of torch.func")
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise RuntimeError("this process is not in the group")
    return group


def evenly(size: int, classes: int, group) -> list[int]:
    """The first class of each rank of a DTensor, without asking: DTensor splits as torch.chunk."""
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    step = -(-classes // world)
    first = [min(r * step, classes) for r in range(world)]
    expected = min(first[rank] + step, classes) - first[rank]
    if size != expected:
        raise RuntimeError(
            f"rank {rank} holds {size} classes of a DTensor of {classes}, expected {expected}"
        )
    return first


def _check_same_rows(held, of_dtensor: bool) -> None:
    """On every rank alike, so that none waits for another.

    Who passes shards says what they are: of those only the number of rows is looked at, without
    which the gather to come would abort the process. A label out of range keeps its own error.
    """
    if of_dtensor and not held.same_rows():
        raise RuntimeError(
            "a DTensor that is split by Shard holds a part of the classes for rows that all ranks "
            f"of its mesh share, but these ranks hold different rows ({list(held.rows)} rows): "
            "data parallelism, as of fully_shard. Gather the weight first: call this inside a "
            "forward of the sharded module, after module.unshard(), or with weight.full_tensor()"
        )
    if len(set(held.rows)) > 1:
        raise RuntimeError(
            "the ranks of a vocab-parallel loss must hold the same rows, but their numbers of rows "
            f"are {list(held.rows)}"
        )


def shard_of(
    size: int, device, group, num_classes, first_class, dtensor_classes, target, input=None,
    rows_known=False,
) -> op.Shard:  # fmt: skip
    """The classes of this rank, of which the last ones of all may be padding.

    Unless the caller says which classes each rank has, the ranks tell each other in one gather what
    they hold. Of a DTensor they do unless `rows_known`: Shard(0) is also what fully_shard makes of
    a weight, where each has rows of its own.

    Sizes are exchanged anew in each call that does not say them. A rank that remembered them could
    not tell that another rank's have changed, and the two would wait for each other.
    """
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if num_classes is not None:
        num_classes = checks.checked_integer("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    asks = first_class is None if dtensor_classes is None else not rows_known
    if asks:
        known = isinstance(target, Tensor) and target.device == device
        labels = target if known else torch.zeros(0, dtype=torch.int64, device=device)
        held = op.exchange(size, labels, input, device, group)
        _check_same_rows(held, dtensor_classes is not None)
    if dtensor_classes is not None:
        num_classes = dtensor_classes if num_classes is None else num_classes
        split = [min(c, num_classes) for c in evenly(size, dtensor_classes, group)]
        if first_class is not None and [int(c) for c in first_class] != split:
            raise ValueError(
                f"first_class of this DTensor must be {split}, got {list(first_class)}"
            )
        first_class = split
    if first_class is None:
        sizes = held.sizes
        bounds = (0, *itertools.accumulate(sizes))
        if num_classes is not None:
            if num_classes > bounds[-1]:
                raise ValueError(
                    f"num_classes is {num_classes}, but the ranks hold {list(sizes)} classes"
                )
            bounds = tuple(min(b, num_classes) for b in bounds)
        return op.Shard(group, rank, bounds)

    if num_classes is None:
        raise ValueError("first_class needs num_classes")
    first = [int(c) for c in first_class]
    if len(first) != world or first[0] != 0 or first != sorted(first) or first[-1] > num_classes:
        raise ValueError(
            f"first_class must have the first class of each of {world} ranks, ascending from 0 to "
            f"at most {num_classes}, got {first}"
        )
    shard = op.Shard(group, rank, (*first, num_classes))
    if shard.width > size:
        raise ValueError(f"first_class gives rank {rank} {shard.width} classes, but it has {size}")
    return shard


# --------------------------------------------------------------------------------------------------
# Calls


def _check_labels_kind(target) -> None:
    if isinstance(target, tuple):
        raise ValueError("vocab-parallel losses take class indices, not a MixUp tuple")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError("vocab-parallel losses take class indices, not probabilities")


def _prepared(like, target, shard, smoothing_formula, arguments):
    """The checked arguments, with the smoothing that the formula means."""
    p = rows.prepare(like, target, **arguments)[1]
    if "rank" in p.return_stats:
        raise ValueError(
            "return_stats: 'rank' counts logits above the target's, which no shard knows in time"
        )
    if smoothing_formula not in ("torch", "megatron"):
        raise ValueError(
            f"smoothing_formula must be 'torch' or 'megatron', got {smoothing_formula!r}"
        )
    smoothing = 0.0 if p.options is None else p.options.smoothing
    if smoothing == 0.0:
        return p
    if p.options.tau != 1.0:
        raise ValueError("vocab-parallel label_smoothing needs tau=1: it takes one sum per row")
    if smoothing_formula == "torch":
        return p
    classes = shard.bounds[-1]
    if smoothing * classes > classes - 1:
        raise ValueError(
            f"smoothing_formula='megatron' needs label_smoothing <= (V - 1)/V, got {smoothing} "
            f"for {classes} classes"
        )
    smoothing *= classes / (classes - 1)
    return rows.with_smoothing(p, smoothing)


def _run(input, weight, bias, shard, p, shape, chunk, exact):
    if input.dtype != torch.float64 and shard.widest > 2**24:
        raise ValueError("more than 2**24 classes on one rank")  # argmax travels as a float32
    target, _, _, class_weight, token_weight = p.labels
    value, found = op.vocab_parallel(
        input, weight, bias, (target, token_weight, class_weight), shard, p.options, p.codes,
        p.loss_dtype, tuple(p.return_stats), p.divisor, chunk, exact,
    )  # fmt: skip
    value = value.view(shape) if p.codes.reduction == 0 else value
    if not p.return_stats:
        return value, None
    return value, RowStats(**{name: s.view(shape) for name, s in found.items()})


def cross_entropy(
    logits, target, token_weight, group, arguments, *, num_classes, first_class, smoothing_formula
):
    """The loss of logits whose last dimension is split."""
    checks.check_tensor("logits_shard", logits)
    if logits.dim() < 1:
        raise RuntimeError("logits_shard must have a dimension of classes, got a 0-d tensor")
    dtensor_classes = None
    if is_dtensor(logits):
        split = split_dim("logits_shard", logits, logits.dim() - 1)
        if split is None:
            raise RuntimeError(
                f"logits_shard must be split in its last dimension, got {shown(logits)}"
            )
        group = _mesh_group(logits, split, group)
        dtensor_classes, logits = logits.shape[-1], logits.to_local()
    group = checked_group(group)
    target, token_weight = local("target", target), local("token_weight", token_weight)
    _check_labels_kind(target)
    checks.check_supported("vocab_parallel_cross_entropy", logits)
    lead = tuple(logits.shape[:-1])
    if not lead:
        target = rows.without_batch(target)
    shard = shard_of(
        logits.shape[-1], logits.device, group, num_classes, first_class, dtensor_classes, target,
        rows_known=dtensor_classes is not None,  # FSDP2 makes no DTensors of logits
    )  # fmt: skip
    rows.checked_smoothing(arguments.get("label_smoothing", 0.0))
    like = layers.logits_like(logits, *lead, shard.bounds[-1])
    target, token_weight = _flat_rows(target, token_weight, like)
    flat = logits.reshape(math.prod(lead), logits.shape[-1])[:, : shard.width]
    like = layers.logits_like(logits, flat.shape[0], shard.bounds[-1])
    arguments = dict(arguments, token_weight=token_weight)
    p = _prepared(like, target, shard, smoothing_formula, arguments)
    value, stats = _run(flat, None, None, shard, p, lead, 0, False)
    return value if stats is None else (value, stats)


def _flat_rows(target, token_weight, like):
    checks.check_tensor("target", target)
    layers.check_target_shape(target, like)
    if token_weight is None:
        return target.reshape(-1), None
    checks.check_token_weight(token_weight, tuple(like.shape[:-1]))
    return target.reshape(-1), token_weight.reshape(-1)


def linear_cross_entropy(
    input, weight, target, bias, token_weight, group, settings, arguments, *, shift,
    num_classes=None, first_class=None, dtensor_classes=None, rows_known=False,
    smoothing_formula="torch",
):  # fmt: skip
    """The loss of a layer whose rows of weight and bias, local already, are split."""
    group = checked_group(group)
    _check_labels_kind(target)
    input, weight, bias = layers.checked_layer(input, weight, bias)
    if weight.dim() > 2:
        raise ValueError(f"a split weight must have two dimensions, got {weight.dim()}")
    if settings.strategy == "forward":
        raise ValueError("strategy='forward' needs all classes: no gradient before the gather")
    if settings.tiles is not None:
        name = "filter" if settings.tiles > 0 else "strategy='tiles'"
        raise ValueError(f"{name} is not available for classes that are split over processes")
    lead = tuple(input.shape[:-1])
    shift = layers.checked_shift(shift, lead)
    shard = shard_of(
        weight.shape[0], input.device, group, num_classes, first_class, dtensor_classes, target,
        input if dtensor_classes is not None else None, rows_known,
    )  # fmt: skip
    rows.checked_smoothing(arguments["label_smoothing"])
    if not lead:
        target = rows.without_batch(target)
    _flat_rows(target, token_weight, layers.logits_like(input, *lead, shard.bounds[-1]))
    if isinstance(arguments["temperature"], Tensor):
        if arguments["softcap"] is not None:
            raise ValueError("softcap with a tensor temperature needs all classes on each rank")
        temperature = local("temperature", arguments["temperature"])
        arguments = dict(arguments, temperature=1.0)
        input, weight = layers.tempered(
            input, weight, bias, target, temperature, shift, arguments["ignore_index"]
        )
        bias = None
    target = layers.flat_labels(target, lead, shift, arguments["ignore_index"])
    if token_weight is not None:
        token_weight = layers.shifted(token_weight, shift, 0.0).reshape(-1)
    flat = input.reshape(math.prod(lead), input.shape[-1])
    like = layers.logits_like(input, flat.shape[0], shard.bounds[-1])
    arguments = dict(arguments, token_weight=token_weight)
    p = _prepared(like, target, shard, smoothing_formula, arguments)
    if shard.width < weight.shape[0]:
        weight, bias = weight[: shard.width], bias if bias is None else bias[: shard.width]
    value, stats = _run(flat, weight, bias, shard, p, lead, settings.chunk, settings.exact)
    if arguments["reduction"] == "none":
        value = layers.unshifted(value, shift)
    if stats is None:
        return value
    return value, RowStats(*(s if s is None else layers.unshifted(s, shift) for s in stats))
