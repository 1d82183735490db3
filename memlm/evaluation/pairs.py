"""Translations measured: perplexity of known targets, and BLEU of what a model writes.

    perplexity = exp( mean over target tokens, end tokens too, of -log p(token | source, before) )

BLEU (Papineni et al. 2002) by `sacrebleu` with its own defaults, over the whole corpus. Both take a
model as it is, or one with a memory attached.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.errors import MissingExtraError
from memlm.core.progress import bar
from memlm.data.batches import IGNORED
from memlm.data.pairs import PairCorpus
from memlm.models.pairs import check_encoder_decoder
from memlm.models.running import device_of, frozen


class PairFigures(NamedTuple):
    """Losses over the targets of a corpus.

    Attributes:
        nll: summed negative log-likelihood, nats.
        tokens: of all targets, end tokens included.
        pairs: how many.
    """

    nll: float
    tokens: int
    pairs: int

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nll / self.tokens)


def evaluate_pairs(
    model: PreTrainedModel, pairs: PairCorpus, *, batch_tokens: int = 8192, progress: bool = True
) -> PairFigures:
    """Score every target token, the true ones before it given.

    Args:
        model: an encoder-decoder, with a memory or without.
        pairs: tokens of its tokenizer.
        batch_tokens: most padded tokens of both sides side by side.
        progress: show a bar.

    Raises:
        UnsupportedModelError: if the model is no encoder-decoder.
    """
    check_encoder_decoder(model)
    nll, tokens, device = 0.0, 0, device_of(model)
    with (
        frozen(model),
        bar(len(pairs), label="evaluate", unit="pair", quiet=not progress) as shown,
    ):
        for batch, numbers in pairs.batches(batch_tokens):
            labels = batch.labels.to(device)
            scored = labels != IGNORED
            shift: Any = model.prepare_decoder_input_ids_from_labels
            logits = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                decoder_input_ids=shift(labels=labels.masked_fill(~scored, 0)),
                use_cache=False,
            ).logits
            rows = logits[scored].double().log_softmax(-1)
            nll -= float(rows.gather(-1, labels[scored][:, None]).sum())
            tokens += int(scored.sum())
            shown.update(len(numbers))
    return PairFigures(nll, tokens, len(pairs))


@torch.inference_mode()
def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    beams: int = 5,
    new_tokens: int = 128,
    source_length: int = 1024,
    rows: int = 16,
    progress: bool = True,
) -> list[str]:
    """What a model writes for some sources.

    Args:
        model: an encoder-decoder, with a memory or without.
        tokenizer: of the model.
        sources: texts.
        beams: of the search; 1 is greedy.
        new_tokens: written at most.
        source_length: tokens read at most of each source.
        rows: texts side by side.
        progress: show a bar.
    """
    check_encoder_decoder(model)
    check(min(beams, new_tokens, rows) >= 1, "beams, new_tokens and rows must be at least 1")
    written: list[str] = []
    writer: Any = model
    with bar(len(sources), label="translate", unit="text", quiet=not progress) as shown:
        for start in range(0, len(sources), rows):
            texts = list(sources[start : start + rows])
            inputs: Any = tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=source_length
            )
            made = writer.generate(
                input_ids=inputs["input_ids"].to(device_of(model)),
                attention_mask=inputs["attention_mask"].to(device_of(model)),
                num_beams=beams,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            written += tokenizer.batch_decode(made, skip_special_tokens=True)
            shown.update(len(texts))
    return written


def bleu(written: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU of a corpus, 0 to 100.

    Raises:
        MissingExtraError: without `sacrebleu`.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtraError(
            "BLEU needs the package sacrebleu, which is not installed; run "
            "pip install 'memlm[metrics]'"
        ) from error
    return float(BLEU().corpus_score(list(written), [list(targets)]).score)
