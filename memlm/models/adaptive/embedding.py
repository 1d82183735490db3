"""Adaptive input: every band of words has a table of its own width, projected to the model's.

    e(w) = P_b T_b[w - begin_b]        b the band of word w

Rare words are many and seldom seen, so they get few numbers each. The projection exists for the
first band too, although its table already has the model's width. Source: Baevski and Auli (2019),
section 3; initial values as in fairseq, which zeroes row 1 of *every* band's table, though only
the first band's row 1 is the padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memlm.models.adaptive.bands import Band

PAD = 1


class AdaptiveEmbedding(nn.Module):
    """Word vectors from bands.

    Args:
        bands: from `make_bands`.
        dim: width of what comes out.
    """

    def __init__(self, bands: Sequence[Band], dim: int):
        super().__init__()
        self.bands = list(bands)
        self.num_embeddings = self.bands[-1].end
        self.tables = nn.ModuleList(
            nn.Embedding(band.size, band.width, padding_idx=PAD if band.begin == 0 else None)
            for band in self.bands
        )
        self.projections = nn.ModuleList(
            nn.Linear(band.width, dim, bias=False) for band in self.bands
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """``(...)`` int64 words to ``(..., dim)``."""
        words = tokens.flatten()
        places, vectors = [], []
        for band, table, projection in zip(self.bands, self.tables, self.projections, strict=True):
            inside = ((words >= band.begin) & (words < band.end)).nonzero().squeeze(-1)
            places.append(inside)
            vectors.append(projection(table(words[inside] - band.begin)))
        order = torch.cat(places).argsort()
        return torch.cat(vectors)[order].view(*tokens.shape, -1)
