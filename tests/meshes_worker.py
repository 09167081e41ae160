"""One rank of test_meshes.py: models on meshes against one process. How it runs: gloo.py."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from gloo import raises, run
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import pyloss
from pyloss.integrations.torchtitan import ChunkedLMHeadLoss

V, D, BATCH, LENGTH = 23, 6, 4, 12  # 2 and 3 ranks hold unequal shares of the vocabulary
F64 = torch.float64


class Decoder(nn.Module):
    """Embedding, a layer, a norm, the output layer; the forward leaves that out, as a loss with the
    output layer inside wants it, or computes the loss itself."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None, way: str = "") -> Tensor:
        x = self.embedding(tokens)
        hidden = self.norm(x + self.layer(x).tanh())
        return losses_of(self)[way](hidden, labels) if way else hidden


def decoder(dtype: torch.dtype = F64, **options) -> Decoder:
    torch.manual_seed(3)
    return Decoder(**options).to(dtype)


def batch(seed: int = 0, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """(tokens, labels); more labels are ignored in the first rows than in the others."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (rows, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, : LENGTH // 2] = -100
    return tokens, labels


def whole(model: nn.Module, tokens: Tensor, labels: Tensor, **options) -> Tensor:
    """The loss of one process, and its gradients."""
    hidden = model(tokens)
    loss = nn.functional.cross_entropy(
        model.lm_head(hidden).flatten(0, 1), labels.flatten(), **options
    )
    loss.backward()
    return loss.detach()


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(full(actual), expected, rtol=tolerance, atol=tolerance)


def same_gradients(model: nn.Module, other: nn.Module, factor: float = 1.0) -> None:
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, p), q in pairs:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                factor * full(p.grad), q.grad, rtol=1e-10, atol=1e-12,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Tensor parallelism


def tensor_parallel(model: nn.Module, mesh, head: dict, sequence: bool) -> None:
    """The plan of a language model: the rows between the layers whole, or split by sequence."""
    between = Shard(1) if sequence else Replicate()
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, **head),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
        plan["layer"] = ColwiseParallel(
            input_layouts=between, output_layouts=between, use_local_output=True
        )
    parallelize_module(model, mesh, plan)


HEADS = {
    "local shards": {},
    "DTensor shards": dict(use_local_output=False),
    "gathered": dict(output_layouts=Replicate()),
    "DTensor, gathered": dict(output_layouts=Replicate(), use_local_output=False),
}


def losses_of(model: nn.Module) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The ways to a loss of hidden states and labels, with the output layer of a model."""
    chunked = ChunkedLMHeadLoss(metrics=("accuracy",), chunk=7)
    chunked.set_lm_head(model.lm_head)
    borrowed = pyloss.nn.LinearCrossEntropyLoss.borrow(model.lm_head, chunk=7)
    return {
        "module": borrowed,
        "torchtitan": lambda h, y: chunked(h, y, (y != -100).sum())[0],
        "function": lambda h, y: pyloss.fused_linear_cross_entropy(
            h, model.lm_head.weight, y, model.lm_head.bias
        ),
    }


def ways(number: int) -> tuple[str, ...]:
    """Of a case; with two processes, which every run of the tests has, one or the other."""
    every = ("module", "torchtitan")
    return every if dist.get_world_size() > 2 else every[number % 2 :][:1]


def parallel_head(mesh, head: dict, sequence: bool, way: str) -> None:
    model, alone = decoder(), decoder()
    tensor_parallel(model, mesh, head, sequence)
    tokens, labels = batch()
    hidden = model(tokens)
    loss = losses_of(model)[way](hidden, labels)
    assert not isinstance(loss, DTensor) and loss.dim() == 0
    close(loss, whole(alone, tokens, labels))
    loss.backward()
    same_gradients(model, alone)


def compiled_around(mesh) -> None:
    """The loss stays outside of the graphs, the model is in them."""
    model, alone = decoder(), decoder()
    tensor_parallel(model, mesh, {}, sequence=False)
    loss_of = losses_of(model)["torchtitan"]
    step = torch.compile(lambda x, y: loss_of(model(x), y) * 1, backend="aot_eager")
    loss = step(*batch())
    close(loss, whole(alone, *batch()))
    loss.backward()
    same_gradients(model, alone)


def split_by_features(mesh) -> None:
    """RowwiseParallel splits what the classes are summed over: no split of the classes."""
    model = decoder()
    parallelize_module(model, mesh, {"lm_head": RowwiseParallel()})
    hidden, labels = model(batch()[0]), batch()[1]
    mine = hidden.tensor_split(dist.get_world_size(), -1)[dist.get_rank()]
    for way in ("module", "torchtitan"):
        raises(RuntimeError, "linear_weight must be placed", lambda w=way: losses_of(model)[w](
            mine, labels))  # fmt: skip


def tensor_parallel_cases() -> dict[str, Callable]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, head in HEADS.items():
        for sequence in (False, True):
            for way in ways(len(found)):
                found[f"TP {name}, sequence {sequence}, {way}"] = partial(
                    parallel_head, mesh, head, sequence, way
                )
    for sequence in (False, True):
        found[f"TP, function, sequence {sequence}"] = partial(
            parallel_head, mesh, {}, sequence, "function"
        )
    found["TP, features split"] = partial(split_by_features, mesh)
    if dist.get_world_size() == 3:
        found["TP compiled"] = partial(compiled_around, mesh)
    return found


# --------------------------------------------------------------------------------------------------
# Context parallelism: a part of each sequence


def shifted(labels: Tensor) -> Tensor:
    """Before the split: a rank does not have the label that follows its last token."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def sequence_parts(way: str) -> None:
    """Plain tensors, a model on each rank; the sum of the gradients is that of one process."""
    model, alone = decoder(), decoder()
    tokens, labels = batch()[0], batch()[0].clone()
    labels[0, : LENGTH // 2] = -100
    want = whole(alone, tokens, shifted(labels))
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, y = (t.chunk(world, 1)[rank] for t in (tokens, shifted(labels)))
    count = (y != -100).sum()
    dist.all_reduce(count)
    if way == "torchtitan":
        loss_fn = ChunkedLMHeadLoss()
        loss_fn.set_lm_head(model.lm_head)
        loss = loss_fn(model(mine), y, count)[0]
    else:
        loss = pyloss.fused_linear_cross_entropy(
            model(mine), model.lm_head.weight, y, model.lm_head.bias, num_items=count
        )
    loss.backward()
    total = loss.detach().clone()
    for t in (total, *(p.grad for p in model.parameters())):
        dist.all_reduce(t)
    close(total, want)
    same_gradients(model, alone)


POSITIVE = torch.linspace(0.5, 2.0, BATCH * (LENGTH + 1), dtype=F64).view(BATCH, -1)
ROW_OPTIONS: dict[str, dict] = {
    "mean": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "number of items": dict(num_items=17),
    "class weights, z-loss": dict(weight=torch.linspace(0.5, 2.0, V, dtype=F64), z_loss=0.1),
    "weights of tokens": dict(token_weight=POSITIVE),
    "temperatures": dict(temperature=POSITIVE),
    "statistics": dict(return_stats=("lse", "entropy", "correct"), label_smoothing=0.1),
    "nothing counts": dict(ignore_index=1, target=torch.ones_like(POSITIVE, dtype=torch.int64)),
}


def split_rows(mesh, of_input: list, of_weight: list, options: dict, shift: int = 0) -> None:
    """Hidden states, labels and layer as DTensors; 13 tokens, which no two ranks share evenly."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(BATCH, LENGTH + 1, D, generator=generator, dtype=F64)
    w = torch.randn(V, D, generator=generator, dtype=F64)
    b = torch.randn(V, generator=generator, dtype=F64)
    y = torch.randint(V, (BATCH, LENGTH + 1), generator=generator)
    y[0, 3:9] = -100
    options = dict(options)
    y = options.pop("target", y)
    leaves = [t.clone().requires_grad_() for t in (h, w, b)]
    args = leaves[0], leaves[1], y, leaves[2]
    want = pyloss.fused_linear_cross_entropy(*args, shift=shift, **options)
    rows = [p if isinstance(p, Shard) and p.dim < 2 else Replicate() for p in of_input]
    rows = [p if q.is_replicate() else Replicate() for p, q in zip(rows, of_weight)]

    def placed(t, where):
        return distribute_tensor(t.detach(), mesh, where).requires_grad_(t.requires_grad)

    x, weight, bias = (placed(t, p) for t, p in zip(leaves, (of_input, of_weight, of_weight)))
    for name in ("token_weight", "temperature"):
        if name in options:
            options[name] = placed(options[name], rows)
    loss = pyloss.fused_linear_cross_entropy(
        x, weight, placed(y, rows), bias, shift=shift, **options
    )
    found, wanted = (r if isinstance(r, tuple) else (r, ()) for r in (loss, want))
    total, want_total = found[0].sum(), wanted[0].sum()
    torch.testing.assert_close(full(found[0]), wanted[0], rtol=1e-12, atol=0, equal_nan=True)
    for s, t in zip(found[1], wanted[1]):
        assert (s is None) == (t is None)
        if s is not None:
            close(s, t)
            if s.is_floating_point():
                total, want_total = total + s.sum(), want_total + t.sum()
    total.backward(), want_total.backward()
    for got, leaf in zip((x, weight, bias), leaves):
        assert all(
            p == q or p.is_replicate() for p, q in zip(got.grad.placements, got.placements)
        ), got.grad.placements
        close(got.grad, leaf.grad)


def split_logprobs(mesh) -> None:
    """What trainers of policies ask for, of rows that are split."""
    h, w = torch.randn(BATCH, 5, D, dtype=F64), torch.randn(V, D, dtype=F64)
    y = torch.randint(V, (BATCH, 5))
    for t in (h, w, y):
        dist.broadcast(t, 0)
    given = [distribute_tensor(h, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Replicate()])]
    labels = distribute_tensor(y, mesh, [Shard(0)])
    found = pyloss.token_logprobs(*given, labels, shift=1, return_entropy=True)
    for got, want in zip(found, pyloss.token_logprobs(h, w, y, shift=1, return_entropy=True)):
        close(got, want)


def split_rows_refused(mesh) -> None:
    h, w = torch.randn(2, 6, D), torch.randn(V, D)
    y = torch.randint(V, (2, 6))
    x, labels = (distribute_tensor(t, mesh, [Shard(1)]) for t in (h, y))
    whole_w = distribute_tensor(w, mesh, [Replicate()])
    linear = pyloss.fused_linear_cross_entropy
    raises(ValueError, "before they are split", lambda: linear(x, whole_w, labels, shift=1))
    raises(RuntimeError, "target must be a DTensor", lambda: linear(x, whole_w, y))
    raises(RuntimeError, "linear_weight must be a DTensor",
           lambda: linear(x, w.requires_grad_(), labels))  # fmt: skip
    raises(RuntimeError, "Shard(0)",
           lambda: linear(x, distribute_tensor(w.detach(), mesh, [Shard(1)]), labels))  # fmt: skip


def context_parallel_cases() -> dict[str, Callable]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {f"CP {way}": partial(sequence_parts, way) for way in ("function", "torchtitan")}
    for name, options in ROW_OPTIONS.items():
        found[f"CP, {name}"] = partial(split_rows, mesh, [Shard(1)], [Replicate()], options)
    found["batch shards, shift"] = partial(split_rows, mesh, [Shard(0)], [Replicate()], {}, shift=1)
    found["batch shards, shift, none"] = partial(
        split_rows, mesh, [Shard(0)], [Replicate()], dict(reduction="none"), shift=1
    )
    found["features split"] = partial(split_rows, mesh, [Shard(2)], [Replicate()], {})
    found["log-probabilities"] = partial(split_logprobs, mesh)
    found["CP refused"] = partial(split_rows_refused, mesh)
    return found


# --------------------------------------------------------------------------------------------------
# FSDP2


def root_only(model: nn.Module, **kwargs) -> None:
    fully_shard(model, **kwargs)


def root_that_reshards(model: nn.Module, **kwargs) -> None:
    fully_shard(model, reshard_after_forward=True, **kwargs)


def head_alone(model: nn.Module, **kwargs) -> None:
    fully_shard(model.layer, **kwargs)
    fully_shard(model.lm_head, **kwargs)
    fully_shard(model, **kwargs)


def head_with_norm(model: nn.Module, **kwargs) -> None:
    fully_shard([model.norm, model.lm_head], **kwargs)
    fully_shard(model, **kwargs)


def tied_in_one_group(model: nn.Module, **kwargs) -> None:
    fully_shard([model.embedding, model.lm_head], **kwargs)
    fully_shard(model, **kwargs)


def sharded(
    shard: Callable, way: str, *, inside: bool = False, tied: bool = False, tensor: bool = False
) -> None:
    """Two steps of SGD. Each rank, or with tensor parallelism each pair of them, has a batch of its
    own; the loss of the step is the mean of theirs."""
    world, rows = dist.get_world_size(), BATCH - 1
    model, alone = decoder(tied=tied), decoder(tied=tied)
    at, parts = dist.get_rank(), world
    if tensor:
        parts = max(world // 2, 1) if world % 2 == 0 else 1
        mesh = init_device_mesh("cpu", (parts, world // parts), mesh_dim_names=("dp", "tp"))
        tensor_parallel(model, mesh["tp"], {}, sequence=True)
        at = mesh.get_local_rank("dp")
        shard(model, mesh=mesh["dp"])
    else:
        shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
    for step in range(2):
        tokens, labels = batch(10 * step + at, rows)
        if inside:
            loss = model(tokens, labels, way)
        else:
            loss = losses_of(model)[way](model(tokens), labels)
        loss.backward()
        losses = [whole(alone, *batch(10 * step + r, rows)) for r in range(parts)]
        close(loss, losses[at], 1e-10)
        for p in alone.parameters():
            p.grad /= parts  # FSDP2 takes the mean
        same_gradients(model, alone)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def in_half(shard: Callable) -> None:
    """Parameters and hidden states in bfloat16, loss and sums of gradients in float32."""
    model, alone = decoder(torch.float32), decoder()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=policy)
    tokens, labels = batch(0)
    loss = losses_of(model)["torchtitan"](model(tokens), labels)
    assert loss.dtype == torch.float32
    close(loss.double(), whole(alone, tokens, labels), 0.02)
    loss.backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        close(full(p.grad).double(), q.grad, 0.02)


def left_sharded(shard: Callable, way: str, words: str, inside: bool = False) -> None:
    """A weight that the loss does not get whole: an error that says what to do, not a number."""
    model = decoder()
    shard(model)
    tokens, labels = batch(dist.get_rank())

    def call() -> Tensor:
        if inside:
            return model(tokens, labels, way)
        return losses_of(model)[way](model(tokens), labels)

    raises(RuntimeError, words, call)


def fsdp_cases() -> dict[str, Callable]:
    found = {}
    for shard in (root_only, head_alone, head_with_norm):
        for inside in (False, True):
            for way in ways(len(found)):
                name = f"FSDP2 {shard.__name__}, {way}, inside {inside}"
                found[name] = partial(sharded, shard, way, inside=inside)
    found |= {
        "FSDP2 root, function inside": partial(
            sharded, root_that_reshards, "function", inside=True
        ),
        "FSDP2 root, function outside": partial(sharded, root_only, "function"),
        "FSDP2 tied, root": partial(sharded, root_only, "module", tied=True),
        "FSDP2 tied, one group": partial(sharded, tied_in_one_group, "torchtitan", tied=True),
        "FSDP2 bfloat16": partial(in_half, head_alone),
        "FSDP2 bfloat16, one group": partial(in_half, head_with_norm),
        "FSDP2 sharded again": partial(
            left_sharded, root_that_reshards, "torchtitan", "fully_shard(["
        ),
        "FSDP2 sharded again, module": partial(
            left_sharded, root_that_reshards, "module", "unshard()"
        ),
        "FSDP2 past the layer": partial(
            left_sharded, head_alone, "function", "unshard()", inside=True
        ),
    }
    for shard in (root_only, head_alone, head_with_norm):
        for way in ways(len(found)):
            found[f"FSDP2 x TP {shard.__name__}, {way}"] = partial(sharded, shard, way, tensor=True)
    return found


def mixed_meshes() -> dict[str, Callable]:
    """Rows along one dimension, classes along the other."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2) if world % 2 == 0 else (world, 1))
    of_weight = [Replicate(), Shard(0)]
    found = {}
    for name in ROW_OPTIONS if world > 2 else ("mean", "class weights, z-loss", "statistics"):
        for along in (0, 1) if name == "mean" else (1,):
            for other in (Replicate(), Shard(1)) if name == "mean" else (Replicate(),):
                found[f"rows x classes {name}, {along}, {other}"] = partial(
                    split_rows, mesh, [Shard(along), other], of_weight, ROW_OPTIONS[name]
                )
    return found


# --------------------------------------------------------------------------------------------------
# Pipelines


class Residual(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


class Last(nn.Module):
    """Ends before its output layer, which the loss function calls."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.norm, self.lm_head = model.norm, model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def stages_of(model: Decoder, number: int) -> list[nn.Module]:
    first = [model.embedding, Residual(model.layer)]
    if number == 2:
        return [nn.Sequential(*first), Last(model)]
    return [*first, Residual(model.more), Last(model)]


def pipeline(schedule: type, way: str, mean_of_means: bool = False, virtual: int = 1) -> None:
    """Two ranks with `virtual` stages each; with four processes two pairs, and the last stage's
    output layer split."""
    world, number = dist.get_world_size(), 2 * virtual
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "tp"))
    model, alone = decoder(), decoder()
    for m in (model, alone):
        m.more = copy.deepcopy(m.layer)
    at = mesh.get_local_rank("pp")
    mine = list(range(at, number, 2))
    parts, wanted = stages_of(model, number), stages_of(alone, number)
    if at and world > 2:
        parallelize_module(model.lm_head, mesh["tp"], ColwiseParallel())
    tokens, labels = batch()
    if mean_of_means:  # the same number of labels in each
        labels = tokens.clone()
    count = int((labels != -100).sum())
    chunked = ChunkedLMHeadLoss()
    chunked.set_lm_head(model.lm_head)
    functions = {
        "module": lambda h, y: losses_of(model)["module"](h, y, num_items=count),
        "torchtitan": lambda h, y: chunked(h, y, count)[0],
        "mean": losses_of(model)["module"],
    }
    group = mesh.get_group("pp")
    stages = [PipelineStage(parts[i], i, number, torch.device("cpu"), group=group) for i in mine]
    run_schedule = schedule(
        stages if virtual > 1 else stages[0],
        BATCH,
        loss_fn=functions[way],
        scale_grads=mean_of_means,
    )
    found: list[Tensor] = []
    if at:
        run_schedule.step(target=labels, losses=found)
    else:
        run_schedule.step(tokens)
    hidden = tokens
    for part in wanted:
        hidden = part(hidden)
    logits = alone.lm_head(hidden).flatten(0, 1)
    want = nn.functional.cross_entropy(logits, labels.flatten())
    want.backward()
    if at:
        loss = torch.stack(found).sum() / (BATCH if mean_of_means else 1)
        close(loss.detach(), want.detach())
    for i in mine:
        same_gradients(parts[i], wanted[i])


def pipeline_cases() -> dict[str, Callable]:
    if dist.get_world_size() % 2:
        return {}
    found = {}
    for schedule in (ScheduleGPipe, Schedule1F1B):
        for way in ways(len(found)):
            found[f"{schedule.__name__}, {way}"] = partial(pipeline, schedule, way)
    found["GPipe, mean of means"] = partial(pipeline, ScheduleGPipe, "mean", mean_of_means=True)
    if dist.get_world_size() > 2:  # gradients of inputs and of weights on their own
        found["zero bubble"] = partial(
            pipeline, ScheduleInterleavedZeroBubble, "torchtitan", virtual=2
        )
    return found


# --------------------------------------------------------------------------------------------------
# The documentation


def scripts() -> dict[str, Callable]:
    """The torchrun scripts of docs/meshes.md, in this process group."""
    if dist.get_world_size() != 2:
        return {}
    page = (Path(__file__).resolve().parents[1] / "docs" / "meshes.md").read_text()

    def execute(source: str) -> None:
        with (
            patch.object(dist, "init_process_group", lambda backend: None),
            patch.object(dist, "destroy_process_group", lambda: None),
        ):
            exec(source, {"__name__": "__main__"})

    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    return {
        f"documentation {i}": partial(execute, block)
        for i, block in enumerate(blocks)
        if "init_process_group" in block
    }


def cases() -> dict[str, Callable]:
    return {
        **tensor_parallel_cases(),
        **context_parallel_cases(),
        **mixed_meshes(),
        **fsdp_cases(),
        **pipeline_cases(),
        **scripts(),
    }


if __name__ == "__main__":
    run(cases)
