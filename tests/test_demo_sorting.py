"""The demo section "sorting" and examples/sort_digits.py."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyloss.demo import sections
from pyloss.demo import sorting as demo

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def plain() -> demo.Digits:
    """Every voxel of a digit's image is the digit."""
    labels = torch.arange(10).repeat(3)
    return demo.Digits(labels.float()[:, None, None].expand(-1, 8, 8).contiguous(), labels)


class Reader(torch.nn.Module):
    """Reads `plain` numbers off their images, from the voxels (4, 4), (4, 12), ..."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 4, 4::8] @ torch.tensor([1000.0, 100.0, 10.0, 1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_in_the_table():
    assert "sorting" in sections.load()


def test_the_digits():
    pytest.importorskip("sklearn")
    train, test = demo.load_digits()
    assert len(test.labels) == demo.TEST_DIGITS and len(train.labels) == 1797 - demo.TEST_DIGITS
    assert train.images.shape[1:] == (8, 8) and train.images.dtype == torch.float32
    assert train.images.min() == 0 and train.images.max() == 1
    assert set(test.labels.tolist()) == set(range(10))
    # The images of scikit-learn are all different, so that none is in both parts.
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_numbers_are_those_of_the_images(plain):
    images, numbers = plain.sets(50, 5, generator())
    assert images.shape == (50, 5, 1, 8, 32) and numbers.shape == (50, 5)
    assert numbers.min() >= 0 and 9000 < numbers.max() <= 9999
    assert torch.equal(Reader()(images), numbers)
    again, _ = plain.sets(50, 5, generator())
    assert torch.equal(images, again)


def test_accuracy(plain):
    assert demo.accuracy(Reader(), plain, 5, 250) == (1.0, 1.0)

    class Backwards(Reader):
        def forward(self, images):
            return -super().forward(images)

    exact, element = demo.accuracy(Backwards(), plain, 5, 250)
    assert exact == 0.0 and element == pytest.approx(0.2)  # the one in the middle
    # Chance, for a model that sees nothing.

    class Blind(torch.nn.Module):
        def forward(self, images):
            return torch.rand(images.shape[:2])

    torch.manual_seed(0)
    exact, element = demo.accuracy(Blind(), plain, 3, 2000)
    assert exact == pytest.approx(1 / 6, abs=0.03) and element == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("distribution", ["cauchy", "logistic"])
@pytest.mark.parametrize("network", ["odd_even", "bitonic"])
def test_the_loss_is_that_of_the_matrix(network, distribution):
    torch.manual_seed(0)
    numbers = torch.rand(6, 7).argsort(-1).float()
    sorter = demo.Sorter(network, distribution, steepness=2.0)
    assert demo.check_loss(sorter, torch.randn(6, 7), numbers) == []


def test_a_wrong_loss_is_noticed():
    class Value(demo.Sorter):
        def __call__(self, scores, numbers, done=0.0):
            loss = super().__call__(scores, numbers)
            return loss + 0.01 * loss.detach()

    class Gradient(demo.Sorter):
        def __call__(self, scores, numbers, done=0.0):
            loss = super().__call__(scores, numbers)
            return loss + 0.01 * (loss - loss.detach())

    class Order(demo.Sorter):
        def __call__(self, scores, numbers, done=0.0):
            return super().__call__(scores, -numbers)

    scores, numbers = torch.randn(6, 5), torch.rand(6, 5).argsort(-1).float()
    (failure,) = demo.check_loss(Value(), scores, numbers)
    assert "loss differs" in failure
    (failure,) = demo.check_loss(Gradient(), scores, numbers)
    assert "gradient differs" in failure
    assert len(demo.check_loss(Order(), scores, numbers)) == 2


def test_checks_notice():
    good = demo.Run(5, 0, exact=0.5, element=0.8, losses=[0.3, 0.1])
    assert demo.check(good) == []
    for change, what in (
        ({"losses": [0.3, float("nan")]}, "not finite"),
        ({"exact": 0.1}, "exact match is 10.0%"),
        ({"exact": float("nan")}, "exact match is nan%"),
        ({"element": 0.2}, "element-wise"),
        ({"n": 9, "element": 0.2}, "n = 9"),
    ):
        (failure,) = demo.check(dataclasses.replace(good, **change))
        assert what in failure
    for n, (exact, element) in demo.AT_LEAST.items():
        assert exact > 10 / math.factorial(n) and element > 2 / n  # well above chance
    assert set(demo.FULL.set_sizes) <= set(demo.AT_LEAST)


def test_training(plain, keep_num_threads):
    """The scorer learns what is there to see, and the sorter's time is a part of the whole."""
    torch.set_num_threads(1)
    easy = demo.Digits(plain.images / 10, plain.labels)
    size = dataclasses.replace(demo.QUICK, steps=60, images=60)
    seen = []

    def criterion(scores, numbers, done):
        seen.append(done)
        return demo.Sorter()(scores, numbers)

    model, run = demo.train(easy, 5, size, 3, criterion)
    assert seen == [step / 60 for step in range(60)] and len(run.losses) == 60
    assert 0 < run.sorter_ms < run.step_ms
    assert run.losses[-1] < 0.5 * run.losses[0]
    demo.judge(model, easy, run, 200)
    assert run.element > 0.5 and run.exact == run.exact_5
    _, again = demo.train(easy, 5, dataclasses.replace(size, steps=3), 3, criterion)
    assert again.losses[0] == run.losses[0]


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    (failure,) = demo.sorting(sections.Options(out=tmp_path, quick=True))
    assert "pyloss[demo]" in failure


def test_quick_run(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "pyloss.demo", "--quick", "--section", "sorting"]
    done = subprocess.run(
        [*command, "--threads", "1", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "sorting.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "sorting.json").read_text())
    assert report["failures"] == []
    assert [run["n"] for run in report["runs"]] == list(demo.QUICK.set_sizes)
    for run in report["runs"]:
        assert len(run["losses"]) == demo.QUICK.steps
        assert 0 <= run["exact"] <= run["element"] <= 1
    assert "exact match" in done.stdout and "all checks passed" in done.stdout


@pytest.mark.parametrize("implementation", ["pyloss", "diffsort"])
def test_example(tmp_path, implementation):
    pytest.importorskip("sklearn")
    if implementation == "diffsort":
        pytest.importorskip("diffsort")
    out = tmp_path / "runs.json"
    command = [sys.executable, str(EXAMPLES / "sort_digits.py"), "--impl", implementation]
    sizes = "--n 3 --steps 2 --images 30 --seeds 2 --test-sets 40 --validation 100 --kind row_ce"
    done = subprocess.run(
        [*command, *sizes.split(), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["options"]["kind"] == "row_ce"
    assert "exact match of 5" in done.stdout
