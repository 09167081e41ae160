"""A small GPT: pre-norm transformer blocks, learned positions, output tied to the embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_EMBEDDING_STD = 0.02


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Token numbers (B, T) to next-token logits (B, T, vocabulary).

    The embedding is small, so that the first logits are nearly equal, and is scaled up to unit
    variance where it enters the blocks. Since the same matrix reads the word in and gives the word
    out, one linear layer before the output keeps a word from predicting itself.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.turn = nn.Linear(width, width, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        nn.init.normal_(self.tokens.weight, std=_EMBEDDING_STD)
        nn.init.normal_(self.positions.weight, std=_EMBEDDING_STD)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the output layer, `self.tokens.weight`, is applied to: (B, T, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) / _EMBEDDING_STD + self.positions(positions)
        return self.turn(self.norm(self.blocks(x)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.hidden(tokens) @ self.tokens.weight.t()

    def parameter_groups(self, embedding_rate: float, rate: float) -> list[dict[str, Any]]:
        """Optimizer groups: the embeddings take larger steps, each row gets few gradients."""
        embeddings = [*self.tokens.parameters(), *self.positions.parameters()]
        other = [*self.blocks.parameters(), *self.norm.parameters(), *self.turn.parameters()]
        return [
            {"params": embeddings, "lr": embedding_rate, "full_lr": embedding_rate},
            {"params": other, "lr": rate, "full_lr": rate},
        ]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    count: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int = 40,
    banned: tuple[int, ...] = (),
) -> list[int]:
    """Continues `prompt` by `count` tokens drawn from the `top_k` likeliest."""
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-model.context :]])
        logits = model(window)[0, -1] / temperature
        logits[list(banned)] = float("-inf")
        values, indices = logits.topk(top_k)
        choice = torch.multinomial(values.softmax(0), 1, generator=generator)
        tokens.append(int(indices[choice]))
    return tokens
