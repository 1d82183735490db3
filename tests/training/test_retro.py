"""Training of RETRO models: groups, the paper's schedule, resuming to the same numbers."""

import copy
import json

import pytest
import torch
from transformers import TrainerCallback

from memlm.core.errors import FingerprintError, InputError
from memlm.evaluation.retro import compare_retrieval
from memlm.methods.retro import retro_database
from memlm.models.fingerprint import model_hash
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.fit import retro_fit
from memlm.testing.processes import run_processes
from memlm.testing.tiny import tiny_model, tiny_tokens
from memlm.training.learning import make_optimizer, make_schedule
from memlm.training.model_loss import ModelLoss
from memlm.training.retro import RetroText, fitted_model, retro_sequences, train_retro
from memlm.training.retro_config import RetroTrainConfig
from memlm.training.retro_groups import retro_groups
from tests.faults.text import word_tokenizer
from tests.retrieval.texts import documents

SMALL = {
    "block_length": 16, "batch_tokens": 64, "hidden_size": 16, "layers": 2, "heads": 2,
    "cross_attention_layers": (1, 2), "warmup_steps": 2, "log_every": 1, "precision": "float32",
    "threads": 1,
}  # fmt: skip


@pytest.fixture
def source(tokenizer, tmp_path):
    retro_database(documents(24), tokenizer, tmp_path / "text", chunk_size=8, quiet=True)
    return RetroText.open(tmp_path / "text")


def losses(folder):
    return [point["loss"] for point in json.loads((folder / "training.json").read_text())["curve"]]


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_text_without_neighbours_trains_an_ordinary_model(source, tokenizer, tmp_path):
    config = RetroTrainConfig(**SMALL, max_steps=3)
    alone = source._replace(neighbours=None)
    model = train_retro(alone, tokenizer, config, tmp_path / "alone", quiet=True)
    found = losses(tmp_path / "alone")
    assert found[-1] < found[0]
    torch.manual_seed(config.seed)
    untouched = RetroForCausalLM(model.config)
    for name, weight in model.named_parameters():  # what only neighbours reach is as it began
        same = torch.equal(weight, untouched.get_parameter(name))
        assert same == (".cross" in name or ".encoder." in name), name
    with pytest.raises(FingerprintError):
        train_retro(source, tokenizer, config, tmp_path / "alone", resume=True, quiet=True)


def test_a_resumed_run_continues_identically(source, tokenizer, tmp_path):
    config = RetroTrainConfig(**SMALL, max_steps=12, save_every=4)
    settings = {"held_out": source, "quiet": True}
    whole = train_retro(source, tokenizer, config, tmp_path / "whole", **settings)
    found = losses(tmp_path / "whole")
    assert len(found) == 12
    assert found[-1] < found[0]
    with pytest.raises(KeyboardInterrupt):
        train_retro(source, tokenizer, config, tmp_path / "cut", callbacks=[Die(7)], **settings)
    cut = train_retro(source, tokenizer, config, tmp_path / "cut", resume=True, **settings)
    assert losses(tmp_path / "cut") == found
    assert all(map(torch.equal, whole.parameters(), cut.parameters()))
    again = RetroForCausalLM.from_pretrained(tmp_path / "cut")
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
    held_out = json.loads((tmp_path / "cut" / "training.json").read_text())["held_out"]
    assert 0 < held_out["loss"] < found[0]


def run_in_parts(kind, accumulate, text, out):
    """Four steps of one process, or of all that there are."""
    tokenizer = word_tokenizer()
    config = RetroTrainConfig(**SMALL, max_steps=4, accumulate=accumulate)
    model = fitted(tokenizer, config)[1] if kind == "fit" else None
    source = RetroText.open(text)
    trained = train_retro(source, tokenizer, config, out, model=model, held_out=source, quiet=True)
    return {name: value.detach() for name, value in trained.named_parameters()}


@pytest.mark.parametrize("kind", ["retro", "fit"])
def test_two_processes_are_one_with_twice_the_batches(kind, tmp_path):
    text = tmp_path / "text"
    retro_database(documents(24), word_tokenizer(), text, chunk_size=8, quiet=True)
    alone = run_in_parts(kind, 2, text, tmp_path / "one")
    for together in run_processes(run_in_parts, 2, kind, 1, text, tmp_path / "two"):
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-3, atol=2e-5)
    one, two = (json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert one["held_out"] == pytest.approx(two["held_out"], rel=1e-4)


def test_the_neighbours_are_read(source, tokenizer, tmp_path):
    config = RetroTrainConfig(**SMALL, max_steps=2)
    model = train_retro(source, tokenizer, config, tmp_path / "run", quiet=True)
    torch.manual_seed(config.seed)
    before = RetroForCausalLM(model.config)
    for name, weight in model.model.encoder.named_parameters():
        assert not torch.equal(weight, before.model.encoder.get_parameter(name)), name


def test_the_optimiser_has_the_groups_of_the_package(source):
    config = RetroTrainConfig(**SMALL, max_steps=1)
    model = RetroForCausalLM(RetroConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        encoder_hidden_size=8, chunk_size=8,
    ))  # fmt: skip
    ours = make_optimizer(config, ModelLoss(model), model).param_groups
    for mine, expected in zip(ours, retro_groups(model, weight_decay=0.1), strict=True):
        assert mine["weight_decay"] == expected["weight_decay"]
        assert list(map(id, mine["params"])) == list(map(id, expected["params"]))


@pytest.mark.parametrize(
    ("size", "peak", "steps"), [("172m", 2e-4, 800_000), ("7.5b", 1e-4, 200_000)]
)
def test_the_published_schedule(size, peak, steps):
    config = RetroTrainConfig.published(size)
    assert config.max_steps == steps
    assert config.step_tokens * steps == 419_430_400_000
    rate = make_schedule(config)
    rates = [
        rate(step) * config.learning_rate for step in (0, 375, 750, (steps + 750) // 2, steps - 1)
    ]
    expected = [1e-7, (1e-7 + peak) / 2, peak, 0.55 * peak, 0.1 * peak]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_is_refused(source, tokenizer, tmp_path):
    config = RetroTrainConfig(**SMALL, max_steps=1)
    wrong = RetroTrainConfig(**{**SMALL, "block_length": 12}, max_steps=1)
    with pytest.raises(InputError, match="a whole number of chunks of 8 tokens, got 12"):
        train_retro(source, tokenizer, wrong, tmp_path / "run", quiet=True)
    many = RetroTrainConfig(**SMALL, k=3, max_steps=1)
    with pytest.raises(InputError, match="between 1 and the table's 2, got 3"):
        train_retro(source, tokenizer, many, tmp_path / "run", quiet=True)
    model = RetroForCausalLM(RetroConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        head_dim=8, encoder_hidden_size=8, chunk_size=4,
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"chunk size of .*, 8 tokens, got 4"):
        train_retro(source, tokenizer, config, tmp_path / "run", model=model, quiet=True)
    with pytest.raises(InputError, match="size must be one of"):
        RetroTrainConfig(**SMALL, size="1b", max_steps=1)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["another"])
    with pytest.raises(FingerprintError, match="must be the one that made"):
        train_retro(source, other, config, tmp_path / "run", quiet=True)


def fitted(tokenizer, config):
    base = tiny_model(vocab_size=len(tokenizer))
    return base, fitted_model(base, config, 8)


def test_a_fitted_model_resumes_and_its_base_stays(source, tokenizer, tmp_path):
    config = RetroTrainConfig(**SMALL, max_steps=12, save_every=4)
    base, model = fitted(tokenizer, config)
    before = model_hash(base)
    whole = train_retro(source, tokenizer, config, tmp_path / "whole", model=model, quiet=True)
    assert model_hash(base) == before
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    assert any(gate.abs() > 0 for gate in whole.gates.values())
    settings = {"quiet": True, "resume": True}
    killed = {**settings, "model": fitted(tokenizer, config)[1], "callbacks": [Die(7)]}
    with pytest.raises(KeyboardInterrupt):
        train_retro(source, tokenizer, config, tmp_path / "cut", **killed)
    for _ in range(2):  # the second time it is only loaded
        _, again = fitted(tokenizer, config)
        cut = train_retro(source, tokenizer, config, tmp_path / "cut", model=again, **settings)
        assert all(map(torch.equal, whole.parameters(), cut.parameters()))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    data = retro_sequences(source, config)
    figures = compare_retrieval(whole, data, quiet=True)
    off = compare_retrieval(fitted(tokenizer, config)[1], data, modes=["on"], quiet=True)["on"]
    assert (figures["off"].chunk_nats == off.chunk_nats).all()
    assert (figures["on"].chunk_nats != off.chunk_nats).any()


def test_a_fitted_model_learns_to_read_the_answer():
    """Random tokens cannot be foretold, except where a neighbour's continuation tells them."""
    torch.manual_seed(0)
    words = 8
    base = tiny_model(vocab_size=words + 3)
    model = retro_fit(base, chunk_size=4, cross_attention_layers=(1, 2), encoder_num_layers=1)
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-2, weight_decay=0.0)

    def loss(seed, told=True):
        tokens = tiny_tokens(64, 5, vocab_size=words + 3, seed=seed)
        answer = tokens[:, 4:] if told else tiny_tokens(64, 1, vocab_size=words + 3, seed=-seed)
        neighbour = torch.cat([tokens[:, :4], answer.expand(-1, 4)], 1)
        labels = tokens.clone()
        labels[:, :4] = -100  # only what follows the chunk
        return model.train()(tokens, neighbours=neighbour[:, None], labels=labels).loss

    with torch.no_grad():
        first = float(loss(1000))
    for step in range(120):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        told, untold = float(loss(1000)), float(loss(1000, told=False))
    assert told < 0.5 * first
    assert told < 0.5 * untold


def test_what_a_frozen_model_cannot_learn_from_is_refused(source, tokenizer, tmp_path):
    config = RetroTrainConfig(**SMALL, max_steps=1)
    _, model = fitted(tokenizer, config)
    alone = source._replace(neighbours=None)
    with pytest.raises(InputError, match="a frozen model learns from neighbours only"):
        train_retro(alone, tokenizer, config, tmp_path / "run", model=model, quiet=True)
    with pytest.raises(InputError, match="or one that retro_fit made, got a LlamaForCausalLM"):
        train_retro(source, tokenizer, config, tmp_path / "run", model=model.detach(), quiet=True)
