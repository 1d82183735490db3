"""Language models of fairseq: old and new names, every setting, and what is refused."""

import argparse
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlm.cli.main import main
from memlm.core.errors import InputError
from memlm.importers.adaptive import convert, export_model, import_model
from memlm.testing.tiny import tiny_model, tiny_tokens

WORDS = 61
SHAPES = {
    "tied": {},
    "projections apart": {"tie_projections": False},
    "bands apart": {"tie_word_embeddings": False},
    "factor of one": {"input_factor": 1.0, "output_factor": 1.0, "tie_projections": False},
    "one band": {"input_cutoffs": [WORDS], "output_cutoffs": [WORDS], "final_norm": False},
    "plain": {"input_cutoffs": None, "output_cutoffs": None},
    "plain, untied": {
        "input_cutoffs": None,
        "output_cutoffs": None,
        "tie_word_embeddings": False,
        "scale_embeddings": False,
        "hidden_act": "gelu",
    },
    "bands only behind": {"input_cutoffs": None, "tie_word_embeddings": False},
}


def settings_and_tensors(**changes):
    return export_model(tiny_model("adaptive_lm", **changes))  # type: ignore[arg-type]


@torch.no_grad()
def same(one, other):
    tokens = tiny_tokens(2, 9)
    torch.testing.assert_close(one(tokens).logits, other(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_goes_there_and_back(shape):
    model = tiny_model("adaptive_lm", **SHAPES[shape])
    settings, tensors = export_model(model)  # type: ignore[arg-type]
    again, report = convert(settings, tensors)
    same(model, again)
    assert again.config.to_dict() == {**model.config.to_dict(), **_without_path(again)}
    assert {*report.renamed, *report.tied, *report.ignored} == set(tensors)
    second_settings, second_tensors = export_model(again)
    assert second_settings == settings
    assert all(torch.equal(tensors[name], second_tensors[name]) for name in tensors)


def _without_path(model):
    # what fairseq fixes and a configuration of ours may say otherwise
    names = ("tie_projections", "input_factor", "output_factor", "architectures", "dtype")
    return {name: value for name, value in model.config.to_dict().items() if name in names}


def test_tied_tensors_are_one():
    settings, tensors = settings_and_tensors()
    model, report = convert(settings, tensors)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert head.tables[1].weight is embedding.tables[1].weight
    assert head.projections[0].weight is embedding.projections[1].weight
    assert len(report.tied) == 5


def test_names_of_old_versions():
    model = tiny_model("adaptive_lm", final_norm=False)
    settings, tensors = export_model(model)  # type: ignore[arg-type]
    old = dict(tensors)
    for layer in range(2):
        stem = f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            fused = [old.pop(f"{stem}self_attn.{part}_proj.{kind}") for part in "qkv"]
            old[f"{stem}self_attn.in_proj_{kind}"] = torch.cat(fused)
            old[f"{stem}layer_norms.0.{kind}"] = old.pop(f"{stem}self_attn_layer_norm.{kind}")
            old[f"{stem}layer_norms.2.{kind}"] = old.pop(f"{stem}final_layer_norm.{kind}")
    # versions up to 2 kept a norm that they did not use
    old["decoder.version"] = torch.tensor([2.0])
    old["decoder.layer_norm.weight"] = old["decoder.layer_norm.bias"] = torch.ones(16)
    settings["no_tie_adaptive_proj"] = False
    del settings["tie_adaptive_proj"]
    again, report = convert(settings, old)
    same(model, again)
    assert "decoder.layer_norm.weight" in report.ignored


def test_the_name_of_new_versions():
    settings, tensors = settings_and_tensors(**SHAPES["plain, untied"])
    new = {name.replace("embed_out", "output_projection.weight"): t for name, t in tensors.items()}
    assert set(new) != set(tensors)
    convert(settings, new)
    settings, tensors = settings_and_tensors(**SHAPES["plain"])
    tied = {"decoder.output_projection.weight": tensors["decoder.embed_tokens.weight"]}
    assert convert(settings, tensors | tied)[1].tied == list(tied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_learned_pos": True}, "decoder_learned_pos must be False .* got True"),
        ({"decoder_normalize_before": False}, "decoder_normalize_before must be True"),
        ({"decoder_layers": None}, r"must say \['decoder_layers'\]"),
        ({"decoder_input_dim": 8}, r"decoder_input_dim must be decoder_embed_dim \(16\)"),
        ({"activation_fn": "tanh"}, "activation_fn must be one of"),
        ({"decoder_layers": 1}, "16 are left over .*decoder.layers.1"),
        ({"decoder_layers": 3}, "are missing .*model.layers.2"),
        ({"decoder_ffn_embed_dim": 25}, r"fc1.weight must have shape \(25, 16\)"),
        ({"adaptive_input_cutoff": "30,50"}, "tied word embeddings need the same bands"),
        ({"adaptive_softmax_cutoff": "20,70", "adaptive_input_cutoff": "20,70"}, "must rise"),
    ],
)
def test_settings_that_do_not_belong(change, message):
    settings, tensors = settings_and_tensors()
    with pytest.raises(InputError, match=message):
        convert({**settings, **change}, tensors)


def test_copies_that_are_not_equal():
    settings, tensors = settings_and_tensors()
    name = "decoder.adaptive_softmax.tail.0.2.weight"
    with pytest.raises(InputError, match="must equal the tensor that the settings tie it to"):
        convert(settings, {**tensors, name: tensors[name] + 1})


def test_what_is_no_decoder():
    settings, _ = settings_and_tensors()
    with pytest.raises(InputError, match="is it a decoder"):
        convert(settings, {"encoder.embed_tokens.weight": torch.zeros(4, 4)})


@pytest.fixture
def checkpoint(tmp_path):
    settings, tensors = settings_and_tensors()
    path = tmp_path / "checkpoint_best.pt"
    torch.save({"args": argparse.Namespace(**settings), "model": tensors}, path)
    words = "".join(f"w{number} {90 - number}\n" for number in range(WORDS - 4))
    (tmp_path / "dict.txt").write_text(words)
    return path


def test_the_verb_makes_a_folder_that_loads(checkpoint, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["import", str(checkpoint), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["out"] == str(out)
    assert "model.layers.0.fc1.weight" in said["renamed"].values()
    model = AutoModelForCausalLM.from_pretrained(out)
    same(tiny_model("adaptive_lm"), model)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w0 w5", add_special_tokens=False)["input_ids"] == [4, 9]
    assert main(["import", str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "must be a checkpoint (.pt) or raw keys" in capsys.readouterr().err


def test_a_dictionary_of_another_vocabulary(checkpoint, tmp_path):
    (tmp_path / "dict.txt").write_text("one 1\n")
    with pytest.raises(InputError, match="must have the model's 61 words, got 5"):
        import_model(checkpoint, tmp_path / "model")
