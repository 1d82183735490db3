"""The automaton's step against a loop over entries, and RetoMaton against kNN-LM, step by step.

The step: one `observe` and one `read` that follows pointers and their clusters to 1024 entries, no
search; the plain automaton does the same work, one entry at a time, and must find the same.

The walk: a store of a synthetic text (a key is a mixture of the last tokens' vectors and noise, so
contexts recur and continue alike), and further text of the same kind as queries, one token at a
time as in generation. Milliseconds per token of kNN-LM (a search at every token) and of RetoMaton
(`min_knns=1`), with the fraction of searches saved and the wall-clock ratio of the two in turn.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch

from benchmarks.common import paired, save
from memlm.core.types import Index
from memlm.index.build import build_index, load_index
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex
from memlm.index.plan import IndexConfig
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.methods.knn_lm import index_store
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore
from memlm.testing.automaton import PlainAutomaton

DIM, VOCABULARY, NEIGHBOURS = 256, 512, 1024
CONTEXT = (1.0, 0.6, 0.35, 0.2)  # weights of the last tokens in a key
MOST_CLUSTERS, MOST_LISTS = 4000, 4096  # k-means of more takes hours on two cores


class Text:
    """Random text in which every pair of tokens has a few likely continuations.

    ``drawn`` is the seed of the text; the language is always the same.
    """

    def __init__(self, drawn: int = 1):
        self.generator = torch.Generator().manual_seed(0)
        shape = (VOCABULARY, VOCABULARY, 4)
        self.next = torch.randint(0, VOCABULARY, shape, generator=self.generator)
        self.choice = torch.tensor([0.6, 0.25, 0.1, 0.05])
        self.vectors = torch.randn(len(CONTEXT), VOCABULARY, DIM, generator=self.generator)
        self.generator.manual_seed(drawn)

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Random text ``(rows, length)``."""
        text = torch.randint(0, VOCABULARY, (rows, length), generator=self.generator)
        which = torch.multinomial(
            self.choice, rows * length, replacement=True, generator=self.generator
        ).view(rows, length)
        for time in range(2, length):
            text[:, time] = self.next[text[:, time - 2], text[:, time - 1], which[:, time]]
        return text

    def keys(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(rows, length, dim)`` at ``tokens``."""
        keys = torch.zeros(*tokens.shape, DIM)
        for back, weight in enumerate(CONTEXT):
            shifted = tokens.roll(back, dims=1)
            keys += weight * self.vectors[back, shifted]
        noise = torch.randn(keys.shape, generator=self.generator)
        return (keys + 0.1 * noise) / DIM**0.5


def make_store(folder: Path, text: Text, entries: int) -> Datastore:
    documents = 100
    tokens = text.tokens(documents, entries // documents + 1)
    length = tokens.shape[1] - 1
    parts = [text.keys(row.unsqueeze(0))[0, :-1].half() for row in tokens]
    return save_arrays(
        folder,
        torch.cat(parts),
        tokens[:, 1:].reshape(-1),
        documents=torch.arange(documents).repeat_interleave(length),
        positions=torch.arange(1, length + 1).repeat(documents),
    )


def walk(memory: KnnMemory | AutomatonMemory, tokens, keys):
    state = memory.init_state(len(tokens))
    for time in range(keys.shape[1]):
        here = slice(time, time + 1)
        state = memory.observe(tokens[:, here], keys[:, here], state)  # type: ignore[arg-type]
        _, state = memory.score(keys[:, time], tokens[:, time + 1], state)  # type: ignore[arg-type]
    return state


def measure_step(rows: int, rounds: int, *, from_index: bool) -> dict:
    """One step of ``rows`` sequences against the plain automaton, row after row.

    Args:
        rows: sequences.
        rounds: of timing.
        from_index: keys are what an IVF-PQ index reconstructs, entry by entry in the plain
            automaton as in the published code; else the store's own (float16) in memory.
    """
    text = Text()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", text, 20_000)
        clusters = cluster_store(store, ClusterConfig(clusters=8), quiet=True)
        config = IndexConfig(type="ivfpq", lists=64, recall_queries=0)
        index = build_index(store, config, quiet=True) if from_index else "exact"
        memory = AutomatonMemory(
            store,
            k=NEIGHBOURS,
            min_knns=0,
            max_knns=NEIGHBOURS,
            index=index,
            scores="index" if from_index else "exact",
        )
        tokens = text.tokens(rows, 12)
        keys = text.keys(tokens)
        found = ExactIndex(store.load_keys()).search(keys[:, 7], NEIGHBOURS)
        # as after a search: what was found last, and the token that agreed with most of it
        token = store.values[found.ids].mode(dim=1).values.long().unsqueeze(1)
        state = memory.init_state(rows)._replace(entries=found.ids, scores=found.scores)
        before = [
            list(zip(ids.tolist(), scores.tolist(), strict=True))
            for ids, scores in zip(found.ids, found.scores, strict=True)
        ]
        plain = PlainAutomaton(
            Reconstructed(index) if isinstance(index, FaissIndex) else store.load_keys().numpy(),
            store.values.tolist(),
            memory._successors[:-1].tolist(),
            k=NEIGHBOURS,
            min_knns=0,
            max_knns=NEIGHBOURS,
            cluster_of=clusters.cluster_of.tolist(),
        )

        def vectorised():
            after = memory.observe(token, keys[:, 8:9], state)
            return memory.read(keys[:, 8], after)[0]

        def one_by_one():
            answers = []
            for row in range(rows):
                plain.retrieved = before[row]
                plain.observe(int(token[row]))
                answers.append(plain.read(keys[row, 8].numpy()))
            return answers

        mine, counts = vectorised(), []
        for row, answer in enumerate(one_by_one()):
            entries = mine.ids[row][mine.valid[row]].tolist()
            if sorted(entries) != sorted(entry for entry, _, _ in answer):
                raise AssertionError("both must do the same work")
            counts.append(len(entries))
        timing = paired(one_by_one, vectorised, rounds=rounds)
    return {
        "rows": rows,
        "keys": "reconstructed by the index" if from_index else "float16 in memory",
        "entries_per_row": sum(counts) / rows,
        "plain_milliseconds": 1000 * timing["first_seconds"],
        "vectorised_milliseconds": 1000 * timing["second_seconds"],
        "speed_up": timing["ratio"],
        **timing,
    }


class Reconstructed:
    """Keys as the published code gets them: from the index, one at a time."""

    def __init__(self, index: FaissIndex):
        index.reconstruct(torch.zeros(1, dtype=torch.int64))  # makes the direct map
        self.index = index._index

    def __getitem__(self, entry: int):
        return self.index.reconstruct(entry)


def measure_walk(
    store: Datastore,
    text: Text,
    index: Index,
    rows: int,
    length: int,
    rounds: int,
    clustered: bool,
) -> dict:
    automaton = AutomatonMemory(
        store, k=NEIGHBOURS, index=index, clusters="auto" if clustered else None
    )
    knn = KnnMemory(store, k=NEIGHBOURS, index=index)
    tokens = text.tokens(rows, length + 1)
    keys = text.keys(tokens)[:, :-1]
    timing = paired(
        lambda: walk(knn, tokens, keys), lambda: walk(automaton, tokens, keys), rounds=rounds
    )
    stats = automaton.stats(walk(automaton, tokens, keys))
    per_token = 1000 / (rows * length)
    return {
        "entries": len(store),
        "rows": rows,
        "clusters": len(automaton.clusters) if automaton.clusters else 0,
        "saved": stats["saved"],
        "knn_milliseconds": timing["first_seconds"] * per_token,
        "retomaton_milliseconds": timing["second_seconds"] * per_token,
        "speed_up": timing["ratio"],
        **timing,
    }


def prepare(folder: Path, entries: int, threads: int) -> Datastore:
    """A store with clusters and an IVF-PQ index, made once and kept in ``folder``."""
    if (folder / "index" / "index.json").exists():
        return Datastore.open(folder)
    store = make_store(folder, Text(), entries)
    clusters = min(entries // 500, MOST_CLUSTERS)
    config = ClusterConfig(clusters=clusters, sample=40 * clusters)
    cluster_store(store, config, threads=threads)
    lists = min(int(4 * entries**0.5), MOST_LISTS)
    index_store(
        store, IndexConfig(type="ivfpq", lists=lists, train_size=64 * lists), threads=threads
    )
    return store


def walks(
    store: Datastore, kinds: list[str], batches: list[int], length: int, rounds: int
) -> list[dict]:
    """kNN-LM against RetoMaton, by exact search or by the index of the store."""
    text, cases = Text(drawn=2), []
    for kind, rows, clustered in itertools.product(kinds, batches, (False, True)):
        index: Index = (
            ExactIndex(store.load_keys())
            if kind == "exact"
            else load_index(store.path / "index", store)
        )
        case = measure_walk(store, text, index, rows, length, rounds, clustered)
        cases.append({"index": kind, "recall": index.describe()["recall"]["value"], **case})
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    kinds = ["exact", "ivfpq"]
    parser.add_argument("--indexes", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--tokens", type=int, default=48, help="walked by each sequence")
    parser.add_argument("--name", default="automaton", help="of the file under results")
    parser.add_argument("--folder", type=Path, help="keep the stores here, and use those there are")
    parser.add_argument("--only-prepare", action="store_true", help="make the stores, time nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        stores = [
            prepare(folder / str(entries), entries, options.threads) for entries in options.entries
        ]
        if options.only_prepare:
            return
        steps = [
            measure_step(rows, 4 * options.rounds, from_index=from_index)
            for rows, from_index in itertools.product(options.batches, (False, True))
        ]
        cases = [
            case
            for store in stores
            for case in walks(
                store, options.indexes, options.batches, options.tokens, options.rounds
            )
        ]
    settings = {"dim": DIM, "k": NEIGHBOURS, "tokens": options.tokens}
    save(options.name, {**settings, "steps": steps, "walks": cases})


if __name__ == "__main__":
    main()
