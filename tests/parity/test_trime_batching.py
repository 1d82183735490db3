"""Batches and their order against TRIME's fork of fairseq and its BM25 script."""

import json
from itertools import pairwise

from memlm.data.lexical import greedy_chain, read_neighbours, read_order
from memlm.data.streams import deal, pack


def test_batches_by_size(golden_trime_batching_iterators):
    recorded = json.loads((golden_trime_batching_iterators / "iterators.json").read_text())
    for case in recorded["batch_by_size"]:
        batches = pack(
            case["sizes"],
            case["indices"],
            max_tokens=case["max_tokens"],
            max_rows=case["max_sentences"],
            multiple=case["mult"],
        )
        assert batches == case["batches"]


def test_order_of_an_epoch(golden_trime_batching_iterators):
    recorded = json.loads((golden_trime_batching_iterators / "iterators.json").read_text())
    iterator = recorded["epoch_iterator"]
    batches, checked = iterator["frozen_batches"], set()
    for case in iterator["cases"]:
        by = "streams" if case["keep_order"] else "shuffled"
        by = "grouped" if case["predefined_batches"] else by
        for name, expected in case["batches"].items():
            epoch, rank = (int(part.strip("epochrank")) for part in name.split("."))
            plan = deal(
                len(batches),
                by=by,
                ranks=case["world"],
                seed=iterator["seed"],
                epoch=epoch,
                ranks_per_stream=case["num_comb_shards"],
                legacy_short_group=True,
            )
            assert [batches[n] if n >= 0 else [] for n in plan[:, rank]] == expected
            checked.add(by)
    assert checked


def shards(folder):
    return sorted(folder.glob("shard*.json"), key=lambda path: int(path.stem[5:]))


def test_chains(golden_trime_bm25_batches):
    folder = golden_trime_bm25_batches
    legacy = read_neighbours(shards(folder), legacy_string_ids=True, legacy_first_is_self=True)
    recorded = json.loads((folder / "batches.json").read_text())
    assert greedy_chain(legacy).tolist() == recorded
    assert read_order(folder / "batches.json", len(legacy)).tolist() == recorded


def test_the_chain_goes_to_neighbours_whether_numbers_or_strings(golden_trime_bm25_batches):
    """What the script was meant to do: the best neighbour that was not visited, if there is one."""
    neighbours = read_neighbours(shards(golden_trime_bm25_batches))
    chain, visited, followed = greedy_chain(neighbours).tolist(), set(), 0
    for block, following in pairwise(chain):
        visited.add(block)
        if left := [other for other in neighbours[block] if other not in visited]:
            assert following == left[0]
            followed += 1
    assert followed > 0
