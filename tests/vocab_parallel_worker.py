"""One rank of test_vocab_parallel.py. How it runs: gloo.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from gloo import raises, run
from helpers import TORCH
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import pyloss
from pyloss.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from pyloss.ops.linear_cross_entropy import chunks, products
from pyloss.ops.linear_cross_entropy.vocab_parallel import group as op

N, D, V = 13, 6, 23
SIZES = {2: (9, 14), 3: (9, 4, 10)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
EVERY_STAT = ("lse", "logprob", "entropy", "argmax", "correct", "z_loss")

COUNT: dict[str, int] = {}


def counted(name: str, function: Callable) -> Callable:
    def call(*args, **kwargs):
        COUNT[name] = COUNT.get(name, 0) + 1
        return function(*args, **kwargs)

    return call


op._gather_single = counted("all_gather", op._gather_single)
dist.all_reduce = counted("all_reduce", dist.all_reduce)


def random(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(ignore: int = -100, lead: tuple[int, ...] = (N,)) -> torch.Tensor:
    y = torch.randint(V, lead, generator=torch.Generator().manual_seed(5))
    y.view(-1)[[2, 7]] = ignore
    y.view(-1)[0], y.view(-1)[1] = 0, V - 1
    return y


def piece(x: torch.Tensor | None, sizes: tuple[int, ...], dim: int = 0) -> torch.Tensor | None:
    """This rank's part, filled up with rows that must not count where x is too short."""
    if x is None:
        return None
    begin = sum(sizes[: dist.get_rank()])
    found = x.narrow(
        dim, min(begin, x.shape[dim]), max(0, min(sizes[dist.get_rank()], x.shape[dim] - begin))
    )
    missing = list(found.shape)
    missing[dim] = sizes[dist.get_rank()] - found.shape[dim]
    return torch.cat([found, found.new_full(missing, 1e4)], dim).detach().requires_grad_()


def same_bits(x: torch.Tensor) -> None:
    bits = x.detach().contiguous().double()
    found = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(found, bits)
    assert all(torch.equal(f.view(torch.int64), bits.view(torch.int64)) for f in found)


def total(result) -> torch.Tensor:
    """A scalar that depends on the loss and on each differentiable statistic, row by row."""
    loss, stats = result if isinstance(result, tuple) else (result, None)
    value = (loss.double() * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum()
    for i, name in enumerate(("lse", "logprob", "entropy")):
        s = getattr(stats, name, None)
        if s is not None:
            weights = torch.arange(s.numel()).view(s.shape) * 0.1 + i
            value = value + (s.double() * weights).sum()
    return value


def close(actual, expected, dtype, what: str) -> None:
    bound = TOLERANCE[dtype]
    size = (
        max(float(expected.detach().double().abs().nan_to_num(0, 0, 0).max()), 1e-30)
        if expected.numel()
        else 1
    )
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=bound, atol=bound * size, equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )  # fmt: skip


def compare(result, expected, pairs, dtype) -> None:
    """Loss, statistics, gradients; pairs are (leaf, this rank's part of the full leaf)."""
    results = [r if isinstance(r, tuple) else (r, None) for r in (result, expected)]
    close(results[0][0], results[1][0], dtype, "loss")
    assert results[0][0].dtype == results[1][0].dtype
    same_bits(results[0][0])
    if results[0][1] is not None:
        for name, a, b in zip(results[0][1]._fields, results[0][1], results[1][1]):
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape
                close(a, b, dtype, name)
    total(result).backward()
    total(expected).backward()
    for name, leaf, full, sizes, dim in pairs:
        if leaf is None:
            continue
        want = full.grad
        if sizes is not None:
            begin, size = sum(sizes[: dist.get_rank()]), sizes[dist.get_rank()]
            padded = torch.zeros([*want.shape[:dim], sum(sizes), *want.shape[dim + 1 :]]).to(want)
            padded.narrow(dim, 0, want.shape[dim]).copy_(want)
            want = padded.narrow(dim, begin, size)
        close(leaf.grad, want, dtype, name)


def logits_case(
    dtype=torch.float64, sizes=None, target=None, edit=None, scale=3.0, **options
) -> None:
    given = {k: options.pop(k) for k in ("num_classes", "first_class") if k in options}
    sizes = sizes or SIZES[dist.get_world_size()]
    target = labels() if target is None else target
    full = random(*target.shape, V, seed=1, dtype=dtype) * scale
    if edit is not None:
        edit(full)
    full.requires_grad_()
    shard = piece(full, sizes, full.dim() - 1)
    result = vocab_parallel_cross_entropy(shard, target, **given, **options)
    flat = full.reshape(-1, V)
    k = options.pop("token_weight", None)
    k = k if k is None else k.reshape(-1)
    expected = pyloss.fused_cross_entropy(flat, target.reshape(-1), token_weight=k, **options)
    if target.dim() > 1 and options.get("reduction") == "none":
        expected = expected.view(target.shape)
    compare(result, expected, [("dz", shard, full, sizes, full.dim() - 1)], dtype)


def linear_case(
    dtype=torch.float64,
    sizes=None,
    target=None,
    bias=True,
    edit=None,
    frozen=(),
    call=None,
    **options,
) -> None:
    given = {k: options.pop(k) for k in ("num_classes", "first_class") if k in options}
    sizes = sizes or SIZES[dist.get_world_size()]
    target = labels() if target is None else target
    h, w = random(*target.shape, D, seed=2, dtype=dtype), random(V, D, seed=3, dtype=dtype)
    b = random(V, seed=4, dtype=dtype) if bias else None
    if edit is not None:
        edit(h)
    leaves = [h.clone(), piece(w, sizes), piece(b, sizes)]
    whole = [h.clone(), w.clone(), b if b is None else b.clone()]
    for i, name in enumerate(("input", "weight", "bias")):
        for t in (leaves[i], whole[i]):
            if t is not None:
                t.requires_grad_(name not in frozen)
    call = call or vocab_parallel_linear_cross_entropy
    result = call(leaves[0], leaves[1], target, leaves[2], **given, **options)
    options.setdefault("strategy", "recompute")
    expected = pyloss.fused_linear_cross_entropy(whole[0], whole[1], target, whole[2], **options)
    parts = [("dX", None), ("dW", sizes), ("db", sizes)]
    pairs = [
        (name, None if leaf is None or not leaf.requires_grad else leaf, full, s, 0)
        for (name, s), leaf, full in zip(parts, leaves, whole)
    ]
    compare(result, expected, pairs, dtype)
    for leaf in leaves:
        assert leaf is None or leaf.requires_grad or leaf.grad is None


def positive(n: int, seed: int) -> torch.Tensor:
    return random(n, seed=seed).abs() + 0.1


OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "tau 0": dict(tau=0.0),
    "tau 1.7 truncated": dict(tau=1.7, truncate=0.05),
    "tau 2": dict(tau=2.0, reduction="none"),
    "z-loss, transform": dict(z_loss=0.1, softcap=2.0, logit_scale=0.7, temperature=1.3),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing 1": dict(label_smoothing=1.0, softcap=3.0),
    "class weights": dict(weight=positive(V, 8)),
    "class weights, smoothing, softcap": dict(
        weight=positive(V, 8), label_smoothing=0.3, softcap=4.0, reduction="none"
    ),
    "token weights": dict(token_weight=positive(N, 9), z_loss=0.01),
    "both weights": dict(token_weight=positive(N, 9), weight=positive(V, 8), z_loss=0.1),
    "num_items": dict(num_items=7),
    "num_items tensor": dict(num_items=torch.tensor(5.0)),
    "statistics": dict(return_stats=EVERY_STAT, z_loss=0.1),
    "statistics, none": dict(
        return_stats=EVERY_STAT, reduction="none", label_smoothing=0.1, softcap=5.0, z_loss=0.1
    ),
    "ignore index": dict(ignore_index=3),
}  # fmt: skip


def options_of(name: str, dtype: torch.dtype) -> dict:
    acc = torch.float32 if dtype == torch.bfloat16 else dtype
    return {
        k: v.to(acc) if isinstance(v, torch.Tensor) and v.dim() else v
        for k, v in OPTIONS[name].items()
    }


def confident_rows() -> None:
    """Losses of 1e-8 keep their digits, wherever the target is."""
    y = torch.tensor([0, V - 1, 12, 5])
    full = torch.zeros(4, V)
    full[range(4), y] = 22.0
    shard = piece(full, SIZES[dist.get_world_size()], 1)
    loss, stats = vocab_parallel_cross_entropy(
        shard, y, reduction="none", return_stats=("entropy",)
    )
    exact = pyloss.fused_cross_entropy(
        full.double(), y, reduction="none", return_stats=("entropy",)
    )
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(stats.entropy.double(), exact[1].entropy, rtol=2e-6, atol=0)
    loss.sum().backward()
    want = full.double().requires_grad_()
    pyloss.fused_cross_entropy(want, y, reduction="sum").backward()
    begin = sum(SIZES[dist.get_world_size()][: dist.get_rank()])
    torch.testing.assert_close(
        shard.grad.double(), want.grad[:, begin : begin + shard.shape[1]], rtol=2e-6, atol=0
    )


def nan_row(x: torch.Tensor) -> None:
    x[2] = float("nan")
    x[7] = float("inf")


def masked_classes(x: torch.Tensor) -> None:
    x[3, :9] = -float("inf")  # all that rank 0 has
    x[4, 10:12] = -float("inf")
    labels_here = labels()
    x[range(3, 5), labels_here[3:5]] = 1.0


def bad_label() -> None:
    for bad in (V, -1, 10**6):
        y = labels()
        y[4] = bad
        word = f"Target {bad} is out of bounds"
        raises(IndexError, word, lambda y=y: logits_case(target=y))
    y = labels()
    if dist.get_rank() == 0:  # and the others must not wait for it
        y[4] = V
    shard = piece(random(N, V, seed=1), SIZES[dist.get_world_size()], 1)
    raises(IndexError, "out of bounds", lambda: vocab_parallel_cross_entropy(shard, y))


def collectives() -> None:
    sizes = SIZES[dist.get_world_size()]
    h = random(N, D, seed=2).requires_grad_()
    w, b = piece(random(V, D, seed=3), sizes), piece(random(V, seed=4), sizes)
    bounds = [sum(sizes[:r]) for r in range(len(sizes))]
    for given, gathers in ((dict(first_class=bounds), 1), ({}, 2)):  # the second: of the sizes
        COUNT.clear()
        loss = vocab_parallel_linear_cross_entropy(
            h, w, labels(), b, num_classes=V, chunk=4, **given
        )
        assert COUNT == {"all_gather": gathers}, COUNT
        loss.backward()
        # One for each chunk of the rows that count, and none is waited for between two products.
        assert COUNT == {"all_gather": gathers, "all_reduce": 3}, COUNT
    COUNT.clear()
    x = piece(random(N, V, seed=1), sizes, 1)
    vocab_parallel_cross_entropy(x, labels(), num_classes=V, first_class=bounds).backward()
    assert COUNT == {"all_gather": 1}, COUNT
    COUNT.clear()
    frozen = dict(num_classes=V, first_class=bounds)
    vocab_parallel_linear_cross_entropy(h.detach(), w, labels(), **frozen).backward()
    assert COUNT == {"all_gather": 1}, COUNT


def overlap() -> None:
    """Of chunks that all ranks have alike, though by its own classes each would have others; a
    sum is sent before the weight's product and waited for at the end. The same bits each time."""
    order, found = [], {}
    sizes, rows = SIZES[dist.get_world_size()], 150
    h = random(rows, D, seed=2)
    y = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(5))
    full = random(V, D, seed=3).requires_grad_()
    whole = h.clone().requires_grad_()
    pyloss.fused_linear_cross_entropy(whole, full, y).backward()

    def noted(name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: (order.append(name), function(*args, **kwargs))[1]

    with (
        patch.dict(chunks._CHUNK_BYTES),
        patch.object(chunks, "_CHUNK_ROWS", (50, 4096)),
        patch.object(products.Linear, "add_weight", noted("weight", products.Linear.add_weight)),
        patch.object(dist, "all_reduce", noted("send", dist.all_reduce)),
        patch.object(op.InputSums, "finish", noted("wait", op.InputSums.finish)),
    ):
        for dtype in (torch.float64, torch.float64, torch.bfloat16):
            order.clear()
            chunks._CHUNK_BYTES["cpu"] = 64 * 12 * dtype.itemsize
            w, x = piece(full.to(dtype), sizes), h.to(dtype, copy=True).requires_grad_()
            vocab_parallel_linear_cross_entropy(x, w, y).backward()
            assert order == [*("send", "weight") * 3, "wait"], order
            same_bits(x.grad)
            close(x.grad, whole.grad, dtype, "dX")
            close(w.grad, piece(full.grad, sizes), dtype, "dW")
            before = found.setdefault(dtype, (x.grad, w.grad))
            assert torch.equal(x.grad, before[0]) and torch.equal(w.grad, before[1])


def sizes_change() -> None:
    """Each call asks: here only the last rank's size is another one."""
    world = dist.get_world_size()
    for extra in (0, 1, 0):
        sizes = [4] * (world - 1) + [3 + extra]
        full = random(5, sum(sizes), seed=1)
        y = torch.tensor([0, 1, 2, 3, sum(sizes) - 1])
        loss = vocab_parallel_cross_entropy(piece(full, tuple(sizes), 1), y)
        torch.testing.assert_close(loss, pyloss.fused_cross_entropy(full, y), rtol=1e-12, atol=0)


def megatron_smoothing() -> None:
    full = random(N, V, seed=1).requires_grad_()
    shard = piece(full, SIZES[dist.get_world_size()], 1)
    loss = vocab_parallel_cross_entropy(
        shard, labels(), label_smoothing=0.2, smoothing_formula="megatron", reduction="none"
    )
    logp = full.log_softmax(1)
    smoothing = 0.2 * V / (V - 1)
    y = labels().clamp(min=0)
    want = -(1 - smoothing) * logp.gather(1, y[:, None])[:, 0] - smoothing * logp.mean(1)
    torch.testing.assert_close(loss, torch.where(labels() < 0, 0.0, want), rtol=1e-12, atol=0)
    raises(ValueError, "megatron", lambda: vocab_parallel_cross_entropy(
        shard, labels(), label_smoothing=0.99, smoothing_formula="megatron"))  # fmt: skip


def empty_batches() -> None:
    sizes = SIZES[dist.get_world_size()]
    w = piece(random(V, D, seed=3), sizes)
    for rows in (0, 4):
        y = torch.full((rows,), -100)
        for options in ({}, dict(empty="zero"), dict(reduction="sum")):
            h = torch.randn(rows, D, dtype=torch.float64, requires_grad=True)
            h.data.fill_(float("nan"))
            w.grad = None
            loss = vocab_parallel_linear_cross_entropy(h, w, y, **options)
            want = float("nan") if not options else 0.0
            torch.testing.assert_close(loss, torch.tensor(want).double(), equal_nan=True)
            loss.backward()
            assert not h.grad.any() and not w.grad.any()
            x = torch.full((rows, sizes[dist.get_rank()]), float("nan"), requires_grad=True)
            vocab_parallel_cross_entropy(x, y, **options).backward()
            assert not x.grad.any()


def nothing_counts() -> None:
    """A step without rows that count: gradients are 0 whatever comes from above."""
    world = dist.get_world_size()
    sizes, none, k = SIZES[world], torch.full((N,), -100), torch.zeros(N, dtype=torch.float64)
    no_items = torch.tensor(0.0)
    calls = (
        (none, 1.0, dict(num_items=no_items)),
        (none, float("inf"), dict(reduction="sum")),
        (none, float("inf"), dict()),
        (labels(), 1.0, dict(num_items=no_items, empty="zero")),
        (labels(), 1.0, dict(token_weight=k)),
        (labels(), 1.0, dict(token_weight=k, z_loss=0.1, empty="zero")),
        (labels(), float("inf"), dict(token_weight=k, reduction="sum", label_smoothing=0.1)),
    )
    for y, factor, options in calls:
        h = random(N, D, seed=2).requires_grad_()
        w = piece(random(V, D, seed=3), sizes)
        loss = vocab_parallel_linear_cross_entropy(h, w, y, **options)
        zero = options.get("empty") == "zero" or options.get("reduction") == "sum"
        assert loss == 0 if zero else loss.isnan(), options
        (loss * factor).backward()
        assert not h.grad.any() and not w.grad.any(), options


def fsdp() -> None:
    """fully_shard leaves Shard(0) too, on ranks with rows of their own."""
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    torch.manual_seed(0)
    head = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)
    full = head.weight.detach().clone()
    fully_shard(head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    h = random(N, D, seed=20 + rank)
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(rank))
    same_y, other_n = labels(), labels()[: N - rank]
    step = -(-V // dist.get_world_size())
    first = [min(r * step, V) for r in range(dist.get_world_size())]
    said = partial(vocab_parallel_linear_cross_entropy, num_classes=V, first_class=first)
    for hidden, target in ((h, y), (h, same_y), (h[: N - rank], other_n)):
        for call in (pyloss.token_logprobs, pyloss.fused_linear_cross_entropy, said):
            try:
                call(hidden, head.weight, target)
            except RuntimeError as error:
                assert "fully_shard" in str(error) and "unshard" in str(error), error
            else:
                raise AssertionError("no error")
    head.unshard()
    found = pyloss.token_logprobs(h, head.weight, y)
    want = torch.log_softmax(h @ full.T, 1).gather(1, y[:, None]).squeeze(1)
    close(found, want, torch.float64, "unsharded")
    head.reshard()


def temperatures() -> None:
    """One for each row, with a gradient; and a 0-d one."""
    rows, one = random(N, seed=9).abs() + 0.5, torch.tensor(0.8, dtype=torch.float64)
    w, b = random(V, D, seed=3), random(V, seed=4)
    sizes, options = SIZES[dist.get_world_size()], dict(z_loss=0.1, logit_scale=0.5)
    for bias in (None, b):
        for t in (rows, one):
            mine = [random(N, D, seed=2), t, piece(w, sizes), piece(bias, sizes)]
            whole = [random(N, D, seed=2), t, w, bias]
            for part in (mine, whole):
                part[:] = [x if x is None else x.detach().clone().requires_grad_() for x in part]
            h, temperature, weight, bias_ = mine
            loss = vocab_parallel_linear_cross_entropy(
                h, weight, labels(), bias_, temperature=temperature, **options
            )
            want = pyloss.fused_linear_cross_entropy(
                whole[0], whole[2], labels(), whole[3], temperature=whole[1], **options
            )
            close(loss, want, torch.float64, "temperature")
            loss.backward(), want.backward()
            pairs = [(h, whole[0].grad), (temperature, whole[1].grad)]
            pairs += [(weight, piece(whole[2].grad, sizes))]
            pairs += [] if bias is None else [(bias_, piece(whole[3].grad, sizes))]
            for x, grad in pairs:
                close(x.grad, grad, torch.float64, "gradient with a temperature")
    call = partial(vocab_parallel_linear_cross_entropy, random(N, D, seed=2), piece(w, sizes))
    raises(
        ValueError, "softcap with a tensor", lambda: call(labels(), softcap=2.0, temperature=one)
    )


def different_rows() -> None:
    """An error on every rank, and no abort of the process by the gather."""
    world, rank = dist.get_world_size(), dist.get_rank()
    w, x = piece(random(V, D, seed=3), SIZES[world]), piece(random(N, V, seed=1), SIZES[world], 1)
    h, n = random(N, D, seed=2), N - rank
    for call in (
        lambda: vocab_parallel_cross_entropy(x[:n], labels()[:n]),
        lambda: vocab_parallel_linear_cross_entropy(h[:n], w, labels()[:n]),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "must hold the same rows" in str(error), error
        else:
            raise AssertionError("no error")


def dtensors() -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    full_w, full_b, h = random(V, D, seed=3), random(V, seed=4), random(N, D, seed=2)
    y = labels()
    wide = [t.clone().requires_grad_() for t in (h, full_w, full_b)]
    want = pyloss.fused_linear_cross_entropy(wide[0], wide[1], y, wide[2], z_loss=0.1)
    want.backward()

    def placed(t, placement=None):
        return distribute_tensor(t.clone(), mesh, [placement or Shard(0)]).requires_grad_()

    calls = {
        "functional": pyloss.fused_linear_cross_entropy,
        "distributed": vocab_parallel_linear_cross_entropy,
    }
    for name, call in calls.items():
        for as_dtensor in (None, Replicate(), Shard(0)):
            w, b = placed(full_w), placed(full_b)
            x = h.clone().requires_grad_() if as_dtensor is None else placed(h, as_dtensor)
            COUNT.clear()
            loss = call(x, w, y, b, z_loss=0.1)
            # An input that is no DTensor does not say that all ranks have the same rows.
            assert COUNT == {"all_gather": 1 if as_dtensor else 2}, COUNT
            close(loss, want, torch.float64, name)
            loss.backward()
            for got, ref in zip((x, w, b), wide):
                grad = got.grad
                if got is not x:
                    assert grad.placements == got.placements
                full = grad.full_tensor() if isinstance(grad, DTensor) else grad
                close(full, ref.grad, torch.float64, name)
    # A module whose parameters are split.
    module = pyloss.nn.LinearCrossEntropyLoss(D, V, bias=True, dtype=torch.float64, z_loss=0.1)
    module.linear.weight = torch.nn.Parameter(placed(full_w).detach())
    module.linear.bias = torch.nn.Parameter(placed(full_b).detach())
    loss = module(h, y)
    close(loss, want, torch.float64, "module")
    loss.backward()
    close(module.linear.weight.grad.full_tensor(), wide[1].grad, torch.float64, "module")
    logp, entropy = pyloss.token_logprobs(h, placed(full_w), y, placed(full_b), return_entropy=True)
    ref = pyloss.token_logprobs(h, full_w, y, full_b, return_entropy=True)
    close(logp, ref[0], torch.float64, "logprobs")
    close(entropy, ref[1], torch.float64, "entropy")
    # Logits as a column-parallel layer leaves them.
    logits = random(N, V, seed=1)
    x = distribute_tensor(logits.clone(), mesh, [Shard(1)]).requires_grad_()
    loss = vocab_parallel_cross_entropy(x, y)
    wide = logits.clone().requires_grad_()
    want = pyloss.fused_cross_entropy(wide, y)
    close(loss, want, torch.float64, "logits")
    loss.backward(), want.backward()
    close(x.grad.full_tensor(), wide.grad, torch.float64, "logits")
    # Whole on each rank: the plain loss, and no collective.
    COUNT.clear()
    loss = pyloss.fused_linear_cross_entropy(h, placed(full_w, Replicate()), y, full_b)
    close(loss, pyloss.fused_linear_cross_entropy(h, full_w, y, full_b), torch.float64, "whole")
    assert not COUNT
    # Anything may come as a DTensor that is the same everywhere.
    tensors = [distribute_tensor(t.detach().clone(), mesh, [Replicate()]) for t in (h, full_w, y)]
    whole_bias = placed(full_b, Replicate())
    close(pyloss.fused_linear_cross_entropy(*tensors, whole_bias), loss, torch.float64, "all whole")
    only_input = pyloss.fused_linear_cross_entropy(placed(h, Replicate()), full_w, y, full_b)
    close(only_input, loss, torch.float64, "only the input")
    # Another dimension of the mesh replicates.
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    w = distribute_tensor(full_w.clone(), both, [Replicate(), Shard(0)])
    close(
        pyloss.fused_linear_cross_entropy(h, w, y),
        pyloss.fused_linear_cross_entropy(h, full_w, y), torch.float64, "2-D",
    )  # fmt: skip

    linear = pyloss.fused_linear_cross_entropy
    shard_w = placed(full_w)
    raises(ValueError, "first_class of this DTensor", lambda: vocab_parallel_linear_cross_entropy(
        h, shard_w, y, num_classes=V, first_class=[0] * world))  # fmt: skip
    raises(RuntimeError, "split in the same way", lambda: linear(h, shard_w, y, full_b))
    mixed = placed(full_b, Replicate())
    raises(RuntimeError, "split in the same way", lambda: linear(h, shard_w, y, mixed))
    raises(RuntimeError, "split in the same way", lambda: linear(h, full_w, y, placed(full_b)))
    raises(RuntimeError, "Shard(0)", lambda: linear(h, placed(full_w, Shard(1)), y))
    partial = DTensor.from_local(full_w, mesh, [Partial()], run_check=False)
    raises(RuntimeError, "Shard(0)", lambda: linear(h, partial, y))
    twice = distribute_tensor(full_w.clone(), both, [Shard(0), Shard(0)])
    raises(RuntimeError, "two dimensions", lambda: linear(h, twice, y))
    split_input = distribute_tensor(h.clone(), mesh, [Shard(0)])
    raises(RuntimeError, "target must be a DTensor", lambda: linear(split_input, full_w, y))
    raises(RuntimeError, "input must be placed", lambda: linear(
        split_input, full_w, y, group=dist.group.WORLD))  # fmt: skip
    whole = placed(full_w, Replicate())
    raises(
        RuntimeError, "split by Shard(0)", lambda: vocab_parallel_linear_cross_entropy(h, whole, y)
    )
    raises(RuntimeError, "last dimension", lambda: vocab_parallel_cross_entropy(
        distribute_tensor(logits.clone(), mesh, [Replicate()]), y))  # fmt: skip


def refusals() -> None:
    sizes = SIZES[dist.get_world_size()]
    x, y = piece(random(N, V, seed=1), sizes, 1), labels()
    h, w = random(N, D, seed=2).requires_grad_(), piece(random(V, D, seed=3), sizes)
    vp, group = vocab_parallel_cross_entropy, dist.group.WORLD
    linear = pyloss.fused_linear_cross_entropy
    raises(ValueError, "MixUp", lambda: vp(x, (y, y, 0.5)))
    raises(ValueError, "probabilities", lambda: vp(x, x.detach().softmax(1)))
    raises(ValueError, "rank", lambda: vp(x, y, return_stats=("rank",)))
    raises(ValueError, "tau=1", lambda: vp(x, y, label_smoothing=0.1, tau=1.5))
    raises(ValueError, "smoothing_formula", lambda: vp(x, y, smoothing_formula="liger"))
    raises(ValueError, "num_classes", lambda: vp(x, y, num_classes=V + 1))
    raises(ValueError, "first_class", lambda: vp(x, y, first_class=[0]))
    raises(ValueError, "first_class", lambda: vp(x, y, num_classes=V, first_class=[1, 2, 3]))
    raises(RuntimeError, "23 classes", lambda: vp(x, y, weight=torch.ones(V - 1).double()))
    raises(NotImplementedError, "Long", lambda: vp(x.detach().long(), y))
    raises(TypeError, "group", lambda: vp(x, y, group="tp"))
    raises(ValueError, "strategy", lambda: linear(h, w, y, group=group, strategy="forward"))
    raises(ValueError, "filter", lambda: linear(h, w, y, group=group, filter=0.1))
    raises(ValueError, "tiles", lambda: linear(h, w, y, group=group, strategy="tiles"))
    raises(RuntimeError, "same dtype", lambda: linear(h.float(), w, y, group=group))
    raises(RuntimeError, "torch.func", lambda: torch.func.grad(partial(vp, target=y))(x))
    raises(RuntimeError, "torch.func", lambda: torch.vmap(lambda h: linear(h, w, y, group=group))(
        h.detach()[None]))  # fmt: skip
    loss = linear(h, w, y, group=group)
    raises(RuntimeError, "create_graph", lambda: torch.autograd.grad(loss, h, create_graph=True))


def one_process_group() -> None:
    """A group of its own for each rank: the plain function."""
    own = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    h, w, y = random(N, D, seed=2), random(V, D, seed=3), labels()
    loss = vocab_parallel_linear_cross_entropy(h, w, y, group=own)
    torch.testing.assert_close(loss, pyloss.fused_linear_cross_entropy(h, w, y), rtol=1e-12, atol=0)
    COUNT.clear()
    h.requires_grad_()
    vocab_parallel_linear_cross_entropy(h, w, y, group=own).backward()
    assert not COUNT, COUNT
    other = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank() - 1]
    assert dist.get_world_size() == 1 or other is not own
    raises((RuntimeError, TypeError), "group", lambda: vocab_parallel_cross_entropy(w, y, other))


def reference_backend() -> None:
    with pyloss.backend("reference"):
        for options in (OPTIONS["statistics, none"], OPTIONS["class weights, smoothing, softcap"]):
            logits_case(**options)
            linear_case(**options, chunk=5)
        logits_case(edit=masked_classes, return_stats=("entropy",))


def by_group(*args, **kwargs):
    return pyloss.fused_linear_cross_entropy(*args, group=dist.group.WORLD, **kwargs)


def cases() -> dict[str, Callable]:
    world = dist.get_world_size()
    padded = tuple([9] * (world - 1) + [V + 9 - 9 * (world - 1)])  # 9 entries of padding
    found: dict[str, Callable] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for name in OPTIONS:
            o = options_of(name, dtype)
            y = labels(3) if "ignore_index" in o else None
            key = f"{name}, {dtype}"
            found[f"logits, {key}"] = lambda o=o, d=dtype, y=y: logits_case(d, target=y, **o)
            found[f"linear, {key}"] = lambda o=o, d=dtype, y=y: linear_case(
                d, target=y, chunk=5, **o
            )
    whole_sizes = (V, *[0] * (world - 1))
    found |= {
        "three dimensions": lambda: logits_case(target=labels(lead=(2, 7)), reduction="none"),
        "shift": lambda: linear_case(target=labels(lead=(2, 7)), shift=1, reduction="none"),
        "padding": lambda: logits_case(sizes=padded, num_classes=V, label_smoothing=0.1),
        "padding, linear": lambda: linear_case(sizes=padded, num_classes=V, label_smoothing=0.1),
        "a rank of padding": lambda: linear_case(
            sizes=(V, *[4] * (world - 1)), num_classes=V, return_stats=EVERY_STAT
        ),
        "a rank without classes": lambda: linear_case(sizes=whole_sizes, label_smoothing=0.1),
        "no classes, logits": lambda: logits_case(sizes=whole_sizes, return_stats=EVERY_STAT),
        "labels in one shard": lambda: linear_case(target=torch.arange(N) % 3),
        "uint8 labels": lambda: linear_case(target=torch.arange(N).to(torch.uint8)),
        "NaN in ignored rows": lambda: logits_case(edit=nan_row),
        "NaN in ignored rows, linear": lambda: linear_case(edit=nan_row),
        "classes of -inf": lambda: logits_case(edit=masked_classes, return_stats=("entropy",)),
        "logits of 1e4": lambda: logits_case(edit=lambda x: x.add_(1e4), dtype=torch.float64),
        "without bias": lambda: linear_case(bias=False),
        "one chunk": lambda: linear_case(chunk=64),
        "wide products": lambda: linear_case(
            torch.bfloat16, accumulate_dtype=torch.float32, chunk=5
        ),
        "frozen input": lambda: linear_case(frozen=("input",)),
        "frozen weight": lambda: linear_case(frozen=("weight", "bias")),
        "frozen bias": lambda: linear_case(frozen=("bias",)),
        "group argument": lambda: linear_case(call=by_group, z_loss=0.1),
        "confident rows": confident_rows,
        "bad label": bad_label,
        "collectives": collectives,
        "overlap": overlap,
        "sizes change": sizes_change,
        "megatron": megatron_smoothing,
        "empty": empty_batches,
        "nothing counts": nothing_counts,
        "DTensor": dtensors,
        # With torch 2.6 any model crashes under FSDP2 on the CPU.
        **({"FSDP2": fsdp} if TORCH >= (2, 8) else {}),
        "different rows": different_rows,
        "temperatures": temperatures,
        "refusals": refusals,
        "group of one": one_process_group,
        "reference backend": reference_backend,
    }
    return found


if __name__ == "__main__":
    run(cases)
