"""The decoder in transformers: padding, cache, loss, saving, memories, initial values."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import memlm
from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.adaptive.config import AdaptiveConfig
from memlm.models.adaptive.decoder import AdaptiveForCausalLM, AdaptiveModel, sinusoids
from memlm.models.taps import find_tap, forward_to_tap
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

SHAPES = {
    "bands": {},
    "bands apart": {"tie_word_embeddings": False},
    "projections apart": {"tie_projections": False},
    "one band": {"input_cutoffs": [61], "output_cutoffs": [61]},
    "plain": {"input_cutoffs": None, "output_cutoffs": None},
    "plain, untied": {
        "input_cutoffs": None,
        "output_cutoffs": None,
        "tie_word_embeddings": False,
    },
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=SHAPES)
def model(request):
    return tiny_model("adaptive_lm", **SHAPES[request.param])


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model):
    tokens = tiny_tokens(2, 9)
    alone = model(tokens[1:, :6]).logits
    for left in (True, False):
        padded, mask = tokens.clone(), torch.ones_like(tokens)
        place = slice(3, None) if left else slice(0, 6)
        empty = slice(0, 3) if left else slice(6, None)
        padded[1, place], padded[1, empty], mask[1, empty] = tokens[1, :6], 1, 0
        got = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(got[1, place], alone[0], **CLOSE)
        torch.testing.assert_close(got[0], model(tokens[:1]).logits[0], **CLOSE)


@torch.no_grad()
def test_reading_in_pieces_with_a_cache(model):
    tokens = tiny_tokens(2, 9)
    cache, pieces = DynamicCache(config=model.config), []
    for piece in tokens.split([4, 1, 3, 1], dim=1):
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_padded_rows_is_that_of_each_alone(model, beams):
    tokens = tiny_tokens(2, 6)
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "min_new_tokens": 5}
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, :2], mask[1, :2], padded[1, 2:] = 1, 0, tokens[1, :4]
    got = model.generate(padded, attention_mask=mask, **settings)
    for row, prompt in enumerate((tokens[:1], tokens[1:, :4])):
        everything = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=everything, **settings)
        assert got[row, -5:].tolist() == alone[0, -5:].tolist()


def test_the_loss_is_that_of_the_logits(model):
    tokens = tiny_tokens(2, 9)
    labels = tokens.masked_fill(torch.arange(9) == 4, -100)
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    count = (labels[:, 1:] != -100).sum()
    summed = model(tokens, labels=labels, num_items_in_batch=1).loss
    torch.testing.assert_close(summed, expected * count, atol=1e-4, rtol=1e-5)
    model.train()
    assert model(tokens, labels=labels).logits is None


def test_attention_implementations_agree(model):
    tokens, mask = tiny_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        output = model(tokens, attention_mask=mask, output_attentions=True)
    real = mask.bool()
    torch.testing.assert_close(output.logits[real], expected[real], **CLOSE)
    assert [weights.shape for weights in output.attentions] == [(2, 4, 9, 9)] * 2


def test_gradient_checkpointing_changes_no_gradient(model):
    tokens = tiny_tokens(2, 9)
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = part.activation_dropout = 0.0
    model.config.dropout = model.config.attention_dropout = 0.0
    gradients = []
    for wanted in (False, True):
        model.train()
        if wanted:
            old = "gradient_checkpointing_enable"  # deprecated in the newest versions
            new = "activation_checkpointing_enable"
            getattr(model, new if hasattr(model, new) else old)()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@torch.no_grad()
def test_saved_and_loaded_with_its_ties(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is AdaptiveForCausalLM
    tokens = tiny_tokens(2, 9)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    count = sum(part.numel() for part in model.parameters())
    assert sum(part.numel() for part in again.parameters()) == count
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is AdaptiveModel
    assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()


def test_initial_values_are_those_of_fairseq():
    torch.manual_seed(0)
    config = AdaptiveConfig.preset(
        "wiki103",
        vocab_size=3000,
        input_cutoffs=[1000, 2000],
        output_cutoffs=[1000, 2000],
        hidden_size=64,
        num_hidden_layers=1,
        intermediate_size=256,
    )
    model = AdaptiveForCausalLM(config)
    for table in model.model.embed_tokens.tables:
        weight = table.weight.detach()
        assert weight[1].abs().max() == 0
        assert float(weight.std()) == pytest.approx(table.embedding_dim**-0.5, rel=0.05)
    layer = model.model.layers[0]
    bound = (6 / 128) ** 0.5
    query = layer.self_attn.q_proj.weight.detach()
    out = layer.self_attn.out_proj.weight.detach()
    assert float(query.abs().max()) == pytest.approx(bound / 2**0.5, rel=0.01)
    assert float(out.abs().max()) == pytest.approx(bound, rel=0.01)
    assert layer.fc1.bias.abs().max() == layer.self_attn.out_proj.bias.abs().max() == 0
    assert layer.self_attn.q_proj.bias.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("wiki103", 247),
        ("wiki103_150m", 149),
        ("enwik8", 38),
        ("wiki103_small", 48),
        ("wiki103_tiny", 7),
    ],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = AdaptiveForCausalLM(AdaptiveConfig.preset(name))
    assert round(sum(part.numel() for part in model.parameters()) / 1e6) == millions


def test_sinusoids_of_an_odd_width():
    rows = sinusoids(torch.arange(3), 9)
    assert rows.shape == (3, 9)
    assert rows[:, 8].abs().max() == 0
    assert float(rows[0, 0]) == pytest.approx(float(torch.tensor(2.0).sin()))


def test_a_memory_attached(model, tmp_path):
    tokens = tiny_tokens(2, 9)
    with torch.no_grad():
        keys = forward_to_tap(model, find_tap(model, "auto"), tokens)
    assert find_tap(model, "auto").name == "ffn_input"
    store = save_arrays(tmp_path / "store", keys.flatten(0, 1), tokens.roll(-1, 1).flatten())
    lm = memlm.attach(model, memlm.KnnMemory(store, k=2), merge=memlm.Mixture(lam=0.9))
    with torch.no_grad():
        said = lm(tokens).logits.argmax(-1)
    assert torch.equal(said[:, :-1], tokens[:, 1:])


def test_a_banded_vocabulary_keeps_its_size():
    with pytest.raises(UnsupportedModelError, match="one plain table of words"):
        tiny_model("adaptive_lm").resize_token_embeddings(70)
    plain = tiny_model("adaptive_lm", **SHAPES["plain"])
    plain.resize_token_embeddings(70, mean_resizing=False)
    assert plain(tiny_tokens(1, 4)).logits.shape[-1] == 70


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"hidden_size": 2, "num_attention_heads": 1}, "hidden_size of at least 4"),
        ({"output_cutoffs": [20]}, "tied word embeddings need the same bands"),
        ({"output_cutoffs": None}, "need bands on both sides or on none"),
    ],
)
def test_shapes_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        tiny_model("adaptive_lm", **settings)


def test_unknown_presets_and_inputs():
    with pytest.raises(InputError, match="preset must be one of wiki103"):
        AdaptiveConfig.preset("wiki104")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model("adaptive_lm")()
