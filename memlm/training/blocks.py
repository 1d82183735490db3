"""Training examples: equal blocks cut from one stream of all documents.

Documents are laid end to end, with one end-of-text token between them, and cut every
``block_length`` tokens; nothing is padded and every token is predicted exactly once per epoch
(Radford et al. 2018). A block may begin inside a document and hold several.

The order is a function of the seed and the number of the example alone, not of any random state:
example i belongs to epoch i // blocks, every epoch shuffles the blocks anew and begins its cuts at
another token. So a resumed run continues with the very example where it stopped, and a run on
several devices (``accelerate`` deals successive batches to successive devices) never sees an
example twice in an epoch.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from memlm.core.config import check
from memlm.data.tokens import TokenCorpus

_IGNORED = -100


class Stream(NamedTuple):
    """All documents in one row.

    Attributes:
        tokens: ``(n,)`` int32.
        scored: ``(n,)`` bool, False where a token is context only.
    """

    tokens: NDArray[np.int32]
    scored: NDArray[np.bool_]


def pack(corpus: TokenCorpus) -> Stream:
    """Lay the documents end to end; the end token of one serves as the begin token of the next."""
    tokens = corpus.tokens
    scored = np.ones(len(tokens), dtype=bool)
    kept = np.ones(len(tokens), dtype=bool)
    if corpus.begin_token is not None:
        begins = corpus.offsets[:-1][np.diff(corpus.offsets) > 0]
        scored[begins] = False
        later = begins[begins > 0]
        kept[later[tokens[later - 1] == corpus.begin_token]] = False
    return Stream(tokens[kept], scored[kept])


class TrainingBlocks(Dataset):
    """``items`` shuffled examples, as many epochs as that takes.

    An example is ``{"input_ids", "labels", "shift_labels"}``, each ``(block_length,)`` int64;
    ``shift_labels[t]`` is the token that follows ``input_ids[t]``, -100 where it is not scored
    (``labels`` is the same: transformers wants both).
    """

    def __init__(self, stream: Stream, block_length: int, *, items: int, seed: int):
        self.stream = stream
        self.block_length = block_length
        self.items = items
        self.seed = seed
        predictions = len(stream.tokens) - 1
        check(
            predictions >= block_length,
            f"the corpus must fill at least one block of {block_length} tokens and the token after "
            f"it, but has {len(stream.tokens)} tokens; give more text or lower block_length",
        )
        # One block less than fits leaves room to begin the cuts anywhere in a block.
        self.blocks = max(1, (predictions - block_length) // block_length)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(item, self.blocks)
        return example(self.stream, int(self._starts(epoch)[place]), self.block_length)

    def targets(self, items: int) -> int:
        """How many tokens the first ``items`` examples predict."""
        passed = np.concatenate([[0], np.cumsum(self.stream.scored, dtype=np.int64)])
        total = 0
        for epoch in range(-(-items // self.blocks)):
            starts = self._starts(epoch)[: items - epoch * self.blocks] + 1
            total += int((passed[starts + self.block_length] - passed[starts]).sum())
        return total

    def _starts(self, epoch: int) -> NDArray[np.int64]:
        """Where the blocks of an epoch begin, shuffled."""
        if self._order is None or self._order[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            spare = len(self.stream.tokens) - 1 - self.blocks * self.block_length
            first = draw.integers(0, spare, endpoint=True)
            self._order = epoch, first + self.block_length * draw.permutation(self.blocks)
        return self._order[1]


class HeldOutBlocks(Dataset):
    """Every token of a stream but its first predicted once, in order; the last block is padded."""

    def __init__(self, stream: Stream, block_length: int):
        self.stream = stream
        self.block_length = block_length
        self.targets = int(stream.scored[1:].sum())
        check(
            self.targets > 0,
            f"held-out text must have at least two tokens, got {len(stream.tokens)}; give more",
        )

    def __len__(self) -> int:
        return -(-(len(self.stream.tokens) - 1) // self.block_length)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        if item >= len(self):
            raise IndexError(item)
        return example(self.stream, item * self.block_length, self.block_length)


def example(stream: Stream, start: int, length: int) -> dict[str, torch.Tensor]:
    """The block of ``length`` inputs at ``start``, padded with token 0 where the stream ends."""
    window = slice(start, start + length + 1)
    tokens = stream.tokens[window].astype(np.int64)
    labels = np.full(length, _IGNORED, dtype=np.int64)
    following = len(tokens) - 1
    labels[:following] = np.where(stream.scored[window][1:], tokens[1:], _IGNORED)
    inputs = np.zeros(length, dtype=np.int64)
    inputs[:following] = tokens[:following]
    targets = torch.from_numpy(labels)
    return {"input_ids": torch.from_numpy(inputs), "labels": targets, "shift_labels": targets}


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack examples to ``(rows, block_length)`` tensors."""
    return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}
