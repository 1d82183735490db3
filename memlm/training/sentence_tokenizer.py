"""A tokenizer for encoders: byte pairs inside lower-case words, ids as in the TUPE authors' data.

0 ``<s>``, 1 ``<pad>``, 2 ``</s>``, 3 ``<unk>``, 4 ``<file>``, 5 ``<email>``, 6 ``<url>``, then what
is learnt, ``<mask>`` last. Pieces that end a word carry ``</w>`` (Sennrich et al. 2016), which is
what whole-word masking needs. Text is lower-cased and marks at the ends of words are split off.
Samples and pairs become ``<s> A </s>`` and ``<s> A </s> </s> B </s>``.
"""

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

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<file>", "<email>", "<url>")
MASK = "<mask>"
_MARK = Regex(r"[^\w\s<>]")


def train_sentence_tokenizer(sentences: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of at most ``vocab_size`` tokens, the special ones included.

    Raises:
        InputError: if ``vocab_size`` leaves no room.
    """
    check(vocab_size >= 64, f"a vocabulary must have at least 64 tokens, got {vocab_size}")
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_MARK, "isolated")]
    )
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    core.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=list(SPECIALS),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
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
