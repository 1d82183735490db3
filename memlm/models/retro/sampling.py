"""Generation exactly as the package retro-pytorch does it, to reproduce what it wrote.

    filter      top-k of a fraction of the vocabulary, or a nucleus, both by a threshold
    sample      argmax(filtered logits / temperature + Gumbel noise)
    stop        when *every* row holds an end token *anywhere*, the prompt included; then what
                follows the first one of each row becomes padding

Its habits, kept here and nowhere else: a threshold of 0.9 keeps the best tenth of the vocabulary,
or a nucleus of only 0.1; a prompt that holds an end token, as every prompt of its own tokenizer
does, is over after one token. For anything new use ``generate``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from memlm.core.config import check
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.retriever import ChunkRetriever

Filter = Callable[[Tensor, float], Tensor]


def keep_top_fraction(logits: Tensor, threshold: float) -> Tensor:
    """Keep the ``max(int((1 - threshold) V), 1)`` best of ``(rows, V)`` logits, others are -inf."""
    k = max(int((1 - threshold) * logits.shape[-1]), 1)
    values, ids = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def keep_nucleus(logits: Tensor, threshold: float) -> Tensor:
    """Keep the best logits of cumulative mass up to ``1 - threshold``, at least one."""
    ordered, ids = logits.sort(dim=-1, descending=True)
    gone = ordered.softmax(-1).cumsum(-1) > 1 - threshold
    gone = gone.roll(1, dims=-1)
    gone[..., 0] = False
    kept = ordered.masked_fill(gone, -torch.inf)
    return torch.empty_like(logits).scatter(-1, ids, kept)


class _Gumbel:
    """A logits processor after which the best token is the sample."""

    def __init__(
        self, filtering: Filter, threshold: float, temperature: float, noise: Tensor | None
    ):
        self.filtering, self.threshold, self.temperature = filtering, threshold, temperature
        self.noise, self.step = noise, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand_like(scores) if self.noise is None else self.noise[self.step]
        self.step += 1
        gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        return self.filtering(scores, self.threshold) / self.temperature + gumbel


class _EveryRowEnded(StoppingCriteria):
    def __init__(self, end: int):
        self.end = end

    def __call__(  # type: ignore[override]
        self, input_ids: Tensor, scores: Tensor, **_: object
    ) -> Tensor:
        ended = (input_ids == self.end).any(1).all()
        return ended.expand(len(input_ids))


def generate_as_original(
    model: RetroForCausalLM,
    start: Tensor | None = None,
    *,
    retriever: ChunkRetriever | None,
    filtering: Filter = keep_top_fraction,
    threshold: float = 0.9,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    begin_token_id: int = 101,
    end_token_id: int = 102,
    pad_token_id: int = 0,
) -> Tensor:
    """Continue ``start`` to one token more than the model has positions.

    Args:
        model: from `memlm.importers.retro_checkpoint`.
        start: ``(batch, time)``; None: one begin token.
        retriever: where neighbours come from.
        filtering: `keep_top_fraction` or `keep_nucleus`.
        threshold: of the filter.
        temperature: above 0.
        noise: ``(steps, batch, V)`` uniform numbers instead of drawn ones.
        begin_token_id: of that package's tokenizer, as the two that follow.
        end_token_id: which stops.
        pad_token_id: which fills.

    Returns:
        ``(batch, time)``, prompt included.

    Raises:
        InputError: for a temperature that is not above 0.
    """
    check(temperature > 0, f"temperature must be above 0, got {temperature}")
    if start is None:
        start = torch.full((1, 1), begin_token_id, device=model.device)
    was_training = model.training
    model.eval()
    try:
        written = model.generate(
            start,
            retriever=retriever,
            attention_mask=torch.ones_like(start),
            max_length=model.config.max_position_embeddings + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad_token_id,
            logits_processor=LogitsProcessorList(
                [_Gumbel(filtering, threshold, temperature, noise)]  # type: ignore[list-item]
            ),
            stopping_criteria=StoppingCriteriaList([_EveryRowEnded(end_token_id)]),
        )
    finally:
        model.train(was_training)
    is_end = written == end_token_id
    if not bool(is_end.any(1).all()):
        return written
    after = is_end.cumsum(1) - is_end.int() > 0
    return written.masked_fill(after, pad_token_id)
