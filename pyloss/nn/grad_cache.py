"""Gradients of contrastive batches that are larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks


class GradCache(nn.Module):
    r"""Encoders that work through a batch in chunks, forward and backward, so that a contrastive
    loss sees the whole batch while the activations of one chunk are in memory.

    The embeddings are those of the encoders, and so are the gradients, whatever the loss:

    .. math:: \frac{\partial \ell}{\partial \theta} = \sum_{\text{chunks } c}
              \Big(\frac{\partial z_c}{\partial \theta}\Big)^{\!\top}
              \frac{\partial \ell}{\partial z_c}

    The loss gives the cached gradients :math:`\partial \ell / \partial z`; the backward then forms
    the activations of a chunk once more, with the random numbers (dropout) and the autocast state
    of its forward, and drops them before the next chunk. An encoder runs forward twice.

    Under ``DistributedDataParallel`` wrap the cache, not the encoder:
    ``DDP(GradCache(encoder, chunk_size=64))``. A parameter has its gradient once all chunks have
    added to it, so that the ranks exchange it once a step; ``no_sync`` is not needed, and the ranks
    may have different numbers of chunks.

    Args:
        encoders: one for all inputs, or one for each input; each returns a Tensor whose rows are
            those of its input. A row must not depend on other rows: batch normalisation takes its
            statistics from chunks, and moves its averages in the second forward too.
        chunk_size: rows of a chunk, >= 1. The last may have fewer.

    Shape:
        - inputs: each a Tensor ``(B, ...)``, or a tuple or list (positional arguments of the
          encoder) or a mapping (keyword arguments) of such; what is no Tensor is given to each
          chunk as it is
        - output: the embeddings ``(B, ...)``; a tuple of them for several inputs

    Raises:
        TypeError: an encoder that is not callable, is a ``DistributedDataParallel``, or returns
            something else than a Tensor; an input without a Tensor.
        ValueError: no encoders, or another number of inputs than of encoders; a ``chunk_size``
            below 1; rows that differ.

    Example:
        >>> import torch, pyloss
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU())
        >>> cache = pyloss.nn.GradCache(encoder, chunk_size=16)
        >>> z1, z2 = cache(torch.randn(100, 8), torch.randn(100, 8))
        >>> pyloss.nt_xent(z1, z2).backward()
        >>> encoder[0].weight.grad.shape
        torch.Size([64, 8])

    Reference:
        Gao, Zhang, Han, Callan. Scaling Deep Contrastive Learning Batch Size under Memory Limited
        Setup. arXiv 2101.06983.
    """

    def __init__(self, *encoders: Callable[..., Tensor], chunk_size: int) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("GradCache needs an encoder")
        for encoder in encoders:
            if isinstance(encoder, nn.parallel.DistributedDataParallel):
                raise TypeError(
                    "an encoder must not be a DistributedDataParallel; wrap the cache instead: "
                    "DistributedDataParallel(GradCache(encoder, ...))"
                )
            if not callable(encoder):
                raise TypeError(f"an encoder must be callable, got {type(encoder).__name__}")
        self.chunk_size = checks.checked_integer("chunk_size", chunk_size)
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.encoders = nn.ModuleList(
            e if isinstance(e, nn.Module) else _Function(e) for e in encoders
        )

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"

    def forward(self, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        encoders = list(self.encoders) * (len(inputs) if len(self.encoders) == 1 else 1)
        if len(encoders) != len(inputs) or not inputs:
            raise ValueError(
                f"there must be an input for each of {len(self.encoders)} encoders, or one encoder "
                f"for all, got {len(inputs)} inputs"
            )
        found = tuple(self._encoded(e, x, at) for at, (e, x) in enumerate(zip(encoders, inputs)))
        return found if len(found) > 1 else found[0]

    def _encoded(self, encoder: Callable[..., Tensor], given: Any, at: int) -> Tensor:
        from torch.utils.checkpoint import checkpoint  # with its first use

        arguments, names = _arguments(given)
        rows = _rows(f"input {at}", arguments)

        def encode(*chunk: Any) -> Tensor:
            own = len(chunk) - len(names)
            found = encoder(*chunk[:own], **dict(zip(names, chunk[own:])))
            if not isinstance(found, Tensor):
                raise TypeError(f"an encoder must return a Tensor, got {type(found).__name__}")
            return found

        def chunk_of(begin: int) -> list:
            end = begin + self.chunk_size
            return [a[begin:end] if isinstance(a, Tensor) else a for a in arguments]

        # Nothing is kept without gradients; chunks then only bound the memory.
        run = encode
        if torch.is_grad_enabled():

            def run(*chunk: Any) -> Tensor:
                return checkpoint(encode, *chunk, use_reentrant=False)

        parts = [run(*chunk_of(begin)) for begin in range(0, max(rows, 1), self.chunk_size)]
        found = torch.cat(parts)
        if len(found) != rows:
            raise ValueError(
                f"an encoder must return as many rows as input {at} has, {rows}, got {len(found)}"
            )
        return found


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


def _arguments(given: Any) -> tuple[list, tuple[str, ...]]:
    """What an encoder gets, and the names of the last ones."""
    if isinstance(given, Mapping):
        return list(given.values()), tuple(given)
    return (list(given) if isinstance(given, (tuple, list)) else [given]), ()


def _rows(name: str, arguments: list) -> int:
    rows = {len(a) for a in arguments if isinstance(a, Tensor) and a.dim()}
    if not rows or any(isinstance(a, Tensor) and not a.dim() for a in arguments):
        raise TypeError(f"{name} must be a Tensor with rows, or a tuple, list or mapping of such")
    if len(rows) > 1:
        raise ValueError(f"{name} has tensors of different numbers of rows: {sorted(rows)}")
    return rows.pop()
