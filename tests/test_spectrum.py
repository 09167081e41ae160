"""Spectra by Lanczos against dense ones; rates of a batch size against simulation."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LiveBytes
from torch import Tensor, nn

import pyloss
from pyloss.analysis import (
    batch_extremal_eigenvalue,
    effective_batch_size,
    full_batch_eigenvalue,
    hessian_noise,
    hvp,
    lanczos,
    max_learning_rate,
    scale_lr,
    slq_density,
    top_eigenvalues,
)

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(2 * (len(values),), generator=generator(seed), dtype=F64))
    return (q * values) @ q.T


def dense(matvec, dim: int, dtype=F64) -> Tensor:
    return torch.stack([matvec(e) for e in torch.eye(dim, dtype=dtype)])


# The acceptance of the specification: P = 200, m = 80.
VALUES = torch.cat([torch.linspace(-1, 2, 195, dtype=F64), torch.tensor([5.0, 8, 13, 20, 30])])
MATRIX = with_spectrum(VALUES)


# --------------------------------------------------------------------------------------------------
# Lanczos and quadrature


def test_a_known_spectrum() -> None:
    found = top_eigenvalues(lambda v: MATRIX @ v, 5, dim=200, steps=80, generator=generator())
    torch.testing.assert_close(found.values, VALUES[-5:].flip(0), rtol=1e-6, atol=0)
    residual = MATRIX @ found.vectors.T - found.vectors.T * found.values
    assert residual.norm(dim=0).max() < 1e-6
    density = slq_density(lambda v: MATRIX @ v, 200, probes=10, steps=80, generator=generator())
    assert 0 < density.trace_error < 0.2 * VALUES.sum()
    assert (density.trace - VALUES.sum()).abs() < 3 * density.trace_error
    torch.testing.assert_close(density.weights.sum(-1), torch.ones(10, dtype=F64))
    # The share of the eigenvalues below 0.5, of which there are 98.
    below = torch.where(density.nodes < 0.5, density.weights, 0.0).sum(-1).mean()
    assert abs(below - 0.49) < 0.03
    assert abs(density.of(torch.square) / VALUES.square().sum() - 1) < 0.5
    assert abs(torch.trapezoid(density.density, density.grid) - 1) < 1e-4
    each = 200 * (density.weights * density.nodes).sum(-1)
    torch.testing.assert_close(density.trace_error, each.std() / 10**0.5)
    low, high = density.nodes.aminmax()
    torch.testing.assert_close(density.sigma, (high - low) / 100)


def test_the_basis_is_orthonormal_and_gives_the_operator_back() -> None:
    alpha, beta, Q = lanczos(lambda v: MATRIX @ v, 200, 500, generator=generator())
    assert Q.shape == (200, 200)  # more steps than dimensions there are not
    T = alpha.diag() + beta.diag(1) + beta.diag(-1)
    torch.testing.assert_close(Q.T @ Q, torch.eye(200, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(Q @ T @ Q.T, MATRIX, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_an_invariant_space_ends_it(dtype: torch.dtype) -> None:
    v0 = torch.zeros(50, dtype=dtype)
    v0[[3, 7, 40]] = torch.tensor([1.0, 2.0, -1.0], dtype=dtype)
    scale = torch.arange(50, dtype=dtype)
    alpha, beta, Q = lanczos(lambda v: scale * v, 50, 30, v0=v0)
    assert Q.shape == (50, 3) and Q.dtype == dtype and alpha.dtype == beta.dtype == F64
    T = alpha.diag() + beta.diag(1) + beta.diag(-1)
    expected = torch.tensor([3.0, 7.0, 40.0], dtype=F64)
    torch.testing.assert_close(torch.linalg.eigvalsh(T), expected, rtol=1e-5, atol=0)
    # Probes that end at different lengths: one eigenvalue, and nothing but zeros.
    found = slq_density(lambda v: 2 * v, 50, probes=2, generator=generator())
    assert found.nodes.shape == (2, 50) and found.trace == 100 and found.trace_error == 0
    assert abs(torch.trapezoid(found.density, found.grid) - 1) < 1e-4
    assert found.sigma == 0.02  # of one eigenvalue alone
    zeros = slq_density(torch.zeros_like, 50, probes=2)
    assert zeros.density.isfinite().all() and zeros.sigma == 0.01
    given = slq_density(lambda v: 2 * v, 50, probes=1, sigma=0.1)  # five widths beyond the nodes
    torch.testing.assert_close(given.grid[[0, -1]], torch.tensor([1.5, 2.5], dtype=F64))


def test_what_is_not_said() -> None:
    """Defaults: 8 probes of -1 and 1, which see the trace of a diagonal matrix without error."""
    found = slq_density(lambda v: torch.arange(5.0, dtype=F64) * v, 5)
    assert found.nodes.shape == (8, 5) and len(found.grid) == 512
    assert abs(found.trace - 10) < 1e-12 and found.trace_error < 1e-12
    calls = []
    top_eigenvalues(lambda v: (calls.append(1), MATRIX @ v)[1], 2, dim=200)
    assert len(calls) == 44


def test_error_bounds_hold_before_convergence() -> None:
    found = top_eigenvalues(lambda v: MATRIX @ v, 3, dim=200, steps=8, generator=generator())
    off = (found.values[:, None] - VALUES).abs().amin(1)
    assert (off <= found.errors + 1e-12).all() and found.errors[-1] > 1e-4
    residual = MATRIX @ found.vectors.T - found.vectors.T * found.values
    torch.testing.assert_close(found.errors, residual.norm(dim=0))


def test_spectra_of_float32_are_those_of_float64() -> None:
    narrow = MATRIX.float()
    found = top_eigenvalues(lambda v: narrow @ v.float(), 5, dim=200, steps=80)
    assert found.vectors.dtype == F64  # of an operator without a dtype of its own
    torch.testing.assert_close(found.values, VALUES[-5:].flip(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_whose_squares_are_no_numbers(scale: float) -> None:
    """In float32; also a first vector in them."""
    values = torch.arange(1.0, 6.0)
    found = lanczos(lambda v: scale * values * v, 5, 5, v0=scale * torch.ones(5))
    T = found.alpha.diag() + found.beta.diag(1) + found.beta.diag(-1)
    torch.testing.assert_close(torch.linalg.eigvalsh(T) / scale, values.double(), rtol=1e-5, atol=0)


def test_nan_in_nan_out() -> None:
    alpha, beta, _ = lanczos(lambda v: v * math.nan, 20, 4)
    assert alpha.isnan().all() and beta.isnan().all()
    found = slq_density(lambda v: v * math.nan, 20, probes=2, steps=4)
    assert found.density.isnan().all() and found.trace.isnan()
    assert top_eigenvalues(lambda v: v * math.nan, 2, dim=20).values.isnan().all()


def test_a_bar_on_stderr(capsys) -> None:
    slq_density(lambda v: 2 * v, 20, probes=4, steps=5, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and [line.split()[1] for line in err.splitlines()] == [
        "5/20", "10/20", "15/20", "20/20"]  # fmt: skip
    slq_density(lambda v: 2 * v, 20)
    assert capsys.readouterr().err == ""


def test_drawn_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (slq_density(lambda v: MATRIX @ v, 200, probes=2, steps=5,
                                 distribution="gaussian", generator=generator(3))
                     for _ in range(2))  # fmt: skip
    assert torch.equal(first.nodes, second.nodes)
    assert torch.equal(before, torch.get_rng_state())
    own = torch.linspace(-3, 3, 7)
    assert torch.equal(slq_density(lambda v: v, 20, grid=own).grid, own.double())


# --------------------------------------------------------------------------------------------------
# Products with a Hessian


class Net(nn.Module):
    """A weight that is used twice, one that is frozen, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.frozen(torch.tanh(self.second(x)))))


def network(dtype: torch.dtype) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, dtype=dtype), torch.randint(2, (12,))
    return Net().to(dtype), x, y


def loss_hessian(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """By torch.func, of a flat vector."""
    params = {k: p for k, p in net.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(params.items(), flat.split(sizes))
        given = {k: part.view_as(p) for (k, p), part in parts}
        return F.cross_entropy(torch.func.functional_call(net, given, (x,)), y)

    start = torch.cat([p.detach().reshape(-1) for p in params.values()])
    return torch.func.jacrev(torch.func.jacrev(loss))(start)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_hvp_with_buffers_and_frozen_and_shared_parameters(dtype: torch.dtype) -> None:
    net, x, y = network(dtype)
    expected = loss_hessian(net.eval(), x, y)
    hessian = hvp(lambda: F.cross_entropy(net(x), y), net)
    assert hessian.dim == len(expected) == 38 and hessian.dtype == dtype
    tolerance = dict(rtol=0, atol=1e-12 if dtype == F64 else 1e-6)
    torch.testing.assert_close(dense(hessian, 38, dtype), expected, **tolerance)
    # Of batches it is the mean, or one by the sizes.
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    sizes = torch.tensor([3, 9])
    of_parts = hvp(lambda b: F.cross_entropy(net(b[0]), b[1]), net, parts, weights=sizes)
    torch.testing.assert_close(dense(of_parts, 38, dtype), expected, **tolerance)
    halves = hvp(lambda b: F.cross_entropy(net(b), y[:6]), net.parameters(), [x[:6], x[:6]])
    once = hvp(lambda: F.cross_entropy(net(x[:6]), y[:6]), dict(net.named_parameters()))
    v = torch.randn(38, dtype=F64)
    assert halves(v).dtype == F64
    torch.testing.assert_close(halves(v), once(v), rtol=1e-5, atol=1e-6)
    top = top_eigenvalues(hessian, 1, steps=38)
    torch.testing.assert_close(
        top.values[0], torch.linalg.eigvalsh(expected)[-1].double(), rtol=1e-5, atol=0
    )
    assert all(p.grad is None for p in net.parameters())


def test_hvp_of_dropout_is_of_one_draw() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    x = torch.eye(4)
    matrix = dense(hvp(lambda: net(x).square().sum(), net), 49, torch.float32)
    torch.testing.assert_close(matrix, matrix.T)


def test_hvp_of_a_linear_loss_is_zero() -> None:
    w = torch.ones(3, requires_grad=True)
    assert hvp(lambda: w.sum() * 2, [w])(torch.ones(3)).tolist() == [0, 0, 0]
    half = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    hessian = hvp(lambda: (half * half).sum(), [half, w])
    assert hessian.dtype == torch.float32
    assert hessian(torch.ones(6)).tolist() == [2, 2, 2, 0, 0, 0]


def test_batches_hold_the_graph_of_one() -> None:
    """Ten batches are gone through with the memory of one."""

    def peak(count: int) -> int:
        w = torch.randn(64, 64, requires_grad=True)
        batches = [torch.randn(512, 64) for _ in range(count)]
        hessian = hvp(lambda x: torch.tanh(x @ w).square().mean(), [w], batches)
        with LiveBytes() as live:
            hessian(torch.randn(64 * 64))
        return live.peak

    assert peak(6) < 1.1 * peak(2)


def test_batches_are_gone_through_again() -> None:
    w = torch.ones(2, requires_grad=True)
    loader = torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2)
    hessian = hvp(lambda b: (w * b).square().sum(), [w], loader)
    assert torch.equal(hessian(torch.ones(2)), hessian(torch.ones(2)))
    torch.testing.assert_close(hessian(torch.ones(2)), torch.tensor([4.0, 10.0]))


# --------------------------------------------------------------------------------------------------
# Batch sizes


@pytest.mark.parametrize(
    ("size", "tolerance"),
    [(300, 0.03), pytest.param(1500, 0.015, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("lam", [3.0, 5.0])
def test_spike_law_of_a_random_matrix(lam: float, size: int, tolerance: float) -> None:
    draws, sigma = 8, (3 / size) ** 0.5
    for at, batch in enumerate((0.75, 3, 12)):  # r = 2, 1, 0.5
        found = []
        for seed in range(draws):
            noise = torch.randn(size, size, generator=generator(draws * at + seed), dtype=F64)
            noise = (noise + noise.T) * (sigma / (2 * batch) ** 0.5)
            noise[0, 0] += lam
            found.append(top_eigenvalues(lambda v: noise @ v, dim=size, steps=40).values[0])  # noqa: B023
        expected = batch_extremal_eigenvalue(lam, size, batch, sigma)
        assert abs(torch.stack(found).mean() / expected - 1) < tolerance
    hidden = batch_extremal_eigenvalue(0.5, size, 3, sigma)
    torch.testing.assert_close(hidden, torch.tensor(2.0, dtype=F64))  # the edge of the noise


def test_laws_of_the_batch_are_inverses() -> None:
    batch = torch.tensor([4.0, 16.0, 64.0])
    seen = batch_extremal_eigenvalue(5.0, 400, batch, 0.3)
    torch.testing.assert_close(full_batch_eigenvalue(seen, batch, 36.0), 0 * seen + 5)
    for pair in (torch.tensor([4.0, 16.0]), torch.tensor([1.0, 16.0])):  # the second: r > lam
        seen = batch_extremal_eigenvalue(5.0, 400, pair, 0.3)
        noise = hessian_noise(seen[0], pair[0], seen[1], pair[1])
        torch.testing.assert_close(torch.stack(noise), torch.tensor([5.0, 36.0], dtype=F64))
    whole = hessian_noise(6.0, 8, 4.0, population=64)  # 8 of 64 are as noisy as 64 / 7
    assert whole.lam == 4 and abs(float(whole.noise) - 4 * 2 * 64 / 7) < 1e-9
    assert hessian_noise(4.0, 8, 6.0, 16) == (6, 0)  # less noise than none
    with pytest.raises(ValueError, match="small must be less than large, got 8 and 8"):
        hessian_noise(6.0, 8, 4.0, 8)
    assert hessian_noise(math.nan, 8, 6.0, 16).lam.isnan()
    assert effective_batch_size(64, 64).isinf()
    assert batch_extremal_eigenvalue(3.0, 100, 64, 9.0, population=64) == 3


def growth(rate: float, lam: float, noise: float, batch: int, seed: int) -> float:
    """Of the length of the error of SGD on a quadratic: a new noisy Hessian in each step."""
    size, steps = 100, 150
    g = generator(seed)
    x = torch.full((size,), size**-0.5, dtype=F64)
    sigma, total = (noise / size / batch) ** 0.5, 0.0
    for _ in range(steps):
        # A symmetric matrix of normal numbers times a vector has this law, up to 1 / size.
        push = torch.randn(size, generator=g, dtype=F64) * sigma * x.norm()
        x = x - rate * (lam * x + push)
        total += x.norm().log().item()
        x = x / x.norm()
    return total / steps


def largest_stable(lam: float, noise: float, batch: int) -> float:
    low, high = 0.0, 4 / lam
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if growth(middle, lam, noise, batch, 0) < 0 else (low, middle)
    return low


def test_largest_stable_rate_by_bisection() -> None:
    """It doubles with the batch where noise rules, and then stays."""
    lam, noise = 2.0, 400.0
    batches = [2, 4, 8, 3200, 6400]
    found = [largest_stable(lam, noise, b) for b in batches]
    foreseen = max_learning_rate(lam, torch.tensor(batches).double(), noise)
    for rate, law in zip(found, foreseen):
        assert 1 / 1.4 < rate / law < 1.4
    assert all(2 / 1.4 < b / a < 2 * 1.4 for a, b in zip(found[:2], found[1:3]))
    assert abs(found[-1] / found[-2] - 1) < 0.1 and abs(found[-1] * lam / 2 - 1) < 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("noise", [0.0, 1.0, 100.0])
def test_momentum_is_stable_in_the_mean_square(momentum: float, noise: float) -> None:
    """The second moments of x and the x before follow a matrix, which has an eigenvalue of 1."""
    lam, batch = 2.0, 4.0
    limit = max_learning_rate(lam, batch, noise, optimizer="momentum", momentum=momentum)

    def radius(rate: Tensor) -> float:
        a = float(1 + momentum - rate * lam)
        moments = [[a * a + float(rate) ** 2 * noise / batch, -2 * a * momentum, momentum**2],
                   [a, -momentum, 0.0], [1.0, 0.0, 0.0]]  # fmt: skip
        return torch.linalg.eigvals(torch.tensor(moments, dtype=F64)).abs().max().item()

    assert radius(0.999 * limit) < 1 < radius(1.001 * limit)


def test_rules_of_the_rate() -> None:
    # 2 / lam' above the threshold, whichever the criterion; adaptive as the square root.
    for criterion in ("mean_square", "eigenvalue"):
        rate = max_learning_rate(4.0, 10, 40.0, criterion=criterion)
        torch.testing.assert_close(rate, torch.tensor(0.4, dtype=F64))
    rate = max_learning_rate(4.0, 10, 40.0, optimizer="momentum", criterion="eigenvalue")
    torch.testing.assert_close(rate, torch.tensor(2 * 1.9 / 5, dtype=F64))
    adaptive = max_learning_rate(4.0, torch.tensor([10.0, 40.0]), 40.0, optimizer="adaptive")
    torch.testing.assert_close(adaptive, torch.tensor([0.5, 1.0], dtype=F64))
    assert max_learning_rate(4.0, 10, 0.0, damping=1.0) == 0.4
    assert max_learning_rate(4.0, 10, 40.0, optimizer="adaptive", damping=1.0) == 0.4
    assert max_learning_rate(0.0, 10, 0.0).isinf() and max_learning_rate(0.0, 10, 1.0) == 0
    assert scale_lr(0.1, 32, 64) == 0.2 and scale_lr(0.1, 32, 128, "sqrt") == 0.2
    options = dict(rule="rmt", lam=2.0, noise=400.0)
    assert scale_lr(0.1, 1, 2, **options) == pytest.approx(0.2, rel=0.02)
    assert scale_lr(0.1, 1e6, 2e6, **options) == pytest.approx(0.1, rel=0.01)
    assert scale_lr(0.1, 50, 100, population=100, **options) == pytest.approx(0.2)
    several = scale_lr(0.1, 1, 2, "rmt", lam=torch.tensor([1.0, 1e9]), noise=1e6)
    torch.testing.assert_close(several, torch.tensor([0.2, 0.1], dtype=F64), rtol=1e-5, atol=0)
    lr = scale_lr(torch.tensor([0.1, 0.2]), 32, 64)
    assert lr.dtype == torch.float32 and torch.equal(lr, torch.tensor([0.2, 0.4]))


# --------------------------------------------------------------------------------------------------
# A picture, a network of a million parameters


def test_draw_spectrum() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = slq_density(lambda v: MATRIX @ v, 200, probes=2, steps=20)
    axes = pyloss.visualize.draw_spectrum({"a": found, "b": found}, edges={"b": 30.0})
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b", "b, foreseen"]
    axes.figure.savefig(io.BytesIO())
    with pytest.raises(TypeError, match="spectra must be SpectralDensity, got int"):
        pyloss.visualize.draw_spectrum(3)
    with pytest.raises(ValueError, match="edges must be of density, got x"):
        pyloss.visualize.draw_spectrum(found, edges={"x": 1.0})
    matplotlib.pyplot.close("all")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_million_parameters_in_a_minute_of_processor_time() -> None:
    """Two minutes are there on two cores: the clock of a busy machine proves nothing."""
    import time

    net = nn.Sequential(nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 192), nn.Tanh(),
                        nn.Linear(192, 10))  # fmt: skip
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    hessian = hvp(lambda: F.cross_entropy(net(x), y), net)
    assert hessian.dim > 10**6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    found = slq_density(hessian)
    torch.set_num_threads(threads)
    assert time.process_time() - start < 60
    assert found.nodes.shape == (8, 64) and found.density.isfinite().all()
