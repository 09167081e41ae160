"""Critical initialisation and kernel flow: the table, the quadrature against closed forms, and
networks that are drawn.

A layer's preactivations, given those before it, are Gaussian with one variance: a network with one
input is drawn without drawing its weights.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import pyloss
from pyloss.analysis import criticality, kernel_flow, optimal_aspect_ratio, optimal_depth
from pyloss.analysis.flow import _of_rays
from pyloss.functional import _critical, _gaussian
from pyloss.nn.init import critical_

F64 = torch.float64
NU_GELU, NU_SILU = 4.9042262, 4.9231871  # at the fixed point; relu has 5


def name_of(value: object) -> str:
    """The id of a parameter: the text of a function has an address, other in each process."""
    return getattr(value, "__name__", str(value))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int, features: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, features, dtype=F64, generator=seeded(seed))


# --------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("linear", ("scale_invariant", 0, 1, math.nan, 2)),
        ("relu", ("scale_invariant", 0, 2, math.nan, 5)),
        (nn.ReLU(), ("scale_invariant", 0, 2, math.nan, 5)),
        (nn.LeakyReLU(0.2), ("scale_invariant", 0, 2 / 1.04, math.nan, 3 * 0.5008 / 0.52**2 - 1)),
        ("tanh", ("zero", 0, 1, 0, 2 / 3)),
        (torch.tanh, ("zero", 0, 1, 0, 2 / 3)),
        ("sin", ("zero", 0, 1, 0, 2 / 3)),
        ("erf", ("zero", 0, math.pi / 4, 0, 2 / 3)),
        (nn.Softsign(), ("zero", 0, 1, 0, 2 / 3)),
        (lambda z: torch.tanh(3 * z), ("zero", 0, 1 / 9, 0, 2 / 3)),
        ("gelu", ("half_stable", 0.1729223908, 1.9830582575, 3.5615528128, NU_GELU)),
        (F.gelu, ("half_stable", 0.1729223908, 1.9830582575, 3.5615528128, NU_GELU)),
        ("silu", ("half_stable", 0.5551431707, 1.9880046783, 14.3201736180, NU_SILU)),
        (
            nn.SiLU(inplace=True),
            ("half_stable", 0.5551431707, 1.9880046783, 14.3201736180, NU_SILU),
        ),
    ],
    ids=name_of,
)
def test_table(activation, expected) -> None:
    found = criticality(activation)
    assert found.kind == expected[0]
    numbers = torch.stack(found[1:])
    assert numbers.dtype == F64
    torch.testing.assert_close(
        numbers, torch.tensor(expected[1:], dtype=F64), rtol=0, atol=1e-7, equal_nan=True
    )
    assert float(criticality("gelu").K_star) == pytest.approx((3 + math.sqrt(17)) / 2, abs=1e-10)


@pytest.mark.parametrize("activation", [nn.Mish(), nn.Hardswish(), nn.GELU("tanh")], ids=str)
def test_half_stable_points_are_what_they_say(activation) -> None:
    """Both susceptibilities, from their definitions, by differences."""
    kinks = (-3.0, 3.0) if isinstance(activation, nn.Hardswish) else ()
    found = criticality(activation, kinks=kinks)
    K, h = float(found.K_star), 1e-4
    z, w = _gaussian.line(torch.tensor([K - h, K, K + h], dtype=F64), kinks)
    square = (w * activation(z).square()).sum(1)
    assert float(found.C_b + found.C_W * square[1]) == pytest.approx(K, abs=1e-10)
    assert float(found.C_W * (square[2] - square[0]) / (2 * h)) == pytest.approx(1, abs=1e-6)
    slope = (activation(z + 1e-5) - activation(z - 1e-5)) / 2e-5
    assert float(found.C_W * (w * slope.square()).sum(1)[1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "activation",
    [
        "sigmoid",
        "softplus",
        torch.sigmoid,
        nn.ReLU6(inplace=True),
        torch.sinh,
        torch.square,
        torch.ones_like,
        nn.SELU(),
        lambda z: torch.cos(z) - 2,  # C_b would be negative
    ],
    ids=name_of,
)
def test_no_critical_point(activation) -> None:
    with pytest.raises(ValueError, match="has no critical point"):
        criticality(activation)


def test_residual_connections() -> None:
    g = 0.6
    relu, tanh, gelu = (criticality(name, residual=g) for name in ("relu", "tanh", "gelu"))
    kept = 1 - g**2
    assert float(relu.C_W) == pytest.approx(2 * kept)
    assert float(relu.nu) == pytest.approx(kept * (kept * 5 + 4 * g**2))
    assert float(tanh.nu) == pytest.approx(2 / 3 * (1 - g**4))
    assert float(gelu.C_b) == pytest.approx(kept * 0.1729223908)
    # The flow of such layers: at once for relu and at the fixed point of gelu, at last for tanh.
    x = inputs(1)
    start = torch.full((1, 1), math.sqrt(3.5615528128), dtype=F64)  # K of the first layer with 1, 0
    for name, x0, depth, rtol in (("relu", x, 30, 1e-9), ("tanh", x, 100, 0.04)):
        flow = kernel_flow(name, x0, depth, residual=g)
        growth = flow.V[-1, 0] / flow.K[-1, 0, 0] ** 2 / (depth - 1)
        nu = float(criticality(name, residual=g).nu)
        assert float(growth) == pytest.approx(nu, rel=rtol)
    # What skips a layer hands g^2 of the tangent kernel on: of linear layers all of it stays.
    flow = kernel_flow("linear", inputs(2), 9, residual=g, lam_b=0.0)
    torch.testing.assert_close(flow.K[-1], flow.K[0])
    torch.testing.assert_close(flow.ntk[-1], flow.ntk[0] + 8 * flow.K[0])
    K = (3.5615528128088 - gelu.C_b) / gelu.C_W
    flow = kernel_flow("gelu", start * (K / 3.5615528128) ** 0.5, 10, residual=g)
    assert flow.K[:, 0, 0].tolist() == pytest.approx([3.5615528128] * 10, rel=1e-8)
    assert float(flow.V[-1, 0] / 3.5615528128**2) == pytest.approx(9 * float(gelu.nu), rel=1e-6)


def test_aspect_ratio_and_depth() -> None:
    for name, n_out, expected in (("relu", 1, 0.0348), ("relu", 10, 0.016), ("tanh", 1, 0.261),
                                  ("tanh", 10, 0.12)):  # fmt: skip
        assert float(optimal_aspect_ratio(name, n_out)) == pytest.approx(expected, rel=5e-3)
    assert optimal_depth("tanh", 100, 10) == 12
    assert optimal_depth("relu", 2) == 1
    assert optimal_depth("relu", 1000, residual=0.9) > optimal_depth("relu", 1000)


# --------------------------------------------------------------------------------------------------
# Brackets of two inputs


def test_brackets_against_closed_forms() -> None:
    x = inputs(5)
    for scale, atol in ((1e-4, 1e-14), (1.0, 1e-13), (10.0, 1e-9), (100.0, 1e-6)):
        K = x @ x.mT / 10 * scale
        on = 1 + 2 * K.diagonal()
        expected = 2 / math.pi * torch.asin(2 * K / (on[:, None] * on).sqrt())
        found = kernel_flow("erf", x * scale**0.5, 2, C_b=0.0, C_W=1.0)
        torch.testing.assert_close(found.K[1], expected, rtol=0, atol=atol)
        slopes = 4 / math.pi / (on[:, None] * on - 4 * K.square()).sqrt()
        torch.testing.assert_close(found.ntk[1], 1 + expected + slopes * (1 + K), rtol=1e-5, atol=0)
    i, j = torch.triu_indices(5, 5, 1)
    variance = K.diagonal()
    for below in (0.0, 0.3, -1.0):  # relu, leaky, absolute value
        rays = _critical.two_rays(below, 1.0, "rays")
        arguments = variance[i], variance[j], K[i, j]
        by_polar = _gaussian.plane_means((rays.value, rays.slope), *arguments)
        torch.testing.assert_close(by_polar, list(_of_rays(below, 1.0, *arguments)))


def test_kinks_elsewhere() -> None:
    """hardtanh, whose mean given the other preactivation has a closed form."""
    x, hard = 2 * inputs(2), nn.Hardtanh()
    K = x @ x.mT / 10
    first, second, cross = K[0, 0], K[1, 1], K[0, 1]
    z, w = _gaussian.line(first.reshape(1), (-1.0, 1.0))
    mean, off = cross / first * z, (second - cross**2 / first).sqrt()

    def above(edge):  # E max(0, z - edge)
        u = (mean - edge) / off
        density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
        return off * (u * torch.special.ndtr(u) + density)

    expected = (w * hard(z) * (above(-1.0) - above(1.0) - 1)).sum()
    given = kernel_flow(hard, x, 2, C_b=0.0, C_W=1.0, kinks=(-1.0, 1.0)).K[1, 0, 1]
    rough = kernel_flow(hard, x, 2, C_b=0.0, C_W=1.0).K[1, 0, 1]
    nothing = kernel_flow(hard, 0 * x, 2, C_b=0.0, C_W=1.0, kinks=(-1.0, 1.0))
    assert not nothing.K.any() and nothing.ntk.isfinite().all()  # where kinks are infinitely far
    assert float(given) == pytest.approx(float(expected), abs=1e-5)
    assert float(rough) == pytest.approx(float(expected), abs=5e-3)


@pytest.mark.parametrize("activation", ["relu", "tanh", torch.tanh, "gelu"], ids=name_of)
def test_equal_opposite_and_zero_inputs(activation) -> None:
    x = inputs(1).repeat(4, 1)
    x[2] *= -1
    x[3] = 0
    flow = kernel_flow(activation, x, 4)
    for kernel in (flow.K, flow.ntk):
        torch.testing.assert_close(kernel[:, 0, 1], kernel[:, 0, 0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(kernel, kernel.mT)
        assert kernel.isfinite().all()
    if activation != "gelu":
        assert not flow.K[:, 3].any() and not flow.V[:, 3].any()
    if activation in ("tanh", torch.tanh):
        torch.testing.assert_close(flow.K[:, 0, 2], -flow.K[:, 0, 0], rtol=1e-9, atol=0)


def test_modes_of_torch_change_nothing() -> None:
    x, variances = inputs(2), dict(C_b=0.0, C_W=1.0)
    expected = kernel_flow(torch.tanh, x, 3, **variances)
    with torch.inference_mode():  # where no slope is recorded
        torch.testing.assert_close(kernel_flow(torch.tanh, x, 3, **variances), expected)
    _gaussian.legendre.cache_clear()
    with torch.device("meta"):  # as a large network is built
        for activation in (torch.tanh, F.silu, "relu"):
            assert critical_(nn.Linear(3, 4), activation).weight.is_meta
    torch.testing.assert_close(kernel_flow(torch.tanh, x, 3, **variances), expected)


def test_inputs_of_every_kind() -> None:
    x = inputs(3)
    flow = kernel_flow("tanh", x, 3)
    alone = kernel_flow("tanh", x[1:2], 3)
    torch.testing.assert_close(flow.K[:, 1:2, 1:2], alone.K)
    torch.testing.assert_close(flow.V[:, 1:2], alone.V)
    half = kernel_flow("tanh", x.bfloat16(), 3)
    assert half.K.dtype == F64
    torch.testing.assert_close(half.K, flow.K, rtol=0.05, atol=0.02)
    assert kernel_flow("tanh", x.mT.contiguous().mT, 1).K.shape == (1, 3, 3)
    bare = kernel_flow("tanh", x, 3, order=0)
    assert bare.V is None and bare.G1 is None and torch.equal(bare.K, flow.K)
    x[1, 0] = math.nan
    nan = kernel_flow("relu", x, 3)
    assert nan.K[:, 1].isnan().all() and nan.V[1:, 1].isnan().all()
    assert nan.K[:, 0, 0].isfinite().all()
    nothing = kernel_flow("tanh", x[:0], 3)
    assert nothing.K.shape == (3, 0, 0) and nothing.V.shape == (3, 0)
    # No critical point, so that the variances must be given; no mean either.
    assert kernel_flow("sigmoid", inputs(2), 3, C_b=0.0, C_W=1.0).K.isfinite().all()
    # K^2 is below all numbers.
    small = kernel_flow("relu", torch.tensor([[1e-85]], dtype=F64), 4)
    assert small.K.all() and small.G1.isfinite().all()
    exploded = kernel_flow(torch.sinh, 20 * inputs(1), 3, C_b=0.0, C_W=torch.tensor(1.0))
    assert exploded.K[-1].isnan().all()


# --------------------------------------------------------------------------------------------------
# Networks


def drawn_kernels(s, width: int, depth: int, runs: int, C_b: float, C_W: float, K1: float):
    """Variance of the next preactivations, given all before, of each layer and network."""
    generator, found = seeded(1), [torch.full((runs,), K1)]
    for _ in range(depth - 1):
        z = torch.randn(runs, width, generator=generator) * found[-1].sqrt().unsqueeze(1)
        found.append(C_b + C_W * s(z).square().mean(1))
    return torch.stack(found, 1).double()


def test_fifty_layers_of_relu_keep_their_second_moment() -> None:
    """Of 600 networks of width 500: each of them differs by 70 % from their mean."""
    for C_W, low, high, runs in ((2.0, 0.9, 1.1, 600), (1.8, 0.0, 0.01, 60), (2.2, 50.0, 200, 60)):
        K = drawn_kernels(torch.relu, 500, 50, runs, 0.0, C_W, 1.0).mean(0)
        assert low < K[-1] < high
        flow = kernel_flow("relu", torch.ones(1, 1, dtype=F64) / C_W**0.5, 50, C_b=0.0, C_W=C_W)
        assert float(flow.K[-1]) == pytest.approx((C_W / 2) ** 49, rel=1e-9)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_fifty_layers_of_relu_by_critical_() -> None:
    x, found = torch.randn(8, 500, generator=seeded()), []
    x = x / x.square().mean(1, keepdim=True).sqrt()
    layers = nn.ModuleList(nn.Linear(500, 500) for _ in range(50))
    for seed in range(400):
        critical_(layers, "relu", generator=seeded(seed))
        with torch.no_grad():
            first = z = layers[0](x)
            for layer in layers[1:]:
                z = layer(z.relu())
        found.append(float(z.square().mean() / first.square().mean()))
    assert 0.9 < torch.tensor(found).mean() < 1.1


def test_the_vertex_by_depth() -> None:
    x = inputs(1)
    for name, depth, expected, rtol in (
        ("relu", 20, 5.0, 1e-12), ("linear", 20, 2.0, 1e-12), ("tanh", 150, 2 / 3, 0.02),
        ("sin", 60, 2 / 3, 0.01),
    ):  # fmt: skip
        flow = kernel_flow(name, x, depth)
        growth = flow.V[1:, 0] / flow.K[1:, 0, 0] ** 2 / torch.arange(1, depth)
        assert float(growth[-1]) == pytest.approx(expected, rel=rtol), name
        if name == "tanh":
            assert float(growth[18]) == pytest.approx(0.63, rel=0.01)  # at layer 20
            assert float(flow.K[-1]) == pytest.approx(1 / 300, rel=0.05)


@pytest.mark.parametrize(("name", "s"), [("relu", torch.relu), ("tanh", torch.tanh),
                                         ("gelu", F.gelu)])  # fmt: skip
def test_the_vertex_and_the_mean_of_drawn_networks(name, s) -> None:
    """Width 200, and 30 for the mean, which moves by one over it."""
    x = torch.full((1, 1), 1.5, dtype=F64)
    point = criticality(name)
    flow = kernel_flow(name, x, 5)
    K1, C_b, C_W = float(flow.K[0]), float(point.C_b), float(point.C_W)
    K = drawn_kernels(s, 200, 5, 10_000, C_b, C_W, K1)
    assert float(K[:, 4].var() * 200) == pytest.approx(float(flow.V[4]), rel=0.06)
    K = drawn_kernels(s, 30, 5, 30_000, C_b, C_W, K1)
    error = 5 * float(K[:, 4].std()) / 30_000**0.5
    moved = float(flow.G1[4]) / 30
    assert float(K[:, 4].mean() - flow.K[4]) == pytest.approx(moved, abs=error + 0.15 * abs(moved))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_relu_of_width_200_leaves_the_leading_order_with_depth() -> None:
    """E K^2 grows by 1 + 5 / n a layer, which the vertex has to first order."""
    K = drawn_kernels(torch.relu, 200, 20, 100_000, 0.0, 2.0, 1.0)
    flow = kernel_flow("relu", torch.full((1, 1), 0.5**0.5), 20)
    for layer in (5, 10, 20):
        found = float(K[:, layer - 1].var() * 200)
        assert found == pytest.approx(200 * (1.025 ** (layer - 1) - 1), rel=0.05)
        first = float(flow.V[layer - 1])
        assert found / first - 1 == pytest.approx({5: 0.034, 10: 0.09, 20: 0.26}[layer], abs=0.05)


def tangent_kernel(s, x, width, depth, rates, point, seeds):
    """Mean over networks and outputs of sum of rate dz/dp dz'/dp, (B, B)."""
    generator, outputs = seeded(2), 4
    sizes = [x.shape[1], *[width] * (depth - 1), outputs]
    total = 0.0
    for _ in range(seeds):
        W = [torch.randn(b, a, generator=generator) * (float(point.C_W) / a) ** 0.5
             for a, b in zip(sizes, sizes[1:])]  # fmt: skip
        b = [torch.randn(n, generator=generator) * float(point.C_b) ** 0.5 for n in sizes[1:]]
        parameters = [t.requires_grad_() for t in (*W, *b)]
        scale = [rates[1][i] / sizes[i] for i in range(depth)] + rates[0]
        z = x
        for i in range(depth):
            z = (s(z) if i else z) @ W[i].mT + b[i]
        for o in range(outputs):
            each = [torch.autograd.grad(z[r, o], parameters, retain_graph=True) for r in (0, 1)]
            total = total + torch.stack([
                torch.stack([sum(k * (p * q).sum() for k, p, q in zip(scale, u, v)) for v in each])
                for u in each
            ])  # fmt: skip
    return total.double() / (seeds * outputs)


def tangent_kernels(width, depth, seeds, activations):
    x = torch.randn(2, 8, generator=seeded(5))
    rates = [0.5, 1.0, 0.7, 1.3][:depth], [1.0, 0.4, 1.5, 0.8][:depth]
    for name, s in activations:
        found = tangent_kernel(s, x, width, depth, rates, criticality(name), seeds)
        flow = kernel_flow(name, x, depth, lam_b=rates[0], lam_W=torch.tensor(rates[1]))
        yield name, found, flow.ntk[-1]


def test_tangent_kernel_of_drawn_networks() -> None:
    for name, found, expected in tangent_kernels(
        400, 3, 3, [("relu", torch.relu), ("tanh", torch.tanh)]
    ):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0, msg=name)


@pytest.mark.exhaustive
def test_tangent_kernel_of_wide_networks() -> None:
    every = [("relu", torch.relu), ("tanh", torch.tanh), ("gelu", F.gelu)]
    for name, found, expected in tangent_kernels(1024, 4, 20, every):
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0, msg=name)


# --------------------------------------------------------------------------------------------------
# nn.init


def test_layers_are_drawn_and_all_else_is_left() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 64, 3, groups=2), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(100, 300),
        nn.Embedding(4, 5),
    )  # fmt: skip
    kept = {n: p.clone() for n, p in net.named_parameters() if n[0] in "14"}
    assert critical_(net, "gelu", generator=seeded()) is net
    C_b, C_W = 0.1729223908, 1.9830582575
    for layer, fan_in in ((net[0], 36), (net[3], 100)):
        assert float(layer.weight.detach().var() * fan_in) == pytest.approx(C_W, rel=0.1)
    assert float(net[3].bias.detach().var()) == pytest.approx(C_b, rel=0.3)
    for name, value in kept.items():
        assert torch.equal(value, net.get_parameter(name))
    critical_(net, "relu")
    assert not net[3].bias.any() and float(net[3].weight.detach().var() * 100) == pytest.approx(
        2, rel=0.1
    )
    assert float(
        critical_(net[3], "tanh", residual=0.6).weight.detach().var() * 100
    ) == pytest.approx(0.64, rel=0.1)
    weight = critical_(torch.empty(300, 100), "leaky_relu", leaky_slope=1.0)
    assert float(weight.detach().var() * 100) == pytest.approx(1, rel=0.1)


def test_transposed_convolution_counts_its_stride() -> None:
    """Two taps in each direction of 4 meet an output, of the channels of its group."""
    layer = nn.ConvTranspose2d(32, 16, 4, 2, groups=2, bias=False)
    critical_(layer, "linear", generator=seeded())
    x = torch.randn(4, 32, 10, 10, generator=seeded(1))
    with torch.no_grad():
        inside = layer(x)[..., 4:-4, 4:-4]
    assert float(inside.square().mean()) == pytest.approx(1, rel=0.1)


def test_random_numbers_are_those_of_the_generator_in_every_dtype() -> None:
    state = torch.get_rng_state()
    first, second = (critical_(torch.empty(4, 3), generator=seeded()) for _ in range(2))
    half = critical_(torch.empty(4, 3, dtype=torch.bfloat16), generator=seeded())
    assert torch.equal(first, second) and torch.equal(half, first.bfloat16())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.empty(4, 3, device="meta").is_meta and critical_(nn.Linear(3, 4, device="meta"))
    weight = nn.Parameter(torch.empty(4, 3))
    assert critical_(weight, generator=seeded()) is weight and torch.equal(weight, first)


def test_shared_parametrized_and_lazy_weights() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    critical_(tied, generator=seeded())
    assert torch.equal(tied[1].weight, critical_(torch.empty(3, 3), generator=seeded()))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(100, 200))
    critical_(normed, generator=seeded())
    assert float(normed.weight.detach().var() * 100) == pytest.approx(2, rel=0.1)
    with pytest.raises(ValueError, match="weight of the layer '0' has no shape yet"):
        critical_(nn.Sequential(nn.LazyLinear(3)))
    # A hook makes the weight anew at each call. Nothing is drawn before the error.
    pruned = prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)
    net = nn.Sequential(nn.Linear(3, 3), pruned)
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match="weight of the layer '1' is made of 'weight_orig'"):
        critical_(net)
    assert torch.equal(net[0].weight, before)


# --------------------------------------------------------------------------------------------------


def test_drawing() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    x = torch.ones(1, 1)
    flows = {str(C): kernel_flow("relu", x, 6, C_b=0.0, C_W=C) for C in (1.8, 2.0)}
    runs = torch.rand(5, 6)
    left, right = pyloss.visualize.draw_kernel_flow(flows, width=50, measured={"2.0": runs})
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["1.8", "2.0"]
    found = right.lines[1].get_ydata()  # at C_W = 2
    torch.testing.assert_close(torch.as_tensor(found), 5 * torch.arange(6.0).double() / 50)
    axes = pyloss.visualize.draw_kernel_flow(flows["2.0"], axes=(left, right))
    assert axes == (left, right)
    with pytest.raises(TypeError, match="flow must be a KernelFlow or a mapping, got int"):
        pyloss.visualize.draw_kernel_flow(3)
    with pytest.raises(ValueError, match="order=1"):
        pyloss.visualize.draw_kernel_flow(kernel_flow("relu", x, 2, order=0))
    matplotlib.pyplot.close("all")
