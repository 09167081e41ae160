"""Numbers that change from step to step under torch.compile: one graph for all, not one each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx.experimental.symbolic_shapes
from torch._dynamo.testing import CompileCounter

import pyloss
from pyloss.functional import linear_distillation_loss, tensor_attention
from pyloss.ops.row_softmax.records import COMP_SUM, INDEX, PLAIN

H, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
IMAGE = torch.rand(2, 1, 6, 5)
Q = torch.randn(1, 2, 3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda n: pyloss.fused_cross_entropy(H @ W.T, Y, num_items=n),
        lambda n: pyloss.fused_linear_cross_entropy(H, W, Y, num_items=n),
        lambda n: linear_distillation_loss(H, W, H + 1, W, num_items=n),
        lambda n: pyloss.betti_matching_loss(IMAGE, IMAGE > 0.5) * n,
        lambda n: tensor_attention(Q * n, Q, Q + 1, Q, Q - 1, scale=1.0, softcap=5.0),
        lambda n: pyloss.token_logprobs(H, W, Y, temperature=n),
    ],
    ids=["row", "linear", "distillation", "betti", "attention", "logprobs"],
)
def test_a_tensor_compiles_once(call: Callable) -> None:
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for n in range(1, 12):  # one more than the graphs that torch.compile keeps
        torch.testing.assert_close(compiled(torch.tensor(float(n))), call(n))
    assert len(graphs) == 1


X = torch.linspace(-2.0, 3.0, 20).reshape(4, 5)
W5 = torch.linspace(-1.0, 1.0, 25).reshape(5, 5).sin()
ABOVE_ONE = tuple(1.0 + n / 10 for n in range(1, 12))
BELOW_ONE = tuple(n / 20 for n in range(1, 12))
# A function of (logits, number), and eleven numbers: torch.compile keeps eight graphs.
CHANGING: dict[str, tuple[Callable, tuple]] = {
    "num_items": (lambda x, n: pyloss.fused_cross_entropy(x, Y, num_items=n), tuple(range(1, 12))),
    "num_items, a float": (lambda x, n: pyloss.fused_cross_entropy(x, Y, num_items=n), ABOVE_ONE),
    "temperature": (lambda x, n: pyloss.fused_cross_entropy(x, Y, temperature=n), ABOVE_ONE),
    "logit_scale": (lambda x, n: pyloss.fused_cross_entropy(x, Y, logit_scale=n), ABOVE_ONE),
    "softcap": (lambda x, n: pyloss.fused_cross_entropy(x, Y, softcap=n), ABOVE_ONE),
    "z_loss": (lambda x, n: pyloss.fused_cross_entropy(x, Y, z_loss=n), BELOW_ONE),
    "label_smoothing": (
        lambda x, n: pyloss.fused_cross_entropy(x, Y, label_smoothing=n), BELOW_ONE
    ),
    "tau": (lambda x, n: pyloss.comp_sum_loss(x, Y, n), ABOVE_ONE),
    "smoothing and tau, two sums a row": (
        lambda x, n: pyloss.fused_cross_entropy(x, Y, label_smoothing=n, tau=1.0 + n), BELOW_ONE
    ),
    "gamma": (lambda x, n: pyloss.focal_loss(x, Y, gamma=n), ABOVE_ONE),
    "share of a MixUp label": (
        lambda x, n: pyloss.fused_cross_entropy(x, (Y, Y.flip(0), n)), BELOW_ONE
    ),
    "statistics": (
        lambda x, n: pyloss.fused_cross_entropy(
            x, Y, temperature=n, return_stats=("lse", "entropy")
        )[1].entropy.sum(),
        ABOVE_ONE,
    ),
    "probabilities": (
        lambda x, n: pyloss.fused_cross_entropy(x, X.flip(0).softmax(1), temperature=n), ABOVE_ONE
    ),
}  # fmt: skip


def distillation(name, **fixed):
    return lambda x, n: linear_distillation_loss(x, W5, X.flip(1), W5, **{name: n}, **fixed)


def linear(**fixed):
    def of(name):
        return lambda x, n: pyloss.fused_linear_cross_entropy(x, W5, Y, **{name: n}, **fixed)

    return of


for name, values in (
    ("num_items", tuple(range(1, 12))), ("temperature", ABOVE_ONE), ("logit_scale", ABOVE_ONE),
    ("softcap", ABOVE_ONE), ("z_loss", BELOW_ONE), ("label_smoothing", BELOW_ONE),
    ("tau", ABOVE_ONE),
):  # fmt: skip
    CHANGING[f"linear, {name}"] = linear()(name), values


def soft_targets(x, n):
    return pyloss.fused_cross_entropy(x, (X.flip(0) - x).softmax(1), temperature=n)


CHANGING["info_nce, temperature"] = (
    lambda x, n: pyloss.info_nce(x, X.flip(0), temperature=n), BELOW_ONE
)  # fmt: skip
CHANGING["siglip_loss, scale and bias"] = (
    lambda x, n: pyloss.siglip_loss(x, X.flip(0), n, -n), BELOW_ONE
)  # fmt: skip
CHANGING["probabilities with a gradient"] = soft_targets, ABOVE_ONE
CHANGING["distillation, num_items"] = distillation("num_items"), tuple(range(1, 12))
CHANGING["distillation, temperature"] = distillation("temperature"), ABOVE_ONE
CHANGING["distillation, ce_weight"] = distillation("ce_weight", target=Y), BELOW_ONE
CHANGING["distillation, beta"] = distillation("beta", direction="jsd"), BELOW_ONE
CHANGING["linear, recomputed"] = linear(strategy="recompute")("temperature"), ABOVE_ONE
CHANGING["token_logprobs"] = (
    lambda x, n: pyloss.token_logprobs(x, W5, Y, temperature=n).sum(), ABOVE_ONE
)  # fmt: skip


# torch 2.6 cannot tell constants from symbols: one graph a number, as docs/row_softmax.md says.
needs_symbols = pytest.mark.skipif(
    not hasattr(torch.fx.experimental.symbolic_shapes, "has_static_value"),
    reason="this torch cannot tell constants from symbols",
)


@needs_symbols
@pytest.mark.parametrize("name", CHANGING)
def test_numbers_of_a_row_loss_compile_once(name: str) -> None:
    """One graph for a constant, one more as soon as it is none; at 6750e06 one for each number."""
    call, numbers = CHANGING[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for n in numbers:
        x, reference = (X.clone().requires_grad_() for _ in range(2))
        loss, want = compiled(x, n), call(reference, n)
        torch.testing.assert_close(loss, want)
        loss.backward()
        want.backward()
        torch.testing.assert_close(x.grad, reference.grad)
    assert len(graphs) == 2


@needs_symbols
def test_numbers_that_need_no_gradient() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    call = CHANGING["temperature"][0]
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for n in ABOVE_ONE:
        torch.testing.assert_close(compiled(X, n), call(X, n))
    assert counter.frame_count == 2


@needs_symbols
def test_a_number_that_becomes_special_has_a_graph_of_its_own() -> None:
    """With tau 1 a row has a sum less, and the sizes in a graph are fixed."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def call(x, n):
        return pyloss.fused_cross_entropy(x, Y, label_smoothing=0.1, tau=1.0 + n)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for n, graphs in ((0.3, 1), (0.5, 2), (0.7, 2), (0.0, 3), (0.9, 3)):
        torch.testing.assert_close(compiled(X, n), call(X, n))
        assert counter.frame_count == graphs, n


def test_numbers_of_the_tiles() -> None:
    """Which a CPU does not choose: the ops themselves, the tensor against the list."""
    ops, plain = torch.ops.pyloss, PLAIN._replace(temperature=1.5, z_loss=0.1)
    tensors, codes = (X, W5, None, Y, None, None), (INDEX, -100, COMP_SUM, 2, 0)
    found = []
    for options, numbers in ((plain, None), (PLAIN, torch.tensor(plain, dtype=torch.float64))):
        loss, saved = ops.linear_cross_entropy_tiles_fwd(
            *tensors, options, codes, torch.float32, 0, numbers
        )
        grads = ops.linear_cross_entropy_tiles_bwd(
            torch.ones(()), None, *tensors, saved, options, codes, 8 | 16, 0.0, False, numbers
        )
        found.append([loss, saved, *grads])
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected)


def test_a_constant_stays_in_the_graph() -> None:
    """No tensor of numbers, which would keep a graph on a GPU from being captured."""
    found = []

    def backend(graph, _):
        found.extend(n for n in graph.graph.nodes if "row_softmax_fwd" in str(n.target))
        return graph

    torch._dynamo.reset()
    torch.compile(CHANGING["temperature"][0], backend=backend, fullgraph=True)(X, 1.5)
    assert len(found) == 1 and found[0].args[-1] is None


def test_one_tensor_as_both_labels_of_mixup_compiles() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(
        lambda x, y: pyloss.fused_cross_entropy(x, (y, y, 0.5)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, Y), pyloss.fused_cross_entropy(x, Y))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, s: pyloss.soft_sort(x, steepness=s).square().sum(),
        lambda x, s: pyloss.spearman_loss(x, X, steepness=s),
        lambda x, s: pyloss.sorting_cross_entropy(x, X, steepness=s),
        lambda x, s: pyloss.functional.permutahedron_rank(x / s).square().sum(),
    ],
)
def test_what_stands_for_a_changing_number_of_a_sort(call: Callable) -> None:
    """As the pages of networks and permutahedron say; a number compiles for each value."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for n in range(1, 13):
        strength = torch.tensor(n / 4)
        torch.testing.assert_close(compiled(X, strength), call(X, strength))
    assert counter.frame_count == 1
