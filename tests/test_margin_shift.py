"""How far margins moved: the kernels against the reference, at the sizes and layouts that they are
written around. What the functions promise: tests/specs/adversarial.py."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import pyloss
from pyloss import _C
from pyloss.functional import margin_shift
from pyloss.ops.margin_shift import cpu, cuda
from pyloss.ops.margin_shift import margin_shift as op
from pyloss.reference.margin_shift import margin_shift as exact
from pyloss.testing import assert_matches_reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def draw(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64)
    moved = x + 0.3 * torch.randn(shape, generator=generator, dtype=F64)
    rows = (shape[0], *shape[2:])
    target = torch.randint(shape[1], rows, generator=generator)
    target.view(-1)[::3] = -100
    return x.to(dtype), moved.to(dtype), target


def check(x, moved, target, squared=False):
    """Value and both gradients, and one alone."""
    wanted = [t.double().requires_grad_() for t in (x, moved)]
    up = torch.linspace(0.5, 2, target.numel(), dtype=F64).view(target.shape)
    value = exact(*wanted, target, squared=squared)
    value.backward(up)
    for needs in ((True, True), (False, True), (True, False)):
        given = [t.detach().requires_grad_(yes) for t, yes in zip((x, moved), needs)]
        got = margin_shift(*given, target, squared=squared)
        got.backward(up.to(got.dtype))
        assert_matches_reference(got.detach(), value.detach())
        for g, w, yes in zip(given, wanted, needs):
            if yes:
                size = float(w.grad.abs().max())
                rtol = {F64: 1e-12, F32: 1e-5, BF16: 2**-7, F16: 2**-10}[x.dtype]
                assert_matches_reference(g.grad, w.grad, rtol=rtol, atol=rtol * size)
            else:
                assert g.grad is None


# 63 to 65: whole groups of lanes, 2047 to 2049: blocks, 1100: above the size of what is streamed.
@pytest.mark.parametrize("classes", [1, 2, 10, 63, 64, 65, 1000, 2047, 2048, 2049])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_rows(classes, dtype) -> None:
    check(*draw((7, classes), dtype), squared=classes % 2 == 0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_past_the_cache_are_streamed(dtype) -> None:
    check(*draw((2100, 1031), dtype))


LAYOUTS = {
    "positions": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "slice": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts(first, second) -> None:
    x, moved, target = draw((2, 70, 301), F32)
    check(LAYOUTS[first](x), LAYOUTS[second](moved), target)


def test_matrices_that_are_slices_transposed_or_expanded() -> None:
    x, moved, target = draw((9, 40), F32)
    check(torch.cat([x, x], 1)[:, :40], moved.t().contiguous().t(), target)
    row = x[:1].expand(9, 40)
    assert torch.equal(margin_shift(row, moved, target), margin_shift(row.clone(), moved, target))


def test_differences_do_not_cancel() -> None:
    """All logits moved by 10^4 together, the margins by little."""
    generator = torch.Generator().manual_seed(0)
    small = 1e-3 * torch.randn(5, 1000, generator=generator, dtype=F64)
    x, moved = torch.zeros(5, 1000), (1e4 + small).float()
    target = torch.arange(5)
    got = margin_shift(x, moved, target)
    assert_matches_reference(got, exact(x.double(), moved.double(), target))


@pytest.mark.parametrize("squared", [False, True])
def test_where_nothing_moved_the_gradient_is_zero(squared) -> None:
    x = torch.randn(3, 8).requires_grad_()
    moved = (x.detach() + 2).requires_grad_()  # all by the same
    shift = margin_shift(x.detach() * 0, moved - x.detach(), torch.arange(3), squared=squared)
    assert shift.abs().max() < 1e-5
    same = margin_shift(x, x, torch.arange(3), squared=squared)
    assert torch.equal(same, torch.zeros(3))
    same.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 8))


def test_an_ignored_row_is_not_read() -> None:
    x, moved, target = draw((4, 6), F32)
    x[0, 2], moved[3, 1] = math.nan, math.inf
    assert target[0] == target[3] == -100
    x.requires_grad_()
    shift = margin_shift(x, moved, target)
    shift.sum().backward()
    assert shift.isfinite().all()
    assert x.grad.isfinite().all()
    assert not x.grad[0].any()


def test_infinite_logits_are_no_number() -> None:
    x = torch.tensor([[0.0, math.inf, 1.0]])
    assert margin_shift(x, x, torch.tensor([0])).isnan().all()
    assert margin_shift(x * 0, torch.tensor([[0.0, -math.inf, 1.0]]), torch.tensor([0])).isnan()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_dtypes(dtype) -> None:
    x, moved, target = draw((6, 9), F32)
    target = target.clamp(min=0)
    got = margin_shift(x, moved, target.to(dtype))
    assert torch.equal(got, margin_shift(x, moved, target))


def test_no_classes() -> None:
    x = torch.zeros(2, 0)
    assert margin_shift(x, x, torch.full((2,), -100)).tolist() == [0, 0]
    with pytest.raises(IndexError, match="Target 0 is out of bounds"):
        margin_shift(x, x, torch.tensor([0, -100]))


@pytest.mark.parametrize("shape", [(4, 9), (2, 5, 3)])
def test_opcheck(shape) -> None:
    x, moved, target = draw(shape, F32)
    ops = torch.ops.pyloss
    torch.library.opcheck(ops.margin_shift_fwd.default, (x, moved, target, False, -100))
    shift, total = ops.margin_shift_fwd(x, moved, target, False, -100)
    arguments = (shift, shift, total, x, moved, target, False, -100, True, True)
    torch.library.opcheck(ops.margin_shift_bwd.default, arguments)


def test_threads_do_not_change_a_mean() -> None:
    x, moved, target = draw((70_001, 3), F32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pyloss.functional.margin_shift(x, moved, target, reduction="mean"))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_backends_agree() -> None:
    x, moved, target = draw((5, 70), F32)
    found = []
    for backend in ("cpu", "reference"):
        with pyloss.backend(backend):
            given = [t.clone().requires_grad_() for t in (x, moved)]
            shift = op(*given, target, False, -100)
            shift.sum().backward()
            found.append([shift.detach(), *(t.grad for t in given)])
    torch.testing.assert_close(*found)


def test_the_cuda_half_hands_over_what_the_cpu_half_does(monkeypatch) -> None:
    class Kernels:
        @staticmethod
        def cuda_margin_shift_fwd(problem, shift, total, device, stream):
            assert (device, stream) == (3, 77)
            _C.margin_shift_fwd(problem, shift, total, 1)

        @staticmethod
        def cuda_margin_shift_bwd(problem, backward, device, stream):
            assert (device, stream) == (3, 77)
            _C.margin_shift_bwd(problem, backward, 1)

    monkeypatch.setattr(cuda, "_C", Kernels)
    monkeypatch.setattr(cuda, "queue", lambda x: (3, 77))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    x, moved, target = draw((2, 5, 3), F32)
    sums = cuda.forward(x, moved, target, False, -100)
    torch.testing.assert_close(sums, cpu.forward(x, moved, target, False, -100))
    up = torch.ones_like(sums[0])
    for wanted in ((True, True), (False, True)):
        arguments = (up, *sums, x, moved, target, False, -100, *wanted)
        torch.testing.assert_close(cuda.backward(*arguments), cpu.backward(*arguments))
