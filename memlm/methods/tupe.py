"""TUPE (Ke et al. 2021): an encoder whose positions are scored apart from its words.

Section 3: positions leave the embeddings and get projections of their own (`memlm.positions`);
[CLS] is untied from them; optionally a bucketed relative term. Section 4: pre-training on masked
tokens over Wikipedia and books, then GLUE. One switch, ``scheme``, makes the paper's baselines.
"""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from memlm.data.cleaning import CorpusCounts, is_held_out, prepare
from memlm.data.documents import Document
from memlm.models.tupe.heads import TupeForMaskedLM
from memlm.training.masked_lm import tokenize_sentences, train_masked_lm
from memlm.training.masked_lm_config import MaskedLMConfig
from memlm.training.sentence_tokenizer import train_sentence_tokenizer


def pretrain_tupe(
    documents: Iterable[Document],
    out: str | Path,
    config: MaskedLMConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int = 8192,
    counts: CorpusCounts | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> TupeForMaskedLM:
    """Clean text, learn a vocabulary, pre-train; one paragraph in 200 is held out.

    Args:
        documents: text; a paragraph per line.
        out: folder of the run, as ``from_pretrained`` reads it.
        config: of model, masks and training.
        tokenizer: an existing one, with begin, end, padding and mask tokens; None: train one.
        vocab_size: of a trained one.
        counts: filled with the lines that every stage of cleaning let through.
        resume: continue from the last checkpoint in ``out``.
        quiet: no progress bar.

    Returns:
        The model in evaluation mode. ``training.json`` in ``out`` has its losses, in nats per
        predicted token.
    """
    paragraphs = list(prepare((document.text for document in documents), counts))
    learnt, held = [], []
    for number, paragraph in enumerate(paragraphs):
        (held if is_held_out(number) else learnt).extend(paragraph)
    if tokenizer is None:
        tokenizer = train_sentence_tokenizer(learnt, vocab_size)
    return train_masked_lm(
        tokenize_sentences(learnt, tokenizer),
        tokenizer,
        config,
        out,
        held_out=tokenize_sentences(held, tokenizer) if held else None,
        resume=resume,
        quiet=quiet,
    )
