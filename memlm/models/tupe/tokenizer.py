"""The TUPE authors' vocabulary as a tokenizer: their codes, their dictionary, their text.

    text ──cleaning──> words ──fastBPE codes──> pieces with @@ ──dict.txt──> ids

Ids 0 to 6 are ``<s>``, ``<pad>``, ``</s>``, ``<unk>``, ``<file>``, ``<email>`` and ``<url>``, three
more than fairseq's; then the dictionary, ``<mask>`` last. A piece that the codes make and the
dictionary lacks is ``<unk>``, as there, which no tokenizer of the ``tokenizers`` package can do;
hence a slow one. Samples and pairs become ``<s> A </s>`` and ``<s> A </s> </s> B </s>``.

Differs from the authors' pipeline (Ke et al. 2021, appendix): text goes through
`memlm.data.cleaning` as for their GLUE data, without the Perl script of Moses, which also splits
inside words (``don 't``). Text that went through all of it is read with ``prepared=True``: only the
codes are applied then.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizer

from memlm.core.errors import InputError
from memlm.data.bpe_codes import read_codes
from memlm.data.cleaning import glue_line, replace_patterns
from memlm.formats.dictionary import SPECIALS, Dictionary, read_dictionary

TUPE_SPECIALS = (*SPECIALS, "<file>", "<email>", "<url>")
MASK = "<mask>"
_INSIDE = "@@ "


def read_tupe_dictionary(path: str | Path, *, mask: bool = True) -> Dictionary:
    """Read a ``dict.txt`` of the authors' fork.

    Args:
        path: of the file or its folder.
        mask: append ``<mask>``, as their tasks do; False for labels.

    Raises:
        CorruptStoreError: if the file is missing or damaged.
    """
    found = read_dictionary(path)
    words = (*TUPE_SPECIALS, *found.words[len(SPECIALS) :], *((MASK,) if mask else ()))
    ends = np.zeros(int(mask), np.int64)
    counts = [np.zeros(len(TUPE_SPECIALS), np.int64), found.counts[len(SPECIALS) :], ends]
    return Dictionary(words, np.concatenate(counts))


class TupeTokenizer(PreTrainedTokenizer):
    """A tokenizer of two files.

    Args:
        dictionary_file: ``dict.txt`` of the authors' fork.
        codes_file: their byte-pair codes, ``bpe-code``.
        prepared: text is cleaned and split into words already.

    Raises:
        CorruptStoreError: if a file is missing or damaged.
        InputError: if there is no file, or a pair of codes or a word stands there twice.
    """

    vocab_files_names = {"dictionary_file": "dict.txt", "codes_file": "bpe-code"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        dictionary_file: str | None,
        codes_file: str | None,
        *,
        prepared: bool = False,
        **settings: Any,
    ):
        if dictionary_file is None or codes_file is None:  # so transformers, where none is saved
            names = " and ".join(self.vocab_files_names.values())
            raise InputError(f"a TUPE tokenizer must have its files, {names}, but there is none")
        self.dictionary, self.codes = read_tupe_dictionary(dictionary_file), read_codes(codes_file)
        self.files = Path(dictionary_file), Path(codes_file)
        self.prepared = prepared
        begin, pad, end, unknown = SPECIALS
        roles = {
            "bos_token": begin,
            "cls_token": begin,
            "pad_token": pad,
            "eos_token": end,
            "sep_token": end,
            "unk_token": unknown,
            "mask_token": MASK,
        }
        settings = {"clean_up_tokenization_spaces": False, **settings}
        super().__init__(prepared=prepared, **{**roles, **settings})

    @property
    def vocab_size(self) -> int:
        """Words of the dictionary, special ones and ``<mask>`` included."""
        return len(self.dictionary)

    def get_vocab(self) -> dict[str, int]:
        """Every word's id."""
        return {**self.dictionary.ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        words = text if self.prepared else replace_patterns(glue_line(text))
        return self.codes.apply(words).split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.dictionary.ids.get(token, self.dictionary.ids[str(self.unk_token)])

    def _convert_id_to_token(self, index: int) -> str:
        return self.dictionary.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces put together again."""
        return f"{' '.join(tokens)} ".replace(_INSIDE, "").strip()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """A sample, or a pair, between its marks."""
        begin, end = cast(int, self.bos_token_id), cast(int, self.eos_token_id)
        first = [begin, *token_ids_0, end]
        return first if token_ids_1 is None else [*first, end, *token_ids_1, end]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for the marks around texts, 0 for the texts."""
        if already_has_special_tokens:
            marks = (self.bos_token_id, self.eos_token_id, self.pad_token_id)
            return [int(token in marks) for token in token_ids_0]
        first = [1, *[0] * len(token_ids_0), 1]
        return first if token_ids_1 is None else [*first, 1, *[0] * len(token_ids_1), 1]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy both files."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        places = [
            Path(save_directory) / f"{prefix}{name}" for name in self.vocab_files_names.values()
        ]
        for source, place in zip(self.files, places, strict=True):
            if source.resolve() != place.resolve():
                shutil.copyfile(source, place)
        return tuple(map(str, places))
