"""Swap F.cross_entropy for pyloss in a language model, then use what only pyloss offers.

Run: python examples/lm_cross_entropy.py [--steps 60]
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
    """Word numbers (B, T) to next-word logits (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.gru(self.embed(words))[0])


def load_batch_source() -> tuple[torch.Tensor, int]:
    """Paragraphs of Python's own documentation as padded rows of word numbers."""
    text = "\n\n".join(topics[name] for name in ("with", "class", "function", "try", "for"))
    paragraphs = [paragraph.split()[: LENGTH + 1] for paragraph in text.split("\n\n")]
    paragraphs = [words for words in paragraphs if len(words) > 4]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(sum(paragraphs, [])), start=1)}
    rows = [torch.tensor([vocabulary[word] for word in words]) for words in paragraphs]
    return pad_sequence(rows, batch_first=True, padding_value=PAD), len(vocabulary) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    rows, vocabulary = load_batch_source()
    model = WordModel(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    # The first words of a paragraph cannot be known from what stands before: they count less.
    importance = torch.ones(LENGTH)
    importance[:3] = 0.25

    # 1. The swap: the same arguments, the same number.
    logits = model(rows[:16, :-1]).flatten(0, 1)
    targets = rows[:16, 1:].flatten()
    before = F.cross_entropy(logits, targets, ignore_index=PAD)
    after = pyloss.fused_cross_entropy(logits, targets, ignore_index=PAD)
    print(f"F.cross_entropy {before.item():.6f}, pyloss.fused_cross_entropy {after.item():.6f}")

    # 2. The options, in the same pass over the logits.
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (16,))]
        logits = model(batch[:, :-1]).flatten(0, 1)
        targets = batch[:, 1:].flatten()
        loss, stats = pyloss.fused_cross_entropy(
            logits,
            targets,
            ignore_index=PAD,  # padding: its logits are not even read
            z_loss=1e-4,  # keeps log(sum(exp(logits))) near zero
            token_weight=importance.repeat(16),
            return_stats=("correct", "entropy"),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0:
            words = targets != PAD
            accuracy = stats.correct[words].float().mean().item()
            entropy = stats.entropy[words].mean().item()
            print(
                f"step {step:3d}  loss {loss.item():.3f}  accuracy {accuracy:.1%}  "
                f"entropy {entropy:.2f}"
            )


if __name__ == "__main__":
    main()
