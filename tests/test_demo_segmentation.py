"""The demo section "segmentation" and examples/segment_vessels.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyloss.demo import sections
from pyloss.demo import segmentation as demo

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BETTI = demo.betti_name(0.25)


@pytest.fixture(scope="module")
def retina() -> demo.Retina:
    pytest.importorskip("skimage")
    return demo.load_retina()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_vessels_are_there(retina):
    """Thin, darker than what is around them, in few large pieces; none on the edge of the eye."""
    assert retina.image.shape == retina.vessels.shape == (705, 705)
    assert retina.vessels.dtype == torch.bool
    assert 0.05 < retina.vessels.float().mean() < 0.12
    assert retina.image[retina.vessels].mean() < retina.image[~retina.vessels].mean() - 0.5
    assert not retina.vessels[[0, -1]].any() and not retina.vessels[:, [0, -1]].any()
    from skimage import measure

    sizes = np.bincount(measure.label(retina.vessels.numpy()).ravel())[1:]
    assert sizes.min() >= demo.SMALLEST and len(sizes) < 60


def test_training_and_test_patches_do_not_touch(retina):
    assert demo.TRAIN_ROWS[1] < demo.TEST_ROWS[0]
    low, high = (round(share * 705) for share in demo.TEST_ROWS)
    only = demo.Retina(retina.image, retina.vessels.clone())
    only.vessels[low:high] = False  # no patch of the test could be found there
    x, y = demo.patches(only, demo.TRAIN_ROWS, 5, demo.QUICK, rng())
    assert x.shape == y.shape == (5, 1, 32, 32)
    assert x.dtype == torch.float32 and y.dtype == torch.bool
    assert (y.float().mean((1, 2, 3)) >= 0.06).all()


def test_patches_depend_on_the_generator_alone(retina):
    a, b, c = (demo.patches(retina, demo.TRAIN_ROWS, 2, demo.QUICK, rng(s)) for s in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])


def test_corrupt():
    image = torch.full((32, 32), -3.0)
    vessels = torch.zeros(32, 32, dtype=torch.bool)
    vessels[16] = True
    size = dataclasses.replace(demo.QUICK, blur=0.0, noise=0.0, gaps=1, gap_radius=3)
    gap = demo.corrupt(image, vessels, size, rng()) != image
    assert 10 < gap.sum() <= 29 and gap[16].sum() in range(4, 8)
    assert (image == -3.0).all()  # not in place
    size = dataclasses.replace(size, gaps=0, blur=2.0)
    assert torch.allclose(demo.corrupt(image, vessels, size, rng()), image)  # blur keeps the mean
    spot = torch.zeros(32, 32)
    spot[16, 16] = 1.0
    blurred = demo.corrupt(spot, vessels, size, rng())
    assert blurred.sum().item() == pytest.approx(1.0, abs=1e-4) and blurred.max() < 0.05
    size = dataclasses.replace(size, blur=0.0, noise=0.5)
    noise = demo.corrupt(image, vessels, size, rng()) - image
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)


def test_a_copy_goes_on_alike(retina, keep_num_threads):
    torch.set_num_threads(1)  # as fast on a busy machine
    size = dataclasses.replace(demo.QUICK, warmup=2)
    first = demo.Training(retina, size, 3)
    criterion = demo.loss_functions(size)[demo.DICE]
    first.step(criterion)
    second = first.copy()
    losses = [[training.step(criterion)[0] for _ in range(3)] for training in (first, second)]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


def test_the_losses_differ_by_the_term():
    size = dataclasses.replace(demo.QUICK, alphas=(0.25,))
    criteria = demo.loss_functions(size)
    x, y = torch.randn(2, 1, 16, 16), torch.rand(2, 1, 16, 16) > 0.5
    both, dice = criteria[BETTI](x, y), criteria[demo.DICE](x, y)
    alone = demo.pyloss.betti_matching_loss(
        x.sigmoid(), y, filtration="superlevel", padding=size.padding
    )
    torch.testing.assert_close(both, dice + 0.25 * alone)
    assert alone > 0


def test_perfect_and_empty_predictions(retina):
    x, y = demo.patches(retina, demo.TEST_ROWS, 3, demo.QUICK, rng())

    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            return self.logits

    scores = demo.evaluate(Fixed(20.0 * y.float() - 10.0), x, y)
    assert scores == demo.Scores(1.0, 0.0, 0.0)
    scores = demo.evaluate(Fixed(torch.full(y.shape, -10.0)), x, y)
    numbers = demo.pyloss.betti_numbers(y).float().sum() / 3
    assert scores.dice < 0.01
    assert scores.betti_number_error == pytest.approx(numbers.item())


def run_of(name, dice=0.5, losses=(1.0, 0.5), seed=0, error=2.0):
    return demo.Run(seed, name, list(losses), demo.Scores(dice, 1.0, error), 3.0, 2.0)


def test_checks_notice():
    blank = demo.Scores(0.2, 0.0, 0.0)
    assert demo.check([run_of(demo.DICE)], blank) == []
    (failure,) = demo.check([run_of(demo.DICE, losses=(1.0, float("nan")))], blank)
    assert "not finite" in failure and demo.DICE in failure
    for dice in (0.2, 0.1, float("nan")):
        (failure,) = demo.check([run_of(BETTI, dice=dice, seed=3)], blank)
        assert "seed 3" in failure and "0.200" in failure


def test_table():
    runs = [run_of(demo.DICE), run_of(demo.DICE, dice=0.7, seed=1, error=4.0), run_of(BETTI)]
    lines = demo.quality_table(runs).splitlines()
    assert "0.600 +- 0.141" in lines[2] and "3.00 +- 1.41" in lines[2]
    assert "0.500 +- 0.000" in lines[3]


def test_without_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    (failure,) = demo.segmentation(sections.Options(out=tmp_path, quick=True))
    assert "pyloss[demo]" in failure


def test_quick_run(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "pyloss.demo", "--quick", "--section", "segmentation"]
    done = subprocess.run(
        [*command, "--threads", "1", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "segmentation.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "segmentation.json").read_text())
    assert report["failures"] == []
    names = [run["name"] for run in report["runs"]]
    assert names == list(demo.loss_functions(demo.QUICK)) * demo.QUICK.seeds
    assert len(set(names)) == 3
    for run in report["runs"]:
        assert len(run["losses"]) == demo.QUICK.steps
        assert 0 < run["scores"]["dice"] <= 1
        assert 0 < run["loss_ms"] < run["step_ms"]
        assert run["name"] in done.stdout
    assert "Betti matching error" in done.stdout
    assert demo.FULL.seeds >= 3


def test_example(tmp_path):
    pytest.importorskip("skimage")
    command = [sys.executable, str(EXAMPLES / "segment_vessels.py"), "--out", str(tmp_path)]
    sizes = "--patch 32 --batch 2 --width 4 --warmup 6 --steps 3 --seeds 1 --test-patches 2"
    done = subprocess.run(
        [*command, *sizes.split(), "--alphas", "0.25", "--dims", "0", "--threads", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: so short a training may have learnt nothing
    size = json.loads((tmp_path / "segmentation.json").read_text())["size"]
    assert size["alphas"] == [0.25] and size["dims"] == [0] and size["steps"] == 3
    assert BETTI in done.stdout
