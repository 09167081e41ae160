"""The deep conjugate direction method: linear systems solved along directions of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._lanczos import ritz
from pyloss.functional._sums import summed
from pyloss.ops._launch import accumulator_dtype, without_autocast
from pyloss.ops._transforms import functorch_active

#: v -> A v for one vector ``(N,)``, or for each of a batch ``(B, *)``.
Matvec = Callable[[Tensor], Tensor]


class DCDMResult(NamedTuple):
    """What :func:`pyloss.functional.dcdm_solve` found; of a batch, one entry for each system.

    Example:
        >>> import torch, pyloss
        >>> b = torch.ones(8, dtype=torch.float64)
        >>> found = pyloss.functional.dcdm_solve(lambda v: 2 * v, b, f=lambda r: r)
        >>> int(found.iterations), bool(found.converged)
        (1, True)
    """

    x: Tensor  #: the solution, of the shape of ``b``
    iterations: Tensor  #: int64: directions that were taken until the tolerance was reached
    converged: Tensor  #: bool: whether it was
    residual_norms: Tensor  #: ``||b - A x||`` before the first and after each iteration, ``(K, *)``
    fallbacks: Tensor  #: int64: how often the direction of the network was of no use


# --------------------------------------------------------------------------------------------------
# Vectors: of one dimension, or a batch of them


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() if a.dim() == 1 else (a * b).flatten(1).sum(1)


def _largest(v: Tensor) -> Tensor:
    """The largest magnitude of each vector."""
    if not v.numel():
        return _dot(v, v)
    return v.abs().amax() if v.dim() == 1 else v.flatten(1).abs().amax(1)


def _power_of_two(size: Tensor) -> Tensor:
    """One of about this size, so that multiplication rounds nothing; 1 for 0 and what is not
    finite."""
    _, exponent = torch.frexp(size)
    # Its inverse too must be a normal number.
    bound = 125 if size.dtype == torch.float32 else 1020
    power = torch.ldexp(torch.ones_like(size), exponent.clamp(-bound, bound))
    return torch.where((size > 0) & size.isfinite(), power, 1.0)


def _times(scale: Tensor, v: Tensor) -> Tensor:
    return scale.view(scale.shape + (1,) * (v.dim() - scale.dim())) * v


def _of_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a in those rows, b in the others."""
    return torch.where(rows.view(rows.shape + (1,) * (a.dim() - rows.dim())), a, b)


def _same_shape(name: str, found, like: Tensor) -> Tensor:
    checks.check_tensor(f"the result of {name}", found)
    if found.shape != like.shape:
        raise ValueError(
            f"{name} must keep the shape of its argument, {list(like.shape)}, got "
            f"{list(found.shape)}"
        )
    return found


def _image(matvec: Matvec, v: Tensor) -> Tensor:
    if checks.autocast_on(v):  # which would round A
        with without_autocast(v):
            return _same_shape("matvec", matvec(v), v)
    return _same_shape("matvec", matvec(v), v)


class _SymmetricProduct(torch.autograd.Function):
    """A v, whose derivatives are products with A again: A need not be made of torch operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v, matvec):
        found = _image(matvec, v)
        return found.view_as(found) if found is v else found

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.matvec = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _SymmetricProduct.apply(grad, ctx.matvec), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _SymmetricProduct.apply(tangent, ctx.matvec)


def _product(matvec: Matvec, v: Tensor) -> Tensor:
    # What compiles is made of torch operations, and Dynamo knows no Function with its own jvp.
    if torch.compiler.is_compiling():
        return _image(matvec, v)
    return _SymmetricProduct.apply(v, matvec)


def _check_callable(name: str, given) -> None:
    if not callable(given):
        raise TypeError(f"{name} must be callable, got {type(given).__name__}")


# --------------------------------------------------------------------------------------------------


def conjugate_direction_loss(
    b: Tensor, pred: Tensor, matvec: Matvec, *, reduction: str = "mean"
) -> Tensor:
    r"""What is left of b after the best step along the predicted direction.

    .. math:: \ell = \|b - \alpha A f\|^2, \qquad
              \alpha = \frac{\langle f, b \rangle}{\langle f, A f \rangle}

    The length of f does not matter. A direction :math:`f = A^{-1} b` has loss 0, and f = b is a
    step of steepest descent.

    Args:
        b: right-hand sides, ``(N,)`` or ``(B, *)``, of length 1 as a rule; floating.
        pred: f, of the same shape.
        matvec: v -> A v on such tensors, A symmetric and positive definite. In eager mode its
            derivative is taken to be A: it need not be made of torch operations, and what it holds
            gets no gradient. Of half types it is given float32.
        reduction: ``"none" | "mean" | "sum"`` over the batch.

    Returns:
        The loss, 0-d, or ``(B,)`` with ``reduction="none"``; of the promoted dtype, float32 for
        half types under autocast. Gradients for ``b`` and ``pred``. Of f = 0 it is NaN.

    Raises:
        TypeError: no tensor, no function, another dtype than floating.
        ValueError: shapes that differ; an unknown reduction.
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> b = torch.nn.functional.normalize(torch.randn(5, 2), dim=1)
        >>> pred = torch.randn(5, 2, requires_grad=True)
        >>> pyloss.functional.conjugate_direction_loss(b, pred, lambda v: v @ a).backward()

    Reference:
        Kaneda et al. A Deep Conjugate Direction Method for Iteratively Solving Linear Systems.
        arXiv 2205.10763.
    """
    checks.check_reduction(reduction)
    _check_callable("matvec", matvec)
    checks.check_floating("b", b)
    checks.check_has_dimension("b", b)
    checks.check_floating("pred", pred)
    checks.check_device("pred", pred, b, "b")
    _same_shape_as_b("pred", pred, b)
    dtype = torch.promote_types(b.dtype, pred.dtype)
    wide = accumulator_dtype(dtype)
    b, pred = b.to(wide), pred.to(wide)
    image = _product(matvec, pred)
    left = b - _times(_dot(pred, b) / _dot(pred, image), image)
    each = _dot(left, left)
    if reduction != "none" and each.dim():
        count = each.shape[0]
        each = summed(each)
        if reduction == "mean":
            each = each / each.new_full((), count)
    return each.to(checks.result_dtype(dtype, b))


def _same_shape_as_b(name: str, given: Tensor, b: Tensor) -> None:
    if given.shape != b.shape:
        raise ValueError(
            f"{name} must have the shape of b, {list(b.shape)}, got {list(given.shape)}"
        )


@torch.no_grad()
def dcdm_solve(
    matvec: Matvec,
    b: Tensor,
    f: Callable[[Tensor], Tensor],
    x0: Tensor | None = None,
    *,
    tol: float = 1e-6,
    maxiter: int = 500,
    n_orth: int = 2,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
    check_symmetric: bool = False,
) -> DCDMResult:
    r"""Solve A x = b along directions that a network makes of the residual.

    .. math::
        q &= f(r / \|r\|), \qquad
        p = q - \sum_i \frac{\langle q, A p_i \rangle}{\langle p_i, A p_i \rangle} p_i, \\
        x &\leftarrow x + \frac{\langle p, r \rangle}{\langle p, A p \rangle} p, \qquad
        r = b - A x

    over the last ``n_orth`` directions p_i. With f = identity it is the method of conjugate
    gradients, with :math:`f = A^{-1}` it ends after one step. An iteration costs one call of f and
    two of ``matvec``. The error :math:`\langle e, A e \rangle` never grows, whatever f gives.

    A direction without :math:`\langle p, A p \rangle > 0` is replaced by that of the residual, as
    conjugate gradients take it; where that has none either, A is not positive definite.

    Args:
        matvec: v -> A v on tensors of the shape of ``b``, A symmetric and positive definite.
        b: right-hand side ``(N,)``, or a batch ``(B, *)`` of them, which are solved together, each
            until it has converged; float32 or float64.
        f: the network, from residuals of length 1, of the shape of ``b``, to directions. Convert
            there if it has another dtype: ``lambda r: net(r.float()).double()``.
        x0: where to start, of the shape of ``b``; default 0.
        tol: ends at :math:`\|r\| \le` tol times the first residual; >= 0.
        maxiter: most iterations, >= 0.
        n_orth: number of directions that a new one is made conjugate to, >= 0.
        callback: called as ``callback(k, x, residual_norm)`` after iteration k = 1, 2, ...
        check_symmetric: look with two fixed vectors whether A is symmetric.

    Returns:
        :class:`pyloss.functional.DCDMResult`. Nothing has a gradient. b = 0 gives 0; a b with NaN
        gives NaN. Whether to go on is asked of the device in each iteration.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit; a number out of range; A is not symmetric
            (``check_symmetric``).
        RuntimeError: A is not positive definite; tensors on several devices; inside of
            ``torch.compile`` or a transform.

    Example:
        >>> import torch, pyloss
        >>> def laplace(v):  # (B, N): -v'' with zeros at both ends
        ...     v = torch.nn.functional.pad(v, (1, 1))
        ...     return 2 * v[:, 1:-1] - v[:, :-2] - v[:, 2:]
        >>> b = torch.randn(3, 16, dtype=torch.float64)
        >>> found = pyloss.functional.dcdm_solve(laplace, b, f=lambda r: r)
        >>> torch.allclose(laplace(found.x), b, atol=1e-5)
        True

    Reference:
        Kaneda et al. arXiv 2205.10763.
    """
    if torch.compiler.is_compiling() or functorch_active():
        raise RuntimeError(
            "dcdm_solve runs as long as the numbers say: call it outside of torch.compile and "
            "torch.func"
        )
    _check_callable("matvec", matvec)
    _check_callable("f", f)
    if callback is not None:
        _check_callable("callback", callback)
    checks.check_tensor("b", b)
    if b.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"b must be float32 or float64, got {b.dtype}")
    checks.check_has_dimension("b", b)
    checks.check_range("tol", tol, 0.0)
    maxiter = checks.checked_count("maxiter", maxiter)
    n_orth = checks.checked_count("n_orth", n_orth)
    if checks.checked_flag("check_symmetric", check_symmetric):
        _check_symmetric(matvec, b)
    x, r = torch.zeros_like(b), b
    if x0 is not None:
        checks.check_floating("x0", x0)
        checks.check_device("x0", x0, b, "b")
        _same_shape_as_b("x0", x0, b)
        # A right-hand side of 0 has the solution 0, and no tolerance to reach.
        x = _of_rows(_largest(b) == 0, x, x0.to(b.dtype))
        r = b - _image(matvec, x)
    # Squares of very large or small numbers have no place in the dtype: units of the residual.
    unit = _power_of_two(_largest(r))
    b, x, r = (_times(1 / unit, v) for v in (b, x, r))
    norm = _dot(r, r).sqrt()
    x = _of_rows(norm.isfinite(), x, torch.full_like(x, torch.nan))
    solver = _Solver(matvec, f, n_orth)
    limit = tol * norm
    norms, active = [norm], norm > limit
    iterations = torch.zeros_like(norm, dtype=torch.int64)
    while len(norms) <= maxiter and (left := int(active.sum())):
        rows = None if left == active.numel() else active
        x = x + solver.step(r, norm, rows)
        r = b - _image(matvec, x)
        iterations = iterations + active
        norm = _where(rows, _dot(r, r).sqrt(), norm)
        norms.append(norm)
        active = norm > limit
        if callback is not None:
            callback(len(norms) - 1, _times(unit, x), unit * norm)
    fallbacks = torch.zeros_like(iterations) + solver.fallbacks
    converged = (norm <= limit) & norm.isfinite()
    return DCDMResult(_times(unit, x), iterations, converged, unit * torch.stack(norms), fallbacks)


def _where(rows: Tensor | None, a: Tensor, b: Tensor | float) -> Tensor:
    """a in those rows, in all of them without `rows`; b in the others."""
    return a if rows is None else torch.where(rows, a, b)


class _Solver:
    """The directions so far, and how to make the next one."""

    def __init__(self, matvec: Matvec, f: Callable[[Tensor], Tensor], n_orth: int) -> None:
        self.matvec, self.f, self.n_orth = matvec, f, n_orth
        self.past: list[tuple[Tensor, Tensor, Tensor]] = []  # p, A p, <p, A p>
        self.fallbacks: Tensor | int = 0

    def step(self, r: Tensor, norm: Tensor, rows: Tensor | None) -> Tensor:
        """What to add to x: 0 but in those rows; None: in all of them."""
        unit = _times(1 / _where(rows, norm, 1.0), r)
        q = _same_shape("f", self.f(unit), r)
        if q.dtype != r.dtype:
            raise TypeError(f"f must give the dtype of b, {r.dtype}, got {q.dtype}")
        p, image, energy = self._conjugate(q)
        useless = _useless(energy, rows)
        if bool(useless.any()):
            p, image, energy = self._conjugate(_of_rows(useless, unit, q))
            self.fallbacks = self.fallbacks + useless.long()
            bad = _useless(energy, rows)
            if bool(bad.any()):
                raise RuntimeError(
                    "matvec is not positive definite: <p, A p> is "
                    f"{energy[bad].reshape(-1)[0].item():g} along the residual too"
                )
        if rows is not None:
            # Those that have ended keep directions of no effect, and no NaN.
            energy = torch.where(rows, energy, 1.0)
            p, image = (_of_rows(rows, v, torch.zeros_like(v)) for v in (p, image))
        if self.n_orth:
            self.past = [*self.past, (p, image, energy)][-self.n_orth :]
        return _times(_where(rows, _dot(p, r) / energy, 0.0), p)

    def _conjugate(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for p, image, energy in self.past:
            q = q - _times(_dot(q, image) / energy, p)
        image = _image(self.matvec, q)
        return q, image, _dot(q, image)


def _useless(energy: Tensor, rows: Tensor | None) -> Tensor:
    found = ~((energy > 0) & (energy < torch.inf))
    return found if rows is None else found & rows


def _check_symmetric(matvec: Matvec, b: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(b.shape, generator=generator, dtype=b.dtype).to(b.device) for _ in range(2))
    of_u, of_v = _image(matvec, u), _image(matvec, v)
    scale = (_dot(of_u, of_u) * _dot(v, v)).sqrt()
    off = ((_dot(u, of_v) - _dot(v, of_u)).abs() / scale).max() if b.numel() else 0.0
    if float(off) > 1e4 * torch.finfo(b.dtype).eps:
        raise ValueError(
            f"matvec is not symmetric: <u, A v> and <v, A u> differ by {float(off):.2g} of their "
            "scale"
        )


@torch.no_grad()
def lanczos_ritz_dataset(
    matvec: Matvec,
    shape: tuple[int, ...],
    size: int,
    *,
    steps: int | None = None,
    low: int | None = None,
    boost: float = 9.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Right-hand sides to train a network of :func:`dcdm_solve` with: random sums of Ritz vectors.

    .. math:: b = \frac{\sum_j c_j v_j}{\|\sum_j c_j v_j\|}, \qquad
              c_j \sim \mathcal{N}(0, 1) \times \begin{cases} \text{boost} & j < \text{low} \\
              1 & \text{else} \end{cases}

    v_j are the Ritz vectors of A after some Lanczos steps, in the order of their values. Low modes,
    which conjugate gradients are slow at, weigh more.

    Args:
        matvec: v -> A v on a batch ``(1, *shape)`` in float64, A symmetric.
        shape: of a vector.
        size: number of vectors.
        steps: of Lanczos, m; default: the size of a vector, at most 500. All its vectors are kept
            orthogonal: memory O(m N) in float64, time O(m^2 N).
        low: number of modes that weigh more; default m/2 + m/20.
        boost: by this factor, > 0.
        generator: of the start and of c.
        dtype, device: of the result; device also of the recursion.

    Returns:
        ``(size, *shape)``, each of length 1.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range.

    Example:
        >>> import torch, pyloss
        >>> def laplace(v):  # (B, N)
        ...     v = torch.nn.functional.pad(v, (1, 1))
        ...     return 2 * v[:, 1:-1] - v[:, :-2] - v[:, 2:]
        >>> pyloss.functional.lanczos_ritz_dataset(laplace, (16,), 100).shape
        torch.Size([100, 16])

    Reference:
        Kaneda et al. arXiv 2205.10763.
    """
    _check_callable("matvec", matvec)
    shape = _checked_shape(shape)
    count = torch.Size(shape).numel()
    size = checks.checked_count("size", size)
    steps = min(count, 500) if steps is None else checks.checked_count("steps", steps)
    if not 0 < steps <= count:
        raise ValueError(f"steps must be in [1, {count}], the size of a vector, got {steps}")
    if low is not None:
        low = checks.checked_count("low", low)
    checks.check_range("boost", boost, 0.0, open_low=True)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    device = torch.get_default_device() if device is None else torch.device(device)
    drawn = device if generator is None else generator.device

    def normal(*sizes: int) -> Tensor:
        found = torch.randn(sizes, generator=generator, dtype=torch.float64, device=drawn)
        return found.to(device)

    _, vectors = ritz(lambda v: _image(matvec, v), normal(1, *shape), steps)
    weights = normal(size, vectors.shape[0])
    weights[:, : vectors.shape[0] * 11 // 20 if low is None else low] *= boost
    b = weights @ vectors
    return (b / b.norm(dim=1, keepdim=True)).view(size, *shape).to(dtype)


def _checked_shape(shape) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple of integers, got {type(shape).__name__}")
    sizes = tuple(checks.checked_integer("shape", n) for n in shape)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"shape must hold sizes >= 1, got {list(sizes)}")
    return sizes
