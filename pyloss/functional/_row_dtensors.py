"""Row losses of DTensors: each rank's rows by the plain loss, split classes by the vocab-parallel
one. Imported with the first DTensor.

The rows that a rank holds add up to its part of a sum, which is what a Partial placement means:
nothing is sent but the denominator of a mean, one number a mesh dimension that splits rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from pyloss.functional import _checks as checks
from pyloss.functional import _layers as layers
from pyloss.functional import _rows as rows
from pyloss.functional import _vocab_parallel as split
from pyloss.functional._rows import RowStats
from pyloss.ops.row_softmax.masses import common_mass, ignored_rows, masses


class SplitRows:
    """How logits lie on their mesh, or hidden states in their place, and with them everything that
    goes with their rows."""

    def __init__(self, input: DTensor, class_dim: int):
        self.mesh, self.shown = input.device_mesh, input.placements
        self.class_dim = class_dim
        self.of_rows, self.class_mesh_dim = [], None
        for at, placement in enumerate(input.placements):
            if placement.is_replicate() or placement.is_partial():
                self.of_rows.append(Replicate())
            # A strided shard is not a contiguous range of classes or rows.
            elif type(placement) is not Shard:
                raise RuntimeError(
                    "input must be placed by Replicate, Shard or Partial on each dimension of its "
                    f"mesh, got {self.shown}"
                )
            elif placement.dim == self.class_dim:
                if self.class_mesh_dim is not None:
                    raise RuntimeError(
                        "the classes of input are split over two dimensions of its mesh, "
                        f"{self.shown}; redistribute one of them first"
                    )
                self.of_rows.append(Replicate())
                self.class_mesh_dim = at
            else:
                self.of_rows.append(Shard(placement.dim - (placement.dim > self.class_dim)))
        self.are_split = any(p.is_shard() for p in self.of_rows)
        # Of what each rank has added up over its own rows.
        self.of_sums = [Partial() if p.is_shard() else p for p in self.of_rows]

    def local(self, name: str, t, placements=None):
        """What a rank has of a tensor: by the placements, default: the whole of it."""
        if not isinstance(t, Tensor):
            return t
        if isinstance(t, DTensor):
            if t.device_mesh != self.mesh:
                raise RuntimeError(f"{name} must be on the mesh of input, {self.mesh}")
            wanted = placements or [Replicate()] * self.mesh.ndim
            # What all have alike, a learned class weight, gets its gradient in parts.
            grads = placements or self.of_sums
            return t.redistribute(placements=wanted).to_local(grad_placements=grads)
        if self.are_split and (placements or t.requires_grad):
            raise RuntimeError(
                f"{name} must be a DTensor, as input is one whose rows are split, {self.shown}; "
                f"got a plain {type(t).__name__}"
            )
        return t

    def target(self, target):
        """Labels, probabilities or a MixUp tuple, this rank's rows of them."""
        if isinstance(target, tuple) and len(target) == 3:
            y, y2, lam = target
            broadcast = isinstance(lam, Tensor) and lam.dim() == 0
            return (
                self.local("target[0]", y, self.of_rows),
                self.local("target[1]", y2, self.of_rows),
                self.local("lam", lam, None if broadcast else self.of_rows),
            )
        if not isinstance(target, Tensor) or not target.is_floating_point():
            return self.local("target", target, self.of_rows)
        along = [
            Shard(p.dim + (p.dim >= self.class_dim)) if p.is_shard() else p for p in self.of_rows
        ]
        return self.local("target", target, along)

    def whole(self, x: Tensor) -> Tensor:
        """The sum over all rows of what each rank has of its own."""
        return self.placed(x, None).full_tensor()

    def placed(self, x: Tensor, shape: tuple[int, ...] | None) -> DTensor:
        """A result of each row, of the given shape in all; None: a sum over the rows."""
        if shape is None:
            return DTensor.from_local(x, self.mesh, self.of_sums, run_check=False)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            x, self.mesh, self.of_rows, run_check=False, shape=torch.Size(shape), stride=stride
        )


# Of those options that are looked at here.
_DEFAULTS = dict(
    weight=None, ignore_index=-100, reduction="mean", token_weight=None, return_stats=(),
    num_items=None, z_loss=0.0,
)  # fmt: skip


def row_loss_of_dtensors(input: DTensor, target, inplace: bool, options: dict):
    """As row_loss. The loss is placed like the rows, a sum or mean over split rows as Partial."""
    if inplace:
        raise ValueError(
            "inplace=True is not available for a DTensor, whose shards it would change"
        )
    options = {**_DEFAULTS, **options}
    checks.check_reduction(options["reduction"])
    checks.check_has_dimension("input", input)
    class_dim = 0 if input.dim() == 1 else 1
    if options.get("ldr"):  # of which the vocab-parallel loss has no form
        input = _whole_rows(input, class_dim)
    on = SplitRows(input, class_dim)
    shape = tuple(input.shape[: on.class_dim]) + tuple(input.shape[on.class_dim + 1 :])
    if any(p.is_partial() for p in input.placements):
        whole = [Replicate() if p.is_partial() else p for p in input.placements]
        input = input.redistribute(placements=whole)
    if input.dim() == 1:
        target = rows.without_batch(target)
    _check_shapes(input, target, shape, options)
    target = on.target(target)
    options["token_weight"] = on.local("token_weight", options.get("token_weight"), on.of_rows)
    for name in ("weight", "num_items"):
        options[name] = on.local(name, options.get(name))
    logits, classes = input.to_local(), input.shape[on.class_dim]
    if on.class_mesh_dim is not None:
        _check_kind(target, on)
    if on.are_split and options["reduction"] == "mean" and options["num_items"] is None:
        sizes = list(logits.shape)
        sizes[on.class_dim] = classes
        set_divisor(layers.logits_like(logits, *sizes), target, on, options)
    if on.class_mesh_dim is None:
        found = rows.row_loss(logits, target, **options)
    else:
        found = _over_classes(logits, target, classes, on, options)
    scalar = options["reduction"] != "none"
    if not options["return_stats"]:
        return on.placed(found, None if scalar else shape)
    loss, stats = found
    stats = RowStats(*(s if s is None else on.placed(s, shape) for s in stats))
    return on.placed(loss, None if scalar else shape), stats


def row_stats_of_dtensors(function, input: DTensor, tensors: dict, **options):
    """As row_softmax_stats, `function`; the statistics are placed like the rows."""
    input = _whole_rows(input, input.dim() - 1)
    kept = input.placements
    on = SplitRows(input, input.dim() - 1)
    shape = input.shape[:-1]
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.dim():
            full = input.shape if name == "mask" else shape
            tensors[name] = on.local(name, t.expand(full), kept if name == "mask" else on.of_rows)
        else:
            tensors[name] = on.local(name, t)
    found = function(input.to_local(), **tensors, **options)
    return type(found)(*(t if t is None else on.placed(t, tuple(shape)) for t in found))


def _whole_rows(input: DTensor, class_dim: int) -> DTensor:
    """With all classes of a row on each process that has it."""
    kept = [p if type(p) is Shard and p.dim != class_dim else Replicate() for p in input.placements]
    return input.redistribute(placements=kept)


def _check_shapes(input, target, shape, options) -> None:
    """Of the whole tensors, on every rank alike: a rank that raised alone would leave the others
    waiting for its part of a denominator."""
    labels = target[:2] if isinstance(target, tuple) else (target,)
    for t in labels:
        checks.check_tensor("target", t)
        if t.is_floating_point():
            rows.check_probabilities(input, t, options["ignore_index"])
        else:
            rows.check_labels(input, t, "target")
    if options.get("token_weight") is not None:
        checks.check_token_weight(options["token_weight"], shape)


def _check_kind(target, on: SplitRows) -> None:
    kind = "a MixUp tuple" if isinstance(target, tuple) else None
    if isinstance(target, Tensor) and target.is_floating_point():
        kind = "probabilities"
    if kind is not None:
        raise ValueError(
            f"target must hold class indices where the classes of input are split, {on.shown}, got "
            f"{kind}; input.redistribute(...) brings the classes together"
        )


def set_divisor(like: Tensor, target, on: SplitRows, options: dict) -> None:
    """The denominator of a mean over the rows of all ranks; `like` stands for this rank's logits,
    with all classes."""
    p = rows.prepare(like, target, **options)[1]
    with torch.no_grad():
        loss_mass, z_mass = masses(p.labels, p.codes, ignored_rows(p.labels, p.codes))
        loss_mass, z_mass = on.whole(torch.stack((loss_mass, z_mass)))
        options["num_items"] = loss_mass
        weight = p.labels[3]
        if weight is not None and options["z_loss"]:
            options["weight"] = common_mass(loss_mass, z_mass, weight, p.codes.zero_if_empty)
            options["num_items"] = z_mass


def _over_classes(logits, target, classes: int, on: SplitRows, options: dict):
    """A rank's rows, whose classes are split over a dimension of the mesh."""
    group = on.mesh.get_group(on.class_mesh_dim)
    first = split.evenly(logits.shape[on.class_dim], classes, group)
    arguments = {name: x for name, x in options.items() if name != "token_weight"}
    return split.cross_entropy(
        logits.movedim(on.class_dim, -1), target, options["token_weight"], group, arguments,
        num_classes=classes, first_class=first, smoothing_formula="torch",
    )  # fmt: skip
