"""Dictionaries of fairseq: ``dict.txt``, one word and its count per line.

The file begins with id 4; before it stand ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2 and ``<unk>`` 3. Words
are sorted by frequency and filled up to a multiple of 8 with ``madeupword0000``, ... in the file.
A line of text becomes the ids of its words between white space, and ``</s>``.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError
from memlm.core.files import write_atomic
from memlm.data.tokens import TokenCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
PAD, EOS, UNKNOWN = 1, 2, 3
_SPACES = re.compile(r"\s+")
_MULTIPLE = 8  # of which the number of words is one


@dataclass(frozen=True)
class Dictionary:
    """Words by their id.

    Attributes:
        words: all of them, the four special ones first.
        counts: ``(words,)`` int64, how often each stood in the training text, as far as known.
    """

    words: tuple[str, ...]
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every word."""
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, line: str) -> list[int]:
        """The ids of a line's words, and ``</s>``."""
        ids = self.ids
        return [ids.get(word, UNKNOWN) for word in _words(line)] + [EOS]

    def corpus(self, lines: Iterable[str]) -> TokenCorpus:
        """Text as fairseq's preprocessing reads it; see `corpus_of_lines`."""
        encoded = [np.array(self.encode(line), np.int32) for line in lines]
        check(bool(encoded), "a corpus must have at least one line, got none")
        return corpus_of_lines(np.concatenate(encoded), [len(line) for line in encoded])

    def save(self, path: str | Path) -> None:
        """Write ``dict.txt``, as `read_dictionary` and fairseq read it."""
        after = len(SPECIALS)
        counted = zip(self.words[after:], self.counts[after:].tolist(), strict=True)
        content = "".join(f"{word} {count}\n" for word, count in counted).encode()
        write_atomic(Path(path), lambda file: file.write(content))

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """A tokenizer of transformers with the same ids.

        It splits at white space and puts no ``</s>`` at the ends of lines: text that was prepared
        by other tools (BPE, tokenisation) must be prepared in the same way before.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel(self.ids, unk_token=SPECIALS[UNKNOWN]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=SPECIALS[EOS],  # a text begins with the end of the one before
            eos_token=SPECIALS[EOS],
            pad_token=SPECIALS[PAD],
            unk_token=SPECIALS[UNKNOWN],
            clean_up_tokenization_spaces=False,
        )


def corpus_of_lines(tokens: NDArray[np.integer], sizes: Iterable[int]) -> TokenCorpus:
    """Lines as a corpus: every line a document, ``</s>`` before the first.

    This is what `memlm.data.windows.BlockWindows` cuts as fairseq does: each line ends with
    ``</s>``, which is the context of the next one's first word.

    Args:
        tokens: ``(n,)`` ids of all lines.
        sizes: tokens of every line.
    """
    ends = np.cumsum(np.fromiter(sizes, np.int64)) + 1
    stream = np.empty(len(tokens) + 1, np.int32)
    stream[0], stream[1:] = EOS, tokens
    return TokenCorpus.from_tokens(stream, np.concatenate([[0], ends]))


def build_dictionary(lines: Iterable[str]) -> Dictionary:
    """The dictionary that fairseq's preprocessing makes of a training text.

    So the vocabularies of published models are made of the published text.

    Args:
        lines: the text.

    Returns:
        All its words, the most frequent first, ties in the order of their characters.
    """
    found: Counter[str] = Counter(dict.fromkeys(SPECIALS, 0))
    for line in lines:
        found.update([*_words(line), SPECIALS[EOS]])
    special = {word: found.pop(word) for word in SPECIALS}
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    missing = -(len(special) + len(ordered)) % _MULTIPLE
    filled = [(f"madeupword{number:04d}", 0) for number in range(missing)]
    words, counts = zip(*special.items(), *ordered, *filled, strict=True)
    return Dictionary(words, np.array(counts, np.int64))


def _words(line: str) -> list[str]:
    return [word for word in _SPACES.split(line.strip()) if word]


def read_dictionary(path: str | Path) -> Dictionary:
    """Read ``dict.txt``.

    Args:
        path: of the file, or of the folder that it is in.

    Raises:
        CorruptStoreError: if it is missing or a line is not a word and a count.
        InputError: if a word stands there twice.
    """
    path = Path(path)
    path = path / "dict.txt" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptStoreError(
            f"{path} must be a dictionary of fairseq but cannot be read ({error}); is the path "
            "right?"
        ) from error
    words: list[str] = [*SPECIALS]
    counts = [0] * len(SPECIALS)
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        # a count may be followed by a mark that the word replaces an earlier one
        word, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not word or not count.isdigit():
            raise CorruptStoreError(
                f"line {number} of {path} must be a word, a space and its count, got {line!r}; "
                "fetch it again"
            )
        words.append(word)
        counts.append(int(count))
    dictionary = Dictionary(tuple(words), np.array(counts, np.int64))
    if len(dictionary.ids) != len(words):
        twice = next(word for number, word in enumerate(words) if dictionary.ids[word] != number)
        check(False, f"every word of {path} must stand there once, but {twice!r} does not")
    return dictionary
