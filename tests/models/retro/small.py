"""A small RETRO model and a retriever that makes up neighbours, for tests."""

import torch

from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig

CHUNK = 4
VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "encoder_hidden_size": 12,
    "encoder_num_layers": 2,
    "chunk_size": CHUNK,
    "cross_attention_layers": (2, 3),
    "initializer": "torch",
    "pad_token_id": 0,
}
POST_NORM = {"norm_first": False, "norm": "layer"}


def small_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return RetroForCausalLM(RetroConfig(**{**SHAPE, **changes})).to(dtype).eval()


def made_up(batch, time, k=2, length=2 * CHUNK, seed=0):
    """Tokens, neighbours of their chunks and a mask with holes and padding."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (batch, time), generator=draw)
    shape = (batch, time // CHUNK, k, length)
    neighbours = torch.randint(1, VOCABULARY, shape, generator=draw)
    return tokens, neighbours, torch.rand(shape, generator=draw) < 0.8


class Arithmetic:
    """Neighbours that are a function of the chunk's tokens; remembers what it was asked."""

    def __init__(self, k=2, length=2 * CHUNK):
        self.shape, self.asked = (k, length), []

    def retrieve(self, chunks):
        self.asked += [chunk.tolist() for chunk in chunks]
        steps = torch.arange(self.shape[0] * self.shape[1]).view(self.shape)
        sums = torch.stack([(chunk * torch.arange(1, len(chunk) + 1)).sum() for chunk in chunks])
        tokens = (sums[:, None, None] + 3 * steps) % (VOCABULARY - 1) + 1
        return tokens, steps.expand_as(tokens) % 5 != 3
