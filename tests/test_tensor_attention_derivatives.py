"""Derivatives of tensor attention beyond the first: of all forms, of inputs that hang together."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import pyloss
from pyloss.functional import tensor_attention_n
from pyloss.ops.tensor_attention import reference as on_reference
from pyloss.reference import tensor_attention as reference

F64 = torch.float64
LOW_RANK = dict(method="lowrank", degree=3, check="none")


def drawn(order: int, n: int = 4, heads: int = 2, groups: int = 2, seed: int = 0) -> list[Tensor]:
    """q, the keys, the values."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, n, 3), *[(1, groups, n, 3)] * order, *[(1, groups, n, 2)] * order]
    return [torch.randn(s, generator=g, dtype=F64).div_(2).requires_grad_() for s in shapes]


def attend(order: int, *tensors: Tensor, **options):
    keys, values = tensors[1 : 1 + order], tensors[1 + order : 1 + 2 * order]
    return tensor_attention_n(tensors[0], keys, values, return_lse=True, **options)


PAIRS = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]) == 1
PADDING = torch.tensor([True, True, True, False])

FORMS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "window with offset": dict(window=2, q_offset=1),
    "padding": dict(attn_mask=PADDING),
    "groups": dict(enable_gqa=True),
    "pairs": dict(attn_mask=PAIRS),
    "low rank": LOW_RANK,
    "low rank, causal": LOW_RANK | dict(is_causal=True),
    "low rank, window": LOW_RANK | dict(window=2),
    "low rank, padding": LOW_RANK | dict(attn_mask=PADDING),
    "low rank, groups": LOW_RANK | dict(enable_gqa=True),
}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives(form, order):
    """Many cotangents at once, too: is_grads_batched, jacobian(vectorize=True)."""
    options = FORMS[form]
    groups = 1 if options.get("enable_gqa") else 2
    tensors = drawn(order, groups=groups)

    def call(*t):
        out, lse = attend(order, *t, **options)
        return out, torch.where(lse == -torch.inf, 0.0, lse)  # a query may see nothing

    assert torch.autograd.gradcheck(call, tensors, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, check_batched_grad=True, fast_mode=True)


def gradients_of_gradients(call, tensors: list[Tensor], times: int) -> list[list[Tensor]]:
    """Of a function that is not linear in what it gets, so that cotangents depend on inputs."""
    total, found = call(), []
    for _ in range(times):
        grads = torch.autograd.grad(total, tensors, create_graph=True)
        found.append(list(grads))
        total = sum((g.double().square() * _weights(g)).sum() for g in grads)
    return found


def _weights(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, t.numel(), dtype=F64).view(t.shape)


def assert_close(found, expected, **tolerance) -> None:
    for level, (a, b) in enumerate(zip(found, expected)):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, msg=lambda m, at=level: f"{at + 1}: {m}", **tolerance)


@pytest.mark.parametrize("block_bytes", [1, 1 << 25])
@pytest.mark.parametrize("order", [2, 3])
def test_three_times(order, block_bytes, monkeypatch):
    """Query by query and all at once; masks with gradients; a graph of the second derivative."""
    monkeypatch.setattr(on_reference, "_BLOCK_BYTES", block_bytes)
    tensors = drawn(order)
    masks = [None] * order
    if order == 2:
        g = torch.Generator().manual_seed(1)
        masks = [torch.randn(s, generator=g, dtype=F64).requires_grad_()
                 for s in ((1, 2, 4, 4), (1, 1, 1, 4))]  # fmt: skip
    inputs = [*tensors, *(m for m in masks if m is not None)]

    def total(out, lse):
        return out.sin().sum() + (out.square().sum(-1) * lse).sum()

    def ours():
        return total(*attend(order, *tensors, masks=masks, is_causal=True))

    def theirs():
        keys, values = tensors[1 : 1 + order], tensors[1 + order :]
        return total(*reference(tensors[0], keys, values, masks=masks, causal=True))

    assert_close(gradients_of_gradients(ours, inputs, 3),
                 gradients_of_gradients(theirs, inputs, 3), rtol=1e-9, atol=1e-9)  # fmt: skip


@pytest.mark.parametrize("options", [{}, LOW_RANK])
def test_one_tensor_for_all(options):
    """Self-attention without projections, and keys that are made of the queries."""
    x = drawn(2)[0]

    def call(attention):
        out = attention(x, x, 2 * x, x, x.sin())
        return out.square().sum()

    ours = functools.partial(pyloss.tensor_attention, **options)

    def theirs(q, *others):
        if options:
            with torch.autograd.forward_ad.dual_level():  # takes the reference
                return ours(q, *others)
        return reference(q, others[:2], others[2:])[0]

    assert_close(gradients_of_gradients(lambda: call(ours), [x], 3),
                 gradients_of_gradients(lambda: call(theirs), [x], 3))  # fmt: skip


@pytest.mark.parametrize("order", [2, 3])
def test_half_types_twice(order):
    exact = drawn(order)
    with torch.no_grad():
        for t in exact:
            t.copy_(t.bfloat16())
    tensors = [t.detach().bfloat16().requires_grad_() for t in exact]

    def call(t):
        out, lse = attend(order, *t, is_causal=True)
        return out.double().square().sum() + lse.double().square().sum()

    found = gradients_of_gradients(lambda: call(tensors), tensors, 2)
    expected = gradients_of_gradients(lambda: call(exact), exact, 2)
    for a, b in zip(found, expected):
        for x, y in zip(a, b):
            assert x.dtype == torch.bfloat16
            torch.testing.assert_close(x.double(), y, rtol=2e-2, atol=5e-2 * y.abs().max().item())


@pytest.mark.parametrize("order", [2, 3])
def test_hidden_nan_twice(order):
    """What no query sees reaches no derivative."""
    tensors = drawn(order)
    spoiled = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        spoiled[1][..., 3, 0], spoiled[-1][..., 3, 1] = torch.nan, torch.inf

    def call(t):
        return attend(order, *t, attn_mask=PADDING)[0].square().sum()

    found = gradients_of_gradients(lambda: call(spoiled), spoiled, 2)
    assert_close(found, gradients_of_gradients(lambda: call(tensors), tensors, 2))


def test_a_second_derivative_of_the_lse_alone():
    tensors = drawn(2)
    found = gradients_of_gradients(lambda: attend(2, *tensors)[1].square().sum(), tensors[:3], 2)
    expected = gradients_of_gradients(
        lambda: reference(tensors[0], tensors[1:3], tensors[3:])[1].square().sum(), tensors[:3], 2
    )
    assert_close(found, expected)


def test_the_first_derivative_is_the_kernels_own():
    """Asking for a graph changes no bit of it, and warns of nothing."""
    for order, options in ((2, {}), (3, {}), (2, LOW_RANK)):
        tensors = drawn(order)
        plain = torch.autograd.grad(attend(order, *tensors, **options)[0].square().sum(), tensors)
        again = torch.autograd.grad(
            attend(order, *tensors, **options)[0].square().sum(), tensors, create_graph=True
        )
        for a, b in zip(plain, again):
            assert torch.equal(a, b)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("forward", ["cpu", "reference"])
@pytest.mark.parametrize("backward", ["cpu", "reference"])
def test_backends_of_forward_and_backward(order, forward, backward):
    """Any mixture: a GPU leaves float64 and wide heads to the reference, order 3 too."""
    tensors = drawn(order, n=3)
    options = dict(is_causal=True, masks=[None if order < 3 else torch.randn(3, 3)] * order)
    with pyloss.backend(forward):
        out, lse = attend(order, *tensors, **options)
    with pyloss.backend(backward):
        found = torch.autograd.grad(out.square().sum() + (lse * lse).sum(), tensors)
    keys, values = tensors[1 : 1 + order], tensors[1 + order :]
    masks = [m if m is None else m[None, None].double() for m in options["masks"]]
    out, lse = reference(tensors[0], keys, values, causal=True, masks=masks)
    want = torch.autograd.grad(out.square().sum() + (lse * lse).sum(), tensors)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, LOW_RANK])
def test_checkpoint_twice(options):
    """Its hooks hand a saved tensor out once."""
    tensors = drawn(2)
    call = functools.partial(attend, 2, **options)
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    found, plain = (
        gradients_of_gradients(lambda f=f: f(*tensors)[0].square().sum(), tensors, 2)
        for f in (checkpoint, call)
    )
    assert_close(found, plain)
