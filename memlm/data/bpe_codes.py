"""Byte-pair codes in the format of fastBPE (Sennrich et al. 2016): read, write, apply, learn.

A line of codes is ``left right count``, in the order in which pairs were merged; ``</w>`` marks the
end of a word. Applied, pieces that do not end a word carry ``@@``. Special words are never split.
Equal counts are merged in the order of first appearance (fastBPE's order depends on a hash map).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from memlm.core.errors import CorruptStoreError, InputError

SPECIAL_WORDS = ("<unk>", "<url>", "<file>", "<email>")
_END, _INSIDE = "</w>", "@@"

Pair = tuple[str, str]


class BpeCodes:
    """Merges in their order.

    Args:
        pairs: left and right part of every merge.
        special: words that stay whole.

    Raises:
        InputError: if a pair stands there twice.
    """

    def __init__(self, pairs: Iterable[Pair], special: Iterable[str] = SPECIAL_WORDS):
        self.pairs = tuple(pairs)
        self.ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self.special = frozenset(special)
        if len(self.ranks) != len(self.pairs):
            twice = next(pair for rank, pair in enumerate(self.pairs) if self.ranks[pair] != rank)
            raise InputError(f"every pair of the codes must stand there once, but {twice} does not")

    def split(self, word: str) -> list[str]:
        """The pieces of a word, all but the last with ``@@``."""
        if word in self.special:
            return [word]
        parts = [*word[:-1], word[-1] + _END]
        while len(parts) > 1:
            ranked = [
                (self.ranks.get(pair, len(self.ranks)), place)
                for place, pair in enumerate(pairwise(parts))
            ]
            rank, _ = min(ranked)
            if rank == len(self.ranks):
                break
            parts = _merged(parts, self.pairs[rank])
        parts[-1] = parts[-1].removesuffix(_END)
        return [part + _INSIDE for part in parts[:-1]] + parts[-1:]

    def apply(self, line: str) -> str:
        """A line with every word split."""
        return " ".join(piece for word in line.split() for piece in self.split(word))


def read_codes(path: str | Path) -> BpeCodes:
    """Read a file of codes.

    Raises:
        CorruptStoreError: if a line is not two parts and a count.
        InputError: if a pair stands there twice.
    """
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split(" ")
        if len(parts) != 3 or not parts[2].isdigit():
            raise CorruptStoreError(
                f"line {number} of {path} must be two parts and a count, got {line!r}"
            )
        pairs.append((parts[0], parts[1]))
    return BpeCodes(pairs)


def learn_codes(lines: Iterable[str], merges: int) -> list[tuple[str, str, int]]:
    """Learn at most ``merges`` pairs, the most frequent first; fewer if none is left."""
    counted = Counter(word for line in lines for word in line.split())
    words = [
        ([*word[:-1], word[-1] + _END], count)
        for word, count in counted.items()
        if word not in SPECIAL_WORDS
    ]
    learnt = []
    for _ in range(merges):
        pairs: Counter[Pair] = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        best, count = max(pairs.items(), key=lambda item: item[1])
        learnt.append((*best, count))
        words = [(_merged(parts, best), times) for parts, times in words]
    return learnt


def _merged(parts: list[str], pair: Pair) -> list[str]:
    found, place = [], 0
    while place < len(parts):
        if tuple(parts[place : place + 2]) == pair:
            found.append(parts[place] + parts[place + 1])
            place += 2
        else:
            found.append(parts[place])
            place += 1
    return found
