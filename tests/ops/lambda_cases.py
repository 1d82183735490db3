"""Small inputs of Lambda attention: rows with padding, grouped heads, a plain rotation."""

import torch

from memlm.ops.lambda_rule import Keys, LambdaConfig

DIM = 4


def rotate(x, positions):
    """Rotary embedding of adjacent pairs, in the dtype of ``x``."""
    frequencies = 10.0 ** -torch.arange(0, x.shape[-1], 2, dtype=x.dtype)
    angles = (positions[:, None, :, None] * frequencies).to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def case(positions, *, heads=4, key_heads=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        shape = (positions.shape[0], count, positions.shape[1], DIM)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads), Keys(draw(key_heads), draw(key_heads), positions)


def rows(*lengths, columns):
    """Left-padded rows of positions."""
    return torch.tensor([[-1] * (columns - n) + list(range(n)) for n in lengths])


CONFIGS = [
    LambdaConfig(window=w, sinks=g, distance_limit=d, clamp=c, pinned=tuple(p))
    for w, g, d, c, *p in [
        (4, 2, 4, "causal"), (4, 0, None, "causal"), (1, 3, 1, "causal"), (5, 2, 3, "causal"),
        (3, 2, 7, "causal"), (3, 2, 7, "original"), (3, 40, None, "causal"), (50, 2, 9, "causal"),
        (4, 2, 100, "original"), (4, 2, None, "streaming"), (2, 5, None, "streaming"),
        (4, 2, 4, "causal", (6, 8)), (3, 0, None, "causal", (2, 4), (7, 9)),
        (2, 1, 5, "causal", (4, 6), (7, 8)), (2, 0, 5, "original", (4, 6)),
    ]
]  # fmt: skip
