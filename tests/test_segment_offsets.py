"""Values and offsets: against loops, with empty segments; gradients, compiled, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pyloss import segment as ragged

LENGTHS = {
    "mixed": [3, 0, 1, 4, 2],
    "empty_ends": [0, 2, 0, 0, 5, 0],
    "all_empty": [0, 0, 0],
    "one": [6],
    "none": [],
}


@pytest.fixture(params=LENGTHS)
def lengths(request) -> list[int]:
    return LENGTHS[request.param]


def make_offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds, dtype=dtype)


def segments(values: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return list(values.split(lengths)) if lengths else []


@pytest.mark.parametrize("dtype", ragged.INDEX_DTYPES)
def test_offsets_lengths_and_ids(lengths, dtype):
    offsets, total = make_offsets(lengths, dtype), sum(lengths)
    ragged.check_offsets(offsets, total)
    given = torch.tensor(lengths, dtype=dtype)
    assert torch.equal(ragged.lengths_from_offsets(offsets), given)
    made = ragged.offsets_from_lengths(given)
    assert made.dtype == torch.int64 and torch.equal(made, make_offsets(lengths))
    ids = ragged.segment_ids(offsets, total)
    assert ids.tolist() == [s for s, length in enumerate(lengths) for _ in range(length)]
    assert torch.equal(
        ragged.offsets_from_index(ids.to(dtype), len(lengths)), make_offsets(lengths)
    )


@pytest.mark.parametrize("dtype", ragged.INDEX_DTYPES)
@pytest.mark.parametrize("rest", [(), (2,), (2, 3)])
@pytest.mark.parametrize("extra", [None, 0, 3])
def test_padding_and_back(lengths, dtype, rest, extra):
    offsets, total = make_offsets(lengths, dtype), sum(lengths)
    values = torch.randn(total, *rest)
    before = values.clone(), offsets.clone()
    longest = max(lengths, default=0)
    length = None if extra is None else longest + extra
    padded, mask = ragged.to_padded(values, offsets, length, fill=-7.0)

    want = torch.full((len(lengths), longest + (extra or 0), *rest), -7.0)
    want_mask = torch.zeros(want.shape[:2], dtype=torch.bool)
    for row, row_mask, part in zip(want, want_mask, segments(values, lengths)):
        row[: len(part)] = part
        row_mask[: len(part)] = True
    assert torch.equal(padded, want) and torch.equal(mask, want_mask)

    back, back_offsets = ragged.from_padded(padded, mask)
    assert torch.equal(back, values) and torch.equal(back_offsets, make_offsets(lengths))
    assert torch.equal(ragged.unpad(padded, offsets, total), values)
    assert torch.equal(values, before[0]) and torch.equal(offsets, before[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.complex64])
def test_dtypes_of_values(dtype):
    values = torch.arange(10).to(dtype)
    offsets = make_offsets(LENGTHS["mixed"])
    padded, mask = ragged.to_padded(values, offsets)
    assert padded.dtype == dtype and not padded[~mask].any()
    assert torch.equal(ragged.from_padded(padded, mask)[0], values)


def test_strided_arguments():
    values = torch.randn(3, 20).T[::2]
    offsets = torch.stack([make_offsets(LENGTHS["mixed"])] * 2, 1)[:, 0]
    assert not values.is_contiguous() and not offsets.is_contiguous()
    padded, mask = ragged.to_padded(values, offsets)
    assert torch.equal(
        ragged.unpad(padded.transpose(0, 1).contiguous().transpose(0, 1), offsets, 10), values
    )
    ids = torch.stack([ragged.segment_ids(offsets, 10)] * 2, 1)[:, 0]
    assert torch.equal(ragged.offsets_from_index(ids, 5), offsets)


def test_a_mask_with_holes():
    padded = torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[False, True, True], [True, False, True]])
    values, offsets = ragged.from_padded(padded, mask)
    assert values.tolist() == [1, 2, 3, 5] and offsets.tolist() == [0, 2, 4]


def test_the_layout_is_that_of_torch_nested():
    values, offsets = torch.randn(10, 2), make_offsets(LENGTHS["mixed"])
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    for a, b in zip(nested.unbind(), segments(values, LENGTHS["mixed"])):
        assert torch.equal(a, b)


# --- gradients --------------------------------------------------------------------------------

ROUND_TRIPS = {
    "to_padded": lambda v, o: ragged.to_padded(v, o, 5)[0],
    "from_padded": lambda v, o: ragged.from_padded(*ragged.to_padded(v * v, o))[0],
    "unpad": lambda v, o: ragged.unpad(ragged.to_padded(v, o, 5)[0].sin(), o, v.shape[0]),
}


@pytest.mark.parametrize("function", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
@pytest.mark.parametrize("case", ["mixed", "empty_ends"])
def test_gradients(function, case):
    offsets = make_offsets(LENGTHS[case])
    values = torch.randn(sum(LENGTHS[case]), 2, dtype=torch.float64, requires_grad=True)
    call = lambda v: function(v, offsets)  # noqa: E731
    assert torch.autograd.gradcheck(call, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, values)


def test_the_filling_has_no_gradient():
    values = torch.randn(10, requires_grad=True)
    padded, mask = ragged.to_padded(values, make_offsets(LENGTHS["mixed"]), 6, fill=torch.inf)
    upstream = torch.where(mask, 2.0, torch.nan)
    (grad,) = torch.autograd.grad(padded, values, upstream)
    assert torch.equal(grad, torch.full((10,), 2.0))


@pytest.mark.parametrize("name", ["to_padded", "unpad"])
def test_vmap(name):
    offsets = make_offsets(LENGTHS["mixed"])
    batch = torch.randn(3, 10, 2)
    got = torch.vmap(lambda v: ROUND_TRIPS[name](v, offsets))(batch)
    assert torch.equal(got, torch.stack([ROUND_TRIPS[name](v, offsets) for v in batch]))


# --- compiled, and without a wait for the device ----------------------------------------------


def everything(values, offsets):
    padded, mask = ragged.to_padded(values, offsets, 5)
    lengths = ragged.lengths_from_offsets(offsets)
    ids = ragged.segment_ids(offsets, values.shape[0])
    return (
        padded,
        mask,
        ids,
        ragged.unpad(padded, offsets, values.shape[0]),
        ragged.offsets_from_lengths(lengths),
        ragged.offsets_from_index(ids, offsets.shape[0] - 1),
    )


def test_compiled():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for case in ("mixed", "empty_ends"):
        offsets = make_offsets(LENGTHS[case])
        values = torch.randn(sum(LENGTHS[case]), 2)
        for a, b in zip(compiled(values, offsets), everything(values, offsets)):
            assert torch.equal(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]  # no new graph for new sizes
    with pytest.raises(RuntimeError, match="offsets must not decrease"):
        compiled(torch.randn(4, 2), torch.tensor([0, 3, 1, 4]))


class NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor, or a shape depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero)
        assert function.overloadpacket not in reads, function
        return function(*args, **(kwargs or {}))


def test_no_number_is_read_from_a_device(monkeypatch: pytest.MonkeyPatch):
    values, offsets = torch.randn(10, 2), make_offsets(LENGTHS["mixed"])
    want = everything(values, offsets)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        ragged.check_offsets(offsets, 10)  # on the CPU, where it costs nothing
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on another device
    with NoReads():
        got = everything(values, offsets)
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="must not decrease"):
        ragged.check_offsets(torch.tensor([0, 3, 1, 4]), 4)


def test_meta_device():
    values = torch.empty(10, 2, device="meta")
    offsets = torch.empty(6, dtype=torch.int64, device="meta")
    padded, mask, ids, back, made, again = everything(values, offsets)
    assert padded.shape == (5, 5, 2) and mask.shape == (5, 5) and back.shape == (10, 2)
    assert ids.shape == (10,) and made.shape == again.shape == (6,)
    assert {t.device.type for t in (padded, mask, ids, back, made, again)} == {"meta"}


# --- bad arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offsets, error, message",
    [
        ([0, 3, 4], TypeError, "offsets must be a Tensor, got list"),
        (torch.tensor([0.0, 4.0]), RuntimeError, "offsets must be int32 or int64"),
        (torch.tensor([0, 4], dtype=torch.uint8), RuntimeError, "offsets must be int32 or int64"),
        (torch.tensor([[0, 4]]), ValueError, "one dimension"),
        (torch.tensor(0), ValueError, "one dimension"),
        (torch.tensor([], dtype=torch.int64), ValueError, "at least one"),
        (torch.tensor([1, 4]), ValueError, "start at 0 and end at the number of values, 4"),
        (torch.tensor([0, 3]), ValueError, "start at 0 and end at the number of values, 4"),
        (torch.tensor([0, 5]), ValueError, "start at 0 and end at the number of values, 4"),
        (torch.tensor([0]), ValueError, "start at 0 and end at the number of values, 4"),
        (torch.tensor([0, 3, 2, 4]), ValueError, "must not decrease"),
        (torch.tensor([0, -1, 4]), ValueError, "must not decrease"),
        (torch.tensor([0, 5, 4]), ValueError, "must not decrease"),
    ],
)
def test_bad_offsets(offsets, error, message):
    with pytest.raises(error, match=message):
        ragged.check_offsets(offsets, 4)
    for function in (ragged.to_padded, lambda v, o: ragged.unpad(torch.randn(2, 4), o, 4)):
        with pytest.raises(error, match=message):
            function(torch.randn(4), offsets)


def test_the_name_of_the_argument_is_in_the_message():
    with pytest.raises(ValueError, match="^group_offsets must not decrease"):
        ragged.check_offsets(torch.tensor([0, 3, 2, 4]), 4, "group_offsets")


def test_other_bad_arguments():
    offsets = torch.tensor([0, 3, 4])
    with pytest.raises(ValueError, match="lengths must not be negative"):
        ragged.offsets_from_lengths(torch.tensor([2, -1]))
    with pytest.raises(RuntimeError, match="lengths must be int32 or int64"):
        ragged.offsets_from_lengths(torch.tensor([2.0]))
    with pytest.raises(ValueError, match="index must not decrease.*argsort"):
        ragged.offsets_from_index(torch.tensor([0, 2, 1]), 3)
    for ids in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="index.*less than the number of segments, 3"):
            ragged.offsets_from_index(torch.tensor(ids), 3)
    with pytest.raises(ValueError, match="longer than length, 2"):
        ragged.to_padded(torch.randn(4), offsets, 2)
    with pytest.raises(ValueError, match="longer than the rows, 2"):
        ragged.unpad(torch.randn(2, 2), offsets, 4)
    with pytest.raises(ValueError, match=r"padded must be \(2, L, \*\)"):
        ragged.unpad(torch.randn(3, 4), offsets, 4)
    with pytest.raises(RuntimeError, match="mask must be bool"):
        ragged.from_padded(torch.randn(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="first two sizes"):
        ragged.from_padded(torch.randn(2, 3), torch.ones(3, 2, dtype=torch.bool))
