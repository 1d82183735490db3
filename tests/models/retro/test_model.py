"""Laws of RETRO models: what may depend on what."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from memlm.core.errors import InputError
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.encoder import distinct_neighbours
from memlm.models.retro.layers import Residual

from .small import CHUNK, POST_NORM, SHAPE, VOCABULARY, made_up, small_model

EXACT = {"atol": 1e-10, "rtol": 1e-10}
KINDS = [{}, POST_NORM, {"norm": "gated_rms"}, {"encoder_cross_attention_layers": ()}]


def logits(model, tokens, neighbours=None, mask=None, **arguments):
    with torch.no_grad():
        return model(tokens, neighbours=neighbours, neighbour_mask=mask, **arguments).logits


@pytest.mark.parametrize("changes", KINDS)
def test_a_token_changes_nothing_before_it(changes):
    model = small_model(**changes)
    tokens, neighbours, mask = made_up(2, 14)
    before = logits(model, tokens, neighbours, mask)
    for place in range(14):
        other = tokens.clone()
        other[:, place] = other[:, place] % (VOCABULARY - 1) + 1
        after = logits(model, other, neighbours, mask)
        torch.testing.assert_close(after[:, :place], before[:, :place], **EXACT)
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("changes", KINDS)
def test_neighbours_of_a_chunk_act_from_its_last_token_on(changes):
    model = small_model(**changes)
    tokens, neighbours, mask = made_up(1, 15)
    before = logits(model, tokens, neighbours, mask)
    for chunk in range(3):
        other = neighbours.clone()
        other[:, chunk] = other[:, chunk] % (VOCABULARY - 1) + 1
        after = logits(model, tokens, other, mask)
        first = (chunk + 1) * CHUNK - 1
        torch.testing.assert_close(after[:, :first], before[:, :first], **EXACT)
        assert not torch.allclose(after[:, first], before[:, first])


def test_the_order_of_neighbours_does_not_matter():
    model = small_model()
    tokens, neighbours, mask = made_up(2, 12, k=3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        logits(model, tokens, neighbours[:, :, order], mask[:, :, order]),
        logits(model, tokens, neighbours, mask),
        **EXACT,
    )


@pytest.mark.parametrize("changes", KINDS)
def test_padding_of_neighbours_means_nothing(changes):
    model = small_model(**changes)
    tokens, neighbours, mask = made_up(2, 12)
    mask[:, 1] = False
    expected = logits(model, tokens, neighbours, mask)
    longer = torch.nn.functional.pad(neighbours, (0, 3), value=7)
    found = logits(model, tokens, longer, torch.nn.functional.pad(mask, (0, 3)))
    torch.testing.assert_close(found, expected, **EXACT)
    other = neighbours.where(mask, 9)
    torch.testing.assert_close(logits(model, tokens, other, mask), expected, **EXACT)
    zeroed = neighbours.masked_fill(~mask, 0)  # the padding token
    torch.testing.assert_close(logits(model, tokens, zeroed), expected, **EXACT)


@pytest.mark.parametrize("changes", KINDS)
def test_rows_do_not_depend_on_each_other(changes):
    model = small_model(**changes)
    tokens, neighbours, mask = made_up(2, 12)
    neighbours[1], mask[1] = neighbours[0], mask[0]  # read once for both rows
    alone = [
        logits(model, tokens[row, None], neighbours[row, None], mask[row, None]) for row in (0, 1)
    ]
    torch.testing.assert_close(logits(model, tokens, neighbours, mask), torch.cat(alone), **EXACT)


@pytest.mark.parametrize("conditioned", [True, False])
def test_distinct_neighbours_give_every_neighbour_back(conditioned):
    _, neighbours, visible = (part[0] for part in made_up(1, 20, k=3))
    neighbours[1:3], visible[1:3] = neighbours[0], visible[0]
    neighbours[4, 1], visible[4, 1] = neighbours[4, 0], visible[4, 0]
    visible[3, 2] = False
    found = distinct_neighbours(neighbours, visible, conditioned=conditioned)
    some = visible.any(-1)
    pair = found.pick[some]
    text = found.text[pair]
    assert torch.equal(found.visible[text], visible[some])
    assert torch.equal(found.tokens[text], neighbours.where(visible, 0)[some])
    # 15 neighbours: one empty, six copies of others in other chunks, one within its chunk
    assert len(found.tokens) == 7
    assert len(found.text) == (13 if conditioned else 7)
    if conditioned:
        assert torch.equal(found.chunk[pair], some.nonzero()[:, 0])


@pytest.mark.parametrize("changes", [{}, POST_NORM])
def test_without_retrieval(changes):
    model = small_model(**changes)
    tokens, neighbours, mask = made_up(2, 12)
    off = logits(model, tokens)
    on = logits(model, tokens, neighbours, mask)
    torch.testing.assert_close(on[:, : CHUNK - 1], off[:, : CHUNK - 1], **EXACT)
    assert not torch.allclose(on[:, CHUNK - 1], off[:, CHUNK - 1])
    short = tokens[:, : CHUNK - 1]
    torch.testing.assert_close(
        logits(model, short, neighbours[:, :0]), logits(model, short), **EXACT
    )


@pytest.mark.parametrize("time", [3, 4, 5, 8, 11])
def test_a_prefix_is_a_text(time):
    model = small_model()
    tokens, neighbours, mask = made_up(2, 14)
    whole = logits(model, tokens, neighbours, mask)
    part = time // CHUNK
    found = logits(model, tokens[:, :time], neighbours[:, :part], mask[:, :part])
    torch.testing.assert_close(found, whole[:, :time], **EXACT)


def test_one_neighbour_needs_no_dimension_of_its_own():
    model = small_model()
    tokens, neighbours, mask = made_up(2, 9, k=1)
    torch.testing.assert_close(
        logits(model, tokens, neighbours[:, :, 0], mask[:, :, 0]),
        logits(model, tokens, neighbours, mask),
        **EXACT,
    )


def test_positions_of_the_package_differ_from_the_end_of_the_first_chunk_on():
    tokens, neighbours, mask = made_up(2, 12)
    paper, package = (
        logits(small_model(compatibility=name), tokens, neighbours, mask)
        for name in ("none", "retro_pytorch")
    )
    torch.testing.assert_close(paper[:, : CHUNK - 1], package[:, : CHUNK - 1], **EXACT)
    assert not torch.allclose(paper[:, CHUNK - 1], package[:, CHUNK - 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_rows_means_nothing(side):
    model = small_model(learned_positions=True, max_position_embeddings=20)
    tokens, neighbours, mask = made_up(2, 14)
    alone = logits(model, tokens[1:, :9], neighbours[1:, :2], mask[1:, :2])
    padded, real = tokens.clone(), torch.ones_like(tokens)
    place = slice(5, 14) if side == "left" else slice(0, 9)
    padded[1] = 0
    padded[1, place] = tokens[1, :9]
    real[1] = 0
    real[1, place] = 1
    found = logits(model, padded, neighbours, mask, attention_mask=real)
    torch.testing.assert_close(found[1:, place], alone, **EXACT)
    torch.testing.assert_close(
        found[:1], logits(model, tokens[:1], neighbours[:1], mask[:1]), **EXACT
    )


@pytest.mark.parametrize("changes", [{}, POST_NORM])
def test_packed_documents_are_blind_to_each_other(changes):
    model = small_model(**changes, learned_positions=True, max_position_embeddings=20)
    lengths = (9, 3, 6)
    texts = [made_up(1, length, seed=length) for length in lengths]
    tokens, neighbours, mask = (torch.cat(parts, dim=1) for parts in zip(*texts, strict=True))
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    found = logits(model, tokens, neighbours, mask, document_ids=documents)
    expected = torch.cat([logits(model, *text) for text in texts], dim=1)
    torch.testing.assert_close(found, expected, **EXACT)


def test_loss():
    model = small_model()
    tokens, neighbours, mask = made_up(2, 13)
    labels = tokens.clone()
    labels[:, 5:7] = -100
    arguments = {"neighbours": neighbours, "neighbour_mask": mask}
    output = model(tokens, labels=labels, **arguments)
    rows = output.logits[:, :-1].flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(rows, labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    trained = model.train()(tokens, labels=labels, **arguments).loss
    torch.testing.assert_close(trained, output.loss)
    assert model(tokens, labels=labels).loss.isfinite()


@pytest.mark.parametrize("changes", [{}, POST_NORM])
def test_gradient_checkpointing(changes):
    model = small_model(**changes).train()
    tokens, neighbours, mask = made_up(2, 13)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name
            (enable or model.gradient_checkpointing_enable)()
            parts = [part for part in model.modules() if isinstance(part, Residual)]
            assert all(part.gradient_checkpointing for part in parts)
        model.zero_grad()
        loss = model(tokens, labels=tokens, neighbours=neighbours, neighbour_mask=mask).loss
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads, **EXACT)


def test_dropout_acts_in_training_only():
    names = ("attention", "activation", "encoder_attention", "encoder_activation")
    tokens, neighbours, mask = made_up(1, 13)
    for name in names:
        model = small_model(**{f"{name}_dropout": 0.5})
        calm = logits(model, tokens, neighbours, mask)
        torch.testing.assert_close(calm, logits(model, tokens, neighbours, mask))
        assert not torch.allclose(logits(model.train(), tokens, neighbours, mask), calm), name


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    model = small_model(torch.float32, shared_embeddings=True)
    model.save_pretrained(tmp_path)
    tokens, neighbours, mask = made_up(2, 13)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_dict()["cross_attention_layers"] == [2, 3]
    torch.testing.assert_close(
        logits(again, tokens, neighbours, mask), logits(model, tokens, neighbours, mask)
    )
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.model)


def test_tied_embeddings():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bfloat16():
    model = small_model(torch.bfloat16)
    tokens, neighbours, mask = made_up(2, 13)
    assert logits(model, tokens, neighbours, mask).isfinite().all()


def test_mixed_precision():
    model = small_model(torch.float32).train()
    tokens, neighbours, mask = made_up(2, 13)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens, neighbours=neighbours, neighbour_mask=mask).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_presets_are_the_paper():
    assert RetroConfig.preset("172m").cross_attention_layers == [6, 9, 12]
    assert RetroConfig.preset("1.5b").cross_attention_layers == [9, 12, 15, 18, 21, 24]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_layers": (0, 2)}, "cross_attention_layers must be layer numbers from 1"),
        ({"encoder_cross_attention_layers": (3,)}, "encoder_cross_attention_layers must be layer"),
        ({"deepnet": True}, "norms behind the sub-layers"),
        ({"decoder_residual_scale": 2.0}, "norms behind the sub-layers"),
        ({"norm": "batch"}, "norm must be one of rms, gated_rms, layer"),
        ({"compatibility": "old"}, "compatibility must be one of"),
        ({"rotary_dim": 9}, "rotary_dim must be even"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        (
            {"tie_word_embeddings": True, "shared_embeddings": True},
            "tied embeddings must be as wide",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(InputError, match=message):
        RetroConfig(**{**SHAPE, **changes})


def test_bad_inputs():
    model = small_model(learned_positions=True, max_position_embeddings=12)
    tokens, neighbours, mask = made_up(2, 12)
    for arguments, message in (
        ((tokens, neighbours[:, :2]), "expected neighbours of 3 chunks for 12 tokens"),
        ((tokens, neighbours[..., : CHUNK - 1]), "at least chunk_size = 4 tokens long, got 3"),
        ((tokens, neighbours[:1]), r"neighbours must be \(batch = 2"),
        ((tokens, neighbours, mask[..., 1:]), "neighbour_mask must have the shape"),
        ((tokens + VOCABULARY, neighbours), "token ids must be in"),
        ((tokens, neighbours + VOCABULARY), "neighbours must be in"),
        ((made_up(1, 13)[0],), "at most max_position_embeddings = 12 tokens, got 13"),
        ((tokens[:, :0],), "must hold tokens"),
    ):
        with pytest.raises(InputError, match=message):
            logits(model, *arguments)
    holes = torch.ones_like(tokens)
    holes[0, 5] = 0
    with pytest.raises(InputError, match="has gaps"):
        logits(model, tokens, attention_mask=holes)
    with pytest.raises(InputError, match="retrieval_step must be from 1 to 4, got 5"):
        logits(model, tokens, retrieval_step=5)
