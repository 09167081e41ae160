"""Cases and providers of the region losses of segmentation, beside MONAI.

Forward and backward by the input, of images and volumes as they are trained on: masks as floats,
which MONAI takes without a conversion, and class indices where there are several classes. The
yardstick is ``monai.losses`` with the same arguments; without MONAI only pyloss is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target

# name: (module of pyloss.nn, module of monai.losses, options)
LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Dice": ("SoftDiceLoss", "DiceLoss", {}),
    "generalised Dice": ("GeneralizedDiceLoss", "GeneralizedDiceLoss", {}),
    "Tversky": ("TverskyLoss", "TverskyLoss", dict(alpha=0.3, beta=0.7)),
    "Dice and focal": ("DiceFocalLoss", "DiceFocalLoss", {}),
    "focal": ("SegmentationFocalLoss", "FocalLoss", {}),
    "clDice": ("SoftclDiceLoss", "SoftclDiceLoss", {}),
    "Dice and clDice, 10 steps": ("SoftDiceclDiceLoss", "SoftDiceclDiceLoss", dict(iter_=10)),
}
SHAPES = {
    "2D": (4, 1, 256, 256),
    "3D": (1, 1, 64, 64, 64),
    "3D, 3 classes": (1, 3, 48, 48, 48),
}
MONAI = "MONAI"

TARGETS = [
    Target("clDice (worst), speed-up over MONAI", "speedup", ".*clDice.*", at_least=4.0),
    Target("the other losses (worst), speed-up over MONAI", "speedup", "(?!.*clDice).*",
           at_least=0.75),
    Target("peak memory of clDice, 10 steps, in images (worst)", "peak_tensors",
           ".*10 steps.*", at_most=85.0, unit=""),
]  # fmt: skip


class Problem:
    def __init__(self, shape: tuple[int, ...], device: str):
        g = torch.Generator().manual_seed(0)
        self.several = shape[1] > 1
        self.x = torch.randn(shape, generator=g).to(device)
        high = shape[1] if self.several else 2
        y = torch.randint(high, (shape[0], 1, *shape[2:]), generator=g).to(device)
        self.y = y if self.several else y.float()

    def options(self, name: str) -> dict[str, Any]:
        found = dict(LOSSES[name][2], to_onehot_y=self.several)
        if name != "focal":
            found["softmax" if self.several else "sigmoid"] = True
        return found

    def run(self, criterion, wanted) -> Run:
        def call() -> tuple[Tensor, Tensor]:
            x = self.x.detach().requires_grad_()
            loss = criterion(x, self.y)
            return loss.detach(), torch.autograd.grad(loss, x)[0]

        def check() -> float:
            x = self.x.double().requires_grad_()
            loss = wanted(x, self.y)
            (grad,) = torch.autograd.grad(loss, x)
            found = call()
            value = float((found[0] - loss.detach()).abs()) / 1e-5
            # A few voxels lie so close together that float32 takes another one for the smallest.
            off = (found[1] - grad).abs() > 1e-4 * grad.abs().amax()
            return max(value, float(off.double().mean()) / 1e-3)

        return Run(call=call, check=check)


def providers(problem: Problem, name: str) -> list[Provider]:
    import pyloss

    ours, theirs, _ = LOSSES[name]
    options = problem.options(name)

    def of_pyloss() -> Run:
        make = getattr(pyloss.nn, ours)
        return problem.run(make(**options), make(**options))

    def of_monai() -> Run:
        try:
            import monai.losses
        except ImportError as error:
            raise Skip(f"MONAI: {error}") from error
        return problem.run(getattr(monai.losses, theirs)(**options),
                           getattr(pyloss.nn, ours)(**options))  # fmt: skip

    return [Provider("pyloss", of_pyloss), Provider(MONAI, of_monai)]


def cases(ctx: Context) -> Iterator[Case]:
    for kind, shape in SHAPES.items():
        if ctx.quick:
            shape = (*shape[:2], *[8] * (len(shape) - 2))
        size = 4 * torch.Size(shape).numel()
        for name in LOSSES:
            yield Case(
                name=f"{name}, {kind}",
                group=kind,
                mode="fwd+bwd",
                shape=shape,
                dtype="fp32",
                useful_bytes=0,
                tensor_bytes=size,
                open=lambda s=shape, n=name: providers(Problem(s, ctx.device), n),
                baseline=MONAI,
                rounds=12,
            )
