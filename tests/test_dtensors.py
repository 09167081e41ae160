"""Row losses and Lion-K of DTensors against one process (dtensor_worker.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import check_ranks

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_against_one_process(world: int, tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, world, str(ROOT / "tests" / "dtensor_worker.py"))
    assert all("all cases done" in text for text in texts)
    assert len({text.count(": ok") for text in texts}) == 1 and texts[0].count(": ok") > 70


def test_plain_tensors_do_not_load_them() -> None:
    code = (
        "import sys, torch, pyloss\n"
        "x = torch.nn.Parameter(torch.randn(3, 5))\n"
        "pyloss.fused_cross_entropy(x, torch.tensor([0, 1, 2])).backward()\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "assert 'pyloss.functional._row_dtensors' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
