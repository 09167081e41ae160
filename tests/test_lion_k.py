"""Lion-K: the op against its reference, the optimiser as torch's are."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from lion_k_samples import ARGS, parameters
from torch import Tensor, nn

import pyloss
from pyloss.ops.lion_k import KAPPAS, ROUNDINGS, Options, lion_k_
from pyloss.ops.lion_k.rounding import round_stochastic, tensor_key
from pyloss.optim import Lion, LionK, _kappas
from pyloss.optim import _lion_k_step as steps

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ENGINES = {"kernel": {}, "lists": dict(foreach=True), "one by one": dict(foreach=False)}


def draw_gradients(params: list[nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def options(kappa="l1", rounding="nearest", **change) -> Options:
    return Options(
        KAPPAS[kappa], ROUNDINGS[rounding], False, 0.01, 0.9, 0.99, 0.1,
        0.0 if kappa in ("l1", "given") else 0.5, 2**40 + 7, 3,
    )._replace(**change)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The op


def both(n: int, o: Options, *, x=F32, g=F32, m=F32, **lists: list[Tensor]):
    """(params, momenta, compensation) of the kernel, and of the reference."""
    generator = torch.Generator().manual_seed(n)
    xs, gs, ms = torch.randn(3, n, generator=generator).unbind(0)
    found = []
    for name in (None, "reference"):
        given = [[xs.to(x)], [gs.to(g)], [ms.to(m)]]
        given = [[t.clone() for t in part] for part in given]
        more = {k: [t.clone() for t in v] for k, v in lists.items() if k != "positions"}
        with pyloss.backend(name):
            lion_k_(*given, o, **more, **{k: v for k, v in lists.items() if k == "positions"})
        found.append([given[0][0], given[2][0], *more.get("compensation", [])])
    return found


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("n", [1, 63, 1025, 40_000])  # a tail; two blocks; two ranges
def test_kernel_against_reference(kappa: str, n: int) -> None:
    for x, g, m in [(F32, F32, F32), (F64, F64, F64), (BF16, F32, F32), (F16, F16, F64)]:
        wide = F64 if x == F64 else F32
        given = dict(given=[torch.randn(n).to(wide)]) if kappa == "given" else {}
        o = options(kappa, maximize=n == 63)
        for a, b in zip(*both(n, o, x=x, g=g, m=m, **given)):
            # One spacing: the kernel multiplies and adds with a single rounding.
            own = {F64: 1e-14, F32: 1e-6, BF16: 2**-7, F16: 2**-10}
            rtol = max(own[a.dtype], own[wide])
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_rounding_against_reference(dtype, rounding: str) -> None:
    more = dict(positions=[5]) if rounding == "stochastic" else {}
    if rounding == "compensated":
        more = dict(compensation=[torch.full((5001,), 1e-4, dtype=dtype)])
    kernel, reference = both(5001, options("l1", rounding), x=dtype, g=dtype, m=dtype, **more)
    for a, b in zip(kernel, reference):
        # float32 before the rounding differs in its last digit: a few fall on the other side.
        assert (a != b).sum() <= 5


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding(dtype) -> None:
    """Of numbers of every size: one of the two neighbours, in the mean the number itself."""
    g = torch.Generator().manual_seed(0)
    size = torch.tensor([3e-6, 1e-5, 7e-5, 0.3, 1.0, 60000.0])
    x = torch.rand(6, generator=g).add(1).mul(size).mul(torch.tensor([1.0, -1.0, 1, -1, 1, -0.5]))
    many = x.repeat_interleave(20_000)
    found = round_stochastic(many, dtype, tensor_key(1, 2, 3)).double().view(6, -1)
    low, high = found.amin(1), found.amax(1)
    assert (low <= x).all() and (x <= high).all()
    spacing = (
        torch.nextafter(low.to(dtype), torch.full_like(low.to(dtype), math.inf)).double() - low
    )
    assert (high - low <= spacing).all()
    assert ((found.mean(1) - x).abs() <= 5 * spacing / 2 / math.sqrt(20_000)).all()
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30])
    torch.testing.assert_close(
        round_stochastic(special, dtype, 7), special.to(dtype), equal_nan=True
    )


def test_threads_and_packing_change_no_bit(keep_num_threads) -> None:
    shapes = [(70_001,), (3,), (0,), (), (33, 65), (150_000,)]

    def run(threads: int, together: bool, dtype) -> list[Tensor]:
        torch.set_num_threads(threads)
        params = parameters(*shapes, dtype=dtype)
        kinds = dict(kappa="smooth", kappa_args=dict(e=0.3))
        groups = params if together else [dict(params=[p]) for p in params]
        optimizer = LionK(groups, lr=0.01, weight_decay=0.5, **kinds)
        for step in range(2):
            draw_gradients(params, step)
            optimizer.step()
        return [t for p in params for t in (p.detach(), optimizer.state[p]["exp_avg"])]

    for dtype in (F32, BF16):
        wanted = run(1, True, dtype)
        for threads, together in ((2, True), (3, True), (2, False)):
            for a, b in zip(run(threads, together, dtype), wanted):
                assert torch.equal(a, b)


def test_other_layouts() -> None:
    base = torch.randn(6, 8)
    for view in (base.t(), base[:, ::2], base.as_strided((4, 6), (1, 8)), base[1:, 3:]):
        for g_layout in (view.shape, None):
            x = view.detach()
            g = torch.randn(view.shape) if g_layout else torch.empty_like(x).normal_()
            m = torch.randn(view.shape)
            outside = base.clone()
            wanted = x.clone(), m.clone()
            with pyloss.backend("reference"):
                lion_k_([wanted[0]], [g], [wanted[1]], options("huber"))
            lion_k_([x], [g], [m], options("huber"))
            torch.testing.assert_close((x, m), wanted)
            changed = torch.zeros_like(base).as_strided(x.shape, x.stride(), x.storage_offset())
            changed.fill_(1)
            kept = changed._base == 0
            assert torch.equal(base[kept], outside[kept])


def test_the_version_of_what_is_written_rises() -> None:
    """Else a backward through the old values would be silently wrong."""
    (p,) = parameters((5,))
    loss = (p * p).sum()
    Lion([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_of_an_inference() -> None:
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
        Lion([p], lr=0.5).step()
        assert p.tolist() == [0.5] * 3


def test_opcheck() -> None:
    def arguments(dtype, rounding):
        x, g, m = torch.randn(3, 2, 7).to(dtype).unbind(0)
        o = options("soft", rounding)
        codes = [o.kappa, o.rounding, 0, o.seed, o.step]
        half = rounding == "stochastic"
        return ([*x.unbind(0)], [*g.unbind(0)], [*m.unbind(0)], [], [], None, None, None, codes,
                list(o[3:8]), [0, 1] if half else [])  # fmt: skip

    for dtype, rounding in ((F32, "nearest"), (BF16, "stochastic")):
        torch.library.opcheck(torch.ops.pyloss.lion_k_.default, arguments(dtype, rounding))


# --------------------------------------------------------------------------------------------------
# Lion, bit by bit


def plain_lion(x: Tensor, g: Tensor, m: Tensor, lr: float, decay: float, b1=0.9, b2=0.99) -> None:
    c = m.mul(b1).add_(g, alpha=1 - b1)
    x.mul_(1 - lr * decay)
    x.add_(c.sign_(), alpha=-lr)
    m.mul_(b2).add_(g, alpha=1 - b2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_bits_of_the_plain_loop(engine: str, dtype) -> None:
    params = parameters((3,), (100, 7), (40_000,), (), dtype=dtype)
    x, m = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    optimizer = Lion(params, lr=3e-3, weight_decay=0.7, **ENGINES[engine])
    for step in range(4):
        draw_gradients(params, step)
        for p, a, b in zip(params, x, m):
            plain_lion(a, p.grad, b, 3e-3, 0.7)
        optimizer.step()
    for p, a, b in zip(params, x, m):
        assert torch.equal(p, a) and torch.equal(optimizer.state[p]["exp_avg"], b)


@pytest.mark.parametrize("kappa", ARGS)
def test_engines_agree(kappa: str) -> None:
    """On groups, dtypes, complex numbers and numbers on tensors, over several steps."""

    def run(**engine) -> list[Tensor]:
        plain = parameters((4, 5), (7,))
        z = nn.Parameter(torch.view_as_complex(parameters((3, 2))[0].detach()))
        z.grad = torch.view_as_complex(parameters((3, 2), seed=1)[0].detach())
        double = parameters((6,), dtype=F64)
        half = parameters((4, 3), dtype=BF16)
        groups = [dict(params=plain), dict(params=[z, *double], lr=0.02), dict(params=half, seed=3)]
        optimizer = LionK(
            groups, lr=torch.tensor(0.01), weight_decay=0.5, kappa=kappa, kappa_args=ARGS[kappa],
            **engine,
        )  # fmt: skip
        for _ in range(2):
            optimizer.step()
        return [p.detach() for g in optimizer.param_groups for p in g["params"]]

    wanted = run()
    for engine in list(ENGINES.values())[1:]:
        for a, b in zip(run(**engine), wanted):
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == BF16 else 1e-6, atol=1e-7)


# --------------------------------------------------------------------------------------------------
# Groups of norms


def test_scopes_of_a_norm() -> None:
    """After one step from 0 with no momentum, -x / lr is dK of the gradient."""

    def direction(group: str, kappa: str, **args) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))]
        params[0].grad = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]])
        params[1].grad = torch.tensor([-12.0, 0.5])
        LionK(params, lr=1.0, betas=(0.0, 0.0), kappa=kappa, kappa_args=args, group=group).step()
        return [-p.detach() for p in params]

    a, b = direction("tensor", "lp", p=2)
    torch.testing.assert_close(a, torch.tensor([[0.6, -0.8, 0], [0, 0, 0]]))
    torch.testing.assert_close(b, torch.tensor([-12.0, 0.5]) / math.hypot(12, 0.5))
    a, b = direction("row", "lp", p=2)
    torch.testing.assert_close(a, torch.tensor([[0.6, -0.8, 0], [0, 0, 0]]))
    torch.testing.assert_close(b, torch.tensor([-1.0, 1.0]))  # rows of one element
    a, b = direction("global", "lp", p=2)
    norm = math.sqrt(169.25)
    torch.testing.assert_close(a[0], torch.tensor([3.0, -4.0, 0.0]) / norm)
    torch.testing.assert_close(b, torch.tensor([-12.0, 0.5]) / norm)
    a, b = direction("global", "topk", k=2)
    assert a.tolist() == [[0, -1, 0], [0, 0, 0]] and b.tolist() == [-1, 0]
    a, b = direction("row", "topk", fraction=0.5)
    assert a.tolist() == [[1, -1, 0], [0, 0, 0]] and b.tolist() == [-1, 1]


def test_ties_of_topk_share() -> None:
    c = torch.tensor([2.0, -1.0, 1.0, 1.0, 0.5])
    p = nn.Parameter(torch.zeros(5))
    p.grad = c
    LionK([p], lr=1.0, betas=(0.0, 0.0), kappa="topk", kappa_args=dict(k=3)).step()
    torch.testing.assert_close(-p.detach(), torch.tensor([1.0, -2 / 3, 2 / 3, 2 / 3, 0.0]))


@pytest.mark.parametrize("kappa", ["lp", "topk"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_batches_share_memory_and_no_bits(monkeypatch, kappa: str, dtype) -> None:
    """New memory for each batch of large tensors costs several times its arithmetic."""
    monkeypatch.setattr(steps, "_BATCH", 100)
    shapes = [(80,), (3, 5), (2, 3, 4, 5), (0,), (9, 30), (), (64,)]
    seen, gradient = [], _kappas.KAPPAS[kappa].gradient

    def watched(c: Tensor, args) -> Tensor:
        seen.append(c)
        return gradient(c, args)

    def run(*chosen: int) -> list[Tensor]:
        made = parameters(*shapes, dtype=dtype)
        made[2].data = made[2].data.contiguous(memory_format=torch.channels_last)
        params = [made[at] for at in chosen]
        options = dict(kappa=kappa, kappa_args=ARGS[kappa], group="row", weight_decay=0.1)
        optimizer = LionK(params, lr=0.01, rounding="nearest", maximize=True, **options)
        for _ in range(2):
            optimizer.step()
        return [t.detach() for p in params for t in (p, optimizer.state[p]["exp_avg"])]

    wanted = [t for at in range(len(shapes)) for t in run(at)]
    table = {**_kappas.KAPPAS, kappa: _kappas.KAPPAS[kappa]._replace(gradient=watched)}
    monkeypatch.setattr(_kappas, "KAPPAS", table)
    for a, b in zip(run(*range(len(shapes))), wanted, strict=True):
        assert torch.equal(a, b)
    places = {c.untyped_storage().data_ptr() for c in seen if c.numel()}
    assert len(places) == 2 * (1 + 1)  # of two steps: the common one, and the other layout's


def test_large_and_small_numbers() -> None:
    for kappa in ("lp", "smooth"):
        for size in (1e-30, 1e30):
            p = nn.Parameter(torch.zeros(2))
            p.grad = torch.tensor([3.0, -4.0]) * size
            args = dict(p=2.0) if kappa == "lp" else dict(e=5 * size)
            LionK([p], lr=1.0, betas=(0, 0), kappa=kappa, kappa_args=args).step()
            wanted = [0.6, -0.8] if kappa == "lp" else [3 / math.sqrt(34), -4 / math.sqrt(41)]
            torch.testing.assert_close(-p.detach(), torch.tensor(wanted))


def test_a_function_gets_the_tensor() -> None:
    seen = []

    def softsign(c: Tensor) -> Tensor:
        seen.append((c.shape, c.dtype))
        return c / (1 + c.abs())

    params = [*parameters((2, 3)), *parameters((4,), dtype=BF16)]
    LionK(params, kappa=softsign).step()
    LionK(params, kappa=lambda c: c).step()
    assert seen == [((2, 3), F32), ((4,), F32)]


# --------------------------------------------------------------------------------------------------
# Half types: the decay must not be lost


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("engine", ["kernel", "lists"])
def test_a_small_decay_of_half_types(dtype, engine: str) -> None:
    """lr * decay is 2^-13: far below half the spacing of 1, which is 2^-8 or 2^-11."""
    steps, n = 256, 400
    expected = (1 - 2**-13) ** steps  # 0.969

    def after(rounding: str | None, **more) -> Tensor:
        p = nn.Parameter(torch.ones(n, dtype=dtype))
        p.grad = torch.zeros_like(p)
        options = {**ENGINES[engine], **more}
        optimizer = LionK([p], lr=2**-10, weight_decay=0.125, rounding=rounding, **options)
        for _ in range(steps):
            optimizer.step()
        return p.detach().double()

    assert (after("nearest") == 1).all()
    found = after(None)
    assert abs(found.mean() - expected) < 0.003 and found.unique().numel() > 2
    assert torch.equal(found, after("stochastic"))
    assert not torch.equal(found, after(None, seed=1))
    # Twice the digits of the type.
    assert (after("compensated") - expected).abs().amax() < 0.005


def test_stochastic_rounding_of_tensors_and_steps_differs() -> None:
    params = [nn.Parameter(torch.full((500,), 1.0, dtype=BF16)) for _ in range(2)]
    optimizer = Lion(params, lr=2**-10, weight_decay=0.9)
    history = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        history += [p.detach().clone() for p in params]
    for a in range(4):
        for b in range(a):
            assert not torch.equal(history[a], history[b])


def test_no_global_random_numbers() -> None:
    before = torch.random.get_rng_state()
    Lion(parameters((50,), dtype=BF16)).step()
    assert torch.equal(before, torch.random.get_rng_state())


# --------------------------------------------------------------------------------------------------
# As an optimiser of torch


def test_what_has_no_gradient_stays() -> None:
    params = parameters((3,), (4,))
    params[0].grad = None
    before = [p.detach().clone() for p in params]
    optimizer = Lion(params, weight_decay=0.1)
    assert optimizer.step(lambda: torch.tensor(2.5)) == 2.5
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    assert params[0] not in optimizer.state and optimizer.state[params[1]]["step"] == 1
    assert not params[1].grad.isnan().any()
    optimizer.zero_grad()
    optimizer.step()
    Lion([nn.Parameter(torch.empty(0))]).step()


def test_nothing_but_decay_without_a_gradient_and_momentum() -> None:
    for kappa, args in ARGS.items():
        p = nn.Parameter(torch.arange(6.0))
        p.grad = torch.zeros(6)
        LionK([p], lr=0.5, weight_decay=0.5, kappa=kappa, kappa_args=args).step()
        assert torch.equal(p, 0.75 * torch.arange(6.0)), kappa


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer = Lion(table.parameters())
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        optimizer.step()
    assert not optimizer.state


def test_groups_with_options_of_their_own() -> None:
    a, b, c = parameters((3,), (3,), (3,))
    optimizer = LionK([dict(params=[a], lr=0.1), dict(params=[b], kappa="lp", kappa_args={"p": 2})])
    optimizer.add_param_group(dict(params=[c], betas=(0.5, 0.5), maximize=True, momentum_dtype=F64))
    before = c.detach().clone()
    optimizer.step()
    assert optimizer.param_groups[1]["kappa"] == "lp" and optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(c > before, c.grad > 0)
    assert optimizer.state[c]["exp_avg"].dtype == F64
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be below 1"):
        optimizer.add_param_group(dict(params=parameters((2,)), lr=2.0, weight_decay=0.5))
    with pytest.raises(ValueError, match="kappa 'soft' needs kappa_args"):
        LionK([dict(params=[a], kappa="soft")])
    with pytest.raises(ValueError, match="floating or complex, got torch.int64"):
        Lion([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(RuntimeError, match="needs parameters on cpu or cuda, got meta"):
        Lion([torch.ones(2, device="meta")], fused=True)
    assert "kappa: lp" in repr(optimizer)


def test_a_schedule_that_breaks_the_decay_warns_once() -> None:
    optimizer = Lion(parameters((3,)), lr=0.1, weight_decay=2.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    with pytest.warns(UserWarning, match=r"lr \* weight_decay is 1: from 1 on"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("rounding", [None, "compensated"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_state_dict(dtype, rounding) -> None:
    """A run that was saved, and loaded by another optimiser, goes on as if nothing had happened."""

    def build() -> tuple[list[nn.Parameter], LionK]:
        params = parameters((4, 3), (5,), dtype=dtype)
        return params, LionK(params, lr=0.01, weight_decay=0.1, kappa="lp", kappa_args=dict(p=3),
                             momentum_dtype=F32, rounding=rounding)  # fmt: skip

    def train(params, optimizer, first: int) -> None:
        for step in range(first, first + 2):
            draw_gradients(params, step)
            optimizer.step()

    params, optimizer = build()
    train(params, optimizer, 0)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), file)
    file.seek(0)
    state, values = torch.load(file)
    others, other = build()
    for p, value in zip(others, values):
        p.data.copy_(value)
    other.load_state_dict(state)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert copied.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    train(params, optimizer, 2)
    train(others, other, 2)
    for a, b in zip(params, others):
        assert torch.equal(a, b)
        assert other.state[b]["exp_avg"].dtype == F32 and other.state[b]["step"] == 4


def test_state_dict_for_another_dtype_or_way_to_count() -> None:
    params = parameters((4,))
    optimizer = Lion(params)
    optimizer.step()
    state = optimizer.state_dict()
    half = parameters((4,), dtype=BF16)
    loaded = Lion(half)
    loaded.load_state_dict(state)
    assert loaded.state[half[0]]["exp_avg"].dtype == BF16
    loaded.step()
    on_device = Lion(parameters((4,)), capturable=True)
    on_device.step()
    changed = copy.deepcopy(state)
    changed["param_groups"][0]["capturable"] = True
    # What a hook of the user puts in its place counts.
    loaded.register_load_state_dict_pre_hook(lambda optimizer, given: changed)
    loaded.load_state_dict(state)
    assert loaded.state[half[0]]["step"].dtype == F32 and loaded.state[half[0]]["step"] == 1
    loaded = Lion(parameters((4,)))
    back = on_device.state_dict()
    back["param_groups"][0]["capturable"] = False
    loaded.load_state_dict(back)
    assert type(next(iter(loaded.state.values()))["step"]) is int


@pytest.mark.parametrize("engine", ENGINES)
def test_grad_scaler(engine: str) -> None:
    """Scaled gradients give the same step, gradients come out unscaled, inf skips all of it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a, b = parameters((5,)), parameters((5,))
    scaled, plain = (LionK(p, 0.01, kappa="huber", kappa_args=dict(e=0.1), **ENGINES[engine])
                     for p in (a, b))  # fmt: skip
    unscaled = b[0].grad.clone()
    a[0].grad.mul_(1024)
    scaler.scale(torch.zeros(()))  # makes its state
    scaler.step(scaled)
    scaler.update()
    plain.step()
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[0].grad, unscaled)
    before, state = a[0].detach().clone(), copy.deepcopy(scaled.state[a[0]])
    a[0].grad[2] = math.inf
    scaler.step(scaled)
    scaler.update()
    assert torch.equal(a[0], before) and scaler.get_scale() == 512
    assert scaled.state[a[0]]["step"] == state["step"] == 1
    assert torch.equal(scaled.state[a[0]]["exp_avg"], state["exp_avg"])


def test_what_is_on_the_device_counts() -> None:
    """Numbers that CUDA reads on the device: here the op gets them as CPU tensors."""
    for name in (None, "reference"):
        x, g, m = ([torch.randn(5)] for _ in range(3))
        before = x[0].clone(), m[0].clone()
        with pyloss.backend(name):
            lion_k_(x, g, m, options(), found_inf=torch.ones(1))
            assert torch.equal(x[0], before[0]) and torch.equal(m[0], before[1])
            lion_k_(x, g, m, options(lr=9.0), lr=torch.tensor(0.01), found_inf=torch.zeros(1))
        wanted = [before[0]]
        lion_k_(wanted, g, [before[1]], options())
        torch.testing.assert_close(x, wanted)


COMPILED = {
    "l1": {},
    "kernel": dict(fused=True, dtype=BF16),
    "topk": dict(kappa="topk", kappa_args=dict(k=4), lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("change", COMPILED.values(), ids=COMPILED)
def test_compiled(change) -> None:
    """One graph for all steps, before and after a step that is not compiled."""
    change = dict(change)
    dtype = change.pop("dtype", F32)
    built = []
    for _ in range(2):
        params = parameters((6, 2), (5,), dtype=dtype)
        built.append((params, LionK(params, **{"lr": 0.01, "weight_decay": 0.3, **change})))
    (a, compiled), (b, plain) = built
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(compiled.step, backend="aot_eager")
    for at in range(4):
        draw_gradients(a, at), draw_gradients(b, at)
        (compiled.step if at in (0, 3) else step)()
        plain.step()
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=2**-6 if dtype == BF16 else 1e-6, atol=1e-6)
        assert compiled.state[x]["step"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_schedulers_and_hooks() -> None:
    (p,) = parameters((3,))
    optimizer = Lion([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    before = p.detach().clone()
    optimizer.step()
    schedule.step()
    optimizer.step()
    assert len(seen) == 2 and optimizer.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close((p - before).abs().amax(), torch.tensor(0.15))
