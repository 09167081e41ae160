"""Fine-tunes a small Llama of transformers with the loss of pyloss, which stores no logits.

The weights are random and the text is Python's own documentation, one token per byte, so nothing
is downloaded.

Run: python examples/transformers_lm_loss.py [--steps 40]
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyloss.integrations.transformers import patch_loss

LENGTH = 64  # bytes per sequence
BOS, VOCABULARY = 256, 257  # the bytes, and a token that begins each text


def load_tokens() -> torch.Tensor:
    """The topics of Python's help() in one line of byte numbers."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    tokens = load_tokens()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    model = LlamaForCausalLM(config).train()

    def batch(rows: int = 8) -> torch.Tensor:
        starts = torch.randint(len(tokens) - LENGTH, (rows, 1))
        return tokens[starts + torch.arange(LENGTH)]

    # 1. One line. The loss is the model's own.
    words = batch()
    before = model(input_ids=words, labels=words)
    patch_loss(model, z_loss=0.0)  # any option of pyloss.fused_linear_cross_entropy
    after = model(input_ids=words, labels=words)
    print(f"transformers {before.loss.item():.6f}, logits {tuple(before.logits.shape)}")
    print(f"pyloss       {after.loss.item():.6f}, logits {after.logits}")

    # 2. Training as before.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        words = batch()
        loss = model(input_ids=words, labels=words).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, steps) or step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    # 3. Evaluation and generation have their logits, by the model's own code.
    model.eval()
    with torch.no_grad():
        print(f"logits in eval mode: {tuple(model(input_ids=words, labels=words).logits.shape)}")
    prompt = torch.tensor([list(b"The class ")])
    written = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=BOS)
    print(repr(bytes(t for t in written[0].tolist() if t < BOS).decode(errors="replace")))


if __name__ == "__main__":
    main()
