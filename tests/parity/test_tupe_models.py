"""TUPE encoders, heads, losses and initialisation against the authors' code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from memlm.core.errors import InputError
from memlm.importers.tupe import read_state
from memlm.models.tupe.config import TupeConfig, with_labels
from memlm.models.tupe.heads import TupeForMaskedLM, TupeForSequenceClassification

IMPLEMENTATIONS = ("eager", "sdpa")


def read(folder, **options):
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("encoder_attention_heads", config.get("heads"))
    config.setdefault("activation_fn", config.get("activation", "gelu"))
    return read_state(load_file(folder / "weights.safetensors"), config, **options)


def by_original_name(imported, model):
    """The gradient of every tensor under the name it has in the checkpoint."""
    parameters = dict(model.named_parameters())
    found = {}
    for source, target in imported.report:
        if target.startswith("tied"):
            continue
        if "{query,key,value}" in target:
            parts = [target.replace("{query,key,value}", p) for p in ("query", "key", "value")]
            grads = [parameters[part].grad for part in parts]
            found[source] = None if grads[0] is None else torch.cat(grads)
        elif target in parameters:
            found[source] = parameters[target].grad
    return found


def check_gradients(folder, imported, model):
    found = by_original_name(imported, model)
    for name, expected in load_file(folder / "grads.safetensors").items():
        grad = found.get(name, found.get(f"decoder.{name}"))
        if name.endswith("embed_positions.weight"):
            expected = expected[2:]
        torch.testing.assert_close(
            grad, expected, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_encoder(golden_tupe_encoder, implementation):
    check_forward(golden_tupe_encoder, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_baseline(golden_tupe_baseline_bert, implementation):
    model, imported, io = check_forward(golden_tupe_baseline_bert, implementation)
    labels = io["target"].masked_fill(io["target"] == 1, -100)
    output = model.train()(io["src_tokens_masked"], labels=labels, num_items_in_batch=1)
    torch.testing.assert_close(output.loss, io["loss_sum"].reshape(()), rtol=1e-5, atol=1e-5)
    output.loss.backward()
    check_gradients(golden_tupe_baseline_bert, imported, model)


def check_forward(folder, implementation):
    io = load_file(folder / "io.safetensors")
    imported = read(folder)
    # dropout is off, as in the recorded forward pass
    imported.config.hidden_dropout_prob = imported.config.attention_probs_dropout_prob = 0.0
    model = imported.masked_lm()
    model.set_attn_implementation(implementation)
    tokens = io["tokens"]
    real = tokens != 1
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    output = model(tokens, output_hidden_states=True, output_attentions=implementation == "eager")
    torch.testing.assert_close(output.logits[real], io["mlm_logits"][real], **tolerance)
    states = output.hidden_states
    torch.testing.assert_close(states[-1][real], io["features"][real], **tolerance)
    for number, state in enumerate(states):
        if model.config.norm_first and number == len(states) - 1:
            continue
        expected = io[f"inner_state_{number}_TBC"].transpose(0, 1)
        torch.testing.assert_close(state[real], expected[real], **tolerance)
    for number, weights in enumerate(output.attentions or ()):
        if f"attn_probs_layer{number}" in io:
            expected = io[f"attn_probs_layer{number}"].transpose(1, 2)
            found = weights.transpose(1, 2)
            torch.testing.assert_close(found[real], expected[real], **tolerance)
    return model, imported, io


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_lm_loss(golden_tupe_mlm_loss, implementation):
    folder = golden_tupe_mlm_loss
    io = load_file(folder / "io.safetensors")
    result = json.loads((folder / "result.json").read_text())
    imported = read(folder)
    model = imported.masked_lm().train()
    model.set_attn_implementation(implementation)
    labels = io["target"].masked_fill(io["target"] == 1, -100)
    output = model(io["src_tokens"], labels=labels, num_items_in_batch=1)
    assert output.loss.item() == pytest.approx(result["loss_sum_nats"], rel=1e-5)
    torch.testing.assert_close(output.logits, io["logits_masked"], atol=1e-4, rtol=1e-4)
    output.loss.backward()
    check_gradients(folder, imported, model)
    if imported.config.scheme.startswith("tupe"):  # theta_1 changes nothing
        rows = model.tupe.position_bias.positions.weight.grad
        assert rows[0].abs().max() < 1e-5 * rows[1].abs().max().clamp(min=1)
    mean = model.eval()(io["src_tokens"], labels=labels).loss.item()
    assert mean == pytest.approx(result["loss_sum_nats"] / result["sample_size"], rel=1e-5)


def test_sentence(golden_tupe_sentence):
    folder = golden_tupe_sentence
    io = load_file(folder / "io.safetensors")
    result = json.loads((folder / "result.json").read_text())
    imported = read(folder)
    model = imported.classifier().train()
    output = model(io["tokens"], labels=io["target"], num_items_in_batch=1)
    torch.testing.assert_close(output.logits, io["logits"], atol=1e-4, rtol=1e-4)
    assert output.loss.item() == pytest.approx(result["loss_sum"], rel=1e-5)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    grads = by_original_name(imported, model)
    for name, expected in load_file(folder / "grads.safetensors").items():
        if name.startswith("classification_heads"):
            head = name.split(".", 2)[2]
            grad = parameters[f"classifier.{head}"].grad
        else:
            grad = grads[name]
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-3)


def test_initialisation(golden_tupe_init_stats):
    recorded = json.loads((golden_tupe_init_stats / "init.json").read_text())
    expected = recorded["params"]
    shapes = {name: tuple(value["shape"]) for name, value in expected.items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    imported = read_state(state, heads=state_heads(state))
    torch.manual_seed(1)
    language_model = TupeForMaskedLM(imported.config)
    head = next(
        value
        for name, value in state.items()
        if name.endswith("out_proj.weight") and name.startswith("classification_heads")
    )
    config = with_labels(imported.config, len(head))
    found = dict(language_model.named_parameters())
    found |= {
        name: value
        for name, value in TupeForSequenceClassification(config).named_parameters()
        if name.startswith("classifier")
    }
    assert sum(v.numel() for v in found.values()) == recorded["num_params"]
    for source, target in imported.report:
        if source not in expected or target.startswith("tied"):
            continue
        stats, name = expected[source], target.replace("{query,key,value}", "query")
        value = found[name].detach()
        if 1 < value.numel() < 32 and stats["std"] > 0:
            continue  # too few to say anything
        spread = value.std().item() if value.numel() > 1 else 0.0
        chance = 5 / value.numel() ** 0.5  # two samples, five standard errors
        assert spread == pytest.approx(stats["std"], rel=max(0.05, chance), abs=1e-3), name
        assert value.mean().item() == pytest.approx(
            stats["mean"], abs=8 * stats["std"] / value.numel() ** 0.5 + 1e-3
        ), name
        if stats["std"] == 0:
            assert value.min() == value.max() == stats["min"]
    assert (found["tupe.embeddings.word_embeddings.weight"][1] == 0).all()
    bound = config.hidden_size**-0.5
    assert 0.9 * bound < found["classifier.dense.weight"].abs().max() <= bound


def state_heads(state):
    """The bucket table's width; without one any number has the same weights."""
    tables = [v for n, v in state.items() if n.endswith("relative_attention_bias.weight")]
    return tables[0].shape[1] if tables else 1


def test_edges(golden_tupe_edge_behaviour):
    """What the authors' code crashes on, or silently accepts, is a clear error here."""
    cases = {
        case["case"] for case in json.loads((golden_tupe_edge_behaviour / "edges.json").read_text())
    }
    assert any("left padding" in case for case in cases)
    shape = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    }
    for scheme in ("tupe-a", "tupe-r", "bert-a"):
        model = TupeForMaskedLM(TupeConfig.preset("tiny", scheme, **shape)).eval()
        with pytest.raises(InputError, match="sequence length 17 exceeds max_positions 16"):
            model(torch.full((1, 17), 5))
        with pytest.raises(InputError, match="sample 1 has no non-pad token"):
            model(torch.tensor([[0, 5, 2], [1, 1, 1]]))
        with pytest.raises(InputError, match="left padding detected"):
            model(torch.tensor([[1, 0, 5, 2]]))
        with pytest.raises(InputError, match=r"token ids must be in \[0, 48\), got 48"):
            model(torch.tensor([[0, 48]]))
    with pytest.raises(InputError, match="hidden_size must be divisible"):
        TupeConfig.preset("tiny", hidden_size=30)
    loss = model.train()(torch.tensor([[0, 5, 2]]), labels=torch.full((1, 3), -100)).loss
    assert loss.item() == 0.0
    loss.backward()
    regression = TupeForSequenceClassification(TupeConfig.preset("tiny", num_labels=1, **shape))
    assert regression(torch.tensor([[0, 5, 2]]), labels=torch.tensor([0.5])).loss.ndim == 0


def test_another_variant_is_an_error(golden_tupe_encoder):
    found = read(golden_tupe_encoder).config.scheme
    other = "tupe-a" if found == "tupe-r" else "tupe-r"
    with pytest.raises(InputError, match=f"must be of scheme '{other}' but is of '{found}'"):
        read(golden_tupe_encoder, scheme=other)
