"""Generation at positions: how well a model continues texts after p tokens, by BLEU and ROUGE.

For every text and every position p that it reaches, the first p tokens are the prompt, a greedy
continuation is compared with the tokens that really follow. Overlap with one true continuation is a
weak measure of a good one; it shows where a model falls apart with length.

Sources: LM-Infinite (Han et al. 2024), section 4.3 and its scripts; BLEU (Papineni et al. 2002) by
`sacrebleu`, corpus level, 13a tokens, no smoothing; ROUGE (Lin 2004) by `rouge_score`, no stemming.
Differs from the scripts: ROUGE is the plain mean of texts, where they take the median of a
bootstrap, which depends on a seed and is the same up to its noise.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.errors import MissingExtraError
from memlm.evaluation.answers import write_answers

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Continuation(NamedTuple):
    """What a model wrote, and what really follows."""

    generation: str
    target: str


def continue_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[int]],
    positions: Sequence[int],
    *,
    new_tokens: int = 100,
    last: int | None = None,
) -> list[dict[int, Continuation]]:
    """Continue every document greedily at every position that it reaches.

    Args:
        model: extended or not.
        tokenizer: of the model.
        documents: token ids.
        positions: lengths of prompts.
        new_tokens: to write.
        last: the prompt is only so many of its last tokens: truncation, as a baseline.

    Returns:
        One mapping from positions to continuations per document.

    Raises:
        InputError: if a number is below 1.
    """
    numbers = (*positions, new_tokens, 1 if last is None else last)
    check(min(numbers) >= 1, f"positions and lengths must be at least 1, got {numbers}")
    written: list[dict[int, Continuation]] = []
    for document in documents:
        found = {}
        for position in positions:
            if len(document) <= position:
                continue
            prompt = document[:position][-last if last else 0 :]
            (text,) = write_answers(model, tokenizer, [prompt], new_tokens=new_tokens)
            found[position] = Continuation(
                text, str(tokenizer.decode(list(document[position : position + new_tokens])))
            )
        written.append(found)
    return written


def score_continuations(
    written: Sequence[Mapping[int, Continuation]], positions: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """BLEU and ROUGE at every position.

    Args:
        written: from ``continue_at``.
        positions: to report.

    Returns:
        By position ``{}`` where no document reaches it, else ``{"rouge": {...}, "bleu": {...}}``
        with fractions from 0 to 1. An empty continuation counts as ``"."``.

    Raises:
        MissingExtraError: without the packages of the extra ``metrics``.
    """
    scores: dict[int, dict[str, Any]] = {}
    for position in positions:
        pairs = [found[position] for found in written if position in found]
        pairs = [Continuation(made or ".", target) for made, target in pairs]
        scores[position] = {"rouge": _mean_rouge(pairs), "bleu": _bleu(pairs)} if pairs else {}
    return scores


def rouge_of(pair: Continuation) -> dict[str, float]:
    """ROUGE F-measures of one continuation.

    Raises:
        MissingExtraError: without `rouge_score`.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score") from error
    scored = RougeScorer(list(ROUGE), use_stemmer=False).score(pair.target, pair.generation)
    return {name: float(scored[name].fmeasure) for name in ROUGE}


def _mean_rouge(pairs: Sequence[Continuation]) -> dict[str, float]:
    rows = [rouge_of(pair) for pair in pairs]
    return {name: sum(row[name] for row in rows) / len(rows) for name in ROUGE}


def _bleu(pairs: Sequence[Continuation]) -> dict[str, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise _missing("sacrebleu") from error
    measured = BLEU(tokenize="13a", smooth_method="none", force=True).corpus_score(
        [pair.generation for pair in pairs], [[pair.target for pair in pairs]]
    )
    return {
        "bleu": measured.score / 100,
        "precisions": [value / 100 for value in measured.precisions],
        "brevity_penalty": measured.bp,
        "length_ratio": measured.sys_len / max(measured.ref_len, 1),
        "translation_length": measured.sys_len,
        "reference_length": measured.ref_len,
    }


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"scoring continuations needs the package {package}, which is not installed; run "
        "pip install 'memlm[metrics]'"
    )
