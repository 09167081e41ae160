"""torch.utils.flop_counter counts the ops of pyloss, whichever is imported first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyloss
from pyloss.functional import hard_info_nce, linear_distillation_loss
from pyloss.ops import _decompose, _flops, _gemm, _registry, similarity_topk

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


# --------------------------------------------------------------------------------------------------
# Formulas against what torch counts in the references


class ByReference(TorchDispatchMode):
    """Runs the plain form of each op, under a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        form = _registry.plain_forms.get(func._opname) if func.namespace == "pyloss" else None
        if not callable(form):
            return func(*args, **(kwargs or {}))
        with _decompose._autograd(), FlopCounterMode(display=False) as counter:
            found = form(*args)
        self.counts[func._opname] = self.counts.get(func._opname, 0) + counter.get_total_flops()
        return found


def by_op(call) -> tuple[dict[str, int], dict[str, int]]:
    """What the formulas say and what the references need, for each op of a forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call().square().sum().backward()
    said = counter.get_flop_counts().get("Global", {})
    with ByReference() as reference:
        call().square().sum().backward()
    ours = {op._qualified_op_name.split("::")[1]: n for op, n in said.items()}
    return {k: n for k, n in ours.items() if k in reference.counts}, reference.counts


X, OTHER, WIDE = (torch.randn(n, 8, requires_grad=True) for n in (N, N, 9))
EQUAL = {
    "logprobs": lambda: pyloss.token_logprobs(X, WIDE, Y),
    "logprobs with entropy": lambda: pyloss.token_logprobs(X, WIDE, Y, return_entropy=True)[0],
    "rows": lambda: pyloss.fused_linear_cross_entropy(X, WIDE, Y, reduction="none"),
    "distillation": lambda: linear_distillation_loss(
        X, WIDE, X.detach(), WIDE.detach(), reduction="none"
    ),
    "info_nce": lambda: pyloss.info_nce(X, OTHER),
    "queue": lambda: pyloss.info_nce(X, OTHER, queue=WIDE.detach()),
    "siglip": lambda: pyloss.siglip_loss(X, OTHER),
    "hardest": lambda: hard_info_nce(X, OTHER),
}


@pytest.mark.parametrize("call", EQUAL.values(), ids=EQUAL)
def test_formulas_count_the_products_of_the_reference(call) -> None:
    said, counted = by_op(call)
    assert said and said == counted


def test_attention_to_triples_counts_the_reference_without_products_of_keys() -> None:
    """Those are of a lower order in the length. The output, which the reference forms once more in
    the backward, is kept."""
    q = torch.randn(1, 2, N, 8, requires_grad=True)
    said, counted = by_op(lambda: pyloss.tensor_attention(q, q, q, q, q))
    of_keys, one = 2 * 2 * N**2 * 8, 2 * 2 * N**3 * 8
    assert said == dict(tensor_attention_fwd=2 * one, tensor_attention_bwd=5 * one)
    assert counted["tensor_attention_fwd"] == 2 * one + of_keys
    assert counted["tensor_attention_bwd"] == 6 * one + 3 * of_keys
