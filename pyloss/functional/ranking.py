"""Learning to rank: losses on the order of scored lists.

All take ``scores`` and ``relevance`` of one shape ``(..., n)``, or ``(P,)`` with ``offsets``, and
reduce over lists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._lists import Lists, check_gain, checked_k
from pyloss.functional._sorting_rows import checked_settings
from pyloss.functional.relaxed_sort import neural_sort
from pyloss.functional.sorting import soft_permute

WEIGHTINGS = ("lambdarank", "ranknet", "ndcg_loss1", "ndcg_loss2", "ndcg_loss2++")
RELAXATIONS = ("network", "neuralsort")


def list_net(
    scores: Tensor,
    relevance: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""ListNet: cross entropy of the top-one probabilities of relevance and of scores.

    .. math:: \ell = -\sum_i \mathrm{softmax}(y / T)_i \log \mathrm{softmax}(s)_i

    Args:
        scores: s ``(..., n)``, floating.
        relevance: y, of the same shape, any real dtype. No gradient.
        temperature: T > 0, of the relevance.
        mask: of the same shape, bool, True at what counts.
        offsets: ``(lists + 1,)``: scores and relevance are ``(P,)``, one list behind the other. The
            longest is looked up on the host.
        reduction: ``"mean"`` or ``"sum"`` over lists, or ``"none"``. A list without items is none:
            its loss is 0, and the mean does not count it.

    Returns:
        0-d, or one number a list; of the dtype of ``scores``, float32 for half types under
        autocast. A NaN makes its list NaN.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, an option out of range.

    Example:
        >>> import torch, pyloss
        >>> scores = torch.randn(8, 20, requires_grad=True)
        >>> relevance = torch.randint(5, (8, 20))
        >>> pyloss.functional.list_net(scores, relevance).backward()

    Reference:
        Cao, Qin, Liu, Tsai, Li. Learning to Rank: From Pairwise Approach to Listwise Approach.
        ICML 2007.
    """
    check_list_net(temperature, reduction)
    lists = Lists(scores, relevance, mask, offsets)
    share = lists.hidden(lists.y / temperature, -torch.inf).softmax(1)
    log_share = lists.hidden(lists.s, lists.lowest()).log_softmax(1)
    each = -lists.hidden(share * log_share, 0.0).sum(1)
    return lists.reduced(each, None, reduction)


def check_list_net(temperature, reduction) -> None:
    checks.check_range("temperature", temperature, 0.0, open_low=True)
    checks.check_reduction(reduction)


def list_mle(
    scores: Tensor,
    relevance: Tensor,
    *,
    k: int | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""ListMLE: likelihood of the order of relevance under Plackett and Luce.

    .. math:: \ell = -\sum_{r \le k} \Big(s_{\pi_r} - \log \sum_{q \ge r} e^{s_{\pi_q}}\Big),
              \qquad y_{\pi_1} \ge y_{\pi_2} \ge \dots

    Args:
        scores, relevance, mask, offsets, reduction: as for :func:`list_net`.
        k: only the first k places; default: all. Equal relevance keeps the order of the list.

    Returns:
        As :func:`list_net`.

    Raises:
        As :func:`list_net`.

    Example:
        >>> import torch, pyloss
        >>> scores = torch.tensor([[3.0, 1.0, 2.0]])
        >>> right, wrong = torch.tensor([[2, 0, 1]]), torch.tensor([[0, 2, 1]])
        >>> bool(pyloss.functional.list_mle(scores, right)
        ...      < pyloss.functional.list_mle(scores, wrong))
        True

    Reference:
        Xia, Liu, Wang, Zhang, Li. Listwise Approach to Learning to Rank. ICML 2008.
    """
    k = check_list_mle(k, reduction)
    lists = Lists(scores, relevance, mask, offsets)
    order = lists.order(lists.y)
    s = lists.hidden(lists.s, lists.lowest()).gather(1, order)
    rest = s.flip(1).logcumsumexp(1).flip(1)
    terms = rest - s
    if lists.mask is not None:
        terms = torch.where(lists.mask.gather(1, order), terms, 0.0)
    return lists.reduced(terms[:, :k].sum(1) + lists.poison(), None, reduction)


def check_list_mle(k, reduction) -> int | None:
    checks.check_reduction(reduction)
    return checked_k(k)


def approx_ndcg_loss(
    scores: Tensor,
    relevance: Tensor,
    *,
    temperature: float = 0.1,
    gain: str = "exponential",
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus ApproxNDCG: ranks are sums of sigmoids of score differences.

    .. math:: \ell = 1 - \frac{1}{\mathrm{IDCG}} \sum_i \frac{g(y_i)}{\log_2(1 + \hat r_i)}, \qquad
              \hat r_i = 1 + \sum_{j \ne i} \sigma\big((s_j - s_i) / T\big)

    Args:
        scores, relevance, mask, offsets, reduction: as for :func:`list_net`. A list in which
            nothing is relevant has no order to learn: it counts as one without items.
        temperature: T > 0; the smaller, the nearer to NDCG.
        gain: g: ``"exponential"``, 2^y - 1, or ``"linear"``, y.

    Returns:
        As :func:`list_net`. Memory and time are those of the pairs, n^2 a list.

    Raises:
        As :func:`list_net`.

    Example:
        >>> import torch, pyloss
        >>> relevance = torch.tensor([[3, 0, 1]])
        >>> loss = pyloss.functional.approx_ndcg_loss(10.0 * relevance, relevance)
        >>> loss.round(decimals=4)
        tensor(0.)

    Reference:
        Qin, Liu, Li. A general approximation framework for direct optimization of information
        retrieval measures. Information Retrieval 13, 2010.
    """
    check_approx(temperature, gain, reduction)
    lists = Lists(scores, relevance, mask, offsets)
    above = torch.sigmoid((lists.s.unsqueeze(1) - lists.s.unsqueeze(2)) / temperature)
    if lists.mask is not None:
        above = torch.where(lists.pairs(), above, 0.0)
    rank = 0.5 + above.sum(2)  # an item beside itself is a half
    if lists.mask is not None:
        rank = torch.where(lists.mask, rank, 1.0)
    gains = lists.gains(gain)
    ideal = lists.ideal(gains, lists.discounts(None))
    found = (gains / torch.log2(1 + rank)).sum(1)
    return lists.reduced(*_share_lost(found, ideal), reduction)


def check_approx(temperature, gain, reduction) -> None:
    check_list_net(temperature, reduction)
    check_gain(gain)


def _share_lost(found: Tensor, ideal: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - found / ideal, which lists have an ideal)."""
    counted = ideal != 0  # NaN is not 0
    return 1 - found / torch.where(counted, ideal, 1.0), counted


def neural_ndcg_loss(
    scores: Tensor,
    relevance: Tensor,
    *,
    relaxation: str = "network",
    steepness: float = 1.0,
    distribution: str = "cauchy",
    k: int | None = None,
    gain: str = "exponential",
    sinkhorn: int = 30,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus NeuralNDCG: the gains put in order by a relaxed sort of the scores.

    .. math:: \ell = 1 - \frac{1}{\mathrm{IDCG}_k} \sum_{r \le k} \frac{(P\, g(y))_r}{\log_2(1 + r)}

    Args:
        scores, relevance, mask, offsets, reduction: as for :func:`list_net`; lists of several
            lengths are read on the host. A list in which nothing is relevant counts as one without
            items.
        relaxation: P: ``"network"``, a sorting network, of which P is doubly stochastic and is not
            formed; ``"neuralsort"``, as published.
        steepness: of the network, or one over the temperature of NeuralSort.
        distribution: of the network, as in :func:`pyloss.soft_sort`.
        k: only the first k ranks; default: all.
        gain: g: ``"exponential"``, 2^y - 1, or ``"linear"``, y.
        sinkhorn: so many rounds bring the columns of NeuralSort's P to 1; 0: none.

    Returns:
        As :func:`list_net`.

    Raises:
        As :func:`list_net`.

    Example:
        >>> import torch, pyloss
        >>> relevance = torch.tensor([[3, 0, 1]])
        >>> loss = pyloss.functional.neural_ndcg_loss(1.0 * relevance, relevance, steepness=1e4)
        >>> loss.round(decimals=3).abs()
        tensor(0.)

    Reference:
        Pobrotyn, Bialobrzeski. arXiv 2102.07831.
    """
    k, sinkhorn = check_neural(relaxation, steepness, distribution, k, gain, sinkhorn, reduction)
    lists = Lists(scores, relevance, mask, offsets)
    gains, discounts = lists.gains(gain), lists.discounts(k)
    if relaxation == "network":
        ordered = soft_permute(
            lists.s, gains.unsqueeze(-1), descending=True, steepness=steepness,
            distribution=distribution, mask=lists.mask,
        ).squeeze(-1)  # fmt: skip
    else:
        p = neural_sort(lists.s, 1 / steepness, mask=lists.mask) if lists.n else lists.s[:, :, None]
        for _ in range(sinkhorn):  # rows sum to 1 at the start, and at the end
            for dim in (1, 2):
                total = p.sum(dim, keepdim=True)
                p = p / torch.where(total == 0, 1.0, total)  # what is hidden stays 0
        ordered = (p * gains.unsqueeze(1)).sum(2)
    found = (ordered * discounts).sum(1)
    return lists.reduced(*_share_lost(found, lists.ideal(gains, discounts)), reduction)


def check_neural(relaxation, steepness, distribution, k, gain, sinkhorn, reduction):
    checks.check_one_of("relaxation", relaxation, RELAXATIONS)
    checks.check_number("steepness", steepness)
    checked_settings("auto", distribution, steepness, 0.25)
    check_gain(gain)
    checks.check_reduction(reduction)
    sinkhorn = checks.checked_integer("sinkhorn", sinkhorn)
    if sinkhorn < 0:
        raise ValueError(f"sinkhorn must be at least 0, got {sinkhorn}")
    return checked_k(k), sinkhorn


def lambda_loss(
    scores: Tensor,
    relevance: Tensor,
    *,
    weighting: str = "lambdarank",
    sigma: float = 1.0,
    k: int | None = None,
    mu: float = 10.0,
    gain: str = "exponential",
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""LambdaLoss: pairs in the wrong order, weighted by what their exchange changes in NDCG.

    .. math:: \ell = \sum_{y_i > y_j} w_{ij} \log_2\big(1 + e^{-\sigma (s_i - s_j)}\big)

    With G = g(y) / IDCG, D(r) = log2(1 + r) and the ranks r of the scores, without a gradient, w is

    - ``"ranknet"``: 1
    - ``"lambdarank"``: :math:`|G_i - G_j|\, |1 / D(r_i) - 1 / D(r_j)|`
    - ``"ndcg_loss1"``: :math:`G_i / D(r_i)`
    - ``"ndcg_loss2"``: :math:`|G_i - G_j|\, |1 / D(|r_i - r_j|) - 1 / D(|r_i - r_j| + 1)|`
    - ``"ndcg_loss2++"``: that of ``"lambdarank"`` plus mu times that of ``"ndcg_loss2"``

    Args:
        scores, relevance, mask, offsets, reduction: as for :func:`list_net`. A list in which
            nothing is relevant counts as one without items.
        weighting: see above.
        sigma: > 0, of the score differences.
        k: only pairs of which one at least is among the first k; default: all.
        mu: of ``"ndcg_loss2++"``, >= 0.
        gain: g: ``"exponential"``, 2^y - 1, or ``"linear"``, y.

    Returns:
        As :func:`list_net`. Memory and time are those of the pairs, n^2 a list.

    Raises:
        As :func:`list_net`.

    Example:
        >>> import torch, pyloss
        >>> scores = torch.randn(8, 20, requires_grad=True)
        >>> relevance = torch.randint(5, (8, 20))
        >>> pyloss.functional.lambda_loss(scores, relevance, k=10).backward()

    Reference:
        Burges. From RankNet to LambdaRank to LambdaMART. MSR-TR-2010-82. Wang, Li, Golbandi,
        Bendersky, Najork. The LambdaLoss Framework for Ranking Metric Optimization. CIKM 2018.
    """
    k = check_lambda(weighting, sigma, k, mu, gain, reduction)
    lists = Lists(scores, relevance, mask, offsets)
    s, y = lists.s, lists.y
    gains = lists.gains(gain)
    ideal = lists.ideal(gains, lists.discounts(k))
    counted = ideal != 0
    rank = (lists.order(s).argsort(dim=1) + 1).to(s.dtype)
    better = y.unsqueeze(2) > y.unsqueeze(1)
    if lists.mask is not None:
        better = better & lists.pairs()
    if k is not None:
        better = better & (torch.minimum(rank.unsqueeze(2), rank.unsqueeze(1)) <= k)
    weights = _weights(gains / torch.where(counted, ideal, 1.0).unsqueeze(1), rank, weighting, mu)
    surprise = F.softplus(-sigma * (s.unsqueeze(2) - s.unsqueeze(1))) / 0.6931471805599453
    each = torch.where(better, weights * surprise, 0.0).sum((1, 2))
    return lists.reduced(each + lists.poison(), counted, reduction)


def _weights(gains: Tensor, rank: Tensor, weighting: str, mu: float) -> Tensor:
    if weighting == "ranknet":
        return torch.ones_like(gains).unsqueeze(2)
    discount = 1 / torch.log2(1 + rank)
    if weighting == "ndcg_loss1":
        return (gains * discount).unsqueeze(2)
    between = (gains.unsqueeze(2) - gains.unsqueeze(1)).abs()
    exchanged = (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()
    if weighting == "lambdarank":
        return between * exchanged
    apart = (rank.unsqueeze(2) - rank.unsqueeze(1)).abs().clamp(min=1)
    step = (1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)).abs()
    return between * (step if weighting == "ndcg_loss2" else exchanged + mu * step)


def check_lambda(weighting, sigma, k, mu, gain, reduction) -> int | None:
    checks.check_one_of("weighting", weighting, WEIGHTINGS)
    checks.check_range("sigma", sigma, 0.0, open_low=True)
    checks.check_range("mu", mu, 0.0)
    check_gain(gain)
    checks.check_reduction(reduction)
    return checked_k(k)
