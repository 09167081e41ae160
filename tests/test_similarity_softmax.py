"""similarity_softmax: the reference by hand, the op against it with every mask, edges, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import pyloss
from pyloss import _C
from pyloss.ops import _gemm
from pyloss.ops.similarity_softmax import (
    by_tiles,
    loss,
    margin_sums,
    pair_sums,
    similarity_softmax,
    unit,
    unit_rows,
)
from pyloss.ops.similarity_softmax.call import COLUMNS
from pyloss.reference.similarity_softmax import margin_sums as reference_margins
from pyloss.reference.similarity_softmax import pair_sums as reference_sums
from pyloss.reference.similarity_softmax import similarity_softmax as reference

SUMS = ("lse", "positive", "column_lse", "column_positive")


def problem(n=37, m=53, d=7, dtype=torch.float64, grad=True):
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(r, d, generator=g, dtype=dtype) for r in (n, m))
    return queries.requires_grad_(grad), keys.requires_grad_(grad)


def ids(n: int, m: int, classes: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    query_ids, key_ids = (torch.randint(classes, (r,), generator=g) for r in (n, m))
    return dict(query_ids=query_ids, key_ids=key_ids)


def targets(n: int, m: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    found = torch.randint(m, (n,), generator=g) if m else torch.zeros(n, dtype=torch.int64)
    found[::7] = -1
    return found


def masks(n: int, m: int, same: str) -> list[dict]:
    """All combinations of what can be left out or positive beside equal ids."""
    given = {} if same == "ignore" else ids(n, m)
    return [
        dict(first=first, target=target, same=same, denominator=denominator, **given)
        for first, target, denominator in itertools.product(
            (-1, 0, 3), (None, targets(n, m)), ("all", "negatives")
        )
    ]


def total(stats) -> torch.Tensor:
    """A function of all sums that is finite where a denominator is empty."""
    sums = [t for t in (getattr(stats, name) for name in SUMS) if t is not None]
    weights = [torch.linspace(-1, 0.5 + i, len(t), dtype=t.dtype) for i, t in enumerate(sums)]
    return sum((torch.where(t.isinf(), 0.0, t) * w).sum() for t, w in zip(sums, weights))


def compare(queries, keys, scale, rtol=1e-12, columns=True, **options) -> None:
    sources = [t for t in (queries, keys, scale) if isinstance(t, torch.Tensor) and t.requires_grad]
    sources = list({id(t): t for t in sources}.values())
    options |= dict(columns=columns, mean=True)
    found = similarity_softmax(queries, keys, scale, **options)
    expected = reference(queries, keys, scale, **options)
    for name, a, b in zip(found._fields, found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            said = f"{name} of {options}"
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m, s=said: s + m)
    gradients = [torch.autograd.grad(total(s), sources) for s in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=10 * rtol)


@pytest.fixture(params=["own", "tiles"])
def path(request, monkeypatch):
    """The kernel, and tiles of torch operations that end within rows and columns."""
    if request.param == "tiles":
        monkeypatch.setattr(by_tiles, "TILE", (16, 20))
    return request.param


def test_reference_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    z = [[1.0, 0.0, 3.0], [0.0, 2.0, 2.0]]
    e = [[math.exp(x) for x in row] for row in z]
    found = reference(queries, keys, target=torch.tensor([2, -1]), columns=True, mean=True)
    assert found.lse.tolist() == pytest.approx([math.log(sum(row)) for row in e])
    assert found.positive.tolist() == [3, 0] and found.positives.tolist() == [1, 0]
    assert found.count.tolist() == [3, 3] and found.column_count.tolist() == [2, 2, 2]
    means = [sum(x * y for x, y in zip(a, b)) / sum(b) for a, b in zip(z, e)]
    assert found.mean.tolist() == pytest.approx(means)
    sums = [math.log(e[0][j] + e[1][j]) for j in range(3)]
    assert found.column_lse.tolist() == pytest.approx(sums)
    assert found.column_positive.tolist() == [0, 0, 3]
    assert found.column_positives.tolist() == [0, 0, 1]
    # Without the own key, which is no positive either; and with the negatives alone.
    own = dict(first=1, target=torch.tensor([1, 0]), denominator="negatives")
    found = reference(queries, keys, torch.tensor([1.0, 2.0]), **own)
    assert found.lse.tolist() == pytest.approx([math.log(e[0][0] + e[0][2]), 4.0])
    assert found.positives.tolist() == [0, 1] and found.count.tolist() == [2, 1]
    same = dict(query_ids=torch.tensor([4, 5]), key_ids=torch.tensor([5, 4, 4]))
    found = reference(queries, keys, **same, same="positive")
    assert found.positive.tolist() == [3, 0] and found.positives.tolist() == [2, 1]
    found = reference(queries, keys, **same, same="drop", target=torch.tensor([1, 2]))
    assert found.count.tolist() == [2, 2] and found.positive.tolist() == [0, 2]


# Of the scales: exp z is summed as it is, or with the largest z taken off.
LARGEST = (1.0, 200.0)


# In blocks of 64, so that these have pairs of blocks, and a part of one.
@pytest.mark.parametrize("same", ["ignore", "positive", "drop"])
def test_masks(path, same) -> None:
    n, m = (21, 33) if path == "tiles" else (70, 140)
    for largest in LARGEST:
        scale = torch.linspace(-0.2, 1, n, dtype=torch.float64).mul(largest).requires_grad_()
        for options in masks(n, m, same):
            compare(*problem(n, m), scale, rtol=1e-12 * largest, **options)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("same", ["ignore", "positive", "drop"])
def test_a_tensor_with_itself(path, same, columns) -> None:
    x = problem(33 if path == "tiles" else 140)[0]
    for largest in LARGEST:
        scale = torch.tensor(largest, dtype=torch.float64, requires_grad=True)
        for options in masks(len(x), len(x), same):
            if "key_ids" in options:
                options["key_ids"] = options["query_ids"]
            compare(x, x, scale, rtol=1e-12 * largest, columns=columns, **options)


def test_a_tensor_with_itself_under_two_names(path) -> None:
    """Equal ids of (i, j) are then not those of (j, i)."""
    x = problem(33)[0]
    for options in masks(33, 33, "positive"):
        compare(x, x, 0.7, **options)


@pytest.mark.parametrize("which", ["queries", "keys", "scale"])
def test_gradient_of_one_alone(path, which) -> None:
    queries, keys = problem(grad=False)
    given = dict(queries=queries, keys=keys, scale=torch.tensor(0.5, dtype=torch.float64))
    given[which].requires_grad_()
    compare(**given, target=targets(37, 53))


@pytest.mark.parametrize("name", SUMS)
def test_gradient_of_one_result_alone(path, name) -> None:
    for queries, keys in (problem(), (problem(53)[0],) * 2):
        sources = (queries,) if keys is queries else (queries, keys)
        found, expected = (
            f(queries, keys, 0.5, first=0, target=targets(*map(len, (queries, keys))), columns=True)
            for f in (similarity_softmax, reference)
        )
        grads = [torch.autograd.grad(getattr(s, name).sum(), sources) for s in (found, expected)]
        torch.testing.assert_close(*grads)


def test_derivatives() -> None:
    queries, keys = problem(3, 4, 2)
    scale = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64, requires_grad=True)

    def sums(queries, keys, scale):
        found = similarity_softmax(
            queries, keys, scale, first=1, target=torch.tensor([0, 3, -1]), columns=True, mean=True
        )
        return tuple(getattr(found, name) for name in SUMS)

    torch.autograd.gradcheck(
        sums, (queries, keys, scale), check_forward_ad=True, check_batched_grad=True
    )
    torch.autograd.gradgradcheck(sums, (queries, keys, scale))
    torch.autograd.gradgradcheck(lambda q: similarity_softmax(q, q, first=0).lse, (queries,))


def same_sums(found, expected, sources) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-12, atol=1e-12)
    w = torch.linspace(-1, 1, found[0].numel(), dtype=found[0].dtype)
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t in ts if t.requires_grad), sources)
        for ts in (found, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("self", [False, True])
@pytest.mark.parametrize("same", ["ignore", "positive", "drop"])
def test_sums_of_pairs(path, same, self) -> None:
    queries, keys = problem(45, 45)
    given = {} if same == "ignore" else ids(45, 45)
    if self:
        keys = queries
        given = dict.fromkeys(given, given.get("query_ids"))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, -0.4))
    options = dict(first=0 if self else 2, target=targets(45, 45), same=same, **given)
    sources = (queries, scale) if self else (queries, keys, scale)
    found, expected = (
        f(queries, keys, scale, bias, **options) for f in (pair_sums, reference_sums)
    )
    same_sums([found], [expected], (*sources, bias))
    found, expected = (
        f(queries, keys, scale, 0.3, -0.1, **options) for f in (margin_sums, reference_margins)
    )
    same_sums(found, expected, sources)


def test_derivatives_of_sums() -> None:
    queries, keys = problem(3, 4, 2)
    bias = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -1])

    def sigmoid(queries, keys, bias):
        return pair_sums(queries, keys, 0.7, bias, target=target, first=1)

    def margins(queries, keys, bias):
        return margin_sums(queries, keys, 1.0, 0.1, 0.3, target=target)[::2]

    for function in (sigmoid, margins):
        torch.autograd.gradcheck(
            function, (queries, keys, bias), check_forward_ad=True, check_batched_grad=True
        )
        torch.autograd.gradgradcheck(function, (queries, keys, bias))


OPS = torch.ops.pyloss


def by_classes(x1, x2, temperature=0.1, **options) -> torch.Tensor:
    """Of three classes, and rows alone in theirs."""
    x = torch.cat([x1, x2])
    at = torch.arange(len(x))
    labels = torch.where(at % 4 > 0, at % 3, -at)
    return pyloss.supervised_contrastive(x, labels, temperature=temperature, **options)


LOSSES = {  # flags of the op; a loss that it serves, and the name of the scale there
    "views": (loss.VIEWS, pyloss.nt_xent, "temperature"),
    "keys": (0, pyloss.info_nce, "temperature"),
    "columns": (COLUMNS, pyloss.clip_loss, "logit_scale"),
    "labels": (0, by_classes, "temperature"),
    "sigmoid": (loss.SIGMOID, pyloss.siglip_loss, "logit_scale"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [0, 1, 2, 150])
def test_losses_at_once(name, rows, keep_num_threads) -> None:
    """Are the means and sums of those of the rows, with any of the gradients, on any threads."""
    _, function, scale = LOSSES[name]
    x1, x2 = problem(rows, rows, 5)
    with torch.no_grad():
        x1[1:2] = 0.0
    leaves = {"x1": x1, "x2": x2, scale: torch.tensor(2.0).double().requires_grad_()}
    if name == "sigmoid":
        leaves["logit_bias"] = torch.tensor(-0.5).double().requires_grad_()

    def step(wanted, reduction):
        given = {k: t if k in wanted else t.detach() for k, t in leaves.items()}
        out = function(given.pop("x1"), given.pop("x2"), **given, reduction=reduction)
        to = out.sum() / max(1, int(out.detach().ne(0).sum()))  # others do not count
        return [to.detach(), *torch.autograd.grad(to, [leaves[k] for k in wanted])]

    for wanted in (list(leaves), *([k] for k in leaves)):
        torch.testing.assert_close(step(wanted, "mean"), step(wanted, "none"))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(step(list(leaves), "sum"))
    count = max(1, int(function(x1, x2, reduction="none").ne(0).sum()))
    for one, two, of_mean in zip(*found, step(list(leaves), "mean")):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, of_mean * count)


@pytest.mark.parametrize("name", LOSSES)
def test_opcheck_of_losses(name) -> None:
    flags = LOSSES[name][0]
    x1, x2 = problem(6, 6, grad=False)
    one = torch.tensor(1.5).double()
    bias, labels = one if name == "sigmoid" else None, None
    if name == "labels":
        x2, labels = None, torch.tensor([0, 1, 1, 0, 0, 7])
    args = (x1, x2, 1.0, one, 0.0, bias, labels, flags)
    torch.library.opcheck(OPS.similarity_loss_fwd, args)
    value, *saved = OPS.similarity_loss_fwd(*args)
    want = {"sigmoid": 15, "labels": 5}.get(name, 7)
    backward = (x1, x2, *saved, one, *args[2:], want)
    torch.library.opcheck(OPS.similarity_loss_bwd, backward)
    with pyloss.backend("reference"):
        torch.testing.assert_close(value, OPS.similarity_loss_fwd(*args)[0])
        expected = OPS.similarity_loss_bwd(*backward)
    torch.testing.assert_close(OPS.similarity_loss_bwd(*backward), expected)


TENSORS = (targets(9, 12), *ids(9, 12).values())


def test_opcheck() -> None:
    queries, keys = problem(9, 12, grad=False)
    scales, rows, columns = torch.ones(9).double(), torch.ones(9).double(), torch.ones(12).double()
    pairs = (queries, keys, 1.0, scales, *TENSORS, 1, 1 + 8 + 16)
    torch.library.opcheck(OPS.similarity_softmax_fwd, pairs)
    backward = (*pairs, 7, rows, columns, rows, rows, columns, None)
    torch.library.opcheck(OPS.similarity_softmax_bwd, backward)
    pairs = (queries, keys, 1.0, scales, *TENSORS, 1, 1)
    bias = torch.tensor(0.5).double()
    torch.library.opcheck(OPS.similarity_sums_fwd, (*pairs, bias, [0.0], 0))
    torch.library.opcheck(OPS.similarity_sums_bwd, (*pairs, bias, [0.0], 0, 15, rows, None))


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("first", [-1, 0])
def test_few_rows(path, n, m, first) -> None:
    compare(*problem(n, m), 0.5, first=first, target=targets(n, m))
    sums = [f(*problem(n, m), 0.5, 0.1, first=first) for f in (pair_sums, reference_sums)]
    torch.testing.assert_close(*sums)


def test_empty_denominators(path) -> None:
    """A query alone in its class has no positive, and one whose keys are all dropped nothing."""
    queries, keys = problem(6, 6)
    one = torch.zeros(6, dtype=torch.int64)
    same = dict(query_ids=one, key_ids=one, same="drop")
    found = similarity_softmax(queries, keys, columns=True, mean=True, **same)
    assert (found.lse == -math.inf).all() and (found.column_lse == -math.inf).all()
    assert not any(t.any() for t in (found.count, found.positive, found.positives, found.mean))
    grads = torch.autograd.grad(found.lse.sum() + found.column_lse.sum(), (queries, keys))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite(path, value) -> None:
    """Shows in the rows and columns that it meets, and in no other."""
    queries, keys = problem(20, 30, 5)
    with torch.no_grad():
        queries[3, 1] = value
        keys[7, 0] = math.nan
    found = similarity_softmax(queries, keys, first=4, columns=True)
    rows = torch.ones(20, dtype=torch.bool)
    rows[3] = False  # its own key is the seventh
    assert found.lse[rows].isnan().all()
    assert found.column_lse[7].isnan()
    if math.isnan(value):
        assert found.lse[3].isnan() and found.column_lse.isnan().sum() == 30
    elsewhere = similarity_softmax(queries[4:], keys[8:]).lse
    assert elsewhere.isfinite().all()
    (grad,) = torch.autograd.grad(found.lse.sum(), keys)
    assert grad.isnan().any()
    assert pair_sums(queries, keys)[rows].isnan().all()
    assert margin_sums(queries, keys).above[rows].isnan().all()


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30])
def test_large_logits(path, scale) -> None:
    """Beyond what exp can hold."""
    queries, keys = problem(dtype=torch.float32)
    with torch.no_grad():
        for t in (queries, keys):
            t.div_(t.norm(dim=1, keepdim=True))
    found = similarity_softmax(queries, keys, scale, columns=True)
    expected = reference(queries.double(), keys.double(), scale, columns=True)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.column_lse.double(), expected.column_lse, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(s.lse.sum() / abs(scale), (queries, keys)) for s in (found, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


def test_parts_of_huge_logits_are_at_most_one(path) -> None:
    """z_ij and z_ji, which differ by more than exp can hold, have one lse each."""
    queries = torch.nn.functional.normalize(problem(dtype=torch.float32)[0].detach(), dim=1)
    queries.requires_grad_()
    found = similarity_softmax(queries, queries, 1e12, first=0)
    (grad,) = torch.autograd.grad(found.lse.sum(), queries)
    assert (grad.abs() <= 1e12 * 2 * len(queries)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("itself", [False, True])
def test_dtypes(dtype, itself) -> None:
    """Half types are read as they are and summed in float32."""
    queries, keys = problem(70, 90, 33, dtype=dtype)
    keys = queries if itself else keys
    sources = (queries,) if itself else (queries, keys)
    wide = [t.detach().double().requires_grad_() for t in sources]
    options = dict(first=0, target=targets(70, len(keys)), columns=True)
    found = similarity_softmax(queries, keys, 0.3, **options)
    expected = reference(wide[0], wide[-1], 0.3, **options)
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=2e-6, atol=2e-6)
    positive = (found.column_positive.double(), expected.column_positive)
    torch.testing.assert_close(*positive, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(total(found), sources)
    wanted = torch.autograd.grad(total(expected), wide)
    tolerance = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in zip(grads, wanted):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("largest", [1.0, 100.0])
def test_threads_do_not_show(itself, largest) -> None:
    """With sums of exp z, and with the largest z taken off."""
    queries, keys = problem(700, 700 if itself else 450, 24, dtype=torch.float32)
    keys = queries if itself else keys
    sources = (queries,) if itself else (queries, keys)
    scale = torch.tensor(largest, requires_grad=True)

    def everything() -> list[torch.Tensor]:
        found = similarity_softmax(
            queries, keys, scale, first=0, target=targets(700, len(keys)), columns=not itself
        )
        sums = [t for t in found if t is not None and t.requires_grad]
        return [*sums, *torch.autograd.grad(sum(t.sum() for t in sums), (*sources, scale))]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_memory() -> None:
    """Beside results and what a thread works on, some numbers for each row; nothing N x N."""

    def scratch(n: int) -> tuple[int, int]:
        problem = (n, n, 128, 1, True, 64, 64, 1.0, 0, False, 0, 0, 0, 0, 0)
        return (
            _C.similarity_softmax_fwd_scratch_bytes(problem, False, 2),
            _C.similarity_softmax_bwd_scratch_bytes(problem, True, False, False, False, 2),
        )

    for small, large in zip(scratch(1 << 14), scratch(1 << 20)):
        assert small < 4 << 20
        assert large - small < 64 * (1 << 20)
    kept = []
    x = problem(500, 1, 16)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        similarity_softmax(x, x, first=0, target=targets(500, 500))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(storages.values()) == 8 * (500 * 16 + 2 * 500)  # x, targets, lse


def test_torch_products_on_request(monkeypatch) -> None:
    monkeypatch.setattr(_gemm, "_forced", "torch")
    monkeypatch.setattr(by_tiles, "_Online", None)
    with pytest.raises(TypeError):
        similarity_softmax(*problem())


def test_unit_rows(monkeypatch) -> None:
    """F.normalize and its gradient, of several parts and by blocks; tiny norms are clamped."""
    monkeypatch.setattr(unit, "_BLOCK", 20)
    x, y = problem(9, 5, 3)
    with torch.no_grad():
        x[2] = 0
        x[3] *= 1e-14
    grad = torch.randn(14, 3, dtype=torch.float64)
    found, expected = unit_rows(x, y), F.normalize(torch.cat([x, y]), dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(t, (x, y), grad, retain_graph=True) for t in (found, expected))
    )
    (alone,) = torch.autograd.grad(found, y, grad)  # the other part has a gradient, too
    torch.testing.assert_close(alone, torch.autograd.grad(expected, y, grad)[0])
    fixed = x.detach()
    assert torch.autograd.grad(unit_rows(fixed, y).sum(), y)[0].shape == y.shape
    z = problem(3, 1, 3)[0]
    torch.autograd.gradcheck(unit_rows, (z,), check_batched_grad=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(unit_rows, (z,))


def test_strides() -> None:
    queries, keys = problem(dtype=torch.float32, grad=False)
    wide = torch.stack([queries, queries], 2)[:, :, 0]
    assert not wide.is_contiguous()
    found = similarity_softmax(wide, keys.t().contiguous().t(), columns=True)
    expected = similarity_softmax(queries, keys, columns=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected) if a is not None)


def test_backend_reference_is_dense() -> None:
    queries, keys = problem(grad=False)
    with pyloss.backend("reference"):
        found = similarity_softmax(queries, keys)
    assert torch.equal(found.lse, reference(queries, keys).lse)
