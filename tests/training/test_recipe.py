"""Recipes: what is said later wins, mistakes are named, the papers' are what the papers say."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memlm.core.errors import InputError
from memlm.training.architecture import model_of
from memlm.training.config import TrainConfig
from memlm.training.recipe import Recipe, parse_changes, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(path, text):
    path.write_text(text)
    return path


def test_preset_then_recipe_then_changes(tmp_path):
    path = write(
        tmp_path / "mine.toml",
        'preset = "small"\nmethod = "trime"\nlearning_rate = 1e-4\nkeep_steps = [5, 6]\n'
        'architecture = "shape.json"\nmax_steps = 70\n',
    )
    recipe = read_recipe(path)
    assert recipe.architecture == tmp_path / "shape.json"
    config = recipe.config(learning_rate=2e-4, max_seconds=3.0)
    assert config == TrainConfig.preset(
        "small", method="trime", learning_rate=2e-4, keep_steps=(5, 6), max_seconds=3.0
    )
    assert recipe.config().max_steps == 70
    assert recipe.config(preset="tiny").hidden_size == 128
    assert Recipe({}).config() == TrainConfig.preset("tiny")
    path = write(tmp_path / "mine.json", json.dumps({"layers": 2}))
    assert read_recipe(path).config().layers == 2


def test_mistakes_in_a_recipe_are_named(tmp_path):
    with pytest.raises(InputError, match="must be a TOML or JSON file"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(InputError, match="readable as TOML"):
        read_recipe(write(tmp_path / "a.toml", "= 3"))
    with pytest.raises(InputError, match="has not: depth; it has"):
        read_recipe(write(tmp_path / "b.toml", "depth = 3"))
    with pytest.raises(InputError, match="holds a list"):
        read_recipe(write(tmp_path / "c.json", "[]"))


def test_changes_of_a_command_line():
    lines = ["lam=1", "rate = 1e-3", "rule=nag", "steps=[1, 2]", "keep=true"]
    assert parse_changes(lines) == {
        "lam": 1,
        "rate": 1e-3,
        "rule": "nag",
        "steps": (1, 2),
        "keep": True,
    }
    for line in ("rate", "=3", "rate="):
        with pytest.raises(InputError, match="written name=value"):
            parse_changes([line])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["ce", "trime", "trime_long", "trime_ext"])
def test_every_recipe_is_a_run(path, method):
    recipe = read_recipe(path)
    config = recipe.config(method=method)
    assert config.method == method
    assert recipe.architecture is None or recipe.architecture.is_file()


@pytest.mark.parametrize(
    ("name", "step_tokens", "vocabulary", "parameters"),
    [
        ("wikitext-103-247m", 73_728, 267_744, 247e6),
        ("wikitext-103-150m", 72_000, 267_744, 150e6),
        ("enwik8-38m", 49_152, 257, 38e6),
    ],
)
def test_recipes_of_the_paper(name, step_tokens, vocabulary, parameters):
    recipe = read_recipe(RECIPES / f"{name}.toml")
    config = recipe.config()
    assert 4 * config.step_tokens == step_tokens  # four GPUs
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w2",
        pad_token="w1",
    )
    with torch.device("meta"):
        model = model_of(recipe.architecture, tokenizer)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.02)
    assert model.config.vocab_size == vocabulary


def test_a_model_of_any_architecture(tmp_path, tokenizer):
    path = write(tmp_path / "gpt2.json", '{"model_type": "gpt2", "n_embd": 8, "n_head": 2}')
    first, second = (model_of(path, tokenizer, seed=seed) for seed in (1, 1))
    assert first.config.vocab_size == len(tokenizer)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    with pytest.raises(InputError, match="with model_type, but 'model_type'"):
        model_of(write(tmp_path / "none.json", "{}"), tokenizer)
    with pytest.raises(InputError, match="must be a configuration file"):
        model_of(tmp_path / "missing.json", tokenizer)
