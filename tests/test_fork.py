"""pyloss works in a forked child of a process that has used its thread pool.

The parent is a subprocess with a time limit: what this guards against is a child that hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

# The child avoids parallel torch operations of its own: OpenMP does not survive a fork.
FORK = """
import os, sys, torch, pyloss
torch.set_num_threads(2)
x = torch.randn(512, 2000, requires_grad=True)
target = torch.randint(2000, (512,))
def step():
    loss = pyloss.fused_cross_entropy(x, target)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.item(), bytes(grad.numpy())
want = step()
child = os.fork()
if child == 0:
    os._exit(0 if all(step() == want for _ in range(3)) else 3)
_, status = os.waitpid(child, 0)
assert step() == want, "the parent's pool broke"
sys.exit(os.waitstatus_to_exitcode(status))
"""

# The library is first loaded in the child: nothing of it was there to notice the fork.
LOADED_IN_CHILD = """
import os, signal, sys, torch
torch.set_num_threads(2)
x, target = torch.randn(512, 2000), torch.zeros(512, dtype=torch.long)
x.logsumexp(1)  # starts the threads of OpenMP
child = os.fork()
if child == 0:
    signal.alarm(60)
    import pyloss
    loss = pyloss.fused_cross_entropy(x, target, reduction="none")
    os._exit(0 if len(loss) == 512 else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""

DATA_LOADER = """
import torch, pyloss
torch.set_num_threads(2)
x, target = torch.randn(64, 5000), torch.randint(5000, (64,))
want = pyloss.fused_cross_entropy(x, target, reduction="none")
class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        part = slice(8 * i, 8 * i + 8)
        return pyloss.fused_cross_entropy(x[part], target[part], reduction="none")
loader = torch.utils.data.DataLoader(
    Losses(), batch_size=2, num_workers=2, multiprocessing_context="fork"
)
for _ in range(2):
    got = torch.cat([batch.flatten() for batch in loader])
    assert torch.equal(got, want)
"""


@pytest.mark.parametrize(
    "program",
    [FORK, LOADED_IN_CHILD, DATA_LOADER],
    ids=["os_fork", "loaded_in_child", "data_loader"],
)
def test_fork(program: str) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
