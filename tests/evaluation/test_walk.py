"""State carried through text: against one document after the other, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.memories import FixedMemory, PastMemory
from evaluation.test_perplexity import corpus_of, merged, positions
from memlm.core.errors import InputError
from memlm.core.merges import Mixture, Union
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import BlockWindows, SlidingWindows, StrideWindows
from memlm.evaluation.passes import Stopwatch, plan_pass
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.report import plain, report
from memlm.evaluation.result import Evaluation
from memlm.evaluation.walk import Figures, chains, recall
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.local import LocalMemory
from memlm.models.running import frozen
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

WITHIN, ACROSS = "each document", "the text"
# The rule, and what its state is carried through.
WINDOWS = [
    (SlidingWindows(8, 3), WITHIN),
    (SlidingWindows(5, 5), WITHIN),
    (BlockWindows(5, 0, "line"), WITHIN),
    (SlidingWindows(8, 3, cross_documents=True), ACROSS),
    (BlockWindows(7, 4, "stream"), ACROSS),
    (StrideWindows(10, 4, 2), ACROSS),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Entries with few different tokens and keys close together, so that pointers live on."""
    generator = torch.Generator().manual_seed(1)
    tokens = tiny_tokens(1, 200, seed=5)[0] % 6 + 3
    keys = torch.randn(200, 16, generator=generator)
    return save_arrays(tmp_path_factory.mktemp("walk") / "store", keys, tokens, dtype="float32")


def texts(lengths=(23, 1, 9, 30), **more):
    corpus = corpus_of(lengths, **more)
    tokens = corpus.tokens % 6 + 3  # the tokens of the store
    return TokenCorpus.from_tokens(tokens, corpus.offsets, begin_token=corpus.begin_token)


@torch.no_grad()
def one_after_the_other(model, corpus, windows, memory, merge, through):
    """The walk as it is meant: one sequence at a time, one token at a time."""
    result, before, states = [], None, []
    for place, context, keys, logits in positions(model, corpus, windows):
        anew = before is None or place != before + 1
        if through == WITHIN:
            anew |= corpus.document_of(place) != corpus.document_of(place - 1) or place == 1
            first = corpus.offsets[corpus.document_of(place)]
            anew |= place == first + 1 and place - 1 != before
        if anew:
            states.append(memory.init_state(1))
        state = memory.observe(context[:, -1:], keys[:, -1:], states[-1])
        candidates, states[-1] = memory.read(keys[:, -1], state)
        result.append(merged(logits, candidates, merge, int(corpus.tokens[place])))
        before = place
    return np.array(result), states


def automaton(store, **settings):
    return AutomatonMemory(
        store, **{"k": 8, "temperature": 3.0, "min_knns": 2, "max_knns": 12, **settings}
    )


@pytest.fixture(params=["automaton", "local", "past"])
def memory(request, store):
    return {
        "automaton": automaton(store),
        "local": LocalMemory(size=9, temperature=3.0),
        "past": PastMemory(),
    }[request.param]


@pytest.mark.parametrize(("windows", "through"), WINDOWS)
@pytest.mark.parametrize("merge", [Mixture(0.4), Union()], ids=["mixture", "union"])
def test_equals_one_document_after_the_other(model, memory, windows, through, merge):
    corpus = texts()
    expected, states = one_after_the_other(model, corpus, windows, memory, merge, through)
    got = evaluate(
        model,
        corpus,
        windows,
        memory=memory,
        merge=merge,
        batch_tokens=30,
        walk_rows=2,
        keep_tokens=True,
    )
    np.testing.assert_allclose(got.token_log_probabilities, expected, atol=3e-5)
    assert got.protocol["carry"] == "document"
    assert f"state carried over windows, through {through}" in got.describe()
    if isinstance(memory, AutomatonMemory):
        steps, searches = (
            sum(memory.stats(state)[name] for state in states) for name in ("steps", "searches")
        )
        assert got.memory_stats["steps"] == steps == got.tokens
        assert got.memory_stats["searches"] == searches < steps
        assert got.saved == 1 - searches / steps


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=6).filter(lambda x: max(x) > 1),
    length=st.integers(1, 9),
    stride=st.integers(1, 9),
    batch_tokens=st.integers(1, 80),
    walk_rows=st.integers(1, 7),
    cross=st.booleans(),
)
def test_company_changes_nothing(lengths, length, stride, batch_tokens, walk_rows, cross):
    model, memory = tiny_model("llama"), LocalMemory(temperature=3.0)
    windows = SlidingWindows(length, min(length, stride), cross_documents=cross)
    corpus = texts(lengths)
    alone, together = (
        evaluate(
            model, corpus, windows, memory=memory, keep_tokens=True, batch_tokens=b, walk_rows=r
        )
        for b, r in ((1, 1), (batch_tokens, walk_rows))
    )
    np.testing.assert_allclose(
        together.token_log_probabilities, alone.token_log_probabilities, atol=1e-5
    )
    assert together.documents.tokens == alone.documents.tokens


@pytest.mark.parametrize("carry", ["document", "window"])
def test_company_costs_nothing(model, store, carry):
    """What is counted is counted once, whoever walks together."""
    memory, corpus = automaton(store), texts((23, 9, 9, 30, 2))
    stats = [
        evaluate(
            model,
            corpus,
            SlidingWindows(8, 3),
            memory=memory,
            carry=carry,
            batch_tokens=batch_tokens,
            walk_rows=walk_rows,
        ).memory_stats
        for batch_tokens, walk_rows in ((1, 1), (40, 3), (10_000, 64))
    ]
    assert stats[0] == stats[1] == stats[2]
    assert 0 < stats[0]["foss_legacy"] <= stats[0]["saved"] < 1


def test_a_document_in_one_window_is_walked_alike(model, memory):
    corpus = texts((9, 12, 5), begin_token=1)
    one, other = (
        evaluate(model, corpus, SlidingWindows(16, 16), memory=memory, carry=carry)
        for carry in ("document", "window")
    )
    # a window at once is summed in another order than position by position
    assert one.documents.nll == pytest.approx(other.documents.nll, rel=1e-6)
    assert one.memory_stats == other.memory_stats


def test_windows_walk_their_context_too(model, store):
    corpus, windows = texts((40,)), SlidingWindows(8, 3)
    got = evaluate(model, corpus, windows, memory=automaton(store), carry="window")
    assert got.memory_stats["steps"] == windows.table(corpus).inputs.sum() > got.tokens
    assert "state begins empty in each window" in got.describe()


def test_state_goes_over_windows(model, store):
    """The longer the memory of what was read, the more it knows of a text that repeats itself."""
    pattern = tiny_tokens(1, 20, seed=2)[0].numpy()
    corpus = TokenCorpus.from_tokens(np.tile(pattern, 4))
    memory, windows = LocalMemory(size=100, temperature=1.0), SlidingWindows(6, 3)
    carried, forgotten = (
        evaluate(model, corpus, windows, memory=memory, carry=carry)
        for carry in ("document", "window")
    )
    assert carried.perplexity < 0.5 * forgotten.perplexity


@pytest.mark.parametrize("windows", [SlidingWindows(8, 3), StrideWindows(10, 4, 2)])
def test_without_state_nothing_is_carried(model, windows):
    one, other = (
        evaluate(model, corpus_of(), windows, memory=FixedMemory(), carry=carry, keep_tokens=True)
        for carry in ("document", "window")
    )
    assert one.documents == other.documents
    assert one.protocol == other.protocol
    assert one.protocol["carry"] is None
    assert one.memory_stats is None
    np.testing.assert_array_equal(one.token_log_probabilities, other.token_log_probabilities)


def test_no_more_keys_than_batches_and_rows_need(model):
    """However long the documents are, only what the next steps need is read ahead."""
    plan = plan_pass(model, texts((400, 390, 7)), SlidingWindows(8, 8), tap="auto", batch_tokens=40)
    with frozen(model):
        pieces = [
            len(rows.places)
            for rows, _ in recall(
                plan, PastMemory(), Stopwatch(model.device), Figures(), walk_rows=2
            )
        ]
    assert sum(pieces) == plan.table.targets.sum()
    assert max(pieces) == 2 * 2 * 8  # two documents, two windows of each fit into a batch


def test_chains():
    corpus = corpus_of((12, 4, 9))
    for windows, expected in (
        (SlidingWindows(4, 2), [0, 5, 6]),
        (SlidingWindows(4, 2, cross_documents=True), [0]),
        (StrideWindows(4, 4, 1), [0, 1, 2, 3, 4, 5]),  # the first token of a block is left out
        (StrideWindows(4, 2, 3), [0]),
        (BlockWindows(3, 0, "line"), [0, 1, 2]),
        (BlockWindows(3, 2, "line"), [0, 2]),  # the last line is too long to have context
    ):
        table = windows.table(corpus)
        first, last = chains(table, corpus)
        assert first.tolist() == expected, windows
        assert last.tolist() == [*expected[1:], table.windows], windows


def test_stats_are_kept_and_shown(model, store, tmp_path):
    got = evaluate(model, texts(), SlidingWindows(8, 3), memory=automaton(store))
    got.save(tmp_path / "result.json")
    again = Evaluation.load(tmp_path / "result.json")
    assert again == got
    assert again.saved == got.saved == again.summary()["saved"]
    words = f"saved {got.saved:.2f} of {got.tokens} searches"
    assert got.describe().endswith(words)
    assert "min_knns=2 max_knns=12, no clusters" in got.describe()
    alone = evaluate(model, texts(), SlidingWindows(8, 3))
    head, base, with_memory, *lines = plain(report({"base": alone, "memory": got})).splitlines()
    assert head.split()[-1] == "saved"
    assert base.split()[-1] == "-"
    assert with_memory.split()[-1] == f"{got.saved:.2f}"
    assert lines[-1].endswith(words)
    assert "saved" not in plain(report({"base": alone}))


def test_mistakes(model):
    for wrong, message in (
        ({"carry": "documents"}, "'document'"),
        ({"walk_rows": 0}, "walk_rows must be at least 1 document, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, corpus_of(), SlidingWindows(8, 3), memory=PastMemory(), **wrong)


def test_a_sure_model_does_not_ask(model):
    """Where the model is surer than the bound it stands alone; elsewhere the memory is heard."""
    corpus, windows = texts((30, 21)), SlidingWindows(16, 8)
    memory, settings = FixedMemory(), {"keep_tokens": True, "progress": False}
    alone = evaluate(model, corpus, windows, **settings).token_log_probabilities
    always = evaluate(model, corpus, windows, memory=memory, **settings).token_log_probabilities
    plan = plan_pass(model, corpus, windows, tap="auto", batch_tokens=64)
    sure = np.zeros(corpus.offsets[-1])
    with torch.no_grad():
        for scored in plan.run(Stopwatch(model.device)):
            sure[scored.places] = plan.head.confidence(scored.hidden).exp()
    bound = float(np.sort(sure[sure > 0])[[20, 21]].mean())
    got = evaluate(model, corpus, windows, memory=memory, skip_above=bound, **settings)
    asked = sure[sure > 0] <= bound
    np.testing.assert_allclose(
        got.token_log_probabilities, np.where(asked, always, alone), atol=1e-6
    )
    assert got.saved == pytest.approx(1 - asked.mean())
    assert f"not asked where the model is surer than {bound:g}" in got.describe()
    with pytest.raises(InputError, match="skip_above must be a probability, for a memory without"):
        evaluate(model, corpus, windows, memory=memory, skip_above=0, **settings)
