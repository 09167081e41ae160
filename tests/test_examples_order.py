"""The experiments in examples/ that print tables of seeds, at sizes that take seconds."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from pyloss.demo.seeds import Panel, draw, spread

EXAMPLES = Path(__file__).parent.parent / "examples"
# file: (needs scikit-learn, a row of its table)
EXPERIMENTS = {
    "groco_digits": (True, "untrained encoder"),
    "contrastive_digits": (True, "iSogCLR"),
    "uniformity_tolerance": (True, "0.1 "),
    "tcm_opis": (False, "multi-similarity + TCM 0.7"),
    "few_shot": (True, "ICNN + Proto-Triplet"),
    "ens_loss": (True, "40 images"),
    "naive_bayes": (True, "10 features, naive Bayes"),
    "sort_sets": (False, "N = 4, 1 steps, 1 glimpse"),
    "order_search": (False, "exhaustive, warm-up"),
    "topk_loss": (True, "50% wrong, k = 1 and 5, m = 16"),
    "rank_queries": (True, "neural_ndcg"),
    "refined_schedule": (True, "refined, mode=optimal"),
    "sso": (False, "SSO, 5 Armijo"),
    "gated_cnn": (True, "4 channels, r = 0.9"),
    "lion_k": (True, "Lion-K, smooth"),
    "causal_pinn": (False, "causal"),
    "lagrangian_pinn": (False, "Lagrangian"),
    "dcdm_poisson": (False, "CG, incomplete Cholesky"),
    "distill_toy": (False, "distilled"),
    "z_loss": (True, "100 classes, SphericalLinear, Z-loss, a, b"),
    "adversarial_digits": (True, "doubly robust"),
    "comp_sum_bounds": (True, "tau 1.5"),
    "random_features": (False, "64 features"),
    "inductive_bias": (False, "sine"),
    "nbody_frames": (False, "FrameAverage, stochastic"),
    "perceptron": (False, "drawn, n = 100"),
    "label_noise": (True, "ALDR, lam0 = 10"),
    "segment_volumes": (False, "soft Dice + 0.2 Betti matching"),
    "monai_training": (False, "Dice + clDice"),
    "affine_digits": (True, "GL"),
    "mixed_symmetries": (False, "retuned"),
    "second_minimum": (False, "monoid, gru, penalty"),
    "batch_learning_rate": (True, "B = 256"),
    "grokking": (False, "alpha 4"),
    "critical_depth": (True, "tanh, C_W = 1.1"),
    "invariance_sem": (False, "penalty, irmv1"),
    "private_aggregates": (False, "rho 1, bags of 4"),
    "optimistic_omd": (False, "OOMD, noise 1"),
    "adversarial_mdp": (False, "Hedge, reduced"),
    "neural_bandit": (False, "small losses, NeuFastCB"),
    "analytic_continual": (True, "analytic"),
    "federated_curricula": (False, "curriculum"),
    "pretraining": (False, "PPCA of 200 samples"),
    "neural_collapse": (True, "one collapses, 1 layer"),
    "perturbed_collapse": (False, "unequal, beta = 0.01 "),
}


@pytest.mark.usefixtures("keep_num_threads")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    if EXPERIMENTS[name][0]:
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--plot", "made/plot.png"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (row,) = [line for line in capsys.readouterr().out.splitlines()
              if line.startswith(EXPERIMENTS[name][1]) and "+-" in line]  # fmt: skip
    assert "nan" not in row
    assert Path("made/plot.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir() == ["made"]


def test_every_experiment_is_described() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert not [name for name in EXPERIMENTS if f"| `{name}.py` |" not in text]


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0], 1, " %") == "2.0 +- 1.0 %"
    assert spread([0.25], 2) == "0.25 +- 0.00"


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = Panel("", "", "", [1.0], {"line": [[1.0]], "level": 2.0})
    assert "needs matplotlib" in draw(tmp_path / "x.png", [panel])
    assert not list(tmp_path.iterdir())
