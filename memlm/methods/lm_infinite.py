"""LM-Infinite (Han et al. 2024): a model reads on beyond the length it was trained on, untrained.

    query i sees    the last `window` tokens, at their true distance
                    the first `sinks` tokens, at most `distance_limit` away

Too large distances, too many tokens under one softmax and lost first tokens are what breaks a
model beyond its training length; each has its line above. The model is not trained.

The parts: `window_attention` is the attention, in tiles for a text and on a ring for a token;
`WindowLayer` keeps what it needs and no more; `extend_context` puts both into a model and
`restore_context` takes them out. `measure_lengths` shows what it is good for, beside truncation, a
plain window, StreamingLLM's positions and rotary scaling; `stream_perplexity` reads without end.

Settings of the paper's code: `window` is the training length (4096 for Llama 2), 10 to 100 sinks,
the limit is the window. That limit is one step more than the largest distance of training,
which is ``window - 1``, as the paper's figure has it; here the code is followed.

By request only: middle tokens that queries select, `extend_context(..., middle=MiddleConfig(k))`;
the code's slower path, a limit without the window, `extend_context(..., middle="kept")`.
"""

from transformers import PreTrainedModel

from memlm.models.extend import extend_context


def lm_infinite(model: PreTrainedModel, *, window=4096, sinks=100) -> PreTrainedModel:
    """``model`` with Lambda attention in every layer, in place; the same object.

    Args:
        model: a causal language model of a family in `memlm.models.extend_families.FAMILIES`.
        window: the length it was trained on.
        sinks: first tokens that stay visible.
    """
    return extend_context(model, window=window, sinks=sinks, distance_limit=window)
