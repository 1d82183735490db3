"""A chunk and its neighbours for a person to read: in the terminal, or as one static HTML page.

The longest run of tokens that a neighbour shares with the chunk is marked: what a model could copy.
"""

import html
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.core.files import write_atomic
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.neighbours import NeighbourTable
from memlm.retrieval.overlap import longest_common_run


class Passage(NamedTuple):
    """A neighbour, cut where the shared run begins and ends.

    Attributes:
        chunk: its number in the database.
        document: name of its document.
        score: of the retriever, higher is better.
        before: text before the shared run.
        shared: the longest run that the chunk shares.
        after: text behind it.
        overlap: length of the shared run, as a share of the chunk's tokens.
    """

    chunk: int
    document: str
    score: float
    before: str
    shared: str
    after: str
    overlap: float


class Inspection(NamedTuple):
    """A chunk with its neighbours.

    Attributes:
        chunk: its number.
        document: name of its document.
        text: of the chunk.
        following: the text that follows it, up to one chunk: what neighbours should help with.
        passages: its neighbours with their continuations, best first.
    """

    chunk: int
    document: str
    text: str
    following: str
    passages: tuple[Passage, ...]


def inspect_chunk(
    text: ChunkDatabase,
    neighbours: NeighbourTable,
    database: ChunkDatabase,
    tokenizer: PreTrainedTokenizerBase,
    chunk: int,
) -> Inspection:
    """What a model gets to read for one chunk.

    Raises:
        InputError: if there is no such chunk.
    """
    own = text.chunk(chunk)
    tokens, valid = text.gather(np.array([chunk]))
    following = tokens[0, text.chunk_size :][valid[0, text.chunk_size :]]
    passages = []
    for column, number in enumerate(neighbours.lookup(chunk).tolist()):
        if number < 0:
            continue
        found = database.gather(np.array([number]))
        passage = found.tokens[0, found.valid[0]]
        run = longest_common_run(own, passage)
        begin, end = run.other, run.other + run.length
        passages.append(
            Passage(
                chunk=number,
                document=database.names[int(database.document_of(number))],
                score=float(neighbours.scores[chunk, column]),
                before=_text(tokenizer, passage[:begin]),
                shared=_text(tokenizer, passage[begin:end]),
                after=_text(tokenizer, passage[end:]),
                overlap=run.length / len(own),
            )
        )
    name = text.names[int(text.document_of(chunk))]
    return Inspection(
        chunk, name, _text(tokenizer, own), _text(tokenizer, following), tuple(passages)
    )


def as_text(inspection: Inspection) -> str:
    """For the terminal; shared runs stand between ⟦ and ⟧."""
    lines = [
        f"chunk {inspection.chunk} of {inspection.document}",
        inspection.text,
        "  followed by",
        inspection.following,
    ]
    for place, passage in enumerate(inspection.passages, start=1):
        lines += [
            f"neighbour {place}: chunk {passage.chunk} of {passage.document}, score "
            f"{passage.score:.3f}, longest shared run {passage.overlap:.0%} of the chunk",
            f"{passage.before}⟦{passage.shared}⟧{passage.after}",
        ]
    if not inspection.passages:
        lines.append("no neighbours")
    return "\n".join(lines)


def write_html(inspections: list[Inspection], path: str | Path) -> Path:
    """One page with everything in it; opens in any browser, loads nothing.

    Raises:
        StoreError: if it cannot be written.
    """
    path = Path(path)
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>Neighbours</title>",
            "<style>body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
            "pre{white-space:pre-wrap;background:#f5f5f5;padding:.6em}mark{background:#ffe08a}"
            "small{color:#555}</style>",
            *(_section(inspection) for inspection in inspections),
            "</html>\n",
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(page.encode()))
    return path


def _section(inspection: Inspection) -> str:
    escape = html.escape
    parts = [
        f"<h2>Chunk {inspection.chunk} <small>{escape(inspection.document)}</small></h2>",
        f"<pre>{escape(inspection.text)}</pre>",
        f"<p><small>followed by</small></p><pre>{escape(inspection.following)}</pre>",
    ]
    for place, passage in enumerate(inspection.passages, start=1):
        parts.append(
            f"<h3>Neighbour {place} <small>chunk {passage.chunk} of {escape(passage.document)}, "
            f"score {passage.score:.3f}, longest shared run {passage.overlap:.0%}</small></h3>"
            f"<pre>{escape(passage.before)}<mark>{escape(passage.shared)}</mark>"
            f"{escape(passage.after)}</pre>"
        )
    return "\n".join(parts)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens.tolist()))
