"""What only a GPU can show about the row-softmax kernels.

Values on ordinary problems are checked on every device by test_row_softmax.py; here are large
tensors, streams, graphs, synchronisation, determinism, and labels that do not exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import pyloss
from pyloss.reference.row_softmax import row_softmax as reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Half an ulp of the result's type, and for float32 some rounding of the long sums.
RTOL = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Every wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _problem(
    rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    x = (torch.randn(rows, classes, device="cuda") * scale).to(dtype).requires_grad_()
    return x, torch.randint(classes, (rows,), device="cuda")


def _expected(
    x: torch.Tensor, y: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in float64 on the same rounded logits."""
    exact = x.detach().double().requires_grad_()
    weight = options.pop("weight", None)
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    loss = reference(exact, y, None if weight is None else weight.double(), **options)
    loss.sum().backward()
    return loss.detach(), exact.grad


def _check(x: torch.Tensor, y: torch.Tensor, slack: float = 1e-6, **options: object) -> None:
    """`slack`: error of a gradient entry against the largest one, where terms cancel."""
    x.grad = None
    loss = pyloss.fused_cross_entropy(x, y, loss_dtype=torch.float32, **options)
    loss.sum().backward()
    want, grad = _expected(x, y, **options)
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-7)
    atol = grad.abs().max().item() * (1e-13 if x.dtype == torch.float64 else slack)
    if x.dtype == torch.float16:
        atol = max(atol, 1e-7)  # its smallest number is 6e-8
    torch.testing.assert_close(x.grad.double(), grad, rtol=RTOL[x.dtype], atol=atol)


# 21 and 32: one thread per row. 1000: a warp. 4096, 8193: a block, odd rows start anywhere in a
# vector. 50257 and 128256: usual vocabularies. 262144: the gradient does not stay in shared memory.
@pytest.mark.parametrize("classes", (21, 32, 1000, 4096, 8193, 50257, 128256, 262144))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_vocabulary_sizes(classes: int, dtype: torch.dtype, reduction: str) -> None:
    x, y = _problem(max(3, min(2000, 2**21 // classes)), classes, dtype)
    y[1] = -100
    _check(x, y, reduction=reduction)


# A few rows are split among blocks, many are not.
@pytest.mark.parametrize("rows", (1, 2, 5, 700))
@pytest.mark.parametrize(
    "options",
    (
        dict(label_smoothing=0.1),
        dict(label_smoothing=0.1, tau=1.5),
        dict(tau=0.7, z_loss=1e-3, softcap=20.0),
        dict(tau=1.7, truncate=0.01, temperature=0.8),
    ),
    ids=str,
)
def test_options_on_long_rows(rows: int, options: dict) -> None:
    x, y = _problem(rows, 40001, torch.float32)
    weight = torch.rand(40001, device="cuda") + 0.5
    _check(x, y, 3e-5, reduction="sum", **options)
    _check(x, y, 3e-5, reduction="sum", weight=weight, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("tau", (1.0, 1.5))
def test_probability_targets(dtype: torch.dtype, tau: float) -> None:
    x, _ = _problem(33, 10007, dtype)
    q = torch.rand(33, 10007, device="cuda").softmax(-1)
    _check(x, q, 3e-5, reduction="none", tau=tau)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((2, 21, 64, 64), (8, 150, 33, 31), (1, 5000, 3)), ids=str)
def test_class_dimension_in_the_middle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    y = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
    _check(x, y, reduction="mean")
    _check(x, y, reduction="none", label_smoothing=0.1)


def test_statistics() -> None:
    x, y = _problem(300, 5003, torch.float32)
    with torch.no_grad():
        x[7, 11] = x[7, 4000] = x[7].max() + 1  # a tie: the first one counts
    names = ("lse", "logprob", "entropy", "argmax", "correct", "rank")
    loss, stats = pyloss.fused_cross_entropy(x, y, reduction="none", return_stats=names)
    _, want = reference(x.double(), y, reduction="none", return_stats=names)
    for name in names:
        got = getattr(stats, name)
        if got.is_floating_point():
            torch.testing.assert_close(got.double(), want[name].detach(), rtol=1e-5, atol=2e-6)
        else:
            assert torch.equal(got, want[name]), name
    cotangents = [torch.randn(300, device="cuda", dtype=torch.float64) for _ in range(3)]
    exact = x.detach().double().requires_grad_()
    _, want = reference(exact, y, reduction="none", return_stats=names)
    sum((want[n] * c).sum() for n, c in zip(names, cotangents)).backward()
    sum((getattr(stats, n) * c).sum() for n, c in zip(names, cotangents)).backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tau", (0.5, 1.0, 1.5))
def test_second_derivative(tau: float) -> None:
    x, y = _problem(3, 40, torch.float64, scale=1.0)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return pyloss.fused_cross_entropy(x, y, tau=tau, softcap=5.0, z_loss=1e-2)

    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))


def test_more_than_2_to_the_31_elements() -> None:
    rows, classes = 33000, 65536  # 2.16e9 elements, 4.3 GB in bfloat16, and as much again
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free device memory")
    x = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    x[-1].copy_(torch.randn(classes, device="cuda"))
    x.requires_grad_()
    y = torch.zeros(rows, dtype=torch.int64, device="cuda")
    y[-1] = classes - 1
    loss = pyloss.fused_cross_entropy(x, y, reduction="none", loss_dtype=torch.float32)
    loss.sum().backward()
    want, grad = _expected(x[-1:].detach(), y[-1:], reduction="none")
    torch.testing.assert_close(loss[-1:].double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad[-1:].double(), grad, rtol=2**-8, atol=1e-12)
    torch.testing.assert_close(loss[0].double().cpu(), torch.tensor(float(classes)).double().log())


def test_row_stride_beyond_2_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of free device memory")
    stride, classes = 2**31 + 8, 1000
    flat = torch.empty(stride + classes, device="cuda", dtype=torch.bfloat16)
    x = flat.as_strided((2, classes), (stride, 1))
    x.copy_(torch.randn(2, classes, device="cuda"))
    y = torch.tensor([3, 999], device="cuda")
    loss = pyloss.fused_cross_entropy(x, y, reduction="none", loss_dtype=torch.float32)
    want, _ = _expected(x.clone(), y, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", (10, 1000, 20000))
@pytest.mark.parametrize("bad", (-1, 20000, 2**40))
def test_labels_out_of_range_give_nan(classes: int, bad: int) -> None:
    x, y = _problem(6, classes, torch.float32)
    y[2] = bad
    y[4] = -100
    loss = pyloss.fused_cross_entropy(x, y, reduction="none")
    loss.nansum().backward()
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert loss[4] == 0
    x.grad = None
    pyloss.fused_cross_entropy(x, y, reduction="sum").backward()
    assert x.grad.isnan().all(-1).tolist() == [False, False, True, False, False, False]
    assert x.grad[[0, 1, 3, 5]].isfinite().all()
    assert (x.grad[4] == 0).all()


def test_ignored_rows_are_not_read() -> None:
    x, y = _problem(4, 3000, torch.bfloat16)
    with torch.no_grad():
        x[1] = float("nan")
    y[1] = -100
    loss = pyloss.fused_cross_entropy(x, y)
    loss.backward()
    assert loss.isfinite() and (x.grad[1] == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("offset", (0, 1, 5))
def test_inplace_gradient(dtype: torch.dtype, offset: int) -> None:
    # Cut out of a larger tensor, so that rows start anywhere in a vector.
    hidden = torch.randn(64 * 5000 + offset, device="cuda").to(dtype).requires_grad_()
    y = torch.randint(5000, (64,), device="cuda")
    expected = hidden.detach()[offset:].view(64, 5000).clone().requires_grad_()
    pyloss.fused_cross_entropy(expected, y, reduction="sum").backward()

    logits = (hidden * 1)[offset:].view(64, 5000)
    before = logits.detach().clone()
    loss = pyloss.fused_cross_entropy(logits, y, reduction="sum", inplace=True)
    assert torch.equal(logits, before)
    loss.backward()
    torch.testing.assert_close(
        hidden.grad[offset:].view(64, 5000),
        expected.grad,
        rtol=2**-7 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-12,
    )


def test_strided_logits() -> None:
    wide = torch.randn(50, 2 * 3001, device="cuda")
    y = torch.randint(3000, (50,), device="cuda")
    for view in (wide[:, :3000], wide[:, 1:3001], wide[:, ::2][:, :3000], wide.T[:50, :50]):
        x = view.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        labels = y % x.shape[1]
        loss = pyloss.fused_cross_entropy(view, labels, reduction="none")
        want, _ = _expected(x, labels, reduction="none")
        torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-7)


def test_misaligned_labels() -> None:
    x, y = _problem(64, 1000, torch.float32)
    padded = torch.cat([y.new_zeros(1), y])
    assert torch.equal(pyloss.fused_cross_entropy(x, padded[1:]), pyloss.fused_cross_entropy(x, y))


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_no_synchronisation(reduction: str) -> None:
    x, y = _problem(512, 4000, torch.bfloat16)
    weight = torch.rand(4000, device="cuda")

    def step() -> None:
        x.grad = None
        loss = pyloss.fused_cross_entropy(
            x, y, weight, reduction=reduction, label_smoothing=0.1, z_loss=1e-4
        )
        loss.sum().backward()

    step()  # the first call loads modules and creates handles
    with no_sync():
        step()


def test_other_stream() -> None:
    x, y = _problem(2048, 8000, torch.float32)
    pyloss.fused_cross_entropy(x, y).backward()
    want, x.grad = x.grad, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work before it on the same stream: a kernel on another stream would not wait for it.
        late = x.detach() * 1
        torch.cuda._sleep(50_000_000)
        late.mul_(2).mul_(0.5)
        late.requires_grad_()
        pyloss.fused_cross_entropy(late, y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(late.grad, want)


@pytest.mark.parametrize("rows", (3, 600))
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_graph_capture(rows: int, reduction: str) -> None:
    x, y = _problem(rows, 33000, torch.bfloat16)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = pyloss.fused_cross_entropy(x, y, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, x)
        return loss, grad

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        y.copy_(torch.randint_like(y, 33000))
    graph.replay()
    want_loss, want_grad = step()
    assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("rows, classes", ((1, 200000), (64, 50257), (30000, 21)))
def test_equal_bits_every_time(rows: int, classes: int) -> None:
    x, y = _problem(rows, classes, torch.float32)
    results = []
    for _ in range(5):
        x.grad = None
        loss = pyloss.fused_cross_entropy(x, y, label_smoothing=0.1)
        loss.backward()
        results.append((loss.detach().clone(), x.grad.clone()))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_gradient_of_forward_and_backward_agree() -> None:
    # A scalar reduction may write the gradient in the forward, 'none' never does.
    for rows, classes in ((1, 20000), (40, 20000), (5000, 300)):
        x, y = _problem(rows, classes, torch.float32)
        pyloss.fused_cross_entropy(x, y, reduction="sum").backward()
        early, x.grad = x.grad, None
        pyloss.fused_cross_entropy(x, y, reduction="none").sum().backward()
        torch.testing.assert_close(early, x.grad, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("factor", (1.0, 0.25, -3.0))
def test_upstream_factor(factor: float) -> None:
    x, y = _problem(64, 5000, torch.float32)
    (pyloss.fused_cross_entropy(x, y) * factor).backward()
    _, grad = _expected(x, y)
    torch.testing.assert_close(x.grad.double(), grad * factor, rtol=2e-5, atol=1e-10)


def test_accuracy_over_thirty_decades() -> None:
    # comp_sum bound: (8 + |ln value| + |1 - tau| L) 2^-23, for every entry of the gradient.
    classes = 2000
    base = torch.randn(70, classes, device="cuda") + 1e4
    y = torch.randint(classes, (70,), device="cuda")
    base[torch.arange(70), y] += torch.linspace(-10, 76, 70, device="cuda")
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0):
        x = base.clone().requires_grad_()
        loss = pyloss.fused_cross_entropy(x, y, tau=tau, reduction="none")
        loss.sum().backward()
        want, grad = _expected(x, y, tau=tau, reduction="none")
        nll, _ = _expected(x, y, reduction="none")
        extra = 8 + abs(1 - tau) * nll
        for got, exact, more in ((loss, want, extra), (x.grad, grad, extra[:, None])):
            bound = (more + exact.abs().log().abs()) * 2**-23
            error = (got.double() / exact - 1).abs() / bound
            assert error[exact.abs() > 1e-30].max() <= 1


def test_no_device_memory_but_the_gradient() -> None:
    x, y = _problem(2048, 32000, torch.float32)
    size = x.numel() * x.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pyloss.fused_cross_entropy(x, y).backward()
    assert torch.cuda.max_memory_allocated() - before < size + 4 * 2**20
