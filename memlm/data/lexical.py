"""Similar text side by side: blocks ordered so that neighbours share rare words.

TRIME's external memory is trained on the other rows of a batch, so a batch should hold text that
will be found in a datastore later: blocks similar in BM25 (Zhong et al. 2022, section 4.2).

    1. `find_neighbours`  every block is a query against all; its k best blocks
    2. `greedy_chain`     from a random block to its best block not yet visited, and so on; where
                          none is left, to the next unvisited in a random order
    3. `data.streams`     consecutive blocks of the chain make a batch

A query is the block's rarest tokens, each once (`memlm.data.bm25`).

Differs from the paper's code: bm25s instead of Lucene (no stemming, no stop words: rare tokens
decide anyway); a block is left out of its own neighbours by number, not by being first; numbers
are integers (there, strings, which never match: the released script gives a plain shuffle).
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.files import write_atomic
from memlm.core.progress import bar
from memlm.data.bm25 import Blocks, BlockScores


def find_neighbours(
    blocks: Blocks,
    *,
    k: int = 20,
    query_terms: int = 256,
    k1: float = 0.9,
    b: float = 0.4,
    shard: int = 0,
    shards: int = 1,
    progress: bool = True,
) -> NDArray[np.int64]:
    """The most similar other blocks of every block, by BM25 over token numbers.

    Args:
        blocks: token numbers of each block.
        k: neighbours of each.
        query_terms: rarest tokens of a block that are looked up.
        k1: BM25's saturation of repeated tokens.
        b: BM25's normalisation by length.
        shard: which part of the blocks to look up, from 0.
        shards: how many parts there are.
        progress: show a bar for work over two seconds.

    Returns:
        ``(blocks of the shard, k)`` int64 in descending order of score, ties by lower number; -1
        where there are fewer that share a token.

    Raises:
        InputError: if there are no blocks or a number is out of range.
        MissingExtraError: without bm25s.
    """
    check(len(blocks) >= 2, f"grouping needs at least two blocks, got {len(blocks)}")
    check(k >= 1, f"k must be at least 1, got {k}")
    check(query_terms >= 1, f"query_terms must be at least 1, got {query_terms}")
    rows = shard_of(len(blocks), shard, shards)
    search = BlockScores(blocks, k1=k1, b=b).search(
        blocks[rows.start : rows.stop],
        k,
        query_terms=query_terms,
        fewest=2,  # tokens in this block alone say nothing of others
        without=[slice(number, number + 1) for number in rows],
    )
    found = [np.empty((0, k), np.int64)]
    with bar(len(rows), label="neighbours", unit="block", quiet=not progress) as shown:
        for part in search:
            found.append(part.numbers)
            shown.update(len(part.numbers))
    return np.concatenate(found)


def shard_of(blocks: int, shard: int, shards: int) -> range:
    """The numbers of the blocks that part ``shard`` of ``shards`` looks up."""
    check(
        0 <= shard < shards, f"shard must lie between 0 and {shards - 1} ({shards=}), got {shard}"
    )
    size = -(-blocks // shards)
    return range(min(shard * size, blocks), min((shard + 1) * size, blocks))


def greedy_chain(
    neighbours: NDArray[np.integer] | Sequence[Sequence[int]], *, seed: int = 1
) -> NDArray[np.int64]:
    """An order of all blocks in which each is followed by one of its best neighbours.

    Args:
        neighbours: of every block, best first; -1 for none. A block among its own is passed over.
        seed: of the first block and of where to go on when all neighbours were visited.

    Returns:
        ``(blocks,)`` int64, a permutation.

    Raises:
        InputError: if a neighbour is no block.
    """
    count = len(neighbours)
    check(count >= 1, "a chain needs at least one block, got none")
    flat = [int(block) for row in neighbours for block in row]
    check(
        not flat or (min(flat) >= -1 and max(flat) < count),
        f"neighbours must be numbers of the {count} blocks, or -1 for none; got "
        f"{min(flat, default=0)} to {max(flat, default=0)}",
    )
    order = list(range(count))
    random.Random(seed).shuffle(order)
    visited = np.zeros(count, bool)
    current, spare = order[0], 1
    chain = [current]
    visited[current] = True
    for _ in range(count - 1):
        following = next((n for n in neighbours[current] if n >= 0 and not visited[n]), None)
        if following is None:
            while visited[order[spare]]:
                spare += 1
            following = order[spare]
        current = int(following)
        visited[current] = True
        chain.append(current)
    return np.array(chain, np.int64)


def overlap(blocks: Blocks, order: NDArray[np.integer], group: int) -> float:
    """How much of a block can be found in the other blocks of its group.

    Args:
        blocks: token numbers of each block.
        order: in which blocks are read.
        group: consecutive blocks that share a memory.

    Returns:
        The share of all tokens that also occur in another block of the group, from 0 to 1. Tokens
        that stand in more than a tenth of all blocks do not count: every order has those.
    """
    check(group >= 2, f"a group must have at least 2 blocks, got {group}")
    distinct = [np.unique(block) for block in blocks]
    tokens, counts = np.unique(np.concatenate(distinct), return_counts=True)
    rare = tokens[counts <= max(2, len(blocks) // 10)]
    found = total = 0
    for start in range(0, len(order), group):
        members = [int(number) for number in order[start : start + group]]
        held, times = np.unique(np.concatenate([distinct[n] for n in members]), return_counts=True)
        shared = np.intersect1d(held[times > 1], rare)
        for number in members:
            counted = np.isin(blocks[number], rare)
            found += int(np.isin(blocks[number][counted], shared).sum())
            total += int(counted.sum())
    return found / max(1, total)


# -- files of TRIME's scripts --------------------------------------------------------------------


def read_neighbours(
    paths: Iterable[str | Path],
    *,
    legacy_string_ids: bool = False,
    legacy_first_is_self: bool = False,
) -> list[list[int]]:
    """Results of TRIME's ``bm25_search.py``: ``[{"id": ..., "retrieval": [...]}, ...]`` per shard.

    Args:
        paths: one file per shard.
        legacy_string_ids: leave out neighbours that are written as strings, as
            ``bm25_make_batches.py`` does without noticing; else they are read as numbers.
        legacy_first_is_self: leave out the first neighbour, whichever it is, as that script does.

    Returns:
        Neighbours by number of the block, best first, without the block itself.

    Raises:
        InputError: if the files do not hold every block once.
    """
    rows = [row for path in paths for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    by_number = {int(row["id"]): row["retrieval"] for row in rows}
    check(
        sorted(by_number) == list(range(len(rows))),
        f"results must hold every block from 0 to {len(rows) - 1} once, but {len(rows)} rows name "
        f"{len(by_number)} blocks; are all shards given?",
    )
    return [
        [
            int(block)
            for block in by_number[number][int(legacy_first_is_self) :]
            if int(block) != number and not (legacy_string_ids and isinstance(block, str))
        ]
        for number in range(len(rows))
    ]


def read_order(path: str | Path, blocks: int) -> NDArray[np.int64]:
    """An order of blocks as TRIME's ``--predefined-batches`` file holds it: a JSON list.

    Raises:
        InputError: if it is no JSON list, or not a permutation of the blocks.
    """
    try:
        numbers = [int(value) for value in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} must be a JSON list of the numbers of {blocks} blocks, got {error}; write it "
            "with write_order"
        ) from error
    check(
        sorted(numbers) == list(range(blocks)),
        f"{path} must hold every block from 0 to {blocks - 1} once, but has "
        f"{len(numbers)} entries that are no permutation; was the text cut into other blocks?",
    )
    return np.array(numbers, np.int64)


def write_order(path: str | Path, order: NDArray[np.integer]) -> None:
    """Write an order of blocks so that `read_order` and TRIME's scripts read it."""
    content = json.dumps([int(number) for number in order]).encode()
    write_atomic(Path(path), lambda file: file.write(content))
