"""Perplexity against length: the same targets, known answers, and averages done by hand."""

import json

import numpy as np
import pytest
import torch

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.data.slices import truncate
from memlm.evaluation.length import METHODS, LengthConfig, LengthCurve, measure_lengths, plot
from memlm.evaluation.positions import (
    by_document,
    by_length,
    by_position,
    by_token,
    document_losses,
    near,
)
from memlm.evaluation.reader import read_whole
from memlm.evaluation.report import plain
from memlm.models.extend import extended, is_extended
from memlm.models.rope_scaling import scaled_rope
from memlm.ops.middle_rule import MiddleConfig
from memlm.testing.tiny import tiny_model, tiny_tokens

CONFIG = LengthConfig(
    lengths=(40, 70, 120),
    window=40,
    sinks=3,
    middle=MiddleConfig(k=8, block=4, first_layer=0),
    methods=METHODS,
    pieces=3,
    scored=10,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=40)


@pytest.fixture(scope="module")
def curve(model):
    return measure_lengths(model, tiny_tokens(1, 300)[0].numpy(), CONFIG, progress=False)


def test_all_methods_agree_within_the_window(model, curve):
    first = [point.nll for point in curve.points if point.length == 40]
    assert len(first) == len(METHODS)
    assert first == pytest.approx([first[0]] * len(first), abs=1e-4)
    assert not is_extended(model)


def test_numbers_are_what_they_say(model, curve):
    points = {(point.method, point.length): point for point in curve.points}
    stream = tiny_tokens(1, 300)
    pieces = torch.cat([stream[:, end - 120 : end] for end in curve.ends])
    assert curve.ends == (120, 210, 300)
    with extended(model, window=40, sinks=3):
        losses = read_whole(model, pieces)
    found = points["lm-infinite", 120]
    assert found.nll == pytest.approx(float(losses[:, -10:].mean()), abs=1e-5)
    assert found.cumulative_nll == pytest.approx(float(losses.mean()), abs=1e-5)
    assert points["truncation", 120].nll == points["truncation", 40].nll
    assert points["vanilla", 120].nll != pytest.approx(found.nll, abs=1e-4)
    names = ("window", "streaming-llm", "lm-infinite", "lm-infinite-middle", "yarn")
    assert len({points[name, 120].nll for name in names}) == 5


def test_it_prints_saves_and_draws(curve, tmp_path):
    shown = plain(curve.table())
    assert all(name in shown for name in METHODS)
    assert "the same at every length" in shown
    assert "8 middle tokens in blocks of 4" in curve.describe()
    assert len(curve.to_dict()["points"]) == 3 * len(METHODS)
    assert LengthCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    pytest.importorskip("matplotlib")
    plot({"tiny": curve}, str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_full_attention_may_be_left_out_of_long_pieces(model):
    config = LengthConfig(
        lengths=(40, 120), window=40, methods=("vanilla", "window"), pieces=1, scored=5,
        full_limit=100,
    )  # fmt: skip
    found = measure_lengths(model, tiny_tokens(1, 120)[0].numpy(), config)
    assert [(x.method, x.length) for x in found.points] == [
        ("vanilla", 40), ("window", 40), ("window", 120),
    ]  # fmt: skip
    assert found.points[0].error is None
    assert plain(found.table()).splitlines()[1].split()[-1] == "-"


def test_scaling_is_taken_back(model):
    tokens, rotary = tiny_tokens(1, 80), model.model.rotary_emb
    before = read_whole(model, tokens)
    for kind in ("linear", "dynamic", "yarn"):
        with scaled_rope(model, kind, 80):
            assert not torch.allclose(read_whole(model, tokens), before)
        assert model.model.rotary_emb is rotary
    assert torch.equal(read_whole(model, tokens), before)
    with scaled_rope(model, "yarn", 40):
        assert model.model.rotary_emb is rotary
    with (
        pytest.raises(InputError, match="one of linear, dynamic, yarn"),
        scaled_rope(model, "none", 80),
    ):
        pass
    with (
        pytest.raises(UnsupportedModelError, match="one plain rotary module"),
        scaled_rope(tiny_model("gpt2"), "yarn", 80),
    ):
        pass


def test_averages_by_hand(model):
    losses = [np.array([1.0, 3.0]), np.array([2.0, 4.0, 6.0]), np.array([3.0, 5.0, 7.0])]
    found = by_position(losses)
    assert found.mean.tolist() == [2.0, 4.0, 6.5]
    assert found.variance.tolist() == pytest.approx([2 / 3, 2 / 3, 0.25])
    assert found.counts.tolist() == [3, 3, 2]
    assert by_length(losses) == {2: (2.0, 0.0), 3: (4.5, 0.25)}
    assert by_token(losses) == 31 / 8
    assert by_document(losses) == pytest.approx((2 + 4 + 5) / 3)
    assert near(losses, 4, 2) == (4 + 6 + 5 + 7) / 4
    with pytest.raises(InputError, match="must have 9 tokens"):
        near(losses, 9, 2)
    with pytest.raises(InputError, match="at least one scored document"):
        by_position([])
    documents = [tiny_tokens(1, n)[0].tolist() for n in (1, 20, 30)]
    assert [len(row) for row in document_losses(model, documents, length=25)] == [19, 24]


@pytest.mark.parametrize(
    ("side", "kept"), [("right", [0, 1, 2, 3, 4]), ("left", [5, 6, 7, 8, 9]),
                       ("center", [0, 1, 7, 8, 9])],
)  # fmt: skip
def test_truncation_keeps_the_other_side(side, kept):
    assert truncate(range(10), 5, side) == kept
    assert truncate(range(4), 5, side) == [0, 1, 2, 3]
    assert truncate(range(4), None, side) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": ()}, "at least one length"),
        ({"lengths": (10, 50)}, "must exceed the 10 scored tokens"),
        ({"window": 10}, "must leave some before"),
        ({"methods": ("magic",)}, "methods must be among"),
        ({"pieces": 0}, "at least 1 piece"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(InputError, match=words):
        LengthConfig(**{"lengths": (40,), "window": 40, "scored": 10, **settings})


def test_a_table_of_positions_ends():
    with pytest.raises(UnsupportedModelError, match="come from a table that ends earlier"):
        measure_lengths(
            tiny_model("gpt2", n_positions=32),
            tiny_tokens(1, 200)[0].numpy(),
            LengthConfig(lengths=(32, 64), window=32, methods=("vanilla",), scored=8),
        )


def test_a_short_text_is_refused(model):
    with pytest.raises(InputError, match="120 tokens of the longest piece, got 50"):
        measure_lengths(model, tiny_tokens(1, 50)[0].numpy(), CONFIG)
