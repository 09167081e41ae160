"""Trainers, FSDP1 and DDP in two processes, with the loss of pyloss as with the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import check_ranks, needs_torch

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.exhaustive
@needs_torch((2, 11), "FSDP on the CPU")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, 2, str(ROOT / "tests" / "trainers_worker.py"))
    assert all(text.count(": ok") >= 8 and "all cases done" in text for text in texts)
