"""What the CUDA halves of the ops hand to their kernels, on a machine without a device.

They run on CPU tensors, with the CPU's kernels behind the names of the CUDA ones: both read the
same records, so that the results must be the same, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools

import pytest
import torch

from pyloss import _C
from pyloss.ops import betti_matching, lion_k, row_softmax, segment, sorting_network
from pyloss.ops.sorting_network import records

SCRATCH, DEVICE, STREAM = 1000, 3, 7
RANKS, INT32 = 0, 5


class Kernels:
    """_C with a device."""

    @staticmethod
    def cuda_sorting_network_scratch_bytes(problem, call, device):
        return SCRATCH

    @staticmethod
    def cuda_sorting_network(problem, c, scratch, scratch_bytes, device, stream):
        assert (scratch_bytes, device, stream) == (SCRATCH, DEVICE, STREAM) and scratch
        task = records.TASKS[c.task]
        targets = records.Targets(RANKS, c.first, INT32, c.count, c.kind, 0)
        arguments = {
            "sort": (c.y,),
            "sort_bwd": (c.gy, c.gx),
            "apply": (c.features, c.out),
            "apply_bwd": (c.features, c.g, c.gx, c.gf),
            "permutation": (c.y, c.out),
            "permutation_bwd": (c.gy, c.g, c.gx),
            "loss": (targets, c.loss, c.gx),
        }[task]
        getattr(_C, f"sorting_network_{task}")(problem, *arguments, 1)

    @staticmethod
    def cuda_betti_matching_scratch_bytes(problem, device):
        return SCRATCH

    @staticmethod
    def cuda_betti_loss(problem, options, loss, grad, scratch, scratch_bytes, device, stream):
        assert (scratch_bytes, device, stream) == (SCRATCH, DEVICE, STREAM) and scratch % 256 == 0
        _C.betti_loss(problem, options, loss, grad, 1)

    @staticmethod
    def cuda_row_softmax_scratch_bytes(problem, device):
        return SCRATCH

    @staticmethod
    def cuda_row_softmax_fwd(problem, forward, scratch, scratch_bytes, device, stream):
        assert (scratch_bytes, device, stream) == (SCRATCH, DEVICE, STREAM) and scratch
        _C.row_softmax_fwd(problem, forward, 1)

    @staticmethod
    def cuda_row_softmax_bwd(problem, backward, device, stream):
        assert (device, stream) == (DEVICE, STREAM)
        _C.row_softmax_bwd(problem, backward, 1)

    @staticmethod
    def cuda_row_softmax_hvp(problem, backward, hvp, device, stream):
        assert (device, stream) == (DEVICE, STREAM)
        _C.row_softmax_hvp(problem, backward, hvp, 1)

    @staticmethod
    def cuda_lion_k_step(problem, lr, found_inf, step, device, stream):
        assert (device, stream) == (DEVICE, STREAM) and lr and step and not found_inf
        rate, number = (ctypes.c_float.from_address(at).value for at in (lr, step))
        options = problem.options._replace(lr=rate, step=int(number))
        _C.lion_k_step(problem._replace(options=options), 1)

    segment_scratch_numbers = _C.segment_scratch_numbers

    @staticmethod
    def cuda_segment_fold(problem, kind, out, scratch, device, stream):
        rows, width, _ = problem.sizes
        assert (device, stream) == (DEVICE, STREAM)
        assert bool(scratch) == bool(_C.segment_scratch_numbers(rows, width))
        _C.segment_fold(problem, kind, out, 1)

    @staticmethod
    def cuda_segment_map(problem, kind, out, device, stream):
        assert (device, stream) == (DEVICE, STREAM)
        _C.segment_map(problem, kind, out, 1)

    @staticmethod
    def cuda_scale_inplace(data, dtype, n, factor, device, stream):
        assert (device, stream) == (DEVICE, STREAM)
        _C.scale_inplace(data, dtype, n, factor, 1)


@pytest.fixture(autouse=True)
def device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    for op in (sorting_network, betti_matching, row_softmax, lion_k, segment):
        monkeypatch.setattr(op.cuda, "_C", Kernels)
        monkeypatch.setattr(op.cuda, "queue", lambda x: (DEVICE, STREAM))


def test_an_old_driver_is_said_at_import(monkeypatch) -> None:
    monkeypatch.setattr(_C, "cuda_driver_problem", lambda: "the driver is too old", raising=False)
    with pytest.warns(RuntimeWarning, match="too old"):
        importlib.reload(importlib.import_module("pyloss.backends"))


def check(op, name: str, *arguments) -> None:
    found, wanted = (getattr(half, name)(*arguments) for half in (op.cuda, op.cpu))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lion_k(dtype: torch.dtype) -> None:
    """Strided tensors among them; numbers of another dtype on the device."""
    found = []
    for half in (lion_k.cuda, lion_k.cpu):
        torch.manual_seed(0)
        x, g, m = ([torch.randn(6, 4).to(dtype).t(), torch.randn(3).to(dtype)] for _ in range(3))
        stochastic = dtype == torch.bfloat16
        half.step(
            x, g, m, [], [], torch.tensor(0.25, dtype=torch.float64), None, torch.tensor(7),
            [0, int(stochastic), 1, 5, 0], [0.0, 0.9, 0.99, 0.5, 0.0], [0, 1] if stochastic else [],
        )  # fmt: skip
        found.append([*x, *m])
    for a, b in zip(*found):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [9, 5000])
def test_segment(rows: int) -> None:
    x, offsets = torch.randn(rows, 1), torch.tensor([0, 4, 5, rows], dtype=torch.int32)
    for kind in (segment.kinds.MOMENTS, segment.kinds.LOGSUMEXP):
        check(segment, "fold", x, None, offsets, [], kind)
    g = torch.randn(2, 3).t()[:, :1]
    check(segment, "map_", x, x.bfloat16().float(), offsets, [g], segment.kinds.FROM_NORMALIZED)
    check(segment, "map_", x[:1].expand(rows, 1), None, offsets, [g], segment.kinds.SPREAD)


# The last one stands for Batcher's network or the bitonic one.
@pytest.mark.parametrize("net", [[0, 3, 0], [1, 2, 0], [3, 3, 2], [4, 5, 0]], ids=str)
@pytest.mark.parametrize("n", [5, 8])
def test_sorting_network(n: int, net: list[int]) -> None:
    torch.manual_seed(n)
    x, gy, gp, options = torch.randn(3, n), torch.randn(3, n), torch.randn(3, n, n), [4.0, 0.25]
    rest = (net, options)
    check(sorting_network, "sort", x, *rest)
    check(sorting_network, "sort_bwd", gy, x, *rest)
    g = torch.randn(3, n, 4)
    for f, transpose in itertools.product((g[:1].clone(), torch.randn(3, n, 4)), (False, True)):
        check(sorting_network, "apply", x, f, transpose, *rest)
        for need_f in (False, True):
            check(sorting_network, "apply_bwd", g, x, f, transpose, *rest, need_f)
    check(sorting_network, "permutation", x, *rest)
    for given in (gy, None):
        check(sorting_network, "permutation_bwd", given, gp, x, *rest)

    ranks, levels = torch.rand(3, n).argsort(1).int(), torch.randint(0, 4, (3, n))
    for order, kind, reduction, need in itertools.product(range(5), range(3), range(3), (0, 1)):
        target = ranks if order == RANKS else levels
        check(sorting_network, "loss", x, target, None, [order, kind, reduction], *rest, bool(need))
    check(sorting_network, "loss", x, ranks // 2, ranks % 2 + 1, [0, 0, 0], *rest, True)


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 3, 9), (0, 3, 9, 8)], ids=str)
@pytest.mark.parametrize("want_grad", [0.0, 1.0])
def test_betti_matching(shape: tuple[int, ...], want_grad: float) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(shape), torch.rand(shape)
    check(betti_matching, "loss", x, y, [1.0, 3.0, 0.0, 1.0, want_grad, 0.1, 1.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (5,)], ids=str)
@pytest.mark.parametrize("reduction", row_softmax.REDUCTIONS)
@pytest.mark.parametrize("kind", [row_softmax.INDEX, row_softmax.MIX])
def test_row_softmax(shape: tuple[int, ...], reduction: str, kind: int) -> None:
    torch.manual_seed(0)
    x, v = torch.randn(shape), torch.randn(shape)
    rows = x[0].shape[:0] if x.dim() == 1 else (shape[0], *shape[2:])
    y, y2 = torch.randint(5, (2, *rows)).unbind(0)
    mix = torch.rand(rows) if kind == row_softmax.MIX else None
    tensors = (x, y, None if mix is None else y2, mix, torch.rand(5), torch.rand(rows))
    options = list(row_softmax.Options(tau=1.5, z_loss=0.1))
    codes = list(
        row_softmax.Codes(kind, -100, row_softmax.COMP_SUM, row_softmax.REDUCTIONS[reduction], 0)
    )
    scalar = reduction != "none"
    wants = row_softmax.WANT_EXTRAS | row_softmax.WANT_INDEX | (4 if scalar else 0)
    check(row_softmax, "forward", *tensors, options, codes, torch.float32, wants)
    saved = row_softmax.cpu.forward(*tensors, options, codes, torch.float32, wants)[1]
    g = torch.rand(()) if scalar else torch.rand(rows)
    for extras in (None, torch.randn(4, y.numel())):
        rest = (g, extras, *tensors, saved, options, codes)
        check(row_softmax, "backward", *rest)
        check(row_softmax, "hvp", v, *rest)


def test_row_softmax_in_place() -> None:
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    codes = [row_softmax.INDEX, -100, row_softmax.COMP_SUM, row_softmax.REDUCTIONS["sum"], 0]
    saved = row_softmax.cpu.forward(x, y, *[None] * 5, codes, torch.float32, 0)[1]
    found = []
    for half in (row_softmax.cuda, row_softmax.cpu):
        gradient = x.clone()
        half.backward_(torch.ones(()), None, gradient, y, *[None] * 4, saved, None, codes)
        half.scale_(gradient, torch.tensor(0.5))
        found.append(gradient)
    assert torch.equal(*found) and not torch.equal(found[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("pad", "begin"), [(3, 0), (5, 1), (8, 2), (16, 0), (0, 0)])
def test_gradients_of_a_slice_lie_as_the_slice_does(dtype, pad, begin, monkeypatch) -> None:
    """On a GPU: a row then takes vectors in both, and the scaling reaches its end."""
    monkeypatch.setattr(row_softmax.layout, "_by_vectors", lambda x: True)
    rows, classes = 7, 21
    store = torch.randn(rows, classes + pad).to(dtype)
    x, y = store[:, min(begin, pad) :][:, :classes], torch.randint(classes, (rows,))
    codes = [row_softmax.INDEX, -100, row_softmax.COMP_SUM, row_softmax.REDUCTIONS["sum"], 0]
    wants = row_softmax.WANT_GRAD
    tensors = (x, y, *[None] * 4, None, codes, torch.float32, wants)
    found, wanted = row_softmax.cuda.forward(*tensors), row_softmax.cpu.forward(*tensors)
    again = row_softmax.cuda.backward(
        torch.ones(()), None, x, y, *[None] * 4, found[1], None, codes
    )
    fake = row_softmax._forward_fake(*tensors)
    vector = 16 // x.element_size()
    for grad in (found[-1], again):
        torch.testing.assert_close(grad, wanted[-1], rtol=0, atol=0)
        assert (grad.stride(), grad.storage_offset()) == (
            fake[-1].stride(),
            fake[-1].storage_offset(),
        )
        if pad % vector:
            assert (grad.stride(0) - x.stride(0)) % vector == 0
            assert (grad.storage_offset() - x.storage_offset()) % vector == 0
    row_softmax.cuda.scale_(found[-1], torch.tensor(0.5))
    torch.testing.assert_close(found[-1], wanted[-1] * 0.5, rtol=1e-2, atol=0)
