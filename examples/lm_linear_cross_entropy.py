"""A language model's output layer and loss in one call: the logits are never stored.

Run: python examples/lm_linear_cross_entropy.py [--steps 60]
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import pyloss

PAD = 0
LENGTH = 24  # words per sequence


class WordModel(nn.Module):
    """Word numbers (B, T) to hidden states (B, T, width); the embedding is the output layer too."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.gru(self.embed(words))[0]


def load_rows() -> tuple[torch.Tensor, int]:
    """Paragraphs of Python's own documentation as padded rows of word numbers."""
    text = "\n\n".join(topics[name] for name in ("with", "class", "function", "try", "for"))
    paragraphs = [paragraph.split()[:LENGTH] for paragraph in text.split("\n\n")]
    paragraphs = [words for words in paragraphs if len(words) > 4]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(sum(paragraphs, [])), start=1)}
    rows = [torch.tensor([vocabulary[word] for word in words]) for words in paragraphs]
    return pad_sequence(rows, batch_first=True, padding_value=PAD), len(vocabulary) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    rows, vocabulary = load_rows()
    model = WordModel(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    # 1. Three lines become one. shift=1 scores position t against word t + 1: nothing is sliced.
    words = rows[:16]
    hidden = model(words)
    logits = F.linear(hidden[:, :-1], model.embed.weight)
    targets = words[:, 1:].flatten()
    before = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=PAD)
    after = pyloss.fused_linear_cross_entropy(
        hidden, model.embed.weight, words, shift=1, ignore_index=PAD
    )
    print(f"F.cross_entropy {before.item():.6f}, fused_linear_cross_entropy {after.item():.6f}")

    # 2. As a module that borrows the embedding, with options in the same pass.
    criterion = pyloss.nn.LinearCrossEntropyLoss.borrow(
        model.embed, shift=1, ignore_index=PAD, z_loss=1e-4
    )
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (16,))]
        loss = criterion(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    # 3. Log-probability and entropy of each word, as preference and RL training need them.
    with torch.no_grad():
        logprobs, entropy = pyloss.token_logprobs(
            model(words),
            model.embed.weight,
            words,
            shift=1,
            ignore_index=PAD,
            return_entropy=True,
        )
    known = words[:, 1:] != PAD
    print(
        f"mean log-probability {logprobs[known].mean().item():.3f}, "
        f"mean entropy {entropy[known].mean().item():.3f}"
    )


if __name__ == "__main__":
    main()
