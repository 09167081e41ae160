"""Cases, providers and targets of ``segment``: reductions over segments of unequal size.

A million values in segments of ten on average: single numbers, and rows of sixteen. The yardsticks
are ``torch.segment_reduce``, what one writes with an index (``index_add``, ``scatter_reduce``), and
a copy of the values, which reads as much as a sum does and writes as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

VALUES, SEGMENTS = 10**6, 10**5
WIDTHS = (1, 16)
COPY, INDEX = "copy of the values", "torch index"
SCATTER = {"sum": "sum", "mean": "mean", "max": "amax"}

TARGETS = [
    target
    for width in WIDTHS
    for target in (
        Target(
            f"segment_reduce, sum of 10^6 values in 10^5 segments, rows of {width}, speed-up over "
            "torch.segment_reduce",
            "speedup",
            f"sum fwd width {width}",
            at_least=3.0,
        ),
        Target(
            "the same, over index_add",
            "speedup_over_index",
            f"sum fwd width {width}",
            at_least=3.0,
        ),
        Target(
            "the same, over a copy of the values (twice as long: 0.5)",
            "speedup_over_copy",
            f"sum fwd width {width}",
            at_least=0.5,
        ),
    )
]


class Problem:
    def __init__(self, width: int, scale: int, device: str):
        g = torch.Generator().manual_seed(0)
        rows, self.segments = VALUES // width // scale, SEGMENTS // width // scale
        cuts = torch.randint(0, rows + 1, (self.segments - 1,), generator=g).sort().values
        ends = torch.tensor([0]), torch.tensor([rows])
        self.offsets = torch.cat([ends[0], cuts, ends[1]]).to(device)
        self.x = torch.randn((rows, width)[: 1 + (width > 1)], generator=g).to(device)
        self.copy = torch.empty_like(self.x)
        lengths = self.offsets.diff()
        self.index = torch.arange(self.segments, device=device).repeat_interleave(lengths)
        self.rows = self.index.view(-1, *[1] * (self.x.dim() - 1)).expand_as(self.x)

    def empty(self) -> Tensor:
        return self.x.new_zeros((self.segments, *self.x.shape[1:]))

    def softmax(self, x: Tensor) -> Tensor:
        """As one writes it with an index."""
        most = self.empty().scatter_reduce(0, self.rows, x, "amax", include_self=False)
        e = (x - most.index_select(0, self.index)).exp()
        total = self.empty().index_add(0, self.index, e)
        return e / total.index_select(0, self.index)

    def of_index(self, x: Tensor, name: str) -> Tensor:
        if name == "softmax":
            return self.softmax(x)
        if name == "sum":
            return self.empty().index_add(0, self.index, x)
        how = SCATTER[name]
        return self.empty().scatter_reduce(0, self.rows, x, how, include_self=False)

    def run(self, function: Callable[[Tensor], Tensor], name: str, backward: bool) -> Run:
        from pyloss import reference

        x = self.x.detach().requires_grad_(backward)

        def call() -> tuple[Tensor, ...]:
            y = function(x)
            return (y, *torch.autograd.grad(y, x, torch.ones_like(y))) if backward else (y,)

        def check() -> float:
            leaf = self.x.double().requires_grad_(backward)
            if name == "softmax":
                want = reference.segment_softmax(leaf, self.offsets)
            else:
                want = reference.segment_reduce(leaf, self.offsets, name)
            wanted = [want]
            if backward:
                wanted += torch.autograd.grad(want, leaf, torch.ones_like(want))
            # What an empty segment has, torch's forms disagree about.
            filled = self.offsets.diff() > 0 if name != "softmax" else slice(None)
            worst = 0.0
            for i, (a, b) in enumerate(zip(call(), wanted)):
                a, b = (a[filled], b[filled]) if i == 0 else (a, b)
                worst = max(worst, float((a.double() - b).abs().max()))
            return worst / 1e-4

        return Run(call=call, check=check)


def providers(problem: Problem, name: str, backward: bool) -> list[Provider]:
    from pyloss import functional as F

    def ours(x: Tensor) -> Tensor:
        if name == "softmax":
            return F.segment_softmax(x, problem.offsets)
        return F.segment_reduce(x, problem.offsets, name)

    def theirs(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, name, offsets=problem.offsets, axis=0)

    def of_index(x: Tensor) -> Tensor:
        return problem.of_index(x, name)

    # torch has no softmax over segments.
    torchs = of_index if name == "softmax" else theirs
    found = [
        Provider("pyloss", lambda: problem.run(ours, name, backward)),
        Provider("torch", lambda: problem.run(torchs, name, backward)),
    ]
    if name != "softmax":
        found.append(Provider(INDEX, lambda: problem.run(of_index, name, backward)))
    if name == "sum" and not backward:
        copy = Run(call=lambda: problem.copy.copy_(problem.x), check=lambda: 0.0)
        found.append(Provider(COPY, lambda: copy))
    return found


def cases(ctx: Context) -> Iterator[Case]:
    for width in WIDTHS:
        for name, backward in (
            ("sum", False), ("mean", False), ("max", False), ("softmax", False),
            ("sum", True), ("max", True), ("softmax", True),
        ):  # fmt: skip
            mode = "fwd+bwd" if backward else "fwd"
            against = {}
            if name != "softmax":
                against["speedup_over_index"] = INDEX
            if name == "sum" and not backward:
                against["speedup_over_copy"] = COPY
            bytes_ = 4 * VALUES * (1 + backward + (name == "softmax"))
            yield Case(
                name=f"{name} {mode} width {width}",
                group=mode,
                mode=mode,
                shape=(VALUES // width, width),
                dtype="fp32",
                useful_bytes=bytes_,
                tensor_bytes=4 * VALUES,
                open=lambda w=width, n=name, b=backward: providers(
                    Problem(w, 1000 if ctx.quick else 1, ctx.device), n, b
                ),
                inner=3,
                against=against,
                rounds=20,
            )
