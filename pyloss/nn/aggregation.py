"""Aggregation of the elements of sets by a learnable commutative monoid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional.aggregation import fill_empty, segment_gru_reduce, shuffled
from pyloss.functional.segment import segment_reduce, segment_tree_reduce

_NAMED = {"sum": torch.add, "max": torch.maximum, "logsumexp": torch.logaddexp, "prod": torch.mul}
OPS = ("gru", "mlp", "pullback", *_NAMED)
IDENTITIES = ("learnable", "zero")


class SymmetricMLP(nn.Module):
    """a + b + m(a, b) + m(b, a), m an MLP with one hidden layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The first layer of m is [U V]: U a + V b and U b + V a need each product once.
        self.first = nn.Linear(channels, 2 * channels)
        self.second = nn.Linear(channels, channels)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        (ua, va), (ub, vb) = (self.first(t).chunk(2, -1) for t in (a, b))
        return a + b + self.second((ua + vb).relu() + (ub + va).relu())


class AdditiveCouplings(nn.Module):
    """phi: a map that has an inverse. Each half of the channels is shifted by a function of the
    other, in turn."""

    def __init__(self, channels: int, couplings: int = 4) -> None:
        super().__init__()
        self.half = channels // 2
        sizes = (self.half, channels - self.half)
        self.shifts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes[i % 2], channels), nn.Tanh(), nn.Linear(channels, sizes[1 - i % 2])
            )
            for i in range(couplings)
        )

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        parts = [x[..., : self.half], x[..., self.half :]]
        count, sign = len(self.shifts), -1 if inverse else 1
        for i in reversed(range(count)) if inverse else range(count):
            parts[1 - i % 2] = parts[1 - i % 2] + sign * self.shifts[i](parts[i % 2])
        return torch.cat(parts, -1)


class LCMAggregation(nn.Module):
    r"""Aggregates each set with a commutative operator that is learned: a learnable commutative
    monoid.

    .. math:: y_s = x_1 \circ x_2 \circ \dots \circ x_n, \qquad x_i \leftarrow
              \mathrm{relu}(W x_i + c)

    in a balanced binary tree, of depth ceil(log2 n), over the elements in their order. What is not
    associative depends on that order: :func:`pyloss.regularizers.associativity_loss` of
    :meth:`combine` teaches it not to.

    - ``"gru"``: (GRU(a, b) + GRU(b, a)) / 2
    - ``"mlp"``: a + b + m(a, b) + m(b, a)
    - ``"pullback"``: phi^-1(phi(a) + phi(b)), phi four additive couplings
    - ``"sum"``, ``"max"``, ``"logsumexp"``, ``"prod"``

    All are commutative, exactly. The first two have to learn to be associative, the others are, to
    rounding.

    The call is that of the aggregations of torch_geometric; for its layers there is
    :class:`pyloss.integrations.torch_geometric.LCMAggregation`. The weights of ``"gru"`` have the
    names that they have there.

    Args:
        in_channels, out_channels: features of an element, and of a set.
        op: see above; ``"pullback"`` needs two ``out_channels``.
        project: the layer relu(W x + c) before; without it both channels must be the same.
        identity: what an empty set gives: ``"learnable"``, a parameter (``"pullback"`` has its own,
            phi^-1(0)), or ``"zero"``. See :func:`pyloss.regularizers.identity_loss`.
        shuffle: in training the elements of each set come in random order.

    Shape:
        - x: ``(N, in_channels)``
        - index: ``(N,)``, the set of each element, sorted
        - ptr or offsets: ``(S + 1,)``, in place of the index: set s is ``x[ptr[s]:ptr[s + 1]]``. An
          index beside them is not looked at, and without any of the three x is one set.
        - dim_size: S; None: that of ptr, or the largest index and one more, for which a GPU is
          waited for.
        - dim: -2 or 0
        - generator: of ``shuffle``
        - output: ``(S, out_channels)``

    Attributes:
        identity: ``(out_channels,)``, or None.

    Raises:
        TypeError, ValueError: an option out of range; x of a wrong shape; an index that is not
            sorted; a ptr that does not cut x into sets.

    Example:
        >>> import torch, pyloss
        >>> aggregation = pyloss.nn.LCMAggregation(3, 16)
        >>> aggregation(torch.randn(5, 3), torch.tensor([0, 0, 0, 2, 2])).shape
        torch.Size([3, 16])

    Reference:
        Ong, Veličković. Learnable Commutative Monoids for Graph Neural Networks. arXiv 2212.08541.
    """

    identity: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        op: str = "gru",
        project: bool = True,
        identity: str = "learnable",
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = checks.checked_count("in_channels", in_channels, 1)
        self.out_channels = checks.checked_count("out_channels", out_channels, 1)
        checks.check_one_of("op", op, OPS)
        checks.check_one_of("identity", identity, IDENTITIES)
        self.op, self.project = op, checks.checked_flag("project", project)
        self.shuffle = checks.checked_flag("shuffle", shuffle)
        if not self.project and self.in_channels != self.out_channels:
            raise ValueError(
                f"project must be True where in_channels and out_channels differ, got "
                f"{self.in_channels} and {self.out_channels}"
            )
        d = self.out_channels
        if op == "pullback" and d < 2:
            raise ValueError(f"out_channels must be at least 2 with op='pullback', got {d}")
        self.lin = nn.Linear(self.in_channels, d) if self.project else None
        if op == "gru":
            self.gru_cell = nn.GRUCell(d, d)
        elif op == "mlp":
            self.mlp = SymmetricMLP(d)
        elif op == "pullback":
            self.phi = AdditiveCouplings(d)
        self._identity = identity
        own = identity == "learnable" and op != "pullback"
        self.register_parameter("identity", nn.Parameter(torch.zeros(d)) if own else None)

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.identity is not None:
            nn.init.zeros_(self.identity)

    def elements(self, x: Tensor) -> Tensor:
        """What is combined, ``(N, out_channels)``, of the elements ``(N, in_channels)``."""
        return x if self.lin is None else self.lin(x).relu()

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """a o b, of ``(P, out_channels)`` each."""
        if self.op == "gru":
            return (self.gru_cell(a, b) + self.gru_cell(b, a)) / 2
        if self.op == "mlp":
            return self.mlp(a, b)
        if self.op == "pullback":
            return self.phi(self.phi(a) + self.phi(b), inverse=True)
        return _NAMED[self.op](a, b)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        *,
        offsets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        checks.check_floating("x", x)
        if x.dim() != 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (N, {self.in_channels}), got {list(x.shape)}")
        if dim not in (-2, 0):
            raise ValueError(f"dim must be -2 or 0, got {dim}")
        if offsets is not None and ptr is not None:
            raise ValueError("give ptr or offsets, which mean the same, not both")
        offsets = _offsets(x, index, ptr if offsets is None else offsets, dim_size)
        if self.shuffle and self.training:
            x = x[shuffled(offsets, x.shape[0], generator)]
        return self._reduced(self.elements(x), offsets)

    def _reduced(self, x: Tensor, offsets: Tensor) -> Tensor:
        if self.op == "gru":
            cell = self.gru_cell
            weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            return segment_gru_reduce(x, offsets, *weights, identity=self.identity)
        if self.op == "pullback":  # associative: a sum needs no tree
            total = segment_reduce(self.phi(x), offsets, "sum")
            found = self.phi(total, inverse=True)
            return found if self._identity == "learnable" else fill_empty(found, offsets, None)
        if self.op == "mlp":
            empty = 0.0 if self.identity is None else self.identity
            return segment_tree_reduce(x, offsets, self.combine, identity=empty)
        return fill_empty(segment_reduce(x, offsets, self.op), offsets, self.identity)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, op={self.op!r}, project={self.project}, "
            f"identity={self._identity!r}, shuffle={self.shuffle}"
        )


def _offsets(
    x: Tensor, index: Tensor | None, offsets: Tensor | None, dim_size: int | None
) -> Tensor:
    """(S + 1,) of what the call says; checked where it is used."""
    if dim_size is not None:
        dim_size = checks.checked_count("dim_size", dim_size)
    if offsets is not None:
        checks.check_tensor("offsets", offsets)
        if dim_size is not None and offsets.shape != (dim_size + 1,):
            raise ValueError(
                f"dim_size must be that of the offsets, {offsets.numel() - 1}, got {dim_size}"
            )
        return offsets
    if index is not None:
        checks.check_tensor("index", index)
        if index.shape != x.shape[:1]:
            raise ValueError(f"index must be ({x.shape[0]},), got {list(index.shape)}")
        return segment.offsets_from_index(index, dim_size)
    # One set, and further ones that are empty; from no number of the host.
    count = 1 if dim_size is None else dim_size
    return torch.arange(count + 1, device=x.device).clamp(max=1) * x.shape[0]
