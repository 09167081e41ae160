"""Losses on sets: matchings of two sets, and the search for an order in which to write one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._sorting_rows import check_ordered
from pyloss.ops._launch import accumulator_dtype

COSTS = ("l1", "l2", "nll")
MODES = ("uniform", "sample", "greedy", "beam", "exhaustive")
_EXHAUSTIVE = 7  # elements of which all orders are tried: 5040
_IMPOSSIBLE = -1e30  # a logarithm that is still a choice
_TABLE_MODES = ("exact", "uniform")


# --------------------------------------------------------------------------------------------------
# Two sets


class _Pair:
    """Costs (b, n, m) of sets side by side, and which elements count."""

    def __init__(self, input, target, cost, input_mask, target_mask, input_offsets, target_offsets):
        check_ordered("input", input)
        checks.check_tensor("target", target)
        checks.check_device("target", target, input)
        self.dtype = checks.result_dtype(input.dtype, input)
        work = accumulator_dtype(input.dtype)
        classes = cost == "nll"
        if classes:
            if target.dtype not in checks.INTEGERS:
                raise TypeError(f"target must hold classes with cost='nll', got {target.dtype}")
            target = target.long().unsqueeze(-1)
        elif not target.is_floating_point():
            raise TypeError(f"target must be floating with cost={cost!r}, got {target.dtype}")
        else:
            target = target.to(work)
        x, self.rows = _padded("input", input.to(work), input_mask, input_offsets)
        y, self.columns = _padded("target", target, target_mask, target_offsets)
        if x.shape[0] != y.shape[0] or (not classes and x.shape[2] != y.shape[2]):
            raise ValueError(
                f"input and target must hold as many sets, of as many features, got "
                f"{list(x.shape)} and {list(y.shape[:2] if classes else y.shape)}"
            )
        # Nothing that is hidden reaches a number.
        x = torch.where(self.rows.unsqueeze(2), x, 0.0)
        y = torch.where(self.columns.unsqueeze(2), y, 0)
        if classes:
            index = y.mT.expand(-1, x.shape[1], -1)
            self.cost = -x.log_softmax(-1).gather(2, index)
        else:
            between = x.unsqueeze(2) - y.unsqueeze(1)
            self.cost = between.abs().sum(-1) if cost == "l1" else (between * between).sum(-1)
        self.both = self.rows.unsqueeze(2) & self.columns.unsqueeze(1)

    def reduced(self, each: Tensor, reduction: str) -> Tensor:
        """Of the sets; one without elements on either side is none."""
        counted = self.both.flatten(1).any(1)
        each = torch.where(counted, each, 0.0)
        if reduction == "none":
            return each.to(self.dtype)
        total = each.sum()
        return (total / counted.sum() if reduction == "mean" else total).to(self.dtype)


def _padded(name: str, t: Tensor, mask, offsets) -> tuple[Tensor, Tensor]:
    """(b, n, d) and which of its elements count."""
    if offsets is not None:
        if mask is not None:
            raise ValueError(f"give {name}_mask or {name}_offsets, not both")
        if t.dim() != 2:
            raise ValueError(
                f"{name} must hold one set behind the other with {name}_offsets, (P, ...), got "
                f"{list(t.shape)}"
            )
        segment.check_offsets(offsets, t.shape[0], f"{name}_offsets")
        return segment.to_padded(t, offsets)
    if t.dim() != 3:
        raise ValueError(f"{name} must hold sets, (B, n, ...), got {list(t.shape)}")
    if mask is None:
        return t, torch.ones(t.shape[:2], dtype=torch.bool, device=t.device)
    checks.check_mask(mask, t, f"{name}_mask", t.shape[:2])
    return t, mask


def check_pair_options(
    *, cost="l1", reduction="mean", epsilon=0.1, iterations=1, return_matching=False
) -> int:
    """Those of the losses on two sets, also for their modules; gives the iterations."""
    checks.check_one_of("cost", cost, COSTS)
    checks.check_reduction(reduction)
    checks.check_range("epsilon", epsilon, 0.0, open_low=True)
    iterations = checks.checked_integer("iterations", iterations)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    return iterations


def chamfer_set_loss(
    input: Tensor,
    target: Tensor,
    *,
    cost: str = "l2",
    input_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    input_offsets: Tensor | None = None,
    target_offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Chamfer distance: each element to the nearest of the other set, both ways.

    .. math:: \ell = \frac1n \sum_i \min_j c(x_i, y_j) + \frac1m \sum_j \min_i c(x_i, y_j)

    Args:
        input: x ``(B, n, d)``, floating; or ``(P, d)`` with ``input_offsets``.
        target: y ``(B, m, d)``, floating; classes ``(B, m)`` with ``cost="nll"``; or one set behind
            the other with ``target_offsets``.
        cost: c: ``"l1"``; ``"l2"``, squared; ``"nll"``, the negative log-likelihood of a class
            under scores ``(B, n, C)``.
        input_mask, target_mask: ``(B, n)``, ``(B, m)``, bool, True at what counts.
        input_offsets, target_offsets: ``(B + 1,)``, see the arguments above; the largest set is
            looked up on the host.
        reduction: ``"mean"`` or ``"sum"`` over the sets, or ``"none"``. A pair of which one is
            empty is none: its loss is 0, and the mean does not count it.

    Returns:
        0-d, or ``(B,)``; of the dtype of ``input``, float32 for half types under autocast.
        Differentiable in both sets. A NaN makes its pair NaN.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, an option out of range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(2, 5, 3)
        >>> pyloss.functional.chamfer_set_loss(x, x.flip(1))
        tensor(0.)
    """
    check_pair_options(cost=cost, reduction=reduction)
    pair = _Pair(input, target, cost, input_mask, target_mask, input_offsets, target_offsets)
    if 0 in pair.cost.shape[1:]:
        return pair.reduced(pair.cost.sum((1, 2)), reduction)
    far = torch.where(pair.both, pair.cost, torch.inf)
    each = 0.0
    for dim, mask in ((2, pair.rows), (1, pair.columns)):
        nearest = torch.where(mask, far.amin(dim), 0.0)
        each = each + nearest.sum(1) / mask.sum(1).clamp(min=1)
    return pair.reduced(each, reduction)


def hungarian_set_loss(
    input: Tensor,
    target: Tensor,
    *,
    cost: str = "l1",
    input_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    input_offsets: Tensor | None = None,
    target_offsets: Tensor | None = None,
    reduction: str = "mean",
    return_matching: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cost of the best matching of two sets, each element to one other at most.

    .. math:: \ell = \min_{\pi} \frac{1}{\min(n, m)} \sum_{(i, j) \in \pi} c(x_i, y_j)

    The gradient is that of the costs along the matching. The matching is found on the host by
    scipy's ``linear_sum_assignment`` (``pip install pyloss[sets]``): a GPU is waited for, and there
    is no ``fullgraph=True``.

    Args:
        input, target, cost, input_mask, target_mask, input_offsets, target_offsets, reduction: as
            for :func:`chamfer_set_loss`.
        return_matching: also ``(B, m)``, int64: which element of the input each of the target is
            matched with; -1: none.

    Returns:
        As :func:`chamfer_set_loss`; or (loss, matching).

    Raises:
        As :func:`chamfer_set_loss`; ImportError without scipy.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.tensor([[[0.0], [5.0]]]), torch.tensor([[[6.0], [1.0]]])
        >>> pyloss.functional.hungarian_set_loss(x, y, return_matching=True)
        (tensor(1.), tensor([[1, 0]]))

    Reference:
        Kuhn. The Hungarian method for the assignment problem. 1955.
    """
    check_pair_options(cost=cost, reduction=reduction)
    pair = _Pair(input, target, cost, input_mask, target_mask, input_offsets, target_offsets)
    matching = _matched(pair)
    chosen = matching.clamp(min=0).unsqueeze(1)
    if pair.cost.shape[1]:
        matched = torch.where(matching >= 0, pair.cost.gather(1, chosen).squeeze(1), 0.0)
    else:
        matched = pair.cost.sum(1)
    each = matched.sum(1) / (matching >= 0).sum(1).clamp(min=1)
    nan = torch.where(pair.both, pair.cost.detach(), 0.0).isnan().flatten(1).any(1)
    loss = pair.reduced(torch.where(nan, torch.nan, each), reduction)
    return (loss, matching) if return_matching else loss


def _matched(pair: _Pair) -> Tensor:
    """(b, m): which row each column has, -1: none."""
    found = torch.full((pair.cost.shape[0], pair.cost.shape[2]), -1, dtype=torch.int64)
    costs = pair.cost.detach().nan_to_num(0.0).cpu().double()
    rows, columns = pair.rows.cpu(), pair.columns.cpu()
    for b, cost in enumerate(costs):
        i, j = rows[b].nonzero().squeeze(1), columns[b].nonzero().squeeze(1)
        left, right = assigned(cost[i][:, j])
        found[b, j[right]] = i[left]
    return found.to(pair.cost.device)


def assigned(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of the cheapest assignment of one matrix on the host."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "a matching needs scipy: pip install pyloss[sets], or pip install scipy"
        ) from error
    return tuple(torch.from_numpy(t) for t in linear_sum_assignment(cost.numpy()))


def sinkhorn_set_loss(
    input: Tensor,
    target: Tensor,
    *,
    cost: str = "l2",
    epsilon: float = 0.1,
    iterations: int = 50,
    input_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    input_offsets: Tensor | None = None,
    target_offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cost of the entropic transport between two sets: a matching with soft shares.

    .. math:: \ell = \sum_{ij} P_{ij}\, c(x_i, y_j), \qquad
              P = \arg\min_{P \mathbf{1} = \frac1n,\; P^\top \mathbf{1} = \frac1m}
              \sum_{ij} P_{ij} (c_{ij} + \varepsilon \log P_{ij})

    Args:
        input, target, cost, input_mask, target_mask, input_offsets, target_offsets, reduction: as
            for :func:`chamfer_set_loss`.
        epsilon: > 0, in units of the cost; towards 0 it is the matching of
            :func:`hungarian_set_loss` for sets of one size, and needs more iterations.
        iterations: of Sinkhorn's, in logarithms; the gradient goes through all of them, which are
            kept.

    Returns:
        As :func:`chamfer_set_loss`.

    Raises:
        As :func:`chamfer_set_loss`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[[0.0], [5.0]]])
        >>> pyloss.functional.sinkhorn_set_loss(x, x.flip(1), epsilon=0.5).round(decimals=3)
        tensor(0.)

    Reference:
        Cuturi. Sinkhorn Distances. arXiv 1306.0895.
    """
    iterations = check_pair_options(
        cost=cost, reduction=reduction, epsilon=epsilon, iterations=iterations
    )
    pair = _Pair(input, target, cost, input_mask, target_mask, input_offsets, target_offsets)
    if 0 in pair.cost.shape[1:]:
        return pair.reduced(pair.cost.sum((1, 2)), reduction)
    # Finite, so that no gradient meets infinity minus infinity; e to its power is 0.
    lowest = torch.finfo(pair.cost.dtype).min / 8
    log_k = torch.where(pair.both, -pair.cost / epsilon, lowest)
    a = -pair.rows.sum(1, keepdim=True).clamp(min=1).to(log_k.dtype).log()
    b = -pair.columns.sum(1, keepdim=True).clamp(min=1).to(log_k.dtype).log()
    f, g = torch.zeros_like(log_k[:, :, 0]), torch.zeros_like(log_k[:, 0])
    for _ in range(iterations):
        f = torch.where(pair.rows, a - (log_k + g.unsqueeze(1)).logsumexp(2), 0.0)
        g = torch.where(pair.columns, b - (log_k + f.unsqueeze(2)).logsumexp(1), 0.0)
    share = torch.where(pair.both, (log_k + f.unsqueeze(2) + g.unsqueeze(1)).exp(), 0.0)
    each = torch.where(pair.both, share * pair.cost, 0.0).sum((1, 2))
    return pair.reduced(each, reduction)


# --------------------------------------------------------------------------------------------------
# The order in which a set is written


def order_search_loss(
    step_logprob: Callable[[Tensor], Tensor],
    target_set: Tensor,
    *,
    mode: str = "sample",
    beam: int = 4,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    r"""Likelihood of a set under a sequence model, in an order that the model finds.

    .. math:: \ell = -\sum_t \log p(y_{\pi_t} \mid y_{\pi_{<t}}), \qquad \pi \text{ searched for}

    Args:
        step_logprob: called with the prefix ``(R, t)``, int64, t = 0, 1, ...; gives the logarithms
            of the probabilities of the next element, ``(R, vocabulary)``. R is B, or with
            ``"beam"`` and ``"exhaustive"``, in the search, a multiple of it: the orders of one set
            stand beside each other.
        target_set: ``(B, n)``, integers: elements of the vocabulary, equal ones allowed.
        mode: ``"uniform"``: a random order, as for a warm-up; ``"sample"``: the next element is
            drawn from those that are left by the model's probabilities; ``"greedy"``: the most
            probable of them; ``"beam"``: the best of ``beam`` orders that are followed at a time;
            ``"exhaustive"``: the best of all, at most 7 elements. Equal elements are one choice.
        beam: see ``mode``.
        temperature: > 0, of ``"sample"``.
        mask: ``(B, n)``, bool, True at what counts.
        generator: of ``"uniform"`` and ``"sample"``.
        reduction: ``"mean"`` or ``"sum"`` over the sets, or ``"none"``. An empty set is none: its
            loss is 0, and the mean does not count it.

    Returns:
        (loss, order): the loss, which alone has a gradient, and ``(B, n)``, int64: which element of
        the set is written when; what does not count stands last.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, an option out of range.

    Example:
        >>> import torch, pyloss
        >>> table = torch.log_softmax(torch.randn(3, 10), -1)  # by place alone
        >>> loss, order = pyloss.functional.order_search_loss(
        ...     lambda prefix: table[prefix.shape[1]].expand(len(prefix), -1),
        ...     torch.tensor([[4, 7, 1]]), mode="exhaustive",
        ... )
        >>> order.shape
        torch.Size([1, 3])

    Reference:
        Vinyals, Bengio, Kudlur. Order Matters: Sequence to sequence for sets. arXiv 1511.06391.
    """
    check_search(mode, beam, temperature, reduction)
    if not callable(step_logprob):
        raise TypeError(
            f"step_logprob must be a function of the prefix, got {type(step_logprob).__name__}"
        )
    mask = _checked_set(target_set, mask)
    y = target_set.long()
    if mode == "exhaustive" and y.shape[1] > _EXHAUSTIVE:
        raise ValueError(
            f"mode='exhaustive' is for at most {_EXHAUSTIVE} elements, got {y.shape[1]}; take "
            "'beam'"
        )
    order = None
    if mode in ("beam", "exhaustive"):
        width = checks.checked_integer("beam", beam)
        width = math.factorial(y.shape[1]) if mode == "exhaustive" else width
        with torch.no_grad():
            order = _best_order(step_logprob, y, mask, width)
    if mode == "uniform":
        key = torch.rand(y.shape, generator=generator, device=_device(generator, y)).to(y.device)
        order = torch.where(mask, key, 2.0).argsort(dim=1)
    left, prefix, chosen, terms = mask, y[:, :0], [], []
    for t in range(y.shape[1]):
        logp = _next(step_logprob, prefix, y)
        if order is not None:
            pick = order[:, t]
        else:
            pick = _picked(logp.detach(), y, left, mode, temperature, generator)
        counts = mask.sum(1) > t
        at = pick.unsqueeze(1)
        terms.append(torch.where(counts, logp.gather(1, at).squeeze(1), 0.0))
        chosen.append(pick)
        left = left.scatter(1, at, False)
        prefix = torch.cat([prefix, y.gather(1, at)], 1)
    each = -sum(terms) if terms else torch.zeros(y.shape[0], device=y.device)
    order = _hidden_last(torch.stack(chosen, 1), mask) if chosen else y
    some = mask.any(1)
    if reduction == "none":
        return each, order
    return (each.sum() / some.sum() if reduction == "mean" else each.sum()), order


def check_search(mode, beam, temperature, reduction) -> None:
    checks.check_one_of("mode", mode, MODES)
    if checks.checked_integer("beam", beam) < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    checks.check_range("temperature", temperature, 0.0, open_low=True)
    checks.check_reduction(reduction)


def _device(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device


def _checked_set(target_set, mask) -> Tensor:
    checks.check_tensor("target_set", target_set)
    if target_set.dtype not in checks.INTEGERS:
        raise TypeError(f"target_set must hold integers, got {target_set.dtype}")
    if target_set.dim() != 2:
        raise ValueError(f"target_set must be (B, n), got {list(target_set.shape)}")
    if mask is None:
        return torch.ones(target_set.shape, dtype=torch.bool, device=target_set.device)
    checks.check_mask(mask, target_set)
    return mask


def _next(step_logprob, prefix: Tensor, y: Tensor) -> Tensor:
    """(R, n): the logarithm of each element's probability to be the next."""
    logp = step_logprob(prefix)
    checks.check_floating("what step_logprob returns", logp)
    if logp.dim() != 2 or logp.shape[0] != prefix.shape[0]:
        raise ValueError(
            f"step_logprob must return ({prefix.shape[0]}, vocabulary), got {list(logp.shape)}"
        )
    return logp.gather(1, y)


def _first_of_equals(y: Tensor, left: Tensor) -> Tensor:
    """Which of the elements that are left have no equal one before them."""
    n = y.shape[1]
    before = torch.ones(n, n, dtype=torch.bool, device=y.device).tril(-1)
    equal = (y.unsqueeze(2) == y.unsqueeze(1)) & left.unsqueeze(1) & before
    return left & ~equal.any(2)


def _picked(logp, y, left, mode, temperature, generator) -> Tensor:
    """(B,): the next element; any where nothing is left."""
    scores = logp
    if mode == "sample":
        # The largest of Gumbel-distributed keys is a draw, without a sum of probabilities.
        noise = torch.rand(scores.shape, generator=generator, device=_device(generator, scores))
        scores = scores / temperature - (-noise.to(scores).clamp(min=1e-20).log()).log()
    # What is impossible is still before what is not left.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    return torch.where(_first_of_equals(y, left), scores, -torch.inf).argmax(1)


def _hidden_last(order: Tensor, mask: Tensor) -> Tensor:
    """The order behind the end of a set: what does not count, as it stands."""
    hidden = mask.to(torch.uint8).argsort(dim=1, stable=True)
    behind = torch.arange(order.shape[1], device=order.device) - mask.sum(1, keepdim=True)
    return torch.where(behind < 0, order, hidden.gather(1, behind.clamp(min=0)))


def _best_order(step_logprob, y: Tensor, mask: Tensor, width: int) -> Tensor:
    """(B, n): the most probable of the orders that a beam of this width finds."""
    b, n = y.shape
    if b == 0:
        return y.clone()
    orders = torch.zeros(b, 1, 0, dtype=torch.int64, device=y.device)
    total = torch.zeros(b, 1, device=y.device)
    left = mask.unsqueeze(1)
    for t in range(n):
        beams = orders.shape[1]
        elements = y.unsqueeze(1).expand(-1, beams, -1).reshape(b * beams, n)
        prefix = elements.gather(1, orders.reshape(b * beams, t))
        logp = _next(step_logprob, prefix, elements)
        choice = _first_of_equals(elements, left.reshape(b * beams, n)).view(b, beams, n)
        # Where the set is written, one way to go on, at no cost.
        done = ~left.any(2, keepdim=True)
        ends = done & (torch.arange(n, device=y.device) == 0)
        gain = logp.view(b, beams, n).to(total.dtype).clamp(min=_IMPOSSIBLE)
        gain = torch.where(choice, gain, -torch.inf)
        gain = torch.where(ends, 0.0, gain)
        scores = (total.unsqueeze(2) + gain).view(b, beams * n)
        total, at = scores.topk(min(width, beams * n), dim=1)
        keep = ~(total == -torch.inf).all(0)  # not what no set needs
        total, at = total[:, keep], at[:, keep]
        came, pick = at // n, at % n
        left = left.gather(1, came.unsqueeze(2).expand(-1, -1, n)).scatter(
            2, pick.unsqueeze(2), False
        )
        orders = torch.cat(
            [orders.gather(1, came.unsqueeze(2).expand(-1, -1, t)), pick.unsqueeze(2)], 2
        )
    return orders[:, 0]


def order_search_loss_from_table(
    logprob: Tensor,
    target_set: Tensor | None = None,
    *,
    mode: str = "exact",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    r"""The same for a model whose steps do not depend on what was written before.

    .. math:: \ell = -\max_\pi \sum_t \log p_t(y_{\pi_t})

    Args:
        logprob: ``(B, n, vocabulary)``, floating: logarithms of the probabilities at each step.
        target_set: ``(B, n)``, integers; None: the elements 0 .. n - 1 of a vocabulary of n.
        mode: ``"exact"``: the best of all orders, by trying them up to 7 elements, else by scipy's
            assignment on the host; ``"uniform"``: a random order.
        generator: of ``"uniform"``.
        reduction: ``"mean"`` or ``"sum"`` over the sets, or ``"none"``.

    Returns:
        (loss, order) as :func:`order_search_loss`; of the dtype of ``logprob``.

    Raises:
        As :func:`order_search_loss`; ImportError without scipy beyond 7 elements.

    Example:
        >>> import torch, pyloss
        >>> logprob = torch.tensor([[[0.1, 0.9], [0.9, 0.1]]]).log()
        >>> loss, order = pyloss.functional.order_search_loss_from_table(logprob)
        >>> order
        tensor([[1, 0]])

    Reference:
        Vinyals, Bengio, Kudlur. arXiv 1511.06391.
    """
    check_ordered("logprob", logprob)
    checks.check_one_of("mode", mode, _TABLE_MODES)
    checks.check_reduction(reduction)
    if logprob.dim() != 3:
        raise ValueError(f"logprob must be (B, n, vocabulary), got {list(logprob.shape)}")
    b, n, _ = logprob.shape
    gain = logprob.to(accumulator_dtype(logprob.dtype))
    if target_set is not None:
        _checked_set(target_set, None)
        if tuple(target_set.shape) != (b, n):
            raise ValueError(f"target_set must be {[b, n]}, got {list(target_set.shape)}")
        gain = gain.gather(2, target_set.long().unsqueeze(1).expand(b, n, n))
    elif logprob.shape[2] != n:
        raise ValueError(
            f"without target_set the vocabulary must be the {n} steps' elements, got "
            f"{logprob.shape[2]}"
        )
    if mode == "uniform":
        key = torch.rand((b, n), generator=generator, device=_device(generator, logprob))
        order = key.argsort(dim=1).to(logprob.device)
    elif n <= _EXHAUSTIVE:
        order = _best_of_all(gain.detach())
    else:
        costs = -gain.detach().nan_to_num(0.0, 1e30, -1e30).cpu().double()
        found = [assigned(c)[1] for c in costs]
        order = torch.stack(found) if found else torch.zeros(b, n, dtype=torch.int64)
        order = order.to(logprob.device)
    each = -gain.gather(2, order.unsqueeze(2)).squeeze(2).sum(1)
    each = torch.where(gain.detach().isnan().flatten(1).any(1), torch.nan, each)
    result = checks.result_dtype(logprob.dtype, logprob)
    if reduction == "none":
        return each.to(result), order
    return getattr(each, reduction)().to(result), order


def _all_orders(n: int, device: torch.device) -> Tensor:
    """(n!, n), as itertools.permutations lists them; made there, as a copy would wait for a GPU."""
    orders = torch.zeros((1, 0), dtype=torch.int64, device=device)
    for size in range(1, n + 1):
        first = torch.arange(size, device=device).view(-1, 1, 1)
        rest = orders + (orders >= first)
        orders = torch.cat([first.expand(-1, rest.shape[1], 1), rest], 2).flatten(0, 1)
    return orders


def _best_of_all(gain: Tensor) -> Tensor:
    """(b, n): of each step its element, in the best of n! orders."""
    n = gain.shape[1]
    orders = _all_orders(n, gain.device)
    steps = torch.arange(n, device=gain.device)
    totals = gain[:, steps, orders.view(-1, n)].sum(2)  # (b, n!)
    return orders.view(-1, n)[totals.nan_to_num(nan=0.0).argmax(1)]
