"""What every test shares: seeds, thread count, the skip of GPU tests."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def keep_num_threads():
    """Restores torch's thread count, which pyloss follows."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
