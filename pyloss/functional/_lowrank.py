"""What low-rank tensor attention promises on given inputs, and when it is used.

How far the scores can be from 0 follows from the entries, by Hoelder's inequality; how far the
output is then from exact attention follows from the polynomial (pyloss.functional._polynomials).

Imported with the first call that needs it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _polynomials as polynomials
from pyloss.functional._polynomials import Polynomial
from pyloss.ops._deferred import when_known
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import functorch_active
from pyloss.ops.tensor_attention_lowrank.largest import largest_entry
from pyloss.ops.tensor_attention_lowrank.plan import MOST_DEGREE, MOST_STATE_BYTES, check_states
from pyloss.ops.tensor_attention_lowrank.plan import rank as rank_of
from pyloss.ops.tensor_attention_lowrank.rounding import allows_tf32, sum_error

_FIT_SAMPLES = 20000
# Low rank has to save this factor of the operations before "auto" takes it: its rate is lower, and
# lower still where every token has to leave its windows again (docs/tensor_attention_lowrank.md).
_GAIN, _GAIN_OF_WINDOWS = 5.0, 10.0

_MOST_PROMISES = 1024

_promises: dict[tuple[Any, ...], Promise] = {}
_warned: set[tuple[Any, ...]] = set()


class Options(NamedTuple):
    """The low-rank part of a call's arguments, checked."""

    method: str = "exact"
    degree: int | None = None
    poly: str = "taylor"
    tol: float = 1e-2
    check: str = "warn"
    logit_bound: float | None = None

    def constants(self) -> Options:
        if not torch.compiler.is_compiling():
            return self
        tol, bound = constant(self.tol), self.logit_bound
        bound = bound and constant(bound)
        return Options(self.method, self.degree, self.poly, tol, self.check, bound)


def constant(value: float) -> float:
    """A number that the degree or the coefficients depend on: no variable of a compiled graph."""
    if not torch.compiler.is_compiling() or not abs(value) < math.inf:
        return value
    # A graph has no variables of such integers. (guard_scalar of torch.fx does the same, is
    # experimental, and costs 0.4 s to import.)
    numerator, denominator = value.as_integer_ratio()
    return numerator / denominator


class Problem:
    """Checked tensors and what else decides about them; keys and q in the product form."""

    def __init__(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        value_width: int,
        key_masks: Sequence[Tensor | None],
        scale: float,
        causal: bool,
        windows: Sequence[int],
        device: str = "cpu",  # type of the device that will compute
    ) -> None:
        self.q, self.keys, self.value_width, self.key_masks = q, keys, value_width, key_masks
        self.scale, self.causal, self.windows, self.device = scale, causal, windows, device

    @property
    def order(self) -> int:
        return len(self.keys)

    @property
    def features(self) -> int:
        return self.q.shape[3]

    @property
    def longest(self) -> int:
        return max(k.shape[2] for k in self.keys)

    def without_numbers(self) -> Problem:
        """For a judgement later, when the tensors may be gone."""
        return Problem(
            self.q.new_empty((), device="meta").expand(self.q.shape),
            [k.new_empty((), device="meta").expand(k.shape) for k in self.keys],
            self.value_width, [None] * self.order, self.scale, self.causal, self.windows,
            self.device,
        )  # fmt: skip

    def tuples(self) -> float:
        """Tuples of keys that a query sees, on average and about; the queries are the last."""
        lengths = [k.shape[2] for k in self.keys]
        if not self.causal:
            spans = [min(n, 2 * w - 1) if w else n for n, w in zip(lengths, self.windows)]
            return float(math.prod(spans))
        # Of axis x the query at i sees min(i, span_x) keys: between two spans a power of i.
        spans = _sorted([torch.sym_min(n, w) if w else n for n, w in zip(lengths, self.windows)])
        end = _sorted(lengths)[-1]
        begin = low = torch.sym_max(end - self.q.shape[2], 0)
        total, limited = 0.0, 1.0
        for power, span in zip(range(self.order + 1, 0, -1), [*spans, end]):
            high = torch.sym_max(low, span)
            total += limited * (high**power - low**power) / power
            limited, low = limited * span, high
        return total / torch.sym_max(end - begin, 1)

    def state_bytes(self, rank: int) -> int:
        batch, groups = self.keys[0].shape[:2]
        item = accumulator_dtype(self.q.dtype).itemsize
        return self.order * batch * groups * rank * (self.value_width + 1) * item

    def flops(self, rank: int) -> tuple[float, float]:
        """(exact, low rank) per head, forward."""
        n_q = self.q.shape[2]
        exact = 2.0 * n_q * self.tuples() * (self.features + self.value_width)
        tokens = n_q + sum(k.shape[2] for k in self.keys)
        return exact, tokens * rank * (2.0 * (self.value_width + 1) + 1.0)


def _sorted(sizes: Sequence[int]) -> list[int]:
    """Ascending; of sizes of a compiled graph, too, without a guard on their order."""
    found = list(sizes)
    for end in range(len(found) - 1, 0, -1):
        for at in range(end):
            a, b = found[at], found[at + 1]
            found[at], found[at + 1] = torch.sym_min(a, b), torch.sym_max(a, b)
    return found


# --------------------------------------------------------------------------------------------------
# The range of the scores


def _kept(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t.masked_fill(~mask.unsqueeze(-1), 0.0)


def _of_heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _axes(p: Problem) -> list[Tensor]:
    return [p.q.detach(), *(_kept(k.detach(), m) for k, m in zip(p.keys, p.key_masks))]


def _empty(p: Problem) -> bool:
    return p.q.numel() == 0 or any(k.numel() == 0 for k in p.keys)


def largest_entries(p: Problem) -> list[float]:
    """max |t| of q and each tensor of keys, of padding too; NaN where one is."""
    return [largest_entry(t) for t in (p.q, *p.keys) if t.numel()]


def bound_by_entries(p: Problem, largest: Sequence[float]) -> float:
    """|s| d max |q| prod_x max |k_x|: coarser than the next two, and a few microseconds."""
    return _finite(abs(p.scale) * p.features * math.prod(largest))


def bound_by_features(p: Problem) -> Tensor:
    """max over heads of |s| sum_l max_i |q_il| prod_x max_j |k_x,jl|, a float64 scalar."""
    product = None
    for t in _axes(p):
        most = _of_heads(_largest_entries(t.abs()).double(), p.q.shape[1])
        product = most if product is None else product * most
    return abs(p.scale) * product.sum(-1).max()


def _largest_entries(t: Tensor) -> Tensor:
    """amax over the tokens, by rows of 64 numbers at least: fewer go one by one on CPUs."""
    fold = max(1, 64 // t.shape[3])
    whole = t.shape[2] // fold * fold
    if fold == 1 or whole == 0:
        return t.amax(2)
    found = t[:, :, :whole].reshape(*t.shape[:2], -1, fold * t.shape[3]).amax(2)
    found = found.unflatten(2, (fold, -1)).amax(2)
    return found if whole == t.shape[2] else torch.maximum(found, t[:, :, whole:].amax(2))


def bound_by_norms(p: Problem) -> Tensor:
    """max over heads of |s| max_i ||q_i|| prod_x max_j ||k_x,j||, norms of exponent m + 1."""
    product = None
    exponent = p.order + 1
    for t in _axes(p):
        t = t.to(accumulator_dtype(t.dtype)).abs()
        # Powers of entries up to 1 do not overflow, nor are those of a whole head lost.
        top = t.amax((2, 3), keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)
        sums = (t / top).pow(exponent).sum(-1).amax(2).double()
        most = _of_heads(sums.pow(1.0 / exponent) * top[..., 0, 0].double(), p.q.shape[1])
        product = most if product is None else product * most
    # The norms are sums in float32.
    return abs(p.scale) * product.max() * (1.0 + 1e-6 * p.features)


def _finite(radius: float) -> float:
    return math.inf if math.isnan(radius) else radius


def measured_bound(p: Problem) -> float:
    """The least bound of |S| known."""
    if _empty(p):
        return 0.0
    return min(_finite(bound(p).item()) for bound in (bound_by_norms, bound_by_features))


def sampled_scores(p: Problem, count: int, seed: int = 0) -> Tensor:
    """Scores of random queries and kept keys, float64."""
    if _empty(p):
        return torch.zeros(1, dtype=torch.float64)
    batch, heads, n_q, _ = p.q.shape
    groups = p.keys[0].shape[1]
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> Tensor:
        return torch.randint(0, most, (count,), generator=generator).to(p.q.device)

    b, h = draw(batch), draw(heads)
    g = h // (heads // groups)
    product = p.q.detach()[b, h, draw(n_q)].double() * p.scale
    kept = torch.ones(count, dtype=torch.bool, device=p.q.device)
    for k, mask in zip(p.keys, p.key_masks):
        j = draw(k.shape[2])
        product = product * k.detach()[b, g, j].double()
        if mask is not None:
            kept &= mask[b, g if mask.shape[1] > 1 else 0, j]
    scores = product.sum(-1)[kept]
    return scores if scores.numel() else scores.new_zeros(1)


# --------------------------------------------------------------------------------------------------
# Bounds


def rounding_bound(p: Problem, condition: float, rank: int, degree: int) -> float:
    """What floating point adds to the bound, in units of the largest |v_1 ... v_m|.

    Numerator and denominator are sums of products; `condition` is the sum of the absolute terms
    over the denominator at most.
    """
    acc = accumulator_dtype(p.q.dtype)
    lengths = [k.shape[2] for k in p.keys]
    batch, heads, queries, _ = p.q.shape
    found = sum_error(
        p.device, acc, queries, lengths, p.windows, p.causal, batch * heads, p.features,
        p.value_width, rank, degree,
    )  # fmt: skip
    off = found * condition
    store = 0.0 if p.q.dtype == acc else torch.finfo(p.q.dtype).eps / 2
    return 2.0 * off / (1.0 - off) + store if off < 1.0 else math.inf


class Promise(NamedTuple):
    """What a polynomial holds for scores within [-radius, radius]."""

    polynomial: Polynomial
    radius: float
    delta: float
    bound: float  # of |out - exact|, in units of the largest |v_1 ... v_m|
    bound_lse: float
    rounding: float  # the part of both that no degree makes smaller
    rank: int


def promise(p: Problem, polynomial: Polynomial, radius: float) -> Promise:
    if torch.compiler.is_compiling():
        return _promise(p, polynomial, radius)
    # The same sizes and nearly the same radius come again, in training above all.
    key = (
        p.q.dtype, p.q.shape, *(k.shape[2] for k in p.keys), p.value_width, *p.windows, p.causal,
        p.device, p.device == "cuda" and allows_tf32(), polynomial, _rounded_up(radius),
    )  # fmt: skip
    found = _promises.get(key)
    if found is None:
        if len(_promises) >= _MOST_PROMISES:
            _promises.clear()
        found = _promises[key] = _promise(p, polynomial, radius)
    return found._replace(radius=radius)


def _promise(p: Problem, polynomial: Polynomial, radius: float) -> Promise:
    found = polynomials.accuracy(polynomial, _rounded_up(radius))
    r = rank_of(p.features, polynomial.degree())
    rounding = math.inf
    if math.isfinite(found.condition):
        rounding = rounding_bound(p, found.condition, r, polynomial.degree())
    bound = polynomials.weight_bound(found.delta) + rounding
    lse = math.inf
    if found.low > 0.0 and math.isfinite(found.high):
        lse = max(-math.log(found.low), math.log(found.high), 0.0) + rounding
    return Promise(polynomial, radius, found.delta, bound, lse, rounding, r)


def _rounded_up(radius: float) -> float:
    """To three digits, so that the accuracy of a polynomial is looked up, not computed."""
    if not math.isfinite(radius) or radius <= 0.0:
        return radius
    step = 10.0 ** (math.floor(math.log10(radius)) - 2)
    return math.ceil(radius / step) * step


class Family:
    """The polynomials of a kind for scores up to a radius."""

    def __init__(self, p: Problem, poly: str, radius: float) -> None:
        self.problem, self.poly, self.radius = p, poly, radius
        self._samples: tuple[Tensor, Tensor] | None = None

    def of(self, degree: int) -> Polynomial | None:
        """None where there is none on such a range."""
        if self.poly == "taylor":
            return polynomials.taylor(degree)
        if not math.isfinite(self.radius) or self.radius > 80.0:
            return None
        if self.poly == "chebyshev":
            return polynomials.chebyshev(degree, _rounded_up(self.radius))
        if self._samples is None:
            self._samples = polynomials.clustered(sampled_scores(self.problem, _FIT_SAMPLES))
        return polynomials.fit(degree, self._samples)


def least_degree(family: Family, tol: float, most_rank: float = math.inf) -> Promise | None:
    """The Promise of the least degree with a bound of at most tol."""
    p = family.problem
    for degree in range(1, MOST_DEGREE + 1):
        r = rank_of(p.features, degree)
        if r > most_rank or p.state_bytes(r) > MOST_STATE_BYTES:
            return None
        polynomial = family.of(degree)
        if polynomial is None:
            return None
        found = promise(p, polynomial, family.radius)
        if found.bound <= tol:
            return found
        if tol < found.rounding < math.inf:
            return None
    return None


# --------------------------------------------------------------------------------------------------
# The choice


class Choice(NamedTuple):
    polynomial: Polynomial
    largest: list[float] | None = None  # largest_entries, where they were looked at


def choose(p: Problem, options: Options) -> Choice | None:
    """What the low-rank form takes, or None for exact attention (method "auto" only)."""
    return _auto(p, options) if options.method == "auto" else _lowrank(p, options)


def evened(p: Problem, options: Options, choice: Choice) -> tuple[Tensor, Sequence[Tensor], float]:
    """(q, keys, scale) whose powers do not leave the range of numbers; as they are, mostly.

    What nobody has looked at, or what a GPU would have to be waited for, stays as it is.
    """
    unlooked = options.check == "none" and options.method == "lowrank"
    unlooked = unlooked or options.logit_bound is not None or p.q.device.type != "cpu"
    if not unlooked and _measurable(p):
        largest = choice.largest or largest_entries(p)
        # As many factors of 2^24 as there are axes, times the least number of float32, are nothing.
        limit = 2.0 ** (24.0 / choice.polynomial.degree())
        if not all(most <= limit for most in (abs(p.scale), *largest)):
            from pyloss.functional._lowrank_even import even

            features = [
                _largest_entries(k.abs()) if k.numel() else k.new_zeros((*k.shape[:2], k.shape[3]))
                for k in _axes(p)[1:]
            ]
            return *even(p.q, p.keys, features, p.scale), 1.0
    return p.q, p.keys, p.scale


def _traceable(options: Options) -> bool:
    """Whether the accuracy is a formula, which torch.compile can follow; others need a grid."""
    return options.poly == "taylor" or not torch.compiler.is_compiling()


def _measurable(p: Problem) -> bool:
    """Whether Python may look at the numbers now."""
    return not (p.q.is_meta or torch.compiler.is_compiling() or functorch_active())


def _auto(p: Problem, options: Options) -> Choice | None:
    n_q = p.q.shape[2]
    tokens = n_q + sum(k.shape[2] for k in p.keys)
    most = p.tuples() * n_q * (p.features + p.value_width)
    most /= (_GAIN_OF_WINDOWS if any(p.windows) else _GAIN) * max(tokens, 1) * (p.value_width + 1)
    least = rank_of(p.features, options.degree or 1)
    if least >= most or p.state_bytes(least) > MOST_STATE_BYTES:
        return None
    if not _traceable(options) or options.poly == "fit" and not _measurable(p):
        return None
    radius = options.logit_bound
    if radius is None:
        if p.q.device.type != "cpu" or not _measurable(p):
            return None  # looking would wait for the device
        radius = measured_bound(p)
    family = Family(p, options.poly, radius)
    if options.degree is None:
        found = least_degree(family, options.tol, most)
    else:
        polynomial = family.of(options.degree)
        found = None if polynomial is None else promise(p, polynomial, radius)
    return None if found is None or found.bound > options.tol else Choice(found.polynomial)


def _lowrank(p: Problem, options: Options) -> Choice:
    radius = options.logit_bound
    if options.poly == "fit" and not _measurable(p):
        raise ValueError(
            'poly="fit" looks at the numbers in q and the keys, which torch.compile, transforms '
            'and meta tensors do not allow; take poly="taylor" or "chebyshev"'
        )
    needs_radius = options.degree is None or options.poly != "taylor"
    wants_radius = needs_radius or options.check == "strict"
    if not _traceable(options) and (options.degree is None or options.check == "strict"):
        raise ValueError(
            f"poly={options.poly!r} under torch.compile needs a degree, and cannot be checked there"
        )
    if radius is None and wants_radius:
        if not _measurable(p):
            raise ValueError(
                'method="lowrank" without logit_bound looks at the numbers in q and the keys for '
                'degree=None, poly="chebyshev" or "fit" and check="strict", which torch.compile, '
                "transforms and meta tensors do not allow; give logit_bound, or a degree with "
                'poly="taylor"'
            )
        radius = measured_bound(p)
    if options.degree is None:
        found = least_degree(Family(p, options.poly, radius), options.tol)
        if found is None:
            raise ValueError(
                f'method="lowrank" found no degree for tol = {options.tol:g}: '
                + _numbers(p, radius)
                + '; give a degree to try it all the same, or use method="exact"'
            )
        return Choice(found.polynomial)
    check_states(p.features, options.degree, p.state_bytes(rank_of(p.features, options.degree)))
    polynomial = Family(p, options.poly, radius).of(options.degree)
    if polynomial is None:
        raise ValueError(
            f"poly={options.poly!r} needs scores within [-80, 80]: " + _numbers(p, radius)
        )
    if options.check == "strict" or options.check == "warn" and not torch.compiler.is_compiling():
        return Choice(polynomial, _check(p, options, polynomial, radius))
    return Choice(polynomial)


def _check(p: Problem, options: Options, polynomial: Polynomial, radius: float | None):
    """Warns or raises; returns the largest entries where it looked at them."""
    largest = None
    if radius is None:
        if not _measurable(p):
            return None
        if p.q.is_cuda:
            if not _empty(p):
                bound = torch.minimum(bound_by_features(p), bound_by_norms(p))
                shape = p.without_numbers()
                when_known(bound, lambda value: _judge(shape, options, polynomial, _finite(value)))
            return None
        # Where a cheaper bound is good enough, the others need not be formed.
        if _empty(p):
            return None
        if all(mask is None for mask in p.key_masks):
            largest = largest_entries(p)
            if promise(p, polynomial, bound_by_entries(p, largest)).bound <= options.tol:
                return largest
        if promise(p, polynomial, _finite(bound_by_features(p).item())).bound <= options.tol:
            return largest
        radius = measured_bound(p)
    _judge(p, options, polynomial, radius)
    return largest


def _judge(p: Problem, options: Options, polynomial: Polynomial, radius: float) -> None:
    found = promise(p, polynomial, radius)
    if found.bound <= options.tol:
        return
    better = least_degree(Family(p, options.poly, radius), options.tol)
    text = (
        f'method="lowrank", degree {polynomial.degree()} ({options.poly}): the output may be off '
        f"by {found.bound:.2g} times the largest |v1 v2|, more than tol = {options.tol:g}: "
        + _numbers(p, radius)
        + f", where the polynomial is exp within delta = {found.delta:.2g}; "
        + (
            f"degree {better.polynomial.degree()} with {better.rank} features would do, or "
            if better
            else "no degree would do, as far as memory and rounding go; "
        )
        + 'use smaller q and k, or method="exact"'
    )
    if options.check == "strict":
        raise ValueError(text)
    key = (p.features, p.order, polynomial.degree(), options.poly, options.tol)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stacklevel, for who calls this, of the first frame that is not ours or torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("pyloss.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def entry_bound(p: Problem, radius: float) -> float:
    """B such that entries of B at scale 1/d give scores up to radius = B^(m+1)."""
    return radius ** (1.0 / (p.order + 1))


def hardness(p: Problem) -> float:
    """(ln n)^(1/(m+1)), the order of B from which nothing nearly linear can exist."""
    return math.log(max(p.longest, 2)) ** (1.0 / (p.order + 1))


def _numbers(p: Problem, radius: float) -> str:
    m = p.order
    return (
        f"scores reach up to {radius:.3g}, as with entries up to B = {entry_bound(p, radius):.2f} "
        f"at scale 1/d, while under SETH no method is faster than n^{m + 1} in general once B is "
        f"of the order of (ln n)^(1/{m + 1}) = {hardness(p):.2f} (n = {p.longest})"
    )


# --------------------------------------------------------------------------------------------------
# The report


def report(p: Problem, options: Options, values: Sequence[Tensor] | None, samples: int):
    """The dict of tensor_attention_error."""
    radius = measured_bound(p) if options.logit_bound is None else float(options.logit_bound)
    family = Family(p, options.poly, radius)
    better = least_degree(family, options.tol)
    if options.degree is None:
        found = better
        if found is None:
            raise ValueError(f"no degree for tol = {options.tol:g}: " + _numbers(p, radius))
    else:
        polynomial = family.of(options.degree)
        if polynomial is None:
            raise ValueError(
                f"poly={options.poly!r} needs scores within [-80, 80]: " + _numbers(p, radius)
            )
        found = promise(p, polynomial, radius)
    exact, low = p.flops(found.rank)
    result: dict[str, float | int | None] = {
        "R_bound": radius,
        "R_sampled": sampled_scores(p, samples).abs().max().item(),
        "degree": found.polynomial.degree(),
        "rank": found.rank,
        "delta": found.delta,
        "bound": found.bound,
        "bound_lse": found.bound_lse,
        "degree_needed": None if better is None else better.polynomial.degree(),
        "flops_ratio": exact / low if low else math.inf,
        "entry_bound": entry_bound(p, radius),
        "hardness": hardness(p),
    }
    if values is not None:
        # Below the least normal number roundings are steps of one size.
        store, acc = (torch.finfo(t) for t in (p.q.dtype, accumulator_dtype(p.q.dtype)))
        least = store.smallest_normal * store.eps + found.rank * acc.smallest_normal * acc.eps
        result["bound_out"] = found.bound * _largest_values(p, values) + least
    return result


def _largest_values(p: Problem, values: Sequence[Tensor]) -> float:
    product = None
    for v, mask in zip(values, p.key_masks):
        if v.numel() == 0:
            return 0.0
        most = _kept(v.detach(), mask).abs().amax(2).double()
        product = most if product is None else product * most
    return product.max().item()
