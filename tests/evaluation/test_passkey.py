"""Passkey retrieval: one that remembers scores 1, one that forgets scores 0 beyond its window."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import memlm
from memlm.core.errors import InputError, UnsupportedModelError
from memlm.data.passkey import INSTRUCTION, QUESTION, SENTENCES
from memlm.evaluation.passkey import PasskeyConfig, found_key, measure_passkey, plot
from memlm.evaluation.report import plain
from memlm.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def spaced():
    text = [INSTRUCTION, QUESTION, *SENTENCES] * 3
    return memlm.train_tokenizer(memlm.read_documents(text), vocab_size=300)


class Copyist(GPT2LMHeadModel):
    """Reads the last `sight` tokens and goes on as after the same last tokens before."""

    def __init__(self, sight, tokenizer):
        super().__init__(GPT2Config(vocab_size=len(tokenizer), n_embd=4, n_layer=1, n_head=1))
        self.sight, self.told = sight, tokenizer.encode(". The pass key is")[1:]

    def generate(self, tokens, *, attention_mask, max_new_tokens, **settings):
        assert attention_mask.all()
        rows = []
        for row in tokens.tolist():
            seen, size = row[-self.sight :], len(self.told)
            found = [n for n in range(len(seen) - size) if seen[n : n + size] == self.told]
            after = seen[found[0] + size :] if found else []
            rows.append([*row, *(after + [0] * max_new_tokens)[:max_new_tokens]])
        return torch.tensor(rows)


def test_accuracy_is_that_of_a_model_with_a_known_sight(spaced):
    config = PasskeyConfig((300, 600), (0.0, 0.5, 1.0), samples=3, batch_tokens=700)
    everything = measure_passkey(Copyist(10_000, spaced), spaced, config, progress=False)
    assert [point.accuracy for point in everything.points] == [1.0] * 6
    near = measure_passkey(Copyist(150, spaced), spaced, config, progress=False)
    found = {(point.length, point.depth): point.accuracy for point in near.points}
    assert found[600, 0.0] == found[600, 0.5] == 0
    assert found[600, 1.0] == 1
    assert near.accuracy(600) == pytest.approx(1 / 3)
    shown = plain(near.table())
    assert "33%" in shown
    assert "first number written" in shown
    assert PasskeyConfig.from_dict(near.to_dict()["config"]) == config


def test_the_first_number_counts():
    assert found_key(" 12345. Remember", "12345")
    assert found_key("It is 12345", "12345")
    assert not found_key("123456", "12345")
    assert not found_key("no 1 but 12345", "12345")
    assert not found_key("", "12345")


def test_a_random_model_finds_nothing_and_is_not_changed(spaced):
    model = tiny_model("llama", vocab_size=len(spaced)).train()
    config = PasskeyConfig((260,), (0.5,), samples=2)
    found = measure_passkey(memlm.extend_context(model, window=32, sinks=4), spaced, config)
    assert found.points[0].correct == 0
    assert model.training


def test_the_map_is_drawn(spaced, tmp_path):
    pytest.importorskip("matplotlib")
    config = PasskeyConfig((300, 400), (0.0, 1.0), samples=1)
    result = measure_passkey(Copyist(10_000, spaced), spaced, config)
    plot({"copyist": result, "again": result}, str(tmp_path / "map.png"))
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_bad_settings_are_refused(spaced):
    with pytest.raises(InputError, match="at least one length"):
        PasskeyConfig(())
    with pytest.raises(InputError, match=r"depths must be from 0 to 1, got \[1.5\]"):
        PasskeyConfig((300,), (0.5, 1.5))
    with pytest.raises(InputError, match="at least one depth"):
        PasskeyConfig((300,), ())
    with pytest.raises(InputError, match="at least 1 sample"):
        PasskeyConfig((300,), samples=0)
    short = tiny_model("gpt2", vocab_size=len(spaced), n_positions=64)
    with pytest.raises(UnsupportedModelError, match="come from a table that ends earlier"):
        measure_passkey(short, spaced, PasskeyConfig((300,), (0.5,), samples=1))
