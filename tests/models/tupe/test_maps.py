"""Names of heads by their position scores."""

import pytest
import torch

from memlm.core.errors import UnsupportedModelError
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.encoder import TupeModel
from memlm.models.tupe.maps import label_of, position_maps

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
