"""One rank of the FSDP2 test of test_integration_transformers.py. How it runs: gloo.py."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import torch.distributed as dist
from gloo import run
from helpers import TORCH
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pyloss.integrations.torchtitan import ChunkedLMHeadLoss
from pyloss.integrations.transformers import patch_loss, unpatch_loss
from pyloss.optim.lr_scheduler import GradNormRecorder

VOCABULARY = 97
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def gemma2() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0))


def gpt2() -> GPT2LMHeadModel:
    sizes = dict(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2))


def shard_head_alone(model: LlamaForCausalLM, **kwargs: object) -> None:
    """The output layer is a group of its own: sharded before and after its forward."""
    for layer in model.model.layers:
        fully_shard(layer, **kwargs)
    fully_shard(model.lm_head, **kwargs)
    fully_shard(model, **kwargs)


def shard_layers(model: LlamaForCausalLM | GPT2LMHeadModel, **kwargs: object) -> None:
    """Output layer and embedding belong to the root."""
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)


def shard_embedding_with_head(model: LlamaForCausalLM, **kwargs: object) -> None:
    """A tied weight: both of its layers in one group."""
    for layer in model.model.layers:
        fully_shard(layer, **kwargs)
    fully_shard([model.model.embed_tokens, model.model.norm, model.lm_head], **kwargs)
    fully_shard(model, **kwargs)


def batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(3, VOCABULARY, (2, 10), generator=generator)
    labels = tokens.clone()
    labels[0, : 2 + rank] = -100
    return {"input_ids": tokens, "labels": labels}


def case(
    make: Callable,
    shard: Callable,
    *,
    patch_first: bool = True,
    checkpointing: bool = False,
    num_items: float | None = None,
    tolerance: float = 1e-6,
    half: bool = False,
    **options: object,
) -> None:
    """Two steps of SGD: losses, gradients and weights against one process with all batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tolerance *= world - 1  # gradients are summed over the ranks, in another order than here
    torch.manual_seed(7)
    model = make().train()
    reference = make().train()
    reference.load_state_dict(model.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable()
    if patch_first:
        patch_loss(model, **options)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, **({"mp_policy": bf16} if half else {}))
    if not patch_first:
        patch_loss(model, **options)
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    recorders = [GradNormRecorder(o, "l1" if checkpointing else "l2") for o in optimizers]
    for step in range(2):
        output = model(**batch(rank, step), **kwargs)
        assert output.logits is None
        losses = [reference(**batch(r, step), **kwargs).loss for r in range(world)]
        torch.testing.assert_close(
            output.loss.float(), losses[rank], atol=tolerance, rtol=10 * tolerance
        )
        output.loss.backward()
        torch.stack(losses).mean().backward()
        pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
        for (name, got), want in pairs:
            full = got.grad.full_tensor()
            scale = want.grad.abs().max().item()
            torch.testing.assert_close(
                full, want.grad, atol=tolerance * scale, rtol=tolerance, msg=lambda m, n=name: n + m
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    got, want = (recorder.norms for recorder in recorders)
    torch.testing.assert_close(got, want, atol=0, rtol=tolerance)
    if half:
        return
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.full_tensor(), want, atol=1e-6, rtol=1e-5)
    model.eval(), reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch(rank, 9)).logits, reference(**batch(rank, 9)).logits, atol=1e-5, rtol=1e-4
        )
    unpatch_loss(model).train()
    assert model(**batch(rank, 9)).logits.shape == (2, 10, VOCABULARY)


HEAD_LAYOUTS = (
    {},
    dict(use_local_output=False),
    dict(output_layouts=Replicate()),
)


def tensor_parallel(parallelize: Callable, make: Callable = llama, **options: object) -> None:
    """An output layer split by its classes: the same batch on each rank, one loss."""
    torch.manual_seed(7)
    model, reference = make().double().train(), make().double().train()
    reference.load_state_dict(model.state_dict())
    parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    patch_loss(model, **options), patch_loss(reference, **options)
    for step in range(2):  # the first is with hooks that torch sets up at the first
        losses = [m(**batch(0, step)).loss for m in (model, reference)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(
            grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def split_head(layouts: dict, model: LlamaForCausalLM, mesh: object) -> None:
    sequence = dict(input_layouts=Shard(1)) if layouts else {}
    plan = {"lm_head": ColwiseParallel(**sequence, **layouts)}
    if layouts:
        layouts = dict(output_layouts=Replicate(), desired_output_layouts=Shard(1))
        plan |= {"model.layers.1": PrepareModuleOutput(**layouts), "model.norm": SequenceParallel()}
    parallelize_module(model, mesh, plan)


def split_tied(model: Gemma2ForCausalLM, mesh: object) -> None:
    """The embedding by the same rows; parallelize_module takes a tied weight apart."""
    plan = {
        "lm_head": ColwiseParallel(),
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    model.lm_head.weight = model.model.embed_tokens.weight


def split_by_plan(model: LlamaForCausalLM, mesh: object) -> None:
    """As `from_pretrained(tp_plan="auto")`: a forward in the place of hooks."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    apply_tensor_parallelism(model, mesh, {"lm_head": "colwise_gather_output"})


def separate_embedding() -> None:
    """A tied weight that two groups manage: an error, from PyTorch or from pyloss, no number."""
    model = patch_loss(llama(tied=True).train())
    try:
        fully_shard(model.model.embed_tokens)
        shard_layers(model)
        model(**batch(dist.get_rank(), 0))
    except (RuntimeError, ValueError) as error:
        assert "fully_shard([" in str(error), error
    else:
        raise AssertionError("no error")


def weight_left_sharded() -> None:
    """Each rank has rows of its own: the loss over split classes would be wrong, not only slow."""
    model = patch_loss(llama().train())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = torch.nn.Parameter(sharded)
    try:
        model(**batch(dist.get_rank(), 0))
    except RuntimeError as error:
        assert "DTensor" in str(error), error
    else:
        raise AssertionError("no error")


class Skipping(torch.nn.Module):
    """A decoder in the manner of TorchTitan's, whose forward leaves the output layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 16)
        self.layer = torch.nn.Linear(16, 16)
        self.lm_head = torch.nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(tokens)).tanh()


def loss_with_the_head_inside() -> None:
    torch.manual_seed(0)
    ranks, model = dist.get_world_size(), Skipping()
    plain = copy.deepcopy(model)
    fully_shard(model.lm_head)
    fully_shard(model)
    tokens = [torch.randint(VOCABULARY, (2, 5 + r)) for r in range(ranks)]
    count = sum(t.numel() for t in tokens)
    losses = ChunkedLMHeadLoss(metrics=("entropy",)), ChunkedLMHeadLoss(metrics=("entropy",))
    for loss_fn, m in zip(losses, (model, plain)):
        loss_fn.set_lm_head(m.lm_head)
    mine = tokens[dist.get_rank()]
    loss, metrics = losses[0](model(mine), mine, count)
    loss.backward()
    found = torch.stack([loss.detach(), metrics["entropy/mean"]])
    dist.all_reduce(found)
    wanted = [losses[1](plain(t), t, count) for t in tokens]
    want = sum(loss for loss, _ in wanted)
    want.backward()
    entropy = sum(m["entropy/mean"] for _, m in wanted)
    torch.testing.assert_close(found, torch.stack([want.detach(), entropy]))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ranks * p.grad.full_tensor(), q.grad)  # FSDP2 averages


CASES = {
    "head in a group of its own": lambda: case(llama, shard_head_alone),
    "patched after sharding": lambda: case(llama, shard_head_alone, patch_first=False),
    "gradients formed again": lambda: case(llama, shard_head_alone, strategy="recompute"),
    "checkpointing, chunks": lambda: case(llama, shard_head_alone, checkpointing=True, chunk=4),
    "number of items": lambda: case(llama, shard_head_alone, num_items=13),
    "soft capping, tied in the root": lambda: case(gemma2, shard_layers),
    "tied in the root": lambda: case(gpt2, shard_layers),
    "tied in one group": lambda: case(lambda: llama(tied=True), shard_embedding_with_head),
    "bfloat16 parameters": lambda: case(llama, shard_head_alone, half=True, tolerance=0.03),
    # torch 2.11 lets it pass
    **({"tied in two groups": separate_embedding} if TORCH >= (2, 13) else {}),
    **{
        f"tensor-parallel, {layouts}": partial(
            tensor_parallel, partial(split_head, layouts), label_smoothing=0.1
        )
        for layouts in HEAD_LAYOUTS
    },
    "tensor-parallel, tied, soft capping": lambda: tensor_parallel(split_tied, gemma2),
    "tensor-parallel by a tp_plan": lambda: tensor_parallel(split_by_plan),
    "weight left sharded": weight_left_sharded,
    "loss with the head inside": loss_with_the_head_inside,
}


if __name__ == "__main__":
    run(lambda: CASES)
