"""A token's probability is the model's part and that of its sources, which are real places."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

import memlm
from memlm.core.errors import InputError, StoreError
from memlm.core.merges import Gate, Mixture, Shares, Union
from memlm.data.documents import read_documents
from memlm.data.tokens import tokenize
from memlm.data.windows import SlidingWindows
from memlm.explain.provenance import explain_tokens
from memlm.explain.report import table, to_values, write_page
from memlm.extract.build import build_datastore
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.together import Together
from memlm.models.attach import attach
from memlm.testing.tiny import tiny_model

TEXTS = [
    "the cat sat on the mat and the dog sat on the log",
    "a story about memory it was told once more",
    "the dog sat on the mat and the story was told once more",
]
LINE = "the dog sat on the log and the cat was told once more"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def store(model, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("explain") / "store"
    return build_datastore(model, tokenizer, TEXTS, out, windows=SlidingWindows(16, 8))


@pytest.fixture(scope="module")
def line(tokenizer):
    return tokenizer(LINE, return_tensors="pt").input_ids[0]


def memories(store):
    knn = KnnMemory(store, k=6, temperature=20.0)
    local = LocalMemory(size=4, temperature=1.0)
    return {
        "mixture": (knn, Mixture(0.3), None),
        "off": (knn, Mixture(0.0), (knn, Mixture(0.2))),
        "union": (local, Union(), None),
        "gate": (Together(local, knn), Gate(0.4, -0.7), None),
        "shares": (Together(knn, local, lams=(0.3, 0.2)), Shares(), None),
        "automaton": (AutomatonMemory(store, k=4, temperature=20.0), Mixture(0.6), None),
        "mixed in once more": (Together(local, knn), Union(), (knn, Mixture(0.4))),
    }


CASES = ("mixture", "off", "union", "gate", "shares", "automaton", "mixed in once more")


@pytest.mark.parametrize("case", CASES)
def test_parts_sum_to_what_the_model_with_memory_says(model, store, line, case):
    memory, merge, interpolate = memories(store)[case]
    lm = attach(model, memory, merge=merge, interpolate=interpolate)
    found = explain_tokens(lm, line, top=100)
    with torch.no_grad():
        alone = model(line[None]).logits[0].softmax(-1)
        merged = lm(line[None]).logits[0].softmax(-1)
    assert [one.place for one in found] == list(range(1, len(line)))
    shares = []
    for one in found:
        assert one.token == line[one.place]
        assert one.model == pytest.approx(float(alone[one.place - 1, one.token]), abs=1e-6)
        assert one.merged == pytest.approx(float(merged[one.place - 1, one.token]), abs=1e-5)
        assert one.merged == pytest.approx((1 - one.share) * one.model + one.proposed, abs=1e-9)
        assert one.proposed == pytest.approx(sum(source.mass for source in one.sources), abs=1e-9)
        everything = one.proposed + sum(mass for _, mass in one.others)
        assert everything == pytest.approx(one.share, abs=1e-9)
        assert one.token not in dict(one.others)
        shares.append(one.share)
    assert max(shares) > 0.05
    assert any(one.sources for one in found)


def test_a_source_is_where_the_store_says(model, store, tokenizer, line):
    corpus = tokenize(read_documents(TEXTS), tokenizer)
    lm = attach(model, KnnMemory(store, k=len(store), temperature=20.0))
    sources = [(one, source) for one in explain_tokens(lm, line, top=50) for source in one.sources]
    assert len(sources) > 20
    for one, source in sources:
        begin, end = corpus.offsets[source.document : source.document + 2]
        document = corpus.tokens[begin:end].tolist()
        assert document[source.position] == one.token
        scored_before = document[max(0, source.position - 12) : source.position]
        # the first token of a document is predicted from the begin token only where there is one
        assert source.before == tuple(scored_before[len(scored_before) - len(source.before) :])
        assert len(source.before) >= len(scored_before) - 1


def test_a_source_in_the_text_itself(model, line):
    lm = attach(model, LocalMemory(size=20, temperature=4.0), merge=Union())
    found = explain_tokens(lm, line, context=3)
    # a token's sources are all its earlier occurrences, but the very first token's
    earlier = [line[1:place].tolist().count(line[place]) for place in range(1, len(line))]
    assert [len(one.sources) for one in found] == earlier
    for one in found:
        for source in one.sources:
            assert source.document is None
            assert source.position < one.place
            assert line[source.position] == one.token
            before = line[max(0, source.position - 3) : source.position]
            assert source.before == tuple(before.tolist())


def test_a_memory_inside_another_claims_no_places(model, store, line):
    knn = KnnMemory(store, k=6, temperature=20.0)
    inner = Together(LocalMemory(size=4, temperature=1.0), knn)
    found = explain_tokens(attach(model, Together(inner, knn), merge=Union()), line)
    sources = [source for one in found for source in one.sources]
    assert {source.memory for source in sources} == {"together", "knn"}
    for source in sources:
        assert (source.document is None) == (source.memory == "together")


def test_a_pruned_store_shows_no_text_that_it_does_not_have(model, store, line, tmp_path):
    pruned = memlm.prune_store(store, tmp_path / "pruned", neighbours=4, quiet=True)
    lm = attach(model, KnnMemory(pruned, k=len(pruned), temperature=20.0))
    found = [source for one in explain_tokens(lm, line, top=50) for source in one.sources]
    assert found
    documents, positions = pruned.documents, pruned.positions
    for source in found:
        run = range(source.entry - len(source.before), source.entry)
        assert all(documents[entry] == source.document for entry in run)
        assert [int(positions[entry]) for entry in run] == list(
            range(source.position - len(source.before), source.position)
        )


@pytest.mark.gpu
def test_a_model_on_a_gpu_and_a_memory_that_is_not(store, line):
    memory = Together(LocalMemory(size=4, temperature=1.0), KnnMemory(store, k=6, temperature=20.0))
    here, there = (
        explain_tokens(attach(tiny_model("llama").to(device), memory, merge=Union()), line)
        for device in ("cpu", "cuda")
    )
    for one, other in zip(here, there, strict=True):
        assert other.token == one.token
        assert other.merged == pytest.approx(one.merged, abs=1e-4)


def test_only_the_last_tokens(model, store, line, monkeypatch):
    reads = []
    for kind in (KnnMemory, LocalMemory):
        read = kind.read
        monkeypatch.setattr(kind, "read", lambda *given, f=read: reads.append(1) or f(*given))
    # an automaton has to read on its way, the others only what is asked for
    for case, expected in (("mixture", 4), ("union", 4), ("mixed in once more", 12)):
        memory, merge, interpolate = memories(store)[case]
        lm = attach(model, memory, merge=merge, interpolate=interpolate)
        reads.clear()
        last = explain_tokens(lm, line, first=9)
        assert len(reads) == expected
        assert last == explain_tokens(lm, line)[8:]
    lm = attach(model, memories(store)["automaton"][0])
    assert explain_tokens(lm, line, first=9) == explain_tokens(lm, line)[8:]


def test_bad_inputs(model, store, line):
    lm = attach(model, KnnMemory(store, k=4))
    with pytest.raises(InputError, match="first must be one of the tokens 1 to"):
        explain_tokens(lm, line, first=0)
    for short in (line[:1], line[:0], line[None]):
        with pytest.raises(InputError, match="one text of at least 2 tokens"):
            explain_tokens(lm, short)
    with pytest.raises(InputError, match="top must be at least 1, got 0"):
        explain_tokens(lm, line, top=0)
    with pytest.raises(InputError, match="context must not be negative"):
        explain_tokens(lm, line, context=-1)
    with pytest.raises(InputError, match="must not be longer than the model's 128 positions"):
        explain_tokens(lm, line.repeat(20))


def test_what_a_person_sees(model, store, tokenizer, line, tmp_path, monkeypatch):
    lm = attach(model, KnnMemory(store, k=8, temperature=20.0))
    found = explain_tokens(lm, line)
    page = write_page(found[2:], line, tokenizer, tmp_path / "new" / "page.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<aside>") == len(found) - 2
    assert "<main>the dog sat<span" in text
    body = re.sub(r"<aside>.*?</aside>", "", text[text.index("<main>") :], flags=re.DOTALL)
    assert re.sub(r"<[^>]*>", "", body).strip() == LINE
    assert "http" not in text  # loads nothing
    assert table(found, tokenizer).row_count == len(found)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_: "[/INST] [bold]")
    printed = io.StringIO()
    Console(file=printed, width=200).print(table(found, tokenizer))
    assert "'[/INST] [bold]'" in printed.getvalue()
    monkeypatch.undo()
    values = to_values(found, tokenizer)
    assert values[0]["text"] == tokenizer.decode([found[0].token])
    assert_close(values[3]["merged"], found[3].merged)
    assert "&lt;eos&gt;" in write_page(
        explain_tokens(lm, torch.tensor([2, 1, 3])), torch.tensor([2, 1, 3]), tokenizer, page
    ).read_text(encoding="utf-8")
    with pytest.raises(StoreError):
        write_page(found, line, tokenizer, page / "page.html")
