"""Scoring the text that a store was made of, without its own entries."""

import shutil

import numpy as np
import pytest
import torch

from memlm.core.errors import InputError
from memlm.core.merges import Mixture
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.protocol import protocol_line
from memlm.extract.build import build_datastore
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.store.deleted import delete_documents
from memlm.testing.tiny import tiny_model, tiny_tokens

LENGTHS = (20, 9, 30)
WINDOWS = SlidingWindows(length=16, stride=8)
SETTINGS = {"merge": Mixture(lam=0.5), "keep_tokens": True, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def corpus():
    tokens = tiny_tokens(1, sum(LENGTHS), seed=3)[0].numpy()
    return TokenCorpus.from_tokens(tokens, np.cumsum([0, *LENGTHS]))


@pytest.fixture(scope="module")
def store(model, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "store"
    return build_datastore(model, None, corpus, out, windows=WINDOWS, progress=False)


def scored(model, corpus, memory, **more):
    return evaluate(model, corpus, WINDOWS, memory=memory, **SETTINGS, **more)


def test_own_document_is_as_if_it_were_deleted(model, corpus, store, tmp_path):
    memory = KnnMemory(store, k=5, index="exact")
    guarded = scored(model, corpus, memory, leave_out="document")
    assert "a token's own document left out" in protocol_line(guarded.protocol)
    ends = np.cumsum(guarded.documents.tokens)[:-1]
    for document, expected in enumerate(np.split(guarded.token_log_probabilities, ends)):
        copied = tmp_path / str(document)
        shutil.copytree(store.path, copied)
        rest = delete_documents(type(store).open(copied), [document])
        got = scored(model, corpus, KnnMemory(rest, k=5, index="exact")).token_log_probabilities
        np.testing.assert_allclose(np.split(got, ends)[document], expected, atol=1e-6)


def test_own_position_is_never_found(model, corpus, store):
    memory = KnnMemory(store, k=1, index="exact")
    seen = scored(model, corpus, memory)
    unseen = scored(model, corpus, memory, leave_out="position")
    assert seen.perplexity < unseen.perplexity  # its own entry knows the answer
    keys = store.load_keys().float()
    far = torch.cdist(keys, keys).fill_diagonal_(torch.inf).argmin(1)
    right = (store.values[far] == store.values).float().mean()
    base = evaluate(model, corpus, WINDOWS, keep_tokens=True, progress=False)
    p = np.exp(unseen.token_log_probabilities) - 0.5 * np.exp(base.token_log_probabilities)
    assert np.isclose(p.sum(), 0.5 * float(right) * len(p), atol=1e-3)


def test_only_the_stores_own_text(model, store):
    other = TokenCorpus.from_tokens(tiny_tokens(1, 20, seed=8)[0].numpy(), np.array([0, 20]))
    memory = KnnMemory(store, k=5, index="exact")
    with pytest.raises(InputError, match="must be made of the very text that is scored"):
        scored(model, other, memory, leave_out="document")


def test_only_a_knn_memory(model, corpus, store):
    memory = AutomatonMemory(store, k=5, index="exact")
    with pytest.raises(InputError, match="only a kNN memory can leave out entries"):
        scored(model, corpus, memory, leave_out="document")
    with pytest.raises(InputError, match="leave_out must be one of nothing, position, document"):
        scored(model, corpus, memory, leave_out="all")
