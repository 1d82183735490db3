"""A tokenizer for encoders: byte pairs inside lower-case words, ids as in the TUPE authors' data.

0 ``<s>``, 1 ``<pad>``, 2 ``</s>``, 3 ``<unk>``, 4 ``<file>``, 5 ``<email>``, 6 ``<url>``, then what
is learnt, ``<mask>`` last. Pieces that end a word carry ``</w>`` (Sennrich et al. 2016), which is
what whole-word masking needs. Text is lower-cased and marks at the ends of words are split off.
Samples and pairs become ``<s> A </s>`` and ``<s> A </s> </s> B </s>``.

The same sentences always give the same tokens, so that several processes and a resumed run agree.
The trainer of tokenizers does not promise that for pieces with a suffix: it numbers them in the
order of a hash map. So pairs are learnt with one private character in place of the last of a word
and its ``</w>``.
"""

import json
from collections.abc import Iterable

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from memlm.core.config import check
from memlm.models.tupe.tokenizer import MASK
from memlm.models.tupe.tokenizer import TUPE_SPECIALS as SPECIALS

_END = "</w>"
_PRIVATE = 0xF0000  # from here on, characters have no meaning of their own
_MARK = Regex(r"[^\w\s<>]")


def train_sentence_tokenizer(sentences: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of at most ``vocab_size`` tokens, the special ones included.

    Raises:
        InputError: if ``vocab_size`` leaves no room.
    """
    check(vocab_size >= 64, f"a vocabulary must have at least 64 tokens, got {vocab_size}")
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_MARK, "isolated")]
    )
    core.decoder = decoders.BPEDecoder(suffix=_END)
    core.model = _learn(core, sentences, vocab_size - 1)
    core.add_special_tokens(list(SPECIALS))
    core.add_special_tokens([MASK])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _learn(core: Tokenizer, sentences: Iterable[str], vocab_size: int) -> models.BPE:
    """Byte pairs of the words that ``core`` makes of the sentences."""
    ends: dict[str, str] = {}  # last character of a word to what stands for it

    def marked(sentence: str) -> str:
        pieces = core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(sentence))
        words = [word for word, _ in pieces if word not in SPECIALS and ord(max(word)) < _PRIVATE]
        return " ".join(
            word[:-1] + ends.setdefault(word[-1], chr(_PRIVATE + len(ends))) for word in words
        )

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(
        map(marked, sentences),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    meant = str.maketrans({mark: last + _END for last, mark in ends.items()})
    return models.BPE(
        vocab={token.translate(meant): number for token, number in learnt["vocab"].items()},
        merges=[
            (left.translate(meant), right.translate(meant)) for left, right in learnt["merges"]
        ],
        unk_token="<unk>",
        end_of_word_suffix=_END,
    )
