"""Training on the Trainer: learns, resumes to the same numbers, keeps budgets, says what it did."""

import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from memlm.core.errors import FingerprintError, InputError
from memlm.data.documents import Document
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.training.blocks import HeldOutBlocks, collate, pack
from memlm.training.causal_lm import (
    _BlockTrainer,
    describe_training,
    last_checkpoint,
    new_model,
    resolve_precision,
    train_causal_lm,
)
from memlm.training.config import PRESETS, TrainConfig
from memlm.training.tokenizer import train_tokenizer

TEXTS = [
    Document(str(n), f"The {thing} is {n} {unit} long. " * 6)
    for n, (thing, unit) in enumerate(
        (thing, unit)
        for thing in ("bridge", "river", "road", "tower", "wall")
        for unit in ("metres", "miles", "feet", "steps")
    )
]


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return tokenize(TEXTS, tokenizer)


def settings(**changes):
    return TrainConfig(
        **{
            "hidden_size": 16,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 32,
            "block_length": 16,
            "batch_blocks": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 4,
            "max_steps": 12,
            "log_every": 1,
            "precision": "float32",
            "device": "cpu",
            "threads": 1,
            **changes,
        }
    )


def train(corpus, tokenizer, out, config=None, **arguments):
    return train_causal_lm(corpus, tokenizer, config or settings(), out, quiet=True, **arguments)


def summary(out):
    return json.loads((out / "training.json").read_text(encoding="utf-8"))


class StopAt(TrainerCallback):
    """A crash after a given step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_learns_and_leaves_a_model_that_loads(corpus, tokenizer, tmp_path):
    model = train(corpus, tokenizer, tmp_path, settings(max_steps=40), held_out=corpus)
    report = summary(tmp_path)
    assert report["curve"][0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    assert report["held_out"]["loss"] < 3.5
    assert not model.training
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)


def test_the_same_settings_give_the_same_model(corpus, tokenizer, tmp_path):
    torch.manual_seed(5)
    first = train(corpus, tokenizer, tmp_path / "a")
    torch.manual_seed(6)
    second = train(corpus, tokenizer, tmp_path / "b")
    third = train(corpus, tokenizer, tmp_path / "c", settings(seed=2))
    assert summary(tmp_path / "a")["curve"] == summary(tmp_path / "b")["curve"]
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not all(map(torch.equal, first.parameters(), third.parameters()))


def test_global_random_states_and_threads_are_given_back(corpus, tokenizer, tmp_path):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    train(corpus, tokenizer, tmp_path, settings(max_steps=2))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
@pytest.mark.parametrize("stop", [7, 9])
def test_a_resumed_run_continues_identically(
    corpus, tokenizer, tmp_path, stop, accumulate, optimizer
):
    config = settings(save_every=3, accumulate=accumulate, batch_blocks=2, optimizer=optimizer)
    whole = train(corpus, tokenizer, tmp_path / "whole", config, held_out=corpus)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tokenizer, broken, config, held_out=corpus, callbacks=[StopAt(stop)])
    assert not (broken / "training.json").exists()
    resumed = train(corpus, tokenizer, broken, config, held_out=corpus, resume=True)
    assert summary(broken)["curve"] == summary(tmp_path / "whole")["curve"]
    assert summary(broken)["held_out"] == summary(tmp_path / "whole")["held_out"]
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_a_torn_checkpoint_is_passed_over(corpus, tokenizer, tmp_path):
    config = settings(save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tokenizer, tmp_path, config, callbacks=[StopAt(7)])
    checkpoints = tmp_path / "checkpoints"
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    (checkpoints / "checkpoint-9").mkdir()
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    train(corpus, tokenizer, tmp_path, config, resume=True)
    assert summary(tmp_path)["steps"] == 12


def test_resuming_from_nothing_starts_and_a_finished_run_is_loaded(corpus, tokenizer, tmp_path):
    model = train(corpus, tokenizer, tmp_path, resume=True)
    written = (tmp_path / "training.json").stat().st_mtime_ns
    again = train(corpus, tokenizer, tmp_path, resume=True)
    assert (tmp_path / "training.json").stat().st_mtime_ns == written
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not again.training


def test_a_folder_is_used_for_one_run(corpus, tokenizer, tmp_path):
    train(corpus, tokenizer, tmp_path / "run", settings(max_steps=1))
    with pytest.raises(InputError, match="already holds a training"):
        train(corpus, tokenizer, tmp_path / "run")
    changed = settings(max_steps=1, learning_rate=0.5)
    with pytest.raises(FingerprintError, match=r"learning_rate \(0.01 then, 0.5 now\)"):
        train(corpus, tokenizer, tmp_path / "run", changed, resume=True)
    shorter = TokenCorpus.from_tokens(corpus.tokens[:200])
    with pytest.raises(FingerprintError, match="corpus_hash"):
        train(shorter, tokenizer, tmp_path / "run", settings(max_steps=1), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="new or empty folder"):
        train(corpus, tokenizer, tmp_path / "other")


def test_a_time_budget_is_kept_and_repeats_as_steps(corpus, tokenizer, tmp_path):
    config = settings(max_steps=None, max_seconds=1.5, warmup_steps=40)
    timed = train(corpus, tokenizer, tmp_path / "timed", config)
    report = summary(tmp_path / "timed")
    assert report["steps"] > 20
    assert 0.5 < report["seconds"] < 4
    if len(report["plans"]) == 1:  # the machine's speed was steady
        repeated = config.with_limit(max_steps=report["steps"])
        counted = train(corpus, tokenizer, tmp_path / "counted", repeated)
        assert all(map(torch.equal, timed.parameters(), counted.parameters()))


def test_tokens_are_counted_exactly(corpus, tokenizer, tmp_path):
    class Count(TrainerCallback):
        tokens = 0

        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            batches = iter(train_dataloader)
            self.tokens = sum(int((next(batches)["labels"] != -100).sum()) for _ in range(12))

    counter = Count()
    train(corpus, tokenizer, tmp_path, callbacks=[counter])
    report = summary(tmp_path)
    assert report["tokens"] == counter.tokens > 0
    assert report["epochs"] == pytest.approx(12 * 4 / ((len(pack(corpus).tokens) - 17) // 16))


def test_the_held_out_loss_is_exact_over_tokens(corpus, tokenizer, tmp_path):
    text = tokenize(TEXTS[:3], tokenizer, end=False)
    model = train(corpus, tokenizer, tmp_path, held_out=text)
    batch = collate(list(HeldOutBlocks(pack(text), 16)))
    logits = model(batch["input_ids"]).logits.detach().double()
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    held_out = summary(tmp_path)["held_out"]
    count = len(text) - 3  # begin tokens are never scored
    assert held_out["targets"] == count
    assert held_out["loss"] == pytest.approx(float(nats) / count, rel=1e-5)
    assert held_out["perplexity"] == pytest.approx(math.exp(float(nats) / count), rel=1e-5)
    text_bytes = sum(len(document.text.encode()) for document in TEXTS[:3])
    assert held_out["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) / text_bytes)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_group_follows_the_schedule(corpus, tokenizer, tmp_path, optimizer):
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            # The groups that really step: those of the innermost optimisers.
            inner = optimizer.optimizer
            for child in (getattr(inner, "_muon", inner), getattr(inner, "_adamw", inner)):
                rates.append([group["lr"] / group["initial_lr"] for group in child.param_groups])

    config = settings(optimizer=optimizer, max_steps=8)
    train(corpus, tokenizer, tmp_path, config, callbacks=[Watch()])
    assert len(rates) == 16
    for step in range(8):
        expected = min(1.0, (step + 2) / 4, 1 - (step + 1) / 8)
        for group in rates[2 * step] + rates[2 * step + 1]:
            assert group == pytest.approx(expected)


def test_evaluations_on_the_way_are_reported(corpus, tokenizer, tmp_path):
    train(corpus, tokenizer, tmp_path, settings(evaluate_every=5), held_out=corpus)
    assert [entry["step"] for entry in summary(tmp_path)["evaluations"]] == [5, 10, 12]


def test_our_loss_is_the_models_own(corpus, tokenizer, tmp_path):
    config = settings()
    model = new_model(config, tokenizer)
    held_out = HeldOutBlocks(pack(corpus), 16)
    trainer = _BlockTrainer(config, model, tmp_path, None, held_out, quiet=True, callbacks=[])
    batch = collate([held_out[item] for item in range(5)])
    model.train()
    count = (batch["labels"] != -100).sum()
    ours = trainer.compute_loss(model, batch, num_items_in_batch=count)
    wrapped = torch.nn.DataParallel(model)  # on a CPU: the model behind another forward
    theirs = trainer.compute_loss(wrapped, batch, num_items_in_batch=count)
    torch.testing.assert_close(ours, theirs)


def test_bfloat16_trains_too(corpus, tokenizer, tmp_path):
    model = train(corpus, tokenizer, tmp_path, settings(precision="bfloat16", max_steps=40))
    report = summary(tmp_path)
    assert report["precision"] == "bfloat16"
    assert report["curve"][-1]["loss"] < report["curve"][0]["loss"] - 1
    assert model.dtype == torch.float32


def test_a_loss_that_is_no_number_stops_the_run(corpus, tokenizer, tmp_path):
    config = settings(learning_rate=1e30, warmup_steps=0, clip_norm=0.0)
    with pytest.raises(InputError, match="lower learning_rate"):
        train(corpus, tokenizer, tmp_path, config)


def test_what_does_not_fit_together_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(InputError, match="block of 5000 tokens"):
        train(corpus, tokenizer, tmp_path / "a", settings(block_length=5000))
    foreign = TokenCorpus.from_tokens(np.arange(400))
    with pytest.raises(InputError, match="token 399 where the tokenizer has 300"):
        train(foreign, tokenizer, tmp_path / "b")
    with pytest.raises(InputError, match="token 399 where the tokenizer has 300"):
        train(corpus, tokenizer, tmp_path / "c", held_out=foreign)


@pytest.mark.parametrize("name", PRESETS)
def test_stated_parameter_counts_are_those_of_the_model(name, tokenizer):
    config = TrainConfig.preset(name)
    with torch.device("meta"):
        model = new_model(config, tokenizer)
    assert config.parameters(len(tokenizer)) == model.num_parameters()


def test_a_dry_run_says_what_a_run_will_be(corpus):
    plan = describe_training(TrainConfig.preset("tiny", max_steps=100), 4096, corpus)
    assert plan["parameters"] == 1_180_800
    assert plan["step_tokens"] == 2048
    assert plan["epochs"] == pytest.approx(100 * 2048 / len(corpus))
    assert plan["memory_bytes"] > 16 * plan["parameters"]
    assert "1,180,800 parameters" in plan["text"]
    timed = describe_training(TrainConfig.preset("tiny", max_seconds=9.0), 4096)
    assert timed["epochs"] is None
    assert "9 s" in timed["text"]


@pytest.mark.parametrize(
    ("found", "precision"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")]
)
def test_automatic_precision_follows_the_processor(monkeypatch, found, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert resolve_precision(settings(precision="auto")) == precision
    assert resolve_precision(settings(precision="float32")) == "float32"
