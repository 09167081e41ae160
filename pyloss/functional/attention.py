"""Tensor attention: softmax attention over pairs, triples, ... of keys, never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._attention_checks import (
    NotOfKeys,
    check_choices,
    checked_band,
    checked_bias,
    checked_list,
    checked_masks,
    checked_options,
    checked_scale,
    checked_softcap,
    checked_tensors,
    key_masks,
    known_finite,
)
from pyloss.ops import tensor_attention as op
from pyloss.ops import tensor_attention_lowrank as lowrank_op
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.tensor_attention import cost
from pyloss.ops.tensor_attention import order as orders

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
    softcap: float | None = None,
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
        softcap: a bound c > 0 of the scores: c tanh(x / c) in the place of each, scaled, before
            masks are added, as in Gemma. Not with ``"lowrank"``; a GPU takes the reference.
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
        -inf, and gradients 0.

    Raises:
        ValueError: shapes, heads or lengths that do not fit, d = 0, a window of 0, causality over
            unequal lengths without ``q_offset``, an unknown option, one of ``"lowrank"`` with
            ``method="exact"``. For ``"lowrank"`` also masks of pairs, biases and dropout, states
            above 2 GiB, no degree that keeps ``tol`` (``degree=None``), a bound above ``tol``
            (``check="strict"``).
        TypeError: not a tensor, dtypes that differ, integer inputs.
        RuntimeError: devices that differ; ``"lowrank"`` on a CPU where the sum of the polynomial
            over all pairs is not positive and finite for some query.
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
    check_choices(method, form, dropout_p)
    options = checked_options(method, degree, poly, tol, check, logit_bound)
    q, keys, values = checked_tensors(q, (k1, k2), (v1, v2), enable_gqa, ("k1", "k2"), ("v1", "v2"))
    given, names = (mask1, mask2), ("mask1", "mask2")
    causal, windows, offset = checked_band(q, keys, is_causal, window, q_offset)
    s = checked_scale(scale, q.shape[3])
    cap = 0.0 if softcap is None else checked_softcap(softcap, method)
    bk, bv = checked_bias(kv_bias)
    if form == "determinant":
        q, keys, bk = _determinant(q, keys, bk)
    if method != "exact" and not cap:
        shifted, moved = _shifted(keys, values, bk, bv, accumulator_dtype(q.dtype))
        band = (s, causal, windows, offset)
        found = _low_rank(
            q, shifted, moved, (attn_mask, *given), ("attn_mask", *names), band, options
        )
        if found is not None:
            return found if return_lse else found[0]
    masks = checked_masks(q, keys, attn_mask, given, names)
    settings = op.Settings(s, causal, *windows, offset, bk, bv, cap)
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
    softcap: float | None = None,
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
        is_causal, q_offset, scale, softcap, enable_gqa, return_lse, method, degree, poly, tol,
            check, logit_bound: as in :func:`tensor_attention`.

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
    keys, values = checked_list("keys", keys), checked_list("values", values)
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
    check_choices(method, "product", 0.0)
    options = checked_options(method, degree, poly, tol, check, logit_bound)
    q, keys, values = checked_tensors(q, keys, values, enable_gqa, key_names, value_names)
    causal, windows, offset = checked_band(q, keys, is_causal, window, q_offset)
    s = checked_scale(scale, q.shape[3])
    cap = 0.0 if softcap is None else checked_softcap(softcap, method)
    bk, bv = checked_bias(kv_bias)
    if method != "exact" and not cap:
        shifted, moved = _shifted(keys, values, bk, bv, accumulator_dtype(q.dtype))
        band = (s, causal, windows, offset)
        given, names = (attn_mask, *masks), ("attn_mask", *mask_names)
        found = _low_rank(q, shifted, moved, given, names, band, options)
        if found is not None:
            return found if return_lse else found[0]
    masks = checked_masks(q, keys, attn_mask, masks, mask_names)
    if order == 2:
        settings = op.Settings(s, causal, *windows, offset, bk, bv, cap)
        out, lse = op.tensor_attention(q, *keys, *values, *masks, settings)
        return (out, lse) if return_lse else out

    keys, values = _shifted(keys, values, bk, bv)
    if order == 1:
        out, lse = _plain(
            q, keys[0], values[0], masks[0], s, causal, windows[0], offset, cap, return_lse
        )
    else:
        if torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in masks):
            raise NotImplementedError(
                "a mask that requires a gradient needs order 1 or 2, got order " + str(order)
            )
        settings = orders.OrderSettings(s, causal, windows, offset, cap)
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
    shape = tuple(_sizes(shape))
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
    if rate is not None:
        checks.check_range("rate", rate, 0.0, open_low=True)
    q = torch.empty((), dtype=dtype).expand(batch, heads, n_q, d)
    keys = [q.new_empty(()).expand(batch, heads, n, d) for n in (n_1, n_2)]
    values = [q.new_empty(()).expand(batch, heads, n, dv) for n in (n_1, n_2)]
    causal, windows, offset = checked_band(q, keys, is_causal, window, 0)
    triples = batch * heads * cost.tuples(n_q, (n_1, n_2), causal, windows, offset)
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
        seconds=None if rate is None else float(triples * per_triple / rate),
    )


def _sizes(shape) -> Iterator[int]:
    for size in checked_list("shape", shape, "integers"):
        found = checks.as_integer(size)
        if found is None or found < 0:
            error = TypeError if found is None else ValueError
            raise error(f"shape must hold integers >= 0, got {size!r}")
        yield found


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

    options = checked_options("lowrank", degree, poly, tol, "none", logit_bound)
    order = len(keys)
    if order == 0:
        raise ValueError("tensor_attention_error needs at least one tensor of keys")
    key_names = tuple(f"k{x + 1}" for x in range(order))
    value_names = tuple(f"v{x + 1}" for x in range(order))
    stand_in = keys if values is None else tuple(values)
    if len(stand_in) != order:
        raise ValueError(f"values must be {order}, one per axis, got {len(stand_in)}")
    q, keys, found = checked_tensors(q, keys, stand_in, enable_gqa, key_names, value_names)
    masks = (None,) * order if masks is None else tuple(masks)
    if len(masks) != order:
        raise ValueError(f"masks must be {order}, one per axis, got {len(masks)}")
    names = ("attn_mask", *(f"masks[{x}]" for x in range(order)))
    causal, windows, _ = checked_band(q, keys, is_causal, window, 0)
    try:
        of_keys = key_masks(q, keys, (attn_mask, *masks), names)
    except NotOfKeys as error:
        raise ValueError(str(error)) from None
    count = checks.as_integer(samples)
    if count is None or count < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")
    s = checked_scale(scale, q.shape[3])
    problem = lowrank.Problem(
        q, keys, found[0].shape[3], of_keys, s, causal, windows, q.device.type
    )
    checked_values = None if values is None else found
    return lowrank.report(problem, lowrank.Options(*options), checked_values, count)


# --------------------------------------------------------------------------------------------------
# Parts


def _low_rank(q, keys, values, masks, names, band, options):
    """(out, lse) of the low-rank form, or None where "auto" takes exact attention."""
    from pyloss.functional import _lowrank as lowrank

    options = lowrank.Options(*options).constants()
    scale, causal, windows, offset = band
    try:
        of_keys = key_masks(q, keys, masks, names)
    except NotOfKeys as error:
        if options.method == "auto":
            return None
        raise ValueError(str(error)) from None
    scale = lowrank.constant(scale)
    problem = lowrank.Problem(
        q, keys, values[0].shape[3], of_keys, scale, causal, windows, q.device.type
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
        return lowrank_op.tensor_attention_lowrank(q, keys, values, of_keys, settings)
    out, lse = lowrank_op.tensor_attention_lowrank(
        q.to(acc), [k.to(acc) for k in keys], [v.to(acc) for v in values], of_keys, settings
    )
    return out.to(dtype), lse


def _shifted(keys, values, bk, bv, dtype=None):
    """With the biases added to the last keys and values, in `dtype`, where it is given."""
    if bk == 0.0 and bv == 0.0:
        return keys, values
    k, v = (t if dtype is None else t.to(dtype) for t in (keys[-1], values[-1]))
    return (*keys[:-1], k + bk), (*values[:-1], v + bv)


def _plain(q, k, v, mask, scale, causal, window, offset, softcap, return_lse):
    """(out, lse or None) of order 1."""
    square = offset == 0 and q.shape[2] == k.shape[2]
    # Causality hides no NaN there. A GPU is not asked: the page says so.
    clean = not causal or not q.is_cpu or known_finite(k, v)
    bare = mask is None and not window and not softcap and not return_lse
    if bare and (square or not causal) and clean:
        heads = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, **({"enable_gqa": True} if heads else {})
        ), None
    # A second axis of one key of ones, at the first position that any query sees.
    one = k.new_ones(k.shape[0], k.shape[1], 1, 1)
    settings = op.Settings(scale, causal, window, 0, offset, 0.0, 0.0, softcap)
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
