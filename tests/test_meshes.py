"""Losses in models on meshes, against one process: tensor, context and pipeline parallelism, FSDP2,
and two of them at once (meshes_worker.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import check_ranks, needs_torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    needs_torch((2, 11), "FSDP2 on the CPU"),
]


# Of three, the shards of 23 classes differ, as those of two do; four are meshes of two by two.
@pytest.mark.parametrize(
    "world", [2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 4))]
)
def test_against_one_process(world: int, tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, world, str(ROOT / "tests" / "meshes_worker.py"))
    assert all("all cases done" in text for text in texts)
    assert len({text.count(": ok") for text in texts}) == 1 and texts[0].count(": ok") > 50
