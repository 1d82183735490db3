import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memlm.retrieval.build as build
from memlm.core.errors import (
    CorruptStoreError,
    FingerprintError,
    InputError,
    StoreError,
)
from memlm.data.documents import Document
from memlm.data.fingerprint import tokenizer_hash
from memlm.data.tokens import tokenize
from memlm.retrieval.build import append_documents, build_chunks, delete_documents, plan_chunks
from memlm.retrieval.chunks import MANIFEST, ChunkConfig, ChunkDatabase
from tests.retrieval.texts import database, documents

SMALL = 200  # characters per segment: several segments of a few documents


def files(path):
    return {
        entry.name: entry.read_bytes() for entry in sorted(path.iterdir()) if entry.name != "locks"
    }


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(lambda n: max(n) > 0),
    chunk_size=st.integers(1, 9),
)
def test_chunks_are_slices_of_their_documents(lengths, chunk_size, tokenizer, tmp_path_factory):
    texts = [Document(str(i), "cat " * length) for i, length in enumerate(lengths)]
    path = tmp_path_factory.mktemp("chunks")
    there = database(path, tokenizer, texts, chunk_size, segment_characters=50)
    corpus = tokenize(texts, tokenizer, progress=False)
    np.testing.assert_array_equal(there.offsets, corpus.offsets)
    for number in range(there.documents):
        whole = corpus.tokens[corpus.offsets[number] : corpus.offsets[number + 1]]
        np.testing.assert_array_equal(there.document(number), whole)
        chunks = range(there.chunk_offsets[number], there.chunk_offsets[number + 1])
        assert len(chunks) == -(-len(whole) // chunk_size)
        for place, chunk in enumerate(chunks):
            start = place * chunk_size
            np.testing.assert_array_equal(there.chunk(chunk), whole[start : start + chunk_size])
            tokens, valid = there.gather(np.array([chunk]))
            np.testing.assert_array_equal(
                tokens[0, valid[0]], whole[start : start + 2 * chunk_size]
            )
            assert not tokens[0, ~valid[0]].any()
            assert there.document_of(chunk) == number


def test_no_chunk_is_all_padding(tokenizer, tmp_path):
    there = database(tmp_path, tokenizer)
    tokens, valid = there.gather(np.array([[-1, 0]]))
    assert tokens.shape == (1, 2, 16)
    assert not valid[0, 0].any()
    assert valid[0, 1].any()


@pytest.mark.parametrize("step", range(8))
def test_a_killed_build_goes_on_to_the_same_bytes(step, tokenizer, tmp_path, monkeypatch):
    whole = database(tmp_path / "whole", tokenizer, segment_characters=SMALL)
    assert len(whole.segments) >= 3
    calls = {"count": 0}
    for name in ("write_atomic", "write_json"):
        real = getattr(build, name)

        def dying(*arguments, real=real):
            if calls["count"] == step:
                raise KeyboardInterrupt
            calls["count"] += 1
            return real(*arguments)

        monkeypatch.setattr(build, name, dying)
    with pytest.raises(KeyboardInterrupt):
        database(tmp_path / "killed", tokenizer, segment_characters=SMALL)
    monkeypatch.undo()
    resumed = database(tmp_path / "killed", tokenizer, segment_characters=SMALL)
    assert files(whole.path) == files(resumed.path)
    assert resumed.verify() == []


def test_what_is_finished_is_not_tokenised_again(tokenizer, tmp_path, monkeypatch):
    database(tmp_path, tokenizer)
    monkeypatch.setattr(build, "tokenize", lambda *_, **__: pytest.fail("tokenised again"))
    database(tmp_path, tokenizer)


def test_changes_are_found(tokenizer, tmp_path):
    database(tmp_path, tokenizer)
    with pytest.raises(FingerprintError, match="chunk_size is 4 here and 8 there"):
        database(tmp_path, tokenizer, chunk_size=4)
    changed = [*documents()[:-1], Document("doc-5", "another text")]
    with pytest.raises(FingerprintError, match=r"1 documents are new or changed and 1 are not"):
        database(tmp_path, tokenizer, changed)
    again = database(tmp_path, tokenizer, changed, chunk_size=4, rebuild=True)
    assert again.chunk_size == 4
    with pytest.raises(FingerprintError, match="must be of the tokenizer in use"):
        ChunkDatabase.open(tmp_path, tokenizer_hash="another")
    assert again.tokenizer_hash == tokenizer_hash(tokenizer)


def test_appending_keeps_what_is_there(tokenizer, tmp_path):
    texts = documents(8)
    old = database(tmp_path, tokenizer, texts[:5])
    new = append_documents(tmp_path, texts[3:], tokenizer, quiet=True)
    assert new.names == [text.name for text in texts]
    assert len(new.segments) == 2
    assert new.fingerprint != old.fingerprint
    for chunk in range(len(old)):
        np.testing.assert_array_equal(new.chunk(chunk), old.chunk(chunk))
    with pytest.raises(InputError, match="'doc-0' is in the database with another text"):
        append_documents(tmp_path, [Document("doc-0", "other")], tokenizer, quiet=True)
    assert ChunkDatabase.open(tmp_path).documents == 8


def test_deleting_and_adding_again(tokenizer, tmp_path):
    texts = documents()
    there = database(tmp_path, tokenizer, texts)
    less = delete_documents(tmp_path, ["doc-2"])
    first, end = there.chunk_offsets[2:4]
    np.testing.assert_array_equal(np.flatnonzero(less.dead_chunks()), np.arange(first, end))
    assert len(less) == len(there)
    with pytest.raises(InputError, match="'doc-9' is not in"):
        delete_documents(tmp_path, ["doc-9"])
    more = append_documents(tmp_path, [texts[2]], tokenizer, quiet=True)
    assert more.names[-1] == "doc-2"
    assert not more.deleted[-1]
    assert more.deleted[2]


def test_an_interrupted_append_refuses_other_texts(tokenizer, tmp_path, monkeypatch):
    texts = documents(8)
    database(tmp_path, tokenizer, texts[:4])
    real = build.write_json

    def dying(path, value):
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(build, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        append_documents(tmp_path, texts[4:], tokenizer, quiet=True)
    monkeypatch.undo()
    assert ChunkDatabase.open(tmp_path).documents == 4
    with pytest.raises(FingerprintError, match="interrupted with"):
        append_documents(tmp_path, [Document("new", "a story")], tokenizer, quiet=True)
    assert append_documents(tmp_path, texts[4:], tokenizer, quiet=True).documents == 8


def test_planning_reads_and_writes_nothing(tokenizer):
    plan = plan_chunks(documents(), tokenizer, ChunkConfig(8))
    assert plan.documents == 6
    assert abs(plan.tokens - sum(len(t.text.split()) + 2 for t in documents())) <= 1
    assert "chunks of 8" in plan.text


def test_damage_is_found(tokenizer, tmp_path):
    there = database(tmp_path, tokenizer)
    name = there.segments[0].token_file
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    assert there.verify() == [f"{there.path / name} was altered"]
    (tmp_path / name).write_bytes(data[:-30])
    with pytest.raises(CorruptStoreError, match="restore it from a copy"):
        ChunkDatabase.open(tmp_path)
    (tmp_path / name).unlink()
    assert there.verify() == [f"{there.path / name} is missing"]


def test_wrong_places(tokenizer, tmp_path):
    with pytest.raises(StoreError, match="holds none"):
        ChunkDatabase.open(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds notes\.txt"):
        database(tmp_path, tokenizer)
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(InputError, match="chunk_size must be at least 1"):
        ChunkConfig(0)
    there = database(tmp_path / "database", tokenizer)
    with pytest.raises(InputError, match="a chunk's number must lie between 0 and"):
        there.chunk(len(there))
    with pytest.raises(InputError, match="numbers below"):
        there.gather(np.array([len(there)]))
    with pytest.raises(InputError, match="at least one document"):
        build_chunks([], tokenizer, tmp_path / "empty", quiet=True)
