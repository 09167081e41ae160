"""Groups of matrices of positive determinant: their algebra, samples of them, what they do to
images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.nn.lie._algebra import Algebra
from pyloss.nn.lie._spectral import sinhc
from pyloss.nn.lie.decomposition import coordinates, exponential, turned, wide

WEIGHTINGS = ("none", "haar")
ROTATIONS = ("uniform", "grid")


class GroupSample(NamedTuple):
    """Elements of a group, by the ``sample`` of :class:`GL`, :class:`SL` and :class:`SO`.

    Example:
        >>> import torch, pyloss
        >>> g, inverse, weight = pyloss.nn.lie.SL(2).sample(5)
        >>> g.shape, weight
        (torch.Size([5, 2, 2]), tensor([1., 1., 1., 1., 1.]))
    """

    g: Tensor  #: ``(m, n, n)``
    inverse: Tensor  #: their inverses
    weight: Tensor  #: ``(m,)``, of mean 1


class _Group:
    """What the three have in common. A = S^(1/2) R with X = log S normal and R uniform."""

    volume_preserving = True

    def __init__(
        self,
        algebra: Algebra,
        variance: float,
        rotations: str,
        max_angle: float,
        weighting: str,
    ) -> None:
        checks.check_range("variance", variance, 0.0)
        checks.check_one_of("rotations", rotations, ROTATIONS)
        checks.check_one_of("weighting", weighting, WEIGHTINGS)
        checks.check_range("max_angle", max_angle, 0.0)
        if max_angle > math.pi:
            raise ValueError(f"max_angle must be in [0, pi], got {max_angle}")
        if algebra.n != 2 and (rotations == "grid" or max_angle < math.pi):
            raise ValueError(f"rotations='grid' and max_angle are for n = 2, got n = {algebra.n}")
        if weighting == "haar" and not variance and algebra.symmetric:
            raise ValueError("weighting='haar' needs a variance > 0, got 0")
        self._algebra = algebra
        self.variance, self.rotations = float(variance), rotations
        self.max_angle, self.weighting = float(max_angle), weighting

    @property
    def n(self) -> int:
        """Of the n x n matrices."""
        return self._algebra.n

    @property
    def dim(self) -> int:
        """Of the group: how many coordinates its elements have."""
        return self._algebra.dim

    def xi(self, coords: Tensor) -> Tensor:
        """Elements ``(..., n, n)`` by their coordinates ``(..., dim)``: see
        :func:`pyloss.nn.lie.xi`."""
        checks.check_floating("coords", coords)
        if not coords.dim() or coords.shape[-1] != self.dim:
            raise ValueError(f"coords must be (..., {self.dim}), got {list(coords.shape)}")
        return exponential(wide(coords), self._algebra).to(coords.dtype)

    def xi_inv(self, g: Tensor) -> Tensor:
        """Coordinates ``(..., dim)`` of elements ``(..., n, n)``, n at most 3: see
        :func:`pyloss.nn.lie.xi_inv`. Of a matrix outside of the group, those of its part in it."""
        checks.check_floating("g", g)
        if g.shape[-2:] != (self.n, self.n):
            raise ValueError(f"g must be (..., {self.n}, {self.n}), got {list(g.shape)}")
        return coordinates(wide(g), self._algebra).to(g.dtype)

    @torch.no_grad()
    def sample(
        self,
        m: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> GroupSample:
        """m elements and their weights, computed in float64 on the generator's device. Weights are
        1, or, with ``weighting="haar"``, such that weighted means are integrals over Haar's measure
        but for a constant: their mean is 1."""
        m = checks.checked_count("m", m, 1)
        where = torch.device("cpu") if generator is None else generator.device
        like = dict(dtype=torch.float64, device=where)
        algebra = self._algebra
        c = torch.randn(m, algebra.symmetric_dim, generator=generator, **like)
        c = math.sqrt(self.variance) * c
        r = self._rotations(m, generator, like)
        half = F.pad(c / 2, (0, algebra.pairs))
        p, inverse = exponential(half, algebra), exponential(-half, algebra)
        weight = self._weight(c) if self.weighting == "haar" else c.new_ones(m)
        found = p @ r, r.mT @ inverse, weight
        return GroupSample(*(t.to(device, dtype) for t in found))

    def _rotations(self, m: int, generator: torch.Generator | None, like: dict) -> Tensor:
        n = self.n
        if n != 2:
            # Q of a normal matrix, with an R of positive diagonal, is uniform over O(n).
            q, r = torch.linalg.qr(torch.randn(m, n, n, generator=generator, **like))
            q = q * torch.diagonal(r, dim1=-2, dim2=-1).sgn().unsqueeze(-2)
            first = q[..., :1] * torch.linalg.det(q)[:, None, None]
            return torch.cat([first, q[..., 1:]], -1)
        if self.rotations == "grid":  # one shift for all: each angle is uniform by itself
            turn = torch.arange(m, **like) + torch.rand(1, generator=generator, **like)
            turn = turn / m
        else:
            turn = torch.rand(m, generator=generator, **like)
        return turned(self.max_angle * (2 * turn - 1))

    def _weight(self, c: Tensor) -> Tensor:
        """The density of Haar's measure in the coordinates of X over that of the samples."""
        if not self._algebra.symmetric:
            return c.new_ones(len(c))
        x, _ = self._algebra.matrices(F.pad(c, (0, self._algebra.pairs)))
        w = torch.linalg.eigvalsh(x)
        i, j = torch.triu_indices(self.n, self.n, 1, device=x.device)
        log_haar = sinhc(((w[:, i] - w[:, j]) / 2).square()).log().sum(-1)
        log_q = -c.square().sum(-1) / (2 * self.variance)
        return torch.softmax(log_haar - log_q, 0) * len(c)

    def _state(self) -> dict:
        names = ("n", "variance", "rotations", "max_angle", "weighting")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        plain = type(self)(self.n)._state()
        parts = [f"{k}={v!r}" for k, v in self._state().items() if v != plain[k]]
        return f"{type(self).__name__}({', '.join([str(self.n), *parts])})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._state() == other._state()

    def __hash__(self) -> int:
        return hash((type(self), *self._state().values()))


class GL(_Group):
    r"""Matrices of positive determinant.

    .. math:: A = S^{1/2} R, \qquad X = \log S \sim N(0, \text{variance}), \quad R \in SO(n)

    Args:
        n: of n x n matrices.
        variance: of each coordinate of X in samples.
        rotations: of samples: ``"uniform"``, or ``"grid"`` for n = 2: m angles at equal distances,
            moved together by a random one.
        max_angle: for n = 2: rotations of samples are by at most so much, :math:`\pi` being all.
        weighting: of samples: ``"none"``, integrals over the measure that they are drawn from, or
            ``"haar"``, over Haar's measure of the group (with few samples a few of them count).

    Attributes:
        n, dim: dim coordinates of each element.
        volume_preserving: whether all determinants are 1.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> import torch, pyloss
        >>> group = pyloss.nn.lie.GL(2, variance=0.2)
        >>> g, inverse, weight = group.sample(8, torch.Generator().manual_seed(0))
        >>> torch.testing.assert_close(group.xi(group.xi_inv(g)), g)
        >>> group.dim
        4

    Reference:
        Mironenco, Forré. arXiv 2310.11366.
    """

    volume_preserving = False

    def __init__(
        self,
        n: int = 2,
        *,
        variance: float = 0.1,
        rotations: str = "uniform",
        max_angle: float = math.pi,
        weighting: str = "none",
    ) -> None:
        algebra = Algebra(checks.checked_count("n", n, 1))
        super().__init__(algebra, variance, rotations, max_angle, weighting)


class SL(_Group):
    r"""Matrices of determinant 1: as :class:`GL`, with X of trace 0.

    Args:
        n, variance, rotations, max_angle, weighting: as for :class:`GL`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> import torch, pyloss
        >>> group = pyloss.nn.lie.SL(2)
        >>> torch.testing.assert_close(torch.linalg.det(group.sample(8).g), torch.ones(8))
        >>> group.dim
        3

    Reference:
        Mironenco, Forré. arXiv 2310.11366.
    """

    def __init__(
        self,
        n: int = 2,
        *,
        variance: float = 0.1,
        rotations: str = "uniform",
        max_angle: float = math.pi,
        weighting: str = "none",
    ) -> None:
        algebra = Algebra(checks.checked_count("n", n, 2), traceless=True)
        super().__init__(algebra, variance, rotations, max_angle, weighting)


class SO(_Group):
    r"""Rotations. Their uniform distribution is Haar's measure.

    Args:
        n: of n x n matrices; coordinates are there for 2 and 3.
        rotations, max_angle: as for :class:`GL`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> import math, torch, pyloss
        >>> group = pyloss.nn.lie.SO(3)
        >>> angles = group.xi_inv(group.sample(8).g).norm(dim=-1) / math.sqrt(2)
        >>> angles.max().item() <= math.pi + 1e-5
        True

    Reference:
        Mironenco, Forré. arXiv 2310.11366.
    """

    def __init__(
        self, n: int = 2, *, rotations: str = "uniform", max_angle: float = math.pi
    ) -> None:
        algebra = Algebra(checks.checked_count("n", n, 2), symmetric=False)
        super().__init__(algebra, 0.0, rotations, max_angle, "none")


def warp(images: Tensor, g: Tensor, translation: Tensor | None = None) -> Tensor:
    r"""Images under affine maps: :math:`f(g^{-1} (x - t))`, bilinear, 0 outside.

    Args:
        images: ``(B, C, H, W)``, floating; points x = (horizontal, vertical) lie in [-1, 1], the
            middles of the outer pixels at 1 / W and 1 / H from the edges.
        g: ``(B, 2, 2)`` or ``(2, 2)``, invertible, floating.
        translation: t, ``(B, 2)`` or ``(2,)``.

    Returns:
        Images of the same shape and dtype.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch, pyloss
        >>> image = torch.arange(4.0).view(1, 1, 2, 2)
        >>> turned = pyloss.nn.lie.warp(image, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> turned.round()
        tensor([[[[2., 0.],
                  [3., 1.]]]])
    """
    checks.check_floating("images", images)
    checks.check_floating("g", g)
    if images.dim() != 4:
        raise ValueError(f"images must be (B, C, H, W), got {list(images.shape)}")
    batch = len(images)
    if g.shape not in ((2, 2), (batch, 2, 2)):
        raise ValueError(f"g must be (2, 2) or ({batch}, 2, 2), got {list(g.shape)}")
    with checks.without_autocast(images):
        inverse = torch.linalg.inv(wide(g)).expand(batch, 2, 2)
        points = _middles(images, inverse.dtype)
        if translation is not None:
            checks.check_floating("translation", translation)
            if translation.shape not in ((2,), (batch, 2)):
                got = list(translation.shape)
                raise ValueError(f"translation must be (2,) or ({batch}, 2), got {got}")
            points = points - translation.to(inverse).expand(batch, 2)[:, None, None]
        points = (inverse[:, None, None] * points.unsqueeze(-2)).sum(-1)
        if not images.numel():
            return images + 0 * points.sum()
        return F.grid_sample(wide(images), points.to(wide(images)), align_corners=False).to(images)


def _middles(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Of all pixels, (1, H, W, 2)."""
    lines = [
        torch.arange(1 - n, n, 2, dtype=dtype, device=images.device) / n for n in images.shape[-2:]
    ]
    vertical, horizontal = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([horizontal, vertical], -1).unsqueeze(0)
