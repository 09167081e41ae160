"""Times of the shapes that were asked for, beside the predicted ones.

    python -m bench._gpu_times --json FILE [--device cpu --quick]

The file is written again after each case: what is there stays when a later case dies. A case's time
over its prediction tells where to look first; bench.run has peers and checks, this has neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import _core, _predictions

BF16 = torch.bfloat16
LOOK = 1.5  # a case that takes this many times its prediction is where to look first


@dataclasses.dataclass
class Timed:
    name: str
    open: Callable[[], Callable[[], Any]]  # makes the tensors; what comes back is timed
    bytes: float = 0
    flop: float = 0


def _step(fn: Callable[..., Tensor], *inputs: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:
        plain = [t.detach() for t in inputs]
        return lambda: fn(*plain)
    leaves = [t.detach().requires_grad_() for t in inputs]

    def call() -> Any:
        value = fn(*leaves)
        upstream = torch.ones((), dtype=value.dtype, device=value.device).expand_as(value)
        return torch.autograd.grad(value, leaves, upstream)

    return call


def _rows(n: int, classes: int, dtype: torch.dtype, device: str, **options: Any):
    """(the loss, logits)"""
    import pyloss

    x = torch.empty((n, classes), dtype=dtype, device=device).normal_()
    y = torch.randint(classes, (n,), device=device)
    return (lambda t: pyloss.fused_cross_entropy(t, y, **options)), x


def _row_cases(device: str, quick: bool) -> Iterator[Timed]:
    elements = 2**15 if quick else 2**29
    for classes in (4096, 8192, 32768, 131072):
        n = max(2, elements // classes)
        size = 2.0 * n * classes

        def case(backward: bool, options: Any, n: int = n, classes: int = classes) -> Any:
            fn, x = _rows(n, classes, BF16, device, **options)
            return _step(fn, x, backward=backward)

        yield Timed(f"rows fwd {classes}", lambda c=case: c(False, {}), size)
        none = {"reduction": "none"}  # the backward reads the logits again
        yield Timed(f"rows fwd+bwd {classes}", lambda c=case, o=none: c(True, o), 3 * size)
        yield Timed(f"rows fwd with gradient {classes}", lambda c=case: c(True, {}), 2 * size)
    for classes, what in ((10, "narrow 10"), (32, "narrow 32")):
        n = 2000 if quick else 2**29 // 32
        size = 2.0 * n * classes

        def narrow(backward: bool, n: int = n, classes: int = classes) -> Any:
            fn, x = _rows(n, classes, BF16, device, reduction="none")
            return _step(fn, x, backward=backward)

        yield Timed(f"rows fwd {what}", lambda c=narrow: c(False), size)
        yield Timed(f"rows fwd+bwd {what}", lambda c=narrow: c(True), 3 * size)
    yield from _layout_cases(device, quick)


def _layout_cases(device: str, quick: bool) -> Iterator[Timed]:
    n = 4 if quick else 8192

    def padded(backward: bool) -> Any:
        fn, x = _rows(n, 50304, BF16, device, reduction="none")
        fn2, _ = _rows(n, 50257, BF16, device, reduction="none")
        view = x[:, :50257]
        if not backward:
            return lambda: fn2(view)
        leaf = x.requires_grad_()[:, :50257].detach().requires_grad_()
        return lambda: torch.autograd.grad(fn2(leaf).sum(), leaf)

    size = 2.0 * n * 50257
    yield Timed("rows fwd padded slice", lambda: padded(False), size)
    yield Timed("rows fwd+bwd padded slice", lambda: padded(True), 3 * size)

    images, classes, pixels = (2, 60, 8) if quick else (64, 5000, 128)

    def strided(backward: bool) -> Any:
        import pyloss

        x = torch.empty((images, classes, pixels), dtype=BF16, device=device).normal_()
        y = torch.randint(classes, (images, pixels), device=device)
        fn = lambda t: pyloss.fused_cross_entropy(t, y, reduction="none")  # noqa: E731
        return _step(fn, x, backward=backward)

    size = 2.0 * images * classes * pixels
    yield Timed("rows fwd strided", lambda: strided(False), size)
    yield Timed("rows fwd+bwd strided", lambda: strided(True), 3 * size)


def _attention_cases(device: str, quick: bool) -> Iterator[Timed]:
    from bench import bench_tensor_attention as exact
    from bench import bench_tensor_attention_lowrank as lowrank

    for what, size in (("windows", exact.GPU_WINDOW), ("full", exact.GPU_FULL)):
        heads, n, d, window = size if not quick else (1, 40, 16, size[3])
        for mode in ("fwd", "fwd+bwd"):

            def attend(mode: str = mode, shape: Any = (heads, n, d, window)) -> Any:
                problem = exact.Problem(*shape, "bf16", device)
                return exact.pyloss_provider(problem, mode).build().call

            flop = exact.useful_flop(mode, heads, n, d, window)
            yield Timed(f"attention {mode} {what}", attend, flop=flop)
    heads, n, d, degree = lowrank.GPU if not quick else (1, 70, 8, 2)
    for mode in ("fwd", "fwd+bwd"):

        def near_linear(mode: str = mode) -> Any:
            return lowrank.own_run(lowrank.Problem(heads, n, d, degree, device), mode).call

        flop = lowrank.flop(mode, heads, n, d, degree)
        yield Timed(f"attention {mode} low rank", near_linear, flop=flop)


def _linear_cases(device: str, quick: bool) -> Iterator[Timed]:
    n, classes, d = (8, 200, 16) if quick else (4096, 128256, 4096)
    ways = {"chunks": {"strategy": "forward"}, "filter": {"filter": 1e-5}}
    for way, options in ways.items():
        if device == "cpu" and way == "filter":
            continue  # of the Triton tiles

        def linear(options: Any = options) -> Any:
            import pyloss

            x = torch.empty((n, d), dtype=BF16, device=device).normal_()
            w = torch.empty((classes, d), dtype=BF16, device=device).normal_(std=d**-0.5)
            y = torch.randint(classes, (n,), device=device)
            fn = lambda a, b: pyloss.fused_linear_cross_entropy(a, b, y, **options)  # noqa: E731
            return _step(fn, x, w, backward=True)

        yield Timed(f"linear fwd+bwd {way}", linear, flop=6.0 * n * classes * d)


def _pair_cases(device: str, quick: bool) -> Iterator[Timed]:
    """Of contrastive losses. Operations are those of three products, whatever is done again."""

    def contrastive(loss: str, n: int, d: int) -> Any:
        import pyloss

        features = [torch.randn((n, d), device=device).to(BF16) for _ in range(2)]
        return _step(getattr(pyloss, loss), *features, backward=True)

    for name, loss, views, n, d in (
        ("nt_xent 8192x128", "nt_xent", 2, 4096, 128),
        ("nt_xent 65536x512", "nt_xent", 2, 32768, 512),
        ("info_nce 65536x512", "info_nce", 1, 65536, 512),
        ("clip 65536x512", "clip_loss", 1, 65536, 512),
    ):
        sizes = (20, 8) if quick else (n, d)
        call = functools.partial(contrastive, loss, *sizes)
        yield Timed(f"pairs fwd+bwd {name}", call, flop=6.0 * (views * n) ** 2 * d)


def _other_cases(device: str, quick: bool) -> Iterator[Timed]:
    def sorting(rows: int, wires: int) -> Any:
        import pyloss

        x = torch.randn(rows, wires, device=device)
        ranks = torch.arange(wires, device=device).expand(rows, wires)
        fn = lambda t: pyloss.sorting_cross_entropy(t, ranks, target_is="ranks")  # noqa: E731
        return _step(fn, x, backward=True)

    b, n = (2, 40) if quick else (64, 1024)
    yield Timed("sorting fwd+bwd 64x1024", lambda: sorting(b, n))

    def betti(kind: str, volumes: bool = False) -> Any:
        import pyloss
        from bench import bench_betti_matching, bench_betti_matching_3d

        bench, batch, side = bench_betti_matching, 8, 512
        if volumes:
            bench, batch, side = bench_betti_matching_3d, 4, 96
        shape = (1, 16) if quick else (batch, side)
        problem = bench_betti_matching.Problem(kind, *shape, device, bench.make_pair)
        fn = lambda t: pyloss.betti_matching_loss(t, problem.target)  # noqa: E731
        return _step(fn, problem.input, backward=True)

    for kind in ("smooth", "noise"):
        yield Timed(f"betti fwd+bwd 8x512x512 {kind}", lambda kind=kind: betti(kind))
        name = f"betti fwd+bwd 4x96x96x96 {kind}"
        yield Timed(name, lambda kind=kind: betti(kind, volumes=True))

    def ramp() -> Any:
        import pyloss

        x = torch.linspace(0, 1, 100 if quick else 10**6, device=device).view(1, 1, -1)
        y = (torch.rand_like(x) > 0.5).float()
        return _step(lambda t: pyloss.betti_matching_loss(t, y), x, backward=True)

    yield Timed("betti fwd+bwd ramp of 10^6", ramp)

    def permutahedron(rows: int, n: int) -> Any:
        from pyloss import functional

        x = torch.randn(rows, n, device=device)
        return _step(lambda t: functional.permutahedron_rank(t, "l2", 0.1), x, backward=True)

    yield Timed("permutahedron fwd+bwd 64x1024", lambda: permutahedron(b, n))


def _later_cases(device: str, quick: bool) -> Iterator[Timed]:
    """Row losses that are not plain cross entropy, at one vocabulary, and ops of other families."""
    import pyloss

    n, classes = (4, 60) if quick else (2048, 32000)

    def row_loss(loss: Callable[..., Tensor], count: int) -> Any:
        y = torch.randint(classes, (n,), device=device)
        logits = [torch.randn((n, classes), device=device).to(BF16) for _ in range(count)]
        return _step(lambda *x: loss(*x, y).sum(), *logits, backward=True)

    size = 2.0 * n * classes
    for name, loss, passes, count in (
        ("aldr", pyloss.functional.aldr_loss, 4, 1),
        ("spherical z", pyloss.functional.spherical_z_loss, 3, 1),
        ("margin shift", pyloss.functional.margin_shift, 6, 2),
    ):
        call = functools.partial(row_loss, loss, count)
        yield Timed(f"{name} fwd+bwd 2048x32000", call, size * passes)

    tensors, length = (3, 5) if quick else (200, 500_000)

    def step() -> Any:
        parameters = [torch.randn(length, device=device) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return pyloss.optim.LionK(parameters, lr=1e-4).step

    yield Timed("lion_k step 10^8", step, bytes=20.0 * tensors * length)

    values, width = (30, 4) if quick else (10**6, 64)

    def segments() -> Any:
        ends = torch.arange(0, values + 1, 10, device=device)
        x = torch.randn(values, width, device=device)
        return _step(lambda t: pyloss.functional.segment_reduce(t, ends, "sum"), x, backward=True)

    yield Timed("segment sum fwd+bwd 10^6x64", segments, bytes=8.8 * values * width)

    clouds = 3 if quick else 65536

    def frames() -> Any:
        x = torch.randn(clouds, 64, 3, device=device)

        def axes(t: Tensor) -> Tensor:
            return pyloss.functional.pca_frames(t).R

        return _step(axes, x, backward=True)

    yield Timed("frames fwd+bwd 65536x64x3", frames, bytes=12.0 * clouds * 192)


def cases(device: str, quick: bool) -> Iterator[Timed]:
    yield from _yardsticks(device, quick)
    yield from _row_cases(device, quick)
    yield from _attention_cases(device, quick)
    yield from _pair_cases(device, quick)
    yield from _other_cases(device, quick)
    yield from _later_cases(device, quick)
    yield from _linear_cases(device, quick)


def _yardsticks(device: str, quick: bool) -> Iterator[Timed]:
    count, side = (1000, 64) if quick else (2**29, 8192)

    def copy() -> Any:
        a = torch.ones(count, dtype=BF16, device=device)
        b = torch.empty_like(a)
        return lambda: b.copy_(a)

    def product() -> Any:
        a, b = (torch.randn(side, side, dtype=BF16, device=device) for _ in range(2))
        return lambda: a @ b

    yield Timed("copy", copy, bytes=4.0 * count)
    yield Timed("product", product, flop=2.0 * side**3)


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    return statistics.median(_core._event_samples(_core.Run(call), 60.0))


def measure(case: Timed, device: str, quick: bool) -> dict[str, Any]:
    """One record; what goes wrong is a record, too. The time of a tiny shape is nobody's."""
    predicted = _predictions.milliseconds().get(case.name)
    record: dict[str, Any] = {"case": case.name, "predicted_ms": predicted, "measured_ms": None}
    try:
        call = case.open()
        if device == "cuda":
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = _seconds(call, device)
        if device == "cuda":
            record["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            del call
            torch.cuda.empty_cache()
    except Exception as error:  # the other cases are still worth having
        lines = str(error).strip().splitlines() or [""]
        return record | {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}"[:300]}
    if quick:
        return record | {"status": "rehearsed"}
    record |= {"status": "ok", "measured_ms": 1e3 * seconds}
    if predicted:
        record["ratio"] = record["measured_ms"] / predicted
        record["look_here_first"] = record["ratio"] > LOOK
    if case.bytes:
        record["gbs"] = case.bytes / seconds / 1e9
    if case.flop:
        record["tflops"] = case.flop / seconds / 1e12
    return record


def line(record: dict[str, Any]) -> str:
    text = f"{record['case']:<34}"
    if record["measured_ms"] is None:
        return f"{text} {record['status']} {record.get('reason', '')}"
    text += f" {record['measured_ms']:>10.4f} ms"
    if record.get("ratio"):
        text += f"  {record['ratio']:6.2f} of {record['predicted_ms']:.4f} predicted"
        text += "  LOOK HERE" if record["look_here_first"] else ""
    for key, unit in (("gbs", "GB/s"), ("tflops", "TFLOP/s"), ("peak_mb", "MB")):
        text += f"  {record[key]:.0f} {unit}" if key in record else ""
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench._gpu_times")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test of this file")
    args = parser.parse_args(arguments)
    records: list[dict[str, Any]] = []
    for case in cases(args.device, args.quick):
        records.append(measure(case, args.device, args.quick))
        print(line(records[-1]), flush=True)
        rest = _predictions.planned({r["case"] for r in records})
        partial = args.json.with_name(args.json.name + ".part")
        partial.write_text(json.dumps(records + rest, indent=1) + "\n")
        partial.replace(args.json)
    return 1 if any(r["status"] == "failed" for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
