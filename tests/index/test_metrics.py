"""Every bad argument of the room is one sentence that says what came and what to do."""

import pytest
import torch

from index.stores import normal
from memlm.core.errors import InputError
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex, faiss_threads
from memlm.index.keys import TensorKeys
from memlm.index.metrics import prepare_keys, prepare_queries
from memlm.index.plan import IndexConfig, plan_index
from memlm.index.recall import measure_recall

KEYS = normal(50, 8)
ZERO = torch.cat([KEYS[:3], torch.zeros(1, 8)])
INFINITE = torch.cat([KEYS[:2], torch.full((1, 8), torch.inf)])


def flat(keys=KEYS):
    return build_index(keys, IndexConfig(type="flat", recall_queries=0))


class Short(TensorKeys):
    def blocks(self, rows, /):
        yield from list(super().blocks(rows))[:-1]


class Reversed(TensorKeys):
    def blocks(self, rows, /):
        yield from reversed(list(super().blocks(10)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ExactIndex(KEYS, "l3"), r"metric must be one of l2, ip, cosine, got 'l3'.*'l2'"),
        (lambda: ExactIndex(KEYS, "cosin"), "did you mean 'cosine'"),
        (lambda: ExactIndex(KEYS[:0]), "at least one key.*empty store"),
        (lambda: ExactIndex(KEYS.long()), r"floating point.*\(50, 8\) of torch.int64"),
        (lambda: ExactIndex(KEYS[0]), r"keys must be .*\(8,\)"),
        (lambda: ExactIndex(ZERO, "cosine"), r"non-zero vectors, but 1 are zero \(first: key 3\)"),
        (lambda: ExactIndex(INFINITE), r"finite, but 1 are not \(first: key 2\)"),
        (lambda: ExactIndex(Short(KEYS)), "must yield all 50 keys, got 0"),
        (lambda: ExactIndex(Reversed(KEYS)), "must follow each other.*at key 40 after 0"),
        (lambda: ExactIndex(KEYS).search(KEYS, 0), "k must be at least 1, got 0"),
        (lambda: ExactIndex(KEYS).search(KEYS[:, :7], 1), r"\(queries, 8\).*got \(50, 7\)"),
        (lambda: ExactIndex(KEYS).search(KEYS[0], 1), r"\(queries, 8\).*got \(8,\)"),
        (lambda: ExactIndex(KEYS).search(INFINITE, 1), "queries must be finite, but 1 of 3"),
        (lambda: ExactIndex(KEYS, "cosine").search(ZERO, 1), r"first: query 3"),
        (lambda: flat().search(KEYS, -1), "k must be at least 1, got -1"),
        (lambda: flat().search(KEYS[:, :7], 1), r"\(queries, 8\).*got \(50, 7\)"),
        (lambda: flat().search(INFINITE, 1), "queries must be finite"),
        (lambda: flat().reconstruct(torch.tensor([0, 50])), "between 0 and 49, got 0 to 50"),
        (lambda: flat().reconstruct(torch.tensor([-1])), "between 0 and 49, got -1"),
        (lambda: FaissIndex(flat()._index, "ip"), "made for metric l2, got 'ip'"),
        (lambda: FaissIndex(flat()._index, nprobe=0), "nprobe must be at least 1, got 0"),
        (lambda: faiss_threads(0).__enter__(), "threads must be at least 1, got 0"),
        (lambda: build_index(KEYS[:0]), "at least one key"),
        (lambda: plan_index(0, 8, IndexConfig()), "at least one key"),
        (lambda: IndexConfig(type="ivfqp"), "index type must be one of .*got 'ivfqp'.*'ivfpq'"),
        (lambda: IndexConfig(metric="dot"), "metric must be one of"),
        (lambda: IndexConfig(lists=0), "lists must be at least 1, got 0"),
        (lambda: IndexConfig(recall_queries=-1), "recall_queries must be at least 0"),
        (lambda: IndexConfig(type="flat", factory="SQ8"), "a type or a factory string"),
        (lambda: build_index(KEYS, IndexConfig(factory="FOO")), "could not parse.* FOO"),
        (lambda: build_index(KEYS, IndexConfig(factory="IVF4,PQ3")), "8 dimensions.*multiple"),
        (
            lambda: build_index(ZERO, IndexConfig(type="flat", metric="cosine")),
            "non-zero vectors.*first: key 3",
        ),
        (lambda: build_index(INFINITE, IndexConfig(type="flat")), "keys must be finite.*key 2"),
        (lambda: measure_recall(flat(), KEYS, 0), "k must be at least 1"),
    ],
)
def test_a_bad_argument_is_refused_by_name(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_queries_become_float32_and_float64_stays(dtype):
    assert prepare_queries(KEYS.to(dtype), 8, "l2").dtype == torch.float32
    assert prepare_queries(KEYS.double(), 8, "l2").dtype == torch.float64
    assert prepare_queries(KEYS.double(), 8, "l2", torch.float32).dtype == torch.float32


def test_cosine_scales_keys_and_queries_to_length_one():
    for scaled in (prepare_queries(KEYS, 8, "cosine"), prepare_keys(KEYS, "cosine")):
        torch.testing.assert_close(scaled.norm(dim=-1), torch.ones(50))
