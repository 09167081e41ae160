"""torch.compile over sequences of many lengths, and its caches on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pyloss
from pyloss.functional import linear_distillation_loss, permutahedron_sort, spherical_z_loss

W = torch.randn(7, 6)
LENGTHS = (5, 9, 12, 17, 6)  # the first is no other size: torch gives equal sizes one name


def _attention(x, **options):
    return pyloss.tensor_attention(*(x[None, None] * s for s in (1, 0.5, 0.3, 0.2, 0.1)), **options)


# Of x (length, 6) and labels (length,)
CALLS = {
    "cross entropy": pyloss.fused_cross_entropy,
    "linear": lambda x, y: pyloss.fused_linear_cross_entropy(x, W, y),
    "sorting along the length": lambda x, y: pyloss.soft_sort(x.mT),
    "attention": lambda x, y: _attention(x, is_causal=True),
    "info_nce": lambda x, y: pyloss.info_nce(x, x.flip(1)),
}
MORE = {
    "comp-sum": lambda x, y: pyloss.comp_sum_loss(x, y, 1.5),
    "focal": pyloss.focal_loss,
    "aldr": pyloss.aldr_loss,
    "z-loss": spherical_z_loss,
    "logprobs": lambda x, y: pyloss.token_logprobs(x, W, y),
    "distillation": lambda x, y: linear_distillation_loss(x, W, x + 1, W),
    "rows of six": lambda x, y: pyloss.soft_rank(x),
    "rank along the length": lambda x, y: pyloss.soft_rank(x.mT),
    "permutahedron along the length": lambda x, y: permutahedron_sort(x.mT),
    "siglip": lambda x, y: pyloss.siglip_loss(x, x.flip(1)),
    "nt_xent": lambda x, y: pyloss.nt_xent(x, x.flip(1)),
    "window": lambda x, y: _attention(x, window=2),
    "low rank": lambda x, y: _attention(x / 8, method="lowrank", degree=2, poly="taylor"),
    "betti": lambda x, y: pyloss.betti_matching_loss(x.sigmoid()[None], (x > 0).to(x)[None]),
}


def compiled_at_each_length(function, backend: str, dynamic: bool | None) -> list[int]:
    """How many graphs there are after each length."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for length in LENGTHS:
        x, y = torch.randn(length, 6, requires_grad=True), torch.randint(6, (length,))
        got, want = compiled(x, y), function(x, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x) for t in (got, want)))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_no_length_compiles_anew(function) -> None:
    assert compiled_at_each_length(function, "eager", True) == [1] * 5


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", [*CALLS.values(), *MORE.values()], ids=[*CALLS, *MORE])
def test_no_length_compiles_anew_below_autograd(function) -> None:
    """The first call may trace twice, to make tensors of numbers; or, without dynamic, the second
    finds that the length changes."""
    counts = compiled_at_each_length(function, "aot_eager", True)
    assert counts == [counts[0]] * 5 and counts[0] <= 2
    assert compiled_at_each_length(function, "eager", None) == [1, 2, 2, 2, 2]


COMPILE = """
import json, torch, pyloss
from torch._dynamo.utils import counters
x, y = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
w = torch.randn(5, 6, requires_grad=True)
q = [t.requires_grad_() for t in torch.randn(5, 1, 2, 4, 8).unbind()]
calls = (
    lambda: pyloss.fused_cross_entropy(x, y),
    lambda: pyloss.fused_linear_cross_entropy(x, w, y),
    lambda: pyloss.soft_sort(x).square().sum(),
    lambda: pyloss.tensor_attention(*q).square().sum(),
)
for call in calls:
    torch._dynamo.reset()
    torch.compile(call, fullgraph=True)().backward()
graphs, autograd = counters["inductor"], counters["aot_autograd"]
print(json.dumps([graphs["fxgraph_cache_miss"], graphs["fxgraph_cache_hit"],
                  autograd["autograd_cache_miss"], autograd["autograd_cache_hit"]]))
"""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("custom", [False, True])
def test_a_second_process_compiles_nothing(custom: bool, tmp_path: Path) -> None:
    """Each call is two graphs. torch's cache of autograd takes a Function only where it is told."""
    allow = "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"
    environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    environment[allow] = str(int(custom))
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found == [[8, 0, 4 * custom, 0], [0, 8, 0, 4 * custom]]
