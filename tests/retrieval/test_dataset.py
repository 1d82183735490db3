import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from memlm.core.errors import FingerprintError, InputError
from memlm.data.documents import Document
from memlm.retrieval.build import delete_documents
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.inspect import as_text, inspect_chunk, write_html
from memlm.retrieval.neighbours import build_neighbours
from memlm.retrieval.retrievers import Bm25Retriever
from tests.retrieval.texts import database, documents


@pytest.fixture
def there(tokenizer, tmp_path):
    texts = [*documents(9), Document("word", "cat"), Document("empty", "")]
    return database(tmp_path, tokenizer, texts, chunk_size=4)


def predictions(data):
    """(chunk, place in the document) of every predicted token, and the token."""
    text = data.text
    found = []
    for number in range(len(data)):
        item = data[number]
        chunks = data.chunk_of_tokens(number)
        places = item["document_ids"].numpy()
        for place in np.flatnonzero(item["labels"].numpy() != -100):
            assert places[place] == places[place - 1], "predicted from another piece"
            found.append((int(chunks[place]), int(item["labels"][place])))
    return sorted(found), text


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_every_token_but_a_first_is_predicted_once(there, packed, size):
    text = delete_documents(there.path, ["doc-4"])
    found, _ = predictions(RetroDataset(text, chunks_per_sequence=size, packed=packed))
    expected = []
    for number in np.flatnonzero(~text.deleted):
        tokens = text.document(number)
        first = text.chunk_offsets[number]
        expected += [(int(first + t // 4), int(tokens[t])) for t in range(1, len(tokens))]
    assert found == sorted(expected)


def test_packing_leaves_less_padding(there):
    packed = RetroDataset(there, chunks_per_sequence=6)
    alone = RetroDataset(there, chunks_per_sequence=6, packed=False)
    assert len(packed) < len(alone)
    room = packed.length * len(packed)
    assert sum(int(item["attention_mask"].sum()) for item in packed) > 0.7 * room


def test_neighbours_come_in_the_order_of_whole_chunks(there):
    table = build_neighbours(there, Bm25Retriever(there), k=3, quiet=True)
    data = RetroDataset(there, table, chunks_per_sequence=5, k=2, pad_id=7)
    for number, item in enumerate(data):
        ids, places = item["input_ids"].numpy(), item["document_ids"].numpy()
        place = 0  # walk the tokens as a model does: a chunk ends after every 4 of a piece
        for piece in range(places.max() + 1):
            tokens = ids[places == piece]
            for end in range(4, len(tokens) + 1, 4):
                chunk = data.whole_chunks(number)[place]
                np.testing.assert_array_equal(tokens[end - 4 : end], there.chunk(chunk))
                for column, neighbour in enumerate(table.lookup(chunk, 2)):
                    expected = there.gather(neighbour)
                    mask = item["neighbour_mask"][place, column].numpy()
                    np.testing.assert_array_equal(mask, expected.valid)
                    found = item["neighbours"][place, column].numpy()
                    np.testing.assert_array_equal(found[mask], expected.tokens[mask])
                    assert (found[~mask] == 7).all()
                place += 1
        assert not item["neighbour_mask"][place:].any()
        assert (item["input_ids"][item["attention_mask"] == 0] == 7).all()
        masks = item["attention_mask"].numpy()
        assert (np.diff(masks) <= 0).all(), "padding is at the end"


def test_a_loader_batches_it(there):
    table = build_neighbours(there, Bm25Retriever(there), quiet=True)
    data = RetroDataset(there, table, chunks_per_sequence=3)
    batch = next(iter(DataLoader(data, batch_size=2)))
    assert batch["input_ids"].shape == (2, 13)
    assert batch["neighbours"].shape == batch["neighbour_mask"].shape == (2, 3, 2, 8)
    assert batch["neighbours"].dtype == torch.int64


def test_bad_data(there, tokenizer, tmp_path):
    table = build_neighbours(there, Bm25Retriever(there), tmp_path / "table", quiet=True)
    with pytest.raises(InputError, match="chunks_per_sequence must be at least 1"):
        RetroDataset(there, chunks_per_sequence=0)
    with pytest.raises(InputError, match="k must lie between 1 and the table's 2, got 3"):
        RetroDataset(there, table, k=3)
    other = database(tmp_path / "other", tokenizer, chunk_size=4)
    with pytest.raises(FingerprintError, match="make the table again"):
        RetroDataset(other, table)
    short = database(tmp_path / "short", tokenizer, [Document("two", "cat")])
    delete_documents(short.path, ["two"])
    with pytest.raises(InputError, match="must hold text to train on"):
        RetroDataset(delete_documents(short.path, ["two"]))


def test_neighbours_can_be_read(there, tokenizer, tmp_path):
    table = build_neighbours(there, Bm25Retriever(there), quiet=True)
    chunk = int(np.flatnonzero(np.asarray(table.ids)[:, 0] >= 0)[0])
    seen = inspect_chunk(there, table, there, tokenizer, chunk)
    assert len(seen.passages) == 2
    for passage in seen.passages:
        assert passage.shared in seen.text
        assert 0 < passage.overlap <= 1
    assert f"⟦{seen.passages[0].shared}⟧" in as_text(seen)
    named = seen._replace(document="<b>&")
    page = write_html([named], tmp_path / "pages" / "seen.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert f"<mark>{seen.passages[0].shared}</mark>" in page
