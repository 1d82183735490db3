"""What users get wrong with a datastore, one row each: the class of the error and its words."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import memlm
from memlm.core.errors import (
    CorruptStoreError,
    FingerprintError,
    InputError,
    StoreError,
    UnsupportedModelError,
)
from memlm.core.files import read_json, write_json
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.plan import IndexConfig
from memlm.models.taps import find_tap
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model

KEYS = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
VALUES = torch.arange(30)
CORPUS = memlm.TokenCorpus.from_tokens(np.arange(40) % 60)
WINDOWS = memlm.SlidingWindows(length=16, stride=8)


def store_at(folder, **changes):
    return save_arrays(folder / "store", **{"keys": KEYS, "values": VALUES, **changes})


def memory_at(folder, **settings):
    return memlm.KnnMemory(store_at(folder), **{"k": 4, **settings})


def altered(folder, change):
    store = store_at(folder)
    manifest = read_json(store.path / "manifest.json")
    change(manifest)
    write_json(store.path / "manifest.json", manifest)
    return memlm.Datastore.open(store.path)


def huge(folder):
    """A model whose hidden states do not fit into float16."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight.mul_(1e6)
    config = ExtractionConfig(dtype="float16", threads=1)
    build_datastore(model, None, CORPUS, folder / "s", windows=WINDOWS, config=config)


def two_models(folder):
    config = ExtractionConfig(threads=1)
    store = build_datastore(
        tiny_model("llama"), None, CORPUS, folder / "s", windows=WINDOWS, config=config
    )
    memlm.attach(tiny_model("llama", seed=7), memlm.KnnMemory(store, k=4))


ROWS = {
    "index of another width": (
        lambda f: memory_at(f, index=ExactIndex(torch.randn(30, 8))),
        InputError,
        "must have the store's 16 dimensions, got 8",
    ),
    "index of another size": (
        lambda f: memory_at(f, index=ExactIndex(torch.randn(29, 16))),
        InputError,
        "must hold the store's 30 entries, got 29",
    ),
    "query of another width": (
        lambda f: memory_at(f).read(torch.randn(2, 8)),
        InputError,
        "16",
    ),
    "keys and values of other lengths": (
        lambda f: store_at(f, values=VALUES[:-1]),
        InputError,
        "30",
    ),
    "k below one": (lambda f: memory_at(f, k=0), InputError, "k must be at least 1, got 0"),
    "temperature of zero": (
        lambda f: memory_at(f, temperature=0.0),
        InputError,
        "temperature must be a finite number above 0, got 0.0",
    ),
    "negative temperature": (
        lambda f: memory_at(f, temperature=-1.0),
        InputError,
        "above 0, got -1.0",
    ),
    "lam above one": (
        lambda f: memlm.Mixture(1.5),
        InputError,
        "lam must lie between 0 and 1, got 1.5",
    ),
    "negative lam": (lambda f: memlm.Mixture(-0.1), InputError, "between 0 and 1, got -0.1"),
    "unknown metric, nearest named": (
        lambda f: IndexConfig(metric="L2"),
        InputError,
        "'l2'",
    ),
    "unknown index, nearest named": (
        lambda f: IndexConfig(type="ivfqp"),
        InputError,
        "'ivfpq'",
    ),
    "no labels": (
        lambda f: memlm.attach(tiny_model("llama"), memory_at(f))(
            input_ids=torch.ones(1, 5, dtype=torch.long),
            labels=torch.full((1, 5), -100),
        ),
        InputError,
        "labels must mark at least one token to predict, got -100 everywhere",
    ),
    "empty store": (
        lambda f: store_at(f, keys=KEYS[:0], values=VALUES[:0]),
        InputError,
        "at least one",
    ),
    "empty corpus": (
        lambda f: memlm.tokenize([], None),
        InputError,
        "at least one document",
    ),
    "nothing to read": (
        lambda f: list(memlm.read_documents(f)),
        InputError,
        "no",
    ),
    "document of one token": (
        lambda f: WINDOWS.table(memlm.TokenCorpus.from_tokens([3])),
        InputError,
        "at least one token",
    ),
    "token outside the vocabulary": (
        lambda f: memlm.evaluate(
            tiny_model("llama"), memlm.TokenCorpus.from_tokens([3, 999, 4]), WINDOWS
        ),
        InputError,
        "999",
    ),
    "value outside the vocabulary": (
        lambda f: store_at(f, vocab_size=20),
        InputError,
        "between 0 and 19",
    ),
    "non-finite keys": (
        lambda f: store_at(f, keys=KEYS.index_fill(0, torch.tensor([3]), torch.nan)),
        InputError,
        "finite.*1 of 30.*row 3",
    ),
    "float16 overflow": (huge, InputError, "float16|wider format"),
    "zero keys under cosine": (
        lambda f: ExactIndex(torch.zeros(3, 4), "cosine"),
        InputError,
        "zero",
    ),
    "store of another model": (
        two_models,
        FingerprintError,
        r"xxh3_128:\w+.*xxh3_128:\w+",
    ),
    "store of a newer format": (
        lambda f: altered(f, lambda manifest: manifest.update(format_version=99)),
        StoreError,
        "99.*upgrade memlm",
    ),
    "altered manifest": (
        lambda f: altered(f, lambda manifest: manifest["info"].update(metric="ip")),
        CorruptStoreError,
        "was altered",
    ),
    "no store": (
        lambda f: memlm.Datastore.open(f / "nothing"),
        CorruptStoreError,
        "must exist but does not",
    ),
    "unknown architecture": (
        lambda f: find_tap(tiny_model("mpt"), "ffn_input"),
        UnsupportedModelError,
        "gpt2, .*llama.*use tap='final'",
    ),
    "unknown tap": (
        lambda f: find_tap(tiny_model("llama"), "last"),
        InputError,
        "must be 'auto' or one of 'ffn_input', 'ffn_output', 'final', got 'last'",
    ),
    "window longer than the model": (
        lambda f: memlm.evaluate(
            tiny_model("llama"),
            memlm.TokenCorpus.from_tokens(np.zeros(300)[:300].astype(int)),
            memlm.SlidingWindows(length=256),
        ),
        InputError,
        "model's 128 positions",
    ),
    "stride beyond the window": (
        lambda f: memlm.SlidingWindows(length=8, stride=9),
        InputError,
        "between 1 and length",
    ),
    "merge without memory": (
        lambda f: memlm.evaluate(tiny_model("llama"), CORPUS, WINDOWS, merge=memlm.Mixture()),
        InputError,
        "a merge needs a memory",
    ),
    "memory twice": (
        lambda f: memlm.attach(
            memlm.attach(tiny_model("llama"), memory_at(f)), memlm.LocalMemory()
        ),
        InputError,
        "must not have a memory yet",
    ),
}


@pytest.mark.parametrize(("act", "error", "words"), ROWS.values(), ids=ROWS)
def test_mistakes_get_a_class_and_a_sentence(act, error, words, tmp_path):
    with pytest.raises(error, match=f"(?s){words}") as caught:
        act(tmp_path)
    sentence = str(caught.value)
    assert len(sentence.split()) > 5
    assert not sentence.endswith(".")


def test_more_neighbours_than_entries_are_clamped_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="at most the store's 30 entries, got 99; using 30"):
        memory = memory_at(tmp_path, k=99)
    assert memory.k == 30


def test_nprobe_of_a_flat_index_does_nothing():
    config = IndexConfig(type="flat", recall_queries=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few, many = (build_index(KEYS, replace(config, nprobe=n), quiet=True) for n in (1, 99))
    assert torch.equal(few.search(KEYS, 5).ids, many.search(KEYS, 5).ids)


def test_batches_of_nothing_are_answered_with_nothing(tmp_path):
    candidates, _ = memory_at(tmp_path).read(torch.empty(0, 16))
    assert candidates.scores.shape == (0, 4)


def test_models_without_a_head_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    body = AutoModelForCausalLM.from_pretrained(tmp_path).model
    with pytest.raises((UnsupportedModelError, InputError), match=r"AutoModelForCausalLM|head"):
        memlm.evaluate(body, CORPUS, WINDOWS)
