"""Every op in a CUDA graph, without a wait for the device, and from two host threads at a time.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs the steps on the CPU, once
each: that tests this file, not the kernels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch
from test_row_softmax_gpu import no_sync
from torch import Tensor

import pyloss
from pyloss import functional

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
Step = Callable[[], tuple[Tensor, ...]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def labels(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def step_of(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """(value, gradients)"""

    def step() -> tuple[Tensor, ...]:
        value = function(*inputs)
        return value.detach(), *torch.autograd.grad(value.float().square().sum(), inputs)

    return step


def cross_entropy(shape: tuple[int, ...] = (40, 1000), **options: object) -> Step:
    y = labels(shape[0], shape[1])
    loss = lambda x: pyloss.fused_cross_entropy(x, y, **options)  # noqa: E731
    return step_of(loss, draw(*shape, dtype=torch.bfloat16))


def moments() -> Step:
    y = labels(40, 1000)
    return step_of(lambda x: functional.spherical_z_loss(x, y), draw(40, 1000))


def frames() -> Step:
    offsets = torch.tensor([0, 9, 20], device=DEVICE)
    average = pyloss.nn.FrameAverage(lambda p, offsets: p.sin().sum(1), "SE")
    return step_of(lambda x: average(x, offsets=offsets), draw(20, 3))


def margin_shift() -> Step:
    y = labels(4, 30)
    return step_of(
        lambda x: functional.margin_shift(x, x.flip(1), y, reduction="mean"), draw(4, 30)
    )


def second_derivative() -> Step:
    x, y = draw(20, 50), labels(20, 50)

    def step() -> tuple[Tensor, ...]:
        loss = pyloss.fused_cross_entropy(x, y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    return step


def linear(**options: object) -> Step:
    y = labels(70, 500)
    return step_of(
        lambda x, w: pyloss.fused_linear_cross_entropy(x, w, y, **options),
        draw(70, 64, dtype=torch.bfloat16),
        draw(500, 64, dtype=torch.bfloat16),
    )


def attention(d: int = 32, **options: object) -> Step:
    tensors = [draw(1, 2, 64, d) for _ in range(5)]
    return step_of(lambda *t: pyloss.tensor_attention(*t, **options), *tensors)


def contrastive(d: int, loss: Callable[..., Tensor] = pyloss.clip_loss) -> Step:
    features = [draw(70, d, dtype=torch.bfloat16) for _ in range(2)]
    return step_of(lambda x, y: loss(x, y + x.flip(0)), *features)


def sorting(n: int, **options: object) -> Step:
    ranks = torch.arange(n, device=DEVICE).expand(3, n)
    loss = lambda x: pyloss.sorting_cross_entropy(x, ranks, target_is="ranks", **options)  # noqa: E731
    return step_of(loss, draw(3, n))


def betti(**options: object) -> Step:
    y = (draw(2, 1, 30, 20) > 0).float()
    return step_of(lambda x: pyloss.betti_matching_loss(x, y, **options), draw(2, 1, 30, 20))


def dice() -> Step:
    y = labels(128, 3).view(2, 8, 8)
    return step_of(lambda x: pyloss.functional.soft_dice_loss(x, y), draw(2, 3, 8, 8))


STEPS: dict[str, Callable[[], Step]] = {
    "cross entropy": cross_entropy,
    "cross entropy, rows": lambda: cross_entropy(reduction="none", label_smoothing=0.1),
    "cross entropy, few long rows": lambda: cross_entropy((3, 40000), tau=1.5, z_loss=1e-3),
    "cross entropy, narrow rows": lambda: cross_entropy((100, 21), softcap=20.0),
    "cross entropy, second derivative": second_derivative,
    "linear, chunks": lambda: linear(chunk=16),
    "linear, tiles": lambda: linear(strategy="tiles"),
    "linear, filter": lambda: linear(filter=1e-6),
    "attention": attention,
    "attention, window": lambda: attention(window=(16, 32), is_causal=True),
    "attention, low rank": lambda: attention(8, method="lowrank", degree=2, scale=1e-3),
    "attention, low rank, causal": lambda: attention(
        8, method="lowrank", degree=2, scale=1e-3, is_causal=True
    ),
    "contrastive, sweeps": lambda: contrastive(40),
    "contrastive, of one tensor": lambda: contrastive(40, functional.nt_xent),
    "contrastive, blocks": lambda: contrastive(160),
    "contrastive, sigmoid": lambda: contrastive(40, functional.siglip_loss),
    "sorting, small": lambda: sorting(16),
    "sorting, tiles": lambda: sorting(128),
    "sorting, splitter selection": lambda: step_of(
        lambda x: pyloss.soft_topk(x, 4, network="splitter_selection"), draw(2, 64)
    ),
    "betti": betti,
    "betti, options": lambda: betti(
        weight=[0.5, 2.0], matched_weight=1.5, target_weight=0.3, padding=0.25
    ),
    "betti, one dimension": lambda: betti(
        dims=[1], unmatched="extreme", unmatched_weight=0.5, padding="foreground"
    ),
    "frames": frames,
    "moments": moments,
    "margin shift": margin_shift,
    "permutahedron": lambda: step_of(
        lambda x: functional.permutahedron_rank(x, "kl", 0.5), draw(4, 30)
    ),
    "dice": dice,
}
NEEDS_TRITON = ("linear, tiles", "linear, filter")


@pytest.mark.parametrize("name", STEPS)
def test_graph_capture_without_a_wait(name: str) -> None:
    if DEVICE == "cpu" and name in NEEDS_TRITON:
        pytest.skip("needs a device")
    step = STEPS[name]()
    if DEVICE == "cpu":
        assert all(t.isfinite().all() for t in step())
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # kernels are compiled, tables made
        with no_sync():
            want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, want))


def test_two_host_threads_with_rows_of_different_length() -> None:
    """What a launch sets for its kernel must not be undone by another thread's launch."""
    steps = [cross_entropy((64, classes), label_smoothing=0.1) for classes in (2048, 50000)]
    want = [step() for step in steps]
    found: list[list] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        try:
            start.wait()
            stream = torch.cuda.Stream() if DEVICE != "cpu" else None
            with torch.cuda.stream(stream):
                for _ in range(100 if DEVICE != "cpu" else 2):
                    found[i].append(steps[i]())
                if stream:
                    stream.synchronize()
        except Exception as error:  # a thread's exception would be lost
            found[i].append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for results, right in zip(found, want):
        for result in results:
            assert not isinstance(result, Exception), result
            assert all(torch.equal(a, b) for a, b in zip(result, right))
