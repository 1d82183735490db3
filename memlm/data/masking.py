"""Dynamic masking for masked language models (Devlin et al. 2019; Liu et al. 2019, RoBERTa).

Of the n units of a sample (tokens, or whole words) m = floor(0.15 n + u) are predicted, u uniform
in [0, 1); of those 80 % become the mask token, 10 % a random token, 10 % stay. Every epoch draws
anew, from (seed, epoch, number of the sample) alone, so a resumed run reads what it would have
read.

The draws are those of the TUPE authors' code, in its order. ``Masking.legacy_seeds`` also takes its
seeds (a hash cut to six digits, as CPython 3.8 and later compute it), which gives the very same
masks; by default the three numbers are mixed without loss. As there, the first and last token of a
sample can be chosen, and a random replacement can be the mask token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import Config, check
from memlm.data.batches import IGNORED


@dataclass(frozen=True)
class Masking(Config):
    """How samples are masked.

    Attributes:
        mask_prob: share of units that are predicted.
        leave_prob: of those, the share that stays as it is.
        random_prob: of those, the share that becomes a random token; the rest is masked.
        whole_words: units are words; needs a table of tokens that end a word.
        first_random: smallest token id that a random replacement may be (below: special tokens).
        legacy_seeds: seed as the TUPE authors' code does.

    Raises:
        InputError: if a share is out of range.
    """

    mask_prob: float = 0.15
    leave_prob: float = 0.1
    random_prob: float = 0.1
    whole_words: bool = False
    first_random: int = 7
    legacy_seeds: bool = False

    def __post_init__(self) -> None:
        for name in ("mask_prob", "leave_prob", "random_prob"):
            share = getattr(self, name)
            check(0 <= share <= 1, f"{name} must lie between 0 and 1, got {share}")
        check(0 < self.mask_prob < 1, f"mask_prob must lie between 0 and 1, got {self.mask_prob}")
        check(
            self.leave_prob + self.random_prob <= 1,
            "leave_prob and random_prob must not exceed 1 together, got "
            f"{self.leave_prob} and {self.random_prob}",
        )
        check(self.first_random >= 0, f"first_random must not be negative, got {self.first_random}")


class Masked(NamedTuple):
    """A masked sample.

    Attributes:
        tokens: ``(time,)`` int64, what the model reads.
        labels: ``(time,)`` int64, the original token where one is predicted, else -100.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]


class Masker:
    """Masks samples of one vocabulary.

    Args:
        vocab_size: number of tokens, the mask included.
        mask_token: its id.
        masking: the shares.
        ends_word: ``(vocab_size,)`` bool, tokens that end a word; for whole words.
        counts: ``(vocab_size,)``, random replacements are drawn in proportion; None: uniformly.

    Raises:
        InputError: if the ids do not fit or whole words lack their table.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_token: int,
        masking: Masking,
        *,
        ends_word: NDArray[np.bool_] | None = None,
        counts: NDArray[np.number] | None = None,
    ):
        check(
            0 <= mask_token < vocab_size,
            f"mask_token must be in [0, {vocab_size}), got {mask_token}",
        )
        check(
            not masking.whole_words or ends_word is not None,
            "whole_words must have a table of the tokens that end a word; pass ends_word",
        )
        weights = np.ones(vocab_size) if counts is None else np.array(counts, dtype=np.float64)
        weights[: masking.first_random] = 0
        check(
            weights.sum() > 0,
            f"there must be tokens to replace with from {masking.first_random} on, got a "
            f"vocabulary of {vocab_size}",
        )
        self.mask_token = mask_token
        self.masking = masking
        self.ends_word = ends_word
        self.weights = weights / weights.sum()

    def __call__(
        self, tokens: NDArray[np.integer], *, seed: int, epoch: int, number: int
    ) -> Masked:
        """Mask one sample.

        Args:
            tokens: ``(time,)`` original tokens.
            seed: of the run.
            epoch: that reads the sample.
            number: of the sample in the data.
        """
        settings = self.masking
        tokens = np.asarray(tokens, dtype=np.int64)
        draw = np.random.RandomState(_seed(seed, epoch, number, legacy=settings.legacy_seeds))
        lengths = self._word_lengths(tokens) if settings.whole_words else None
        units = len(tokens) if lengths is None else len(lengths)
        chosen = np.zeros(units, dtype=bool)
        amount = int(settings.mask_prob * units + draw.rand())
        chosen[draw.choice(units, amount, replace=False)] = True
        masked, replaced = self._split(chosen, draw)
        if lengths is not None:
            chosen, masked = np.repeat(chosen, lengths), np.repeat(masked, lengths)
            replaced = np.repeat(replaced, lengths)
        source = tokens.copy()
        source[masked] = self.mask_token
        if settings.random_prob > 0:
            source[replaced] = draw.choice(len(self.weights), replaced.sum(), p=self.weights)
        return Masked(source, np.where(chosen, tokens, IGNORED))

    def _split(
        self, chosen: NDArray[np.bool_], draw: np.random.RandomState
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of the chosen units are masked, and which replaced at random."""
        leave, random = self.masking.leave_prob, self.masking.random_prob
        nothing = np.zeros(len(chosen), dtype=bool)
        if leave + random == 0:
            return chosen, nothing
        other = chosen & (draw.rand(len(chosen)) < leave + random)
        left = other
        if random > 0:
            left = nothing
            if leave > 0:
                left = other & (draw.rand(len(chosen)) < leave / (leave + random))
        return chosen & ~other, other & ~left

    def _word_lengths(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens each word has; what follows the last end is a word too."""
        if self.ends_word is None or len(tokens) == 0:
            return np.ones(len(tokens), dtype=np.int64)
        ends = np.flatnonzero(self.ends_word[tokens])
        if len(ends) == 0 or ends[-1] != len(tokens) - 1:
            ends = np.append(ends, len(tokens) - 1)
        return np.diff(ends, prepend=-1)


def collate_masked(
    samples: list[dict[str, Tensor]], *, pad_token: int, multiple: int = 1
) -> dict[str, Tensor]:
    """Samples of different lengths as one batch, padded on the right.

    Args:
        samples: each with ``input_ids`` and ``labels`` of ``(time,)``.
        pad_token: fills ``input_ids``; labels are filled with -100.
        multiple: the width is a multiple of it.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, each ``(batch, width)`` int64.
    """
    width = -(-max(len(sample["input_ids"]) for sample in samples) // multiple) * multiple
    rows = (len(samples), width)
    batch = {
        "input_ids": torch.full(rows, pad_token),
        "labels": torch.full(rows, IGNORED),
        "attention_mask": torch.zeros(rows, dtype=torch.long),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][row, :length] = sample["input_ids"]
        batch["labels"][row, :length] = sample["labels"]
        batch["attention_mask"][row, :length] = 1
    return batch


def _seed(seed: int, epoch: int, number: int, *, legacy: bool) -> int:
    if legacy:
        return int(hash((seed, epoch, number)) % 1e6)
    return int(np.random.SeedSequence([seed, epoch, number]).generate_state(1)[0])
