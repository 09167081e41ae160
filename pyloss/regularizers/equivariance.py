"""The distance of a network's layers from those that commute with groups of transformations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.regularizers.symmetry import (
    Kind,
    Rep,
    SymmetryType,
    blocks,
    by_copies,
    checked_rep,
    size_of,
)

_BIAS: tuple[tuple[int, Kind], ...] = ((1, (0, 0)),)  # a map of one scalar


class EquivarianceRegularizer(nn.Module):
    r"""How far linear layers are from being equivariant, for several groups at once.

    .. math::
        \sum_j \lambda_j R_j, \qquad
        R_j = \frac12 \sum_{layers} \|W - P_j W\|_F^2 + \|b - P_j b\|^2

    :math:`P_j` is the orthogonal projector on the maps that commute with group j. Added to a loss
    it asks for a symmetry and does not force it; which of several the data have,
    :meth:`observe_` and :meth:`retune_` find out during the training. Works block by block: a
    layer costs as much as a product of its weight with a few columns, however wide it is.

    Args:
        layers: ``(layer, rep_in, rep_out)`` each: ``nn.Linear``, or what has such a ``weight`` and
            ``bias``, and what its features are, as lists of pairs (count, type):
            see :class:`SymmetryType`. They stay the model's: no parameters of this module.
        types: groups, all of them on vectors of one size.
        strength: :math:`\lambda \ge 0`, one for all or one for each type. 0 for a group whose maps
            the layers are made of.
        reduction: over layers: ``"sum"``, ``"mean"`` or ``"none"``.
        include_bias: whether biases count.
        warmup: calls of :meth:`observe_` that are not looked at.

    Attributes:
        strength: :math:`\lambda`, ``(J,)``: a buffer; set it with ``strength.copy_``.
        minimum, recorded, observed: what :meth:`observe_` has seen; buffers.

    Shape:
        - output: scalar, or ``(L,)`` with ``reduction="none"``; of the widest dtype of the weights,
          no less than float32, also under autocast.

    Raises:
        TypeError: layers, types or numbers that are none.
        ValueError: representations that do not have the layer's number of features; groups of
            several sizes; a negative strength; an option out of range.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.regularizers import EquivarianceRegularizer, SymmetryType
        >>> bodies, hidden = [(5, "scalar"), (5, "vector")], [(8, "scalar"), (8, "vector")]
        >>> first, last = torch.nn.Linear(20, 32), torch.nn.Linear(32, 9)
        >>> penalty = EquivarianceRegularizer(
        ...     [(first, bodies, hidden), (last, hidden, [(1, "tensor2")])],
        ...     [SymmetryType.O(3), SymmetryType.O2("xy")], strength=0.1,
        ... )
        >>> penalty().backward()
        >>> _ = penalty.project_("O(3)")
        >>> penalty().item() < 1e-10
        True

    Reference:
        Kim, Lee, Yang, Lee. Regularizing Towards Soft Equivariance Under Mixed Symmetries. arXiv
        2306.00356.
    """

    strength: Tensor
    minimum: Tensor
    recorded: Tensor
    observed: Tensor

    def __init__(
        self,
        layers: Iterable[tuple[nn.Module, Rep, Rep]],
        types: Sequence[SymmetryType],
        *,
        strength: float | Sequence[float] | Tensor = 1.0,
        reduction: str = "sum",
        include_bias: bool = True,
        warmup: int = 50,
    ) -> None:
        super().__init__()
        self.types = _checked_types(types)
        checks.check_reduction(reduction)
        self.reduction = reduction
        self.include_bias = checks.checked_flag("include_bias", include_bias)
        self.warmup = checks.checked_count("warmup", warmup)
        self.register_buffer("strength", _checked_strength(strength, len(self.types)))
        self.register_buffer("minimum", torch.full_like(self.strength, math.inf))
        self.register_buffer("recorded", torch.full_like(self.strength, math.inf))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self._pairs: dict[tuple[Kind, Kind], int] = {}
        # No list of modules: the layers belong to the model, and so do their parameters.
        self._layers = tuple(self._parts(i, *layer) for i, layer in enumerate(_triples(layers)))
        if not self._layers:
            raise ValueError("layers must hold a (layer, rep_in, rep_out), and is empty")
        device = self._layers[0][0].weight.device
        self.to(device)

    def _parts(self, number: int, layer: nn.Module, rep_in: Rep, rep_out: Rep):
        """(layer, blocks of its weight, blocks of its bias)."""
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(
                f"layer {number} must have a weight (out, in), as nn.Linear, got "
                f"{type(layer).__name__}"
            )
        dim = self.types[0].dim
        sides = []
        for name, rep, features in (
            ("rep_in", rep_in, weight.shape[1]),
            ("rep_out", rep_out, weight.shape[0]),
        ):
            rep = checked_rep(f"{name} of layer {number}", rep)
            if size_of(rep, dim) != features:
                raise ValueError(
                    f"{name} of layer {number} must have its {features} features, and has "
                    f"{size_of(rep, dim)} with vectors of {dim}"
                )
            sides.append(rep)
        rep_in, rep_out = sides
        biased = self.include_bias and getattr(layer, "bias", None) is not None
        bias = _BIAS if biased else ()
        return layer, self._blocks(rep_in, rep_out), self._blocks(bias, rep_out)

    def _blocks(self, rep_in, rep_out):
        """Those that some group restricts, each with the number of its directions."""
        dim = self.types[0].dim
        found = []
        for columns, rows, a, b in blocks(rep_in, rep_out, dim):
            if (a, b) not in self._pairs:
                self._pairs[a, b] = len(self._pairs)
                spans = [t.violations(a, b) for t in self.types]
                owner = torch.block_diag(*(s.new_full((s.shape[1], 1), 0.5) for s in spans))
                name = str(self._pairs[a, b])
                self.register_buffer(f"_span{name}", torch.cat(spans, 1), persistent=False)
                self.register_buffer(f"_owner{name}", owner, persistent=False)
            pair = self._pairs[a, b]
            if self.get_buffer(f"_span{pair}").shape[1]:
                found.append((columns, rows, a, b, pair))
        return found

    def _apply(self, fn: Callable, recurse: bool = True) -> EquivarianceRegularizer:
        # To another device alone: in half precision the directions would not be orthonormal.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _table(self) -> Tensor:
        """R of each layer and type."""
        widest = torch.float32
        for number, (layer, *_) in enumerate(self._layers):
            checks.check_device(
                f"the weight of layer {number}", layer.weight, self.strength, "the regularizer"
            )
            widest = torch.promote_types(widest, layer.weight.dtype)
        rows, dim = [], self.types[0].dim
        # One cast of each, not one for each block.
        constants = [
            (self.get_buffer(f"_span{i}").to(widest), self.get_buffer(f"_owner{i}").to(widest))
            for i in self._pairs.values()
        ]
        with checks.without_autocast(self.strength):
            for layer, of_weight, of_bias in self._layers:
                weight, total = layer.weight, constants[0][1].new_zeros(len(self.types))
                parts = [(weight[rows_, columns], *rest) for columns, rows_, *rest in of_weight]
                if of_bias:
                    bias = layer.bias.unsqueeze(1)
                    parts += [(bias[rows_], *rest) for _, rows_, *rest in of_bias]
                for block, a, b, pair in parts:
                    span, owner = constants[pair]
                    along = by_copies(block, a, b, dim).to(widest) @ span
                    total = total + along.square().sum(0) @ owner
                rows.append(total)
        return torch.stack(rows)

    def forward(self) -> Tensor:
        table = self._table()
        each = (table * self.strength.to(table.dtype)).sum(1)
        if self.reduction == "none":
            return each
        return each.mean() if self.reduction == "mean" else each.sum()

    def per_type(self) -> Tensor:
        """R of each type, ``(J,)``, without the strengths; the mean over layers with
        ``reduction="mean"``, else the sum."""
        table = self._table()
        return table.mean(0) if self.reduction == "mean" else table.sum(0)

    @torch.no_grad()
    def observe_(self) -> Tensor:
        """Looks at :meth:`per_type` after an update, and keeps it if one of its entries is smaller
        than ever; the first ``warmup`` calls only count. Returns it; waits for no device."""
        found = self.per_type()
        now = found.to(self.minimum.dtype)
        counts = self.observed >= self.warmup
        better = counts & (now < self.minimum).any() & now.isfinite().all()
        self.recorded.copy_(torch.where(better, now, self.recorded))
        self.minimum.copy_(torch.where(better, torch.minimum(now, self.minimum), self.minimum))
        self.observed.add_(1)
        return found

    @torch.no_grad()
    def retune_(self, power: float = 2.0) -> Tensor:
        r"""Turns off the symmetries that the layers would not have.

        .. math:: \lambda_j \leftarrow \lambda_j (r_{min} / r_j)^{power}

        r is what :meth:`observe_` has kept, and its smallest entry is taken over the types of
        strength above 0. Then the observation begins anew.

        Returns:
            ``strength``.

        Raises:
            RuntimeError: :meth:`observe_` has kept nothing.
            ValueError: ``power`` below 0.
        """
        checks.check_range("power", power, 0.0)
        r, on = self.recorded, self.strength > 0
        if not r.isfinite().all():
            raise RuntimeError(
                f"retune_ needs more than {self.warmup} calls of observe_ (warmup) before it, and "
                f"had {int(self.observed)}"
            )
        least = torch.where(on, r, math.inf).min()
        ratio = torch.where(r <= least, 1.0, least / r)  # 0 / 0 too
        self.strength.copy_(torch.where(on, self.strength * ratio**power, self.strength))
        self.minimum.fill_(math.inf)
        self.recorded.fill_(math.inf)
        self.observed.zero_()
        return self.strength

    @torch.no_grad()
    def project_(self, symmetry: int | str = 0, amount: float = 1.0) -> EquivarianceRegularizer:
        r"""Makes the layers equivariant, or somewhat: :math:`W \leftarrow (1 - a) W + a P_j W`.

        Args:
            symmetry: the number of a type, or its name.
            amount: a in [0, 1].

        Returns:
            The module itself.
        """
        names = [t.name for t in self.types]
        if isinstance(symmetry, str):
            checks.check_one_of("symmetry", symmetry, names)
            symmetry = names.index(symmetry)
        symmetry = checks.checked_integer("symmetry", symmetry)
        if not 0 <= symmetry < len(names):
            raise IndexError(f"symmetry must be in [0, {len(names)}), got {symmetry}")
        checks.check_range("amount", amount, 0.0)
        if amount > 1:
            raise ValueError(f"amount must be in [0, 1], got {amount}")
        kind, dim = self.types[symmetry], self.types[0].dim
        for layer, of_weight, of_bias in self._layers:
            parts = [(layer.weight[rows, columns], a, b) for columns, rows, a, b, _ in of_weight]
            parts += [(layer.bias.unsqueeze(1)[rows], a, b) for _, rows, a, b, _ in of_bias]
            for block, a, b in parts:
                span = kind.violations(a, b).to(block.device)
                flat = by_copies(block, a, b, dim).double()
                off = _from_copies((flat @ span) @ span.t(), block.shape, a, b, dim)
                block.sub_((amount * off).to(block.dtype))
        return self

    def extra_repr(self) -> str:
        names = ", ".join(t.name for t in self.types)
        return (
            f"types=[{names}], layers={len(self._layers)}, reduction={self.reduction!r}, "
            f"include_bias={self.include_bias!r}, warmup={self.warmup!r}"
        )


def _from_copies(flat: Tensor, shape: torch.Size, a: Kind, b: Kind, dim: int) -> Tensor:
    """The inverse of by_copies."""
    d_in, d_out = dim ** sum(a), dim ** sum(b)
    each = flat.reshape(shape[0] // d_out, shape[1] // d_in, d_out, d_in)
    return each.transpose(1, 2).reshape(shape)


def _triples(layers) -> Iterable[tuple]:
    for number, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 3:
            raise TypeError(f"layers must hold (layer, rep_in, rep_out), got {layer!r} at {number}")
        yield layer


def _checked_types(types) -> tuple[SymmetryType, ...]:
    if isinstance(types, SymmetryType):
        types = (types,)
    types = tuple(types)
    for t in types:
        if not isinstance(t, SymmetryType):
            raise TypeError(f"types must hold SymmetryType, got {type(t).__name__}")
    if not types:
        raise ValueError("types must hold a SymmetryType, and is empty")
    if len({t.dim for t in types}) > 1:
        raise ValueError(f"types must act on vectors of one size, got {[t.dim for t in types]}")
    return types


def _checked_strength(strength, count: int) -> Tensor:
    try:
        found = torch.as_tensor(strength, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"strength must be a number or one for each type, got {strength!r}"
        ) from error
    if found.dim() > 1 or (found.dim() == 1 and len(found) != count):
        raise ValueError(f"strength must be one number or {count}, got {list(found.shape)}")
    if not (found.isfinite() & (found >= 0)).all():
        raise ValueError(f"strength must be finite and >= 0, got {strength}")
    return found.expand(count).clone()
