"""Scaled models, tangent kernels and their alignment; the transition from lazy to rich."""

from __future__ import annotations

import copy
import io
import math
import runpy
from pathlib import Path

import pytest
import torch
from helpers import LiveBytes
from torch import Tensor, nn

import pyloss
from pyloss.analysis import LazyScale, empirical_ntk, kernel_alignment, scaled_mse

F64 = torch.float64


def network(outputs: int = 3, dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)


# --------------------------------------------------------------------------------------------------
# The scale


def test_a_scaled_model_is_zero_at_the_start_and_moves_with_its_module() -> None:
    module, x = network(), torch.randn(5, 4, dtype=F64, requires_grad=True)
    model = LazyScale(module, 3.0)
    before = module(x).detach()
    assert not model(x).any()
    with torch.no_grad():
        module[2].bias += 0.5
    torch.testing.assert_close(model(x), 3 * (module(x) - before))
    # The copy has no gradient, but hands that of the input on.
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    assert not slope.any()
    model(x).sum().backward()
    assert all(p.grad is None for p in model.initial.parameters())
    assert all(p.grad is not None for p in module.parameters())
    plain = LazyScale(module, 3.0, center=False)
    assert plain.initial is None
    torch.testing.assert_close(plain(x), 3 * module(x))


def test_copies_and_checkpoints_keep_the_start() -> None:
    model, x = LazyScale(network(), 2.0), torch.randn(5, 4, dtype=F64)
    with torch.no_grad():
        model.module[0].weight.mul_(2)
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    fresh = LazyScale(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), 2.0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh(x), expected)
    assert "alpha=2.0, center=True" in repr(fresh)


def test_the_copy_does_not_train() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = LazyScale(module, 1.0)
    assert not any(m.training for m in model.initial.modules())
    model.train()
    assert module.training and not any(m.training for m in model.initial.modules())
    x = torch.randn(6, 4)
    first, second = model.initial(x), model.initial(x)
    assert torch.equal(first, second) and not model.initial[0].num_batches_tracked.any()
    assert not model.eval()(x).any()


def test_the_speed_in_function_space_does_not_depend_on_the_scale() -> None:
    x, y = torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64)
    moved = []
    for alpha in (1.0, 1000.0):
        model = LazyScale(network(), alpha)
        loss = scaled_mse(model(x), y, alpha)
        torch.testing.assert_close(loss, y.square().mean() / alpha**2)
        loss.backward()
        with torch.no_grad():
            for p in model.module.parameters():
                p -= 1e-6 * p.grad
        moved.append(model(x).detach() * 1e6)
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)


def test_squares_beyond_half_precision() -> None:
    pred, y = torch.tensor([300.0, 600.0]).half(), torch.zeros(2).half()
    assert scaled_mse(pred, y, 100.0).item() == 22.5
    assert scaled_mse(pred, y, 100.0, reduction="sum").item() == 45
    assert scaled_mse(pred, y, 100.0, reduction="none").tolist() == [9, 36]
    assert scaled_mse(pred, y, 1e200).item() == 0
    with torch.autocast("cpu"):
        assert scaled_mse(pred, y, 1.0).item() == 225_000


# --------------------------------------------------------------------------------------------------
# Tangent kernels


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """One gradient at a time, (n, C, P)."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)
            for value in model(x).flatten()]  # fmt: skip
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).unflatten(
        0, (len(x), -1)
    )


@pytest.mark.parametrize("chunk", [2, 16])
def test_kernel_of_gradients(chunk: int) -> None:
    model, x, other = network(), torch.randn(5, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    model[2].bias.requires_grad_(False)
    a, b = jacobian(model, x), jacobian(model, other)
    for second, right in ((None, a), (other, b)):
        full = torch.einsum("acp,bdp->abcd", a, right)
        found = empirical_ntk(model, x, second, chunk=chunk, outputs="full")
        torch.testing.assert_close(found, full)
        found = empirical_ntk(model, x, second, chunk=chunk)
        torch.testing.assert_close(found, full.diagonal(dim1=2, dim2=3).sum(-1))
    assert empirical_ntk(model, x[:0]).shape == (0, 0)
    narrow = empirical_ntk(model.float(), x.float())
    assert narrow.dtype == F64 and not narrow.requires_grad
    torch.testing.assert_close(narrow, torch.einsum("acp,bcp->ab", a, a), rtol=1e-5, atol=1e-5)


def test_kernel_of_one_set_by_pairs_of_chunks() -> None:
    model = nn.Sequential(network(), nn.Tanh())  # else a block is its own transpose
    x = torch.randn(5, 4, dtype=F64)
    parts = empirical_ntk(model, x, chunk=2, outputs="full")
    torch.testing.assert_close(parts, empirical_ntk(model, x, x, outputs="full"))


def test_kernel_of_a_scaled_model_and_of_shared_weights() -> None:
    x = torch.randn(4, 4, dtype=F64)
    model = network(1)
    scaled = empirical_ntk(LazyScale(model, 3.0), x)
    torch.testing.assert_close(scaled, 9 * empirical_ntk(model, x))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    shared[2].weight = shared[0].weight
    a = jacobian(shared, x)
    torch.testing.assert_close(empirical_ntk(shared, x), torch.einsum("acp,bcp->ab", a, a))


def test_memory_of_a_kernel_is_bounded_by_its_chunks() -> None:
    """3 chunk C P numbers, however many samples there are."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    count, chunk = sum(p.numel() for p in model.parameters()), 4
    for samples in (8, 40):
        with LiveBytes() as live:
            empirical_ntk(model, torch.randn(samples, 64), chunk=chunk)
        beside = 4 * samples * 64 + 8 * samples**2
        assert chunk * 2 * count * 4 < live.peak < 3 * chunk * 2 * count * 4 + beside


# --------------------------------------------------------------------------------------------------
# Alignment


def test_alignment_is_that_of_centred_features() -> None:
    a, b = torch.randn(9, 3, dtype=F64), torch.randn(9, 2, dtype=F64)
    K, L = a @ a.T, b @ b.T
    ca, cb = a - a.mean(0), b - b.mean(0)
    norm = torch.linalg.matrix_norm
    expected = norm(ca.T @ cb) ** 2 / norm(ca.T @ ca) / norm(cb.T @ cb)
    torch.testing.assert_close(kernel_alignment(K, L), expected)
    torch.testing.assert_close(kernel_alignment(3 * K + 1, K), torch.ones((), dtype=F64))
    plain = kernel_alignment(K, L, centered=False)
    torch.testing.assert_close(plain, (K * L).sum() / norm(K) / norm(L))
    several = kernel_alignment(torch.stack([K, L]), L)
    torch.testing.assert_close(several, torch.stack([expected, torch.ones((), dtype=F64)]))
    given = (K.requires_grad_(), L.requires_grad_())
    assert torch.autograd.gradcheck(kernel_alignment, given)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_alignment_with_constant_labels_is_nan(dtype: torch.dtype) -> None:
    y, K = torch.full((9,), 0.1, dtype=dtype), torch.randn(9, 9, dtype=dtype)
    assert kernel_alignment(torch.outer(y, y), K).isnan()
    assert kernel_alignment(K, 0 * K).isnan() and kernel_alignment(K * math.nan, K).isnan()
    rounded = 0.1 + 0.1 * torch.finfo(dtype).eps * torch.randn(9, 9, dtype=dtype).sign()
    assert kernel_alignment(rounded, K).isnan()  # constant but for rounding
    # The gradient of another kernel is its own.
    both = torch.stack([K, K])
    scale = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    found = kernel_alignment(both * scale.view(2, 1, 1), torch.eye(9, dtype=dtype))
    (slope,) = torch.autograd.grad(found[1], scale)
    assert slope.abs().max() < 1e-5 and found[0].isnan()


# --------------------------------------------------------------------------------------------------
# From lazy to rich: the example


EXAMPLE = Path(__file__).parent.parent / "examples" / "grokking.py"


@pytest.mark.parametrize(
    ("size", "alphas"),
    [
        (
            "--dim 25 --samples 160 --width 80 --held 200 --rate 10 --steps 250".split(),
            (0.25, 2.0),
        ),
        pytest.param([], (0.25, 1.0, 4.0), marks=pytest.mark.exhaustive),
    ],
)
def test_lazier_models_generalise_later(size: list[str], alphas: tuple[float, ...]) -> None:
    """Steps to a tenth of the test loss over those of the training loss: 1.5, 2.25, 6.1."""
    namespace = runpy.run_path(str(EXAMPLE))
    args = namespace["parser"]().parse_args(size)
    runs = [namespace["run"](alpha, 0, args) for alpha in alphas]
    ratios = [run.generalised / run.fitted for run in runs]
    assert all(b > 1.15 * a for a, b in zip(ratios, ratios[1:])), ratios
    assert size or 1 <= ratios[0] < 2.5
    # Features align with the labels where the model is rich.
    assert runs[0].alignment[-1] > runs[-1].alignment[-1]


def test_draw_alignment() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    left, right = pyloss.visualize.draw_alignment([1, 10], [1.0, 0.1], [1.0, 0.5], [0.1, 0.9])
    assert len(left.get_lines()) == 2 and len(right.get_lines()) == 1
    assert pyloss.visualize.draw_alignment([1], [1.0], [1.0], [0.0], left)[0] is left
    with pytest.raises(ValueError, match="equally many, got 1, 1, 1, 2"):
        pyloss.visualize.draw_alignment([1], [1.0], [1.0], [0.0, 1.0])
    matplotlib.pyplot.close("all")
