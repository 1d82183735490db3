"""Encoder-decoders with a memory: laws of extraction, mixtures, generation and evaluation."""

import math

import numpy as np
import pytest
import torch

from memlm.core.errors import FingerprintError, InputError, UnsupportedModelError
from memlm.core.merges import Mixture, Union
from memlm.data.pairs import PairCorpus
from memlm.evaluation.pairs import evaluate_pairs
from memlm.extract.config import ExtractionConfig
from memlm.extract.pairs import build_pair_datastore
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.methods.knn_mt import knn_mt
from memlm.models.attach import attach
from memlm.models.attach_seq2seq import attach_seq2seq
from memlm.models.taps import capture, find_tap, reached
from memlm.store.writer import StoreWriter
from memlm.testing.tiny import PAIR_FAMILIES, tiny_model, tiny_translator

FLOAT32 = ExtractionConfig(dtype="float32", threads=1, shard_entries=40, batch_tokens=60)


def pairs(count=25, seed=0):
    draw = np.random.default_rng(seed)
    rows = [[draw.integers(3, 60, n) for n in draw.integers(1, 9, count)] for _ in range(2)]
    return PairCorpus.from_tokens(rows[0], [np.append(row, 2) for row in rows[1]])


@pytest.fixture(params=PAIR_FAMILIES)
def model(request):
    return tiny_translator(request.param)


@pytest.fixture
def store(model, tmp_path):
    return build_pair_datastore(model, None, pairs(), tmp_path / "store", config=FLOAT32)


def test_entries_are_the_decoder_states_of_single_pairs(model, store):
    text, tap = pairs(), find_tap(model)
    assert tap.name == "ffn_input"
    assert torch.equal(store.values.long(), torch.from_numpy(text.targets.tokens).long())
    for number in (0, 7, 24):
        batch = text.batch([number])
        with torch.no_grad(), capture(model, tap) as seen:
            model(input_ids=batch.input_ids, labels=batch.labels)
        here = (store.documents == number).nonzero().squeeze(-1)
        assert store.positions[here].tolist() == list(range(len(here)))
        torch.testing.assert_close(store.gather(here), reached(seen, tap)[0], atol=1e-4, rtol=1e-4)


def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    model, original, calls = tiny_translator("t5"), StoreWriter.write, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(StoreWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        build_pair_datastore(model, None, pairs(), tmp_path / "a", config=FLOAT32)
    build_pair_datastore(model, None, pairs(), tmp_path / "a", config=FLOAT32)
    build_pair_datastore(model, None, pairs(), tmp_path / "b", config=FLOAT32)
    names = sorted(x.name for x in (tmp_path / "b").glob("*.safetensors"))
    assert len(names) > 6
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(FingerprintError):
        build_pair_datastore(model, None, pairs(seed=1), tmp_path / "a", config=FLOAT32)


def test_without_weight_it_is_the_model(model, store):
    lm = knn_mt(model, store, lam=0.0)
    batch = pairs(4, seed=3).batch(range(4))
    with torch.no_grad():
        assert torch.equal(lm(**batch._asdict()).logits, model(**batch._asdict()).logits)
    assert lm.detach() is model
    lm.merge = Mixture(0.5)
    with torch.no_grad():
        rows = lm(**batch._asdict()).logits.exp().sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_generated_scores_as_it_was_generated(model, store, beams):
    lm = knn_mt(model, store, k=8, lam=0.6, temperature=1.0)
    batch = pairs(3, seed=4).batch(range(3))
    ask = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "length_penalty": 1.0}
    made = lm.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask,
        return_dict_in_generate=True, output_scores=True, **ask,
    )  # fmt: skip
    alone = lm.generate(input_ids=batch.input_ids[:1][batch.attention_mask[:1] > 0][None], **ask)
    assert made.sequences[0, : alone.shape[1]].tolist() == alone[0].tolist()
    with torch.no_grad():
        logits = lm(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=made.sequences[:, :-1],
        ).logits
    written = made.sequences[:, 1:]
    steps = logits.log_softmax(-1).gather(-1, written[..., None])[..., 0]
    ended = (written == 2).long()
    real = ended.cumsum(-1) - ended == 0  # up to the end token
    if beams == 1:
        scores = torch.stack(made.scores, 1).log_softmax(-1)
        expected = scores.gather(-1, written[..., None])[..., 0]
        torch.testing.assert_close(steps[real], expected[real], atol=1e-4, rtol=1e-4)
    else:
        means = (steps * real).sum(-1) / real.sum(-1)
        torch.testing.assert_close(means, made.sequences_scores, atol=1e-4, rtol=1e-4)
    base = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **ask)
    assert base.tolist() != made.sequences.tolist()


def test_perplexity_is_the_mean_and_a_store_knows_its_own_text(model, store):
    text = pairs()
    whole = evaluate_pairs(model, text, batch_tokens=64, progress=False)
    total = 0.0
    for number in range(len(text)):
        batch = text.batch([number])
        with torch.no_grad():
            loss = model(**batch._asdict()).loss
        total += float(loss) * batch.labels.shape[1]
    assert whole.nll == pytest.approx(total, rel=1e-4)
    assert whole.tokens == len(text.targets.tokens)
    assert whole.perplexity == pytest.approx(math.exp(total / whole.tokens), rel=1e-3)
    remembered = evaluate_pairs(knn_mt(model, store, k=1, lam=0.9), text, progress=False)
    assert remembered.perplexity < 1.2


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny_translator("t5")
    store = build_pair_datastore(model, None, pairs(), tmp_path / "store")
    with pytest.raises(InputError, match="must have no state, got a AutomatonMemory"):
        attach_seq2seq(model, AutomatonMemory(store, k=2))
    with pytest.raises(InputError, match="bias must be"):
        attach_seq2seq(model, KnnMemory(store, k=2), bias="left")
    with pytest.raises(FingerprintError, match="was made by model"):
        knn_mt(tiny_translator("t5", seed=1), store)
    with pytest.raises(UnsupportedModelError, match="pairs need an encoder-decoder"):
        build_pair_datastore(tiny_model("llama"), None, pairs(), tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match="decoder-only model"):
        attach(model, KnnMemory(store, k=2))
    with pytest.raises(UnsupportedModelError, match="is not saved as one"):
        attach_seq2seq(model, KnnMemory(store, k=2), Union()).save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match="below the model's vocabulary size"):
        build_pair_datastore(model, None, PairCorpus.from_tokens([[99]], [[1]]), tmp_path / "y")
