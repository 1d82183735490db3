"""Adaptive softmax: first a frequent word or a class of rarer ones, then the word inside its class.

For a hidden state f the head scores the words of band 0 and one class per further band,

    h = [ T_0 f ; C f ]            and  log p(w) = h_w - lse(h)                        w in band 0
    log p(w) = h_class(b) - lse(h) + log_softmax(T_b P_b^T f)[w - begin_b]             w in band b

(Grave et al. 2017; with the input's tables T and projections P, Baevski and Auli 2019).

Unnormalised log-scores. ``forward`` returns one score per word,

    l_w = h_w   in band 0,         l_w = h_class(b) + log_softmax(T_b P_b^T f)[w - begin_b]

The words of band b then hold exactly the mass exp(h_class(b)) of their class, so logsumexp(l) =
lse(h): the partition is the *head's*, and the softmax of l is the distribution above. This is the
scale on which TRIME (Zhong et al. 2022, eq. 4) puts memories beside the vocabulary: `union` of l,
or of `target`'s partial, with a memory is exact, and needs no row of the whole vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.core.types import TargetPartial
from memlm.models.adaptive.bands import Band

_CHUNK_ENTRIES = 1 << 23  # scores held at once: 32 MiB in float32


class AdaptiveHead(nn.Module):
    """Scores of words from hidden states.

    Tables ``(words, width)`` may be the input embedding's own, and projections ``(dim, width)``,
    which the head uses transposed, its projections.

    Args:
        bands: from `make_bands`.
        dim: width of the hidden states.
        dropout: on the hidden states, and inside the bands after the first.
    """

    def __init__(self, bands: Sequence[Band], dim: int, dropout: float = 0.0):
        super().__init__()
        self.bands = list(bands)
        self.vocab_size = self.bands[-1].end
        self.dropout = dropout
        rare = self.bands[1:]
        self.tables = nn.ModuleList(
            nn.Linear(band.width, band.size, bias=False) for band in self.bands
        )
        self.projections = nn.ModuleList(nn.Linear(band.width, dim, bias=False) for band in rare)
        self.classes = nn.Linear(dim, len(rare), bias=False) if rare else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-scores of all words.

        Args:
            hidden: ``(..., dim)`` final hidden states.

        Returns:
            ``(..., vocabulary)`` natural log; their log-sum-exp is the head's partition.
        """
        hidden = F.dropout(hidden, self.dropout, self.training)
        scores = [self.tables[0](hidden)]
        if self.classes is not None:
            classes = self.classes(hidden)
            for number in range(len(self.projections)):
                inside = torch.log_softmax(self._inside(hidden, number), dim=-1)
                scores.append(classes[..., number : number + 1] + inside)
        return torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]

    def target(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> TargetPartial:
        """What the head says about known next words, without a row of the vocabulary.

        Args:
            hidden: ``(queries, dim)`` final hidden states.
            targets: ``(queries,)`` int64 words.
            chunk: rows whose scores are held at once; None picks about 32 MiB worth.

        Returns:
            ``(queries,)`` in float32 or wider: ``lse``, the head's partition over frequent words
            and classes, and ``target_lse``, the target's score as `forward` gives it.
        """
        hidden = F.dropout(hidden, self.dropout, self.training)
        rows = chunk or max(1, _CHUNK_ENTRIES // max(band.size for band in self.bands))
        parts = [
            self._target(part, wanted)
            for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        lse, own = zip(*parts, strict=True)
        return TargetPartial(torch.cat(lse), torch.cat(own))

    def _target(self, hidden: Tensor, targets: Tensor) -> TargetPartial:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scores = self.tables[0](hidden)
        frequent = self.bands[0].size
        if self.classes is not None:
            scores = torch.cat([scores, self.classes(hidden)], dim=-1)
        scores, column, extra = scores.to(wide), targets, []
        for number, band in enumerate(self.bands[1:]):
            rows = ((targets >= band.begin) & (targets < band.end)).nonzero().squeeze(-1)
            column = column.index_fill(0, rows, frequent + number)
            inside = torch.log_softmax(self._inside(hidden[rows], number).to(wide), dim=-1)
            own = inside.gather(-1, targets[rows, None] - band.begin).squeeze(-1)
            extra.append((rows, own))
        found = scores.gather(-1, column[:, None]).squeeze(-1)
        for rows, own in extra:
            found = found.index_add(0, rows, own)
        return TargetPartial(torch.logsumexp(scores, dim=-1), found)

    def _inside(self, hidden: Tensor, number: int) -> Tensor:
        """``(..., band size)`` logits of a band after the first."""
        # input projections are (dim, width), so they are used transposed here
        narrow = F.linear(hidden, self.projections[number].weight.T)  # type: ignore[operator]
        return self.tables[number + 1](F.dropout(narrow, self.dropout, self.training))
