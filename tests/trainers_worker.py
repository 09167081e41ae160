"""One rank of the tests of trainers and wrappers in several processes, of test_trainers_ranks.py.

How it runs: gloo.py.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# accelerate takes these for the signs of several processes; the group is there already.
os.environ["RANK"] = sys.argv[1]
os.environ["LOCAL_RANK"] = sys.argv[1]
os.environ["WORLD_SIZE"] = sys.argv[2]
os.environ["MASTER_ADDR"] = "127.0.0.1"
os.environ["MASTER_PORT"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from fsdp2_worker import VOCABULARY, batch, gemma2, gpt2, llama
from gloo import run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pyloss.integrations.transformers import enable, patch_loss

LAYERS, HEAD = {LlamaDecoderLayer}, {LlamaDecoderLayer, nn.Linear}


def fsdp1(
    make: Callable[[], Any],
    wrapped: set[type] | None,
    *,
    patch_first: bool = True,
    checkpointing: bool = False,
    half: bool = False,
    original: bool = True,
) -> None:
    """Two steps of SGD: losses and weights against one process with the batches of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tolerance = 0.03 if half else 1e-5
    torch.manual_seed(7)
    model = make().train()
    reference = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if patch_first:
        patch_loss(model)
    bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=None if wrapped is None else ModuleWrapPolicy(wrapped),
        mixed_precision=bf16 if half else None,
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    if not patch_first:
        patch_loss(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (sharded, reference)]
    for step in range(2):
        output = sharded(**batch(rank, step))
        assert output.logits is None
        losses = [reference(**batch(r, step)).loss for r in range(world)]
        torch.testing.assert_close(
            output.loss.float(), losses[rank], atol=tolerance, rtol=tolerance
        )
        output.loss.backward()
        torch.stack(losses).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(sharded):
        for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(
                got, want, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m
            )
    sharded.eval()
    assert sharded(**batch(rank, 9)).logits.shape == (2, 10, VOCABULARY)


def ddp(make: Callable[[], Any], **options: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    model = make().train()
    reference = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(patch_loss(model), **options)
    for step in range(2):
        loss = wrapped(**batch(rank, step)).loss
        losses = [reference(**batch(r, step)).loss for r in range(world)]
        torch.testing.assert_close(loss, losses[rank], atol=1e-5, rtol=1e-5)
        loss.backward()
        torch.stack(losses).mean().backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(
                p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: n + m
            )
            p.grad = q.grad = None


def assert_same_run(own: Any, ours: Any, train: Callable[[Any], None]) -> None:
    """The logs and the weights of two trainers; the weights are the same on every rank."""
    own.train()
    train(ours)
    assert own.accelerator.num_processes == dist.get_world_size()
    logs = [t.state.log_history for t in (own, ours)]
    for want, got in zip(*logs, strict=True):
        assert want.keys() == got.keys()
        for key in want.keys() & {"loss", "grad_norm", "train_loss", "rewards/margins", "entropy"}:
            assert math.isclose(want[key], got[key], rel_tol=2e-4, abs_tol=2e-6), (key, want, got)
    for p, q in zip(own.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=2e-4)
        first = q.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, q)


def trainer(**options: Any) -> None:
    from test_integration_transformers import make, trainer_of

    folder = Path(tempfile.gettempdir())
    torch.manual_seed(3)
    model = make()
    own, ours = (trainer_of(copy.deepcopy(model), folder, **options) for _ in range(2))

    def train(t: Any) -> None:
        with enable(strict=True):
            t.train()

    assert_same_run(own, ours, train)


def trl(kind: str, **options: Any) -> None:
    import test_integration_trl as cases

    words, folder = cases.tokenizer.__wrapped__(), Path(tempfile.gettempdir())
    own, ours = cases.both(kind, folder, words, ddp_backend="gloo", **options)
    assert_same_run(own, ours, lambda t: t.train())


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {
        "FSDP1, all in the root": lambda: fsdp1(llama, None),
        "FSDP1, the output layer in the root, tied": lambda: fsdp1(gemma2, {Gemma2DecoderLayer}),
        "FSDP1, the output layer alone": lambda: fsdp1(llama, HEAD, checkpointing=True),
        "FSDP1, flat parameters": lambda: fsdp1(llama, HEAD, original=False),
        "FSDP1, patched after": lambda: fsdp1(llama, LAYERS, patch_first=False),
        "FSDP1, bfloat16": lambda: fsdp1(llama, HEAD, half=True),
        "DDP": lambda: ddp(llama, static_graph=True),
        "DDP, tied": lambda: ddp(gpt2, gradient_as_bucket_view=True),
    }
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return found
    found["Trainer"] = trainer
    found["Trainer, tokens of all ranks, checkpointing"] = lambda: trainer(
        average_tokens_across_devices=True, gradient_checkpointing=True
    )
    try:
        import trl as _  # noqa: F401
    except ImportError:
        return found
    found["TRL, SFT"] = lambda: trl("sft")
    found["TRL, DPO"] = lambda: trl("dpo")
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    run(cases)
