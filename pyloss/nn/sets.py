"""Layers and losses of sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import sets as F
from pyloss.functional._checks import check_floating, check_mask, checked_integer
from pyloss.functional._options import (
    ChamferOptions,
    HungarianOptions,
    SinkhornOptions,
    options_of,
)
from pyloss.nn._module import LossModule

ELEMENTS = ("input_mask", "target_mask", "input_offsets", "target_offsets")


class Pointers(NamedTuple):
    """What a decoder says of a set: scores of the next element at each step, and what it wrote.

    Example:
        >>> import torch, pyloss
        >>> found = pyloss.nn.ReadProcessWrite(1, 16)(torch.randn(2, 5, 1))
        >>> found.logits.shape, found.order.shape
        (torch.Size([2, 5, 5]), torch.Size([2, 5]))
    """

    logits: Tensor  # (B, steps, n); -inf at what cannot be chosen
    order: Tensor  # (B, steps), int64


def _size(name: str, value, least: int = 1) -> int:
    value = checked_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _checked(x: Tensor, features: int, mask: Tensor | None, name: str = "x") -> Tensor:
    """The mask (B, n) of a set (B, n, features)."""
    check_floating(name, x)
    if x.dim() != 3 or x.shape[2] != features:
        raise ValueError(f"{name} must be (B, n, {features}), got {list(x.shape)}")
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    check_mask(mask, x, shape=x.shape[:2])
    return mask


class _Attention(nn.Module):
    """Scores of memories for a query: v^T tanh(W1 m + W2 q), or their inner product."""

    def __init__(self, memory: int, query: int, additive: bool) -> None:
        super().__init__()
        self.additive = additive
        if additive:
            self.of_memory = nn.Linear(memory, memory, bias=False)
            self.of_query = nn.Linear(query, memory, bias=False)
            self.weigh = nn.Linear(memory, 1, bias=False)

    def prepared(self, memory: Tensor) -> Tensor:
        """What does not depend on the query: once a set, not once a step."""
        return self.of_memory(memory) if self.additive else memory

    def forward(self, prepared: Tensor, query: Tensor, mask: Tensor) -> Tensor:
        if self.additive:
            e = self.weigh(torch.tanh(prepared + self.of_query(query).unsqueeze(1))).squeeze(-1)
        else:
            e = torch.bmm(prepared, query.unsqueeze(2)).squeeze(2)
        return e.masked_fill(~mask, -torch.inf)


def _readout(scores: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """The memories weighted by the softmax of their scores; 0 where nothing counts."""
    some = mask.any(1, keepdim=True)
    share = torch.where(some, scores, 0.0).softmax(1)
    share = torch.where(mask, share, 0.0)
    return torch.bmm(share.unsqueeze(1), memory).squeeze(1)


class ReadProcess(nn.Module):
    r"""Encodes a set, whatever the order of its elements: the read and process blocks.

    .. math:: m_i = \mathrm{MLP}(x_i), \quad q_t = \mathrm{LSTM}(q^*_{t-1}), \quad
              a_t = \mathrm{softmax}_i\, e(m_i, q_t), \quad r_t = \sum_i a_{t,i} m_i, \quad
              q^*_t = [q_t; r_t]

    Args:
        in_dim: features of an element.
        hidden: size of the memories and of the LSTM.
        steps: T, how often the set is looked at; 0: not at all.
        mlp: a module from ``in_dim`` to ``hidden`` features; default: two layers with a ReLU.
        attention: ``"dot"``, or ``"additive"``, v^T tanh(W1 m + W2 q).

    Shape:
        - x: ``(B, n, in_dim)``
        - mask: ``(B, n)``, bool, True at what counts
        - output: memories ``(B, n, hidden)`` and q* ``(B, 2 hidden)``

    Raises:
        ValueError: an option out of range, wrong shapes. TypeError: wrong types.

    Example:
        >>> import torch, pyloss
        >>> memory, state = pyloss.nn.ReadProcess(3, 16)(torch.randn(2, 5, 3))
        >>> memory.shape, state.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 32]))

    Reference:
        Vinyals, Bengio, Kudlur. Order Matters: Sequence to sequence for sets. arXiv 1511.06391.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        steps: int = 5,
        mlp: nn.Module | None = None,
        attention: str = "dot",
    ) -> None:
        super().__init__()
        self.in_dim, self.hidden = _size("in_dim", in_dim), _size("hidden", hidden)
        self.steps = _size("steps", steps, 0)
        if attention not in ("dot", "additive"):
            raise ValueError(f"attention must be one of dot, additive; got {attention!r}")
        self.mlp = mlp or nn.Sequential(
            nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden)
        )
        self.cell = nn.LSTMCell(2 * hidden, hidden)
        self.attention = _Attention(hidden, hidden, attention == "additive")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mask = _checked(x, self.in_dim, mask)
        memory = self.mlp(torch.where(mask.unsqueeze(2), x, 0.0))
        prepared = self.attention.prepared(memory)
        state = memory.new_zeros(x.shape[0], 2 * self.hidden)
        q = c = memory.new_zeros(x.shape[0], self.hidden)
        for _ in range(self.steps):
            q, c = self.cell(state, (q, c))
            found = _readout(self.attention(prepared, q, mask), memory, mask)
            state = torch.cat([q.to(found.dtype), found], 1)
        return memory, state

    def extra_repr(self) -> str:
        attention = "additive" if self.attention.additive else "dot"
        return (
            f"in_dim={self.in_dim}, hidden={self.hidden}, steps={self.steps}, "
            f"attention={attention!r}"
        )


class PointerDecoder(nn.Module):
    r"""Writes a set in an order, by pointing at its elements.

    .. math:: p(y_j = i) = \mathrm{softmax}_i\, v^\top \tanh(W_1 m_i + W_2 q_j)

    Args:
        hidden: size of the memories.
        glimpses: how often the query looks at the set before it points: each time the readout of
            the attention is the new query.
        mask_used: an element is pointed at once.
        state_dim: size of the state that starts it; default: ``2 hidden``, of
            :class:`ReadProcess`.

    Shape:
        - memory: ``(B, n, hidden)``
        - state: ``(B, state_dim)``
        - mask: ``(B, n)``, bool, True at what counts
        - target: ``(B, steps)``, int64: the order to be written, whose elements go in (teacher
          forcing); None: what was pointed at goes in, n steps
        - output: :class:`Pointers`. Behind the end of a smaller set the scores are 0 at all n.

    Raises:
        ValueError: an option out of range, wrong shapes. TypeError: wrong types.

    Example:
        >>> import torch, pyloss
        >>> decoder = pyloss.nn.PointerDecoder(16)
        >>> logits, order = decoder(torch.randn(2, 5, 16), torch.randn(2, 32))
        >>> order.sort(1).values.tolist()
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]

    Reference:
        Vinyals, Fortunato, Jaitly. Pointer Networks. arXiv 1506.03134; and arXiv 1511.06391.
    """

    def __init__(
        self, hidden: int, glimpses: int = 1, mask_used: bool = True, state_dim: int | None = None
    ) -> None:
        super().__init__()
        self.hidden = _size("hidden", hidden)
        self.glimpses, self.mask_used = _size("glimpses", glimpses, 0), bool(mask_used)
        state_dim = 2 * hidden if state_dim is None else _size("state_dim", state_dim)
        self.state_dim = state_dim
        self.start = nn.Linear(state_dim, 2 * hidden)  # the LSTM's two states
        self.first = nn.Parameter(torch.zeros(hidden))  # what goes in before any element
        self.cell = nn.LSTMCell(hidden, hidden)
        self.glimpse = _Attention(hidden, hidden, True)
        self.pointer = _Attention(hidden, hidden, True)

    def forward(
        self,
        memory: Tensor,
        state: Tensor,
        mask: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Pointers:
        mask = _checked(memory, self.hidden, mask, "memory")
        b, n, _ = memory.shape
        if tuple(state.shape) != (b, self.state_dim):
            raise ValueError(f"state must be {[b, self.state_dim]}, got {list(state.shape)}")
        if target is not None and (target.dim() != 2 or target.shape[0] != b):
            raise ValueError(f"target must be ({b}, steps), got {list(target.shape)}")
        if target is not None and target.dtype != torch.int64:
            raise TypeError(f"target must hold places in the set, int64, got {target.dtype}")
        glimpse, pointer = self.glimpse.prepared(memory), self.pointer.prepared(memory)
        h, c = self.start(state).chunk(2, 1)
        given, left = self.first.expand(b, -1), mask
        logits, order = [], []
        for j in range(n if target is None else target.shape[1]):
            h, c = self.cell(given, (h, c))
            q = h
            # At the end of a smaller set there is nothing to point at.
            open_ = torch.where(left.any(1, keepdim=True), left, True)
            for _ in range(self.glimpses):
                q = _readout(self.glimpse(glimpse, q, open_), memory, open_)
            scores = self.pointer(pointer, q, open_)
            scores = torch.where(left.any(1, keepdim=True), scores, 0.0)
            chosen = scores.detach().argmax(1) if target is None else target[:, j]
            at = chosen.unsqueeze(1)
            given = memory.gather(1, at.unsqueeze(2).expand(-1, -1, self.hidden)).squeeze(1)
            left = left.scatter(1, at, False) if self.mask_used else left
            logits.append(scores)
            order.append(chosen)
        if not logits:
            return Pointers(memory.new_zeros(b, 0, n), mask[:, :0].long())
        return Pointers(torch.stack(logits, 1), torch.stack(order, 1))

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, glimpses={self.glimpses}, mask_used={self.mask_used}"


class ReadProcessWrite(nn.Module):
    r"""Set to sequence: :class:`ReadProcess`, then :class:`PointerDecoder`.

    Args:
        in_dim, hidden, steps, mlp, attention: as for :class:`ReadProcess`.
        glimpses, mask_used: as for :class:`PointerDecoder`.

    Shape:
        - x: ``(B, n, in_dim)``
        - mask: ``(B, n)``, bool, True at what counts
        - target: ``(B, steps)``, int64, the order to be written, or None
        - output: :class:`Pointers`; train it by ``F.cross_entropy(logits.mT, target)``

    Raises:
        As the two.

    Example:
        >>> import torch, pyloss
        >>> x = torch.rand(4, 5, 1)
        >>> truth = x.squeeze(2).argsort(1)
        >>> model = pyloss.nn.ReadProcessWrite(1, 16, steps=2)
        >>> logits, _ = model(x, target=truth)
        >>> torch.nn.functional.cross_entropy(logits.mT, truth).backward()

    Reference:
        Vinyals, Bengio, Kudlur. Order Matters: Sequence to sequence for sets. arXiv 1511.06391.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        steps: int = 5,
        glimpses: int = 1,
        mlp: nn.Module | None = None,
        attention: str = "dot",
        mask_used: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = ReadProcess(in_dim, hidden, steps, mlp, attention)
        self.decoder = PointerDecoder(hidden, glimpses, mask_used)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, target: Tensor | None = None
    ) -> Pointers:
        return self.decoder(*self.encoder(x, mask), mask, target)


class _SetLoss(LossModule):
    """A loss of two sets as a module: the call that all of them have."""

    _loss: Callable[..., Tensor | tuple[Tensor, Tensor]]

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        input_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        input_offsets: Tensor | None = None,
        target_offsets: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._loss(
            input, target, input_mask=input_mask, target_mask=target_mask,
            input_offsets=input_offsets, target_offsets=target_offsets, **self.options,
        )  # fmt: skip


class ChamferSetLoss(_SetLoss):
    r"""Module of :func:`pyloss.functional.chamfer_set_loss`.

    .. math:: \ell = \frac1n \sum_i \min_j c(x_i, y_j) + \frac1m \sum_j \min_i c(x_i, y_j)

    Args:
        cost, reduction: as for :func:`pyloss.functional.chamfer_set_loss`.

    Shape:
        - input: ``(B, n, d)``, or ``(P, d)`` with offsets
        - target: ``(B, m, d)``, or as the function says
        - masks, offsets: optional, as for the function
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.ChamferSetLoss()(torch.randn(2, 5, 3), torch.randn(2, 4, 3)).shape
        torch.Size([])

    Reference:
        Fan, Su, Guibas. A Point Set Generation Network. arXiv 1612.00603.
    """

    _loss = staticmethod(F.chamfer_set_loss)

    @options_of(F.chamfer_set_loss, without=ELEMENTS)
    def __init__(self, **options: Unpack[ChamferOptions]) -> None:
        F.check_pair_options(**options)
        super().__init__(**options)


class HungarianSetLoss(_SetLoss):
    r"""Module of :func:`pyloss.functional.hungarian_set_loss`.

    .. math:: \ell = \min_{\pi} \frac{1}{\min(n, m)} \sum_{(i, j) \in \pi} c(x_i, y_j)

    Args:
        cost, reduction, return_matching: as for :func:`pyloss.functional.hungarian_set_loss`.

    Shape:
        - input: ``(B, n, d)``, or ``(P, d)`` with offsets
        - target: ``(B, m, d)``, or as the function says
        - masks, offsets: optional, as for the function
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.HungarianSetLoss()(torch.randn(2, 5, 3), torch.randn(2, 4, 3)).shape
        torch.Size([])

    Reference:
        Kuhn. The Hungarian method for the assignment problem. 1955.
    """

    _loss = staticmethod(F.hungarian_set_loss)

    @options_of(F.hungarian_set_loss, without=ELEMENTS)
    def __init__(self, **options: Unpack[HungarianOptions]) -> None:
        F.check_pair_options(**options)
        super().__init__(**options)


class SinkhornSetLoss(_SetLoss):
    r"""Module of :func:`pyloss.functional.sinkhorn_set_loss`.

    .. math:: \ell = \sum_{ij} P_{ij}\, c(x_i, y_j)

    Args:
        cost, epsilon, iterations, reduction: as for :func:`pyloss.functional.sinkhorn_set_loss`.

    Shape:
        - input: ``(B, n, d)``, or ``(P, d)`` with offsets
        - target: ``(B, m, d)``, or as the function says
        - masks, offsets: optional, as for the function
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.SinkhornSetLoss()(torch.randn(2, 5, 3), torch.randn(2, 4, 3)).shape
        torch.Size([])

    Reference:
        Cuturi. Sinkhorn Distances. arXiv 1306.0895.
    """

    _loss = staticmethod(F.sinkhorn_set_loss)

    @options_of(F.sinkhorn_set_loss, without=ELEMENTS)
    def __init__(self, **options: Unpack[SinkhornOptions]) -> None:
        F.check_pair_options(**options)
        super().__init__(**options)


class OrderSearchSchedule:
    """The mode of :func:`pyloss.functional.order_search_loss` over training.

    Random orders at first, so that none is preferred because the first weights happen to; then
    those that the model finds.

    Args:
        warmup_steps: how many steps with ``"uniform"``.
        mode: what follows.

    Raises:
        ValueError, TypeError: an option out of range or of the wrong type.

    Example:
        >>> import pyloss
        >>> schedule = pyloss.nn.OrderSearchSchedule(warmup_steps=2)
        >>> [schedule.step() for _ in range(4)]
        ['uniform', 'uniform', 'sample', 'sample']

    Reference:
        Vinyals, Bengio, Kudlur. arXiv 1511.06391.
    """

    def __init__(self, warmup_steps: int = 1000, mode: str = "sample") -> None:
        self.warmup_steps = _size("warmup_steps", warmup_steps, 0)
        F.check_search(mode, 1, 1.0, "mean")
        self.after, self.steps = mode, 0

    @property
    def mode(self) -> str:
        """That of the next step."""
        return "uniform" if self.steps < self.warmup_steps else self.after

    def step(self) -> str:
        """Its mode; the next one follows."""
        mode, self.steps = self.mode, self.steps + 1
        return mode

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = int(state["steps"])

    def __repr__(self) -> str:
        return f"OrderSearchSchedule(warmup_steps={self.warmup_steps}, mode={self.after!r})"
