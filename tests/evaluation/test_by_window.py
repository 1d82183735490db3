"""Window by window is position by position; long memories go on through each text."""

import numpy as np
import pytest
import torch
from index.stores import normal

from memlm.core.errors import InputError
from memlm.core.merges import Mixture, Union
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import BlockWindows, SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model

MODEL = tiny_model("llama")
LOCAL = LocalMemory(size=100, temperature=4.0)
WINDOWS, UNION = SlidingWindows(8, 5), Union()


def texts(*lengths):
    draw = np.random.default_rng(1)
    tokens = [draw.integers(3, 12, length) for length in lengths]
    return TokenCorpus.from_tokens(np.concatenate(tokens), np.cumsum([0, *lengths]))


class Walking:
    """A memory that hides that it could score whole windows."""

    def __init__(self, memory):
        self.memory = memory

    def __getattr__(self, name):
        if name in ("windowed", "score_window", "spans_windows"):
            raise AttributeError(name)
        return getattr(self.memory, name)


def scores(memory, corpus, windows=WINDOWS, merge=UNION, **settings):
    result = evaluate(
        MODEL,
        corpus,
        windows,
        memory=memory,
        merge=merge,
        carry="window",
        keep_tokens=True,
        progress=False,
        **settings,
    )
    return result.token_log_probabilities


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("batch_tokens", [1, 30, 4000])
def test_local_memory_by_window_is_local_memory_walking(size, batch_tokens):
    memory, corpus = LocalMemory(size=size, temperature=4.0), texts(30, 9, 17)
    expected = scores(Walking(memory), corpus)
    np.testing.assert_allclose(
        scores(memory, corpus, batch_tokens=batch_tokens), expected, atol=1e-5
    )


def by_hand(corpus, windows, size, overlap):
    """TRIME's evaluation, one window at a time: local and long memory in one softmax."""
    table, found = windows.table(corpus), []
    keys, tokens, document = [], [], None
    for begin, end, first in zip(table.begin, table.end, table.first, strict=True):
        if document != (document := int(corpus.document_of(first))):
            keys, tokens = [], []
        ids = torch.from_numpy(corpus.tokens[begin:end].astype(np.int64))
        seen = []
        hook = MODEL.model.layers[-1].mlp.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0])
        )
        with torch.no_grad():
            logits = MODEL(input_ids=ids[None, :-1]).logits[0]
        hook.remove()
        context = first - 1 - begin
        past = len(keys) - (context if overlap == "once" else 0)
        past = max(past, 0)
        for place in range(context, len(ids) - 1):
            held = [*keys[:past], *seen[0][:place]]
            labels = [*tokens[:past], *ids[1 : place + 1].tolist()]
            said = torch.tensor([float(key @ seen[0][place]) / 4.0 for key in held])
            every = torch.cat([logits[place], said]).softmax(-1)
            right = torch.tensor([*range(logits.shape[-1]), *labels]) == ids[place + 1]
            found.append(float(every[right].sum().log()))
        keys += list(seen[0][context:])
        tokens += ids[first - begin :].tolist()
        keys, tokens = keys[-size:] if size else [], tokens[-size:] if size else []
    return found


@pytest.mark.parametrize("overlap", ["once", "twice"])
@pytest.mark.parametrize("size", [0, 7, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4000])
def test_long_memory_is_that_of_one_window_after_the_other(overlap, size, batch_tokens):
    corpus, windows = texts(30, 9, 25), SlidingWindows(8, 5)
    memory = Together(LOCAL, LongMemory(size=size, temperature=4.0, overlap=overlap))
    expected = by_hand(corpus, windows, size, overlap)
    for walk_rows in (1, 2, 64):
        found = scores(memory, corpus, windows, batch_tokens=batch_tokens, walk_rows=walk_rows)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_texts_side_by_side_are_texts_one_by_one():
    memory = Together(LOCAL, LongMemory(size=9, temperature=4.0))
    lengths = (30, 9, 25)
    together = scores(memory, texts(*lengths))
    corpus, apart = texts(*lengths), []
    for begin, end in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True):
        apart += [scores(memory, TokenCorpus.from_tokens(corpus.tokens[begin:end]))]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)


def test_a_long_memory_sees_what_the_window_lost():
    """Enough memory, each pair once: as if the window had no beginning, but for the encoding."""
    corpus = texts(40)
    short = scores(Together(LOCAL, LongMemory(size=0, temperature=4.0)), corpus)
    grown = scores(Together(LOCAL, LongMemory(size=1000, temperature=4.0)), corpus)
    np.testing.assert_allclose(short, scores(LOCAL, corpus), atol=1e-5)
    assert np.abs(short[:5] - grown[:5]).max() < 1e-6
    assert np.abs(short[10:] - grown[10:]).max() > 1e-3


@pytest.fixture
def store(tmp_path):
    return save_arrays(
        tmp_path / "store", normal(50, 16, seed=4), torch.arange(50) % 12, metric="ip"
    )


def test_all_three_share_one_softmax_and_one_may_be_mixed_in(store):
    corpus, windows = texts(30, 9), BlockWindows(block=4, context=4)
    external = KnnMemory(store, k=5, temperature=4.0, index="exact")
    alone = scores(external, corpus, windows, merge=Mixture(1e-9))
    assert len(alone) == len(scores(None, corpus, windows, merge=None))
    memory = Together(LOCAL, LongMemory(size=20, temperature=4.0), external)
    walked = Together(Walking(LOCAL), external)
    np.testing.assert_allclose(
        scores(Together(LOCAL, external), corpus, windows),
        scores(walked, corpus, windows),
        atol=1e-5,
    )
    merged = scores(memory, corpus, windows)
    lam = 0.3
    mixed = scores(memory, corpus, windows, interpolate=(external, Mixture(lam)))
    pure = scores(external, corpus, windows, merge=Mixture(1 - 1e-6))
    np.testing.assert_allclose(
        np.exp(mixed), (1 - lam) * np.exp(merged) + lam * np.exp(pure), atol=1e-5
    )


def test_refusals(store):
    corpus, long = texts(30), LongMemory()
    with pytest.raises(InputError, match="carry must be 'window', got 'document'"):
        evaluate(MODEL, corpus, SlidingWindows(8, 5), memory=long, merge=Union())
    with pytest.raises(InputError, match="interpolate needs a memory without state"):
        scores(LOCAL, corpus, interpolate=(LOCAL, Mixture(0.1)))
    with pytest.raises(InputError, match="interpolate needs a memory without state"):
        scores(None, corpus, merge=None, interpolate=(LOCAL, Mixture(0.1)))
