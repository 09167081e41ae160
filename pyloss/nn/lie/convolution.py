"""Convolutions over the plane and a group of matrices, by samples of the group."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.nn._module import AveragesModule
from pyloss.nn.lie.decomposition import coordinates, wide
from pyloss.nn.lie.groups import GroupSample, _Group

MASKS = ("disc", "bump", "sigmoid", "none")
_SAMPLES = ("g", "g_inverse", "g_weight")  # the buffers of a GroupSample


class _Kernel(nn.Module):
    """A network of sines (SIREN), from places to the entries of a kernel; in float32 at least."""

    def __init__(self, places: int, hidden: int, layers: int, out: int, omega: float) -> None:
        super().__init__()
        self.omega = omega
        sizes = [places, *[hidden] * layers, out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def reset_parameters(self, last: float) -> None:
        first = True
        for layer in self.layers:
            bound = 1 / layer.in_features if first else math.sqrt(6 / layer.in_features)
            if layer is self.layers[-1]:
                bound *= last
            elif not first:
                bound /= self.omega
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)
            first = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if layer is not self.layers[0]:
                x = torch.sin(self.omega * x)
            x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return x


class _LieConv2d(AveragesModule):
    """Samples of the group, a kernel network, and what is done with its values."""

    g: Tensor
    g_inverse: Tensor
    g_weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, group, in_channels, out_channels, kernel_size, places, options) -> None:
        if not isinstance(group, _Group):
            raise TypeError(f"group must be one of pyloss.nn.lie, got {type(group).__name__}")
        if group.n != 2:
            raise ValueError(f"group must act on the plane, n = 2, got {group!r}")
        sizes = dict(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        sizes = {name: checks.checked_count(name, value, 1) for name, value in sizes.items()}
        options = dict(options)
        for name in ("samples", "hidden", "layers"):
            options[name] = checks.checked_count(name, options[name], 1)
        if options["padding"] not in ("same", "valid"):
            options["padding"] = checks.checked_count("padding", options["padding"])
        bias = checks.checked_flag("bias", options.pop("bias"))
        checks.check_range("omega", options["omega"], 0.0, open_low=True)
        checks.check_range("extent", options["extent"], 0.0, open_low=True)
        if options["mask"] is None:
            options["mask"] = "disc" if group.volume_preserving else "sigmoid"
        checks.check_one_of("mask", options["mask"], MASKS)
        super().__init__(group=group, **sizes, **options)
        entries = self.in_channels * self.out_channels
        self.kernel = _Kernel(places, self.hidden, self.layers, entries, self.omega)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_channels)) if bias else None
        )
        # The same in all layers of as many samples, also before the first resample_.
        found = group.sample(self.samples, torch.Generator().manual_seed(0))
        for name, value in zip(_SAMPLES, found):
            self.register_buffer(name, value)
        self.reset_parameters()

    @property
    def area(self) -> float:
        """Of a pixel of the kernel, which fills [-extent, extent]^2."""
        return (2 * self.extent / self.kernel_size) ** 2

    def reset_parameters(self) -> None:
        """Kernels as large as those of a convolution with weights up to sqrt(6 / fan-in), biases
        0."""
        fan_in = self.in_channels * self.kernel_size**2
        self.kernel.reset_parameters(1 / (math.sqrt(fan_in) * self.area))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_samples_(self, sample: GroupSample) -> None:
        """Elements of the group at which the output is computed from now on."""
        for name, value in zip(_SAMPLES, sample):
            getattr(self, name).copy_(value)

    def _points(self) -> tuple[Tensor, Tensor]:
        """g^-1 v of the kernel's pixels v, (samples, pixels, 2), and their mask."""
        k, inverse = self.kernel_size, wide(self.g_inverse)
        line = torch.arange(1 - k, k, 2, dtype=inverse.dtype, device=inverse.device)
        line = line * (self.extent / k)
        v = torch.stack([line.repeat(k), line.repeat_interleave(k)], -1)  # horizontal, vertical
        points = torch.einsum("mij,pj->mpi", inverse, v)
        square = points.square().sum(-1)
        if self.mask == "disc":
            mask = (square <= 1).to(square)
        elif self.mask == "bump":
            mask = (1 - square).clamp_min(0).square()
        elif self.mask == "sigmoid":
            mask = torch.sigmoid(2 * (1 - square.sqrt()))
        else:
            mask = torch.ones_like(square)
        return points, mask

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        """kernel: (out, samples, in, k, k); the output (B, out, samples, H, W)."""
        out = F.conv2d(x, kernel.flatten(0, 1).to(x.dtype), padding=self.padding)
        out = out.unflatten(1, kernel.shape[:2])
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None, None]

    def _precise(self, x: Tensor) -> torch.dtype:
        """Of the kernel's computation."""
        return torch.promote_types(x.dtype, self.g.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None!r}"


class LiftConv2d(_LieConv2d):
    r"""From images to functions of the plane and a group: a convolution with each sample's kernel.

    .. math::
        (k * f)(x, g) = \sum_c \int f_c(y)\, k_c(g^{-1}(y - x))\, \frac{dy}{|\det g|}

    The kernel is a network of its place, so that it can be asked anywhere: at
    :math:`g^{-1} v` of the pixels v. If f is transformed by an affine map with the matrix a, the
    output is moved along, from g to a g: layers after it see the same features in other places.
    With a finite kernel and finitely many samples that holds approximately.

    Args:
        group: :class:`GL`, :class:`SL` or :class:`SO` with n = 2.
        in_channels, out_channels, kernel_size: as for ``nn.Conv2d``; one number for both sides.
        samples: m, elements of the group.
        padding: a number, ``"same"`` or ``"valid"``.
        bias: one for each output channel.
        hidden, layers, omega: width and number of the hidden layers of the kernel network
            (SIREN), and the frequency of its sines.
        mask: of :math:`r = |g^{-1} v|`: ``"disc"``, :math:`r \le 1`; ``"bump"``,
            :math:`(1 - r^2)_+^2`; ``"sigmoid"``, :math:`\sigma(2 (1 - r))`; ``"none"``. By default
            the disc, and for :class:`GL` the sigmoid.
        extent: the kernel's pixels fill :math:`[-extent, extent]^2`. Kernels that g makes longer
            are cut there.

    Attributes:
        g, g_inverse, g_weight: the samples, as buffers; the same ones in each new layer:
            :func:`resample_` draws others.

    Shape:
        - x: ``(B, in_channels, H, W)``
        - output: ``(B, out_channels, samples, H', W')``

    Raises:
        TypeError: a group that is none; options of the wrong type.
        ValueError: a group on another space; an option out of range; an input of another shape.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.nn import lie
        >>> lift = lie.LiftConv2d(lie.SL(2), 1, 4, 5, samples=6, padding=2)
        >>> lift(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 4, 6, 8, 8])

    Reference:
        Mironenco, Forré. Lie Group Decompositions for Equivariant Neural Networks. arXiv
        2310.11366.
    """

    def __init__(
        self,
        group: _Group,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        samples: int = 10,
        padding: int | str = 0,
        bias: bool = True,
        hidden: int = 60,
        layers: int = 2,
        omega: float = 10.0,
        mask: str | None = None,
        extent: float = 1.0,
    ) -> None:
        options = dict(samples=samples, padding=padding, bias=bias, hidden=hidden, layers=layers,
                       omega=omega, mask=mask, extent=extent)  # fmt: skip
        super().__init__(group, in_channels, out_channels, kernel_size, 2, options)

    def forward(self, x: Tensor) -> Tensor:
        checks.check_floating("x", x)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), got {list(x.shape)}")
        with checks.without_autocast(x):
            points, mask = self._points()
            factor = mask * (self.area / torch.linalg.det(wide(self.g)).abs())[:, None]
            kernel = self.kernel(points.to(self._precise(x))) * factor.unsqueeze(-1)
            shape = (self.kernel_size, self.kernel_size, self.out_channels, self.in_channels)
            kernel = kernel.unflatten(2, shape[2:]).unflatten(1, shape[:2])
        return self._convolved(x, kernel.permute(3, 0, 4, 1, 2))


class GroupConv2d(_LieConv2d):
    r"""Between functions of the plane and a group, as :class:`LiftConv2d` makes them.

    .. math::
        (k * f)(x, g) = \sum_c \int_G \int f_c(y, h)\, k_c(g^{-1}(y - x),\, g^{-1} h)\,
        \frac{dy}{|\det h|}\, d\mu(h)

    The integral over h is a mean over the samples of the layer before, with their weights. The
    kernel is a network of its place and of the coordinates :math:`\xi^{-1}(g^{-1} h)`: see
    :func:`xi_inv`.

    Args:
        group, in_channels, out_channels, kernel_size, samples, padding, bias, hidden, layers,
            omega, mask, extent: as for :class:`LiftConv2d`; ``samples`` of input and output.

    Attributes:
        g, g_inverse, g_weight: samples of the output, as buffers.
        h, h_weight: those of the input, which must be the ``g`` and ``g_weight`` of the layer
            before: they are in new layers, and after :func:`resample_`.

    Shape:
        - x: ``(B, in_channels, samples, H, W)``
        - output: ``(B, out_channels, samples, H', W')``

    Raises:
        As :class:`LiftConv2d`.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.nn import lie
        >>> group = lie.GL(2)
        >>> model = torch.nn.Sequential(
        ...     lie.LiftConv2d(group, 1, 4, 5, samples=6, padding=2), torch.nn.GELU(),
        ...     lie.GroupConv2d(group, 4, 8, 5, samples=6, padding=2),
        ... )
        >>> _ = lie.resample_(model, torch.Generator().manual_seed(0))  # in each step
        >>> model(torch.randn(2, 1, 8, 8)).amax((2, 3, 4)).shape  # invariant features
        torch.Size([2, 8])

    Reference:
        Mironenco, Forré. arXiv 2310.11366.
    """

    h: Tensor
    h_weight: Tensor

    def __init__(
        self,
        group: _Group,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        samples: int = 10,
        padding: int | str = 0,
        bias: bool = True,
        hidden: int = 60,
        layers: int = 2,
        omega: float = 10.0,
        mask: str | None = None,
        extent: float = 1.0,
    ) -> None:
        options = dict(samples=samples, padding=padding, bias=bias, hidden=hidden, layers=layers,
                       omega=omega, mask=mask, extent=extent)  # fmt: skip
        places = 2 + getattr(group, "dim", 0)
        super().__init__(group, in_channels, out_channels, kernel_size, places, options)
        self.register_buffer("h", self.g.clone())
        self.register_buffer("h_weight", self.g_weight.clone())

    def set_inputs_(self, sample: GroupSample) -> None:
        """Elements of the group at which the input was computed."""
        self.h.copy_(sample.g)
        self.h_weight.copy_(sample.weight)

    def forward(self, x: Tensor) -> Tensor:
        checks.check_floating("x", x)
        sizes = (self.in_channels, self.samples)
        if x.dim() != 5 or x.shape[1:3] != sizes:
            raise ValueError(
                f"x must be (B, {sizes[0]}, {sizes[1]}, H, W), with the samples of the layer "
                f"before, got {list(x.shape)}"
            )
        with checks.without_autocast(x):
            points, mask = self._points()
            h = wide(self.h)
            away = coordinates(wide(self.g_inverse)[:, None] @ h, self.group._algebra)
            m, pixels = mask.shape
            places = torch.cat(
                [
                    points[:, None].expand(-1, m, -1, -1),
                    away[:, :, None].expand(-1, -1, pixels, -1),
                ],
                -1,
            )
            # The Jacobian and the weight belong to h: along the axis of the input's samples.
            of_h = wide(self.h_weight) / torch.linalg.det(h).abs() * (self.area / m)
            factor = mask[:, None] * of_h[:, None]
            kernel = self.kernel(places.to(self._precise(x))) * factor.unsqueeze(-1)
            k = self.kernel_size
            kernel = kernel.unflatten(3, (self.out_channels, self.in_channels))
            kernel = kernel.unflatten(2, (k, k)).permute(4, 0, 5, 1, 2, 3).flatten(2, 3)
        return self._convolved(x.flatten(1, 2), kernel)


@torch.no_grad()
def resample_(
    model: nn.Module, generator: torch.Generator | None = None, *, share: bool = True
) -> nn.Module:
    """Draws new samples for the Lie layers of a model, each layer's input being the output of the
    one before, in the order of ``model.modules()``.

    Call it before each step of the training, and before evaluation.

    Args:
        model: with a :class:`LiftConv2d`, and :class:`GroupConv2d` after it.
        generator: of the samples.
        share: the same samples in all layers, as residual connections need it; else new ones for
            each layer.

    Returns:
        The model.

    Raises:
        TypeError: no module.
        ValueError: no Lie layer, a :class:`GroupConv2d` without a :class:`LiftConv2d` before it, or
            layers that differ in their group or number of samples.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.nn import lie
        >>> lift = lie.LiftConv2d(lie.SO(2), 1, 4, 5)
        >>> before = lift.g.clone()
        >>> bool((lie.resample_(lift).g == before).all())
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, _LieConv2d)]
    if not layers:
        raise ValueError("model must have a LiftConv2d, and has none")
    drawn: dict = {}
    before = None
    for layer in layers:
        kind = layer.group, layer.samples
        if isinstance(layer, GroupConv2d):
            if before is None:
                raise ValueError("a GroupConv2d of model has no LiftConv2d before it")
            if before != kind:
                (group, samples), (own, count) = before, kind
                raise ValueError(
                    "a GroupConv2d of model must have the group and the number of samples of the "
                    f"layer before it, {group!r} and {samples}, got {own!r} and {count}"
                )
            layer.set_inputs_(drawn[kind])
        if kind not in drawn or not share:
            drawn[kind] = layer.group.sample(layer.samples, generator, dtype=torch.float64)
        layer.set_samples_(drawn[kind])
        before = kind
    return model
