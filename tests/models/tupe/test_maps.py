"""Names of heads by their position scores."""

import pytest
import torch

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.encoder import TupeModel
from memlm.models.tupe.maps import PositionMaps, draw_maps, label_of, position_maps

PLACE = torch.arange(33)
OFFSET = PLACE[None, :] - PLACE[:, None]


@pytest.mark.parametrize(
    ("scores", "label"),
    [
        (8.0 * (OFFSET == -1), "previous"),
        (8.0 * (OFFSET == 1), "next"),
        (-(OFFSET.double() ** 2) / 8, "local"),
        (torch.zeros(33, 33), "global"),
        (3.0 * (PLACE[None, :] > 20).expand(33, -1), "broad"),
    ],
)
def test_labels(scores, label):
    assert label_of(scores) == label


def test_maps():
    shape = {"vocab_size": 40, "max_position_embeddings": 24}
    maps = position_maps(TupeModel(TupeConfig.preset("tiny", "tupe-r", **shape)).eval(), 20)
    assert maps.scores.shape == (4, 20, 20)
    assert len(maps.labels) == 4
    with pytest.raises(UnsupportedModelError, match="must score positions apart"):
        position_maps(TupeModel(TupeConfig.preset("tiny", "bert-a", **shape)), 20)


def test_a_decoder_looks_back():
    shape = {"vocab_size": 40, "max_position_embeddings": 24, "is_decoder": True}
    maps = position_maps(TupeModel(TupeConfig.preset("tiny", "tupe-r", **shape)).eval(), 20)
    weights = maps.scores.softmax(-1)
    assert not weights.triu(1).any()
    assert set(maps.labels) == {"global"}  # of what it sees, all the same before training


def test_pictures(tmp_path):
    maps = PositionMaps(torch.zeros(5, 6, 6), ("global",) * 5)
    draw_maps(maps, tmp_path / "five.svg")
    picture = (tmp_path / "five.svg").read_text()
    assert picture.count("<image") >= 5
    with pytest.raises(InputError, match=r"must end in one of .*png.*, got '.*maps\.xyz'"):
        draw_maps(maps, tmp_path / "maps.xyz")
