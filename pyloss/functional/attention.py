"""Tensor attention: softmax attention over pairs, triples, ... of keys, never stored."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops import tensor_attention as op
from pyloss.ops import tensor_attention_lowrank as lowrank_op
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import functorch_active
from pyloss.ops.tensor_attention import order as orders
from pyloss.ops.tensor_attention_lowrank.plan import MOST_DEGREE

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_METHODS = ("exact", "lowrank", "auto")
_POLYNOMIALS = ("taylor", "chebyshev", "fit")
_CHECKS = ("warn", "strict", "none")

Window = int | None | Sequence[int | None]


def tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    attn_mask: Tensor | None = None,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    is_causal: bool | None = None,
    window: Window = None,
    q_offset: int | None = None,
    scale: float | str | None = None,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    form: str = "product",
    enable_gqa: bool = False,
    method: str = "exact",
    degree: int | None = None,
    poly: str = "taylor",
    tol: float = 1e-2,
    check: str = "warn",
    logit_bound: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over all pairs (j, k) of keys, in O(n d) memory.

    In the layout and manner of :func:`torch.nn.functional.scaled_dot_product_attention`:

    .. math::
        S_{ijk} = s \sum_l q_{il}\, k^1_{jl}\, k^2_{kl} + b^1_{ij} + b^2_{ik}, \qquad
        \mathrm{out}_{ic} = \sum_{jk} \mathrm{softmax}_{jk}(S)_{ijk}\, v^1_{jc}\, v^2_{kc}

    Costs 4 n^3 d operations forward and 10 n^3 d backward per head, n w1 w2 for n^3 with windows.
    With ``k2 = v2 = 1`` it is ordinary attention over k1, v1.

    ``method="lowrank"`` puts a polynomial of degree g in the place of exp and costs 6 n r d
    forward, r = C(d + g, g), linear in n: an approximation, good where the scores are
    small, with a bound of its error in :func:`tensor_attention_error`.

    Args:
        q: queries ``(B, H, n_q, d)``; float32, bfloat16, float16 or float64.
        k1, k2: keys ``(B, G, n_1, d)`` and ``(B, G, n_2, d)``, G = H unless ``enable_gqa``.
        v1, v2: values ``(B, G, n_1, dv)`` and ``(B, G, n_2, dv)``; dv may differ from d.
        attn_mask: one mask for both axes (n_1 = n_2): added to, or combined with, the next two.
        mask1, mask2: masks of the pairs (i, j) and (i, k), broadcast to ``(B, H, n_q, n_1)`` and
            ``(B, H, n_q, n_2)``: bool (True: keep) or floating and added to S, then with a gradient
            if they require one. Key padding is ``(B, 1, 1, n)``.
        is_causal: query i, at position p = i + ``q_offset``, sees j <= p and k <= p. None: causal
            if there is a window.
        window: ``(w1, w2)``, or one number for both: p - w1 < j <= p and p - w2 < k <= p; without
            causality (``is_causal=False``) \|p - j\| < w1. None or -1: no limit.
        q_offset: position of query 0. Default 0, and required where a causal mask or a window meets
            lengths that differ.
        scale: s; None: ``d ** -0.5``; ``"kronecker"``: 1/d, that of the paper; or a number.
        kv_bias: numbers ``(b_k, b_v)`` added to k2 and v2.
        form: ``"product"``, or ``"determinant"``: S sums the determinants of (q, k1, k2) over
            triples of features, which rotations of all three leave unchanged; d divisible by 3.
        enable_gqa: query head h uses key head h // (H / G).
        method: ``"exact"``; ``"lowrank"``; or ``"auto"``: low rank where it needs less than a fifth
            of the operations (a tenth with windows) and its error is at most ``tol``, else exact.
            Low rank takes masks of keys only, equal for all queries, next to causality and windows;
            ``"auto"`` takes exact for the rest, and where it would have to wait for a GPU: there it
            needs ``logit_bound``.
        degree: g of the polynomial; None: the least that keeps ``tol``.
        poly: ``"taylor"`` (at 0), ``"chebyshev"`` (interpolates on the range of S), or ``"fit"``
            (least squares over sampled scores; best on the data, for inference). The last two, as
            ``degree=None``, look at the numbers in q and the keys, and wait for a GPU to have them;
            Chebyshev does not with ``logit_bound``.
        tol: error of the output that is fine, in units of the largest \|v1 v2\|.
        check: where the bound of ``"lowrank"`` exceeds ``tol``: ``"warn"`` once, raise
            (``"strict"``, waits for a GPU), or do not look (``"none"``). A warning about numbers
            on a GPU comes with a later call, none comes under torch.compile and transforms. Who
            looks on a CPU also evens out entries whose powers would overflow or vanish.
        logit_bound: a bound of \|S\| that the caller vouches for, in place of the one measured.
        dropout_p: only 0 at present.
        return_lse: also return ``lse``, the logsumexp of S over (j, k); differentiable.
        deterministic: accepted; the kernels always are.

    Returns:
        out ``(B, H, n_q, dv)`` in the dtype of ``q``, or the pair ``(out, lse)``, lse
        ``(B, H, n_q)`` in float32 (float64 for float64). A query that sees no pair gets 0 and
        -inf, and gradients 0. First derivatives only.

    Raises:
        ValueError: shapes, heads or lengths that do not fit, d = 0, a window of 0, causality over
            unequal lengths without ``q_offset``, an unknown option. For ``"lowrank"`` also masks of
            pairs, biases and dropout, states above 2 GiB, no degree that keeps ``tol``
            (``degree=None``), a bound above ``tol`` (``check="strict"``).
        TypeError: not a tensor, dtypes that differ, integer inputs.
        RuntimeError: devices that differ; a second derivative; ``"lowrank"`` on a CPU where the sum
            of the polynomial over all pairs is not positive and finite for some query.
        NotImplementedError: ``dropout_p`` > 0.

    Example:
        >>> import torch, pyloss
        >>> q, k1, k2, v1, v2 = torch.randn(5, 2, 4, 50, 16, requires_grad=True)
        >>> out = pyloss.tensor_attention(q, k1, k2, v1, v2, window=(8, 32))
        >>> out.shape
        torch.Size([2, 4, 50, 16])
        >>> out.sum().backward()
        >>> q, k1, k2, v1, v2 = torch.rand(5, 1, 2, 300, 8)
        >>> near = pyloss.tensor_attention(
        ...     q, k1, k2, v1, v2, scale="kronecker", method="lowrank", degree=3, tol=0.1)
        >>> exact = pyloss.tensor_attention(q, k1, k2, v1, v2, scale="kronecker")
        >>> bool((near - exact).abs().max() < 0.01)
        True

    Reference:
        Alman, Song. How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention
        to Kronecker Computation. arXiv 2310.04064. Windows: Roy et al. Fast and Simplex.
        arXiv 2507.02754. Determinant form: Clift et al. Logic and the 2-Simplicial Transformer.
        arXiv 1909.00668.
    """
    _check_choices(method, form, dropout_p)
    options = _checked_options(method, degree, poly, tol, check, logit_bound)
    q, keys, values = _checked_tensors(
        q, (k1, k2), (v1, v2), enable_gqa, ("k1", "k2"), ("v1", "v2")
    )
    given, names = (mask1, mask2), ("mask1", "mask2")
    causal, windows, offset = _checked_band(q, keys, is_causal, window, q_offset)
    s = _checked_scale(scale, q.shape[3])
    bk, bv = _checked_bias(kv_bias)
    if form == "determinant":
        q, keys, bk = _determinant(q, keys, bk)
    if method != "exact":
        shifted, moved = _shifted(keys, values, bk, bv, accumulator_dtype(q.dtype))
        band = (s, causal, windows, offset)
        found = _low_rank(
            q, shifted, moved, (attn_mask, *given), ("attn_mask", *names), band, options
        )
        if found is not None:
            return found if return_lse else found[0]
    masks = _checked_masks(q, keys, attn_mask, given, names)
    settings = op.Settings(s, causal, *windows, offset, bk, bv)
    out, lse = op.tensor_attention(q, *keys, *values, *masks, settings)
    return (out, lse) if return_lse else out


def tensor_attention_n(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    attn_mask: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    is_causal: bool | None = None,
    window: Window = None,
    q_offset: int | None = None,
    scale: float | str | None = None,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    enable_gqa: bool = False,
    method: str = "exact",
    degree: int | None = None,
    poly: str = "taylor",
    tol: float = 1e-2,
    check: str = "warn",
    logit_bound: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Tensor attention of any order m: over all m-tuples of keys.

    .. math::
        S_{i j_1 \dots j_m} = s \sum_l q_{il} \prod_x k^x_{j_x l} + \sum_x b^x_{i j_x}, \qquad
        \mathrm{out}_{ic} = \sum_{j_1 \dots j_m} \mathrm{softmax}(S)_{i j_1 \dots j_m}
        \prod_x v^x_{j_x c}

    m = 1 is ordinary attention (that of torch where it has the case), m = 2 is
    :func:`tensor_attention`, a higher order runs order m - 1 once for each key of the first axis:
    4 n^(m+1) d operations forward, 14 n^(m+1) d backward, O(m n d) memory. Low rank costs
    2 (m + 1) n r d whatever the order.

    Args:
        q: queries ``(B, H, n_q, d)``.
        keys, values: m tensors ``(B, G, n_x, d)`` and m ``(B, G, n_x, dv)``.
        attn_mask: one mask for all axes.
        masks: m masks or None, as ``mask1`` of :func:`tensor_attention`. A gradient for them only
            where m < 3.
        window: one number or m of them.
        kv_bias: added to the last keys and values.
        is_causal, q_offset, scale, enable_gqa, return_lse, method, degree, poly, tol, check,
            logit_bound: as in :func:`tensor_attention`.

    Returns:
        As :func:`tensor_attention`.

    Raises:
        ValueError: no keys, as many values as keys are needed, and as :func:`tensor_attention`.
        NotImplementedError: a mask that requires a gradient with m > 2.

    Example:
        >>> import torch, pyloss
        >>> q = torch.randn(1, 2, 9, 8)
        >>> keys, values = torch.randn(3, 1, 2, 9, 8), torch.randn(3, 1, 2, 9, 8)
        >>> pyloss.functional.tensor_attention_n(q, keys, values, is_causal=True).shape
        torch.Size([1, 2, 9, 8])

    Reference:
        Alman, Song. arXiv 2310.04064. Liang et al. Tensor Attention Training: Provably Efficient
        Learning of Higher-order Transformers. arXiv 2405.16411.
    """
    keys, values = tuple(keys), tuple(values)
    order = len(keys)
    if order == 0 or len(values) != order:
        raise ValueError(
            f"keys and values must be as many, and at least one, got {order} and {len(values)}"
        )
    key_names = tuple(f"keys[{x}]" for x in range(order))
    value_names = tuple(f"values[{x}]" for x in range(order))
    mask_names = tuple(f"masks[{x}]" for x in range(order))
    masks = (None,) * order if masks is None else tuple(masks)
    if len(masks) != order:
        raise ValueError(f"masks must be {order}, one per axis, got {len(masks)}")
    _check_choices(method, "product", 0.0)
    options = _checked_options(method, degree, poly, tol, check, logit_bound)
    q, keys, values = _checked_tensors(q, keys, values, enable_gqa, key_names, value_names)
    causal, windows, offset = _checked_band(q, keys, is_causal, window, q_offset)
    s = _checked_scale(scale, q.shape[3])
    bk, bv = _checked_bias(kv_bias)
    if method != "exact":
        shifted, moved = _shifted(keys, values, bk, bv, accumulator_dtype(q.dtype))
        band = (s, causal, windows, offset)
        given, names = (attn_mask, *masks), ("attn_mask", *mask_names)
        found = _low_rank(q, shifted, moved, given, names, band, options)
        if found is not None:
            return found if return_lse else found[0]
    masks = _checked_masks(q, keys, attn_mask, masks, mask_names)
    if order == 2:
        settings = op.Settings(s, causal, *windows, offset, bk, bv)
        out, lse = op.tensor_attention(q, *keys, *values, *masks, settings)
        return (out, lse) if return_lse else out

    keys, values = _shifted(keys, values, bk, bv)
    if order == 1:
        out, lse = _plain(
            q, keys[0], values[0], masks[0], s, causal, windows[0], offset, return_lse
        )
    else:
        if torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in masks):
            raise NotImplementedError(
                "a mask that requires a gradient needs order 1 or 2, got order " + str(order)
            )
        settings = orders.OrderSettings(s, causal, windows, offset)
        out, lse = orders.tensor_attention_order(q, keys, values, masks, settings)
    return (out, lse) if return_lse else out


class TensorAttentionCost(NamedTuple):
    """What one call of tensor_attention costs; the numbers are sums over batch and heads.

    Example:
        >>> import pyloss
        >>> pyloss.functional.tensor_attention_cost((1, 1, 8, 4), direction="backward").flop
        20480
    """

    triples: int  # valid (i, j, k)
    flop: int  # useful floating-point operations of the matrix products
    exps: int  # exponentials
    tensor_bytes: int  # inputs and results, read or written at least once
    extra_bytes: int  # scratch of the CPU kernel beyond them, at the present number of threads
    seconds: float | None  # flop / rate


def tensor_attention_cost(
    shape: Sequence[int],
    window: Window = None,
    direction: str = "forward",
    *,
    is_causal: bool | None = None,
    dtype: torch.dtype = torch.float32,
    rate: float | None = None,
) -> TensorAttentionCost:
    r"""Predicts what a call of :func:`tensor_attention` costs, without running it.

    With T valid triples: 4 T d operations forward (2 T (d + dv) in general), 10 T d backward
    (T (6 d + 4 dv)): two and five matrix products. The count of triples is exact.

    Args:
        shape: ``(B, H, n, d)``, or ``(B, H, n_q, n_1, n_2, d, dv)``; unequal lengths count queries
            from position 0.
        window, is_causal: as in :func:`tensor_attention`.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.
        dtype: of the tensors.
        rate: operations per second that the machine gives, for the time: on a CPU about what
            ``torch.mm`` reaches, or more (docs/tensor_attention.md).

    Returns:
        :class:`TensorAttentionCost`.

    Raises:
        ValueError: a shape of another length, an unknown direction, a window of 0.

    Example:
        >>> import pyloss
        >>> cost = pyloss.functional.tensor_attention_cost((1, 1, 256, 64), rate=1e11)
        >>> cost.flop == 4 * 256**3 * 64, round(cost.seconds, 3)
        (True, 0.043)
        >>> pyloss.functional.tensor_attention_cost((1, 8, 2048, 64), window=(32, 128)).triples
        64984448
    """
    if len(shape) == 4:
        batch, heads, n_q, d = shape
        n_1 = n_2 = n_q
        dv = d
    elif len(shape) == 7:
        batch, heads, n_q, n_1, n_2, d, dv = shape
    else:
        raise ValueError(
            f"shape must be (B, H, n, d) or (B, H, n_q, n_1, n_2, d, dv), got {tuple(shape)}"
        )
    if direction not in ("forward", "backward", "both"):
        raise ValueError(f"direction must be forward, backward or both, got {direction!r}")
    q = torch.empty((), dtype=dtype).expand(batch, heads, n_q, d)
    keys = [q.new_empty(()).expand(batch, heads, n, d) for n in (n_1, n_2)]
    values = [q.new_empty(()).expand(batch, heads, n, dv) for n in (n_1, n_2)]
    causal, windows, offset = _checked_band(q, keys, is_causal, window, 0)
    p = torch.arange(n_q, dtype=torch.int64)
    seen = []
    for n, w in zip((n_1, n_2), windows):
        first = (p - w + 1).clamp(0, n) if w else torch.zeros_like(p)
        last = p + 1 if causal else (p + w if w else torch.full_like(p, n))
        seen.append(last.clamp(0, n) - first)
    triples = batch * heads * int((seen[0] * seen[1]).sum())
    forward, backward = direction != "backward", direction != "forward"
    per_triple = (2 * (d + dv) if forward else 0) + (6 * d + 4 * dv if backward else 0)
    keys_and_values = batch * heads * (n_1 + n_2) * (d + dv)
    rows = batch * heads * n_q
    elements = keys_and_values + rows * (d + dv)
    if backward:  # the gradients of all five, and that of the output
        elements = 2 * elements + (0 if forward else rows * dv)
    settings = op.Settings(1.0, causal, *windows, offset, 0.0, 0.0)
    extra = max(
        op.scratch_bytes(q, *keys, *values, settings, step)
        for step, asked in ((False, forward), (True, backward))
        if asked
    )
    return TensorAttentionCost(
        triples=triples,
        flop=triples * per_triple,
        exps=triples * (forward + backward),
        tensor_bytes=elements * dtype.itemsize + rows * accumulator_dtype(dtype).itemsize,
        extra_bytes=extra,
        seconds=None if rate is None else triples * per_triple / rate,
    )


def tensor_attention_error(
    q: Tensor,
    *keys: Tensor,
    values: Sequence[Tensor] | None = None,
    attn_mask: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    is_causal: bool | None = None,
    window: Window = None,
    scale: float | str | None = None,
    enable_gqa: bool = False,
    degree: int | None = None,
    poly: str = "taylor",
    tol: float = 1e-2,
    logit_bound: float | None = None,
    samples: int = 10000,
) -> dict[str, float | int | None]:
    r"""How far ``method="lowrank"`` can be from exact attention on these queries and keys.

    .. math::
        |S| \le R = |s| \min\Big(\sum_l \max_i |q_{il}| \prod_x \max_j |k^x_{jl}|,\;
        \max_i \|q_i\|_{m+1} \prod_x \max_j \|k^x_j\|_{m+1}\Big), \qquad
        \delta = \frac{\max f - \min f}{\max f + \min f}, \quad f = p / \exp
        \text{ on } [-R, R]

    and :math:`|\mathrm{out} - \mathrm{exact}| \le 2 (1 - \sqrt{1 - \delta^2}) / \delta \cdot
    \max |v^1 \cdots v^m|` plus what rounding adds. Looks at every number once; waits for a GPU.

    Args:
        q: queries ``(B, H, n_q, d)``.
        keys: k1, k2, or any number m of them, ``(B, G, n_x, d)``; with ``kv_bias`` the last as it
            is used, k + b_k. For ``form="determinant"`` there is no report.
        values: v1, v2, ...: adds ``bound_out``, the bound in the units of the output.
        masks: one per axis or None; masks of keys.
        samples: number of random tuples for ``R_sampled``.
        attn_mask, is_causal, window, scale, enable_gqa, degree, poly, tol, logit_bound: as in
            :func:`tensor_attention`.

    Returns:
        A dict: ``R_bound`` and ``R_sampled``, the bound of \|S\| and the largest found among random
        tuples; ``degree``; ``rank``, its number of features; ``delta``; ``bound``, that of the
        output in units of the largest \|v1 v2\| (inf where a denominator may vanish);
        ``bound_lse``; ``degree_needed`` for ``tol``, or None; ``flops_ratio``, operations of exact
        over low-rank attention; ``entry_bound``, the B for which entries of B at scale 1/d give
        scores of R = B^(m+1), and ``hardness``, (ln n)^(1/(m+1)): once B is of that order, nothing
        nearly linear exists unless SETH fails.

    Raises:
        ValueError: as :func:`tensor_attention` with ``method="lowrank"``.

    Example:
        >>> import torch, pyloss
        >>> q, k1, k2 = torch.rand(3, 1, 2, 1000, 8)
        >>> found = pyloss.functional.tensor_attention_error(q, k1, k2, scale="kronecker", degree=2)
        >>> found["rank"], found["R_bound"] <= 1.0, found["bound"] < 0.2
        (45, True, True)
        >>> found["degree_needed"] in (3, 4)  # for a bound of 0.01
        True

    Reference:
        Alman, Song. arXiv 2310.04064: the threshold, for m = 2; the exponent 1/(m+1) of other
        orders is that of the score of entries B.
    """
    from pyloss.functional import _lowrank as lowrank

    options = _checked_options("lowrank", degree, poly, tol, "none", logit_bound)
    order = len(keys)
    if order == 0:
        raise ValueError("tensor_attention_error needs at least one tensor of keys")
    key_names = tuple(f"k{x + 1}" for x in range(order))
    value_names = tuple(f"v{x + 1}" for x in range(order))
    stand_in = keys if values is None else tuple(values)
    if len(stand_in) != order:
        raise ValueError(f"values must be {order}, one per axis, got {len(stand_in)}")
    q, keys, found = _checked_tensors(q, keys, stand_in, enable_gqa, key_names, value_names)
    masks = (None,) * order if masks is None else tuple(masks)
    if len(masks) != order:
        raise ValueError(f"masks must be {order}, one per axis, got {len(masks)}")
    names = ("attn_mask", *(f"masks[{x}]" for x in range(order)))
    causal, windows, _ = _checked_band(q, keys, is_causal, window, 0)
    try:
        key_masks = _key_masks(q, keys, (attn_mask, *masks), names)
    except _NotOfKeys as error:
        raise ValueError(str(error)) from None
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")
    s = _checked_scale(scale, q.shape[3])
    problem = lowrank.Problem(
        q, keys, found[0].shape[3], key_masks, s, causal, windows, q.device.type
    )
    checked_values = None if values is None else found
    return lowrank.report(problem, lowrank.Options(*options), checked_values, samples)


# --------------------------------------------------------------------------------------------------
# Parts


def _low_rank(q, keys, values, masks, names, band, options):
    """(out, lse) of the low-rank form, or None where "auto" takes exact attention."""
    from pyloss.functional import _lowrank as lowrank

    options = lowrank.Options(*options).constants()
    scale, causal, windows, offset = band
    try:
        key_masks = _key_masks(q, keys, masks, names)
    except _NotOfKeys as error:
        if options.method == "auto":
            return None
        raise ValueError(str(error)) from None
    scale = lowrank.constant(scale)
    problem = lowrank.Problem(
        q, keys, values[0].shape[3], key_masks, scale, causal, windows, q.device.type
    )
    choice = lowrank.choose(problem, options)
    if choice is None:
        return None
    polynomial = choice.polynomial
    q, keys, scale = lowrank.evened(problem, options, choice)
    settings = lowrank_op.Settings(
        polynomial.scaled(scale), polynomial.centre, causal, windows, offset
    )
    dtype, acc = problem.q.dtype, accumulator_dtype(q.dtype)
    if dtype == q.dtype == acc:  # six calls that do nothing would take 4 us
        return lowrank_op.tensor_attention_lowrank(q, keys, values, key_masks, settings)
    out, lse = lowrank_op.tensor_attention_lowrank(
        q.to(acc), [k.to(acc) for k in keys], [v.to(acc) for v in values], key_masks, settings
    )
    return out.to(dtype), lse


def _shifted(keys, values, bk, bv, dtype=None):
    """With the biases added to the last keys and values, in `dtype`, where it is given."""
    if bk == 0.0 and bv == 0.0:
        return keys, values
    k, v = (t if dtype is None else t.to(dtype) for t in (keys[-1], values[-1]))
    return (*keys[:-1], k + bk), (*values[:-1], v + bv)


def _plain(q, k, v, mask, scale, causal, window, offset, return_lse):
    """(out, lse or None) of order 1."""
    square = offset == 0 and q.shape[2] == k.shape[2]
    if mask is None and not window and not return_lse and (square or not causal):
        heads = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, **({"enable_gqa": True} if heads else {})
        ), None
    # A second axis of one key of ones, at the first position that any query sees.
    one = k.new_ones(k.shape[0], k.shape[1], 1, 1)
    settings = op.Settings(scale, causal, window, 0, offset, 0.0, 0.0)
    ones = (one.expand(-1, -1, 1, k.shape[3]), one.expand(-1, -1, 1, v.shape[3]))
    return op.tensor_attention(q, k, ones[0], v, ones[1], mask, None, settings)


def _determinant(q, keys, bk):
    """The product form of twice the features whose score is the sum of determinants."""
    if q.shape[3] % 3:
        raise ValueError(f'form="determinant" needs d divisible by 3, got d = {q.shape[3]}')

    def rolled(t, steps):
        return t.unflatten(-1, (-1, 3)).roll(-steps, -1).flatten(-2)

    k1, k2 = keys
    k2 = k2 + bk if bk != 0.0 else k2
    q = torch.cat([q, -q], -1)
    k1 = torch.cat([rolled(k1, 1), rolled(k1, 2)], -1)
    k2 = torch.cat([rolled(k2, 2), rolled(k2, 1)], -1)
    return q, (k1, k2), 0.0


# --------------------------------------------------------------------------------------------------
# Checks


def _check_choices(method, form, dropout_p) -> None:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if form not in ("product", "determinant"):
        raise ValueError(f"form must be product or determinant, got {form!r}")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if dropout_p > 0.0 and method == "lowrank":
        raise ValueError('method="lowrank" takes no dropout, dropout_p must be 0')
    if dropout_p > 0.0:
        raise NotImplementedError("tensor_attention has no dropout yet, dropout_p must be 0")


def _checked_options(method, degree, poly, tol, check, logit_bound) -> tuple:
    """The fields of _lowrank.Options, of right types and ranges."""
    if degree is not None:
        if isinstance(degree, bool) or not isinstance(degree, int):
            raise TypeError(f"degree must be an integer or None, got {type(degree).__name__}")
        if not 1 <= degree <= MOST_DEGREE:
            raise ValueError(f"degree must be between 1 and {MOST_DEGREE}, got {degree}")
    if poly not in _POLYNOMIALS:
        raise ValueError(f"poly must be one of {', '.join(_POLYNOMIALS)}, got {poly!r}")
    if check not in _CHECKS:
        raise ValueError(f"check must be one of {', '.join(_CHECKS)}, got {check!r}")
    for name, value in (("tol", tol), ("logit_bound", logit_bound)):
        if name == "logit_bound" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not value > 0.0:
            raise ValueError(f"{name} must be positive, got {value}")
    return method, degree, poly, float(tol), check, logit_bound


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def _checked_tensors(q, keys, values, enable_gqa, key_names, value_names):
    """(q, keys, values) of shapes, dtypes and devices that fit, cast under autocast."""
    names, tensors = ("q", *key_names, *value_names), (q, *keys, *values)
    for name, t in zip(names, tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    kind = q.device.type
    if not q.is_meta and torch.is_autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        q, *rest = tensors = [
            t.to(to) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
        ]
        keys, values = rest[: len(keys)], rest[len(keys) :]
    dtype, device = q.dtype, q.device
    for name, t in zip(names, tensors):
        if t.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, features), got shape "
                f"{_shape(t)}"
            )
        if t.dtype != dtype:
            raise TypeError(f"q and {name} must have one dtype, got {dtype} and {t.dtype}")
        if t.device != device:
            raise RuntimeError(f"q and {name} must be on one device, got {device} and {t.device}")
    if dtype not in _DTYPES:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {dtype}")
    first = keys[0]
    batch, heads, _, d = q.shape
    kv_heads, dv = first.shape[1], values[0].shape[3]
    if enable_gqa:
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"the heads of q must be a multiple of those of {key_names[0]}, got {_shape(q)} "
                f"and {_shape(first)}"
            )
    elif heads != kv_heads:
        raise ValueError(
            f"q and {key_names[0]} must have as many heads unless enable_gqa=True, got {_shape(q)} "
            f"and {_shape(first)}"
        )
    if d == 0:
        raise ValueError("q must have at least one feature, got d = 0")
    for k_name, k, v_name, v in zip(key_names, keys, value_names, values):
        k_shape, v_shape = k.shape, v.shape
        if k_shape[0] != batch or k_shape[3] != d:
            raise ValueError(
                f"q and {k_name} must have one batch size and as many features, got {_shape(q)} "
                f"and {_shape(k)}"
            )
        if k_shape[1] != kv_heads:
            raise ValueError(
                f"{key_names[0]} and {k_name} must have as many heads, got {_shape(first)} and "
                f"{_shape(k)}"
            )
        if v_shape[:3] != k_shape[:3]:
            raise ValueError(
                f"{k_name} and {v_name} must agree in batch, heads and length, got {_shape(k)} and "
                f"{_shape(v)}"
            )
        if v_shape[3] != dv:
            raise ValueError(
                f"{value_names[0]} and {v_name} must have as many features, got "
                f"{_shape(values[0])} and {_shape(v)}"
            )
    return q, tuple(keys), tuple(values)


def _checked_masks(q, keys, attn_mask, masks, names):
    """Per axis None or an additive floating mask of four dimensions, attn_mask included."""
    found = []
    for name, mask, k in zip(names, masks, keys):
        parts = [
            _checked_mask(n, m, q, k.shape[2])
            for n, m in ((name, mask), ("attn_mask", attn_mask))
            if m is not None
        ]
        found.append(sum(parts[1:], parts[0]) if parts else None)
    return tuple(found)


class _NotOfKeys(ValueError):
    """A mask that low-rank attention cannot take."""


def _key_masks(q, keys, masks, names):
    """Per axis None or bool (B, G or 1, n); the first mask holds for every axis."""
    found = []
    for mask, name, k in zip(masks[1:], names[1:], keys):
        parts = [
            _key_mask(n, _fitting_mask(n, m, q, k.shape[2]), q, k)
            for n, m in ((name, mask), (names[0], masks[0]))
            if m is not None
        ]
        parts = [part for part in parts if part is not None]
        found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1])
    return tuple(found)


def _key_mask(name, mask, q, k):
    if mask.dtype != torch.bool:
        # Floating: nothing but 0 and -inf, which only a look at the numbers tells.
        plain = not (mask.is_cuda or mask.is_meta or torch.compiler.is_compiling())
        plain = plain and not functorch_active()
        if mask.requires_grad or not plain or not ((mask == 0) | (mask == -torch.inf)).all():
            raise _NotOfKeys(
                f'method="lowrank" takes no bias: {name} must be bool, or on the CPU hold 0 and '
                f"-inf only, got {mask.dtype}"
            )
        if (mask == 0).all():
            return None
        mask = mask == 0
    if mask.shape[2] != 1 and q.shape[2] != 1 or mask.shape[1] not in (1, k.shape[1]):
        raise _NotOfKeys(
            f'method="lowrank" takes masks of keys, equal for all queries and query heads of a '
            f"key head, (batch, 1 or key heads, 1, keys), got {name} of shape {_shape(mask)}"
        )
    return mask.expand(q.shape[0], mask.shape[1], 1, k.shape[2]).squeeze(2)


def _checked_mask(name, mask, q, n):
    mask = _fitting_mask(name, mask, q, n)
    acc = accumulator_dtype(q.dtype)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=acc, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(acc)


def _fitting_mask(name, mask, q, n):
    """A mask of four dimensions, bool or floating."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(mask).__name__}")
    if mask.device != q.device:
        raise RuntimeError(f"q and {name} must be on one device, got {q.device} and {mask.device}")
    full = (*q.shape[:3], n)
    if mask.dim() > 4 or any(
        size not in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(full))
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, queries, keys) = {list(full)}, got "
            f"{_shape(mask)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    return mask[(None,) * (4 - mask.dim())]


def _is_int(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _checked_band(q, keys, is_causal, window, q_offset):
    """(causal, a window per axis with 0 for none, offset)."""
    if is_causal is not None and not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool or None, got {type(is_causal).__name__}")
    if window is None or _is_int(window):
        given = [window] * len(keys)
    elif isinstance(window, Sequence):
        given = list(window)
    else:
        raise TypeError(f"window must be an integer or a sequence of them, got {window!r}")
    if len(given) != len(keys):
        raise ValueError(f"window must be one number or {len(keys)}, got {window!r}")
    windows = []
    for w in given:
        if w is not None and not _is_int(w):
            raise TypeError(f"window must hold integers or None, got {w!r}")
        if w is not None and w != -1 and w <= 0:
            raise ValueError(f"window must be positive, or -1 or None for no limit, got {w}")
        windows.append(0 if w is None or w == -1 else w)
    causal = any(windows) if is_causal is None else is_causal
    if q_offset is not None and not _is_int(q_offset):
        raise TypeError(f"q_offset must be an integer, got {type(q_offset).__name__}")
    if q_offset is None and (causal or any(windows)):
        lengths = [q.shape[2], *(k.shape[2] for k in keys)]
        if any(n != lengths[0] for n in lengths):
            raise ValueError(
                "a causal mask or a window over lengths that differ needs q_offset, the position "
                f"of query 0, got lengths {lengths}"
            )
    return causal, tuple(windows), 0 if q_offset is None else q_offset


def _checked_scale(scale, d) -> float:
    if scale is None:
        return d**-0.5
    if isinstance(scale, str):
        if scale != "kronecker":
            raise ValueError(f"scale must be a number or 'kronecker', got {scale!r}")
        return 1.0 / d
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    return float(scale)


def _checked_bias(kv_bias) -> tuple[float, float]:
    try:
        bk, bv = kv_bias
    except (TypeError, ValueError):
        raise TypeError(f"kv_bias must be a pair of numbers, got {kv_bias!r}") from None
    for value in (bk, bv):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"kv_bias must be a pair of numbers, got {kv_bias!r}")
    return float(bk), float(bv)
