"""``memlm train``: a tokenizer and a small causal language model from text."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from memlm.cli.options import load_tokenizer, show


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a small Llama-style language model, and its tokenizer, on TEXT."""

    text: Annotated[str, Positional, arg(metavar="TEXT")]
    """Folder, text file or .jsonl file (also .gz, .xz, .zst)."""
    out: str
    """Directory of the model, its tokenizer and checkpoints."""
    preset: Literal["tiny", "small", "demo"] = "tiny"
    """Shape and schedule: tiny (1.2 M parameters), small (5 M), demo (a time budget)."""
    tokenizer: str | None = None
    """Folder or Hub id of an existing tokenizer (default: train one)."""
    vocab_size: int = 4096
    """Size of the trained tokenizer's vocabulary."""
    evaluate_on: str | None = None
    """Held-out text to evaluate on."""
    max_steps: int | None = None
    """Optimiser steps (default: the preset's)."""
    max_seconds: float | None = None
    """Time budget instead of a number of steps."""
    learning_rate: float | None = None
    """Peak learning rate (default: the preset's)."""
    save_every: int | None = None
    """Steps between checkpoints (default: none)."""
    resume: bool = False
    """Continue from the last checkpoint in --out."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""
    seed: int = 1
    """Of the weights and the order of the examples."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    separator: str | None = None
    """Cut a text file into documents at this string."""
    limit: int | None = None
    """Read only so many documents."""
    plan: bool = False
    """Only say what would be trained: parameters, tokens per step, memory."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Train, or plan."""
        from pathlib import Path

        from memlm.data.documents import read_documents
        from memlm.data.tokens import tokenize
        from memlm.training.causal_lm import describe_training, train_causal_lm
        from memlm.training.config import TrainConfig
        from memlm.training.tokenizer import train_tokenizer

        def documents(source: str):
            return read_documents(
                source, text_field=self.field, separator=self.separator, limit=self.limit
            )

        changes = {
            name: getattr(self, name)
            for name in ("max_steps", "max_seconds", "learning_rate", "save_every")
            if getattr(self, name) is not None
        }
        config = TrainConfig.preset(self.preset, **changes, threads=self.threads, seed=self.seed)
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
        elif self.resume and (Path(self.out) / "tokenizer.json").exists():
            tokenizer = load_tokenizer(self.out)
        else:
            tokenizer = train_tokenizer(documents(self.text), self.vocab_size, exact=False)
        if self.plan:
            planned = describe_training(config, len(tokenizer))
            show(planned, planned["text"], as_json=self.json)
            return 0
        corpus = tokenize(documents(self.text), tokenizer)
        held_out = (
            None if self.evaluate_on is None else tokenize(documents(self.evaluate_on), tokenizer)
        )
        model = train_causal_lm(
            corpus, tokenizer, config, self.out, held_out=held_out, resume=self.resume
        )
        value = {"model": self.out, "parameters": model.num_parameters()}
        text = (
            f"{self.out}: {model.num_parameters():,} parameters\n"
            f"next: memlm build {self.out} {self.text} --out STORE"
        )
        show(value, text, as_json=self.json)
        return 0
