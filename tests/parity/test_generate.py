"""Generation with a kNN memory against the original: `KNNWrapper` on an exact index.

Token ids agree exactly (greedy and beams), scores to 1e-4. The memory's keys are read where
the original read them: the input of the last feed-forward of GPT-2.
"""

import json
import re

import numpy as np
import pytest
import torch
from conftest import sibling
from transformers import AutoModelForCausalLM

from memlm.core.merges import Mixture
from memlm.memory.knn import KnnMemory
from memlm.models.attach import attach
from memlm.models.fingerprint import model_hash
from memlm.models.taps import find_tap, forward_to_tap
from memlm.store.arrays import save_arrays


class Recorded:
    """The model and the datastore that belong to a case folder."""

    def __init__(self, folder, scratch):
        built = sibling(folder, "dstore_gpt2")
        meta = json.loads((built / "meta.json").read_text())
        self.keys = np.fromfile(next(built.glob("*_keys.npy")), np.float16)
        self.keys = self.keys.reshape(meta["n"], meta["dim"])
        self.windows = np.load(built / "windows.npz")
        self.model = AutoModelForCausalLM.from_pretrained(
            sibling(folder, "tiny_gpt2"), dtype=torch.float32
        )
        values = np.fromfile(next(built.glob("*_vals.npy")), np.int32)
        self.store = save_arrays(
            scratch / "store",
            torch.from_numpy(self.keys),
            torch.from_numpy(values),
            model_hash=model_hash(self.model),
            tap="ffn_input",
        )


class Golden(Recorded):
    """With the memory of the case and what was generated."""

    def __init__(self, folder, scratch):
        super().__init__(folder, scratch)
        self.expected = {
            name: torch.from_numpy(a) for name, a in np.load(folder / "arrays.npz").items()
        }
        settings = json.loads((folder / "summary.json").read_text())
        assert settings["n"] == len(self.store)
        memory = KnnMemory(self.store, k=settings["k"], temperature=settings["T"])
        self.lm = attach(self.model, memory, Mixture(settings["lmbda"]))
        self.prompts = self.expected["prompts"]
        new = self.expected["knn_greedy"].shape[1] - self.prompts.shape[1]
        self.ask = {
            "attention_mask": torch.ones_like(self.prompts),
            "max_new_tokens": new,
            "do_sample": False,
            "pad_token_id": self.model.config.eos_token_id,
            "return_dict_in_generate": True,
            "output_scores": True,
        }

    def generate(self, model, **more):
        return model.generate(self.prompts, **self.ask, **more)

    def beams(self, kind):
        """Numbers of beams of the recorded searches ``<kind>_beam<number>``."""
        found = (re.fullmatch(rf"{kind}_beam(\d+)", name) for name in self.expected)
        numbers = [int(match[1]) for match in found if match]
        assert numbers
        return numbers


@pytest.fixture
def golden(golden_retomaton_generate_gpt2, tmp_path):
    return Golden(golden_retomaton_generate_gpt2, tmp_path)


def test_greedy(golden):
    made = golden.generate(golden.lm)
    assert torch.equal(made.sequences, golden.expected["knn_greedy"])
    scores, expected = torch.stack(made.scores, 1), golden.expected["knn_greedy_scores"]
    # The original floors tokens without neighbours at exp(-10000): nothing in a mixture.
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_beams(golden):
    for number in golden.beams("knn"):
        made = golden.generate(golden.lm, num_beams=number)
        expected = golden.expected[f"knn_beam{number}"]
        assert torch.equal(made.sequences, expected)
        scores = golden.expected[f"knn_beam{number}_seqscore"]
        torch.testing.assert_close(made.sequences_scores, scores, atol=1e-4, rtol=0)


def test_the_model_alone(golden):
    runs = {"base_greedy": 1} | {f"base_beam{number}": number for number in golden.beams("base")}
    for name, number in runs.items():
        for model in (golden.model, attach(golden.model, golden.lm.memory, Mixture(0.0))):
            made = golden.generate(model, num_beams=number).sequences
            assert torch.equal(made, golden.expected[name])


def test_the_memory_made_a_difference(golden):
    assert not torch.equal(golden.expected["knn_greedy"], golden.expected["base_greedy"])


def test_keys_are_read_where_the_original_read_them(golden):
    tokens = torch.from_numpy(golden.windows["input_ids"]).long()
    labels = torch.from_numpy(golden.windows["labels"])[:, 1:]
    with torch.no_grad():
        states = forward_to_tap(golden.model, find_tap(golden.model), tokens)[:, :-1]
    got = states[labels != -100][: len(golden.keys)].half().float()
    torch.testing.assert_close(got, torch.from_numpy(golden.keys).float(), atol=2e-3, rtol=1e-3)


def test_forward_scores_equal_the_originals_evaluation(golden_retomaton_eval_gpt2, tmp_path):
    """The attached model's loss and label scores on the evaluation windows."""
    folder = golden_retomaton_eval_gpt2
    golden = Recorded(folder, tmp_path)
    runs = json.loads((folder / "summary.json").read_text())
    windows = np.load(folder / "windows.npz")
    tokens = torch.from_numpy(windows["input_ids"]).long()
    labels = torch.from_numpy(windows["labels"]).long()
    wanted = labels[:, 1:] != -100
    checked = 0
    for name, run in runs.items():
        config = run.get("config", {})
        if config.get("kind") != "knn" or config["index"] != "flat":
            continue
        memory = KnnMemory(
            golden.store, k=config["k"], temperature=config["knn_temp"], recompute=True
        )
        lm = attach(golden.model, memory, Mixture(config["lmbda"]))
        with torch.no_grad():
            output = lm(tokens, labels=labels)
        scores = output.logits[:, :-1].log_softmax(-1)[wanted]
        got = scores.gather(-1, labels[:, 1:][wanted][:, None])[:, 0]
        expected = torch.from_numpy(np.load(folder / f"{name}.npz")["logprob"])
        torch.testing.assert_close(got, expected.to(got), atol=1e-5, rtol=0)
        assert float(output.loss) == pytest.approx(np.log(run["ppl_token"]), rel=1e-5)
        checked += 1
    assert checked
