"""Modules of the losses on ranked lists."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import ranking as F
from pyloss.functional._options import (
    ApproxNDCGOptions,
    LambdaOptions,
    ListMLEOptions,
    ListNetOptions,
    NeuralNDCGOptions,
    options_of,
)
from pyloss.nn._module import LossModule

LISTS = ("mask", "offsets")  # which a module gets when it is called


class _ListLoss(LossModule):
    """A loss of lists as a module: the call that all of them have."""

    _loss: Callable[..., Tensor]

    def forward(
        self,
        scores: Tensor,
        relevance: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        return self._loss(scores, relevance, mask=mask, offsets=offsets, **self.options)


class ListNetLoss(_ListLoss):
    r"""Module of :func:`pyloss.functional.list_net`.

    .. math:: \ell = -\sum_i \mathrm{softmax}(y / T)_i \log \mathrm{softmax}(s)_i

    Args:
        temperature, reduction: as for :func:`pyloss.functional.list_net`.

    Shape:
        - scores, relevance: ``(..., n)``, or ``(P,)`` with offsets
        - mask, offsets: optional, as for the function
        - output: scalar, or one number a list with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ListNetLoss()
        >>> criterion(torch.randn(8, 20), torch.randint(5, (8, 20))).shape
        torch.Size([])

    Reference:
        Cao, Qin, Liu, Tsai, Li. ICML 2007.
    """

    _loss = staticmethod(F.list_net)

    @options_of(F.list_net, without=LISTS)
    def __init__(self, **options: Unpack[ListNetOptions]) -> None:
        F.check_list_net(**options)
        super().__init__(**options)


class ListMLELoss(_ListLoss):
    r"""Module of :func:`pyloss.functional.list_mle`.

    .. math:: \ell = -\sum_{r \le k} \Big(s_{\pi_r} - \log \sum_{q \ge r} e^{s_{\pi_q}}\Big)

    Args:
        k, reduction: as for :func:`pyloss.functional.list_mle`.

    Shape:
        - scores, relevance: ``(..., n)``, or ``(P,)`` with offsets
        - mask, offsets: optional, as for the function
        - output: scalar, or one number a list with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ListMLELoss(k=10)
        >>> criterion(torch.randn(8, 20), torch.randint(5, (8, 20))).shape
        torch.Size([])

    Reference:
        Xia, Liu, Wang, Zhang, Li. ICML 2008.
    """

    _loss = staticmethod(F.list_mle)

    @options_of(F.list_mle, without=LISTS)
    def __init__(self, **options: Unpack[ListMLEOptions]) -> None:
        F.check_list_mle(**options)
        super().__init__(**options)


class ApproxNDCGLoss(_ListLoss):
    r"""Module of :func:`pyloss.functional.approx_ndcg_loss`.

    .. math:: \ell = 1 - \frac{1}{\mathrm{IDCG}} \sum_i \frac{g(y_i)}{\log_2(1 + \hat r_i)}

    Args:
        temperature, gain, reduction: as for :func:`pyloss.functional.approx_ndcg_loss`.

    Shape:
        - scores, relevance: ``(..., n)``, or ``(P,)`` with offsets
        - mask, offsets: optional, as for the function
        - output: scalar, or one number a list with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ApproxNDCGLoss()
        >>> criterion(torch.randn(8, 20), torch.randint(5, (8, 20))).shape
        torch.Size([])

    Reference:
        Qin, Liu, Li. Information Retrieval 13, 2010.
    """

    _loss = staticmethod(F.approx_ndcg_loss)

    @options_of(F.approx_ndcg_loss, without=LISTS)
    def __init__(self, **options: Unpack[ApproxNDCGOptions]) -> None:
        F.check_approx(**options)
        super().__init__(**options)


class NeuralNDCGLoss(_ListLoss):
    r"""Module of :func:`pyloss.functional.neural_ndcg_loss`.

    .. math:: \ell = 1 - \frac{1}{\mathrm{IDCG}_k} \sum_{r \le k} \frac{(P\, g(y))_r}{\log_2(1 + r)}

    Args:
        relaxation, steepness, distribution, k, gain, sinkhorn, reduction: as for
            :func:`pyloss.functional.neural_ndcg_loss`.

    Shape:
        - scores, relevance: ``(..., n)``, or ``(P,)`` with offsets
        - mask, offsets: optional, as for the function
        - output: scalar, or one number a list with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.NeuralNDCGLoss(k=10)
        >>> criterion(torch.randn(8, 20), torch.randint(5, (8, 20))).shape
        torch.Size([])

    Reference:
        Pobrotyn, Bialobrzeski. arXiv 2102.07831.
    """

    _loss = staticmethod(F.neural_ndcg_loss)

    @options_of(F.neural_ndcg_loss, without=LISTS)
    def __init__(self, **options: Unpack[NeuralNDCGOptions]) -> None:
        F.check_neural(**options)
        super().__init__(**options)


class LambdaLoss(_ListLoss):
    r"""Module of :func:`pyloss.functional.lambda_loss`.

    .. math:: \ell = \sum_{y_i > y_j} w_{ij} \log_2\big(1 + e^{-\sigma (s_i - s_j)}\big)

    Args:
        weighting, sigma, k, mu, gain, reduction: as for :func:`pyloss.functional.lambda_loss`.

    Shape:
        - scores, relevance: ``(..., n)``, or ``(P,)`` with offsets
        - mask, offsets: optional, as for the function
        - output: scalar, or one number a list with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.LambdaLoss(weighting="ndcg_loss2++")
        >>> criterion(torch.randn(8, 20), torch.randint(5, (8, 20))).shape
        torch.Size([])

    Reference:
        Wang, Li, Golbandi, Bendersky, Najork. CIKM 2018.
    """

    _loss = staticmethod(F.lambda_loss)

    @options_of(F.lambda_loss, without=LISTS)
    def __init__(self, **options: Unpack[LambdaOptions]) -> None:
        F.check_lambda(**options)
        super().__init__(**options)
