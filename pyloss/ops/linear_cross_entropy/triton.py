"""Linear cross entropy by the Triton tile kernels: statistics forward, recomputed gradient.

What happens to tiles stands in kernels/linear_cross_entropy. Here: the order of the rows, and
what is computed once per row, as torch operations on float32 vectors of N numbers. Formulas and
names are those of csrc/common/row_softmax.h.

    order      rows that count first, ignored ones last; their number stays on the device
    forward    statistics of every row, then its loss
    backward   coefficients of every row; then, for one block of classes after the other, the
               gradient of the block's logits and the products with it
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops._labels import outside
from pyloss.ops.linear_cross_entropy.call import Call, Tensors
from pyloss.ops.row_softmax.calls import WANT_EXTRAS
from pyloss.ops.row_softmax.epilogue import LossOfNll, Transform, epilogue, transform, unless_zero
from pyloss.ops.row_softmax.records import Codes, unpacked
from pyloss.ops.row_softmax.statistics import EXTRA_ROWS

# Bytes of a block of the logits' gradient. Every block costs a pass over the float32 gradient of
# the input; wide blocks make that small, beside about 100 MB for the input in order and for that
# gradient at N 4096, D 4096.
_BLOCK_BYTES = 128 << 20
_MIN_COLUMNS = 1024  # narrower blocks would leave most of a GPU idle
_ALIGN = 128  # columns of the widest tile; also keeps the rows of a block aligned

# For tests: kernels then run on CPU tensors. Triton itself looks at this once too.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Asked here and not in a call, which torch.compile traces.
_HAS_TRITON = backends.has_triton()


def runs_on(x: Tensor) -> bool:
    """Whether the tile kernels can run on the device of x."""
    return x.is_cuda or (_INTERPRETED and x.is_cpu)


def can_filter(x: Tensor) -> bool:
    """Whether they do run there: without Triton their reference would, and leave out nothing."""
    return _HAS_TRITON and runs_on(x)


def block_columns(rows: int, classes: int, itemsize: int) -> int:
    """Classes whose logits' gradient exists at a time, a multiple of the tile width."""
    wanted = _BLOCK_BYTES // (max(rows, 1) * itemsize) // _ALIGN * _ALIGN
    blocks = max(1, math.ceil(classes / max(wanted, _MIN_COLUMNS)))
    return math.ceil(classes / (blocks * _ALIGN)) * _ALIGN


def _kernels():
    try:
        from pyloss.kernels import linear_cross_entropy
    except ImportError as error:
        raise RuntimeError(
            "filter and strategy='tiles' of fused_linear_cross_entropy need Triton: "
            f"pip install 'pyloss[triton]' ({error})"
        ) from error
    return linear_cross_entropy


def saved_rows(wants: int) -> int:
    """Rows of `saved`: m, rest, zy, and ez where the entropy is asked for."""
    return 4 if wants & WANT_EXTRAS else 3


# --------------------------------------------------------------------------------------------------
# The layer, its rows in order


class Layer:
    """What the kernels read: the rows of the input in order, the layer in the input's dtype."""

    def __init__(self, t: Tensors, call: Call):
        x = t.input
        self.ignored = call.ignored
        # A stable sort of the mask; a list of indices would make the host wait for its length.
        self.order = torch.argsort(self.ignored.to(torch.uint8), stable=True)
        self.n_valid = (~self.ignored).sum()
        self.x = x.index_select(0, self.order)
        self.target = t.target.index_select(0, self.order)
        weight = t.linear_weight.to(x.dtype)
        self.weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.bias = None if t.linear_bias is None else t.linear_bias.to(x.dtype).contiguous()
        self.class_weight = None if call.weight is None else call.weight.float().contiguous()

    def rows(self) -> tuple:
        return self.x, self.weight, self.bias, self.target, self.n_valid

    def in_order(self, vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).index_select(1, self.order)

    def back(self, rows: Tensor, dim: int) -> Tensor:
        """Undoes the order."""
        return torch.empty_like(rows).index_copy_(dim, self.order, rows)


# --------------------------------------------------------------------------------------------------
# Once per row


class Terms(NamedTuple):
    """What a row knows when its statistics are complete. Original order, as everything below."""

    m: Tensor
    ey: Tensor  # exp(z_y - m)
    uy: Tensor  # z_y - m
    sum: Tensor  # of exp(z_j - m)
    log_sum: Tensor
    nll: Tensor
    miss: Tensor  # 1 - p_y
    f: LossOfNll
    first: Tensor | float  # weight of the label
    token: Tensor | float
    weight_sum: Tensor | float
    spread: float  # smoothing / classes

    @property
    def lse(self) -> Tensor:
        return self.m + self.log_sum

    def entropy(self, ez: Tensor) -> Tensor:
        label = torch.where(self.ey == 0, 0.0, self.ey * self.uy)
        return self.log_sum - (ez + label) / self.sum


def _terms(t: Tensors, call: Call, m: Tensor, rest: Tensor, zy: Tensor) -> Terms:
    o, weight = call.options, call.weight
    uy = zy - m
    ey = torch.exp(uy)
    total = rest + ey
    log_sum = torch.where(zy == m, torch.log1p(rest), torch.log(total))
    nll = log_sum - uy
    first = 1 - o.smoothing
    if weight is not None:
        labels = t.target.long().clamp(0, call.classes - 1)
        first = first * weight.float().index_select(0, labels)
    token = 1.0 if call.token_weight is None else call.token_weight.float()
    weight_sum = call.classes if weight is None else weight.double().sum().float()
    return Terms(
        m, ey, uy, total, log_sum, nll, rest / total, epilogue(o, call.codes.loss, nll), first,
        token, weight_sum, o.smoothing / call.classes,
    )  # fmt: skip


def _row_losses(call: Call, r: Terms, wz: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows' losses and z-losses."""
    loss = unless_zero(r.first, r.first * r.f.value)
    if wz is not None:
        loss = loss + r.spread * (r.weight_sum * r.log_sum - wz)
    loss = torch.where(r.nll.isnan(), r.nll, loss)
    z = call.options.z_loss * r.lse**2 if call.options.z_loss else torch.zeros_like(loss)
    loss = loss + z
    if isinstance(r.token, Tensor):
        loss = torch.where((r.token != 0) | loss.isnan(), r.token * loss, 0.0)
    return torch.where(call.ignored, 0.0, loss), z


# --------------------------------------------------------------------------------------------------
# Forward


@torch.no_grad()
def forward(t: Tensors, options, codes, loss_dtype, wants, numbers=None) -> list[Tensor]:
    """[loss, saved], and the extras if asked for."""
    kernels = _kernels()
    call = Call(t, *unpacked(options, codes, numbers))
    layer = Layer(t, call)
    want_extras, smoothing = bool(wants & WANT_EXTRAS), call.options.smoothing > 0
    found = kernels.linear_softmax_stats(
        *layer.rows(),
        **transform(call.options)._asdict(),
        want_entropy=want_extras,
        want_sum=smoothing,
        class_weight=layer.class_weight,
    )
    stats = layer.back(torch.stack([s for s in found if s is not None]), 1)
    # A label out of range has no column: its row becomes NaN.
    bad = outside(t.target, call.classes) & ~call.ignored
    stats[1] = torch.where(bad, math.nan, stats[1])

    r = _terms(t, call, *stats[:3])
    losses, z = _row_losses(call, r, stats[-1] if smoothing else None)
    if call.scalar:
        loss = losses.double().sum()
        if call.empty is not None:
            loss = torch.where(call.empty, math.nan, loss)
    else:
        loss = losses
    saved = stats[: saved_rows(wants)].clone()
    if not want_extras:
        return [loss.to(loss_dtype, copy=True), saved]
    extras = torch.stack([r.lse, -r.nll, r.entropy(stats[3]), z])
    return [loss.to(loss_dtype, copy=True), saved, torch.where(call.ignored, 0.0, extras)]


def empty_results(t: Tensors, options, codes, loss_dtype, wants) -> list[Tensor]:
    n = t.input.shape[0]
    shape = () if Codes(*codes).scalar else (n,)
    found = [
        t.input.new_empty(shape, dtype=loss_dtype),
        t.input.new_empty((saved_rows(wants), n), dtype=torch.float32),
    ]
    if wants & WANT_EXTRAS:
        found.append(t.input.new_empty((EXTRA_ROWS, n), dtype=torch.float32))
    return found


# --------------------------------------------------------------------------------------------------
# Backward


class Coefficients(NamedTuple):
    """Of a row's gradient; what is None is 0."""

    a: Tensor
    label_a: Tensor
    label: Tensor
    b: Tensor | None
    spread: Tensor | None


def _coefficients(call: Call, r: Terms, grad_loss, grad_extras, ez) -> Coefficients:
    o = call.options
    g = torch.where(call.ignored, 0.0, unless_zero(r.token, grad_loss.float() * r.token))
    c1 = unless_zero(r.first, g * r.first * r.f.slope)
    other, b, spread = torch.zeros_like(g), None, None
    if o.smoothing > 0:
        spread = g * r.spread
        other = spread * r.weight_sum
    if o.z_loss:
        other = other + g * 2 * o.z_loss * r.lse
    if grad_extras is not None:
        lse, logprob, entropy = grad_extras[:3].float()
        c1 = c1 - logprob
        other = other + lse - unless_zero(entropy, entropy * (r.entropy(ez) - r.log_sum))
        b = -entropy / r.sum
    return Coefficients((c1 + other) / r.sum, other / r.sum, c1 * r.miss, b, spread)


def _large_entry(c: Coefficients, r: Terms, by: Transform) -> Tensor:
    """Size of an entry of each row's gradient: the label's, or that of the largest logit.

    For a plain loss the label's entry is the largest: all entries together sum up to 0. Whatever
    the loss, it is an entry of the row, so never more than the largest.
    """
    bu = 0.0 if c.b is None else c.b * r.uy
    label = torch.where(r.ey == 0, 0.0, r.ey * (c.label_a + bu)) - c.label
    label = (label * by.slope(r.m + r.uy)).abs()
    largest = (c.a * by.slope(r.m)).abs()
    return torch.where(r.uy < 0, torch.maximum(label, largest), label)


@torch.no_grad()
def backward(
    grad_loss, grad_extras, t: Tensors, saved, options, codes, wanted, filter, exact, numbers=None
) -> list[Tensor | None]:
    """Gradients of input, weight and bias; None where not `wanted`.

    Args:
        filter: tiles without an entry above this part of their rows' gradients are left out; 0:
            none is.
        exact: products with the logits' gradient in float32.
    """
    kernels = _kernels()
    call = Call(t, *unpacked(options, codes, numbers))
    layer = Layer(t, call)
    by = transform(call.options)
    r = _terms(t, call, *saved[:3])
    c = _coefficients(call, r, grad_loss, grad_extras, saved[-1])
    vectors = {"m": r.m, **{k: v for k, v in c._asdict().items() if v is not None}}
    if filter > 0:
        vectors["threshold"] = filter * _large_entry(c, r, by)
    vectors = dict(zip(vectors, layer.in_order(list(vectors.values()))))
    threshold = vectors.pop("threshold", None)
    # Without a cap smoothing is a product of two vectors, which leaves the tiles sparse.
    spread = None
    if not by.cap and "spread" in vectors:
        spread = _Spread(kernels, layer, vectors.pop("spread") * -by.pre, wanted)
    coeffs = kernels.GradCoeffs(**vectors)

    x, weight = layer.x, layer.weight
    (n, d), classes = x.shape, weight.shape[0]
    step = block_columns(n, classes, torch.float32.itemsize if exact else x.dtype.itemsize)
    block = x.new_empty((n, step), dtype=torch.float32 if exact else x.dtype)
    dx, dw, db = None, None, None
    if wanted[0]:
        dx = x.new_empty((n, d), dtype=x.dtype if classes <= step else torch.float32)
    if wanted[1]:
        dw = weight.new_empty((classes, d), dtype=t.linear_weight.dtype)
    if wanted[2]:
        db = x.new_empty(classes, dtype=torch.float32)
    for v0 in range(0, classes, step):
        part = slice(v0, min(v0 + step, classes))
        dz, mask = kernels.linear_softmax_grad(
            *layer.rows(),
            coeffs,
            block,
            v0=part.start,
            v1=part.stop,
            class_weight=layer.class_weight if coeffs.spread is not None else None,
            threshold=threshold,
            **by._asdict(),
        )
        if dx is not None:
            outer = spread.for_input() if spread and v0 == 0 else None
            kernels.masked_matmul_nn(
                dz, weight[part], mask, layer.n_valid, dx, accumulate=v0 > 0, outer=outer
            )
        if dw is not None:
            outer = spread.for_weight(part) if spread else None
            kernels.masked_matmul_tn(dz, x, mask, layer.n_valid, dw[part], outer=outer)
        if db is not None:
            kernels.column_sums(dz, mask, layer.n_valid, db[part])
    # Before dx needs another copy.
    del block, dz, mask
    if dx is not None:
        dx = layer.back(dx.to(x.dtype), 0)
    if db is not None:
        if spread:
            db += spread.for_bias()
        db = db.to(t.linear_bias.dtype)
    return [dx, dw, db]


class _Spread:
    """The part -pre spread_i w_j of the logits' gradient, and its products."""

    def __init__(self, kernels, layer: Layer, rows: Tensor, wanted):
        x, weight = layer.x, layer.weight
        self.rows = rows.contiguous()
        self.classes = layer.class_weight
        if self.classes is None:
            self.classes = rows.new_ones(weight.shape[0])
        self.row_product = self.class_product = None  # spread^T x and w^T W
        if wanted[0]:
            out = rows.new_empty(x.shape[1])
            self.class_product = kernels.column_sums(
                weight, None, None, out, factor=layer.class_weight
            )
        if wanted[1]:
            out = rows.new_empty(x.shape[1])
            self.row_product = kernels.column_sums(x, None, layer.n_valid, out, factor=self.rows)

    def for_input(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.class_product

    def for_weight(self, part: slice) -> tuple[Tensor, Tensor]:
        return self.classes[part], self.row_product

    def for_bias(self) -> Tensor:
        return self.classes * self.rows.sum()
