"""The linear layer below a spherical loss, whose step does not depend on the number of classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _spherical as spherical
from pyloss.functional import _spherical_layer as factored
from pyloss.functional._rows import check_options
from pyloss.nn._module import OptionsModule

_LOSSES = ("z", "mse", "taylor", "spherical")


class SphericalLinear(OptionsModule):
    r"""A linear layer without bias and a spherical loss of its scores, for very many classes.

    .. math:: o = W h, \qquad W = V U + \mathbf{1} w_0^\top, \qquad
              \ell = f\Big(o_y,\ \sum_j o_j,\ \sum_j o_j^2\Big)

    The scores are never made. Value, gradient of h and an SGD step of W take
    :math:`O(m d^2 + m^2 d)` for m rows of d features, whatever the number of classes D, and are
    those of the dense layer: the step changes the m rows of V that are targets, and U and
    :math:`w_0`. Only plain SGD, with weight decay, has such a step; momentum and Adam have none.

    W is no parameter: optimizers do not see it. The order of a training step is

    .. code-block:: python

        loss = layer(model(x), target)
        loss.backward()              # fills the gradient of the model
        optimizer.step()             # of the model
        layer.step(lr)               # of W

    Args:
        in_features: d.
        num_classes: D.
        loss: ``"z"`` (:func:`pyloss.functional.spherical_z_loss`), ``"mse"``
            (:func:`~pyloss.functional.one_hot_mse_loss`), ``"taylor"``
            (:func:`~pyloss.functional.taylor_softmax_loss`), ``"spherical"``
            (:func:`~pyloss.functional.spherical_softmax_loss`), or a function of three tensors
            (o_y, s, q) as :func:`~pyloss.functional.spherical_loss` takes.
        a, b: of ``"z"``.
        eps: of ``"spherical"``.
        ignore_index: rows with this target add nothing.
        reduction: ``"mean" | "sum" | "none"``; over the rows that are not ignored.
        stabilize_every: steps between two looks at the singular values of U. Those that have left
            [1/2, 2] go back to 1, in O(D d) each. Large steps are looked at sooner.
        refresh_every: steps after which :math:`W^\top W` is computed anew, in O(D d^2), to be rid
            of what rounding has added up.
        group: a process group: :meth:`step` gathers the rows of all its ranks, and takes the mean
            over them of the gradients, as DDP does for other layers. Construct the layer alike on
            all ranks, and tell DDP ``broadcast_buffers=False``.
        device, dtype: of V; the small factors are float64. No half type: it would not hold a step.

    Shape:
        - h: ``(..., d)``, floating
        - target: ``(...)``, int64, int32 or uint8
        - output: scalar, or the shape of ``target`` with ``reduction="none"``; of the dtype of h,
          float32 for half types under autocast

    Attributes:
        weight: W, made anew at each access, without a gradient; may be assigned.
        steps: steps taken, a buffer.

    Raises:
        TypeError: ``h`` or ``target`` is no tensor; an option of the wrong type.
        ValueError: shapes that do not fit; an option out of range; fewer than two classes for
            ``"z"``.
        IndexError: a label out of range (CPU; on a GPU its loss is NaN).
        RuntimeError: a second derivative; a backward after a step since its forward; a target of
            the wrong dtype, a tensor on another device.

    Example:
        >>> import torch, pyloss
        >>> layer = pyloss.nn.SphericalLinear(16, 100_000)
        >>> h, y = torch.randn(8, 16, requires_grad=True), torch.randint(100_000, (8,))
        >>> loss = layer(h, y)
        >>> loss.backward()
        >>> layer.step(lr=0.1)
        >>> bool(layer(h, y) < loss)
        True

    Reference:
        Vincent, de Brebisson, Bouthillier. Efficient Exact Gradient Update for training Deep
        Networks with Very Large Sparse Targets. arXiv 1412.7091. de Brebisson, Vincent.
        arXiv 1604.08859.
    """

    classes: Tensor
    shared: Tensor
    inverse: Tensor
    offset: Tensor
    gram: Tensor
    total: Tensor
    steps: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: str | Callable[[Tensor, Tensor, Tensor], Tensor] = "z",
        a: float = 1.0,
        b: float = 0.0,
        *,
        eps: float = 1e-3,
        ignore_index: int = -100,
        reduction: str = "mean",
        stabilize_every: int = 100,
        refresh_every: int = 1000,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = dict(
            in_features=in_features, num_classes=num_classes, stabilize_every=stabilize_every,
            refresh_every=refresh_every,
        )  # fmt: skip
        for name, value in sizes.items():
            sizes[name] = checks.checked_integer(name, value)
            if sizes[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not callable(loss):
            checks.check_one_of("loss", loss, _LOSSES, repr, " or a function, ")
        if loss == "z":
            spherical.check_two_classes("the z-loss", sizes["num_classes"])
        spherical.check_slope(a, b)
        spherical.check_eps(eps)
        check_options(ignore_index=ignore_index, reduction=reduction)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        rest = dict(a=a, b=b, eps=eps, ignore_index=ignore_index, reduction=reduction)
        super().__init__(
            in_features=sizes["in_features"], num_classes=sizes["num_classes"], loss=loss, **rest,
            stabilize_every=sizes["stabilize_every"], refresh_every=sizes["refresh_every"],
            group=group,
        )  # fmt: skip
        d = self.in_features
        small = dict(device=device, dtype=torch.float64)
        self.register_buffer(
            "classes", torch.empty(self.num_classes, d, device=device, dtype=dtype)
        )
        self.register_buffer("shared", torch.eye(d, **small))
        self.register_buffer("inverse", torch.eye(d, **small))
        self.register_buffer("offset", torch.zeros(d, **small))
        self.register_buffer("gram", torch.zeros(d, d, **small))
        self.register_buffer("total", torch.zeros(d, **small))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self._pending: list[factored.Rows] = []
        self._warned = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W uniform within 1 / sqrt(d), as that of ``torch.nn.Linear``."""
        bound = 1 / math.sqrt(self.in_features)
        self.weight = self.classes.uniform_(-bound, bound)

    @property
    def weight(self) -> Tensor:
        with torch.no_grad(), factored.without_autocast(self.classes):
            own = self.classes @ self.shared.to(self.classes.dtype)
            return own.add_(self.offset.to(own.dtype))

    @weight.setter
    def weight(self, value: Tensor) -> None:
        checks.check_floating("weight", value)
        if value.shape != self.classes.shape:
            expected = list(self.classes.shape)
            raise ValueError(f"weight must have the shape {expected}, got {list(value.shape)}")
        with torch.no_grad():
            for t in (self.shared, self.inverse):
                t.zero_().diagonal().fill_(1)
            self.offset.zero_()
            self.classes.copy_(value)
            factored.refresh(self._factors)
        self.zero_update()

    def logits(self, h: Tensor) -> Tensor:
        """All scores of h, ``(..., D)``: O(D d) a row, for predictions. Differentiable in h."""
        self._check_features(h)
        through = h.double() @ self.shared.T
        own = through.to(self.classes.dtype) @ self.classes.T
        return (own + (h.double() @ self.offset).unsqueeze(-1).to(own.dtype)).to(h.dtype)

    @factored.eager
    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        self._check_features(h)
        checks.check_tensor("target", target)
        checks.check_index_dtype("target", target)
        checks.check_device("target", target, h, "h")
        if target.shape != h.shape[:-1]:
            expected = list(h.shape[:-1])
            raise ValueError(f"target must have the shape {expected}, got {list(target.shape)}")
        rows = h.reshape(-1, self.in_features)
        moments, ignored = factored.moments(
            self._factors, rows, target.reshape(-1), self.ignore_index, self._pending.append
        )
        each = torch.where(ignored, 0.0, self._formula(moments))
        dtype = checks.result_dtype(h.dtype, h)
        if self.reduction == "none":
            return each.view(target.shape).to(dtype)
        total = each.sum()
        return (total / (~ignored).sum() if self.reduction == "mean" else total).to(dtype)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        r"""W becomes :math:`W - \eta (G + \lambda W)`, with G the sum of the gradients of all
        backward calls since the last step; without any, only the decay is left. With ``group`` all
        ranks call it, those without rows too.

        To clip, scale the rate: ``layer.step(lr * min(1, bound / layer.gradient_norm()))``. After a
        scaled loss (``GradScaler``) divide the rate by the scale.

        Args:
            lr: :math:`\eta`, >= 0.
            weight_decay: :math:`\lambda`, >= 0, with :math:`\eta \lambda < 1`.
        """
        checks.check_range("lr", lr, 0.0)
        checks.check_range("weight_decay", weight_decay, 0.0)
        lr = float(lr)
        keep = 1.0 - lr * float(weight_decay)
        if not keep > 0:
            raise ValueError(f"lr * weight_decay must be < 1, got {lr * weight_decay}")
        with factored.without_autocast(self.classes):  # W is no half type
            f, rows = self._factors, self._gathered()
            self.zero_update()
            if keep < 1:
                factored.decay(f, keep)
            if len(rows.h):
                # The gradient is that of W before the decay; of o^2 it is proportional to W.
                rows.grads[2].div_(keep)
                if not factored.update(f, rows, lr):
                    self._warn()
                    factored.update_dense(f, rows, lr)
            self.steps += 1
            taken = int(self.steps)
            if taken % self.stabilize_every == 0 or factored.out_of_shape(f):
                factored.stabilize(f)
            if taken % self.refresh_every == 0:
                factored.refresh(f)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The Frobenius norm of the gradient of W that the next step will take, 0-d, float64. With
        ``group`` all ranks must call it, as they must :meth:`step`."""
        return factored.gradient_norm(self._factors, self._gathered())

    def zero_update(self) -> None:
        """Forgets the gradients of the backward calls since the last step."""
        self._pending.clear()

    # ----------------------------------------------------------------------------------------------

    @property
    def _factors(self) -> factored.Factors:
        return factored.Factors(
            self.classes, self.shared, self.inverse, self.offset, self.gram, self.total
        )

    @property
    def _formula(self) -> Callable[[spherical.Moments], Tensor]:
        if callable(self.loss):
            return spherical.of_sums(self.loss)
        return {
            "z": partial(spherical.z_loss, a=self.a, b=self.b),
            "mse": spherical.one_hot_mse,
            "taylor": spherical.taylor_softmax,
            "spherical": partial(spherical.spherical_softmax, eps=self.eps),
        }[self.loss]

    def _check_features(self, h: Tensor) -> None:
        checks.check_floating("h", h)
        if h.dim() == 0 or h.shape[-1] != self.in_features:
            raise ValueError(f"h must have {self.in_features} features, got {list(h.shape)}")
        checks.check_device("h", h, self.classes, "the layer")

    def _gathered(self) -> factored.Rows:
        """The rows of all backward calls since the last step, of all ranks."""
        nothing = self.total.new_zeros
        found = [factored.Rows(nothing(0, self.in_features), nothing(0).long(), nothing(3, 0))]
        found += self._pending
        h, target = torch.cat([r.h for r in found]), torch.cat([r.target for r in found])
        grads = torch.cat([r.grads for r in found], 1)
        if self.group is None:
            return factored.Rows(h, target, grads)
        from pyloss.functional._contrastive_group import all_rows  # with its first use

        # Labels are exact in float64.
        own = torch.cat([h, target.double().unsqueeze(1), grads.T], 1)
        every = all_rows("the rows", own, self.group, None)
        ranks = torch.distributed.get_world_size(self.group)
        d = self.in_features
        return factored.Rows(every[:, :d], every[:, d].long(), every[:, d + 1 :].T / ranks)

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                "the step is so large that U would be singular: this one is taken with the dense "
                "weight, which costs as much as a dense layer; consider a smaller rate",
                UserWarning,
                stacklevel=3,
            )
            self._warned = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.zero_update()  # gradients of another W

    def _apply(self, fn: Callable, recurse: bool = True) -> SphericalLinear:
        """The factors stay float64, V float32 or float64: half types would not hold a step."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            half = now.dtype not in (torch.float32, torch.float64)
            if now.is_floating_point() and (half or name != "classes"):
                self._buffers[name] = buffer.to(now.device)
        if self.classes.dtype != before["classes"].dtype and not self.classes.is_meta:
            factored.refresh(self._factors)
        return self
