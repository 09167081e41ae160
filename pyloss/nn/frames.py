"""A network made invariant or equivariant by an average over frames of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._frame_action import OUT_TYPES, fold, without_padding
from pyloss.functional._frames import (
    MAX_DIM,
    axes_of,
    check_cloud_options,
    check_clouds,
    clouds_of,
)
from pyloss.nn._module import OptionsModule

IN_TYPES = ("position", "vector")


class FrameAverage(OptionsModule):
    r"""Any backbone made exactly symmetric under moves of its points.

    .. math:: \frac{1}{|\mathcal F(x)|} \sum_{(R, t) \in \mathcal F(x)}
              \rho(R, t)\, f\big( (x - t) R \big)

    with the frames of :func:`pyloss.functional.pca_frames`. The backbone is called once, on a batch
    F times as large (F = 8 for O(3) and E(3), 4 for SO(3) and SE(3)), frame by frame: row
    :math:`f B + b` is cloud b in frame f.

    ============= =========================================== ====================
    ``out_type``  the backbone returns                        :math:`\rho`
    ============= =========================================== ====================
    ``invariant`` ``(F B, *)``                                y
    ``position``  ``(F B, *, d)``                             :math:`y R^\top + t`
    ``vector``    ``(F B, *, d)``                             :math:`y R^\top`
    ``tensor2``   ``(F B, *, d, d)``                          :math:`R\, y\, R^\top`
    ============= =========================================== ====================

    With ``offsets`` the backbone gets ``(F P, d)`` points and the keyword ``offsets`` of F B
    clouds, and returns an entry for each cloud or for each point.

    Args:
        backbone: module or function of (points, \*extra), with the keywords ``vectors`` and
            ``offsets`` where these are given.
        group: ``'O'``, ``'SO'``, ``'E'`` or ``'SE'``.
        dim: d, from 1 to 8.
        in_type: of x: ``'position'``, or ``'vector'``, which no translation changes: E acts as O,
            SE as SO.
        out_type: of the result, see above.
        stochastic: while training one frame of each cloud, drawn by torch's generator: F = 1, and
            equivariant in expectation. In eval mode all of them.
        detach_frame: frames are constants for the gradient. Without, the gradient of an invariant
            energy has no net force, nor a net torque, to rounding.
        degenerate, gap_tol: see :func:`pyloss.functional.pca_frames`.

    Shape:
        - x: ``(B, N, d)``, or ``(P, d)`` with ``offsets``
        - extra: tensors with B entries, ragged B or P, in their first dimension, which are repeated
          for each frame; anything else is handed on as it is
        - vectors: ``(B, *, d)`` or ``(P, *, d)``: velocities, forces; turned, not moved
        - offsets: ``(B + 1)``; weight: ``(B, N)`` or ``(P)``, for the frames alone; at weight 0 a
          point that is not finite, or its vector in ``vectors`` of the shape of x, counts as 0
        - output: ``(B, *)``, ragged also ``(P, *)``, in the dtype of the backbone's

    Raises:
        TypeError, ValueError: options that are none; arguments or a result of another shape; what
            :func:`pyloss.functional.pca_frames` raises.

    Example:
        >>> import torch, pyloss
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(15, 1))
        >>> energy = pyloss.nn.FrameAverage(net, "E")
        >>> x, turn = torch.randn(4, 5, 3), torch.linalg.qr(torch.randn(3, 3))[0]
        >>> torch.testing.assert_close(energy(x @ turn + 1), energy(x), rtol=1e-4, atol=1e-4)

    Reference:
        Puny et al. arXiv 2110.03336. One frame at a time while training: Duval et al. FAENet,
        arXiv 2305.05577.
    """

    def __init__(
        self,
        backbone: Callable[..., Tensor],
        group: str = "E",
        *,
        dim: int = 3,
        in_type: str = "position",
        out_type: str = "invariant",
        stochastic: bool = False,
        detach_frame: bool = False,
        degenerate: str = "warn",
        gap_tol: float | None = None,
    ) -> None:
        if not callable(backbone):
            raise TypeError(f"backbone must be callable, got {type(backbone).__name__}")
        dim = checks.checked_count("dim", dim, 1)
        if dim > MAX_DIM:
            raise ValueError(f"dim must be from 1 to {MAX_DIM}, got {dim}")
        super().__init__(
            group=group,
            dim=dim,
            in_type=in_type,
            out_type=out_type,
            stochastic=checks.checked_flag("stochastic", stochastic),
            detach_frame=checks.checked_flag("detach_frame", detach_frame),
            degenerate=degenerate,
            gap_tol=gap_tol,
        )
        self._check()
        self.backbone = backbone

    def _check(self) -> None:
        check_cloud_options(self.group, self.degenerate)
        checks.check_one_of("in_type", self.in_type, IN_TYPES, repr)
        checks.check_one_of("out_type", self.out_type, OUT_TYPES, repr)
        if self.gap_tol is not None:
            checks.check_range("gap_tol", self.gap_tol, 0)
        if self.in_type == "vector" and self.out_type == "position":
            raise ValueError("in_type='vector' has no place for out_type='position'")

    def forward(
        self,
        x: Tensor,
        *extra: Any,
        vectors: Tensor | None = None,
        offsets: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        self._check()
        check_clouds(x, weight, offsets, self.degenerate, self.dim)
        clouds = clouds_of(x, weight, offsets)
        if vectors is not None:
            checks.check_floating("vectors", vectors)
            if vectors.shape[:1] != x.shape[:1] or vectors.shape[-1:] != x.shape[-1:]:
                raise ValueError(
                    f"vectors must be [{x.shape[0]}, *, {self.dim}] beside x of shape "
                    f"{list(x.shape)}, got shape {list(vectors.shape)}"
                )
        group = self.group if self.in_type == "position" else self.group.replace("E", "O")
        axes, _ = axes_of(
            clouds,
            group=group,
            gap_tol=self.gap_tol,
            degenerate=self.degenerate,
            detach=self.detach_frame,
        )
        folded = fold(clouds, axes, group, self.stochastic and self.training)
        if weight is not None:
            if vectors is not None and vectors.shape == x.shape:
                vectors = without_padding(vectors, weight)
            x = without_padding(x, weight)
        more: dict[str, Tensor] = {}
        if vectors is not None:
            more["vectors"] = folded.into(vectors, moves=False)
        if offsets is not None:
            more["offsets"] = folded.offsets()
        inputs = [folded.repeated(e, f"extra argument {i}") for i, e in enumerate(extra)]
        result = self.backbone(folded.into(x, moves=True), *inputs, **more)
        return folded.average(result, self.out_type)
