"""What every test shares: seeds, threads, poisoned memory, and which tests are left out."""

from __future__ import annotations

import gc
import os

import pytest
import torch

if module := os.environ.get("PYLOSS_SHIM_MODULE"):
    import shim_device

    shim_device.install(module)


def pytest_configure() -> None:
    """Threads so that the processes of pytest-xdist together fill the cores, not more.

    In the environment too, for the programs that tests start. A test of threads sets its own count.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    each = max(1, (os.cpu_count() or 1) // workers) if workers else 0
    threads = int(os.environ.get("PYLOSS_TEST_THREADS", each))
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="tests marked exhaustive, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    if "PYTEST_XDIST_WORKER" in os.environ:  # no process is to begin a long test when others end
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    # With PYLOSS_TEST_DEVICE=cpu the files that know it run what needs no device.
    if torch.cuda.is_available() or os.environ.get("PYLOSS_TEST_DEVICE") == "cpu":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is there by now stays: no collection of garbage need look at it, and those that remain
    come less often. They were a sixth of the time of tests of torch.compile."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


seeded = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def seed() -> None:
    """torch.manual_seed keeps a stack trace for each absent kind of device: 0.3 ms a test."""
    seeded(0)


@pytest.fixture(autouse=True)
def poison() -> None:
    """Memory that torch.empty and its like return is NaN, or the largest integer.

    torch fills it in its deterministic mode only; warn_only, so that operations without a
    deterministic form still run. A test that leaves the mode changes nothing for the next one.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def keep_num_threads():
    """Restores torch's thread count, which pyloss follows."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
