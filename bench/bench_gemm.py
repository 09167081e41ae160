"""Cases, providers and targets of ``gemm``: matrix products on the CPU into memory that is there.

The yardstick, "multiply-adds alone", does the same number of multiplications and additions in
registers, in the same run: what the arithmetic of one core gives. So run it with ``--threads 1``;
with more threads the yardstick still has one. oneDNN gets its second factor packed before, as
``torch.compile`` packs constant weights for it; that time is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target
from pyloss import _C

PEAK = "multiply-adds alone"
CODES = {torch.float64: 0, torch.float32: 1}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}

# Rows, columns, depth; which factor is the transpose of what lies in memory.
SHAPES = {
    "square": (1024, 1024, 1024, "b"),
    "all logits": (2048, 32000, 256, "b"),
    "logits": (256, 32000, 256, "b"),
    "gradient of the rows": (256, 256, 32000, ""),
    "gradient of the weight": (32000, 256, 256, "a"),
    "similarities": (512, 512, 128, "b"),
    "small": (8, 50, 16, "b"),
}
ASKED = {"square": "1024 x 1024 x 1024", "all logits": "2048 x 32000 x 256"}

TARGETS = [
    target
    for name, size in ASKED.items()
    for target in (
        Target(
            f"{size} fp32, one thread, of the multiply-adds that the core can do",
            "pct_products",
            f"{name} .* fp32",
            at_least=75,
            unit="%",
        ),
        Target(
            f"{size} fp32, one thread, speed-up over the faster of torch.mm and oneDNN",
            "speedup_over_best_peer",
            f"{name} .* fp32",
            at_least=1.0,
        ),
    )
]


class Factors:
    def __init__(self, m: int, n: int, k: int, transposed: str, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def new(rows: int, columns: int, turned: bool) -> Tensor:
            size = (columns, rows) if turned else (rows, columns)
            x = torch.randn(size, generator=generator, dtype=dtype)
            return x.t() if turned else x

        self.a = new(m, k, transposed == "a")
        self.b = new(k, n, transposed == "b")
        self.out = torch.empty(m, n, dtype=dtype)

    def error(self, found: Tensor) -> float:
        """Of some rows, in units of the tolerance."""
        some = torch.linspace(0, len(self.a) - 1, 4).long()
        right = self.a[some].double() @ self.b.double()
        off = (found[some].double() - right).norm() / right.norm()
        return off.item() / TOLERANCE[self.out.dtype]


def providers(f: Factors) -> list[Provider]:
    (m, k), n = f.a.shape, f.b.shape[1]
    code = CODES[f.out.dtype]

    def of(call) -> Run:
        return Run(call=call, check=lambda: f.error(call()))

    def own() -> Run:
        def call() -> Tensor:
            _C.gemm(
                code, m, n, k, f.a.data_ptr(), *f.a.stride(), f.b.data_ptr(), *f.b.stride(),
                f.out.data_ptr(), n, 0, False, torch.get_num_threads(),
            )  # fmt: skip
            return f.out

        return of(call)

    def onednn() -> Run:
        if f.out.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            raise Skip("oneDNN has no such product here")
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(f.b.t().contiguous(), m)
        a = f.a.contiguous()
        return of(lambda: ops._linear_pointwise(a, packed, None, "none", [], ""))

    def peak() -> Run:
        operations = 2 * m * n * k
        if operations < 1 << 24:  # it counts in steps of 1000 operations on each register
            raise Skip("too small to be compared with")
        return Run(call=lambda: _C.multiply_adds(code, operations))

    return [
        Provider("pyloss", own),
        Provider("torch", lambda: of(lambda: torch.mm(f.a, f.b, out=f.out))),
        Provider("oneDNN", onednn),
        Provider(PEAK, peak),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    if ctx.device != "cpu":
        return
    for name, (m, n, k, transposed) in SHAPES.items():
        if ctx.quick:
            m, n, k = (min(size, 64) for size in (m, n, k))
        for dtype, torch_dtype in DTYPES.items():
            if dtype == "fp64" and name not in ("square", "similarities"):
                continue
            size = torch_dtype.itemsize
            yield Case(
                name=f"{name} {m}x{n}x{k} {dtype}",
                group="products",
                mode="fwd",
                shape=(m, n, k),
                dtype=dtype,
                useful_bytes=0,  # arithmetic, not a stream
                tensor_bytes=size * m * n,
                open=lambda args=(m, n, k, transposed, torch_dtype): providers(Factors(*args)),
                inner=200 if m * n * k < 1 << 20 else 1,
                products=PEAK,
                flop=2 * m * n * k,
            )
