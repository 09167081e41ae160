"""Modules of NeuralSort and SoftSort; each forward is one call of the functional."""

from __future__ import annotations

from torch import Tensor

from pyloss.functional import relaxed_sort as F
from pyloss.nn._module import OptionsModule


class NeuralSort(OptionsModule):
    r"""Module of :func:`pyloss.functional.neural_sort`.

    .. math:: P_{r} = \mathrm{softmax}_j\Big(\frac{(n + 1 - 2 r)\, s_j - \sum_k |s_j - s_k|}
                                                  {\tau}\Big)

    Args:
        tau, hard, dim, descending: as there.

    Shape:
        - scores: ``(*, n)``
        - output: ``(*, n, n)``; a row is a rank, largest first

    Raises:
        As the function, when called.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.NeuralSort(tau=0.5)(torch.randn(4, 10)).shape
        torch.Size([4, 10, 10])

    Reference:
        Grover, Wang, Zweig, Ermon. arXiv 1903.08850.
    """

    def __init__(
        self, tau: float = 1.0, hard: bool = False, *, dim: int = -1, descending: bool = True
    ) -> None:
        super().__init__(tau=tau, hard=hard, dim=dim, descending=descending)

    def forward(self, scores: Tensor) -> Tensor:
        return F.neural_sort(scores, **self._options)


class SoftSort(OptionsModule):
    r"""Module of :func:`pyloss.functional.soft_sort_matrix`.

    .. math:: P_{r} = \mathrm{softmax}_j\Big(-\frac{|\mathrm{sort}(s)_r - s_j|^p}{\tau}\Big)

    Args:
        tau, hard, pow, dim, descending: as there.

    Shape:
        - scores: ``(*, n)``
        - output: ``(*, n, n)``; a row is a rank, largest first

    Raises:
        As the function, when called.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.SoftSort(tau=0.5, pow=2.0)(torch.randn(4, 10)).shape
        torch.Size([4, 10, 10])

    Reference:
        Prillo, Eisenschlos. arXiv 2006.16038.
    """

    def __init__(
        self,
        tau: float = 1.0,
        hard: bool = False,
        pow: float = 1.0,
        *,
        dim: int = -1,
        descending: bool = True,
    ) -> None:
        super().__init__(tau=tau, hard=hard, pow=pow, dim=dim, descending=descending)

    def forward(self, scores: Tensor) -> Tensor:
        return F.soft_sort_matrix(scores, **self._options)
