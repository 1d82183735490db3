"""TUPE models as Hugging Face models."""

import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import (
    TupeForCausalLM,
    TupeForMaskedLM,
    TupeForSequenceClassification,
    TupeForTokenClassification,
)
from memlm.models.tupe.retrofit import untie_positions
from memlm.positions.scheme import SCHEMES

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
TOKENS = torch.tensor([[0, 9, 8, 7, 30, 2], [0, 12, 13, 2, 1, 1]])


def config_of(scheme="tupe-r", **changes):
    torch.manual_seed(0)
    return TupeConfig.preset("tiny", scheme, **{**SHAPE, **changes})


def make(kind, scheme="tupe-r", **changes):
    model = kind(config_of(scheme, **changes)).eval()
    with torch.no_grad():  # large enough that every term shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (TupeForMaskedLM, AutoModelForMaskedLM),
        (TupeForCausalLM, AutoModelForCausalLM),
        (TupeForSequenceClassification, AutoModelForSequenceClassification),
        (TupeForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_saved_and_loaded(kind, auto, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        body = AutoModel.from_pretrained(tmp_path).eval()
        assert body.causal == (kind is TupeForCausalLM)
        wanted = model.tupe(TOKENS).last_hidden_state
        assert torch.equal(body(TOKENS).last_hidden_state, wanted)


def test_a_decoder_and_an_encoder_share_a_configuration():
    config = config_of()
    decoder, encoder = TupeForCausalLM(config), TupeForTokenClassification(config)
    assert (decoder.tupe.causal, encoder.tupe.causal, config.is_decoder) == (True, False, False)
    assert not TupeForMaskedLM(decoder.config).tupe.causal


@pytest.mark.parametrize(
    ("size", "scheme", "parameters"),
    [("base", "tupe-a", 112_424_193), ("large", "tupe-a", 339_577_857)],
)
def test_published_sizes(size, scheme, parameters):
    with torch.device("meta"):
        model = TupeForMaskedLM(TupeConfig.preset(size, scheme))
        assert model.num_parameters() == parameters
        relative = TupeForMaskedLM(TupeConfig.preset(size, "tupe-r"))
        heads = model.config.num_attention_heads
        assert relative.num_parameters() == parameters + 33 * heads


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_prefix_is_read_both_ways_and_the_rest_to_the_left(scheme):
    model = make(TupeForMaskedLM, scheme)
    place = torch.arange(6)
    visible = ((place[None] <= place[:, None]) | (place < 3))[None, None]
    changed = TOKENS[:1].clone()
    changed[0, 4] = 11
    with torch.no_grad():
        before, after = (model(one, visible=visible).logits[0] for one in (TOKENS[:1], changed))
        torch.testing.assert_close(before[:4], after[:4])  # no look ahead
        assert not torch.allclose(before[4:], after[4:])
        changed[0, 4], changed[0, 2] = TOKENS[0, 4], 11
        within = model(changed, visible=visible).logits[0]
        assert not torch.allclose(before[1], within[1])  # inside the prefix, ahead too
        model.set_attn_implementation("eager")
        torch.testing.assert_close(
            model(TOKENS[:1], visible=visible).logits[0], before, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_schemes(scheme):
    model = make(TupeForMaskedLM, scheme)
    with torch.no_grad():
        logits = model(TOKENS).logits
        wider = torch.nn.functional.pad(TOKENS, (0, 3), value=1)
        real = TOKENS != 1
        torch.testing.assert_close(
            model(wider).logits[:, :6][real], logits[real], atol=1e-5, rtol=1e-4
        )
        moved = model(TOKENS[:, [0, 2, 1, 3, 4, 5]]).logits[:, [0, 2, 1, 3, 4, 5]]
        assert not torch.allclose(moved[real], logits[real], atol=1e-3)  # order matters
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(TOKENS).logits[real], logits[real], atol=1e-5, rtol=1e-4)


HEADS = (
    TupeForMaskedLM,
    TupeForCausalLM,
    TupeForSequenceClassification,
    TupeForTokenClassification,
)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_initial_values(kind, scheme):
    """Weights N(0, 0.02), biases 0, norms 1, the padding row 0; a class's head as torch has it."""
    model = kind(config_of(scheme, norm_first=True, num_labels=3))
    for name, weight in model.named_parameters():
        weight = weight.detach()
        if name.startswith("classifier"):
            bound = SHAPE["hidden_size"] ** -0.5
            assert weight.abs().max() <= bound, name
            if weight.numel() >= SHAPE["hidden_size"]:
                assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.3), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            if "word_embeddings" in name:
                assert not weight[1].any()
                weight = weight[2:]
            spread = 4 * 0.02 / weight.numel() ** 0.5
            assert weight.mean().item() == pytest.approx(0, abs=spread), name
            assert weight.std().item() == pytest.approx(0.02, abs=spread), name


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_packing_is_reading_apart(scheme):
    model = make(TupeForMaskedLM, scheme)
    packed = torch.cat([TOKENS[0], TOKENS[1, :4]])[None]
    documents = torch.tensor([[0] * 6 + [1] * 4])
    with torch.no_grad():
        together = model(packed, document_ids=documents).logits[0]
        torch.testing.assert_close(together[:6], model(TOKENS[:1]).logits[0], atol=1e-5, rtol=1e-4)
        alone = model(TOKENS[1:, :4]).logits[0]
    torch.testing.assert_close(together[6:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_decoder_with_cache_and_left_padding(scheme):
    model = make(TupeForCausalLM, scheme)
    prompts = torch.tensor([[1, 1, 9, 8, 7], [5, 6, 9, 8, 7]])
    mask = (prompts != 1).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(prompts, attention_mask=mask, **options)
        plain = model.generate(prompts, attention_mask=mask, use_cache=False, **options)
        alone = model.generate(prompts[:1, 2:], attention_mask=mask[:1, 2:], **options)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[0, 2:], alone[0])
    with torch.no_grad():
        beams = model.generate(prompts, attention_mask=mask, num_beams=3, **options)
    assert beams.shape == cached.shape
    with torch.no_grad():
        changed = model(torch.tensor([[5, 6, 9, 30]])).logits[:, :3]
        torch.testing.assert_close(changed, model(prompts[1:, :4]).logits[:, :3])  # no look ahead


def test_positions_of_all_tokens_are_asked_for():
    model = make(TupeForCausalLM)
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6]])).past_key_values
        with pytest.raises(InputError, match="position_ids must be of all tokens"):
            model(torch.tensor([[7]]), past_key_values=cache, position_ids=torch.tensor([[9]]))


@pytest.mark.parametrize("kind", [TupeForMaskedLM, TupeForCausalLM])
def test_tied_head_survives_resizing(kind, tmp_path):
    model = make(kind)
    model.resize_token_embeddings(48, mean_resizing=False)
    assert model.lm_head.decoder.weight is model.tupe.embeddings.word_embeddings.weight
    assert model(TOKENS).logits.shape[-1] == 48
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.lm_head.decoder.weight is loaded.tupe.embeddings.word_embeddings.weight


def test_gradient_accumulation_is_one_large_batch():
    labels = TOKENS.masked_fill(TOKENS < 9, -100)
    grads = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model = make(TupeForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.train()
        items = (labels != -100).sum()
        for part in parts:
            model(TOKENS[part], labels=labels[part], num_items_in_batch=items).loss.backward()
        grads.append(model.tupe.layers[0].expand.weight.grad)
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = make(TupeForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer versions have another name for it
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append(model.tupe.position_bias.query.weight.grad)
    torch.testing.assert_close(*grads)


def test_longer_than_trained():
    model = make(TupeForMaskedLM, position_extension="interpolate")
    assert model(torch.randint(5, 40, (1, 30))).logits.shape == (1, 30, 40)
    for scheme in ("bert-a", "tupe-a"):
        clipped = make(TupeForMaskedLM, scheme, position_extension="clip")
        assert clipped(torch.randint(5, 40, (1, 30))).logits.shape == (1, 30, 40)


def test_token_labels():
    model = make(TupeForTokenClassification, num_labels=3)
    labels = torch.tensor([[-100, 0, 1, 2, 0, -100], [-100, 1, 1, -100, -100, -100]])
    output = model(TOKENS, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, wanted)


def old_model(kind):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "pad_token_id": 1,
    }  # fmt: skip
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**shape, max_position_embeddings=24))
    else:
        model = RobertaForMaskedLM(RobertaConfig(**shape, max_position_embeddings=26))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_retrofit(kind):
    old = old_model(kind)
    mask = (TOKENS != 1).long()
    with torch.no_grad():
        wanted = old(TOKENS, attention_mask=mask).logits.log_softmax(-1)
        same = untie_positions(old, "bert-a")(TOKENS).logits.log_softmax(-1)
        torch.testing.assert_close(same[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
        for scheme in ("tupe-a", "tupe-r", "bert-a-d", "tupe-a-tie-cls"):
            untied = untie_positions(old, scheme)
            assert torch.isfinite(untied(TOKENS).logits).all()
            rows = untied.tupe.position_bias.positions.weight
            assert len(rows) == untied.config.max_position_embeddings + 1


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: TupeConfig.preset("huge"), "size must be one of"),
        (lambda: config_of("rope"), "scheme must be one of"),
        (lambda: config_of(head_init="zero"), "head_init must be"),
        (lambda: make(TupeForMaskedLM)(), "exactly one of input_ids"),
        (lambda: make(TupeForMaskedLM)(torch.zeros(1, 0, dtype=int)), "must hold tokens"),
        (
            lambda: make(TupeForSequenceClassification)(TOKENS, labels=torch.tensor([0, 2])),
            r"labels must be class numbers in \[0, 2\), got 2",
        ),
        (
            lambda: make(TupeForSequenceClassification, num_labels=1)(
                TOKENS, labels=torch.tensor([0, 2])
            ),
            "labels of a regression must be floating-point",
        ),
    ],
)
def test_bad_inputs(make_it, message):
    with pytest.raises(InputError, match=message):
        make_it()


def test_retrofit_refuses_other_models():
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM or RobertaForMaskedLM"):
        untie_positions(make(TupeForMaskedLM))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["bert-r", "tupe-a", "tupe-r"])
def test_on_a_gpu_it_is_as_on_the_cpu(scheme, dtype, implementation):
    model = make(TupeForMaskedLM, scheme)
    with torch.no_grad():
        wanted = model(TOKENS).logits[TOKENS != 1]
        model = model.to("cuda", dtype)
        model.set_attn_implementation(implementation)
        found = model(TOKENS.cuda()).logits.float().cpu()[TOKENS != 1]
    bound = 1e-3 if dtype == torch.float32 else 2e-2
    assert (found - wanted).abs().mean() < bound * max(1.0, float(wanted.abs().mean()))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_it_learns_in_bfloat16_on_a_gpu(implementation):
    model = make(TupeForMaskedLM, "tupe-r").cuda().train()
    model.set_attn_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = TOKENS.cuda(), []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=tokens.masked_fill(tokens == 1, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
