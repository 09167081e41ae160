"""linear_distillation_loss against the formula on whole logits.

`specs/distillation.py` has the formula, finite differences, torch.compile and the errors.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import multiplications
from specs.distillation import rows_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss.functional import linear_distillation_loss
from pyloss.ops import linear_distillation as op
from pyloss.ops.linear_distillation import by_chunks
from pyloss.reference import linear_distillation as reference

DIRECTIONS = ("forward", "reverse", "jsd")
N, V, D, E = 23, 31, 6, 9
NAN = float("nan")


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads) -> None:
    """The tensors are small: threads would only wait for each other."""
    torch.set_num_threads(1)


def make(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Tensor]:
    """Rounded to `dtype`. A third of the rows are ignored."""
    shapes = dict(
        student_hidden=(N, D), student_weight=(V, D), student_bias=(V,),
        teacher_hidden=(N, E), teacher_weight=(V, E), teacher_bias=(V,),
    )  # fmt: skip
    x = {k: (torch.randn(s, dtype=torch.float64) * scale).to(dtype) for k, s in shapes.items()}
    x["target"] = torch.randint(V, (N,))
    x["target"][::3] = -100
    return x


def leaves_of(x: dict[str, Tensor]) -> list[Tensor]:
    names = ("student_hidden", "student_weight", "student_bias")
    return [x[k].requires_grad_() for k in names if k in x]


@pytest.mark.parametrize(
    "with_target, ce_weight", [(False, 0.0), (True, 0.0), (True, 0.3), (True, 1.0)]
)
@pytest.mark.parametrize("reduction", op.REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_formula_and_gradients(
    direction: str, temperature: float, ce_weight: float, reduction: str, with_target: bool
) -> None:
    x = make()
    if not with_target:
        del x["target"]
    kwargs = dict(direction=direction, temperature=temperature, ce_weight=ce_weight, beta=0.3)
    leaves = leaves_of(x)
    found = linear_distillation_loss(**x, **kwargs, reduction=reduction, chunk=8)
    expected = rows_of(**x, **kwargs)
    if reduction == "mean":
        expected = expected.sum() / ((x["target"] != -100).sum() if with_target else N)
    elif reduction != "none":
        expected = expected.sum() / (N if reduction == "batchmean" else 1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(found, leaves, upstream, retain_graph=True)
    want = torch.autograd.grad(expected, leaves, upstream)
    again = torch.autograd.grad(found, leaves, upstream)  # the early gradients are gone by now
    for a, b, c in zip(got, want, again):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(c, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_reference(direction: str, with_target: bool) -> None:
    """The formula, and what the op runs on where the reference is asked for."""
    x = make()
    kwargs = dict(direction=direction, temperature=2.5, beta=0.3, ce_weight=0.3)
    if not with_target:
        del x["target"], kwargs["ce_weight"]
    w = kwargs.get("ce_weight", 0.0)
    options = {**kwargs, "soft": (1 - w) * 2.5**2, "hard": w}
    options.pop("ce_weight", None)
    torch.testing.assert_close(reference(**x, **options), rows_of(**x, **kwargs))

    leaves = leaves_of(x)

    def run(reduction: str) -> list[Tensor]:
        loss = linear_distillation_loss(**x, **kwargs, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]

    for reduction in ("mean", "none"):
        want = run(reduction)
        with pyloss.backend("reference"):
            found = run(reduction)
        for a, b in zip(found, want):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 5, N - 8, N, 1000, "auto"])
def test_chunks_and_blocks(chunk: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(by_chunks._BLOCK_ELEMENTS, "cpu", 3 * V)
    x = make()
    leaves = leaves_of(x)
    found = linear_distillation_loss(**x, chunk=chunk, direction="reverse")
    expected = rows_of(**x, direction="reverse").sum() / (x["target"] != -100).sum()
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dtypes(direction: str, dtype: torch.dtype) -> None:
    """Against float64 on the rounded inputs: not worse than the whole logits in the same dtype."""
    x = make(dtype)
    names = ("student_hidden", "student_weight", "student_bias")
    exact_x = {k: t.double() if t.is_floating_point() else t for k, t in x.items()}
    kwargs = dict(direction=direction, temperature=2.0, ce_weight=0.25)
    count = (x["target"] != -100).sum()
    exact_leaves = leaves_of(exact_x)
    exact = rows_of(**exact_x, **kwargs).sum() / count
    exact_grads = torch.autograd.grad(exact, exact_leaves)

    def unfused(**x: Tensor) -> Tensor:
        t = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"]).float()
        s = F.linear(x["student_hidden"], x["student_weight"], x["student_bias"]).float()
        eye = torch.eye(V)
        return rows_of(s, eye, t, eye, target=x["target"], **kwargs).sum() / count

    def errors(loss: Tensor, leaves: list[Tensor]) -> list[float]:
        grads = torch.autograd.grad(loss, leaves)
        assert [g.dtype for g in grads] == [dtype] * 3
        pairs = zip((loss, *grads), (exact, *exact_grads))
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    leaves = [x[k].requires_grad_() for k in names]
    loss = linear_distillation_loss(**x, **kwargs, chunk=6)
    assert loss.dtype == torch.float32
    ours, theirs = errors(loss, leaves), errors(unfused(**x), leaves)
    floor = 4 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs):
        assert a <= max(1.2 * b, floor), (ours, theirs)


def test_half_gradients_of_many_rows_keep_their_size() -> None:
    """float16: p / N would be below the smallest number, but for the upstream loss scale."""
    x = {
        "student_hidden": torch.randn(4, 8).half(), "student_weight": torch.zeros(8000, 8).half(),
        "teacher_hidden": torch.randn(4, 8).half(), "teacher_weight": torch.zeros(8000, 8).half(),
    }  # fmt: skip
    x["teacher_weight"][:4000] = 0.05
    (leaf,) = [x["student_weight"].requires_grad_()]
    loss = linear_distillation_loss(**x, num_items=2**14)
    (grad,) = torch.autograd.grad(loss * 2.0**14, leaf)
    wide = {k: t.detach().float() for k, t in x.items()}
    leaf = wide["student_weight"].requires_grad_()
    (exact,) = torch.autograd.grad(rows_of(**wide).sum(), leaf)
    assert exact.abs().max() > 0
    assert ((grad.float() - exact).norm() / exact.norm()).item() < 5e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_ignored_rows_are_never_read(direction: str, bad: float) -> None:
    x = make()
    drop = x["target"] == -100

    def run(fill: float, reduction: str) -> list[Tensor]:
        y = dict(x)
        for name in ("student_hidden", "teacher_hidden"):
            y[name] = torch.where(drop[:, None], fill, x[name])
        leaves = leaves_of(y)
        loss = linear_distillation_loss(
            **y, direction=direction, ce_weight=0.5, reduction=reduction, chunk=4
        )
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    for reduction in ("mean", "none"):
        found, expected = run(bad, reduction), run(0.0, reduction)
        for a, b in zip(found, expected):
            assert torch.equal(a, b)
        assert (found[1][drop] == 0).all() and (found[1][~drop] != 0).any()
    assert (found[0][drop] == 0).all()


def test_rows_that_cannot_be_skipped_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of devices where skipping rows would synchronise, on a CPU."""
    monkeypatch.setattr(Tensor, "is_cpu", False)
    x = make()
    drop = x["target"] == -100
    for name in ("student_hidden", "teacher_hidden"):
        x[name][drop] = NAN
    leaves = leaves_of(x)
    kwargs = dict(ce_weight=0.5, temperature=2.0)
    clean = {k: t.detach().nan_to_num(0.0) if k != "target" else t for k, t in x.items()}
    clean_leaves = leaves_of(clean)
    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(**x, **kwargs, reduction=reduction, chunk=4)
        expected = rows_of(**clean, **kwargs)
        expected = expected.sum() / (~drop).sum() if reduction == "mean" else expected
        torch.testing.assert_close(loss, expected)
        got = torch.autograd.grad(loss.sum(), leaves)
        for a, b in zip(got, torch.autograd.grad(expected.sum(), clean_leaves)):
            torch.testing.assert_close(a, b)
    # A label out of range cannot be raised there: it is seen in the row, and only there.
    x["target"][1] = V
    rows = linear_distillation_loss(**x, **kwargs, reduction="none")
    assert rows[1].isnan() and rows.isnan().sum() == 1
    assert torch.autograd.grad(rows[1], leaves[0])[0][1].isnan().all()


def test_no_rows() -> None:
    x = make()
    x["target"][:] = -100
    leaves = leaves_of(x)
    for reduction, expected in (("mean", NAN), ("sum", 0.0), ("batchmean", 0.0)):
        loss = linear_distillation_loss(**x, reduction=reduction)
        assert loss.item() == expected or (expected != expected and loss.isnan())
        for g in torch.autograd.grad(loss, leaves):
            assert (g == 0).all()
    assert linear_distillation_loss(**x, num_items=7).item() == 0.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits(direction: str) -> None:
    """Logits of 1e4: probabilities are 0 and 1, and 0 log 0 is 0."""
    eye = torch.eye(3)
    s = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, 0.0], [5.0, 5.0, 5.0]])
    t = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0], [5.0, 5.0, 5.0]])
    x = s.clone().requires_grad_()
    rows = linear_distillation_loss(x, eye, t, eye, direction=direction, reduction="none")
    expected = math.log(2) if direction == "jsd" else 1e4
    assert rows.tolist() == pytest.approx([0.0, expected, 0.0], abs=1e-6)
    (grad,) = torch.autograd.grad(rows.sum(), x)
    assert grad.isfinite().all()
    if direction == "forward":
        assert grad[1].tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_excluded_classes(direction: str) -> None:
    """A logit of -inf in both models adds nothing; the others are those of the smaller softmax."""
    x = make()
    del x["target"]
    masked = dict(x)
    for name in ("student_bias", "teacher_bias"):
        masked[name] = x[name].clone()
        masked[name][4:7] = -math.inf
    keep = [i for i in range(V) if i not in (4, 5, 6)]
    small = {k: t if k.endswith("hidden") else t[keep].clone() for k, t in x.items()}
    leaves, small_leaves = leaves_of(masked), leaves_of(small)
    found = linear_distillation_loss(**masked, direction=direction, temperature=1.5)
    expected = rows_of(**small, direction=direction, temperature=1.5).mean()
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found, leaves)
    want = torch.autograd.grad(expected, small_leaves)
    torch.testing.assert_close(grads[0], want[0])
    torch.testing.assert_close(grads[1][keep], want[1])
    torch.testing.assert_close(grads[2][keep], want[2])
    assert (grads[1][4:7] == 0).all() and (grads[2][4:7] == 0).all()


def test_one_sided_exclusion() -> None:
    eye, bias = torch.eye(2), torch.tensor([0.0, -math.inf])
    h = torch.zeros(1, 2)

    def loss(direction: str, **kwargs: Tensor) -> float:
        return linear_distillation_loss(h, eye, h, eye, direction=direction, **kwargs).item()

    assert loss("forward", student_bias=bias) == math.inf
    assert loss("reverse", teacher_bias=bias) == math.inf
    assert loss("forward", teacher_bias=bias) == pytest.approx(math.log(2))
    assert loss("reverse", student_bias=bias) == pytest.approx(math.log(2))
    p, q, m = (1.0, 0.0), (0.5, 0.5), (0.75, 0.25)
    expected = 0.5 * p[0] * math.log(p[0] / m[0])
    expected += 0.5 * sum(b * math.log(b / c) for b, c in zip(q, m))
    assert loss("jsd", teacher_bias=bias) == pytest.approx(expected)


def test_jsd_between_the_divergences() -> None:
    """JSD / beta goes to the forward KL, JSD / (1 - beta) to the reverse KL."""
    x = make(scale=0.4)
    for beta, direction, scale in ((1e-6, "forward", 1e-6), (1 - 1e-6, "reverse", 1e-6)):
        near = linear_distillation_loss(**x, direction="jsd", beta=beta) / scale
        torch.testing.assert_close(
            near, linear_distillation_loss(**x, direction=direction), rtol=1e-3, atol=0
        )
    swapped = dict(
        student_hidden=x["teacher_hidden"], student_weight=x["teacher_weight"],
        teacher_hidden=x["student_hidden"], teacher_weight=x["student_weight"],
    )  # fmt: skip
    straight = {k: x[k] for k in swapped}
    torch.testing.assert_close(
        linear_distillation_loss(**swapped, direction="jsd", beta=0.3),
        linear_distillation_loss(**straight, direction="jsd", beta=0.7),
    )


def test_student_equal_to_teacher() -> None:
    h, w = torch.randn(7, 5), torch.randn(300, 5)
    student = h.clone().requires_grad_()
    for direction in DIRECTIONS:
        loss = linear_distillation_loss(student, w, h, w, direction=direction, temperature=3.0)
        (grad,) = torch.autograd.grad(loss, student)
        assert abs(loss.item()) < 1e-6 and grad.abs().max() < 1e-6


def test_shapes_shift_and_strides() -> None:
    b, t = 3, 8
    hs, ht = torch.randn(b, t, D), torch.randn(t, b, E).transpose(0, 1)
    ws, wt = torch.randn(D, V).t(), torch.randn(V, 2 * E)[:, ::2]
    y = torch.randint(V, (b, t), dtype=torch.int32)
    y[0, :4] = -100
    leaf = hs.requires_grad_()
    kwargs = dict(target=y, ce_weight=0.4)
    for k in (0, 1, 3):
        found = linear_distillation_loss(leaf, ws, ht, wt, **kwargs, shift=k, reduction="none")
        flat = [a[:, : t - k].reshape(b * (t - k), -1) for a in (leaf, ht)]
        target = y[:, k:].reshape(-1).long()
        expected = rows_of(flat[0], ws, flat[1], wt, target=target, ce_weight=0.4)
        torch.testing.assert_close(found, expected.view(b, t - k))
        mean = linear_distillation_loss(leaf, ws, ht, wt, **kwargs, shift=k)
        torch.testing.assert_close(mean, expected.sum() / (target != -100).sum())
        for loss, want in ((found.sum(), expected.sum()), (mean, mean.detach() * 0 + mean)):
            got = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            torch.testing.assert_close(got, torch.autograd.grad(want, leaf)[0])
    batch = linear_distillation_loss(leaf, ws, ht, wt, reduction="batchmean")
    torch.testing.assert_close(
        batch, linear_distillation_loss(leaf, ws, ht, wt, reduction="sum") / b
    )
    one = linear_distillation_loss(leaf[0, 0], ws, ht[0, 0], wt, target=y[1, 0], reduction="none")
    assert one.shape == ()


def test_uint8_target_has_no_ignored_156() -> None:
    h, w = torch.randn(2, 4), torch.randn(200, 4)
    y = torch.tensor([156, 3], dtype=torch.uint8)  # 156 is -100 as uint8
    args = (h, w, torch.randn(2, 4), w)
    rows = linear_distillation_loss(*args, target=y, ce_weight=0.5, reduction="none")
    assert (rows > 0).all()


def test_num_items_and_temperature_scale() -> None:
    x = make()
    total = linear_distillation_loss(**x, reduction="sum", temperature=2.0)
    for items in (40, torch.tensor(40)):
        found = linear_distillation_loss(**x, num_items=items, temperature=2.0)
        torch.testing.assert_close(found, total / 40)
    bare = linear_distillation_loss(**x, reduction="sum", temperature=2.0,
                                    scale_by_temperature=False)  # fmt: skip
    torch.testing.assert_close(bare * 4, total)


def test_mixed_dtypes_of_the_two_models() -> None:
    x = make(torch.float32)
    for k in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        x[k] = x[k].bfloat16()
    leaves = leaves_of(x)
    loss = linear_distillation_loss(**x)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))
    t = F.linear(x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"]).float()
    x.update(teacher_hidden=t, teacher_weight=torch.eye(V), teacher_bias=None)
    torch.testing.assert_close(loss, linear_distillation_loss(**x))


def test_only_what_is_asked_for_is_computed() -> None:
    names = ("student_hidden", "student_weight", "student_bias")
    x = make()
    leaves = leaves_of(x)
    everything = torch.autograd.grad(linear_distillation_loss(**x), leaves)
    for name, expected in zip(names, everything):
        y = {k: t.detach() for k, t in x.items()}
        leaf = y[name].requires_grad_()
        (grad,) = torch.autograd.grad(linear_distillation_loss(**y), leaf)
        torch.testing.assert_close(grad, expected)
        work = multiplications(lambda y=y: linear_distillation_loss(**y, chunk=4).backward())
        rows = int((x["target"] != -100).sum())
        assert work == rows * V * (D + E + D * (name != "student_bias"))


def test_teacher_gets_no_gradient() -> None:
    x = make()
    leaves = [x[k].requires_grad_() for k in x if k != "target"]
    loss = linear_distillation_loss(**x)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = [k for k in x if k != "target"]
    assert {n for n, g in zip(names, grads) if g is not None} == {n for n in names if "stud" in n}
    with torch.inference_mode():
        teacher = torch.randn(N, E, dtype=torch.float64) + 1
    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(
            **(x | {"teacher_hidden": teacher}), reduction=reduction
        ).sum()
        assert torch.autograd.grad(loss, x["student_weight"])[0].isfinite().all()
    with torch.no_grad():
        assert not linear_distillation_loss(**x).requires_grad


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_second_derivative(direction: str) -> None:
    """A penalty on the gradient, and one gradient after another from one graph."""
    x = make()
    leaves = leaves_of(x)
    kwargs = dict(direction=direction, temperature=1.7, ce_weight=0.3)

    def expected(reduction: str) -> Tensor:
        rows = rows_of(**x, **kwargs)
        return rows.square() if reduction == "none" else rows.sum() / (x["target"] != -100).sum()

    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(**x, **kwargs, reduction=reduction)
        loss = loss.square() if reduction == "none" else loss
        found = []
        for value in (loss.sum(), expected(reduction).sum()):
            first = torch.autograd.grad(value, leaves, create_graph=True)
            penalty = value + sum(g.square().sum() for g in first)
            found.append([*first, *torch.autograd.grad(penalty, leaves)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)


def test_many_upstream_gradients_at_once() -> None:
    x = make()
    leaves = leaves_of(x)
    for reduction, shape in (("none", (3, N)), ("mean", (3,))):
        loss = linear_distillation_loss(**x, reduction=reduction)
        upstream = torch.randn(shape, dtype=loss.dtype)
        found = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
        for i in range(3):
            loss = linear_distillation_loss(**x, reduction=reduction)
            for a, b in zip(found, torch.autograd.grad(loss, leaves, upstream[i])):
                torch.testing.assert_close(a[i], b)


def test_each_sample_has_a_gradient_of_its_own() -> None:
    """grad under vmap, over labels too, some of them ignored."""
    x = make()

    def loss(weight: Tensor, hidden: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        return linear_distillation_loss(
            hidden, weight, teacher, x["teacher_weight"], target=y, ce_weight=0.4, empty="zero"
        )

    many = x["student_hidden"], x["teacher_hidden"], x["target"]
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(x["student_weight"], *many)
    for i, row in enumerate(found):
        leaf = x["student_weight"].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, *(t[i] for t in many)), leaf)
        torch.testing.assert_close(row, want)


def test_inputs_are_not_changed() -> None:
    x = make()
    before = {k: t.clone() for k, t in x.items()}
    leaves = leaves_of(x)
    linear_distillation_loss(**x, ce_weight=0.5).backward()
    assert all(torch.equal(x[k], before[k]) for k in x)
    first = [t.grad.clone() for t in leaves]
    linear_distillation_loss(**x, ce_weight=0.5).backward()
    for a, b in zip(first, leaves):
        torch.testing.assert_close(2 * a, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast(dtype: torch.dtype) -> None:
    x = make(dtype)
    leaves = leaves_of(x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation_loss(**x)
        grads = torch.autograd.grad(loss, leaves)  # backward under autocast too
    assert [g.dtype for g in grads] == [dtype] * 3
    assert loss.dtype == dtype
    if dtype == torch.float64:  # autocast leaves float64 alone
        torch.testing.assert_close(loss, rows_of(**x).sum() / (x["target"] != -100).sum())
        return
    half = {k: t.detach().bfloat16() if t.is_floating_point() else t for k, t in x.items()}
    half_leaves = leaves_of(half)
    expected = linear_distillation_loss(**half)
    assert loss.item() == expected.item()
    for a, b in zip(grads, torch.autograd.grad(expected, half_leaves)):
        assert torch.equal(a, b.to(dtype))
    # float32 without autocast, but backward under it: nothing is rounded.
    loss = linear_distillation_loss(**x, reduction="none").sum()
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(rows_of(**x).sum(), leaves)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    x = make()
    leaves = leaves_of(x)

    def f(hidden: Tensor) -> Tensor:
        return linear_distillation_loss(**(x | {"student_hidden": torch.tanh(hidden)}))

    expected = torch.autograd.grad(f(leaves[0]), leaves)
    checkpoint(f, leaves[0], use_reentrant=use_reentrant).backward()
    for leaf, want in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, want)


def test_opcheck() -> None:
    x = make()
    tensors = [x[k] for k in ("student_hidden", "student_weight", "student_bias")]
    tensors += [x[k] for k in ("teacher_hidden", "teacher_weight", "teacher_bias", "target")]
    for wants in (op.VALUE, 14, 15):
        args = (*tensors, torch.ones(N).double(), [1.0, 0.5, 1.0, 0.0], [0, -100, 5], wants)
        torch.library.opcheck(
            torch.ops.pyloss.linear_distillation.default, args,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


class Sizes(TorchDispatchMode):
    """The largest result of any operation, inside our op too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.ops = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(func)
        if func is torch.ops.pyloss.linear_distillation.default:
            with self:
                return by_chunks.forward(*args)
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_of_the_size_of_the_logits(
    direction: str, reduction: str, dtype: torch.dtype
) -> None:
    n, v, d, chunk = 96, 500, 4, 16
    tensors = [torch.randn(s).to(dtype) for s in ((n, d), (v, d), (n, d), (v, d))]
    student = [t.requires_grad_() for t in tensors[:2]]
    y = torch.randint(v, (n,))
    y[::4] = -100
    with Sizes() as sizes:
        loss = linear_distillation_loss(
            *tensors, target=y, ce_weight=0.5, temperature=2.0, direction=direction,
            reduction=reduction, chunk=chunk,
        )  # fmt: skip
        torch.autograd.grad(loss.sum(), student)
    assert torch.ops.aten.log_softmax.int in sizes.ops  # the mode has seen into the op
    assert sizes.largest <= chunk * v < n * v // 4


def test_distillation_teaches() -> None:
    teacher_hidden, teacher_weight = torch.randn(64, 8), torch.randn(50, 8)
    for direction in DIRECTIONS:
        hidden = torch.randn(64, 4, requires_grad=True)
        weight = torch.randn(50, 4, requires_grad=True)
        optimizer = torch.optim.Adam([hidden, weight], lr=0.1)
        losses = []
        for _ in range(25):
            loss = linear_distillation_loss(
                hidden, weight, teacher_hidden, teacher_weight, direction=direction
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_chunk(device: str) -> None:
    low, high = (256, 512) if device == "cpu" else (512, 4096)
    sizes = [op.auto_chunk(device, v) for v in (1, 1000, 16384, 32000, 128256, 262144)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == high and sizes[-1] == low
