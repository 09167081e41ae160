"""The spectrum of a Hessian that is never written down: products, Lanczos, quadrature.

    T = Q^T A Q,    p(x) ~ mean_j sum_i tau_ji N(x; theta_ji, s^2),    tau_ji = (e_1 . u_ji)^2

m steps of Lanczos from a random vector v_j give a tridiagonal T with eigenvalues theta_ji and
eigenvectors u_ji. The vectors have the dtype of the operator; the numbers of T are float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.functional import _lanczos
from pyloss.functional._hessian import HessianOperator as HessianOperator
from pyloss.functional._progress import Progress

__all__ = [
    "HessianOperator",
    "SpectralDensity",
    "TopEigenvalues",
    "Tridiagonal",
    "hvp",
    "lanczos",
    "slq_density",
    "top_eigenvalues",
]

Matvec = Callable[[Tensor], Tensor]
DISTRIBUTIONS = ("rademacher", "gaussian")
_MARGIN = 5  # widths of the broadening, beyond the outermost node


class Tridiagonal(NamedTuple):
    """A symmetric operator in a Krylov space, of :func:`pyloss.analysis.lanczos`.

    Example:
        >>> import torch, pyloss
        >>> scale = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> alpha, beta, Q = pyloss.analysis.lanczos(lambda v: scale * v, 8, 5)
        >>> alpha.shape, beta.shape, Q.shape
        (torch.Size([5]), torch.Size([4]), torch.Size([8, 5]))
    """

    alpha: Tensor  #: diagonal, (m,), float64
    beta: Tensor  #: beside it, (m - 1,), float64
    Q: Tensor  #: orthonormal columns, (dim, m)


class TopEigenvalues(NamedTuple):
    """The largest eigenvalues, of :func:`pyloss.analysis.top_eigenvalues`.

    Example:
        >>> import torch, pyloss
        >>> scale = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> found = pyloss.analysis.top_eigenvalues(lambda v: scale * v, 2, dim=8)
        >>> found.values
        tensor([8.0000, 7.0000], dtype=torch.float64)
    """

    values: Tensor  #: descending, (k,), float64
    vectors: Tensor  #: of length 1, as rows, (k, dim)
    errors: Tensor  #: an eigenvalue is within this of the value, (k,), float64


class SpectralDensity(NamedTuple):
    """Of :func:`pyloss.analysis.slq_density`: k probes of m nodes; float64.
    :func:`pyloss.visualize.draw_spectrum` draws it.

    Example:
        >>> import torch, pyloss
        >>> scale = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> found = pyloss.analysis.slq_density(lambda v: scale * v, 8, probes=4)
        >>> f"{found.trace:.6f} {found.of(torch.log).exp():.6f}"  # of a diagonal no probe is wrong
        '36.000000 40320.000000'
    """

    grid: Tensor  #: where the density is, (points,)
    density: Tensor  #: integrates to 1, (points,)
    nodes: Tensor  #: Ritz values, (k, m); behind an early end the last one again
    weights: Tensor  #: add up to 1 in each row, (k, m); 0 behind an early end
    trace: Tensor  #: 0-d
    trace_error: Tensor  #: standard error of the trace over the probes, 0-d; NaN of one probe
    sigma: Tensor  #: width of the broadening, 0-d
    dim: int  #: P, of the operator

    def of(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        r"""Trace of a function of the operator, :math:`\operatorname{tr} f(A)`, 0-d.

        .. math:: \frac{P}{k} \sum_j \sum_i \tau_{ji}\, f(\theta_{ji})

        Args:
            f: of a tensor, elementwise.
        """
        terms = torch.where(self.weights == 0, 0.0, self.weights * f(self.nodes))
        return self.dim * terms.sum(-1).mean()


# --------------------------------------------------------------------------------------------------
# Products


def hvp(
    loss_fn: Callable[..., Tensor],
    params: nn.Module | dict[str, Tensor] | Iterable[Tensor],
    batches: Iterable[Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> HessianOperator:
    r"""Products with the Hessian of a loss, by double backward.

    .. math:: H v = \nabla_\theta \langle \nabla_\theta L(\theta), v \rangle, \qquad
              H = \sum_i w_i H_i \Big/ \sum_i w_i

    Without batches ``loss_fn`` is called once, here, and its graph serves all products; so what it
    draws (dropout) is the same in each. With batches each product goes through all of them and
    keeps the graph of one at a time.

    Memory: the graph of the gradient of one batch (two to three times the activations of its
    forward pass), and three vectors of P numbers in a product.

    Args:
        loss_fn: returns a scalar with its graph; given batches, of one of them.
        params: a module, or tensors. Those that are frozen do not count, and one that is shared
            counts once; buffers are constants, but batch norm in training mode moves its averages
            in each call.
        batches: a list or a DataLoader, gone through in the same order each time.
        weights: of the batches, such as their sizes; default: all alike.

    Returns:
        A :class:`pyloss.analysis.HessianOperator`, which takes and returns flat vectors, in the
        order of the parameters; valid until these change.

    Raises:
        TypeError: arguments of the wrong type, batches that can be gone through once only.
        ValueError: no parameter that requires a gradient, weights that do not fit.
        RuntimeError: a loss that is no scalar or has no graph; parameters on several devices;
            operations without a second derivative (flash attention: use
            ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``).

    Example:
        >>> import torch, pyloss
        >>> model, x = torch.nn.Linear(3, 1), torch.eye(3)
        >>> hessian = pyloss.analysis.hvp(lambda: model(x).square().sum(), model)
        >>> hessian(torch.tensor([1.0, 0.0, 0.0, 1.0]))  # weight, bias
        tensor([4., 2., 2., 8.])

    Reference:
        Pearlmutter. Fast Exact Multiplication by the Hessian (1994).
    """
    return HessianOperator(loss_fn, params, batches, weights)


# --------------------------------------------------------------------------------------------------
# Lanczos


def lanczos(
    matvec: Matvec,
    dim: int,
    steps: int,
    *,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tridiagonal:
    r"""Tridiagonal form of a symmetric operator in the Krylov space of a vector.

    .. math:: A q_j = \beta_{j-1} q_{j-1} + \alpha_j q_j + \beta_j q_{j+1}, \qquad Q^T Q = 1

    Every vector is made orthogonal to all before it, twice where once is not enough. The space is
    exhausted, and the recursion ends, where :math:`\beta` is within rounding of 0: below 1e-10 (or
    ten units of rounding of the vectors) of what A makes of a unit vector.

    Memory: ``steps * dim`` numbers; all steps together read them ``steps`` times.

    Args:
        matvec: v -> A v, both ``(dim,)``, such as :func:`hvp` returns.
        dim: size of a vector.
        steps: m, at most; > dim means dim.
        v0: the first vector, ``(dim,)``, not 0; its dtype is that of Q. Default: normal numbers, in
            ``matvec.dtype`` on ``matvec.device`` where it has them, else float64.
        generator: of these.

    Returns:
        :class:`pyloss.analysis.Tridiagonal`, ``(alpha, beta, Q)``.

    Raises:
        TypeError, ValueError: arguments of the wrong type or shape, a first vector of 0.

    Example:
        >>> import torch, pyloss
        >>> scale = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> alpha, beta, Q = pyloss.analysis.lanczos(lambda v: scale * v, 8, 8)
        >>> T = alpha.diag() + beta.diag(1) + beta.diag(-1)
        >>> torch.linalg.eigvalsh(T)
        tensor([1.0000, 2.0000, 3.0000, 4.0000, 5.0000, 6.0000, 7.0000, 8.0000],
               dtype=torch.float64)

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    dim = _checked_dim(matvec, dim)
    steps = checks.checked_count("steps", steps, 1)
    checks.check_generator(generator)
    if v0 is None:
        v0 = _drawn(matvec, dim, "gaussian", generator)
    else:
        checks.check_floating("v0", v0)
        if v0.shape != (dim,):
            raise ValueError(f"v0 must have the shape {[dim]}, got {list(v0.shape)}")
        if not bool(v0.any()):
            raise ValueError("v0 must not be 0")
    found = _recursion(matvec, v0.detach(), steps)
    return Tridiagonal(found.diagonal, found.beside, found.basis.T)


def top_eigenvalues(
    matvec: Matvec,
    k: int = 1,
    *,
    dim: int | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> TopEigenvalues:
    r"""The largest eigenvalues of a symmetric operator, with their vectors and error bounds.

    .. math:: \min_i |\lambda_i - \theta| \le \beta_m\, |e_m \cdot u|

    Those of the smallest are the negatives of the largest of ``lambda v: -matvec(v)``.

    Args:
        matvec: v -> A v, ``(dim,)``.
        k: how many.
        dim: size of a vector; default: ``matvec.dim``.
        steps: of Lanczos, >= k; default: 40 + 2 k. An eigenvalue that is there several times is
            found once.
        generator: of the first vector.

    Returns:
        :class:`pyloss.analysis.TopEigenvalues`; fewer than k where the Krylov space ends sooner.

    Raises:
        TypeError, ValueError: as :func:`lanczos`.

    Example:
        >>> import torch, pyloss
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(30, 4)
        >>> hessian = pyloss.analysis.hvp(lambda: model(x).square().mean(), model)
        >>> values, vectors, errors = pyloss.analysis.top_eigenvalues(hessian, 2)
        >>> torch.allclose(hessian(vectors[0]), values[0].float() * vectors[0], atol=1e-5)
        True

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    dim = _checked_dim(matvec, dim)
    k = checks.checked_count("k", k, 1)
    steps = 40 + 2 * k if steps is None else checks.checked_count("steps", steps, 1)
    if k > min(steps, dim):
        raise ValueError(f"k must be at most steps and dim, {min(steps, dim)}, got {k}")
    checks.check_generator(generator)
    found = _recursion(matvec, _drawn(matvec, dim, "gaussian", generator), steps)
    values, vectors = _lanczos.eigen(found)
    values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
    in_space = vectors.T.to(found.basis.dtype) @ found.basis
    return TopEigenvalues(values, in_space, found.rest * vectors[-1].abs())


def slq_density(
    matvec: Matvec,
    dim: int | None = None,
    *,
    probes: int = 8,
    steps: int = 64,
    sigma: float | None = None,
    grid: Tensor | int = 512,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    r"""Density of the eigenvalues of a symmetric operator, and its trace, by stochastic Lanczos
    quadrature.

    .. math:: p(x) \approx \frac1k \sum_j \sum_i \tau_{ji}\, \mathcal N(x; \theta_{ji}, s^2), \qquad
              \operatorname{tr} A \approx \frac Pk \sum_j \sum_i \tau_{ji}\, \theta_{ji}

    It costs k m products, and the memory of :func:`lanczos` for one probe at a time.

    Args:
        matvec: v -> A v, ``(dim,)``, such as :func:`hvp` returns.
        dim: P; default: ``matvec.dim``.
        probes: k random vectors.
        steps: m of Lanczos from each.
        sigma: s > 0; default: a hundredth of the range of the nodes.
        grid: points that cover all nodes, or where the density is wanted, ``(points,)``.
        distribution: of the probes' numbers, ``"rademacher"`` (-1 and 1) or ``"gaussian"``; the
            vectors have length 1 in either case.
        generator: of these.
        progress: whether to draw a bar on stderr.

    Returns:
        :class:`pyloss.analysis.SpectralDensity`; NaN where A gives NaN.

    Raises:
        TypeError, ValueError: arguments of the wrong type, out of range.

    Example:
        >>> import torch, pyloss
        >>> model, x = torch.nn.Linear(4, 2), torch.randn(30, 4)
        >>> hessian = pyloss.analysis.hvp(lambda: model(x).square().mean(), model)
        >>> found = pyloss.analysis.slq_density(hessian, probes=3)
        >>> float(torch.trapezoid(found.density, found.grid).round(decimals=3))
        1.0

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092. Ghorbani, Krishnan, Xiao. arXiv 1901.10159.
    """
    dim = _checked_dim(matvec, dim)
    probes = checks.checked_count("probes", probes, 1)
    steps = min(dim, checks.checked_count("steps", steps, 1))
    if sigma is not None:
        checks.check_range("sigma", sigma, 0.0, open_low=True)
    if isinstance(grid, Tensor):
        checks.check_floating("grid", grid)
        if grid.dim() != 1 or not grid.numel():
            raise ValueError(f"grid must have one dimension and points, got {list(grid.shape)}")
    else:
        grid = checks.checked_count("grid", grid, 2)
    checks.check_one_of("distribution", distribution, DISTRIBUTIONS)
    checks.check_generator(generator)
    progress = checks.checked_flag("progress", progress)
    bar = Progress("spectrum", probes * steps, sys.stderr) if progress else None
    done = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal done
        found = matvec(v)
        done += 1
        if bar is not None:
            bar.update(done)
        return found

    nodes, weights = [], []
    for probe in range(1, probes + 1):
        recursion = _recursion(counted, _drawn(matvec, dim, distribution, generator), steps)
        values, vectors = _lanczos.eigen(recursion)
        missing = steps - len(values)
        if missing:
            done = probe * steps
            if bar is not None:
                bar.update(done)
        nodes.append(torch.cat([values, values[-1:].expand(missing)]))
        weights.append(torch.cat([vectors[0].square(), values.new_zeros(missing)]))
    return _density(torch.stack(nodes), torch.stack(weights), dim, sigma, grid)


def _density(
    nodes: Tensor, weights: Tensor, dim: int, sigma: float | None, grid: Tensor | int
) -> SpectralDensity:
    low, high = nodes.amin(), nodes.amax()
    if sigma is None:
        width = (high - low) / 100
        # One eigenvalue alone has no range: of a width that shows it.
        width = torch.where(width > 1e-12 * high.abs(), width, high.abs() / 100)
        width = torch.where(width == 0, 0.01, width)
    else:
        width = nodes.new_tensor(float(sigma))
    if isinstance(grid, Tensor):
        grid = grid.detach().to(nodes)
    else:
        part = torch.linspace(0, 1, grid, dtype=nodes.dtype, device=nodes.device)
        grid = low - _MARGIN * width + part * (high - low + 2 * _MARGIN * width)
    density = torch.zeros_like(grid)
    for theta, tau in zip(nodes, weights):  # points x m numbers at a time
        off = (grid[:, None] - theta) / width
        density += (off.square().div(-2).exp() @ tau) / (width * math.sqrt(2 * math.pi))
    quadratic = dim * (nodes * weights).sum(-1)
    error = width.new_tensor(math.nan)
    if len(nodes) > 1:
        error = quadratic.std() / math.sqrt(len(nodes))
    return SpectralDensity(
        grid, density / len(nodes), nodes, weights, quadratic.mean(), error, width, dim
    )


def _recursion(matvec: Matvec, start: Tensor, steps: int) -> _lanczos.Recursion:
    def checked(v: Tensor) -> Tensor:
        found = matvec(v)
        checks.check_floating("what matvec returns", found)
        if found.shape != v.shape:
            raise ValueError(
                f"matvec must return the shape {list(v.shape)}, got {list(found.shape)}"
            )
        return found.detach()

    return _lanczos.lanczos(checked, start, steps)


def _drawn(
    matvec: Matvec, dim: int, distribution: str, generator: torch.Generator | None
) -> Tensor:
    dtype = getattr(matvec, "dtype", torch.float64)
    device = getattr(matvec, "device", None) or torch.get_default_device()
    where = dict(generator=generator, device=device if generator is None else generator.device)
    if distribution == "gaussian":
        found = torch.randn(dim, dtype=dtype, **where)
    else:
        found = torch.randint(2, (dim,), dtype=dtype, **where).mul_(2).sub_(1)
    return found.to(device)


def _checked_dim(matvec, dim) -> int:
    if not callable(matvec):
        raise TypeError(f"matvec must be callable, got {type(matvec).__name__}")
    known = getattr(matvec, "dim", None)
    if dim is None:
        if not isinstance(known, int):
            raise TypeError("dim is needed: matvec has no dim of its own")
        return known
    dim = checks.checked_count("dim", dim, 1)
    if isinstance(known, int) and known != dim:
        raise ValueError(f"dim must be that of matvec, {known}, got {dim}")
    return dim
