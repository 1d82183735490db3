import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from memlm.core.errors import InputError
from memlm.evaluation.leakage import leakage, leakage_table, plot_leakage
from memlm.evaluation.retro import compare_retrieval, evaluate_retro, table
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.neighbours import build_neighbours
from memlm.retrieval.retrievers import Bm25Retriever
from tests.retrieval.texts import database, documents


class Copier(nn.Module):
    """Predicts the tokens of the row's neighbours, equally, and all others hardly."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(
        self, input_ids, attention_mask, document_ids, neighbours=None, neighbour_mask=None, **_
    ):
        self.calls.append(None if neighbours is None else neighbours)
        logits = torch.zeros(*input_ids.shape, 32)
        if neighbours is not None:
            for row, (tokens, mask) in enumerate(zip(neighbours, neighbour_mask, strict=True)):
                logits[row, :, tokens[mask].unique()] = 2.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def data(tokenizer, tmp_path):
    there = database(tmp_path, tokenizer, documents(10), chunk_size=4)
    found = build_neighbours(there, Bm25Retriever(there), k=2, quiet=True)
    return RetroDataset(there, found, chunks_per_sequence=2)


def test_uniform_predictions_cost_what_they_must(data):
    one = evaluate_retro(Copier(), data, mode="off", batch_size=3, quiet=True)
    expected = int(np.maximum(np.diff(data.text.offsets) - 1, 0).sum())
    assert one.tokens == expected
    assert one.perplexity == pytest.approx(32)
    size = int(data.text.text_bytes.sum())
    assert one.bits_per_byte == pytest.approx(5 * expected / size)
    assert one.summary()["bytes"] == pytest.approx(size)


def test_modes_differ_in_the_neighbours_alone(data):
    model = Copier()
    found = compare_retrieval(model, data, batch_size=3, quiet=True)
    assert list(found) == ["on", "off", "shuffled"]
    steps = len(model.calls) // 3
    assert all(call is None for call in model.calls[steps : 2 * steps])
    pairs = zip(model.calls[:steps], model.calls[2 * steps :], strict=True)
    assert any(not torch.equal(on, shuffled) for on, shuffled in pairs)
    assert found["on"].bits_per_byte < found["shuffled"].bits_per_byte < found["off"].bits_per_byte
    assert "shuffled" in table(found)
    again = evaluate_retro(Copier(), data, mode="shuffled", batch_size=5, quiet=True)
    np.testing.assert_allclose(again.chunk_nats, found["shuffled"].chunk_nats)


def test_shuffled_neighbours_are_never_of_the_own_document(data, monkeypatch):
    seen = []
    gather = type(data.database).gather

    def noting(self, chunks, length=None):
        if np.ndim(chunks) == 3:
            seen.append(np.array(chunks))
        return gather(self, chunks, length)

    monkeypatch.setattr(type(data.database), "gather", noting)
    evaluate_retro(Copier(), data, mode="shuffled", batch_size=100, quiet=True)
    chunks = np.stack([data.whole_chunks(number) for number in range(len(data))])
    own = data.text.document_of(np.maximum(chunks, 0))[..., None]
    neighbours = data.text.document_of(np.maximum(seen[-1], 0))
    assert not ((neighbours == own) & (seen[-1] >= 0)).any()


def test_leakage_ends_at_the_usual_figure(data, tmp_path):
    found = compare_retrieval(Copier(), data, modes=("on", "off"), quiet=True)
    rows = leakage(found, data, alphas=(0.25, 0.5, 1.0))
    assert rows[-1].share == 1.0
    for name, one in found.items():
        assert rows[-1].bits_per_byte[name] == pytest.approx(one.bits_per_byte)
    assert [row.share for row in rows] == sorted(row.share for row in rows)
    few = rows[0]
    assert few.share == 0 or few.bucket == few.bits_per_byte
    assert "25.0%" in leakage_table(rows)
    pytest.importorskip("matplotlib")
    assert "<svg" in plot_leakage(rows, tmp_path / "curve.svg").read_text()


def test_bad_evaluations(data):
    with pytest.raises(InputError, match="mode must be one of on, off, shuffled"):
        evaluate_retro(Copier(), data, mode="half")  # pyright: ignore
    plain = RetroDataset(data.text, chunks_per_sequence=2)
    with pytest.raises(InputError, match="needs a table of neighbours"):
        evaluate_retro(Copier(), plain, mode="shuffled")
    one = evaluate_retro(Copier(), plain, mode="off", quiet=True)
    with pytest.raises(InputError, match="give a table"):
        leakage({"off": one}, plain)
    with pytest.raises(InputError, match="alphas must rise"):
        leakage({"off": one}, data, alphas=(0.5, 0.25))
    assert math.isfinite(one.perplexity)
