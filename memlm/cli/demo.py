"""``memlm demo``: the whole journey, for the newcomer or on the user's own model and text."""

import time
from dataclasses import dataclass
from typing import Literal

from memlm.cli.options import load_model, load_tokenizer, show
from memlm.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small model, give it a memory, measure both on held-out text, continue a prompt.

    Needs no download. With --model and --text: the same for a model and text of your own.
    """

    method: Literal["knn", "retro"] = "knn"
    """knn: a model with a datastore (kNN-LM, RetoMaton); retro: a model that reads neighbours of \
its text (RETRO), trained on the spot, with --text too."""
    out: str = "demo-out"
    """Directory for model, datastore, index and results."""
    model: str | None = None
    """Folder or Hub id of a causal language model (default: train a small one)."""
    text: str | None = None
    """Folder or file of text (default: the documentation that comes with Python)."""
    prompt: str | None = None
    """Text to continue (default: the start of a docstring, or of a held-out document)."""
    seconds: float = 110.0
    """Time budget of the training."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""
    limit: int | None = None
    """Use only so many documents."""
    json: bool = False
    """Print the results as JSON."""

    def run(self) -> int:
        """The journey, with a line of progress for each stage."""
        return self._retro() if self.method == "retro" else self._knn()

    def _knn(self) -> int:
        import sys
        from pathlib import Path

        from memlm.data.documents import read_documents
        from memlm.evaluation.report import report
        from memlm.methods.demo import (
            LIBRARY_PROMPT,
            journey,
            library_splits,
            split_documents,
            train_small_model,
        )

        def say(line: str) -> None:
            sys.stderr.write(line + "\n")

        start = time.perf_counter()
        splits = (
            library_splits() if self.text is None else split_documents(read_documents(self.text))
        )
        if self.limit is not None:
            splits = type(splits)(*(documents[: self.limit] for documents in splits))
        if not (splits.dev and splits.test):
            raise InputError(
                "the text must have at least three documents, so that some can be held out; give "
                "a folder or a .jsonl file with more documents"
            )
        sizes = (f"{name} {len(part):,}" for name, part in zip(splits._fields, splits, strict=True))
        say(f"documents: {', '.join(sizes)}")
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        if self.model is None:
            model, tokenizer = train_small_model(splits, out, self.seconds, self.threads)
            say(f"model: {model.num_parameters():,} parameters, in {out / 'model'}")
        else:
            model, tokenizer = load_model(self.model), load_tokenizer(self.model)
        held_out = splits.test[0].text[:200].rsplit(" ", 1)[0]
        prompt = self.prompt or (LIBRARY_PROMPT if self.text is None else held_out)
        result = journey(
            model, tokenizer, splits, out, prompt=prompt, threads=self.threads, say=say
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
        import sys

        from memlm.data.documents import read_documents
        from memlm.evaluation.leakage import leakage_table
        from memlm.evaluation.retro import table
        from memlm.methods.demo import library_splits, split_documents
        from memlm.methods.retro_demo import PROMPT, demo

        if self.model is not None:
            raise InputError("the demonstration of RETRO trains a model of its own; drop --model")

        def say(line: str) -> None:
            sys.stderr.write(line + "\n")

        start = time.perf_counter()
        splits = (
            library_splits() if self.text is None else split_documents(read_documents(self.text))
        )
        result = demo(
            self.out,
            splits.train[: self.limit],
            splits.test[: self.limit],
            seconds=self.seconds,
            prompt=self.prompt or PROMPT,
            threads=self.threads,
            say=say,
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
