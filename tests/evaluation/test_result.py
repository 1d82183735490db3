import dataclasses
import json

import numpy as np
import pytest

from memlm.core.errors import CorruptStoreError, InputError
from memlm.core.merges import Mixture
from memlm.evaluation.result import DocumentSums, Evaluation, Seconds, WindowSums

PROTOCOL = {
    "windows": {"kind": "SlidingWindows", "length": 8, "stride": 4},
    "windows_line": "sliding windows of 8 tokens",
    "scored": {"tokens": 9, "documents": 2, "begin_tokens": 0, "left_out": 3},
    "begin_token": None,
    "memory": None,
    "merge": None,
    "state": None,
}


def evaluation(nll=(10.0, 6.0, 0.0), tokens=(5, 4, 0), unscored=(1, 1, 1), **changes):
    values = {
        "protocol": PROTOCOL,
        "documents": DocumentSums(
            names=("a", "b", "c"),
            nll=nll,
            tokens=tokens,
            unscored=unscored,
            bytes=(20, 11, 7),
            words=(4, 2, 1),
            characters=(20, 10, 7),
        ),
        "windows": WindowSums(nll=(7.0, 3.0, 6.0), tokens=(4, 1, 4)),
        "seconds": Seconds(model=1.0, memory=0.5, total=2.0),
        "model": {"name": "tiny", "hash": "x"},
        "corpus": {"hash": "h", "begin_token": None},
        "versions": {"python": "3"},
    }
    return Evaluation(**{**values, **changes})


def test_headline_numbers():
    got = evaluation()
    assert got.tokens == 9
    assert got.perplexity == pytest.approx(np.exp(16 / 9))
    # Document c has text but nothing was scored: its bytes and words do not count.
    assert got.bits_per_byte == pytest.approx(16 / np.log(2) / 31)
    assert got.word_perplexity == pytest.approx(np.exp(16 / 6))
    assert got.whole_documents == 2
    assert got.tokens_per_second == pytest.approx(4.5)


def test_documents_scored_in_part_do_not_count_per_byte():
    got = evaluation(unscored=(1, 2, 1))
    assert got.whole_documents == 1
    assert got.bits_per_byte == pytest.approx(10 / np.log(2) / 20)
    assert got.word_perplexity == pytest.approx(np.exp(10 / 4))


def test_with_begin_tokens_the_first_token_must_be_scored():
    got = evaluation(unscored=(0, 1, 1), corpus={"hash": "h", "begin_token": 1})
    assert got.whole_documents == 1
    assert (
        evaluation(unscored=(1, 1, 1), corpus={"hash": "h", "begin_token": 1}).bits_per_byte is None
    )


def test_unknown_sizes_give_no_number():
    sums = DocumentSums(names=("a",), nll=(3.0,), tokens=(2,), unscored=(1,))
    got = evaluation(documents=sums)
    assert got.bits_per_byte is None
    assert got.word_perplexity is None


def test_hardly_any_words_give_infinity_not_an_overflow():
    sums = DocumentSums(names=("a",), nll=(5000.0,), tokens=(900,), unscored=(1,), words=(1,))
    got = evaluation(documents=sums)
    assert got.word_perplexity == np.inf
    assert got.summary()["word_perplexity"] is None


def test_trainer_perplexity_weighs_windows_not_tokens():
    got = evaluation()
    # Batches of two: windows 0 and 1 together, window 2 alone.
    assert got.trainer_perplexity(2) == pytest.approx(np.exp((2 * 10 / 5 + 6 / 4) / 3))
    assert got.trainer_perplexity(1) == pytest.approx(np.exp((7 / 4 + 3 + 6 / 4) / 3))
    assert got.trainer_perplexity(3) == pytest.approx(got.perplexity)
    with pytest.raises(InputError, match="batch_size must be at least 1 window, got 0"):
        got.trainer_perplexity(0)


def test_json_round_trip(tmp_path):
    got = evaluation(token_log_probabilities=np.zeros(9))
    path = tmp_path / "evaluation.json"
    got.save(path)
    again = Evaluation.load(path)
    assert again == got
    assert again.token_log_probabilities is None
    assert again.to_dict() == got.to_dict()
    written = json.loads(path.read_text())
    assert written["summary"]["perplexity"] == got.perplexity
    assert written["summary"]["interval"]["documents"] == 2
    assert written["format_version"] == 1


def test_one_document_says_so():
    sums = DocumentSums(names=("a",), nll=(3.0,), tokens=(2,), unscored=(1,))
    got = evaluation(documents=sums)
    assert got.interval() is None
    assert got.summary()["interval"] == "one document: no interval"
    assert got.compare(got).describe() == "ratio 1.0000 (one document: no interval)"


def test_comparison_is_paired():
    base = evaluation()
    better = evaluation(nll=tuple(np.array([10.0, 6.0, 0.0]) - 0.1 * np.array([5, 4, 0])))
    got = better.compare(base)
    assert got.ratio == pytest.approx(np.exp(-0.1))
    assert (got.low, got.high) == pytest.approx((np.exp(-0.1),) * 2)
    assert got.documents == 2
    assert got.describe() == "ratio 0.9048 (95% interval 0.9048 to 0.9048 over 2 documents)"


def test_what_cannot_be_compared():
    other = evaluation(corpus={"hash": "i", "begin_token": None})
    with pytest.raises(InputError, match="the same corpus, got h and i"):
        evaluation().compare(other)
    with pytest.raises(InputError, match="scored the same tokens, got 9 and 8"):
        evaluation().compare(evaluation(tokens=(4, 4, 0)))


def test_refusals(tmp_path):
    with pytest.raises(CorruptStoreError, match="must exist"):
        Evaluation.load(tmp_path / "none.json")
    values = evaluation().to_dict()
    del values["corpus"], values["documents"]
    with pytest.raises(InputError, match="corpus, documents is missing"):
        Evaluation.from_dict(values)
    with pytest.raises(InputError, match="newer than this memlm"):
        Evaluation.from_dict({**evaluation().to_dict(), "format_version": 2})
    with pytest.raises(InputError, match="those of a Mixture"):
        Evaluation.from_dict({**evaluation().to_dict(), "kind": "Mixture"})
    with pytest.raises(InputError, match=r"tokens must have one entry per document \(3\), got 1"):
        evaluation(tokens=(9,))
    with pytest.raises(InputError, match="at least one scored token"):
        evaluation(tokens=(0, 0, 0))


MEMORY = {"memory": "knn", "k": 64, "temperature": 2.5}


@pytest.mark.parametrize(
    ("memory", "merge", "expected"),
    [
        (None, None, "memory off"),
        (
            {**MEMORY, "index": {"engine": "exact", "recall": {"value": 1.0}}},
            Mixture(0.25),
            "memory knn k=64 temperature=2.5, exact search, mixture lam=0.25",
        ),
        (
            {
                **MEMORY,
                "index": {
                    "engine": "faiss",
                    "factory": "IVF16,PQ8",
                    "nprobe": 4,
                    "recall": {"k": 64, "queries": 1000, "value": 0.71, "source": "keys"},
                },
            },
            Mixture(0.5),
            "IVF16,PQ8 nprobe=4 recall@64 0.710 on 1,000 queries, mixture lam=0.5",
        ),
        (
            {**MEMORY, "index": {"engine": "faiss", "factory": "IVF16,PQ8", "recall": None}},
            Mixture(0.0),
            "IVF16,PQ8 recall not measured, mixture lam=0 (memory off)",
        ),
    ],
)
def test_the_line_says_what_the_memory_was(memory, merge, expected):
    protocol = {**PROTOCOL, "memory": memory, "merge": None if merge is None else merge.to_dict()}
    line = dataclasses.replace(evaluation(), protocol=protocol).describe()
    assert line.startswith(
        "sliding windows of 8 tokens; 9 tokens of 2 documents scored once, 3 left out, "
        "no begin token; token-weighted, natural log; "
    )
    assert line.endswith(expected)
