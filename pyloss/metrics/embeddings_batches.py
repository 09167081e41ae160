"""Metrics of embeddings over batches: pairs lie across them, so most keep what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyloss.functional._embeddings import check_labels, check_rows
from pyloss.functional._options import check_names, names_of
from pyloss.metrics.embeddings import (
    alignment,
    check_alignment,
    check_tolerance,
    check_uniformity,
    tolerance,
    uniformity,
)
from pyloss.metrics.embeddings_opis import OPISCurves, check_options, opis


class _Batches:
    """What the accumulators share: options, checked when made, and their representation."""

    _function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        check_names(type(self).__name__, options, names_of(self._function, without=("reduction",)))
        self.options = options
        self.reset()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"

    def reset(self) -> None:
        """Forgets everything."""
        raise NotImplementedError

    def _refuse(self) -> None:
        raise RuntimeError(f"{type(self).__name__}.compute() before update()")


class _Kept(_Batches):
    """Keeps the embeddings of all batches, and their labels."""

    def reset(self) -> None:
        """Forgets everything."""
        self._embeddings: list[Tensor] = []
        self._labels: list[Tensor] = []

    def _add(self, embeddings: Tensor, labels: Tensor | None) -> None:
        check_rows("embeddings", embeddings)
        first = self._embeddings[0] if self._embeddings else embeddings
        if embeddings.shape[1] != first.shape[1] or embeddings.dtype != first.dtype:
            raise ValueError(
                f"embeddings must be {first.dtype} (N, {first.shape[1]}) as before, got "
                f"{embeddings.dtype} {list(embeddings.shape)}"
            )
        if labels is not None:
            check_labels(labels, embeddings)
            self._labels.append(labels.detach().clone())
        self._embeddings.append(embeddings.detach().clone())

    def compute(self) -> Tensor:
        """The metric of all batches together; RuntimeError before the first update."""
        if not self._embeddings:
            self._refuse()
        kept = [torch.cat(t) for t in (self._embeddings, self._labels) if t]
        return self._function(*kept, **self.options)


class Uniformity(_Kept):
    r""":func:`pyloss.metrics.uniformity` of all batches together.

    .. math:: U = \log \operatorname{mean}_{i < j} e^{-t \|f_i - f_j\|^2}

    Args:
        **options: those of the function.

    Shape:
        - embeddings: ``(N, D)``, kept until ``reset``
        - compute: 0-d

    Raises:
        As the function, for the options when made; RuntimeError: ``compute`` before ``update``.

    Example:
        >>> import torch, pyloss
        >>> metric = pyloss.metrics.Uniformity(t=2.0)
        >>> for _ in range(3):
        ...     metric.update(torch.randn(8, 4))
        >>> metric.compute().shape
        torch.Size([])

    Reference:
        Wang, Isola. arXiv 2005.10242.
    """

    _function = staticmethod(uniformity)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_uniformity(**{k: v for k, v in options.items() if k != "generator"})

    def update(self, embeddings: Tensor) -> None:
        """Adds a batch."""
        self._add(embeddings, None)


class Tolerance(_Kept):
    r""":func:`pyloss.metrics.tolerance` of all batches together.

    .. math:: T = \operatorname{mean}_{i < j,\; y_i = y_j} f_i^\top f_j

    Args:
        **options: those of the function.

    Shape:
        - embeddings: ``(N, D)``, kept until ``reset``; labels: ``(N,)``
        - compute: 0-d

    Raises:
        As the function, for the options when made; RuntimeError: ``compute`` before ``update``.

    Example:
        >>> import torch, pyloss
        >>> metric = pyloss.metrics.Tolerance()
        >>> for _ in range(3):
        ...     metric.update(torch.randn(8, 4), torch.arange(8) % 2)
        >>> metric.compute().shape
        torch.Size([])

    Reference:
        Wang, Liu. arXiv 2012.09740.
    """

    _function = staticmethod(tolerance)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_tolerance(**options)

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self._add(embeddings, labels)


class OPIS(_Kept):
    r""":func:`pyloss.metrics.opis` of all batches together.

    .. math:: \mathrm{OPIS} = \operatorname{mean}_{t} \operatorname{var}_{c} U_c(t)

    Args:
        **options: those of the function.

    Shape:
        - embeddings: ``(N, D)``, kept until ``reset``; labels: ``(N,)``
        - compute: 0-d, or :class:`pyloss.metrics.OPISCurves`

    Raises:
        As the function, for the options when made; RuntimeError: ``compute`` before ``update``.

    Example:
        >>> import torch, pyloss
        >>> metric = pyloss.metrics.OPIS(far=(0.05, 0.2))
        >>> for _ in range(3):
        ...     metric.update(torch.randn(8, 4), torch.arange(8) % 2)
        >>> metric.compute().shape
        torch.Size([])

    Reference:
        Zhang et al. arXiv 2307.04047.
    """

    _function = staticmethod(opis)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_options(**options)

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self._add(embeddings, labels)

    def compute(self) -> Tensor | OPISCurves:
        """The metric of all batches together; RuntimeError before the first update."""
        return super().compute()


class Alignment(_Batches):
    r"""Mean over batches of :func:`pyloss.metrics.alignment`; keeps a sum alone.

    .. math:: A = \operatorname{mean}_i \|f(x_i) - f(y_i)\|^\alpha

    Args:
        **options: those of the function, except ``reduction``.

    Shape:
        - x, y: ``(N, D)``
        - compute: 0-d

    Raises:
        As the function, for the options when made; RuntimeError: ``compute`` before ``update``.

    Example:
        >>> import torch, pyloss
        >>> metric = pyloss.metrics.Alignment(alpha=1.0)
        >>> for _ in range(3):
        ...     metric.update(torch.randn(8, 4), torch.randn(8, 4))
        >>> metric.compute().shape
        torch.Size([])

    Reference:
        Wang, Isola. arXiv 2005.10242.
    """

    _function = staticmethod(alignment)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_alignment(**options)

    def reset(self) -> None:
        """Forgets everything."""
        self._total: Tensor | None = None
        self._count = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch."""
        found = alignment(x, y, **self.options, reduction="sum")
        self._total = found.double() if self._total is None else self._total + found
        self._dtype = found.dtype
        self._count += x.shape[0]

    def compute(self) -> Tensor:
        """The mean so far; RuntimeError before the first update."""
        if self._total is None:
            self._refuse()
        return (self._total / self._count if self._count else self._total * torch.nan).to(
            self._dtype
        )
