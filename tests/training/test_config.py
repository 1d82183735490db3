"""Training settings: refuse nonsense, keep presets honest, round-trip."""

import pytest

from memlm.core.errors import InputError
from memlm.training.config import PRESETS, TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"batch_tokens": 100}, "at least one example of block_length tokens, got 100 for 256"),
        ({"keep_best": True}, "give evaluate_every"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1"),
        ({"method": "long"}, "method must be one of ce, trime"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"group_by": "tfidf"}, "group_by must be one of text, bm25"),
        (
            {"max_steps": None, "max_seconds": 3.0, "schedule": "inverse_sqrt"},
            "give max_steps, not max_seconds",
        ),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"clip_norm": -1.0}, "clip_norm must not be negative"),
        ({"warmup_steps": -5}, "warmup_steps must not be negative"),
        ({"block_length": 1}, "block_length must be at least 2"),
        ({"heads": 3}, "even multiple of heads"),
        ({"hidden_size": 12, "heads": 4}, "even multiple of heads"),
        ({"learning_rate": 0.0}, "learning_rate must be above zero"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate must be above zero"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, nag"),
        ({"beta2": 1.0}, "beta2 must be from 0"),
        ({"max_seconds": 3.0}, "exactly one of max_steps and max_seconds"),
        ({"max_steps": None}, "exactly one of max_steps and max_seconds"),
        ({"max_steps": None, "max_seconds": -1.0}, "max_seconds must be above zero"),
        ({"max_steps": -1}, "max_steps must be at least 1"),
        ({"precision": "float8"}, "precision must be one of"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**{"max_steps": 10, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_and_round_trip(name):
    config = TrainConfig.preset(name)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.preset(name, max_steps=7).max_seconds is None
    assert TrainConfig.preset(name, max_seconds=7.0).max_steps is None


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="no preset 'huge'"):
        TrainConfig.preset("huge")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no setting named depth"):
        TrainConfig.preset("tiny", depth=3)


def test_what_only_watches_a_run_is_not_its_identity():
    config = TrainConfig(max_steps=10)
    watched = TrainConfig(max_steps=10, log_every=1, save_every=2, evaluate_every=3, threads=1)
    assert config.identity() == watched.identity()
    assert config.identity() != TrainConfig(max_steps=10, seed=2).identity()


def test_the_repeatable_run_keeps_everything_else():
    config = TrainConfig.preset("demo", max_seconds=5.0, seed=3)
    repeated = config.with_limit(max_steps=12)
    assert repeated.max_steps == 12
    assert repeated.max_seconds is None
    assert repeated.seed == 3


def test_stated_parameter_counts():
    counts = {name: TrainConfig.preset(name).parameters(4096) for name in PRESETS}
    assert counts == {
        "tiny": 1_180_800,
        "small": 5_065_472,
        "base": 40_645_120,
        "demo": 1_180_800,
    }
