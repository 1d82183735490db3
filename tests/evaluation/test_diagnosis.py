"""Diagnosis: scores of every family, and figures against small references."""

import json
import math

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import memlm
from memlm.core.errors import InputError, UnsupportedModelError
from memlm.evaluation.attention_scores import visit_scores
from memlm.evaluation.diagnosis import DiagnosisConfig, cut_pieces, diagnose
from memlm.evaluation.diagnosis_plot import draw_diagnosis
from memlm.evaluation.recommend import RecommendConfig, Setting, choose, recommend
from memlm.evaluation.report import plain
from memlm.models.extend import is_extended
from memlm.models.extend_families import FAMILIES
from memlm.testing.tiny import tiny_model, tiny_tokens


def scores(model, tokens, queries):
    found = {}
    states = visit_scores(model, tokens, torch.tensor(queries), found.__setitem__)
    return found, states


# RETRO never makes its weights, so there is nothing to compare with
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"memlm_retro"}))
def test_probabilities_are_those_of_the_model(family):
    model, tokens, queries = tiny_model(family), tiny_tokens(2, 20), [0, 7, 19]
    found, states = scores(model, tokens, queries)
    assert not is_extended(model)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        output = model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    assert list(found) == [0, 1]
    for layer, expected in enumerate(output.attentions):
        torch.testing.assert_close(
            found[layer].softmax(-1), expected[:, :, queries], atol=2e-5, rtol=1e-4
        )
    for state, expected in zip(states, output.hidden_states, strict=True):
        torch.testing.assert_close(state, expected, atol=2e-4, rtol=1e-4)


def test_scores_are_scaled_products_of_rotated_vectors():
    model, tokens = tiny_model("llama"), tiny_tokens(1, 12)
    found, states = scores(model, tokens, [11])
    layer = model.model.layers[1]
    with torch.no_grad():
        x = layer.input_layernorm(states[1])
        query, key = (
            part(x).view(1, 12, -1, 4).transpose(1, 2)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        query, key = apply_rotary_pos_emb(
            query, key, *model.model.rotary_emb(x, torch.arange(12)[None])
        )
    for head in range(4):
        for at in range(12):
            product = query[0, head, 11] @ key[0, head // 2, at] / 2
            assert float(found[1][0, head, 0, at]) == pytest.approx(float(product), abs=1e-4)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=24)


CONFIG = DiagnosisConfig(length=60, trained=24, pieces=3, first=3, features=20, points=8)


@pytest.fixture(scope="module")
def pieces():
    return cut_pieces(tiny_tokens(1, 200)[0], 60, 3, begin_token=1)


@pytest.fixture(scope="module")
def found(model, pieces):
    return diagnose(model, pieces, CONFIG)


def test_pieces_begin_with_the_begin_token():
    stream = list(range(10, 30))
    assert cut_pieces(stream, 6, 2, begin_token=1).tolist() == [
        [1, 10, 11, 12, 13, 14], [1, 25, 26, 27, 28, 29],
    ]  # fmt: skip
    assert cut_pieces(stream, 20, 5).tolist() == [stream]
    with pytest.raises(InputError, match="must have the 21 tokens of a piece, got 20"):
        cut_pieces(stream, 22, 1, begin_token=1)


def test_figures_are_what_they_say(model, pieces, found):
    per_piece = [scores(model, piece[None], list(range(60)))[0] for piece in pieces]
    assert found.distances[0] == 0
    assert found.distances[-1] == 59
    assert found.lengths.tolist() == [1, 2, 3, 6, 10, 19, 33, 60]
    for layer in range(2):
        rows = [one[layer][0, head, 59].tolist() for one in per_piece for head in range(4)]
        for at, distance in enumerate(found.distances):
            largest = [max(row[59 - distance :]) for row in rows]
            assert found.bound[layer, at] == pytest.approx(np.mean(largest), abs=1e-5)
            assert found.bound_deviation[layer, at] == pytest.approx(
                np.std(largest, ddof=1), abs=1e-5
            )
        for head in range(4):
            for at, length in enumerate(found.lengths):
                entropies = []
                for one in per_piece:
                    weights = one[layer][0, head, length - 1, :length].softmax(-1).tolist()
                    entropies.append(-sum(w * math.log(w) for w in weights if w))
                mean = np.mean(entropies)
                assert found.entropy[layer, head, at] == pytest.approx(mean, abs=1e-4)
            for count in (1, 2, 3):
                shares = [
                    float(one[layer][0, head, place].softmax(-1)[:count].sum())
                    for one in per_piece
                    for place in range(12, 24)  # half the trained length to all of it
                ]
                share = found.sinks[layer, head, count - 1]
                assert share == pytest.approx(np.mean(shares), abs=1e-5)
    assert found.entropy_at(24) == pytest.approx(found.entropy[:, :, 5].mean(1))
    assert found.bound_at(59) == pytest.approx(found.bound[:, -1])


def test_features_lie_on_principal_components(model, pieces, found):
    states = [scores(model, piece[None], [0])[1] for piece in pieces]
    for place in range(3):
        kept = np.concatenate([row[place][:, :20].double().numpy() for row in states])
        flat = kept.reshape(60, -1) - kept.reshape(60, -1).mean(0)
        values, axes = np.linalg.eigh(flat.T @ flat)
        for number in range(2):
            axis = axes[:, -1 - number]
            expected = flat @ axis * np.sign(axis[np.abs(axis).argmax()])
            ours = found.components[place, :, :, number].ravel()
            assert ours == pytest.approx(expected, abs=1e-6)
        assert found.explained[place] == pytest.approx(values[::-1][:2] / values.sum())
        rest = kept[:, 3:].reshape(-1, kept.shape[-1])
        spread = np.sqrt(((rest - rest.mean(0)) ** 2).sum(1).mean())
        for position in range(3):
            apart = np.linalg.norm(kept[:, position].mean(0) - rest.mean(0)) / spread
            assert found.separation[place, position] == pytest.approx(apart)


def test_it_prints_saves_and_draws(found, model, pieces, tmp_path):
    shown = plain(found.table())
    assert "score to 24" in shown
    assert "ln 60 = 4.09" in shown
    kept = json.loads(json.dumps(found.to_dict()))
    assert np.array(kept["entropy"]) == pytest.approx(found.entropy, rel=1e-5)
    assert kept["config"]["length"] == 60
    tried = recommend(model, pieces, RecommendConfig((12, 24), (0, 2), scored=8), progress=False)
    pytest.importorskip("matplotlib")
    for name, part in (("all.svg", tried), ("some.png", None)):
        draw_diagnosis(found, part, layer=1).savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_recommended_is_the_smallest_near_the_best(model, pieces):
    config = RecommendConfig((24, 12), (2, 0), scored=8, tolerance=100.0, batch_tokens=120)
    tried = recommend(model, pieces, config, progress=False)
    assert not is_extended(model)
    assert [(one.window, one.sinks) for one in tried.settings] == [
        (24, 2), (24, 0), (12, 2), (12, 0),
    ]  # fmt: skip
    assert (tried.chosen.window, tried.chosen.sinks) == (12, 0)
    losses = {}
    for one in tried.settings:
        with memlm.models.extend.extended(model, window=one.window, sinks=one.sinks):
            parts = memlm.evaluation.reader.read_whole(model, pieces)[:, -8:].mean(1)
        losses[one.window, one.sinks] = parts
        assert one.nll == pytest.approx(float(parts.mean()), abs=1e-6)
    best = min(losses, key=lambda key: float(losses[key].mean()))
    for one in tried.settings:
        more = losses[one.window, one.sinks] - losses[best]
        assert one.excess == pytest.approx(float(more.mean()), abs=1e-6)
        assert one.error == pytest.approx(float(more.std()) / math.sqrt(3), abs=1e-6)
    exact = recommend(model, pieces, RecommendConfig((24, 12), (2, 0), scored=8, tolerance=0.0))
    assert (exact.chosen.window, exact.chosen.sinks) == best
    assert exact.chosen.excess == 0
    assert "recommended: window 12, 0 sinks" in plain(tried.table())
    assert tried.vanilla == pytest.approx(
        float(memlm.evaluation.reader.read_whole(model, pieces)[:, -8:].mean()), abs=1e-6
    )
    assert json.loads(json.dumps(tried.to_dict()))["chosen"]["window"] == 12
    (alone,) = recommend(model, pieces[:1], RecommendConfig((24,), (0,), scored=8)).settings
    assert alone.error is None


def test_the_rule_counts_keys_and_then_loss():
    config = RecommendConfig((8, 10), (0, 2), tolerance=0.5)
    settings = [
        Setting(8, 0, 3.0, 1.0, None),
        Setting(8, 2, 2.4, 0.4, None),
        Setting(10, 0, 2.3, 0.3, None),
        Setting(10, 2, 2.0, 0.0, None),
    ]
    assert choose(settings, config) is settings[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 20}, "at least the 24 tokens that the model was trained on, got 20"),
        ({"pieces": 0}, "at least one piece"),
        ({"first": 12}, "must exceed twice the 12 first tokens"),
        ({"features": 4}, "more than 4 positions"),
        ({"points": 1}, "at least 2 lengths"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(InputError, match=words):
        DiagnosisConfig(**{**CONFIG.__dict__, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"windows": ()}, "at least one window"),
        ({"windows": (0,)}, "windows must be at least 1"),
        ({"sinks": ()}, "at least one number of sinks"),
        ({"sinks": (-1,)}, "must not be negative"),
        ({"scored": 0}, "at least one token"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
    ],
)
def test_what_is_tried_is_checked(settings, words):
    with pytest.raises(InputError, match=words):
        RecommendConfig(**{"windows": (8,), **settings})


def test_models_and_texts_that_do_not_fit_are_refused(model, pieces):
    with pytest.raises(InputError, match=r"\(pieces, 60\) tokens, got \(3, 50\)"):
        diagnose(model, pieces[:, :50], CONFIG)
    with pytest.raises(InputError, match="longer than the 60 scored tokens"):
        recommend(model, pieces, RecommendConfig((8,), scored=60))
    with pytest.raises(InputError, match="positions of the text, 0 to 59"):
        visit_scores(model, pieces, torch.tensor([60]), print)
    with pytest.raises(UnsupportedModelError, match="extend_context knows"):
        diagnose(tiny_model("gpt2"), pieces, CONFIG)
    memlm.extend_context(model, window=8)
    try:
        with pytest.raises(InputError, match="must not be extended already"):
            diagnose(model, pieces, CONFIG)
    finally:
        memlm.restore_context(model)
