"""Train a byte-level BPE tokenizer on documents of your own.

Byte-level byte-pair encoding (Radford et al. 2019, section 2.2) starts from the 256 bytes, so every
text can be written and read back exactly and there is no unknown token; then the most frequent
pair of neighbours becomes a new token until the vocabulary is full. The merging itself is done by
``tokenizers``; the result is a normal Hugging Face tokenizer.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.data.documents import Document

END_OF_TEXT = "<|endoftext|>"
_SMALLEST = 257  # every byte and the end of text


def train_tokenizer(
    documents: Iterable[Document], vocab_size: int, *, exact: bool = True
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of ``vocab_size`` tokens; deterministic for the same documents in order.

    ``"<|endoftext|>"`` is token 0 and serves as begin, end and padding token; it is never produced
    from text. ``tokenizer.save_pretrained(folder)`` and ``AutoTokenizer.from_pretrained(folder)``
    keep and load it.

    Args:
        documents: texts to learn from; a few megabytes are enough for some thousand tokens.
        vocab_size: tokens, the end-of-text token included; at least 257.
        exact: raise if the text is too small for that many tokens; False: take what it gives.

    Returns:
        The tokenizer; ``len(tokenizer)`` is the vocabulary size.

    Raises:
        InputError: if ``vocab_size`` is below 257, there is no text, or too little of it.
    """
    check(
        vocab_size >= _SMALLEST,
        f"a byte-level vocabulary must have at least {_SMALLEST} tokens (256 bytes and the end of "
        f"text), got {vocab_size}",
    )
    texts = [document.text for document in documents if document.text]
    check(bool(texts), "there must be text to learn a vocabulary from, got none")

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
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
