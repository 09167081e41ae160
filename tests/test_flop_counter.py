"""torch.utils.flop_counter counts the ops of pyloss, whichever is imported first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import pyloss
from pyloss.functional import linear_distillation_loss
from pyloss.ops import _flops, _gemm, similarity_topk

N, D, V, E = 12, 5, 7, 3
ONE = 2 * N * D * V  # a product


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def layer(**frozen: bool) -> list[torch.Tensor]:
    tensors = dict(h=torch.randn(N, D), w=torch.randn(V, D), b=torch.randn(V))
    return [t.requires_grad_(not frozen.get(k, False)) for k, t in tensors.items()]


Y = torch.randint(V, (N,))


def plain(h, w, b) -> None:
    F.cross_entropy(F.linear(h, w, b), Y).backward()


def fused(h, w, b, **options) -> None:
    pyloss.fused_linear_cross_entropy(h, w, Y, b, **options).sum().backward()


def test_forward_and_backward() -> None:
    h, w, b = layer()
    with torch.no_grad():
        assert counted(lambda: pyloss.fused_linear_cross_entropy(h, w, Y, b)) == ONE
        assert counted(lambda: pyloss.token_logprobs(h, w, Y, b, return_entropy=True)) == ONE
    assert counted(lambda: fused(h, w, b)) == counted(lambda: plain(h, w, b)) == 3 * ONE
    for options in (dict(chunk=5), dict(strategy="forward"), dict(weight=torch.rand(V))):
        assert counted(lambda o=options: fused(h, w, b, **o)) == 3 * ONE
    # The logits are formed once more.
    for options in (dict(reduction="none"), dict(strategy="recompute")):
        assert counted(lambda o=options: fused(h, w, b, **o)) == 4 * ONE


@pytest.mark.parametrize("name, products", [("h", 2), ("w", 2), ("b", 3)])
def test_frozen_tensors_save_their_product(name: str, products: int) -> None:
    tensors = layer(**{name: True})
    assert counted(lambda: fused(*tensors)) == counted(lambda: plain(*tensors)) == products * ONE
    again = (products + 1) * ONE
    assert counted(lambda: fused(*tensors, strategy="recompute")) == again


def test_what_runs_through_torch_operations_is_counted_by_torch() -> None:
    h, w, b = layer()

    def gradient_norm() -> None:
        loss = pyloss.fused_linear_cross_entropy(h, w, Y, b)
        (g,) = torch.autograd.grad(loss, h, create_graph=True)
        g.square().sum().backward()

    def unfused() -> None:
        (g,) = torch.autograd.grad(F.cross_entropy(F.linear(h, w, b), Y), h, create_graph=True)
        g.square().sum().backward()

    # More by the two gradients that were formed early, and in the backward by the logits and the
    # weight's gradient, of which a Function does not know that nobody wants it.
    assert counted(gradient_norm) == counted(unfused) + 4 * ONE


def test_distillation() -> None:
    h, w, b = layer()
    teacher = torch.randn(N, E), torch.randn(V, E)
    both = ONE + 2 * N * E * V

    def loss(**options) -> None:
        linear_distillation_loss(h, w, *teacher, student_bias=b, **options).sum().backward()

    assert counted(loss) == both + 2 * ONE
    assert counted(lambda: loss(reduction="none")) == 2 * both + 2 * ONE
    with torch.no_grad():
        assert counted(lambda: linear_distillation_loss(h, w, *teacher)) == both


def test_top_k_of_the_products() -> None:
    queries, keys = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    scale, one = torch.ones(()), 2 * N * D * V
    assert counted(lambda: similarity_topk.similarity_topk(queries, keys, 3, -1)) == one

    def hardest() -> None:
        sum(
            t.sum() for t in similarity_topk.similarity_hardest(queries, keys, scale, 3, -1)
        ).backward()

    assert counted(hardest) == 4 * one


def test_products_outside_of_an_op() -> None:
    a, b, out = torch.randn(N, D), torch.randn(D, V), torch.empty(N, V)
    assert counted(lambda: _gemm.product(a, b, out)) == ONE
    torch.testing.assert_close(out, a @ b)


def test_modules() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(D, D)
            self.loss = pyloss.nn.LinearCrossEntropyLoss(D, V)

        def forward(self, x):
            return self.loss(self.body(x), Y)

    with FlopCounterMode(display=False) as counter:
        Model()(torch.randn(N, D)).backward()
    by_module = counter.get_flop_counts()
    assert by_module["Model.loss"] == {torch.ops.pyloss.linear_cross_entropy_fwd: 3 * ONE}


# --------------------------------------------------------------------------------------------------
# The order of imports

ORDERS = {
    "pyloss first": "import pyloss; pyloss.token_logprobs; {counter}; mode = FlopCounterMode",
    "counter first": "{counter}; import pyloss; pyloss.token_logprobs; mode = FlopCounterMode",
    # The first use of the family is inside.
    "inside": "{counter}; import pyloss; mode = FlopCounterMode",
    "looked for before": (
        "import pyloss, importlib.util; pyloss.token_logprobs; "
        "importlib.util.find_spec('torch.utils.flop_counter'); {counter}; mode = FlopCounterMode"
    ),
}

COUNT = """
import json, sys, torch
assert "torch.utils.flop_counter" not in sys.modules
{order}
with mode(display=False) as counter:
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    pyloss.fused_linear_cross_entropy(h, w, torch.tensor([0, 1, 2, 3])).backward()
finders = [type(finder).__module__ for finder in sys.meta_path]
print(json.dumps([counter.get_total_flops(), finders.count("pyloss.ops._flops")]))
"""


def run(code: str) -> list:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_order_of_imports(order: str) -> None:
    order = order.format(counter="from torch.utils.flop_counter import FlopCounterMode")
    assert run(COUNT.format(order=order)) == [3 * 2 * 4 * 3 * 5, 0]


def test_nobody_who_does_not_count_pays_for_it() -> None:
    code = """
import json, sys, torch, pyloss
h, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
pyloss.fused_linear_cross_entropy(h, w, y), pyloss.functional.linear_distillation_loss(h, w, h, w)
finders = [type(finder).__module__ for finder in sys.meta_path]
print(json.dumps(["torch.utils.flop_counter" in sys.modules, finders.count("pyloss.ops._flops")]))
"""
    assert run(code) == [False, 1]


def test_registering_twice_changes_nothing() -> None:
    op = torch.ops.pyloss.linear_cross_entropy_fwd
    before = torch.utils.flop_counter.flop_registry[op]
    _flops.count_by("linear_cross_entropy_fwd", lambda *args, **kwargs: 0)
    assert torch.utils.flop_counter.flop_registry[op] is before
