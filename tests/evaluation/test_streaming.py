"""Reading without end: any cut gives the same losses, and an interrupted run the same log."""

import json
import math

import pytest
import torch

from memlm.core.errors import FingerprintError, InputError, UnsupportedModelError
from memlm.evaluation.reader import Reader, read_whole
from memlm.evaluation.streaming import cut_chunks, shuffled_epochs, stream_perplexity
from memlm.models.extend import extend_context, restore_context
from memlm.testing.tiny import tiny_model, tiny_tokens


@pytest.fixture
def llama():
    return extend_context(tiny_model("llama"), window=16, sinks=3)


def losses(model, tokens):
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits.double()
    rows = logits[:, :-1].log_softmax(-1)
    return -rows.gather(-1, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("pieces", [[100], [1] * 100, [17, 1, 50, 32]])
def test_any_cut_gives_every_loss(llama, pieces):
    tokens, reader = tiny_tokens(2, 100), Reader(llama)
    found = torch.cat([reader.read(piece) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, losses(llama, tokens), rtol=1e-4, atol=1e-4)
    assert (reader.read(tokens[:, :5])).shape == (2, 5)


def test_whole_rows_with_and_without_a_window(llama):
    tokens = tiny_tokens(3, 90)
    torch.testing.assert_close(
        read_whole(llama, tokens, chunk=20), losses(llama, tokens), rtol=1e-4, atol=1e-4
    )
    restore_context(llama)
    torch.testing.assert_close(
        read_whole(llama, tokens, chunk=20), losses(llama, tokens), rtol=1e-4, atol=1e-4
    )


def stream(count=1000, seed=0):
    texts = [tiny_tokens(1, n, seed=n)[0].tolist() for n in (30, 50, 7)]
    return [token for token, _ in zip(shuffled_epochs(texts, seed), range(count), strict=False)]


def untimed(point):
    return point.tokens, point.scored, point.nll, point.recent_nll, point.cache_bytes


def test_points_are_the_means_and_memory_is_flat(llama):
    tokens = stream()
    points = list(stream_perplexity(llama, iter(tokens), until=900, chunk=64, every=250))
    assert [point.tokens for point in points] == [250, 500, 750, 900]
    expected = losses(llama, torch.tensor([tokens[:900]]))[0]
    assert points[-1].scored == 899
    assert points[-1].nll == pytest.approx(float(expected.mean()), abs=1e-5)
    assert points[1].recent_nll == pytest.approx(float(expected[249:499].mean()), abs=1e-5)
    assert points[-1].perplexity == pytest.approx(math.exp(points[-1].nll))
    assert len({point.cache_bytes for point in points}) == 1


def test_a_stream_that_ends_is_scored_to_its_end(llama):
    (point,) = stream_perplexity(llama, stream(33), chunk=10)
    assert (point.tokens, point.scored) == (33, 32)


def test_an_interrupted_run_goes_on(llama, tmp_path):
    settings = {"chunk": 32, "every": 100}
    whole = [untimed(x) for x in stream_perplexity(llama, stream(), until=500, **settings)]
    first = stream_perplexity(llama, stream(), until=500, out=tmp_path, **settings)
    parts = [untimed(next(first)), untimed(next(first))]
    first.close()
    # killed between the line and the state
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"tokens": 300}) + "\n" + '{"tokens": 30')
    rest = stream_perplexity(llama, stream(), until=500, out=tmp_path, **settings)
    parts += [untimed(point) for point in rest]
    assert parts == whole
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [100, 200, 300, 400, 500]
    assert not list(stream_perplexity(llama, stream(), until=500, out=tmp_path, **settings))


def test_a_run_of_before_there_were_more_settings_goes_on(llama, tmp_path):
    list(stream_perplexity(llama, stream(), until=200, out=tmp_path, every=100))
    about = tmp_path / "stream.json"
    kept = json.loads(about.read_text())
    del kept["text"]
    about.write_text(json.dumps(kept))
    (last,) = stream_perplexity(llama, stream(), until=300, out=tmp_path, every=100)
    assert last.tokens == 300


def test_wrong_use_is_refused(llama, tmp_path):
    list(stream_perplexity(llama, stream(50), out=tmp_path))
    reader = Reader(llama)
    reader.read(tiny_tokens(1, 4))
    with pytest.raises(InputError, match="rows of the first"):
        reader.read(tiny_tokens(2, 4))
    with pytest.raises(InputError, match=r"tokens must be \(rows, new\)"):
        Reader(llama).read(torch.zeros(2, 0, dtype=torch.long))
    restore_context(llama)
    with pytest.raises(UnsupportedModelError, match="does not grow"):
        next(stream_perplexity(llama, stream(50)))
    extend_context(llama, window=8)
    with pytest.raises(FingerprintError, match="a run of this model and text"):
        next(stream_perplexity(llama, stream(50), out=tmp_path))
    with pytest.raises(InputError, match="at least 1 token"):
        next(cut_chunks([1], 0))
    with pytest.raises(InputError, match="documents with tokens"):
        next(shuffled_epochs([[]]))


def test_epochs_are_orders_of_the_same_documents():
    texts = [[1, 2], [3], [4, 5, 6]]
    tokens = list(shuffled_epochs(texts, 3, epochs=5, begin_token=9))
    assert tokens[0] == 9
    assert all(sorted(tokens[1 + 6 * n : 7 + 6 * n]) == [1, 2, 3, 4, 5, 6] for n in range(5))
    assert len({tuple(tokens[1 + 6 * n : 7 + 6 * n]) for n in range(5)}) > 1
    assert list(cut_chunks(tokens, 4))[-1] == tokens[28:]
