"""Convolutions whose channels are opened and shut for each sample by a gate that foresees them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.functional.gating import (
    check_mask_options,
    check_min_channels,
    mask_prediction_loss,
    mass_topk_mask,
)

MODES = ("decoupled", "joint")


class DynamicGate(nn.Module):
    r"""Scores of a layer's output channels from its input, by which they are opened or shut.

    .. math:: s = W\, \mathrm{pool}(x) + b

    A channel is open where s > 0. The weights begin as 0 and the biases as 1: all are open.

    Args:
        in_channels, out_channels: of the layer that it guards.
        embedding: about how many numbers the pooled input has: maps are pooled to
            :math:`k \times k` cells, k = :math:`\lfloor \sqrt{\text{embedding} /
            \text{in\_channels}} \rfloor`, one at least. ``None``: to one.

    Shape:
        - x: ``(B, in_channels, H, W)``; with one cell any ``(B, in_channels, *)``
        - output: ``(B, out_channels)``

    Raises:
        TypeError, ValueError: sizes that are no integers, or below 1; an input of another shape.

    Example:
        >>> import torch, pyloss
        >>> gate = pyloss.nn.DynamicGate(8, 16)
        >>> gate(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 16])

    Reference:
        Elkerdawy et al. arXiv 2110.08232, who train gates at a rate of 0.1 without weight decay.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = _size("in_channels", in_channels)
        self.out_channels = _size("out_channels", out_channels)
        self.embedding = None if embedding is None else _size("embedding", embedding)
        self.cells = 1 if embedding is None else max(1, math.isqrt(embedding // self.in_channels))
        features = self.in_channels * self.cells**2
        self.weight = nn.Parameter(
            torch.empty(self.out_channels, features, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All channels open."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        checks.check_floating("x", x)
        maps = "H, W" if self.cells > 1 else "*"
        if x.dim() < 2 or x.shape[1] != self.in_channels or (self.cells > 1 and x.dim() != 4):
            raise ValueError(f"x must be (B, {self.in_channels}, {maps}), got {list(x.shape)}")
        if self.cells > 1:
            x = F.adaptive_avg_pool2d(x, self.cells).flatten(1)
        elif x.dim() > 2:
            x = x.flatten(2).mean(2)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, embedding={self.embedding}"


def _size(name: str, value: int) -> int:
    value = checks.checked_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


class GatedConv(nn.Module):
    r"""A convolution whose output channels a gate opens and shuts for each sample.

    .. math::
        o = \mathrm{act}(\mathrm{bn}(\mathrm{conv}(x))), \qquad y_c = o_c\, [s_c > 0], \qquad
        s = \mathrm{gate}(x)

    The gate learns to foresee which channels of o :func:`pyloss.functional.mass_topk_mask` would
    keep: add :meth:`mask_loss` to the loss. Backward takes :math:`[s > 0]` for
    :math:`\sigma(s)` (straight through), so the loss of the task trains it as well. All channels
    are computed, and those that are shut multiplied by 0: what skipping them would save,
    :func:`gated_flops` says.

    Args:
        conv: an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``.
        bn, act: modules, such as ``nn.BatchNorm2d`` and ``nn.ReLU``; ``None``: left out.
        gate: a module of x to ``(B, out_channels)``; ``None``: a :class:`DynamicGate`.
        ratio: r of the mask.
        mode: ``"decoupled"``: the gate gets x without its gradient; ``"joint"``: with it.
        rule, min_channels, inclusive: of the mask.

    Attributes:
        logits, target, mask: of the last forward, ``(B, out_channels)`` each: s; the channels that
            the mask keeps, in training mode, else ``None``; and those that were open. They belong
            to no copy, pickle or ``state_dict``.

    Raises:
        TypeError: a ``conv`` of another kind; an option of the wrong type.
        ValueError: an option out of range; scores of another shape.

    Example:
        >>> import torch, pyloss
        >>> from torch import nn
        >>> layer = pyloss.nn.GatedConv(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), ratio=0.8)
        >>> y = layer(torch.randn(4, 3, 6, 6))
        >>> loss = y.square().mean() + layer.mask_loss()
        >>> loss.backward()

    Reference:
        Elkerdawy et al. Fire Together Wire Together. arXiv 2110.08232.
    """

    def __init__(
        self,
        conv: nn.Module,
        bn: nn.Module | None = None,
        act: nn.Module | None = None,
        gate: nn.Module | None = None,
        ratio: float = 0.9,
        mode: str = "decoupled",
        *,
        rule: str = "mass",
        min_channels: int = 1,
        inclusive: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise TypeError(f"conv must be a convolution of torch.nn, got {type(conv).__name__}")
        check_mask_options(ratio, rule, inclusive)
        check_min_channels(min_channels, conv.out_channels)
        checks.check_one_of("mode", mode, MODES)
        if gate is None:
            like = dict(device=conv.weight.device, dtype=conv.weight.dtype)
            gate = DynamicGate(conv.in_channels, conv.out_channels, **like)
        self.conv, self.bn, self.act, self.gate = conv, bn, act, gate
        self.ratio, self.mode, self.rule = ratio, mode, rule
        self.min_channels, self.inclusive = min_channels, inclusive
        self._forget()

    def _forget(self) -> None:
        self.logits: Tensor | None = None
        self.target: Tensor | None = None
        self.mask: Tensor | None = None
        self._opened_by_target = False

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict(logits=None, target=None, mask=None, _opened_by_target=False)
        return self.__dict__ | nothing  # a graph cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = out if self.bn is None else self.bn(out)
        out = out if self.act is None else self.act(out)
        logits = self.gate(x.detach() if self.mode == "decoupled" else x)
        if logits.shape != out.shape[:2]:
            raise ValueError(
                f"gate must return {list(out.shape[:2])}, a score for each channel, got "
                f"{list(logits.shape)}"
            )
        target = None
        if self.training or self._opened_by_target:
            target = mass_topk_mask(
                out, self.ratio, rule=self.rule, min_channels=self.min_channels,
                inclusive=self.inclusive,
            )  # fmt: skip
        mask = target if self._opened_by_target else logits > 0
        likely = logits.sigmoid()
        opened = mask.to(out.dtype) + (likely - likely.detach()).to(out.dtype)
        self.logits, self.target, self.mask = logits, target, mask.detach()
        return out * opened.reshape(opened.shape + (1,) * (out.dim() - 2))

    def mask_loss(self) -> Tensor:
        """:func:`pyloss.functional.mask_prediction_loss` of the last forward in training mode.

        For several layers give their ``logits`` and ``target`` to that function.

        Raises:
            RuntimeError: there was none.
        """
        if self.logits is None or self.target is None:
            raise RuntimeError("mask_loss needs a forward in training mode before it")
        return mask_prediction_loss(self.logits, self.target)

    def extra_repr(self) -> str:
        names = ("ratio", "mode", "rule", "min_channels", "inclusive")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class GatedFlops(NamedTuple):
    """Multiply-adds of the convolutions of a gated network, a sample, by :func:`gated_flops`.

    Example:
        >>> import torch, pyloss
        >>> layer = pyloss.nn.GatedConv(torch.nn.Conv2d(3, 8, 3))
        >>> flops = pyloss.nn.gated_flops(layer, torch.randn(4, 3, 6, 6))
        >>> flops.dense == 8 * 4 * 4 * 3 * 3 * 3
        True
    """

    dense: float  #: with all channels
    gated: float  #: with the open ones
    gates: float  #: of the gates themselves
    layers: dict[str, tuple[float, float]]  #: dense and gated, by the name of the layer

    @property
    def saved(self) -> float:
        """The share that is saved, after the gates are paid for."""
        return 1 - (self.gated + self.gates) / self.dense


@torch.no_grad()
def gated_flops(model: nn.Module, *inputs: Tensor, masks: str = "target") -> GatedFlops:
    r"""Counts what a network of :class:`GatedConv` would compute if it skipped what is shut.

    .. math:: \mathrm{open}_{out} \cdot H W \cdot \frac{\mathrm{open}_{in}}{\text{groups}} \cdot k^2

    multiply-adds a sample and layer; a channel of the input is open where it is not 0. With the
    masks that the gates are to learn, it says what they will save before they are trained.

    Args:
        model: a network with at least one :class:`GatedConv`; it is run in eval mode, and left as
            it was.
        inputs: of the model, a batch.
        masks: ``"target"``: those of :func:`pyloss.functional.mass_topk_mask`; ``"predicted"``: of
            the gates as they are.

    Returns:
        :class:`GatedFlops`, means over the batch in Python numbers; waits for a device. Layers that
        have no gate are not counted.

    Raises:
        TypeError: no module.
        ValueError: a model without gates; an unknown kind of masks.

    Example:
        >>> import torch, pyloss
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     pyloss.nn.GatedConv(nn.Conv2d(1, 8, 3, padding=1), act=nn.ReLU(), ratio=0.7),
        ...     pyloss.nn.GatedConv(nn.Conv2d(8, 8, 3, padding=1), act=nn.ReLU(), ratio=0.7),
        ... )
        >>> flops = pyloss.nn.gated_flops(model, torch.randn(16, 1, 8, 8))
        >>> 0.2 < flops.saved < 0.8
        True

    Reference:
        Elkerdawy et al. arXiv 2110.08232.
    """
    checks.check_one_of("masks", masks, ("target", "predicted"))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedConv)}
    if not gated:
        raise ValueError("model must have a GatedConv, and has none")
    training = [m for m in model.modules() if m.training]
    counts = {name: _Count() for name in gated}
    handles = [layer.register_forward_hook(counts[name]) for name, layer in gated.items()]
    before = {layer: (layer.logits, layer.target, layer.mask) for layer in gated.values()}
    try:
        model.eval()
        for layer in gated.values():
            layer._opened_by_target = masks == "target"
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for layer, last in before.items():
            layer._opened_by_target = False
            layer.logits, layer.target, layer.mask = last
        for module in training:
            module.training = True
    return GatedFlops(
        sum(c.dense for c in counts.values()),
        sum(c.gated for c in counts.values()),
        float(sum(p.numel() for g in gated.values() for p in g.gate.parameters() if p.dim() > 1)),
        {name: (count.dense, count.gated) for name, count in counts.items()},
    )


class _Count:
    """A forward hook of one layer; a layer that is called twice counts twice."""

    def __init__(self) -> None:
        self.dense = self.gated = 0.0

    def __call__(self, layer: GatedConv, args: tuple[Tensor], out: Tensor) -> None:
        conv, (x, *_) = layer.conv, args
        each = math.prod(out.shape[2:]) * math.prod(conv.kernel_size) / conv.groups
        open_in = (x != 0).flatten(2).any(2).sum(1)
        open_out = layer.mask.sum(1)
        self.dense += each * conv.in_channels * conv.out_channels
        self.gated += each * (open_in * open_out).double().mean().item()
