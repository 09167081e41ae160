"""Losses whose classes are split over processes, against one process (vocab_parallel_worker.py)."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import check_ranks

import pyloss
import pyloss.distributed

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


# Of two, the shards are equal, as those of fsdp2 and of the documentation are.
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_against_one_process(world: int, tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, world, str(ROOT / "tests" / "vocab_parallel_worker.py"))
    assert all("all cases done" in text for text in texts)
    assert len({text.count(": ok") for text in texts}) == 1 and texts[0].count(": ok") > 130


def test_needs_a_process_group() -> None:
    x, y = torch.randn(4, 5), torch.randint(5, (4,))
    with pytest.raises(RuntimeError, match="init_process_group"):
        pyloss.distributed.vocab_parallel_cross_entropy(x, y)
    with pytest.raises(RuntimeError, match="init_process_group"):
        pyloss.distributed.vocab_parallel_linear_cross_entropy(x, torch.randn(7, 5), y)


@pytest.mark.parametrize("name", pyloss.distributed.__all__)
def test_docstring_example(name: str) -> None:
    function = getattr(pyloss.distributed, name)
    assert all(p.annotation is not p.empty for p in inspect.signature(function).parameters.values())
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    results = [doctest.DocTestRunner().run(t) for t in tests if t.examples]
    assert results and all(r.attempted and not r.failed for r in results)


def test_example_of_the_documentation(tmp_path: Path) -> None:
    """The torchrun script, its rendezvous through the environment, in two processes."""
    text = (ROOT / "docs" / "vocab_parallel.md").read_text()
    script = tmp_path / "train_head.py"
    script.write_text(re.findall(r"```python\n(.*?)```", text, re.S)[0])
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, runpy, sys\n"
        "import torch.distributed as dist\n"
        "if sys.platform == 'linux':\n"
        "    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')\n"
        "rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "real, store = dist.init_process_group, dist.FileStore(path, world)\n"
        "dist.init_process_group = lambda name: real(\n"
        "    name, store=store, rank=rank, world_size=world)\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "sys.stdout.flush()\n"
        "os._exit(0)  # gloo's threads may end a process that shuts down in order\n"
    )
    texts = check_ranks(tmp_path, 2, str(wrapper))
    losses = [re.findall(r"loss ([\d.]+)", text) for text in texts]
    assert losses[0] and losses[0] == losses[1] and float(losses[0][-1]) < float(losses[0][0])


COMPILED = """
import torch, torch.distributed as dist, pyloss
from pyloss.distributed import vocab_parallel_linear_cross_entropy as loss
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
h, w = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
y = torch.randint(11, (7,))
function = lambda h: loss(h * 2, w, y).mul(3)
compiled = torch.compile(function, backend="aot_eager")
for a, b in zip(*(torch.autograd.grad(f(h), (h, w)) for f in (compiled, function))):
    torch.testing.assert_close(a, b)
"""


def test_compiled_code_calls_it() -> None:
    """Also its exchange of sizes, which would hang in a trace."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
