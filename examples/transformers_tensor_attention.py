"""A small Llama whose attention is converted to look at pairs of tokens, and trained on.

First on text, Python's own documentation, one token per byte: the converted model begins where the
plain one stands, learns, generates, and is saved and loaded. Then on a task that needs triples: the
tokens are numbers of 5 bits, and the label of a token says whether two earlier ones have it as
their exclusive or. Plain and converted model start from the same weights, trained for some steps,
and get the same batches. A plain model of two layers is trained as long from the start.

Run: python examples/transformers_tensor_attention.py [--seeds 3] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from transformers.utils.logging import disable_progress_bar

from pyloss.integrations.transformers import convert, from_pretrained

LENGTH = 64  # bytes per sequence
BOS, VOCABULARY = 256, 257  # the bytes, and a token that begins each text
BITS, NUMBERS = 5, 12  # of the task
TEXT_STEPS, TASK_START, TASK_STEPS = 150, 300, 1000


def config(layers: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.1,
        **options,
    )


# --- text ---------------------------------------------------------------------------------------


def load_tokens() -> Tensor:
    """The topics of Python's help() in one line of byte numbers."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()))


def on_text(steps: int) -> None:
    torch.manual_seed(0)
    tokens = load_tokens()
    held_out = tokens[-64 * LENGTH :].view(64, LENGTH)
    tokens = tokens[: -64 * LENGTH]
    options = dict(vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=BOS)
    model = LlamaForCausalLM(config(2, **options))

    def train(model: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)  # the same batches for every model
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
        for _ in range(steps):
            starts = torch.randint(len(tokens) - LENGTH, (16, 1), generator=generator)
            words = tokens[starts + torch.arange(LENGTH)]
            loss = model(input_ids=words, labels=words).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()

    @torch.no_grad()
    def loss_of(model: Any) -> str:
        return f"{model(input_ids=held_out, labels=held_out).loss.item():.4f}"

    print(f"Text, {steps} steps with plain attention, then {steps} more:")
    train(model, 0)
    converted = convert(copy.deepcopy(model), layers=[-1], window=(64, 16))
    print(
        f"  held-out loss at the conversion  plain {loss_of(model)}  converted {loss_of(converted)}"
    )
    train(model, 1), train(converted, 1)
    print(
        f"  held-out loss after training     plain {loss_of(model)}  converted {loss_of(converted)}"
    )

    with tempfile.TemporaryDirectory() as folder:
        converted.save_pretrained(folder)
        converted = from_pretrained(folder)  # not LlamaForCausalLM.from_pretrained
    prompt = torch.tensor([list(b"The class ")])
    written = converted.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=BOS)
    print(f"  {bytes(t for t in written[0].tolist() if t < BOS).decode(errors='replace')!r}")


# --- triples ------------------------------------------------------------------------------------


def sample(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers that are not 0, and per number whether it is the xor of two before it."""
    x = torch.randint(1, 2**BITS, (rows, NUMBERS), generator=generator)
    xor = x[:, :, None] ^ x[:, None, :]
    found = x[:, :, None, None] == xor[:, None]
    before = torch.ones(NUMBERS, NUMBERS, dtype=torch.bool).tril(-1)
    pairs = before[:, :, None] & before[:, None, :]
    return x, (found & pairs).flatten(2).any(-1).long()


TEST = sample(2000, torch.Generator().manual_seed(999))


@torch.no_grad()
def accuracy(model: Any) -> float:
    right = model.eval()(TEST[0]).logits.argmax(-1) == TEST[1]
    model.train()
    return right.float().mean().item()


def fit(model: Any, steps: int, generator: torch.Generator) -> float:
    """Seconds that the training took."""
    rate = 4e-3
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    start = time.perf_counter()
    for _ in range(steps):
        x, y = sample(64, generator)
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def on_triples(seed: int, start: int, steps: int) -> list[tuple[str, int, float, float]]:
    """(name, parameters, accuracy, seconds) of each model."""
    rows = []

    def note(name: str, model: Any, seconds: float = 0.0) -> None:
        rows.append((name, sum(p.numel() for p in model.parameters()), accuracy(model), seconds))
        print(f"  seed {seed}: {name}: {rows[-1][2]:.4f}, {seconds:.0f} s", flush=True)

    options = dict(vocab_size=2**BITS, num_labels=2, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    plain = LlamaForTokenClassification(config(1, **options))
    generator = torch.Generator().manual_seed(seed)
    note(f"plain, {start} steps", plain, fit(plain, start, generator))
    state = generator.get_state()
    converted = convert(copy.deepcopy(plain), layers="all", window=None)
    note("the same, converted", converted)
    for name, model in (("plain", plain), ("converted", converted)):
        generator.set_state(state)
        note(f"{name}, {steps} more", model, fit(model, steps, generator))
    torch.manual_seed(seed)
    deep = LlamaForTokenClassification(config(2, **options))
    seconds = fit(deep, start + steps, torch.Generator().manual_seed(seed))
    note(f"plain, two layers, {start + steps}", deep, seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, which teach nothing")
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)  # the tensors are too small for more
    if arguments.quick:
        text_steps, start, steps, seeds = 4, 5, 7, 1
    else:
        text_steps, start, steps, seeds = TEXT_STEPS, TASK_START, TASK_STEPS, arguments.seeds

    on_text(text_steps)
    by_position = TEST[1].float().mean(0)
    guess = torch.maximum(by_position, 1 - by_position).mean()
    print(f"\nIs it the xor of two before it? {NUMBERS} numbers of {BITS} bits. Right answers:")
    results = [on_triples(seed, start, steps) for seed in range(seeds)]
    heads = "".join(f"{f'seed {seed}':>9}" for seed in range(seeds))
    print(f"  {'model':<26}{'parameters':>11}{heads}{'time':>8}")
    for rows in zip(*results):
        name, parameters, _, _ = rows[0]
        right = "".join(f"{row[2]:9.1%}" for row in rows)
        seconds = sum(row[3] for row in rows) / seeds
        print(f"  {name:<26}{parameters:>11}{right}{f'{seconds:.0f} s' if seconds else '':>8}")
    print(f"  {'the likelier one by place':<26}{0:>11}{f'{guess:.1%}':>9}")


if __name__ == "__main__":
    main()
