"""``memlm train``: a causal language model from text, with or without memory, new or continued."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from memlm.cli.options import load_model, load_tokenizer, show
from memlm.core.config import check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.data.documents import Document
    from memlm.data.tokens import TokenCorpus
    from memlm.training.config import TrainConfig

# What a flag of its own sets; everything else goes through --set.
_FLAGS = ("method", "max_steps", "max_seconds", "learning_rate", "save_every", "threads", "seed")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a language model, new or continued, on TEXT, with or without memory."""

    text: Annotated[str, Positional, arg(metavar="TEXT")]
    """Folder, text file or .jsonl file (also .gz, .xz, .zst); or a published corpus and its \
split: wikitext-103:train, wikitext-2:train, enwik8:train, ...; or fairseq's binarised text \
(train.bin), with its dict.txt beside it; for retro a database with neighbours (`memlm retro`)."""
    out: str
    """Directory of the model, its tokenizer and checkpoints."""
    method: Literal["ce", "trime", "trime_long", "trime_ext", "tupe", "retro"] | None = None
    """ce: plain; trime: with the text's own past as memory; trime_long: and the segments before \
it; trime_ext: and other segments of the batch; tupe: an encoder on masked tokens; retro: a model \
that reads the neighbours of its chunks (default: the recipe's, else ce)."""
    model: str | None = None
    """Folder or Hub id of a model to continue (default: a new one)."""
    preset: Literal["tiny", "small", "base", "demo"] | None = None
    """Shape and schedule: tiny (1.2 M parameters), small (5 M), base (41 M, for a GPU), demo (a \
time budget) (default: the recipe's, else tiny)."""
    recipe: str | None = None
    """TOML or JSON file of settings."""
    architecture: str | None = None
    """Hugging Face configuration file (.json) of a new model, instead of a small Llama."""
    set: tuple[str, ...] = ()
    """Settings to change, as name=value."""
    tokenizer: str | None = None
    """Folder or Hub id of an existing tokenizer, or a dict.txt of fairseq (default: the model's; \
without one, train it)."""
    level: Literal["bpe", "word", "character"] = "bpe"
    """Of the trained tokenizer."""
    vocab_size: int = 4096
    """Size of the trained tokenizer's vocabulary (bytes alone: 257)."""
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
    chain: str | None = None
    """For trime_ext: JSON list of block numbers, similar blocks next to each other."""
    resume: bool = False
    """Continue from the last checkpoint in --out."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""
    seed: int | None = None
    """Of the weights and the order of the examples (default: 1)."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    separator: str | None = None
    """Cut a text file into documents at this string."""
    limit: int | None = None
    """Read only so many documents."""
    plan: bool = False
    """Only say what would be trained: parameters, tokens, memory, time."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Train, or plan."""
        if self.method == "tupe":
            from memlm.cli.pretrain import pretrain

            return pretrain(self)
        if self.method == "retro":
            from memlm.cli.train_retro import train_with_neighbours

            return train_with_neighbours(self)
        from memlm.training.causal_lm import train_causal_lm
        from memlm.training.plan import describe_training, shape_of

        check(
            self.model is None or self.architecture is None,
            "a model is either continued or new: give --model or --architecture, not both",
        )
        config, architecture = self._settings()
        tokenizer = self._tokenizer()
        model = self._model(config, architecture, tokenizer)
        if self.plan:
            shape = None if model is None else shape_of(model)
            planned = describe_training(config, len(tokenizer), shape=shape, processes=_processes())
            show(planned, planned["text"], as_json=self.json)
            return 0
        held_out = None if self.evaluate_on is None else self._corpus(self.evaluate_on, tokenizer)
        trained = train_causal_lm(
            self._corpus(self.text, tokenizer),
            tokenizer,
            config,
            self.out,
            model=model,
            chain=self._chain(),
            held_out=held_out,
            resume=self.resume,
        )
        value = {"model": self.out, "parameters": trained.num_parameters(), "method": config.method}
        text = (
            f"{self.out}: {config.method}, {trained.num_parameters():,} parameters\n"
            f"next: memlm build {self.out} {self.text} --out STORE"
        )
        show(value, text, as_json=self.json)
        return 0

    def _settings(self) -> "tuple[TrainConfig, Any]":
        """The configuration, and the file of a new model's architecture."""
        from memlm.training.recipe import Recipe, parse_changes, read_recipe

        recipe = Recipe({}) if self.recipe is None else read_recipe(self.recipe)
        flags = {name: getattr(self, name) for name in _FLAGS if getattr(self, name) is not None}
        changes = parse_changes(self.set)
        twice = sorted(set(changes) & set(flags))
        check(not twice, f"{', '.join(twice)} is set twice, by a flag of its own and by --set")
        config = recipe.config(preset=self.preset, **changes, **flags)
        chosen = self.architecture or (None if self.model else recipe.architecture)
        return config, chosen

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        from pathlib import Path

        from memlm.training.tokenizer import train_tokenizer

        dictionary = self.tokenizer
        if dictionary is None and _is_binarised(self.text):
            dictionary = str(Path(self.text).parent / "dict.txt")
        if dictionary is not None and dictionary.endswith(".txt"):
            from memlm.formats.dictionary import read_dictionary

            return read_dictionary(dictionary).tokenizer()
        if self.tokenizer is not None or self.model is not None:
            return load_tokenizer(self.tokenizer or self.model or "")
        if self.resume and (Path(self.out) / "tokenizer.json").exists():
            return load_tokenizer(self.out)
        documents = self._documents(self.text)
        return train_tokenizer(documents, self.vocab_size, level=self.level, exact=False)

    def _model(
        self, config: "TrainConfig", architecture: Any, tokenizer: "PreTrainedTokenizerBase"
    ) -> "PreTrainedModel | None":
        """The model to continue or one of a given architecture; None: a small Llama."""
        if self.model is not None:
            return load_model(self.model, "cpu")
        if architecture is None:
            return None
        from memlm.training.architecture import model_of

        return model_of(architecture, tokenizer, seed=config.seed)

    def _corpus(self, source: str, tokenizer: "PreTrainedTokenizerBase") -> "TokenCorpus":
        if _is_binarised(source):
            from memlm.formats.binarised import read_corpus

            return read_corpus(source)
        from memlm.data.tokens import tokenize

        return tokenize(self._documents(source), tokenizer)

    def _documents(self, source: str) -> "Iterator[Document]":
        from memlm.data.documents import read_documents
        from memlm.data.published import PUBLISHED, read_published

        name, _, split = source.partition(":")
        if name in PUBLISHED:
            return iter(list(read_published(name, split or "train"))[: self.limit])
        return read_documents(
            source, text_field=self.field, separator=self.separator, limit=self.limit
        )

    def _chain(self) -> Any:
        if self.chain is None:
            return None
        import json
        from pathlib import Path

        return json.loads(Path(self.chain).read_text(encoding="utf-8"))


def _is_binarised(source: str) -> bool:
    """Whether a text is fairseq's, binarised."""
    return source.endswith((".bin", ".idx"))


def _processes() -> int:
    """How many torchrun started."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))
