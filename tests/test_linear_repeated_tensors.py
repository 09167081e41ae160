"""One tensor for several arguments of the linear and preference losses, in one compiled graph.

Dynamo refuses an autograd.Function that gets a tensor twice.
"""

from __future__ import annotations

import pytest
import torch

import pyloss
from pyloss import fused_linear_cross_entropy, token_logprobs
from pyloss.functional import dpo_loss, grpo_loss, linear_distillation_loss

N = 5
Y = torch.tensor([0, 1, 2, 4, 3])
B, C = torch.linspace(0.1, 1, N), torch.linspace(-1, 1, N * N).view(N, N)
ONE = torch.tensor(3.0)
MODULE = pyloss.nn.LinearCrossEntropyLoss(N, N, weight=B)

CALLS = {
    "hidden is weight": lambda x: fused_linear_cross_entropy(x, x, Y),
    "three vectors": lambda x: fused_linear_cross_entropy(x, x, Y, B, weight=B, token_weight=B),
    "rows": lambda x: fused_linear_cross_entropy(x, x, Y, B, weight=B, reduction="none"),
    "mixup": lambda x: fused_linear_cross_entropy(x, x, (Y, Y, B), B, weight=B, token_weight=B),
    "probabilities": lambda x: fused_linear_cross_entropy(x, C, C.softmax(1), B, weight=B),
    "tokens": lambda x: token_logprobs(x, x, Y, B, return_entropy=True)[1],
    "one token": lambda x: token_logprobs(x[0], x, Y[0]),
    "module": lambda x: MODULE(x, Y, token_weight=B),
    "teacher is student": lambda x: linear_distillation_loss(x, C, x, C, student_bias=B),
    "weights and biases": lambda x: linear_distillation_loss(
        x, C, C, C, student_bias=B, teacher_bias=B, target=Y, ce_weight=0.5, num_items=ONE
    ),
    "distilled rows": lambda x: linear_distillation_loss(x, C, C, C, reduction="none"),
    "all models": lambda x: linear_distillation_loss(x, x, C, C, direction="reverse"),
    "dpo": lambda x: dpo_loss(x[0], x[0], x[0], x[0]),
    "grpo": lambda x: grpo_loss(x, x, x, ref_logprobs=x, kl_coef=0.1, entropy=x, entropy_coef=0.1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_tensor_twice(call) -> None:
    torch._dynamo.reset()
    x = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for f in (call, compiled):
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    torch.testing.assert_close(*found)
