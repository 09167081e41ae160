"""Numbers that change from step to step under torch.compile: as tensors they compile once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pyloss
from pyloss.functional import linear_distillation_loss

H, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
IMAGE = torch.rand(2, 1, 6, 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda n: pyloss.fused_cross_entropy(H @ W.T, Y, num_items=n),
        lambda n: pyloss.fused_linear_cross_entropy(H, W, Y, num_items=n),
        lambda n: linear_distillation_loss(H, W, H + 1, W, num_items=n),
        lambda n: pyloss.betti_matching_loss(IMAGE, IMAGE > 0.5) * n,
    ],
    ids=["row", "linear", "distillation", "betti"],
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


def test_one_tensor_as_both_labels_of_mixup_compiles() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(
        lambda x, y: pyloss.fused_cross_entropy(x, (y, y, 0.5)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, Y), pyloss.fused_cross_entropy(x, Y))
