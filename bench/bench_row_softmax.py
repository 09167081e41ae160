"""Cases, providers and targets of ``row_softmax``: cross entropy and the comp-sum family."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Probe, Provider, Run, Skip
from bench._targets import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Loss, gradient entry, gradient as a whole (Frobenius). The entries of a bf16 gradient are loose
# because PyTorch rounds log-probabilities of magnitude 10 to 16 to bf16 before exponentiating them.
# The tests bound pyloss much more tightly; here the question is whether the same work was done.
TOLERANCES = {torch.float32: (1e-5, 1e-4, 1e-5), torch.bfloat16: (1e-2, 1e-1, 1e-2)}

_NEW_PAGES = "a new gradient, filled"

GPU_COLUMNS = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
# torch.compile takes seconds per shape, so it runs at four widths only.
GPU_COMPILED_COLUMNS = (4096, 32768, 131072, 262144)
GPU_TENSOR_BYTES = 1 << 30

TARGETS = [
    Target(
        "fwd+bwd 2048 x 32000 fp32, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd 2048x32000 fp32",
        at_least=6.0,
    ),
    Target(
        "fwd+bwd 2048 x 32000 bf16, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd 2048x32000 bf16",
        at_least=4.5,
    ),
    Target(
        "fwd+bwd 2048 x 32000 fp32, time over the floor of two reads and one write",
        "x_floor",
        "fwd\\+bwd 2048x32000 fp32",
        at_most=2.3,
    ),
    Target(
        "fwd, no grad, 2048 x 32000 fp32, speed-up over F.cross_entropy",
        "speedup",
        "fwd 2048x32000 fp32",
        at_least=5.0,
    ),
    Target(
        "fwd+bwd 4096 x 1000 fp32, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd 4096x1000 fp32",
        at_least=3.0,
    ),
    Target(
        "fwd+bwd 4096 x 1000 bf16, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd 4096x1000 bf16",
        at_least=3.0,
    ),
    Target(
        "fwd+bwd 512 x 128256 and 256 x 262144 fp32, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd (512x128256|256x262144) fp32",
        at_least=6.0,
    ),
    Target(
        "fwd+bwd 512 x 128256 and 256 x 262144 bf16, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd (512x128256|256x262144) bf16",
        at_least=5.0,
    ),
    Target(
        "label smoothing 0.1, fwd+bwd 2048 x 32000 fp32, speed-up over F.cross_entropy",
        "speedup",
        "label smoothing .*",
        at_least=4.0,
    ),
    Target(
        "probability targets, fwd+bwd 2048 x 32000 fp32, speed-up over F.cross_entropy",
        "speedup",
        "probabilities .*",
        at_least=3.0,
    ),
    Target(
        "(16, 21, 64, 64) fp32, fwd+bwd, speed-up over F.cross_entropy",
        "speedup",
        "fwd\\+bwd 16x21x64x64 fp32",
        at_least=2.5,
    ),
    Target(
        "tau 0.5 and 1.7, z_loss, token_weight: time over plain tau = 1",
        "ratio_to_pyloss",
        "options .*",
        provider="pyloss (tau=.*|z_loss|token_weight)",
        at_most=1.10,
    ),
    Target(
        "softcap: time over plain tau = 1",
        "ratio_to_pyloss",
        "options .*",
        provider="pyloss softcap",
        at_most=1.8,
    ),
    Target(
        "extra memory fwd+bwd 2048 x 32000, in logits tensors",
        "peak_tensors",
        "fwd\\+bwd 2048x32000 .*|options .*",
        provider="pyloss.*",
        at_most=1.02,
        unit="",
    ),
    Target(
        "extra memory fwd+bwd 2048 x 32000 inplace, in logits tensors",
        "peak_tensors",
        "inplace .*",
        provider="pyloss inplace",
        at_most=0.02,
        unit="",
    ),
    Target("accuracy fp32: largest error over its bound", "value", "accuracy.*", at_most=1.0),
    Target(
        "call overhead, 16 elements, no grad",
        "median_us",
        "overhead fwd",
        at_most=20.0,
        unit="us",
    ),
    Target(
        "call overhead, 16 elements, fwd+bwd",
        "median_us",
        "overhead fwd\\+bwd",
        at_most=80.0,
        unit="us",
    ),
    Target(
        "call overhead, 16 elements, fwd and fwd+bwd, speed-up over F.cross_entropy",
        "speedup",
        "overhead fwd.*",
        at_least=0.5,
    ),
    Target("import pyloss after torch", "value", "import", at_most=20.0, unit="ms"),
    Target(
        "modules numpy and triton added by import pyloss",
        "added_modules",
        "import",
        at_most=0,
        unit="",
    ),
    Target(
        "GPU fwd, share of the copy bandwidth (worst V)",
        "pct_copy",
        "fwd \\d+x\\d{4,} .*",
        at_least=90.0,
        device="cuda",
        unit="%",
    ),
    Target(
        "GPU in-place bwd, share of the copy bandwidth (worst V)",
        "pct_copy",
        "bwd .*",
        at_least=90.0,
        device="cuda",
        unit="%",
    ),
    Target(
        "GPU, speed-up over the fastest of torch, torch.compile, Liger, quack (worst V)",
        "speedup_over_best_peer",
        "(fwd|bwd|fwd\\+bwd) \\d+x\\d{4,} .*",
        at_least=1.0,
        device="cuda",
    ),
    Target(
        "GPU, all options on: time over plain (worst V)",
        "ratio_to_pyloss",
        "(fwd|bwd) \\d+x\\d{4,} .*",
        provider="pyloss all options",
        at_most=1.05,
        device="cuda",
    ),
]


# --- what the providers compute -----------------------------------------------------------------


class Problem:
    """The tensors of a case, and the float64 answer for each set of loss options."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, probabilities: bool):
        generator = torch.Generator(device=device).manual_seed(0)
        new = functools.partial(torch.randn, generator=generator, device=device)
        self.x = new(shape, dtype=DTYPES[dtype])
        rows = shape[:1] + shape[2:]
        if probabilities:
            self.target = new(shape).softmax(1).to(DTYPES[dtype])
        else:
            self.target = torch.randint(
                0, shape[1], rows, generator=generator, device=device, dtype=torch.int64
            )
        self.token_weight = torch.rand(rows, generator=generator, device=device) + 0.5
        self.class_weight = torch.rand(shape[1], generator=generator, device=device) + 0.5
        self._answers: dict[str, tuple[float, Tensor, Tensor]] = {}
        self._scratch: Tensor | None = None

    def scratch(self) -> Tensor:
        """A copy of the logits for providers that write over them; restored by their setup."""
        if self._scratch is None:
            self._scratch = self.x.clone()
        return self._scratch

    def restore(self) -> None:
        self.scratch().copy_(self.x)

    def answer(self, options: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
        """The mean loss over everything; the indices of some rows; their gradient. In float64."""
        key = repr(sorted((k, v if isinstance(v, float) else "tensor") for k, v in options.items()))
        if key not in self._answers:
            self._answers[key] = self._compute_answer(options)
        return self._answers[key]

    def _compute_answer(self, options: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
        from pyloss.reference import row_softmax

        weight, token_weight = options.get("weight"), options.get("token_weight")
        z_loss = options.get("z_loss", 0.0)
        plain = {k: v for k, v in options.items() if k not in ("weight", "token_weight", "z_loss")}
        # The two parts of the mean have their own denominators, so rows may come in pieces.
        by_rows = torch.ones_like(self.token_weight) if token_weight is None else token_weight
        by_rows = by_rows.double()
        by_loss = by_rows if weight is None else by_rows * weight.double()[self.target]
        loss_scale, z_scale = 1.0 / by_loss.sum(), 1.0 / by_rows.sum()

        def part(index: Tensor | slice, x: Tensor) -> Tensor:
            def total(z: float) -> Tensor:
                target = self.target[index]
                return row_softmax(
                    x,
                    target.double() if target.is_floating_point() else target,
                    None if weight is None else weight.double(),
                    token_weight=by_rows[index],
                    reduction="sum",
                    z_loss=z,
                    **plain,
                )

            loss = total(0.0)
            if z_loss == 0.0:
                return loss_scale * loss
            return loss_scale * loss + z_scale * (total(z_loss) - loss)

        n = self.x.shape[0]
        step = max(1, min(n, (1 << 22) * n // self.x.numel()))
        pieces = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        loss = sum(float(part(piece, self.x[piece].double())) for piece in pieces)
        count = max(2, min(16, (1 << 22) * n // self.x.numel()))
        rows = torch.linspace(0, n - 1, min(n, count), device=self.x.device).long().unique()
        leaf = self.x[rows].double().requires_grad_()
        (grad,) = torch.autograd.grad(part(rows, leaf), leaf)
        return loss, rows, grad

    def error(self, loss: Tensor, grad: Tensor | None, options: dict[str, Any]) -> float:
        """Largest deviation from the float64 answer, in units of the tolerance."""
        expected, rows, expected_grad = self.answer(options)
        loss_tol, entry_tol, norm_tol = TOLERANCES[self.x.dtype]
        errors = [abs(loss.item() - expected) / abs(expected) / loss_tol]
        if grad is not None:
            difference = grad[rows].double() - expected_grad
            size = expected_grad.abs()
            entry = (difference.abs() / (size + 0.01 * size.mean())).max().item()
            norm = (difference.norm() / expected_grad.norm()).item()
            errors += [entry / entry_tol, norm / norm_tol]
        return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


class _Producer(torch.autograd.Function):
    """Stands for the layer that made the logits, at no cost: in-place backward needs a non-leaf."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, memory: Tensor, sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        # A tensor of its own over the same memory: a view would drag the leaf's rules along.
        return torch.empty(0, dtype=memory.dtype, device=memory.device).set_(memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.sink.append(grad)
        return None, None, None


LossFn = Callable[[Tensor, Tensor], Tensor]


def make_run(
    problem: Problem,
    loss_fn: LossFn,
    mode: str,
    options: dict[str, Any],
    *,
    overwrites: bool = False,
    produced: bool = False,
) -> Run:
    """How one call of ``loss_fn`` is timed and checked.

    Args:
        mode: "fwd" (no gradient wanted), "fwd+bwd", or "bwd" (the forward is not timed).
        options: what ``loss_fn`` computes, in the names of ``pyloss.fused_cross_entropy``.
        overwrites: the call may write over the logits, so it gets a copy restored before each call.
        produced: the logits come from a layer instead of being a leaf.
    """
    target = problem.target
    memory = problem.scratch() if overwrites else problem.x
    token = torch.zeros((), device=memory.device, requires_grad=True)
    pending: list[Any] = []

    def forward() -> tuple[Tensor, Callable[[], Tensor | None]]:
        if produced:
            sink: list[Tensor] = []
            loss = loss_fn(_Producer.apply(token, memory, sink), target)
            return loss, lambda: sink[0]
        leaf = memory.detach().requires_grad_()
        return loss_fn(leaf, target), lambda: leaf.grad

    def fwd() -> tuple[Tensor, Tensor | None]:
        return loss_fn(memory, target), None

    def fwd_bwd() -> tuple[Tensor, Tensor | None]:
        loss, grad = forward()
        loss.backward()
        return loss, grad()

    def bwd_setup() -> None:
        pending.clear()
        if overwrites:
            problem.restore()
        pending.append(forward())

    def bwd() -> tuple[Tensor, Tensor | None]:
        loss, grad = pending.pop()
        loss.backward()
        return loss, grad()

    call = {"fwd": fwd, "fwd+bwd": fwd_bwd, "bwd": bwd}[mode]
    setup = bwd_setup if mode == "bwd" else (problem.restore if overwrites else None)

    def check() -> float:
        if setup:
            setup()
        loss, grad = call()
        return problem.error(loss.detach(), grad, options)

    return Run(call=call, check=check, setup=setup)


# --- providers ----------------------------------------------------------------------------------


def pyloss_provider(
    problem: Problem, mode: str, name: str = "pyloss", inplace: bool = False, **options: Any
) -> Provider:
    def build() -> Run:
        import pyloss

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            return pyloss.fused_cross_entropy(x, y, inplace=inplace, **options)

        return make_run(problem, loss_fn, mode, options, overwrites=inplace, produced=inplace)

    return Provider(name, build)


def _plain_overhead_provider(problem: Problem, mode: str) -> Provider:
    """The public function with no keyword at all: what a call costs as users write it."""

    def build() -> Run:
        from pyloss import fused_cross_entropy

        return make_run(problem, fused_cross_entropy, mode, {})

    return Provider("pyloss", build)


def torch_provider(problem: Problem, mode: str, **options: Any) -> Provider:
    def build() -> Run:
        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(x, y, **options)

        return make_run(problem, loss_fn, mode, options)

    return Provider("torch", build)


def compile_provider(problem: Problem, mode: str, ctx: Context, **options: Any) -> Provider:
    def build() -> Run:
        if not ctx.compile:
            raise Skip("torch.compile is off in this run")
        # Past its recompile limit dynamo would fall back to eager without an error.
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, y: F.cross_entropy(x, y, **options), dynamic=False)
        return make_run(problem, compiled, mode, options)

    return Provider("torch.compile", build, once=True)


def liger_provider(problem: Problem, mode: str) -> Provider:
    def build() -> Run:
        if not problem.x.is_cuda:
            raise Skip("Liger's kernels need a GPU")
        if mode == "bwd":
            raise Skip("Liger computes the gradient in the forward: see fwd+bwd")
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error

        # Liger writes the gradient over the logits.
        return make_run(problem, liger_cross_entropy, mode, {}, overwrites=True, produced=True)

    return Provider("liger", build)


def quack_provider(problem: Problem, mode: str) -> Provider:
    def build() -> Run:
        if not problem.x.is_cuda:
            raise Skip("quack's kernels need a GPU")
        try:
            from quack.cross_entropy import cross_entropy
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error

        inplace = mode != "fwd"

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(x, y, reduction="mean", inplace_backward=inplace)

        return make_run(problem, loss_fn, mode, {}, overwrites=inplace, produced=inplace)

    return Provider("quack", build)


def cce_provider() -> Provider:
    def build() -> Run:
        raise Skip("cut-cross-entropy takes hidden states and a weight matrix, not logits")

    return Provider("cut_cross_entropy", build)


def all_options(problem: Problem) -> dict[str, Any]:
    """Every option that index targets allow in one pass."""
    return {
        "tau": 1.7,
        "z_loss": 1e-4,
        "softcap": 30.0,
        "logit_scale": 0.9,
        "temperature": 1.3,
        "weight": problem.class_weight,
        "token_weight": problem.token_weight,
    }


# --- cases --------------------------------------------------------------------------------------


def _make_case(
    name: str,
    mode: str,
    shape: tuple[int, ...],
    dtype: str,
    device: str,
    providers: Callable[[Problem], list[Provider]],
    *,
    group: str | None = None,
    probabilities: bool = False,
    **fields: Any,
) -> Case:
    tensor_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    passes = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    if probabilities:
        passes += 1 if mode == "fwd" else 2  # the targets are read wherever the logits are
    return Case(
        name=name,
        group=group or mode,
        mode=mode,
        shape=shape,
        dtype=dtype,
        useful_bytes=passes * tensor_bytes,
        tensor_bytes=tensor_bytes,
        open=lambda: providers(Problem(shape, dtype, device, probabilities)),
        **fields,
    )


def _shrink(shape: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    if not quick:
        return shape
    return (*(max(2, s // 16) for s in shape[:1]), *(max(7, s // 8) for s in shape[1:]))


def cpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    """The CPU lines of the numbers table. Names keep the full sizes; quick runs shrink them."""

    def case(name: str, mode: str, shape: tuple[int, ...], dtype: str, providers, **fields) -> Case:
        return _make_case(name, mode, _shrink(shape, ctx.quick), dtype, "cpu", providers, **fields)

    def standard(
        mode: str, peers: bool = False, **options: Any
    ) -> Callable[[Problem], list[Provider]]:
        def providers(p: Problem) -> list[Provider]:
            result = [
                pyloss_provider(p, mode, **options),
                torch_provider(p, mode, **options),
                compile_provider(p, mode, ctx, **options),
            ]
            # Named once only: they have no CPU kernels, and the record says so.
            if peers:
                result += [liger_provider(p, mode), quack_provider(p, mode), cce_provider()]
            return result

        return providers

    large, small, image = (2048, 32000), (4096, 1000), (16, 21, 64, 64)
    for shape in (large, small, image):
        for mode in ("fwd+bwd", "fwd"):
            for dtype in DTYPES:
                size = "x".join(map(str, shape))
                first = (shape, mode, dtype) == (large, "fwd+bwd", "fp32")
                yield case(f"{mode} {size} {dtype}", mode, shape, dtype, standard(mode, first))

    def vocabulary(p: Problem) -> list[Provider]:
        def fill() -> Run:
            return Run(call=lambda: torch.empty_like(p.x).fill_(1.0))

        return [
            pyloss_provider(p, "fwd+bwd"),
            torch_provider(p, "fwd+bwd"),
            Provider(_NEW_PAGES, fill),
        ]

    # Of today's language models. Filling a new buffer is what the gradient's pages alone cost those
    # who do not ask for huge ones.
    for shape in ((512, 128256), (256, 262144)):
        for dtype in DTYPES:
            name = f"fwd+bwd {shape[0]}x{shape[1]} {dtype}"
            yield case(
                name, "fwd+bwd", shape, dtype, vocabulary, products=_NEW_PAGES, rounds=8, once=True
            )
    yield case(
        "label smoothing fwd+bwd 2048x32000 fp32",
        "fwd+bwd",
        large,
        "fp32",
        standard("fwd+bwd", label_smoothing=0.1),
        group="label smoothing",
    )
    yield case(
        "probabilities fwd+bwd 2048x32000 fp32",
        "fwd+bwd",
        large,
        "fp32",
        standard("fwd+bwd"),
        group="probabilities",
        probabilities=True,
    )

    def variants(p: Problem) -> list[Provider]:
        ours = functools.partial(pyloss_provider, p, "fwd+bwd")
        return [
            ours(),
            ours("pyloss tau=0.5", tau=0.5),
            ours("pyloss tau=1.7", tau=1.7),
            ours("pyloss z_loss", z_loss=1e-4),
            ours("pyloss token_weight", token_weight=p.token_weight),
            ours("pyloss softcap", softcap=30.0),
            ours("pyloss all options", **all_options(p)),
        ]

    yield case(
        "options fwd+bwd 2048x32000 fp32", "fwd+bwd", large, "fp32", variants, group="options"
    )

    def in_place(p: Problem) -> list[Provider]:
        ours = functools.partial(pyloss_provider, p, "fwd+bwd")
        return [ours(), ours("pyloss inplace", inplace=True), torch_provider(p, "fwd+bwd")]

    for dtype in DTYPES:
        name = f"inplace fwd+bwd 2048x32000 {dtype}"
        yield case(name, "fwd+bwd", large, dtype, in_place, group="inplace")
    yield from _common_cases(ctx)


def gpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    """Tensors of 1 GiB over a range of V; the order puts what matters first, for short budgets."""

    def standard(mode: str, columns: int) -> Callable[[Problem], list[Provider]]:
        def providers(p: Problem) -> list[Provider]:
            inplace = mode != "fwd"
            result = [
                pyloss_provider(p, mode, inplace=inplace),
                pyloss_provider(p, mode, "pyloss all options", inplace, **all_options(p)),
                torch_provider(p, mode),
                liger_provider(p, mode),
                quack_provider(p, mode),
            ]
            if columns in GPU_COMPILED_COLUMNS:
                result.append(compile_provider(p, mode, ctx))
            return result

        return providers

    for mode in ("fwd", "bwd", "fwd+bwd"):
        for dtype in ("bf16", "fp32"):
            for columns in GPU_COLUMNS:
                width = columns // 16 if ctx.quick else columns
                size = (1 << 22) if ctx.quick else GPU_TENSOR_BYTES
                rows = size // (width * DTYPES[dtype].itemsize)
                name = f"{mode} {rows}x{width} {dtype}"
                yield _make_case(name, mode, (rows, width), dtype, "cuda", standard(mode, columns))
    # The gradient in a buffer of its own: here the forward may write it while the row is on chip.
    for columns in GPU_COMPILED_COLUMNS:
        width = columns // 16 if ctx.quick else columns
        rows = ((1 << 22) if ctx.quick else GPU_TENSOR_BYTES) // (width * 2)
        yield _make_case(
            f"new buffer fwd+bwd {rows}x{width} bf16",
            "fwd+bwd",
            (rows, width),
            "bf16",
            "cuda",
            lambda p: [pyloss_provider(p, "fwd+bwd"), torch_provider(p, "fwd+bwd")],
            group="new buffer",
        )
    # Fewer rows than multiprocessors: here a row has to be split over blocks.
    few = _shrink((8, 131072), ctx.quick)
    for mode in ("fwd", "fwd+bwd"):
        yield _make_case(
            f"few rows {mode} {few[0]}x{few[1]} bf16",
            mode,
            few,
            "bf16",
            "cuda",
            standard(mode, few[1]),
            group="few rows",
        )
    yield from _common_cases(ctx)


def _common_cases(ctx: Context) -> Iterator[Case | Probe]:
    for mode in ("fwd", "fwd+bwd"):
        yield _make_case(
            f"overhead {mode}",
            mode,
            (4, 4),
            "fp32",
            ctx.device,
            lambda p, mode=mode: [_plain_overhead_provider(p, mode), torch_provider(p, mode)],
            group="overhead",
            inner=20 if ctx.quick else 200,
        )
    yield Probe("accuracy fp32", "accuracy", lambda: measure_accuracy(ctx))
    yield Probe("import", "import", lambda: measure_import(3 if ctx.quick else 7))


def cases(ctx: Context) -> Iterator[Case | Probe]:
    return gpu_cases(ctx) if ctx.device == "cuda" else cpu_cases(ctx)


# --- accuracy and import ------------------------------------------------------------------------


def measure_accuracy(ctx: Context) -> list[dict[str, Any]]:
    """Largest error of loss and gradient over (8 + |ln value| + |1-tau| L) 2^-23 relative.

    The rows run from hopeless (loss 1e4) to certain (loss 1e-30), also with all logits shifted by
    1e4. The exact values are those of the reference in float64 on the same rounded logits.
    """
    import pyloss
    from pyloss.reference import row_softmax

    def ratio(value: Tensor, exact: Tensor, rows_loss: Tensor, tau: float) -> float:
        size = exact.abs()
        bound = (8.0 + size.log().abs() + abs(1.0 - tau) * rows_loss) * 2.0**-23 * size
        inside = (size >= 1e-30) & (size <= 1e4)
        return ((value.double() - exact).abs() / bound)[inside].max().item()

    records = []
    generator = torch.Generator().manual_seed(0)
    n = 64 if ctx.quick else 512
    margin = torch.cat(
        [torch.linspace(-20.0, 75.0, n - n // 4), -torch.logspace(1.3, 3.99, n // 4)]
    )
    for tau in (0.5, 1.0, 1.7):
        worst = {"loss": 0.0, "gradient": 0.0}
        for columns in (16, 1000):
            for shift in (0.0, 1e4):
                y = torch.randint(0, columns, (n,), generator=generator)
                x = torch.randn(n, columns, generator=generator) + shift
                x[torch.arange(n), y] = shift + margin
                x, y = x.to(ctx.device), y.to(ctx.device)
                leaf, exact_leaf = x.requires_grad_(), x.detach().double().requires_grad_()
                loss = pyloss.fused_cross_entropy(leaf, y, reduction="none", tau=tau)
                exact = row_softmax(exact_leaf, y, reduction="none", tau=tau)
                # Rows beyond the range of the claim would only spread infinities.
                row = exact.detach() <= 1e4
                (grad,) = torch.autograd.grad(loss[row].sum(), leaf)
                (exact_grad,) = torch.autograd.grad(exact[row].sum(), exact_leaf)
                nll = row_softmax(exact_leaf.detach(), y, reduction="none")
                found = {
                    "loss": ratio(loss.detach(), exact.detach(), nll, tau),
                    "gradient": ratio(grad, exact_grad, nll.unsqueeze(1), tau),
                }
                worst = {k: max(worst[k], found[k]) for k in worst}
        for what, value in worst.items():
            records.append(
                {"provider": "pyloss", "what": f"{what}, tau={tau}", "value": value, "unit": "1"}
            )
    return records


_IMPORT_SCRIPT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import pyloss
ms = 1e3 * (time.perf_counter() - start)
added = [m for m in ("numpy", "triton") if m in sys.modules and m not in before]
import json
print(json.dumps([ms, added]))
"""


def measure_import(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of ``import pyloss`` after ``import torch``; median over fresh processes."""
    times, added = [], []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT_SCRIPT], capture_output=True, text=True, timeout=300
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        ms, added = json.loads(done.stdout)
        times.append(ms)
    return [
        {
            "provider": "pyloss",
            "what": "import pyloss after torch",
            "value": sorted(times)[len(times) // 2],
            "min": min(times),
            "unit": "ms",
            "rounds": repeats,
            "added_modules": len(added),
            "added": added,
        }
    ]
