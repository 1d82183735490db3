"""Reading on and on: the loss of every token, piece by piece, at constant memory.

A piece is read with the cache of the pieces before it, and the last hidden state of a piece scores
the first token of the next one, so that

    nll(t) = -log p(token t | tokens before t)

is the same however the text is cut: only the very first token has nothing to be predicted from.
Logits are made in chunks and dropped at once (`memlm.models.head`).

Differs from LM-Infinite's code, which never scores the first token of a chunk and whose chunks grow
with the text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.extend import is_extended
from memlm.models.head import find_head
from memlm.models.running import device_of, frozen
from memlm.models.taps import body, capture, find_tap, reached


class Reader:
    """A model in the middle of some texts, read side by side.

    Attributes:
        model: the reader.
        cache: what it remembers; None before the first piece.
        hidden: ``(rows, dim)`` its last hidden states, None before the first piece.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.head, self.final = find_head(model), find_tap(model, "final")
        self.cache: Cache | None = None
        self.hidden: Tensor | None = None

    def read(self, tokens: Tensor, *, go_on: bool = True) -> Tensor:
        """Read the next piece of every row.

        Args:
            tokens: ``(rows, new)`` int64, without padding.
            go_on: whether another piece follows; False keeps no cache.

        Returns:
            ``(rows, new)`` negative log-likelihoods in nats, float64; of the first piece
            ``(rows, new - 1)``.

        Raises:
            InputError: if the rows are others than before, or there is no token.
        """
        tokens = tokens.to(device_of(self.model))
        if tokens.ndim != 2 or not tokens.numel():
            raise InputError(f"tokens must be (rows, new), got {tuple(tokens.shape)}")
        if self.hidden is not None and len(self.hidden) != len(tokens):
            raise InputError(
                f"every piece must have the {len(self.hidden)} rows of the first, got "
                f"{len(tokens)}; make a new Reader for other texts"
            )
        remembers = go_on or self.cache is not None
        with frozen(self.model), capture(self.model, self.final) as seen:
            output: Any = body(self.model)(
                input_ids=tokens, past_key_values=self.cache, use_cache=remembers
            )
            states = reached(seen, self.final).reshape(*tokens.shape, -1)
            targets = tokens[:, 1:]
            before = states[:, :-1]
            if self.hidden is not None:
                targets = tokens
                before = torch.cat([self.hidden[:, None], before], dim=1)
            partial = self.head.target(before.flatten(0, 1), targets.flatten())
            # a copy, so that the states of the whole piece can go
            self.hidden = states[:, -1].clone()
        self.cache = output.past_key_values if remembers else None
        return (partial.lse.double() - partial.target_lse.double()).view(targets.shape)


def read_whole(model: PreTrainedModel, tokens: Tensor, *, chunk: int = 4096) -> Tensor:
    """Negative log-likelihoods of whole rows; an extended model reads them in pieces.

    Args:
        model: extended or not.
        tokens: ``(rows, time)`` int64, at least 2 tokens.
        chunk: tokens of a piece.

    Returns:
        ``(rows, time - 1)`` float64, nats.
    """
    reader = Reader(model)
    if not is_extended(model):
        return reader.read(tokens, go_on=False)
    pieces = tokens.split(chunk, dim=1)
    last = len(pieces) - 1
    parts = [reader.read(piece, go_on=number < last) for number, piece in enumerate(pieces)]
    return torch.cat(parts, dim=1)


@contextmanager
def enough_positions(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Turn the end of a table of positions into an error with a way out.

    Raises:
        UnsupportedModelError: if the block reads on beyond such a table.
    """
    try:
        yield
    except IndexError as error:
        raise UnsupportedModelError(
            f"texts of {length} tokens need positions that are computed, but those of "
            f"{type(model).__name__} come from a table that ends earlier ({error}); use a model "
            "with rotary positions or ALiBi"
        ) from error
