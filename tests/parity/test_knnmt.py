"""kNN-MT against the original: `KNNSaver` and `KNNWrapper` on tiny encoder-decoders.

Keys agree to half precision, logits to 1e-4, generated ids exactly (greedy and beams). Temperature
and weight are in the names of the arrays; k is in no file: the original's runs used 8 or 12, and
one of them must explain all. The original adds the bias of Marian to the logarithm of the mixture.
"""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from memlm.core.merges import Mixture
from memlm.data.pairs import PairCorpus
from memlm.extract.config import ExtractionConfig
from memlm.extract.pairs import build_pair_datastore
from memlm.memory.knn import KnnMemory
from memlm.models.attach_seq2seq import attach_seq2seq
from memlm.models.taps import capture, find_tap, reached
from memlm.ops.merge import mixture_logits

FAMILIES = ("bart", "marian", "t5")


class Golden:
    def __init__(self, folder, scratch):
        arrays = np.load(folder / "arrays.npz")
        self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.model = AutoModelForSeq2SeqLM.from_pretrained(
            folder / "model", dtype=torch.float32
        ).eval()
        self.source, self.labels = self.arrays["src"], self.arrays["labels"]
        targets = [row[row != -100] for row in self.labels]
        self.pairs = PairCorpus.from_tokens(self.source, targets)
        self.store = build_pair_datastore(
            self.model, None, self.pairs, scratch, config=ExtractionConfig(dtype="float16")
        )
        self.rows = len(self.arrays["base_logits"])
        names = (re.fullmatch(r"knn_logits_T([\d.]+)_L([\d.]+)", name) for name in self.arrays)
        self.settings = [match for match in names if match]
        assert self.settings

    def batch(self):
        source = self.source[: self.rows]
        return {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "labels": self.labels[: self.rows],
        }

    def attached(self, match, k):
        temperature, lam = (float(number) for number in match.groups())
        memory = KnnMemory(self.store, k=k, temperature=temperature)
        return attach_seq2seq(self.model, memory, Mixture(lam), bias="outside")

    def fits(self, k):
        """Whether all logits are those of k neighbours."""
        for match in self.settings:
            with torch.no_grad():
                got = self.attached(match, k)(**self.batch()).logits
            expected, real = self.arrays[match.group()], self.labels[: self.rows] != -100
            if not torch.allclose(got[real], expected[real], atol=1e-4, rtol=0):
                return False
        return True

    def generate(self, model, beams, length):
        batch = self.batch()
        del batch["labels"]
        return model.generate(**batch, num_beams=beams, max_new_tokens=length, do_sample=False)


@pytest.fixture(params=FAMILIES)
def golden(request, golden_retomaton_knnmt, tmp_path):
    return Golden(golden_retomaton_knnmt / request.param, tmp_path / "store")


def test_keys_and_values(golden):
    assert torch.equal(golden.store.values.long(), golden.arrays["vals"][:, 0].long())
    keys = golden.store.gather(torch.arange(len(golden.store))).float()
    torch.testing.assert_close(keys, golden.arrays["keys"].float(), atol=2e-3, rtol=2e-3)


def test_taps_and_logits(golden):
    with torch.no_grad():
        for name in ("ffn_input", "ffn_output"):
            tap = find_tap(golden.model, name)
            with capture(golden.model, tap) as seen:
                logits = golden.model(**golden.batch()).logits
            expected = golden.arrays[f"captured_last_{name}"]
            torch.testing.assert_close(reached(seen, tap), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, golden.arrays["base_logits"], atol=1e-4, rtol=1e-4)


def test_mixtures_and_translations(golden):
    fitting = [k for k in (8, 12) if golden.fits(k)]
    assert len(fitting) == 1
    models = {"base": golden.model} | {
        match.group().removeprefix("knn_logits_"): golden.attached(match, fitting[0])
        for match in golden.settings
    }
    made = set()
    for name, expected in golden.arrays.items():
        if found := re.fullmatch(r"gen_(.+)_beams(\d+)", name):
            length = expected.shape[1] - 1
            tokens = golden.generate(models[found[1]], int(found[2]), length)
            assert torch.equal(tokens, expected[:, : tokens.shape[1]]), name
            made.add(found[1])
    assert made == set(models)


def test_the_bias_belongs_to_the_model(golden):
    """By default rows are (1 - lam) softmax(all logits) + lam p_kNN."""
    memory, batch = KnnMemory(golden.store, k=8, temperature=10.0), golden.batch()
    lm = attach_seq2seq(golden.model, memory, Mixture(0.4))
    tap = find_tap(golden.model)
    with torch.no_grad(), capture(golden.model, tap) as seen:
        logits = golden.model(**batch).logits.flatten(0, 1)
        candidates = memory.read(reached(seen, tap).flatten(0, 1), None)[0]
        found = lm(**batch)
    rows = mixture_logits(0.4, logits, candidates)
    torch.testing.assert_close(found.logits.flatten(0, 1), rows)
    loss = torch.nn.functional.cross_entropy(rows, batch["labels"].flatten())
    torch.testing.assert_close(found.loss, loss)
