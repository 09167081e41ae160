"""A backward on another backend than its forward: after the block of `pyloss.backend`, or in a
thread of autograd that does not see it. Every public callable: check `switched` of test_specs.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyloss
import pyloss.ops.linear_cross_entropy  # its ops
from pyloss.ops.row_softmax.records import COMP_SUM, INDEX

N, D, V = 6, 3, 5
torch.manual_seed(0)
X, H, W = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)
Y = torch.tensor([0, -100, 2, 4, 1, 3])
Y2 = torch.tensor([1, 0, 2, 3, -100, 0])
K, C, P = torch.rand(N), torch.rand(V), torch.randn(N, V).softmax(1)
STATS = ("lse", "logprob", "entropy")
DENSE_STATS = ("lse", "entropy")

CALLS: dict[str, tuple[object, dict]] = {
    "plain": (Y, {}),
    "sum": (Y, dict(reduction="sum")),
    "none": (Y, dict(reduction="none")),
    "weights": (Y, dict(weight=C, token_weight=K, z_loss=0.1)),
    "num_items": (Y, dict(num_items=3.0, z_loss=0.1)),
    "nothing": (torch.full((N,), -100), dict(empty="zero")),
    "smoothing": (Y, dict(label_smoothing=0.2, weight=C)),
    "tau": (Y, dict(tau=1.5)),
    "smoothing and tau": (Y, dict(label_smoothing=0.2, tau=0.7, weight=C)),
    "softcap": (Y, dict(softcap=2.0, logit_scale=1.5, temperature=0.5)),
    "truncate": (Y, dict(truncate=0.3)),
    "mixup": ((Y, Y2, 0.3), {}),
    "mixup, tau": ((Y, Y2, 0.3), dict(tau=1.5)),
    "mixup, smoothing and tau": ((Y, Y2, 0.3), dict(label_smoothing=0.2, tau=0.7, weight=C)),
    "probabilities": (P, {}),
    "probabilities, tau": (P, dict(tau=1.3, label_smoothing=0.1, weight=C, z_loss=0.1)),
    "statistics": (Y, dict(return_stats=STATS, z_loss=0.1)),
    "statistics of probabilities": (P, dict(return_stats=DENSE_STATS)),
    "statistics of mixup": ((Y, Y2, 0.3), dict(return_stats=STATS)),
}
SWITCHES = (("reference", None), (None, "reference"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def row(dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    return pyloss.fused_cross_entropy, [X.to(dtype)]


def linear(dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    def call(h, w, target, **options):
        return pyloss.fused_linear_cross_entropy(h, w, target, chunk=2, **options)

    return call, [H.to(dtype), W.to(dtype)]


def total(found: object) -> Tensor:
    """Of a loss or of losses, and of the statistics with a gradient."""
    if isinstance(found, Tensor):
        return (found * torch.arange(1.0, 1 + found.numel()).view(found.shape)).sum()
    loss, stats = found
    return loss + sum(total(s) for s in stats if s is not None and s.requires_grad)


def check(function: Callable, call: str, dtype: torch.dtype, switch: tuple, order: int = 1) -> None:
    target, options = CALLS[call]
    found = []
    for forward, backward in (switch, (switch[1], switch[1])):
        f, leaves = function(dtype)
        leaves = [t.clone().requires_grad_() for t in leaves]
        with pyloss.backend(forward):
            loss = total(f(*leaves, target, **options))
        with pyloss.backend(backward):
            grads = torch.autograd.grad(loss, leaves, create_graph=order == 2)
            if order == 2:
                grads = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append(grads)
    for actual, expected in zip(*found):
        # Sums of bfloat16 terms that cancel, as those of H and W.
        close = dict(rtol=2e-2, atol=2e-3) if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(actual, expected, **close)


@pytest.mark.parametrize("switch", SWITCHES, ids=["out", "in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("function", [row, linear])
def test_gradient(function: Callable, call: str, dtype: torch.dtype, switch: tuple) -> None:
    check(function, call, dtype, switch)


@pytest.mark.parametrize("switch", SWITCHES, ids=["out", "in"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("function", [row, linear])
def test_second_derivative(function: Callable, call: str, switch: tuple) -> None:
    check(function, call, torch.float64, switch, order=2)


@pytest.mark.parametrize("shape", [(V,), (2, V, 3)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape[:1] + shape[2:] if len(shape) > 1 else ())
    x, y = torch.randn(shape), torch.randint(V, rows)
    check(
        lambda _: (lambda x, _: pyloss.fused_cross_entropy(x, y), [x]), "plain", None, SWITCHES[0]
    )


@pytest.mark.parametrize("function", [row, linear])
def test_compiled(function: Callable) -> None:
    """The backend is chosen where a compiled graph runs too."""
    torch._dynamo.reset()

    def compiled(dtype):
        f, leaves = function(dtype)
        return torch.compile(f, backend="aot_eager"), leaves

    check(compiled, "smoothing", torch.float64, SWITCHES[0])


def test_tiles_on_the_reference_record_a_wrong_label() -> None:
    """Their kernels' backward makes NaN of such a row, and of no other."""
    labels, codes = torch.tensor([0, V, -100, 2, 1, 3]), (INDEX, -100, COMP_SUM, 2, 0)
    _, saved = torch.ops.pyloss.linear_cross_entropy_tiles_fwd(
        H, W, None, labels, None, None, None, codes, torch.float32, 0
    )
    assert saved.isnan().any(0).tolist() == [False, True, False, False, False, False]
