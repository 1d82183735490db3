"""RETRO's data against recorded outputs of retro-pytorch: chunks, neighbours, items, embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from memlm.core.errors import InputError
from memlm.data.documents import read_documents
from memlm.formats.retro_memmaps import read_retro_files
from memlm.importers.retro_data import import_retro_data
from memlm.index.exact import ExactIndex
from memlm.index.exclude import Exclusion, search_without
from memlm.models.text_encoder import HuggingFaceEncoder, masked_mean
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig
from memlm.retrieval.embeddings import embed_chunks
from memlm.retrieval.neighbours import build_neighbours
from memlm.retrieval.original import (
    ChunkTable,
    OriginalDataset,
    chunk_table,
    filter_neighbours,
    retrieved_tokens,
)
from memlm.retrieval.retrievers import DenseRetriever, own_documents


def assets(case: Path) -> Path:
    return case.parent / "assets"


def bert_tokenizer(case: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(assets(case) / "tokenizer.json")),
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
    )


def bert(case: Path) -> BertModel:
    config = BertConfig(**json.loads((assets(case) / "bert_config.json").read_text()))
    model = BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(load_file(assets(case) / "bert.safetensors"))
    return model


def parameters(case: Path) -> dict:
    return json.loads((case / "params.json").read_text())


def build(case: Path, out: Path, chunk_size: int):
    folder, pattern = case / "text_folder", parameters(case).get("glob", "**/*.txt")
    names = {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    suffixes = tuple({Path(name).suffix for name in names})
    documents = [one for one in read_documents(folder, suffixes=suffixes) if one.name in names]
    return build_chunks(documents, bert_tokenizer(case), out, ChunkConfig(chunk_size), quiet=True)


def test_chunks_of_a_folder(golden_retro_chunker, tmp_path):
    case = golden_retro_chunker
    wanted = parameters(case)
    database = build(case, tmp_path / "database", wanted["chunk_size"])
    table = chunk_table(database, wanted["seq_len"])
    expected = np.load(case / "expected.npz")
    for mine, name in zip(table, ("chunks", "seqs", "doc_ids"), strict=True):
        np.testing.assert_array_equal(mine, expected[name])
    lengths = dict(zip(database.names, np.diff(database.offsets).tolist(), strict=True))
    assert lengths == wanted["doc_token_lengths_with_cls_sep"]
    counts = {"chunks": len(database), "docs": database.documents, "seqs": len(table.sequences)}
    assert counts == json.loads((case / "stats.json").read_text())
    files = read_retro_files(case, chunk_size=wanted["chunk_size"], statistics="stats.json")
    for mine, there in zip(table, files, strict=False):
        np.testing.assert_array_equal(mine, there)


def test_items(golden_retro_dataset):
    case = golden_retro_dataset
    wanted = parameters(case)
    expected = np.load(case / "expected.npz")
    used = wanted["num_chunks"]
    table = ChunkTable(expected["chunks"][:used], expected["seq_starts"], np.zeros(used, np.int32))
    settings = {"end_id": wanted["eos_id"], "continuations": wanted["add_continuations"]}
    items = OriginalDataset(table, expected["knn"][:used], wanted["seq_len"], **settings)
    assert len(items) == wanted["num_sequences"]
    for number, (tokens, retrieved) in enumerate(items[i] for i in range(len(items))):
        np.testing.assert_array_equal(tokens, expected["item_seq"][number])
        np.testing.assert_array_equal(retrieved, expected["item_retrieved"][number])
    found = retrieved_tokens(expected["k2r_input"], table.chunks, **settings)
    np.testing.assert_array_equal(found, expected["k2r_output"])


def test_neighbours_that_are_kept(golden_retro_knn):
    data = np.load(golden_retro_knn / "data.npz")
    found = filter_neighbours(
        data["raw_search_ids"], data["raw_search_sqdist"], data["doc_ids"], data["knn"].shape[1]
    )
    np.testing.assert_array_equal(found, data["knn"])


def test_exact_exclusion_finds_all_there_are(golden_retro_knn):
    """Ours differs where the original loses neighbours: against brute force over the same keys."""
    data = np.load(golden_retro_knn / "data.npz")
    keys, documents, k = data["embeddings"], data["doc_ids"], data["knn"].shape[1]
    first = np.searchsorted(documents, documents)
    end = np.searchsorted(documents, documents, side="right")
    exclusion = Exclusion(first=torch.from_numpy(first), end=torch.from_numpy(end))
    keys = torch.from_numpy(keys)
    found = search_without(ExactIndex(keys), keys, k, exclusion)
    distances = torch.cdist(keys.double(), keys.double()) ** 2
    for row in range(len(keys)):
        others = np.flatnonzero(documents != documents[row])
        best = sorted(distances[row, others].tolist())[:k]
        ids = [int(number) for number in found.ids[row] if number >= 0]
        assert len(ids) == min(k, len(others))
        np.testing.assert_allclose(distances[row, ids], best, rtol=1e-4, atol=1e-4)


def test_embeddings_of_bert(golden_retro_unit_bert_embed):
    case = golden_retro_unit_bert_embed
    data = load_file(case / "data.safetensors")
    ids, mask = data["token_ids"], data["token_ids"] != 0
    with torch.no_grad():
        states = bert(case)(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(states, data["last_hidden_state"], atol=1e-5, rtol=1e-5)
    mean = masked_mean(data["last_hidden_state"], mask, skip_first=True)
    torch.testing.assert_close(mean, data["masked_mean"], atol=1e-5, rtol=1e-5)
    chunks = [row[row != 0][1:].numpy() for row in ids]
    whole = [
        number for number, row in enumerate(ids) if (row != 0).sum() == row.nonzero().max() + 1
    ]
    for pooling, name in (("mean", "masked_mean"), ("cls", "cls")):
        encoder = HuggingFaceEncoder(bert(case), prefix=(101,), skip_first=True, pooling=pooling)
        mine = encoder.encode([chunks[number] for number in whole])
        torch.testing.assert_close(mine, data[name][whole], atol=1e-5, rtol=1e-5)


@pytest.fixture
def pipeline(golden_retro_e2e_training_wrapper, tmp_path):
    case = golden_retro_e2e_training_wrapper
    wanted = parameters(case)
    return case, wanted, build(case, tmp_path / "database", wanted["chunk_size"])


def test_whole_pipeline(pipeline):
    case, wanted, database = pipeline
    expected = np.load(case / "expected.npz")
    table = chunk_table(database, wanted["seq_len"])
    for mine, name in zip(table, ("chunks", "seqs", "doc_ids"), strict=True):
        np.testing.assert_array_equal(mine, expected[name])

    encoder = HuggingFaceEncoder(bert(case), prefix=(101,), skip_first=True)
    embeddings = embed_chunks(database, encoder, quiet=True)
    keys = embeddings.load_keys()
    torch.testing.assert_close(keys, torch.from_numpy(expected["embeddings"]), atol=1e-4, rtol=0)

    count = min(wanted["knn"] + wanted["knn_extra_neighbors"] + 1, len(database))
    scores, ids = ExactIndex(keys).search(keys, count)
    neighbours = filter_neighbours(ids.numpy(), -scores.numpy(), table.documents, wanted["knn"])
    same_or_tied(neighbours, expected["knn"], keys.numpy())
    items = OriginalDataset(table, expected["knn"], wanted["seq_len"])
    for number in range(len(items)):
        tokens, retrieved = items[number]
        np.testing.assert_array_equal(tokens, expected["item_seq"][number])
        np.testing.assert_array_equal(retrieved, expected["item_retrieved"][number])

    # while generating, the original puts an end token behind what it looks up, padding included
    asked = torch.from_numpy(np.pad(expected["query_chunks"], ((0, 0), (1, 1))))
    asked[:, 0], asked[:, -1] = 101, 102
    with torch.no_grad():
        states = bert(case)(asked, attention_mask=(asked != 0).long()).last_hidden_state
    queries = masked_mean(states, asked != 0, skip_first=True)
    found = ExactIndex(keys).search(queries, wanted["knn"]).ids.numpy()
    retrieved = retrieved_tokens(found, table.chunks)
    np.testing.assert_array_equal(retrieved, expected["query_retrieved"])

    # ours: the same neighbours wherever the surplus of the original was enough
    dense = DenseRetriever(database, encoder, embeddings, ExactIndex(keys))
    mine = build_neighbours(database, dense, k=wanted["knn"], quiet=True)
    enough = (neighbours >= 0).all(1)
    assert enough.any()
    same_or_tied(mine.ids[enough], neighbours[enough], keys.numpy(), rows=np.flatnonzero(enough))
    own = own_documents(database, np.arange(len(database)))
    first, end = own.first.numpy()[:, None], own.end.numpy()[:, None]
    assert not ((mine.ids >= first) & (mine.ids < end)).any()
    others = len(database) - (end - first)[:, 0]
    assert ((mine.ids >= 0).sum(1) == np.minimum(wanted["knn"], others)).all()


def same_or_tied(mine, expected, keys, rows=None):
    rows = np.arange(len(mine)) if rows is None else rows
    for row, column in zip(*np.nonzero(mine != expected), strict=True):
        pair = (int(mine[row, column]), int(expected[row, column]))
        assert min(pair) >= 0
        near = [float(((keys[rows[row]] - keys[number]) ** 2).sum()) for number in pair]
        assert abs(near[0] - near[1]) < 1e-4


def test_files_of_the_original(golden_retro_e2e_training_wrapper):
    case = golden_retro_e2e_training_wrapper
    wanted, expected = parameters(case), np.load(case / "expected.npz")
    files = read_retro_files(case)
    assert files.chunks.shape[1] == wanted["chunk_size"] + 1
    for mine, name in zip(files, ("chunks", "seqs", "doc_ids", "knn", "embeddings"), strict=True):
        np.testing.assert_allclose(mine, expected[name], atol=1e-4)


def test_importing_the_original(pipeline, tmp_path):
    case, wanted, database = pipeline
    tokenizer = bert_tokenizer(case)
    mine, table = import_retro_data(case, tmp_path / "imported", tokenizer)
    assert table is not None
    np.testing.assert_array_equal(mine.offsets, database.offsets)
    for number in range(mine.documents):
        np.testing.assert_array_equal(mine.document(number), database.document(number))
    expected = np.load(case / "expected.npz")
    np.testing.assert_array_equal(table.ids, expected["knn"])
    again = chunk_table(mine, wanted["seq_len"])
    items = OriginalDataset(again, table.ids, wanted["seq_len"])
    for number in range(len(items)):
        np.testing.assert_array_equal(items[number][0], expected["item_seq"][number])
        np.testing.assert_array_equal(items[number][1], expected["item_retrieved"][number])
    with pytest.raises(InputError, match=r"chunk_size must be \d+, as the sizes"):
        read_retro_files(case, chunk_size=wanted["chunk_size"] + 3)
    with pytest.raises(InputError, match="new or empty directory"):
        import_retro_data(case, mine.path, tokenizer)
