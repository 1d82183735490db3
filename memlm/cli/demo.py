"""``memlm demo``: the whole journey, for the newcomer or on the user's own model and text."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from memlm.cli.options import load_model, load_tokenizer, show
from memlm.core.errors import InputError

if TYPE_CHECKING:
    from memlm.methods.demo import Splits


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small model, give it a memory, measure both on held-out text, continue a prompt.

    Needs no download. With --model and --text: the same for a model and text of your own.
    """

    method: Literal["knn", "retro", "tupe"] = "knn"
    """knn: a model with a datastore (kNN-LM, RetoMaton); retro: a model that reads neighbours of \
its text (RETRO); tupe: an encoder with positions apart (TUPE). The latter two are trained on the \
spot, with --text too."""
    out: str = "demo-out"
    """Directory for model, datastore, index and results."""
    model: str | None = None
    """Folder or Hub id of a causal language model (default: train a small one)."""
    text: str | None = None
    """Folder or file of text (default: the documentation that comes with Python)."""
    prompt: str | None = None
    """Text to continue (default: the start of a docstring, or of a held-out document); with tupe \
a sentence with <mask> for a word."""
    seconds: float = 110.0
    """Time budget of the training; with tupe of the first of two."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""
    limit: int | None = None
    """Use only so many documents."""
    json: bool = False
    """Print the results as JSON."""

    def run(self) -> int:
        """The journey, with a line of progress for each stage."""
        return {"knn": self._knn, "retro": self._retro, "tupe": self._tupe}[self.method]()

    def _knn(self) -> int:
        from pathlib import Path

        from memlm.evaluation.report import report
        from memlm.methods.demo import (
            LIBRARY_PROMPT,
            journey,
            train_small_model,
        )

        start = time.perf_counter()
        splits = self._splits()
        if self.limit is not None:
            splits = type(splits)(*(documents[: self.limit] for documents in splits))
        if not (splits.dev and splits.test):
            raise InputError(
                "the text must have at least three documents, so that some can be held out; give "
                "a folder or a .jsonl file with more documents"
            )
        sizes = (f"{name} {len(part):,}" for name, part in zip(splits._fields, splits, strict=True))
        _say(f"documents: {', '.join(sizes)}")
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        if self.model is None:
            model, tokenizer = train_small_model(splits, out, self.seconds, self.threads)
            _say(f"model: {model.num_parameters():,} parameters, in {out / 'model'}")
        else:
            model, tokenizer = load_model(self.model), load_tokenizer(self.model)
        held_out = splits.test[0].text[:200].rsplit(" ", 1)[0]
        prompt = self.prompt or (LIBRARY_PROMPT if self.text is None else held_out)
        result = journey(
            model, tokenizer, splits, out, prompt=prompt, threads=self.threads, say=_say
        )
        if self.json:
            summaries = {name: row.summary() for name, row in result.evaluations.items()}
            show({"rows": summaries, "completions": result.completions}, None, as_json=True)
            return 0
        show({}, report(result.evaluations), as_json=False)
        for name, text in result.completions.items():
            sys.stdout.write(f"\n--- {name} ---\n{text.strip()}\n")
        total = time.perf_counter() - start
        sys.stdout.write(f"\n{out / 'results.json'} holds everything; {total:.0f} s in all\n")
        return 0

    def _retro(self) -> int:
        from memlm.evaluation.leakage import leakage_table
        from memlm.evaluation.retro import table
        from memlm.methods.retro_demo import PROMPT, demo

        self._without_model()
        start = time.perf_counter()
        splits = self._splits()
        result = demo(
            self.out,
            splits.train[: self.limit],
            splits.test[: self.limit],
            seconds=self.seconds,
            prompt=self.prompt or PROMPT,
            threads=self.threads,
            say=_say,
        )
        if self.json:
            rows = {name: one.summary() for name, one in result.evaluations.items()}
            show({"rows": rows, "completion": result.completion}, None, as_json=True)
            return 0
        parts = [
            table(result.evaluations),
            leakage_table(result.overlap),
            f"--- with retrieval ---\n{result.completion.strip()}",
            f"{self.out} holds everything; {time.perf_counter() - start:.0f} s in all",
        ]
        sys.stdout.write("\n\n".join(parts) + "\n")
        return 0

    def _tupe(self) -> int:
        from memlm.methods.tupe_demo import demo

        self._without_model()
        start = time.perf_counter()
        splits = self._splits()
        result = demo(
            self.out,
            splits.train[: self.limit],
            splits.test[: self.limit],
            seconds=self.seconds,
            prompt=self.prompt,
            threads=self.threads,
            say=_say,
        )
        value = {name: part for name, part in result._asdict().items() if name != "models"}
        total = f"{self.out} holds everything; {time.perf_counter() - start:.0f} s in all"
        show(value, f"{result.describe()}\n\n{total}", as_json=self.json)
        return 0

    def _splits(self) -> "Splits":
        from memlm.data.documents import read_documents
        from memlm.methods.demo import library_splits, split_documents

        if self.text is None:
            return library_splits()
        return split_documents(read_documents(self.text))

    def _without_model(self) -> None:
        if self.model is not None:
            raise InputError(
                f"the demonstration of {self.method} trains models of its own; drop --model"
            )


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
