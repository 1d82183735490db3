"""Training on the Trainer: learns, resumes to the same numbers, keeps budgets, says what it did."""

import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from memlm.core.errors import FingerprintError, InputError
from memlm.data.documents import Document
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.models.taps import find_tap, forward_to_tap
from memlm.testing.tiny import tiny_model
from memlm.training import plan
from memlm.training.blocks import HeldOutBlocks, collate, pack
from memlm.training.causal_lm import new_model, train_causal_lm
from memlm.training.config import PRESETS, TrainConfig
from memlm.training.folder import last_checkpoint
from memlm.training.learning import resolve_precision
from memlm.training.plan import describe_training
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
            "batch_tokens": 64,
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
    config = settings(save_every=3, accumulate=accumulate, batch_tokens=32, optimizer=optimizer)
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
    assert report["steps"] == report["plans"][-1][1] >= 1
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
    assert report["epochs"] == pytest.approx(report["tokens"] / pack(corpus).scored[1:].sum())


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


METHODS = ["ce", "trime", "trime_long", "trime_ext"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_method_resumes_identically(corpus, tokenizer, tmp_path, method):
    changes = {"method": method, "memory_after": 2, "accumulate": 2, "batch_tokens": 32}
    config = settings(save_every=3, log_every=2, max_steps=8, **changes)
    whole = train(corpus, tokenizer, tmp_path / "whole", config, held_out=corpus)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tokenizer, tmp_path / "cut", config, held_out=corpus, callbacks=[StopAt(5)])
    resumed = train(corpus, tokenizer, tmp_path / "cut", config, held_out=corpus, resume=True)
    first, second = summary(tmp_path / "whole"), summary(tmp_path / "cut")
    assert first["curve"] == second["curve"]
    assert [point["step"] for point in first["curve"]] == [2, 3, 4, 6, 8]
    assert first["held_out"] == second["held_out"]
    assert first["tokens"] == second["tokens"]
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_memory_lowers_the_loss_after_its_warm_up(corpus, tokenizer, tmp_path):
    config = settings(method="trime", memory_after=5, max_steps=10)
    train(corpus, tokenizer, tmp_path, config, held_out=corpus)
    curve = summary(tmp_path)["curve"]
    assert all(point["loss"] == pytest.approx(point["model_loss"]) for point in curve[:5])
    assert all(abs(point["loss"] - point["model_loss"]) > 1e-3 for point in curve[5:])
    held_out = summary(tmp_path)["held_out"]
    assert held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))
    assert held_out["model_loss"] != held_out["loss"]


def test_a_step_does_not_depend_on_how_it_is_cut_up(corpus, tokenizer, tmp_path):
    cut = settings(max_steps=4, batch_tokens=16, accumulate=4)
    one = train(corpus, tokenizer, tmp_path / "one", settings(max_steps=4))
    four = train(corpus, tokenizer, tmp_path / "four", cut)
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_of_ones_own_is_continued(corpus, tokenizer, tmp_path, family):
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=32)
    before = [parameter.clone() for parameter in model.parameters()]
    trained = train(corpus, tokenizer, tmp_path, settings(method="trime"), model=model)
    assert trained is model
    assert not all(map(torch.equal, before, trained.parameters()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    tap = find_tap(loaded)
    assert torch.equal(forward_to_tap(loaded, tap, ids), forward_to_tap(trained, tap, ids))
    assert "hidden_size" not in summary(tmp_path)["config"]
    with pytest.raises(FingerprintError, match="model_hash"):
        train(corpus, tokenizer, tmp_path, settings(method="trime"), model=model, resume=True)
    longer = settings(block_length=64)
    with pytest.raises(InputError, match="32 positions of the model"):
        train(corpus, tokenizer, tmp_path / "longer", longer, model=model)


def test_models_are_kept_on_the_way(corpus, tokenizer, tmp_path):
    config = settings(
        save_every=2, keep_last=3, keep_steps=(3, 5), keep_best=True, evaluate_every=4
    )
    model = train(corpus, tokenizer, tmp_path, config, held_out=corpus)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"checkpoint-8", "checkpoint-10", "checkpoint-12"}
    third, fifth = (AutoModelForCausalLM.from_pretrained(tmp_path / f"step-{n}") for n in (3, 5))
    assert not all(map(torch.equal, third.parameters(), fifth.parameters()))
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert all(map(torch.equal, best.parameters(), model.parameters()))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "best")) == len(tokenizer)
    record = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in summary(tmp_path)["evaluations"]}
    assert record["loss"] == min(losses.values()) == losses[record["step"]]


def test_computing_layers_again_changes_nothing(corpus, tokenizer, tmp_path):
    plain = train(corpus, tokenizer, tmp_path / "a", settings(method="trime", max_steps=3))
    config = settings(method="trime", max_steps=3, checkpoint_layers=True)
    again = train(corpus, tokenizer, tmp_path / "b", config)
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            {"schedule": "inverse_sqrt", "warmup_steps": 4, "start_learning_rate": 1e-7},
            lambda n: 1e-7 + n * (1e-2 - 1e-7) / 4 if n < 4 else 1e-2 * 2 * n**-0.5,
        ),
        (
            {"schedule": "restarts", "warmup_steps": 0, "period": 4, "optimizer": "nag"},
            lambda n: 1e-2 * 0.5 * (1 + math.cos(math.pi * (n % 4) / 4)),
        ),
    ],
)
def test_rates_of_the_papers(corpus, tokenizer, tmp_path, rule, expected):
    train(corpus, tokenizer, tmp_path, settings(max_steps=8, **rule))
    rates = [point["learning_rate"] for point in summary(tmp_path)["curve"]]
    assert rates == pytest.approx([expected(n) for n in range(8)])


def test_a_chain_decides_what_is_read_together(corpus, tokenizer, tmp_path):
    blocks = len(HeldOutBlocks(pack(corpus), 16))
    config = settings(method="trime_ext", max_steps=2)
    chain = np.random.default_rng(1).permutation(blocks)
    train(corpus, tokenizer, tmp_path / "a", config, chain=chain)
    train(corpus, tokenizer, tmp_path / "b", config)
    assert summary(tmp_path / "a")["curve"] != summary(tmp_path / "b")["curve"]
    assert summary(tmp_path / "a")["overlap"]["as_read"] < 1
    as_written = summary(tmp_path / "b")["overlap"]
    assert as_written["as_read"] == as_written["as_written"] > 0
    with pytest.raises(FingerprintError, match="chain_hash"):
        train(corpus, tokenizer, tmp_path / "a", config, resume=True)
    with pytest.raises(InputError, match="every block from 0"):
        train(corpus, tokenizer, tmp_path / "c", config, chain=chain[1:])
    with pytest.raises(InputError, match="is what trime_ext reads"):
        train(corpus, tokenizer, tmp_path / "d", chain=chain)


def test_similar_blocks_are_read_together_and_it_is_said_how_similar(tokenizer, tmp_path):
    topic = np.repeat(np.arange(32) % 8, 16)
    tokens = 40 + 30 * topic + np.random.default_rng(1).integers(0, 30, len(topic))
    text = TokenCorpus.from_tokens(np.append(tokens, 0))
    train(text, tokenizer, tmp_path, settings(method="trime_ext", group_by="bm25", max_steps=1))
    shared = summary(tmp_path)["overlap"]
    assert shared["as_written"] == 0  # four blocks of four topics
    assert shared["as_read"] > 0.2


def test_trackers_of_the_trainer_are_told(corpus, tokenizer, tmp_path, monkeypatch):
    """By the name under which the Trainer knows them."""
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(dict(logs or {}))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "own", Tracker)
    config = settings(evaluate_every=6, report_to=("own",))
    train(corpus, tokenizer, tmp_path, config, held_out=corpus)
    assert [
        set(logs) >= {"loss", "model_loss", "grad_norm", "learning_rate"}
        for logs in told
        if "loss" in logs
    ] == [True] * 12
    assert sum("eval_model_loss" in logs for logs in told) == 2


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
        train(corpus, tokenizer, tmp_path / "a", settings(block_length=5000, batch_tokens=5000))
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
    planned = describe_training(TrainConfig.preset("tiny", max_steps=100), 4096, corpus)
    assert planned["parameters"] == 1_180_800
    assert planned["step_tokens"] == 2048
    assert planned["epochs"] == pytest.approx(100 * 2048 / len(corpus))
    assert planned["memory_bytes"] > 16 * planned["parameters"]
    assert "1,180,800 parameters" in planned["text"]
    assert planned["tokens"] == 204_800
    assert planned["hours"] > 0
    assert describe_training(TrainConfig.preset("tiny"), 4096, processes=4)["step_tokens"] == 8192
    timed = describe_training(TrainConfig.preset("tiny", max_seconds=9.0), 4096)
    assert timed["epochs"] is None
    assert "9 s" in timed["text"]


@pytest.mark.parametrize(
    ("name", "speed", "hours"), [("tiny", 95e9, 0.23), ("small", 95e9, 2.4), ("base", 1e14, 3.0)]
)
def test_stated_hours_are_those_of_a_dry_run(monkeypatch, name, speed, hours):
    monkeypatch.setattr(plan, "_measured_speed", lambda *_: speed)
    planned = describe_training(TrainConfig.preset(name), 4096)
    assert planned["hours"] == pytest.approx(hours, rel=0.03)


@pytest.mark.parametrize(
    ("found", "precision"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")]
)
def test_automatic_precision_follows_the_processor(monkeypatch, found, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert resolve_precision(settings(precision="auto")) == precision
    assert resolve_precision(settings(precision="float32")) == "float32"
