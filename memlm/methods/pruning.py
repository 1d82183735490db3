"""A smaller datastore that says nearly the same (He et al. 2021, "Efficient Nearest Neighbor
Language Models", section 4.3).

    for each entry, in a seeded order     its k nearest entries with the same next token join it
    the survivors                         keys and values as before, weight = entries they stand for
    p(y) ~ sum over neighbours j with value y of   weight_j exp(score_j / temperature)

The parts: `nearest_entries` searches, `greedy_merge` decides, `prune` writes.
"""

from pathlib import Path

from memlm.core.threads import torch_threads
from memlm.index.greedy import greedy_merge, nearest_entries
from memlm.memory.knn import KnnMemory
from memlm.store.reader import Datastore
from memlm.store.rewrite import prune


def prune_store(
    store: Datastore,
    out: str | Path,
    *,
    neighbours: int = 9,
    seed: int = 1,
    threads: int | None = None,
    quiet: bool = False,
) -> Datastore:
    """Merge entries with their nearest neighbours of the same value; keep the survivors.

    Args:
        store: full; the index saved with it is searched, else every key is compared.
        out: a new or empty directory.
        neighbours: that an entry may absorb; the published code has 9.
        seed: of the order in which entries are visited.
        threads: CPU threads; None: as they are.
        quiet: show no progress bar.

    Raises:
        InputError: if the store is pruned already or has deleted documents.
        StoreError: if the directory cannot be written or holds something else.
    """
    memory = KnnMemory(store, k=min(neighbours + 1, len(store)))
    with torch_threads(threads):
        near = nearest_entries(memory.index, store, neighbours + 1, quiet=quiet)
    merge = greedy_merge(store.values, near, neighbours, seed=seed)
    return prune(store, merge.parent, merge.weights, out)
