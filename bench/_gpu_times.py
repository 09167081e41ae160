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
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import _core, _gpu_kernels, _predictions

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


def _kernel_cases(device: str, quick: bool) -> Iterator[Timed]:
    """Each for a kernel that no other case launches: _predictions.FOR_A_KERNEL."""
    import pyloss
    from pyloss import functional as F

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def labels(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, device=device)

    n, classes = (2, 300) if quick else (8, 2**21)
    yield Timed(
        f"rows fwd few {8}x{2**21}",
        lambda: _step(_rows(n, classes, BF16, device)[0], draw(n, classes), backward=False),
    )

    rows, columns = (3, 40) if quick else (2048, 32000)

    def second() -> Any:
        y, x = labels(columns, rows), draw(rows, columns, dtype=BF16).requires_grad_()

        def call() -> Any:
            loss = pyloss.fused_cross_entropy(x, y, reduction="none").sum()
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            return torch.autograd.grad(g, x, g.detach())

        return call

    yield Timed("rows second 2048x32000", second)

    shape = (2, 5, 4, 3) if quick else (8, 21, 512, 512)

    def image_loss(loss: Callable[..., Tensor], count: int) -> Any:
        y = labels(shape[1], shape[0], *shape[2:])
        logits = [draw(*shape, dtype=BF16) for _ in range(count)]
        return _step(lambda *x: loss(*x, y).sum(), *logits, backward=True)

    for name, loss, count in (
        ("spherical z", F.spherical_z_loss, 1),
        ("margin shift", F.margin_shift, 2),
    ):
        yield Timed(f"{name} fwd+bwd 8x21x512x512", functools.partial(image_loss, loss, count))

    values, width = (64, 4) if quick else (10**6, 64)

    def stats() -> Any:
        ends, x = torch.arange(0, values + 1, 8, device=device), draw(values, width)
        return lambda: F.segment_softmax_stats(x, ends)

    def long_segments() -> Any:
        ends = torch.arange(0, values + 1, values // 16, device=device)
        fn = lambda t: F.segment_reduce(t, ends, "sum")  # noqa: E731
        return _step(fn, draw(values, width), backward=True)

    yield Timed("segment stats fwd 10^6x64", stats)
    yield Timed("segment sum fwd+bwd long 10^6x64", long_segments)

    many, long = (40, 5) if quick else (32768, 256)

    def ranks() -> Any:
        fn = lambda t: F.permutahedron_rank(t, "l2", 0.1)  # noqa: E731
        return _step(fn, draw(many, long), backward=True)

    yield Timed("permutahedron fwd+bwd 32768x256", ranks)
    yield from _sorting_cases(device, quick)
    yield from _betti_cases(device, quick)

    def supcon(n: int, d: int) -> Any:
        features, ids = draw(n, d, dtype=BF16), labels(max(2, n // 8), n)
        return _step(lambda t: F.supervised_contrastive(t, ids), features, backward=True)

    def with_targets(n: int, d: int) -> Any:
        pair = [draw(n, d, dtype=BF16) for _ in range(2)]
        target = torch.arange(n, device=device).roll(1)
        return _step(lambda q, k: F.info_nce(q, k, target=target), *pair, backward=True)

    size = (16, 8) if quick else (8192, 128)
    yield Timed("pairs fwd+bwd target 8192x128", functools.partial(with_targets, *size))
    yield Timed("pairs fwd+bwd supcon 8192x128", functools.partial(supcon, *size))

    def attend(heads: int, queries: int, keys: int, d: int, masked: bool) -> Any:
        tensors = [draw(1, heads, n, d, dtype=BF16) for n in (queries, *[keys] * 4)]
        masks = {}
        if masked:
            seen = torch.rand(queries, keys, device=device) < 0.8
            masks = {"mask1": seen, "mask2": draw(queries, keys)}
        fn = lambda *t: pyloss.tensor_attention(*t, **masks)  # noqa: E731
        return _step(fn, *tensors, backward=masked)

    sizes = (1, 20, 20, 16) if quick else (4, 512, 512, 64)
    yield Timed("attention fwd+bwd masked", functools.partial(attend, *sizes, True))
    sizes = (1, 1, 20, 16) if quick else (8, 1, 4096, 64)
    yield Timed("attention fwd one query", functools.partial(attend, *sizes, False))

    heads, tokens, d = (1, 40, 8) if quick else (8, 65536, 64)

    def causal() -> Any:
        tensors = [0.1 * draw(1, heads, tokens, d) for _ in range(5)]
        options = {"method": "lowrank", "degree": 2, "is_causal": True, "logit_bound": 1.0}
        return _step(lambda *t: pyloss.tensor_attention(*t, **options), *tensors, backward=True)

    yield Timed("attention fwd+bwd causal low rank", causal)
    if device == "cpu":
        return  # Triton tiles

    def biased() -> Any:
        x, w, b = draw(2048, 2048, dtype=BF16), draw(32000, 2048, dtype=BF16), draw(32000)
        y = labels(32000, 2048)
        fn = lambda x, w, b: pyloss.fused_linear_cross_entropy(  # noqa: E731
            x, w, y, bias=b, strategy="tiles", filter=1e-5
        )
        return _step(fn, x, w, b.to(BF16), backward=True)

    yield Timed("linear fwd+bwd tiles bias 2048x32000x2048", biased)


def _sorting_cases(device: str, quick: bool) -> Iterator[Timed]:
    import pyloss

    def step(fn: Callable[[Tensor], Tensor], *shape: int) -> Any:
        return _step(fn, torch.randn(shape, device=device), backward=True)

    b, n = (3, 8) if quick else (4096, 32)

    def few() -> Any:
        ranks = torch.arange(n, device=device).expand(b, n)
        return step(lambda t: pyloss.sorting_cross_entropy(t, ranks, target_is="ranks"), b, n)

    def shared() -> Any:
        rows, wires, width = (3, 8, 2) if quick else (64, 256, 8)
        f = torch.randn(wires, width, device=device, requires_grad=True)

        def call() -> Any:
            x = torch.randn(rows, wires, device=device, requires_grad=True)
            found = pyloss.soft_permute(x, f.expand(rows, wires, width))
            return torch.autograd.grad(found.sum(), (x, f))

        return call

    long = 50 if quick else 2**20
    yield Timed("sorting fwd+bwd 4096x32", few)
    yield Timed("sorting fwd+bwd 1x1048576", lambda: step(pyloss.soft_sort, 1, long))
    yield Timed("sorting features fwd+bwd 64x256x8", shared)


def _betti_cases(device: str, quick: bool) -> Iterator[Timed]:
    import pyloss

    def images(batch: int, side: int, dtype: torch.dtype) -> list[Tensor]:
        shape = (1, 1, 12, 12) if quick else (batch, 1, side, side)
        return [torch.rand(shape, device=device).to(dtype) for _ in range(2)]

    def bars() -> Any:
        x, y = images(8, 512, torch.float32)
        return lambda: pyloss.betti_matching(x, y, 2)

    def step(*sizes: Any) -> Any:
        x, y = images(*sizes)
        return _step(lambda t: pyloss.betti_matching_loss(t, y), x, backward=True)

    yield Timed("betti bars 8x512x512", bars)
    yield Timed("betti fwd+bwd double 1x512x512", lambda: step(1, 512, torch.float64))
    yield Timed("betti fwd+bwd small 1x128x128", lambda: step(1, 128, torch.float32))


def cases(device: str, quick: bool) -> Iterator[Timed]:
    yield from _yardsticks(device, quick)
    yield from _row_cases(device, quick)
    yield from _attention_cases(device, quick)
    yield from _pair_cases(device, quick)
    yield from _other_cases(device, quick)
    yield from _later_cases(device, quick)
    yield from _kernel_cases(device, quick)
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


def kernel_milliseconds(events: Iterable[Any]) -> dict[str, float]:
    """Of pyloss's kernels, from the events of torch's profiler."""
    ours, found = set(_gpu_kernels.kernels()), {}
    for event in events:
        for name in {*re.findall(r"\w+_kernel\b", event.key)} & ours:
            found[name] = found.get(name, 0.0) + event.self_device_time_total * 1e-3
    return found


def _profiled(call: Callable[[], Any]) -> dict[str, float]:
    """A kernel whose time the profiler does not give is not in it."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return kernel_milliseconds(profile.key_averages())
    except RuntimeError as error:  # no CUPTI here: the case's own time is still worth having
        print(f"the profiler refuses: {error}"[:200], flush=True)
        return {}


def measure(case: Timed, device: str, quick: bool) -> dict[str, Any]:
    """One record; what goes wrong is a record, too. The time of a tiny shape is nobody's."""
    predicted = _predictions.milliseconds().get(case.name)
    record: dict[str, Any] = {
        "case": case.name,
        "predicted_ms": predicted,
        "measured_ms": None,
        "kernels": _predictions.kernel_records(case.name),
    }
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
            record["kernels"] = _predictions.kernel_records(case.name, _profiled(call))
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
