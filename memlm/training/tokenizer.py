"""Train a tokenizer on documents of your own: byte pairs, words or characters.

Byte-level byte-pair encoding (Radford et al. 2019, section 2.2) starts from the 256 bytes, so every
text can be written and read back exactly and there is no unknown token; then the most frequent
pair of neighbours becomes a new token until the vocabulary is full. The merging itself is done by
``tokenizers``; the result is a normal Hugging Face tokenizer. With 257 tokens it is plain bytes.

Words are what stands between white space, as in the published text of WikiText, and the line break
is a word of its own, as the ``</s>`` of fairseq's binarised lines; rare words are ``<unk>``.
Characters are Unicode code points.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.data.documents import Document

Level = Literal["bpe", "word", "character"]

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
_SMALLEST = 257  # every byte and the end of text


def train_tokenizer(
    documents: Iterable[Document], vocab_size: int, *, level: Level = "bpe", exact: bool = True
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of ``vocab_size`` tokens; deterministic for the same documents in order.

    ``"<|endoftext|>"`` is token 0 and serves as begin, end and padding token; it is never produced
    from text. ``tokenizer.save_pretrained(folder)`` and ``AutoTokenizer.from_pretrained(folder)``
    keep and load it.

    Args:
        documents: texts to learn from; a few megabytes are enough for some thousand tokens.
        vocab_size: tokens, the end-of-text token included; at least 257 for byte pairs, 3 else.
        level: ``"bpe"``, ``"word"`` or ``"character"``; the latter two know the most frequent
            words or characters and ``"<unk>"`` for the rest (a word ``<unk>`` in the text too).
        exact: raise if the text is too small for that many tokens; False: take what it gives.

    Returns:
        The tokenizer; ``len(tokenizer)`` is the vocabulary size.

    Raises:
        InputError: if ``vocab_size`` is too low, there is no text, or too little of it.
    """
    check(
        level != "bpe" or vocab_size >= _SMALLEST,
        f"a byte-level vocabulary must have at least {_SMALLEST} tokens (256 bytes and the end of "
        f"text), got {vocab_size}",
    )
    check(vocab_size >= 3, f"a vocabulary must have at least 3 tokens, got {vocab_size}")
    check(
        level in ("bpe", "word", "character"),
        f"level must be one of bpe, word, character, got {level!r}",
    )
    texts = [document.text for document in documents if document.text]
    check(bool(texts), "there must be text to learn a vocabulary from, got none")
    bpe = level == "bpe"
    core = _byte_pairs(texts, vocab_size) if bpe else _listed(texts, vocab_size, level)
    size = core.get_vocab_size()
    if exact and size < vocab_size:
        raise InputError(
            f"the text gives {size} tokens, {vocab_size} were asked for; give more text or ask for "
            "a smaller vocabulary"
        )
    # Text that spells "<|endoftext|>" is text: only memlm puts the token, by its id.
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None if bpe else UNKNOWN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_pairs(texts: list[str], vocab_size: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        length=len(texts),
    )
    return core


def _listed(texts: list[str], vocab_size: int, level: Level) -> Tokenizer:
    """The most frequent words or characters; ties in the order of their code points."""
    if level == "word":
        apart = pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed")
        split = pre_tokenizers.Sequence([apart, pre_tokenizers.Split("\n", "isolated")])
        counts = Counter(word for text in texts for word in text.split())
        counts["\n"] = sum(text.count("\n") for text in texts)
    else:
        split = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        counts = Counter(character for text in texts for character in text)
    counts.pop(UNKNOWN, None)  # is in the list already
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))[: vocab_size - 2]
    vocabulary = {piece: number for number, piece in enumerate([END_OF_TEXT, UNKNOWN, *frequent])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = split
    if level == "character":
        core.decoder = decoders.Fuse()
    return core
