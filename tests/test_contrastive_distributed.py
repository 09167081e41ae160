"""Contrastive losses over processes, against one process (contrastive_worker.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import check_ranks

import pyloss
import pyloss.distributed

WORKER = Path(__file__).with_name("contrastive_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


@pytest.mark.parametrize("world", [2, 3])
def test_against_one_process(world: int, tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, world, str(WORKER))
    assert all("all cases done" in text for text in texts)
    assert len({text.count(": ok") for text in texts}) == 1 and texts[0].count(": ok") > 40


def test_needs_a_process_group() -> None:
    z = torch.randn(4, 3)
    for call in (
        lambda: pyloss.distributed.all_gather_with_grad(z),
        lambda: pyloss.nt_xent(z, z, group=object()),
        lambda: pyloss.siglip_loss(z, z, group=object(), ring=True),
        lambda: pyloss.nn.SogCLRLoss(4, group=object())(z, z, torch.arange(4)),
        lambda: pyloss.nn.KLDROLoss(group=object())(z),
    ):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call()


def test_a_ring_needs_a_group() -> None:
    for make in (pyloss.nn.CLIPLoss, pyloss.nn.InfoNCELoss, pyloss.nn.SupervisedContrastiveLoss):
        with pytest.raises(ValueError, match="ring needs a group"):
            make(ring=True)
