"""Deep conjugate directions: conjugate gradients and inverses as special cases, and training."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyloss.functional import conjugate_direction_loss, dcdm_solve, lanczos_ritz_dataset
from pyloss.functional._lanczos import ritz
from pyloss.nn import PoissonNet2d, PoissonNet3d

F64 = torch.float64


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    return (q * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=F64)) @ q.T


def conjugate_gradients(a: Tensor, b: Tensor, steps: int) -> list[float]:
    x, r = torch.zeros_like(b), b.clone()
    p, norms = r.clone(), [r.norm().item()]
    for _ in range(steps):
        alpha = (r @ r) / (p @ a @ p)
        new = r - alpha * a @ p
        x, p, r = x + alpha * p, new + (new @ new) / (r @ r) * p, new
        norms.append(r.norm().item())
    return norms


# --------------------------------------------------------------------------------------------------
# The solver


@pytest.mark.parametrize(("condition", "steps", "close"), [(10.0, 20, 1e-8), (1e3, 25, 1e-2)])
def test_identity_is_conjugate_gradients(condition, steps, close) -> None:
    a, b = spd(60, condition), torch.randn(60, dtype=F64)
    found = dcdm_solve(lambda v: v @ a, b, lambda r: r, tol=0.0, maxiter=steps)
    expected = torch.tensor(conjugate_gradients(a, b, steps), dtype=F64)
    torch.testing.assert_close(found.residual_norms, expected, rtol=close, atol=0)
    assert not found.converged and found.iterations == steps


@pytest.mark.parametrize("n_orth", [1, 2, 3])
def test_a_direction_is_conjugate_to_as_many_before_it_as_asked_for(n_orth: int) -> None:
    a, b = spd(12, 10.0), torch.linspace(-1, 2, 12, dtype=F64)
    steps = [torch.zeros_like(b)]
    # Of a nonlinear f nothing is conjugate by itself.
    dcdm_solve(
        lambda v: a @ v, b, lambda r: r + r.roll(1).abs(), tol=0.0, maxiter=6, n_orth=n_orth,
        callback=lambda k, x, norm: steps.append(x),
    )  # fmt: skip
    p = torch.nn.functional.normalize(torch.stack(steps).diff(dim=0), dim=1)
    products = (p @ a @ p.T).abs()
    for before in range(1, n_orth + 1):
        assert products.diagonal(-before).max() < 1e-9
    assert products.diagonal(-n_orth - 1).max() > 1e-4


def test_inverse_ends_after_one_step() -> None:
    a = spd(30, 1e4)
    found = dcdm_solve(lambda v: v @ a, torch.randn(30, dtype=F64), lambda r: a.inverse() @ r)
    assert found.iterations == 1 and found.converged and found.fallbacks == 0


def test_a_batch_is_each_system_alone() -> None:
    a, b = spd(20, 50.0), torch.randn(4, 20, dtype=F64)
    b[2] = 0
    start = torch.randn(4, 20, dtype=F64)
    calls = []
    together = dcdm_solve(
        lambda v: v @ a, b, torch.tanh, start, tol=1e-8,
        callback=lambda k, x, norm: calls.append((k, norm.clone())),
    )  # fmt: skip
    for i in range(4):
        alone = dcdm_solve(lambda v: v @ a, b[i], torch.tanh, start[i], tol=1e-8)
        torch.testing.assert_close(together.x[i], alone.x, rtol=1e-6, atol=1e-9)
        assert together.iterations[i] == alone.iterations
    assert torch.equal(together.x[2], torch.zeros(20, dtype=F64)) and together.converged.all()
    assert [k for k, _ in calls] == list(range(1, int(together.iterations.max()) + 1))
    assert torch.equal(together.residual_norms[1:], torch.stack([norm for _, norm in calls]))


@pytest.mark.parametrize("f", [torch.zeros_like, lambda r: r * torch.nan], ids=["zero", "NaN"])
def test_useless_directions_become_those_of_conjugate_gradients(f) -> None:
    a, b = spd(20, 50.0), torch.randn(2, 20, dtype=F64)
    found = dcdm_solve(lambda v: v @ a, b, f, tol=1e-8)
    plain = dcdm_solve(lambda v: v @ a, b, lambda r: r, tol=1e-8)
    assert torch.equal(found.x, plain.x)
    assert torch.equal(found.fallbacks, found.iterations) and plain.fallbacks.sum() == 0


@pytest.mark.parametrize(("dtype", "scale"), [(F64, 1e200), (F64, 1e-200), (torch.float32, 1e-30)])
def test_right_hand_sides_whose_squares_have_no_place_in_the_dtype(dtype, scale) -> None:
    a, b = spd(12, 10.0).to(dtype), torch.randn(2, 12, dtype=dtype)
    seen = []
    found = dcdm_solve(
        lambda v: v @ a, scale * b, lambda r: r, tol=1e-4, callback=lambda *k: seen.append(k)
    )
    plain = dcdm_solve(lambda v: v @ a, b, lambda r: r, tol=1e-4)
    assert found.converged.all()
    assert (found.iterations > 1).all()
    torch.testing.assert_close(found.x / scale, plain.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.residual_norms[0] / scale, b.norm(dim=1))
    assert torch.equal(seen[-1][1], found.x)
    assert torch.equal(seen[-1][2], found.residual_norms[-1])


def test_infinite_right_hand_side_gives_nan() -> None:
    b = torch.tensor([[1.0, 2.0], [torch.inf, 1.0]])
    found = dcdm_solve(lambda v: 2 * v, b, lambda r: r)
    assert found.converged.tolist() == [True, False]
    assert found.x[1].isnan().all()


def test_autocast_does_not_round_the_matrix() -> None:
    a, b = spd(12, 10.0).float(), torch.randn(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = dcdm_solve(lambda v: v @ a, b, lambda r: r, tol=1e-5)
        loss = conjugate_direction_loss(b, b, lambda v: v @ a)
    assert found.converged.all()
    torch.testing.assert_close(loss, conjugate_direction_loss(b, b, lambda v: v @ a))


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 2)])
def test_network_halves_a_grid_no_further_than_to_one_cell(size) -> None:
    for dims, net in ((2, PoissonNet2d), (3, PoissonNet3d)):
        x = torch.randn(2, *size[-dims:])
        assert net(channels=2, blocks=1, levels=3)(x).shape == x.shape


def test_energy_of_the_error_never_grows() -> None:
    a, b = spd(20, 50.0), torch.randn(20, dtype=F64)
    generator, energies = torch.Generator().manual_seed(0), []
    exact = torch.linalg.solve(a, b)

    def note(k, x, norm) -> None:
        energies.append(((x - exact) @ a @ (x - exact)).item())

    noise = lambda r: torch.randn(20, dtype=F64, generator=generator)  # noqa: E731
    dcdm_solve(lambda v: v @ a, b, noise, maxiter=30, callback=note)
    assert all(then <= now * (1 + 1e-12) for now, then in zip(energies, energies[1:]))


def test_indefinite_matrix_raises_where_it_shows() -> None:
    a = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    with pytest.raises(RuntimeError, match="<p, A p> is -.* along the residual too"):
        dcdm_solve(lambda v: v @ a, torch.tensor([0.1, 1.0], dtype=F64), lambda r: r)


# --------------------------------------------------------------------------------------------------
# The loss


def test_loss_of_the_two_extremes() -> None:
    a, b = spd(12, 30.0), torch.nn.functional.normalize(torch.randn(3, 12, dtype=F64), dim=1)
    exact = conjugate_direction_loss(b, -5 * b @ a.inverse(), lambda v: v @ a, reduction="none")
    assert (exact < 1e-20).all()
    steepest = conjugate_direction_loss(b, b, lambda v: v @ a, reduction="none")
    one = dcdm_solve(lambda v: v @ a, b, lambda r: r, maxiter=1)
    torch.testing.assert_close(steepest, one.residual_norms[1].square())


def test_gradient_goes_through_a_product_that_autograd_cannot_see() -> None:
    a, b = spd(6, 5.0), torch.randn(2, 6, dtype=F64)
    hidden = lambda v: torch.from_numpy(v.detach().numpy() @ a.numpy())  # noqa: E731
    pred = torch.randn(2, 6, dtype=F64, requires_grad=True)
    found = torch.autograd.grad(conjugate_direction_loss(b, pred, hidden), pred)
    seen = torch.autograd.grad(conjugate_direction_loss(b, pred, lambda v: v @ a), pred)
    torch.testing.assert_close(found, seen)
    assert torch.autograd.gradgradcheck(lambda p: conjugate_direction_loss(b, p, hidden), pred)


# --------------------------------------------------------------------------------------------------
# Data


def test_ritz_vectors_are_eigenvectors_once_the_space_is_whole() -> None:
    a = spd(16, 100.0)
    values, vectors = ritz(lambda v: v @ a, torch.randn(1, 16, dtype=F64), 16)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(a), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vectors @ a, values[:, None] * vectors, rtol=0, atol=1e-9)
    # A start of two eigenvectors spans no more than these.
    scale, start = torch.arange(1.0, 17.0, dtype=F64), torch.zeros(1, 16, dtype=F64)
    start[0, [2, 9]] = 1.0
    values, vectors = ritz(lambda v: v * scale, start, 10)
    torch.testing.assert_close(values, scale[[2, 9]])
    assert vectors.shape == (2, 16)


def test_data_set_has_unit_vectors_and_more_of_the_low_modes() -> None:
    scale = torch.arange(1.0, 41.0, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    b = lanczos_ritz_dataset(lambda v: v * scale, (40,), 400, generator=generator)
    assert b.shape == (400, 40) and b.dtype == torch.float32
    torch.testing.assert_close(b.norm(dim=1), torch.ones(400))
    power = b.square().mean(0)
    low, high = power[:22].mean(), power[22:].mean()  # 11/20 of the modes, times 9 squared
    assert 60 < low / high < 105
    again = torch.Generator().manual_seed(0)
    same = lanczos_ritz_dataset(lambda v: v * scale, (40,), 400, generator=again, boost=9)
    assert torch.equal(same, b)
    flat = lanczos_ritz_dataset(lambda v: v * scale, (40,), 400, generator=again, boost=1.0)
    assert 0.8 < flat[:, :22].square().mean() / flat[:, 22:].square().mean() < 1.25
    few = lanczos_ritz_dataset(lambda v: v * scale.view(5, 8), (5, 8), 3, steps=4, low=1,
                               generator=again, dtype=F64)  # fmt: skip
    assert few.shape == (3, 5, 8) and torch.linalg.matrix_rank(few.view(3, 40)) == 3


# --------------------------------------------------------------------------------------------------
# Learning: the example, at full length


@pytest.mark.exhaustive
@pytest.mark.slow
def test_four_times_fewer_iterations_on_what_was_not_seen() -> None:
    namespace = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "dcdm_poisson.py"))
    args = namespace["parser"]().parse_args(["--steps", "400"])
    silent = type("Silent", (), {"update": lambda *_: None})()
    net = namespace["train"](0, args, silent)
    total = {"CG": 0, "DCDM": 0}
    for b in namespace["right_hand_sides"](args.grid, 0).values():
        solvers = namespace["solvers"](net, args, lambda r: r)
        for name in total:
            iterations, x = solvers[name](b)
            assert (b - namespace["laplace"](x)).norm() <= 2 * args.tol * b.norm()
            total[name] += iterations
    assert total["CG"] >= 4 * total["DCDM"], total
