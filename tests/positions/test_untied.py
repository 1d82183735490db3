"""Positions as a part: lengths, ids, what is kept, what is refused."""

import pytest
import torch

from memlm.core.errors import InputError
from memlm.ops.untied_attention import position_scores
from memlm.positions.buckets import relative_buckets
from memlm.positions.ids import check_padding, position_ids_of
from memlm.positions.scheme import SCHEMES, PositionScheme
from memlm.positions.untied import UntiedPositions


def make(name="tupe-r", **changes):
    torch.manual_seed(0)
    made = UntiedPositions(16, 2, PositionScheme.named(name), **{"max_positions": 8, **changes})
    return made.eval()


def test_evaluation_makes_terms_once(monkeypatch):
    made = make()
    calls = []
    real = made.layer_norm.forward
    monkeypatch.setattr(made.layer_norm, "forward", lambda x: calls.append(1) or real(x))
    with torch.no_grad():
        first = made(5)
        assert made(5) is first
        assert made(7) is not first
        assert len(calls) == 1  # one table of projections serves every length
        made.query.weight.add_(1.0)
        assert not torch.equal(made(5).query, first.query)
        made.load_state_dict(make().state_dict())
        torch.testing.assert_close(made(5).query, first.query)
    made.train()
    assert made(5) is not made(5)


def test_kept_terms_follow_the_weights():
    made = make()

    def changed(change):
        """Whether the terms are others after a change of the weights."""
        with torch.no_grad():
            before = made(5)
            assert made(5) is before
        change()
        with torch.no_grad():
            after = made(5)
            assert made(5) is after
        return after is not before

    def learn():
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
        made(5).query.sum().backward()
        optimizer.step()

    def replace():
        made.key.weight = torch.nn.Parameter(torch.ones_like(made.key.weight))

    def behind_the_back():
        made.relative.weight.data.add_(1.0)
        made.eval()

    assert changed(learn)
    assert changed(lambda: torch.nn.init.normal_(made.positions.weight))
    assert changed(replace)
    assert changed(behind_the_back)
    assert changed(lambda: made.load_state_dict(make().state_dict()))
    assert changed(lambda: made.double())
    assert made(5).query.dtype == torch.float64
    assert not changed(lambda: None)


def test_a_graph_is_never_kept():
    made = make()
    for _ in range(2):
        made(5).query.sum().backward()


def test_lengths_beyond_training():
    with pytest.raises(InputError, match="sequence length 9 exceeds max_positions 8"):
        make()(9)
    with torch.no_grad():
        clipped = make("tupe-a", extension="clip")(12)
        assert torch.equal(clipped.query[:, :, 7], clipped.query[:, :, 11])
        spread = make("tupe-a", extension="interpolate")
        short, long = spread(8), spread(14)
        torch.testing.assert_close(long.query[:, :, -1], short.query[:, :, -1])
        torch.testing.assert_close(long.query[:, :, 1], short.query[:, :, 1])
        torch.testing.assert_close(
            long.query[:, :, 3], short.query[:, :, 2]
        )  # 13 steps over 7 rows
        assert torch.equal(spread(8).query, short.query)


def test_packed_documents_have_the_scores_of_single_ones():
    made = make()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    ids = position_ids_of(torch.ones_like(documents), documents)
    assert ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    with torch.no_grad():
        packed = position_scores(made(7, position_ids=ids), 7, made.scale)
        single = position_scores(made(4), 4, made.scale)
    torch.testing.assert_close(packed[..., 3:, 3:], single)
    torch.testing.assert_close(packed[..., :3, :3], single[..., :3, :3])


def test_any_tokens_can_be_untied():
    made = make("tupe-a")
    untied = torch.tensor([[True, False, False, True, False]])
    with torch.no_grad():
        table = position_scores(made(5, untied=untied), 5, made.scale)[0]
        plain = position_scores(made(5), 5, made.scale)[0]
    assert (table[:, 3] == table[:, 3, :1]).all()
    torch.testing.assert_close(table[:, 1, 3], plain[:, 1, 0])
    torch.testing.assert_close(table[:, 1, 2], plain[:, 1, 2])


def test_ids_of_padded_rows():
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert position_ids_of(valid).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_schemes():
    assert {name: scheme.terms for name, scheme in SCHEMES.items()} == {
        "bert-a": 1, "bert-r": 1, "bert-a-d": 4, "tupe-a": 2, "tupe-r": 2, "tupe-a-tie-cls": 2,
    }  # fmt: skip
    assert all(PositionScheme.from_dict(s.to_dict()).name == n for n, s in SCHEMES.items())


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: PositionScheme.named("rope"), "scheme must be one of"),
        (lambda: PositionScheme("added", reset=True), "reset must go with"),
        (lambda: make(num_buckets=7), "num_buckets must be even, got 7"),
        (lambda: make(max_distance=3), "max_distance must be greater"),
        (lambda: make(extension="grow"), "extension must be"),
        (lambda: make("bert-a"), "must have a term of its own"),
        (lambda: UntiedPositions(15, 2, SCHEMES["tupe-a"]), "divisible by the number of heads"),
        (lambda: make()(4, position_ids=torch.zeros(4)), r"position_ids must be \(batch, 4\)"),
        (lambda: make()(1, position_ids=torch.tensor([[-1]])), "must not be negative"),
        (lambda: check_padding(torch.zeros(0, 3, dtype=torch.bool)), "must hold tokens"),
        (lambda: check_padding(torch.tensor([[False]])), "sample 0 has no non-pad token"),
        (lambda: check_padding(torch.tensor([[False, True]])), "left padding detected"),
    ],
)
def test_bad_inputs(make_it, message):
    with pytest.raises(InputError, match=message):
        make_it()


def test_buckets_saturate_and_are_causal():
    far = relative_buckets(torch.tensor([-91, -5000]))
    assert far.tolist() == [15, 15]
    past = relative_buckets(torch.tensor([5, 0, -3, -15, -16]), bidirectional=False)
    assert past.tolist() == [0, 0, 3, 15, 16]
