"""Perplexity over a stream without end: constant memory, every token scored, resumable.

A stream is read chunk by chunk (`memlm.evaluation.reader`). After each stretch of tokens one line
of JSON goes to ``log.jsonl`` and what the model remembers to ``state.safetensors``; the same call
goes on from there, after any interruption, and ends with the numbers it would have had without one.

Sources: LM-Infinite (Han et al. 2024, section 4.2 and its streaming script). Differs from that
script: the first token of a chunk is scored, a run can be resumed, and a stretch costs one line
instead of rewriting all losses.
"""

import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import FingerprintError, UnsupportedModelError
from memlm.core.files import read_json, write_atomic, write_json
from memlm.core.progress import bar
from memlm.evaluation.figures import panels
from memlm.evaluation.reader import Reader
from memlm.models.extend import is_extended
from memlm.models.fingerprint import model_hash
from memlm.models.middle_cache import MiddleLayer
from memlm.models.running import EXTENDED
from memlm.models.taps import body
from memlm.models.window_file import load_window, save_window
from memlm.ops.lambda_rule import LambdaConfig

CHUNK, EVERY = 4096, 65_536


@dataclass(frozen=True)
class StreamPoint:
    """How a stream stands after some tokens.

    Attributes:
        tokens: read so far.
        scored: of them; all but the very first.
        nll: mean negative log-likelihood of all scored tokens, nats.
        recent_nll: of those since the point before.
        milliseconds_per_token: since the point before.
        cache_bytes: what the model remembers.
        process_bytes: most memory that the process ever held.
    """

    tokens: int
    scored: int
    nll: float
    recent_nll: float
    milliseconds_per_token: float
    cache_bytes: int
    process_bytes: int

    @property
    def perplexity(self) -> float:
        """Of all scored tokens."""
        return math.exp(self.nll)

    @property
    def recent_perplexity(self) -> float:
        """Of the tokens since the point before."""
        return math.exp(self.recent_nll)


def shuffled_epochs(
    documents: Sequence[Sequence[int]],
    seed: int = 0,
    *,
    epochs: int | None = None,
    begin_token: int | None = None,
) -> Iterator[int]:
    """All tokens of the documents, again and again, in a new order each time.

    Args:
        documents: token ids of each, without begin tokens.
        seed: of the orders. Each shuffles the one before, as LM-Infinite's loader does.
        epochs: how often; None: without end.
        begin_token: stands before the very first document only.

    Raises:
        InputError: if there is no token.
    """
    check(any(map(len, documents)), "a stream needs documents with tokens, got none")
    draw, order, done = random.Random(seed), list(documents), 0
    if begin_token is not None:
        yield begin_token
    while epochs is None or done < epochs:
        draw.shuffle(order)
        yield from chain.from_iterable(order)
        done += 1


def cut_chunks(tokens: Iterable[int], length: int) -> Iterator[list[int]]:
    """Consecutive chunks of ``length`` tokens; the last one may be shorter."""
    check(length >= 1, f"a chunk must have at least 1 token, got {length}")
    chunk: list[int] = []
    for token in tokens:
        chunk.append(token)
        if len(chunk) == length:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def stream_perplexity(
    model: PreTrainedModel,
    tokens: Iterable[int],
    *,
    until: int | None = None,
    chunk: int = CHUNK,
    every: int = EVERY,
    out: Path | str | None = None,
    text: str | None = None,
    progress: bool = True,
) -> Iterator[StreamPoint]:
    """Read a stream and score it, a point after every stretch of tokens and one at the end.

    Args:
        model: one that ``extend_context`` prepared.
        tokens: the stream from its beginning, also when a run goes on: the part that was read is
            skipped, so it must come out the same.
        until: tokens to read in all; None: until the stream ends.
        chunk: tokens that the model reads at once; 1 is token by token. It changes the speed only.
        every: tokens between points.
        out: folder for ``log.jsonl`` and the state to go on from; None: nothing is written.
        text: fingerprint of the stream, kept in ``out``, so that a run does not go on with another.
        progress: show a bar.

    Yields:
        Points, those of an interrupted run not again.

    Raises:
        InputError: if a number is out of range.
        UnsupportedModelError: if the model is not extended: its cache would grow without end.
        FingerprintError: if ``out`` holds a run of another model or text, or with other settings.
    """
    check(chunk >= 1 and every >= 1, f"chunk and every must be at least 1, got {chunk}, {every}")
    check(until is None or until >= 1, f"there must be at least 1 token to read, got {until}")
    if not is_extended(model):
        raise UnsupportedModelError(
            "a stream without end needs a model whose cache does not grow, got one that is not "
            "extended; call extend_context(model, window=...) first"
        )
    run = _Run(model, None if out is None else Path(out), text)
    source = iter(tokens)
    next(islice(source, run.tokens, run.tokens), None)
    with bar(until, label="stream", unit="token", initial=run.tokens, quiet=not progress) as shown:
        while True:
            room = every - run.tokens % every
            if until is not None:
                room = min(room, until - run.tokens)
            if room <= 0:
                return
            start, stretch = time.perf_counter(), run.begin_stretch()
            for piece in cut_chunks(islice(source, room), chunk):
                run.read(piece)
                shown.update(len(piece))
            read = run.tokens - stretch.tokens
            if read == 0:
                return
            point = run.point(stretch, (time.perf_counter() - start) / read)
            run.keep(point)
            yield point


def read_points(out: Path | str) -> list[StreamPoint]:
    """The points of a run so far, whoever made them.

    Raises:
        InputError: if the folder holds no run.
    """
    log = Path(out) / "log.jsonl"
    check(log.exists(), f"{out} must be the folder of a stream, but it has no log.jsonl")
    lines = log.read_text("utf-8").splitlines(keepends=True)
    return [StreamPoint(**json.loads(line)) for line in lines if line.endswith("\n")]


def plot_points(points: Sequence[StreamPoint], path: Path | str) -> None:
    """Perplexity, time per token and memory along a stream, as an image.

    Args:
        points: of one run, in order.
        path: of the image; its ending is the format.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, (loss, pace, memory) = panels(3)
    tokens = [point.tokens for point in points]
    loss.plot(tokens, [point.perplexity for point in points], label="all so far")
    loss.plot(tokens, [point.recent_perplexity for point in points], label="this stretch", lw=0.7)
    loss.set(title="perplexity", yscale="log")
    loss.legend()
    pace.plot(tokens, [point.milliseconds_per_token for point in points])
    pace.set(title="milliseconds per token", ylim=(0, None))
    memory.plot(tokens, [point.cache_bytes / 1e6 for point in points], label="cache")
    memory.plot(tokens, [point.process_bytes / 1e6 for point in points], label="process, at most")
    memory.set(title="megabytes", yscale="log")
    memory.legend()
    for axis in (loss, pace, memory):
        axis.set_xlabel("tokens")
    figure.savefig(path)


def _middle(layer: Any) -> list[Tensor]:
    """The middle tokens of a layer that has some, wherever they are."""
    return list(layer.store.held().values()) if isinstance(layer, MiddleLayer) else []


class _Run:
    """The sums of a stream, and where they are kept."""

    def __init__(self, model: PreTrainedModel, out: Path | None, text: str | None):
        self.reader, self.out, self.text = Reader(model), out, text
        self.model, self.hash = model, model_hash(model) if out is not None else ""
        self.tokens = self.scored = 0
        self.total = 0.0
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out)

    def begin_stretch(self) -> "_Mark":
        return _Mark(self.tokens, self.scored, self.total)

    def read(self, piece: list[int]) -> None:
        losses = self.reader.read(torch.tensor([piece]))
        self.tokens += len(piece)
        self.scored += losses.numel()
        self.total += float(losses.sum())

    def point(self, since: "_Mark", seconds: float) -> StreamPoint:
        layers: Any = self.reader.cache.layers  # type: ignore[union-attr]
        unit = 1 if sys.platform == "darwin" else 1024
        return StreamPoint(
            tokens=self.tokens,
            scored=self.scored,
            nll=self.total / max(self.scored, 1),
            recent_nll=(self.total - since.total) / max(self.scored - since.scored, 1),
            milliseconds_per_token=1000 * seconds,
            cache_bytes=sum(
                part.numel() * part.element_size()
                for layer in layers
                for part in (layer.keys, layer.values, layer.positions, *_middle(layer))
            ),
            process_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        )

    def keep(self, point: StreamPoint) -> None:
        if self.out is None or self.reader.cache is None:
            return
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(asdict(point)) + "\n")
            log.flush()
            os.fsync(log.fileno())
        save_window(
            self.reader.cache,
            self.out / "state.safetensors",
            self.model,
            tensors={"hidden": self.reader.hidden},  # type: ignore[dict-item]
            notes={"tokens": self.tokens, "scored": self.scored, "total": self.total.hex()},
            model_fingerprint=self.hash,
        )

    def _resume(self, out: Path) -> None:
        settings = {"model": self.hash, "window": self._window(), "text": self.text}
        about, state = out / "stream.json", out / "state.safetensors"
        if not about.exists():
            write_json(about, settings)
        elif (kept := _read_settings(about)) != settings:
            raise FingerprintError(
                f"{out} must hold a run of this model and text ({settings}), got one of "
                f"{kept}; give another folder"
            )
        if state.exists():
            self.reader.cache, tensors, notes = load_window(
                state, self.model, model_fingerprint=self.hash
            )
            self.reader.hidden = tensors["hidden"]
            self.tokens, self.scored = notes["tokens"], notes["scored"]
            self.total = float.fromhex(notes["total"])
        log = out / "log.jsonl"
        if log.exists():
            # a line may have been written just before its state was not
            lines = [
                line
                for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["tokens"] <= self.tokens
            ]
            write_atomic(log, lambda file: file.write("".join(lines).encode()))

    def _window(self) -> Any:
        extension = getattr(body(self.model), EXTENDED)
        middle = {} if extension.middle is None else {"middle": extension.middle.to_dict()}
        return {**extension.config.to_dict(), **middle}


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run; those that did not exist when it began are at their defaults."""
    kept = read_json(path)
    middle = {name: value for name, value in kept["window"].items() if name == "middle"}
    window = {name: value for name, value in kept["window"].items() if name != "middle"}
    return {"text": None, **kept, "window": {**LambdaConfig.from_dict(window).to_dict(), **middle}}


@dataclass(frozen=True)
class _Mark:
    tokens: int
    scored: int
    total: float
