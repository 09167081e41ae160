"""The first use of a name, wherever it happens: while Dynamo traces, in workers, in threads, and in
the graphs of torch.export, whose ops must be registered before they are loaded."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import first_use_worker
import pytest
import torch

import pyloss

HERE = Path(__file__).resolve().parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def run(*command: str | Path) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- torch.compile ----------------------------------------------------------------------------

NOT_TRACED = {
    *{"BettiMatching", "BettiTarget", "PersistencePairs", "RowStats"},  # results
    # These look at numbers, which breaks the graph however they are imported.
    *{"betti_matching_error", "betti_number_error"},
    *{"tensor_attention_cost", "tensor_attention_error"},
    *{"backend", "show_config"},  # imported by pyloss itself
}


@functools.cache
def compiled(*options: str) -> dict[str, str]:
    return json.loads(run(HERE / "first_use_worker.py", *options))


@needs_fork
@pytest.mark.parametrize("case", sorted(first_use_worker.QUICK))
def test_first_use_inside_a_compiled_function(case: str):
    assert not compiled()[case]


@needs_fork
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", first_use_worker.CASES)
def test_first_use_of_every_name(case: str):
    assert not compiled("--all")[case]


def test_every_headline_name_is_compiled():
    names = {name for name in pyloss.__all__ if callable(getattr(pyloss, name))}
    assert names - NOT_TRACED <= set(first_use_worker.CASES)
    assert not NOT_TRACED & set(first_use_worker.CASES)


# --- workers and threads ----------------------------------------------------------------------

DATA_LOADER = """
import sys
import torch
import pyloss


def loaded():
    return {n for n in sys.modules if n.startswith("pyloss.") and n.count(".") > 1}


class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.arange(6.0).roll(i).reshape(2, 3)
        loss = pyloss.fused_cross_entropy(x, torch.tensor([0, 2]))
        rank_loss = pyloss.nn.SpearmanLoss()(x, x.flip(-1))
        return loss, rank_loss, pyloss.metrics.betti_numbers(x[None, None] > 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Losses(), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1]
    )
    got = [torch.cat(parts) for parts in zip(*loader)]
    assert not loaded(), loaded()
    want = [torch.stack(parts) for parts in zip(*(Losses()[i] for i in range(4)))]
    assert loaded()
    for a, b in zip(got, want):
        assert torch.equal(a, b)
"""


@pytest.mark.parametrize("start", [pytest.param("fork", marks=needs_fork), "spawn"])
def test_first_use_in_a_data_loader(start: str, tmp_path: Path):
    program = tmp_path / "load.py"  # a spawned worker imports its main module from a file
    program.write_text(DATA_LOADER)
    run(program, start)


THREADS = """
import sys, threading
import torch, pyloss

names = ["soft_sort", "tensor_attention", "fused_linear_cross_entropy", "BettiMatchingLoss"] * 6
sys.setswitchinterval(1e-5)
start, found, failed = threading.Barrier(len(names)), {}, []

def first_use(i, name):
    start.wait()
    try:
        found[i] = getattr(pyloss, name)
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=first_use, args=pair) for pair in enumerate(names)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert not failed, failed
for i, name in enumerate(names):
    assert found[i] is getattr(pyloss, name), name
assert pyloss.soft_sort(torch.tensor([[3.0, 1.0, 2.0]]), steepness=100.0).argmax() == 2
"""


def test_first_use_by_many_threads():
    run("-c", THREADS)


# --- torch.export -----------------------------------------------------------------------------


class Losses(torch.nn.Module):
    def forward(self, x, y, w):
        return (
            pyloss.fused_cross_entropy(x, y),
            pyloss.fused_linear_cross_entropy(x, w, y),
            pyloss.soft_rank(x),
            pyloss.functional.permutahedron_sort(x),
            pyloss.functional.spherical_z_loss(x, y),
            pyloss.functional.pca_frames(x.reshape(2, 4, 3)).t,
            pyloss.betti_matching_loss(x.reshape(1, 1, 4, 6), w.reshape(1, 1, 5, 6)[..., :4, :]),
            pyloss.tensor_attention(*x.reshape(1, 1, 4, 6).expand(5, 1, 1, 4, 6).unbind()),
        )


LOAD = """
import sys
import torch
import pyloss
try:
    torch.export.load(sys.argv[1])
except Exception:  # torch names the op in a warning
    pass
else:
    raise AssertionError("loaded without load_all")
pyloss.ops.load_all()
program = torch.export.load(sys.argv[1])
assert not [n for n in sys.modules if n.startswith("pyloss.functional.")]
inputs, want = torch.load(sys.argv[2])
for a, b in zip(program.module()(*inputs), want):
    torch.testing.assert_close(a, b)
"""

OPS = """
import importlib, pkgutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import pyloss

class NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} while pyloss is imported")

def registered():
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyloss::")}

assert not registered()
with NoTensors():
    pyloss.ops.load_all()
ops = registered()
assert "pyloss::row_softmax_fwd" in ops and len(ops) > 20
with NoTensors():
    for name in ("ops", "functional", "nn", "metrics", "optim", "distributed"):
        package = importlib.import_module(f"pyloss.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"pyloss.{name}."):
            importlib.import_module(module.name)
assert registered() == ops
pyloss.ops.load_all()
assert registered() == ops
"""


def test_load_all_registers_every_op_and_no_import_makes_a_tensor():
    run("-c", OPS)


def test_an_exported_program_in_a_process_that_called_load_all(tmp_path: Path):
    inputs = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), torch.randn(5, 6)
    model = Losses()
    program = torch.export.export(model, inputs)
    targets = {str(node.target) for node in program.graph.nodes}
    assert sum(target.startswith("pyloss.") for target in targets) >= 6
    files = tmp_path / "program.pt2", tmp_path / "tensors.pt"
    torch.export.save(program, files[0])
    torch.save((inputs, model(*inputs)), files[1])

    run("-c", LOAD, *files)
