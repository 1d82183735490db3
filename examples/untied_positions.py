"""Untied positions inside an encoder of your own: learn to move a token by one place.

    python examples/untied_positions.py

The encoder is plain PyTorch; nothing positional is added to its embeddings. The task (output the
token before) cannot be solved without positions.
"""

import torch
from torch import nn
from torch.nn import functional as F

from memlm.ops.untied_attention import PositionTerms, untied_attention
from memlm.positions.scheme import PositionScheme
from memlm.positions.untied import UntiedPositions

VOCAB, WIDTH, HEADS, TIME = 16, 32, 2, 12


class Layer(nn.Module):
    """Attention over words and positions, without a feed-forward."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, terms: PositionTerms) -> torch.Tensor:
        """``(batch, time, width)`` to the same."""
        heads = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = untied_attention(*heads, terms, scale=self.scale)
        return self.norm(x + self.mix(mixed.transpose(1, 2).flatten(2)))


class Encoder(nn.Module):
    """Two layers that share their position terms."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.positions = UntiedPositions(
            WIDTH, HEADS, PositionScheme.named("tupe-r"), max_positions=TIME
        )
        self.layers = nn.ModuleList(Layer(self.positions.scale) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(batch, time)`` tokens to scores of the vocabulary."""
        x, terms = self.words(tokens), self.positions(tokens.shape[1])  # once for all layers
        for layer in self.layers:
            x = layer(x, terms)
        return self.head(x)


def main():
    torch.manual_seed(0)
    encoder = Encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    for step in range(1, 201):
        tokens = torch.randint(1, VOCAB, (32, TIME))
        tokens[:, 0] = 0
        logits = encoder(tokens)[:, 2:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats per token")


if __name__ == "__main__":
    main()
