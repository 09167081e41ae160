"""Cases, providers and targets of ``linear_cross_entropy``: the loss of a linear layer.

The yardstick is "bare products": torch's matrix products alone, into buffers made before (forward:
the logits; forward and backward: also the gradients of the hidden states and of the weight). In
float32 on the CPU pyloss has faster ones (bench_gemm.py). Extra memory is the peak of one call
minus the gradients that it returns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Probe, Provider, Run, Skip
from bench._targets import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Loss, gradient as a whole (Frobenius), each row of a gradient. In bf16 the logits are rounded to
# bf16 by every provider; what is asked here is whether the same work was done. How exact it was
# is a probe of its own.
TOLERANCES = {torch.float32: (1e-5, 1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2, 1e-1)}
# Rows of a gradient this much below the typical one are judged by its size: rows of 0 exist.
SMALL_ROW = 0.01
# A filtered gradient lacks its smallest entries on purpose.
FILTER_SLACK = 10.0
FILTER = 2.0**-12

PRODUCTS = "bare products"
EXACT = "pyloss accumulate fp32"
CHUNKED = "torch chunked"  # F.linear_cross_entropy with options

MAIN = (2048, 32000, 256)
SMALL = (8, 50, 16)
GPU_MAIN = (4096, 128256, 4096)

OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "z_loss": {"z_loss": 1e-4},
    "tau=1.7": {"tau": 1.7},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 30.0},
}

TARGETS = [
    Target(
        "fwd+bwd 2048 x 32000 x 256 fp32, time over the three bare products",
        "x_products",
        "fwd\\+bwd 2048x32000x256 fp32",
        at_most=0.65,
    ),
    Target(
        "fwd+bwd 2048 x 32000 x 256 bf16, time over the three bare products",
        "x_products",
        "fwd\\+bwd 2048x32000x256 bf16",
        at_most=1.45,
    ),
    Target(
        "fwd+bwd 2048 x 32000 x 256 fp32, speed-up over F.linear_cross_entropy with options",
        "speedup_over_chunked",
        "fwd\\+bwd 2048x32000x256 fp32",
        at_least=3.5,
    ),
    Target(
        "fwd+bwd 8 x 50 x 16 fp32, speed-up over F.linear + F.cross_entropy",
        "speedup",
        "small 8x50x16 fp32",
        at_least=0.667,
    ),
    Target(
        "fwd+bwd 2048 x 32000 x 256 bf16, speed-up over F.linear_cross_entropy with options",
        "speedup_over_chunked",
        "fwd\\+bwd 2048x32000x256 bf16",
        at_least=6.0,
    ),
    Target(
        "fwd+bwd 2048 x 32000 x 256, speed-up over F.linear + F.cross_entropy (worst dtype)",
        "speedup",
        "fwd\\+bwd 2048x32000x256 .*",
        at_least=1.0,
    ),
    Target(
        "fwd+bwd 2048 x 32000 x 256 fp32, memory beyond inputs and gradients",
        "extra_mb",
        "fwd\\+bwd 2048x32000x256 fp32",
        at_most=64,
        unit="MB",
    ),
    Target(
        "fwd+bwd 2048 x 32000 x 256 bf16, memory beyond inputs and gradients",
        "extra_mb",
        "fwd\\+bwd 2048x32000x256 bf16",
        at_most=96,
        unit="MB",
    ),
    Target(
        "bias, z-loss, tau 1.7, label smoothing: time over plain",
        "ratio_to_pyloss",
        "options .*",
        provider="pyloss (bias|z_loss|tau=1\\.7|smoothing)",
        at_most=1.10,
    ),
    Target(
        "accuracy bf16: error over that of the unfused bf16 path (worst)",
        "value",
        "accuracy bf16",
        at_most=1.1,
    ),
    Target(
        "accuracy bf16 with accumulate_dtype=torch.float32: the same ratio",
        "value",
        "accuracy bf16",
        provider=EXACT,
        at_most=1.0,
    ),
    Target(
        "GPU fwd+bwd 4096 x 128256 x 4096 bf16, time over the three bare products",
        "x_products",
        "fwd\\+bwd 4096x128256x4096 bf16",
        at_most=1.15,
        device="cuda",
    ),
    Target(
        "GPU fwd+bwd 4096 x 128256 x 4096 bf16, memory beyond inputs and gradients",
        "extra_mb",
        "fwd\\+bwd 4096x128256x4096 bf16",
        at_most=256,
        device="cuda",
        unit="MB",
    ),
    Target(
        "GPU, speed-up over the fastest of torch, torch.compile, Liger, exact CCE (worst shape)",
        "speedup_over_best_peer",
        "fwd\\+bwd \\d+x\\d+x\\d+ bf16",
        at_least=1.0,
        device="cuda",
    ),
    Target(
        "GPU, gradient filtering, speed-up over the fastest of all these and filtering CCE",
        "speedup_over_best_peer",
        "fwd\\+bwd \\d+x\\d+x\\d+ bf16",
        provider="pyloss filter",
        at_least=1.0,
        device="cuda",
    ),
    Target(
        "GPU, bias, z-loss, tau 1.7, label smoothing: time over plain",
        "ratio_to_pyloss",
        "options .*",
        provider="pyloss (bias|z_loss|tau=1\\.7|smoothing)",
        at_most=1.10,
        device="cuda",
    ),
    Target(
        "GPU, accuracy bf16: error over that of the unfused bf16 path (worst)",
        "value",
        "accuracy bf16",
        at_most=1.1,
        device="cuda",
    ),
]


# --- what the providers compute -----------------------------------------------------------------


class Problem:
    """A layer of N x V x D with logits of size 1, labels, a bias of size 1; the float64 answers.

    The numbers are those of bfloat16 in every dtype, so that all dtypes of a shape have the same
    answers, which take seconds each.
    """

    # Of the last shape only, because they are large; across dtypes and cases.
    _shared: tuple[Any, dict[str, tuple[Tensor, list[Tensor]]]] = (None, {})

    def __init__(self, shape: tuple[int, int, int], dtype: str, device: str):
        n, v, d = shape
        generator = torch.Generator(device=device).manual_seed(0)

        def new(*size: int, scale: float = 1.0) -> Tensor:
            numbers = torch.randn(size, generator=generator, device=device) * scale
            return numbers.bfloat16().to(DTYPES[dtype])

        self.hidden = new(n, d)
        self.weight = new(v, d, scale=d**-0.5)
        self.bias = new(v)
        self.target = torch.randint(0, v, (n,), generator=generator, device=device)
        # The gradient that arrives at losses per row; exact in every dtype too.
        factors = torch.rand(n, generator=generator, device=device) + 0.5
        self.upstream = (factors / n).bfloat16().float()
        if Problem._shared[0] != (shape, device):
            Problem._shared = ((shape, device), {})
        self._answers = Problem._shared[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def answer(self, options: dict[str, Any], bias: bool) -> tuple[Tensor, list[Tensor]]:
        """Losses of the rows; gradients of hidden, weight (and bias) of their weighted sum.

        The weights are 1/N, or ``upstream`` for ``reduction="none"``. Computed in float64, the
        gradients kept in float32: that rounding is far below every tolerance.
        """
        key = repr((sorted(options.items()), bias))
        if key not in self._answers:
            self._answers[key] = self._compute_answer(options, bias)
        return self._answers[key]

    def _compute_answer(self, options: dict[str, Any], bias: bool) -> tuple[Tensor, list[Tensor]]:
        from pyloss.reference import linear_cross_entropy

        n, v = self.hidden.shape[0], self.weight.shape[0]
        options = {**options, "reduction": "none"}
        if options.pop("rows", False):
            upstream = self.upstream.double()
        else:
            upstream = self.upstream.new_full((n,), 1 / n, dtype=torch.float64)
        layer = [self.hidden, self.weight, self.bias][: 3 if bias else 2]
        hidden, *shared = [t.detach().double().requires_grad_() for t in layer]
        step = max(1, min(n, (1 << (26 if self.hidden.is_cuda else 23)) // v))
        rows = []
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            loss = linear_cross_entropy(
                hidden[part], shared[0], self.target[part], *shared[1:], **options
            )
            loss.backward(upstream[part])
            rows.append(loss.detach())
        return torch.cat(rows), [t.grad.float() for t in (hidden, *shared)]

    def error(
        self, loss: Tensor, grads: list[Tensor], options: dict[str, Any], bias: bool
    ) -> float:
        """Largest deviation from the float64 answer, in units of the tolerance."""
        rows, expected = self.answer(options, bias)
        loss_tol, whole_tol, row_tol = TOLERANCES[self.dtype]
        exact = rows if loss.dim() else rows.mean()
        errors = [((loss.double() - exact).norm() / exact.norm()).item() / loss_tol]
        for grad, right in zip(grads, expected, strict=bool(grads)):
            whole, row = _gradient_errors(grad, right)
            errors += [whole / whole_tol, row / row_tol]
        return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def _gradient_errors(grad: Tensor, right: Tensor) -> tuple[float, float]:
    """Relative error of a gradient as a whole, and of its worst row."""
    difference = grad.float() - right
    whole = difference.norm() / right.norm()
    sizes = right.view(right.shape[0], -1).norm(dim=1)
    typical = right.norm() / math.sqrt(right.shape[0])
    by_row = difference.view(right.shape[0], -1).norm(dim=1) / (sizes + SMALL_ROW * typical)
    return whole.item(), by_row.max().item()


LossFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def make_run(
    problem: Problem,
    loss_fn: LossFn,
    mode: str,
    options: dict[str, Any],
    *,
    bias: bool = False,
    slack: float = 1.0,
) -> Run:
    """How one call of ``loss_fn(hidden, weight, target, bias)`` is timed and checked.

    Args:
        mode: "fwd" (no gradient wanted) or "fwd+bwd". The gradients go to tensors that are fresh
            in each call, as they do after ``zero_grad``.
        options: what ``loss_fn`` computes, in the names of ``pyloss.reference``; and "rows" for
            losses per row.
        slack: times the tolerance that the check allows.
    """
    layer = [problem.hidden, problem.weight, problem.bias][: 3 if bias else 2]

    def fwd() -> tuple[Tensor, list[Tensor]]:
        hidden, weight, *rest = layer
        return loss_fn(hidden, weight, problem.target, rest[0] if rest else None), []

    def fwd_bwd() -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in layer]
        hidden, weight, *rest = leaves
        loss = loss_fn(hidden, weight, problem.target, rest[0] if rest else None)
        loss.backward(problem.upstream.to(loss.dtype) if loss.dim() else None)
        return loss.detach(), [t.grad for t in leaves]

    call = {"fwd": fwd, "fwd+bwd": fwd_bwd}[mode]
    return Run(call=call, check=lambda: problem.error(*call(), options, bias) / slack)


# --- providers ----------------------------------------------------------------------------------


def products_provider(problem: Problem, mode: str) -> Provider:
    """Nothing but the products, into buffers that are there: no loss, no softmax."""

    def build() -> Run:
        hidden, weight = problem.hidden, problem.weight
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def call() -> None:
            torch.mm(hidden, weight.t(), out=logits)
            if mode != "fwd":
                # The logits stand for their gradient: a product takes as long with any numbers.
                torch.mm(logits, weight, out=grad_hidden)
                torch.mm(logits.t(), hidden, out=grad_weight)

        def check() -> float:
            call()
            some = torch.linspace(0, hidden.shape[0] - 1, 4, device=hidden.device).long()
            pairs = [(logits[some], hidden[some].double() @ weight.double().t())]
            if mode != "fwd":
                pairs.append((grad_hidden[some], logits[some].double() @ weight.double()))
                pairs.append((grad_weight[:4], logits[:, :4].t().double() @ hidden.double()))
            whole_tol = TOLERANCES[problem.dtype][1]
            return max(_gradient_errors(got, right)[0] / whole_tol for got, right in pairs)

        return Run(call=call, check=check)

    return Provider(PRODUCTS, build)


def pyloss_provider(
    problem: Problem,
    mode: str,
    name: str = "pyloss",
    *,
    bias: bool = False,
    rows: bool = False,
    how: dict[str, Any] | None = None,
    slack: float = 1.0,
    **options: Any,
) -> Provider:
    """``how`` holds arguments that do not change what is computed."""

    def build() -> Run:
        import pyloss

        reduction = "none" if rows else "mean"

        def loss_fn(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None) -> Tensor:
            return pyloss.fused_linear_cross_entropy(
                h, w, y, b, reduction=reduction, **options, **(how or {})
            )

        return make_run(problem, loss_fn, mode, _asked(options, rows), bias=bias, slack=slack)

    return Provider(name, build)


def filter_provider(problem: Problem, mode: str) -> Provider:
    """Skips small gradients, as CCE does by default. Random logits are its best case."""
    how = {"filter": FILTER}
    provider = pyloss_provider(problem, mode, "pyloss filter", how=how, slack=FILTER_SLACK)
    return dataclasses.replace(provider, approximate=True)


def exact_provider(problem: Problem, mode: str) -> Provider:
    return pyloss_provider(problem, mode, EXACT, how={"accumulate_dtype": torch.float32})


def _asked(options: dict[str, Any], rows: bool) -> dict[str, Any]:
    return {**options, "rows": True} if rows else options


def _unfused(reduction: str) -> LossFn:
    def loss_fn(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b), y, reduction=reduction)

    return loss_fn


def torch_provider(problem: Problem, mode: str, rows: bool = False) -> Provider:
    def build() -> Run:
        loss_fn = _unfused("none" if rows else "mean")
        return make_run(problem, loss_fn, mode, _asked({}, rows))

    return Provider("torch", build)


def chunked_provider(problem: Problem, mode: str) -> Provider:
    def build() -> Run:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy with options")
        options = torch.nn.LinearCrossEntropyOptions()

        def loss_fn(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None) -> Tensor:
            return F.linear_cross_entropy(h, w, y, linear_bias=b, options=options)

        return make_run(problem, loss_fn, mode, {})

    return Provider(CHUNKED, build, once=True)


def compile_provider(problem: Problem, mode: str, ctx: Context) -> Provider:
    def build() -> Run:
        if not ctx.compile:
            raise Skip("torch.compile is off in this run")
        # Past its recompile limit dynamo would fall back to eager without an error.
        torch._dynamo.reset()
        return make_run(problem, torch.compile(_unfused("mean"), dynamic=False), mode, {})

    return Provider("torch.compile", build, once=True)


def liger_provider(problem: Problem, mode: str) -> Provider:
    def build() -> Run:
        if not problem.hidden.is_cuda:
            raise Skip("Liger's kernels need a GPU")
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error

        module = LigerFusedLinearCrossEntropyLoss()
        return make_run(problem, lambda h, w, y, b: module(w, h, y, b), mode, {})

    return Provider("liger", build)


def cce_provider(problem: Problem, mode: str, impl: str = "cce") -> Provider:
    """``impl="cce"`` leaves small gradients out, ``"cce_exact"`` does not."""

    def build() -> Run:
        if not problem.hidden.is_cuda:
            raise Skip("cut-cross-entropy's kernels need a GPU")
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error

        def loss_fn(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None) -> Tensor:
            return linear_cross_entropy(h, w, y, bias=b, impl=impl)

        return make_run(problem, loss_fn, mode, {})

    return Provider(impl, build, approximate=impl == "cce")


# --- cases --------------------------------------------------------------------------------------


def _make_case(
    name: str,
    mode: str,
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    providers: Callable[[Problem], list[Provider]],
    *,
    group: str | None = None,
    **fields: Any,
) -> Case:
    n, v, d = shape
    size = DTYPES[dtype].itemsize
    return Case(
        name=name,
        group=group or mode,
        mode=mode,
        shape=shape,
        dtype=dtype,
        useful_bytes=0,  # arithmetic is what takes the time, not bytes
        tensor_bytes=n * v * size,  # the logits
        open=lambda: providers(Problem(shape, dtype, device)),
        products=PRODUCTS,
        against={"speedup_over_chunked": CHUNKED},
        result_bytes=(n + v) * d * size if mode == "fwd+bwd" else 0,
        **fields,
    )


def _shrink(shape: tuple[int, int, int], quick: bool) -> tuple[int, int, int]:
    if not quick:
        return shape
    n, v, d = shape
    return max(64, n // 32), max(500, v // 64), max(16, d // 16)


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def _standard(ctx: Context, mode: str, *, extra: bool = False, peers: bool = False) -> Any:
    """The plain loss; ``extra`` adds what is not worth its time at every shape."""

    def providers(p: Problem) -> list[Provider]:
        result = [products_provider(p, mode), pyloss_provider(p, mode), torch_provider(p, mode)]
        if p.hidden.is_cuda and mode != "fwd":
            result.append(filter_provider(p, mode))
        if extra:
            if p.dtype != torch.float32:
                result.append(exact_provider(p, mode))
            result += [chunked_provider(p, mode), compile_provider(p, mode, ctx)]
        if peers:
            result += [liger_provider(p, mode), cce_provider(p, mode)]
            result.append(cce_provider(p, mode, "cce_exact"))
        return result

    return providers


def _per_row(p: Problem) -> list[Provider]:
    """Losses per row: the gradients are formed in the backward, from logits computed again."""
    return [
        products_provider(p, "fwd+bwd"),
        pyloss_provider(p, "fwd+bwd", rows=True),
        torch_provider(p, "fwd+bwd", rows=True),
    ]


def _plain(p: Problem) -> list[Provider]:
    return [pyloss_provider(p, "fwd+bwd"), torch_provider(p, "fwd+bwd")]


def _variants(p: Problem) -> list[Provider]:
    ours = functools.partial(pyloss_provider, p, "fwd+bwd")
    result = [ours()]
    result += [ours(f"pyloss {name}", **options) for name, options in OPTIONS.items()]
    return result


def cpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    """What matters first, for short budgets. Names keep the full sizes; quick runs shrink them."""

    def case(
        name: str, mode: str, shape: tuple[int, int, int], dtype: str, providers: Any, **fields: Any
    ) -> Case:
        name = f"{name} {_size(shape)} {dtype}"
        return _make_case(name, mode, _shrink(shape, ctx.quick), dtype, "cpu", providers, **fields)

    both = "fwd+bwd"
    for dtype, rounds in (("fp32", 6), ("bf16", 8)):
        # Named once only: they have no CPU kernels, and the record says so.
        providers = _standard(ctx, both, extra=True, peers=dtype == "fp32")
        yield case(both, both, MAIN, dtype, providers, rounds=rounds)
    for dtype, rounds in (("fp32", 5), ("bf16", 8)):
        yield case(
            "options", both, MAIN, dtype, _variants, group="options", rounds=rounds, once=True
        )
    for dtype, rounds in (("fp32", 4), ("bf16", 8)):
        yield case("fwd", "fwd", MAIN, dtype, _standard(ctx, "fwd"), rounds=8, once=True)
        yield case(
            "per row", both, MAIN, dtype, _per_row, group="per row", rounds=rounds, once=True
        )
    yield _make_case(
        f"small {_size(SMALL)} fp32", both, SMALL, "fp32", "cpu", _plain, group="small", inner=200
    )
    yield Probe("accuracy bf16", "accuracy", lambda: measure_accuracy(ctx))
    for shape, dtype in (
        ((1024, 50257, 768), "bf16"),
        ((512, 128256, 512), "bf16"),
        ((1024, 50257, 768), "fp32"),
    ):
        yield case(both, both, shape, dtype, _standard(ctx, both), rounds=4, once=True)


def gpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    def case(
        name: str, mode: str, shape: tuple[int, int, int], providers: Any, **fields: Any
    ) -> Case:
        name = f"{name} {_size(shape)} bf16"
        shape = _shrink(shape, ctx.quick)
        return _make_case(name, mode, shape, "bf16", "cuda", providers, **fields)

    both = "fwd+bwd"
    yield case(both, both, GPU_MAIN, _standard(ctx, both, extra=True, peers=True))
    yield Probe("accuracy bf16", "accuracy", lambda: measure_accuracy(ctx))
    yield case("options", both, GPU_MAIN, _variants, group="options")
    yield case("fwd", "fwd", GPU_MAIN, _standard(ctx, "fwd", peers=True))
    for shape in ((8192, 32000, 4096), (4096, 262144, 2304)):
        yield case(both, both, shape, _standard(ctx, both, peers=True))
    yield case("per row", both, GPU_MAIN, _per_row, group="per row")


def cases(ctx: Context) -> Iterator[Case | Probe]:
    return gpu_cases(ctx) if ctx.device == "cuda" else cpu_cases(ctx)


# --- accuracy -----------------------------------------------------------------------------------

# From few classes with many features to 256k classes; each has a bias of size 1.
ACCURACY_SHAPES = ((2048, 32000, 256), (512, 128256, 128), (256, 262144, 64))


def measure_accuracy(ctx: Context) -> list[dict[str, Any]]:
    """Errors of bf16 results against float64, over those of F.linear + F.cross_entropy in bf16.

    Frobenius norms over the losses of all rows and over each gradient of the mean. (The error of
    one mean, a single number, can be 0 by chance.)
    """
    import pyloss

    fused = pyloss.fused_linear_cross_entropy
    ways: dict[str, dict[str, Any]] = {
        "pyloss": {},
        EXACT: {"accumulate_dtype": torch.float32},
    }

    def norms(problem: Problem, loss_fn: Callable[[str], LossFn]) -> dict[str, float]:
        rows, expected = problem.answer({}, bias=True)
        losses = make_run(problem, loss_fn("none"), "fwd", {}, bias=True).call()[0]
        grads = make_run(problem, loss_fn("mean"), "fwd+bwd", {}, bias=True).call()[1]
        found = {"loss": (losses.double() - rows).norm().item()}
        for name, got, right in zip(("dX", "dW", "db"), grads, expected, strict=True):
            found[name] = (got.float() - right).norm().item()
        return found

    def ours(way: dict[str, Any]) -> Callable[[str], LossFn]:
        def with_reduction(reduction: str) -> LossFn:
            return lambda h, w, y, b: fused(h, w, y, b, reduction=reduction, **way)

        return with_reduction

    records = []
    for shape in ACCURACY_SHAPES:
        problem = Problem(_shrink(shape, ctx.quick), "bf16", ctx.device)
        unfused = norms(problem, _unfused)
        for provider, way in ways.items():
            for what, error in norms(problem, ours(way)).items():
                records.append(
                    {
                        "provider": provider,
                        "what": f"{what}, {_size(shape)}",
                        "value": error / unfused[what],
                        "unit": "x unfused",
                    }
                )
    return records
