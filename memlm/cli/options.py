"""Options that several verbs share, with the few lines that turn each group into objects.

Torch-free: heavy imports happen inside the methods, after the command line has been understood.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from memlm.core.errors import InputError, first_line
from memlm.core.processes import rank_and_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.core.merges import Merge, Mixture
    from memlm.core.types import Index, TokenMemory
    from memlm.data.tokens import TokenCorpus
    from memlm.data.windows import Windows
    from memlm.memory.knn import KnnMemory
    from memlm.models.attach import MemoryForCausalLM

Protocol = Literal["sliding", "knn-transformers", "fairseq"]
METHODS = {
    "knn": "kNN-LM",
    "retomaton": "RetoMaton",
    "trime": "TRIME",
    "cache": "continuous cache",
}
READ_TEXT = ("trime", "cache")
"""Methods that remember the text they read, and need no datastore."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Folder or Hub id of a Hugging Face causal language model."""
    device: str = "auto"
    """Where it runs: "auto" takes the GPU if there is one, else the CPU."""
    device_map: str | None = None
    """Instead of --device: "auto" spreads a large model over all devices, memory and disk \
(accelerate)."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, in the precision of its checkpoint, and its tokenizer.

        Raises:
            InputError: if either cannot be loaded.
        """
        return load_model(self.model, self.device, self.device_map), load_tokenizer(self.model)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text, and how it is cut into windows."""

    text: Annotated[str, Positional, arg(metavar="TEXT")]
    """Folder, text file or .jsonl file (also .gz, .xz, .zst)."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    separator: str | None = None
    """Cut a text file into documents at this string, e.g. "<|endoftext|>" (default: one file is \
one document)."""
    limit: int | None = None
    """Read only so many documents."""
    protocol: Protocol = "sliding"
    """How text is cut: "sliding" windows inside documents; "knn-transformers" strided blocks over \
lines; "fairseq" blocks with a context window over lines."""
    length: int | None = None
    """Tokens the model reads at once (default: 512, or the model's positions if fewer; \
knn-transformers: 1024)."""
    stride: int | None = None
    """Tokens scored by each window (default: half the length; fairseq: the length less the \
context)."""
    context: int = 0
    """fairseq only: tokens of context before each block."""

    def corpus(self, tokenizer: "PreTrainedTokenizerBase") -> "TokenCorpus":
        """The text, tokenised as the protocol wants it."""
        from memlm.data.documents import Document, read_documents
        from memlm.data.tokens import tokenize

        lines = self.protocol != "sliding"
        documents = read_documents(
            self.text,
            text_field=self.field,
            separator="\n" if lines else self.separator,
            limit=self.limit,
        )
        if not lines:
            return tokenize(documents, tokenizer)
        if self.protocol == "fairseq":
            # fairseq's stream begins with one end-of-sentence token
            return tokenize([Document("start", ""), *documents], tokenizer, begin=False, end=True)
        return tokenize(documents, tokenizer, begin=False, end=False)

    def windows(self, model: "PreTrainedModel") -> "Windows":
        """The windows of the protocol."""
        from memlm.data.windows import BlockWindows, SlidingWindows, StrideWindows
        from memlm.extract.build import default_windows

        length, stride = self.length, self.stride
        if self.protocol == "sliding":
            length = default_windows(model).length if length is None else length
            return SlidingWindows(length, max(1, length // 2) if stride is None else stride)
        if self.protocol == "knn-transformers":
            block = 1024 if length is None else length
            return StrideWindows(block, max(1, block // 2) if stride is None else stride)
        block = (512 if length is None else length) - self.context if stride is None else stride
        return BlockWindows(block=block, context=self.context, unit="lines")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Which memory, and how it is consulted."""

    store: str | None = None
    """Directory of a datastore; without it the model stands alone, or with trime and cache \
remembers the text alone."""
    method: Literal["knn", "retomaton", "trime", "cache"] = "knn"
    """knn: search at every token (kNN-LM); retomaton: follow the store's pointers and search when \
they run out; trime: what was read before in this window (local memory), with --long also in those \
before, with --store also a datastore of metric ip, all under the model's softmax; cache: the text \
read before, mixed in (continuous cache)."""
    long: int = 0
    """trime, cache: positions of earlier windows that are remembered (the paper: 12288)."""
    index: Literal["auto", "exact"] = "auto"
    """Which index of the store to search: "auto" (the one built beside it, else exact) or \
"exact"."""
    k: int = 1024
    """Neighbours per search."""
    temperature: float | Literal["auto"] = 1.0
    """Divides the neighbours' scores; larger is flatter. "auto": the median distance gap. trime, \
cache: a number, beside the square root of the model's width."""
    lam: float = 0.25
    """Weight of the memory in the mixture, from 0 to 1; trime has no mixture."""
    also: Annotated[tuple[tuple[str, float], ...], UseAppendAction, arg(metavar="STORE LAM")] = ()
    """knn: a further datastore and its weight; may be given several times. The model keeps what \
the weights leave of 1."""
    recompute: bool = False
    """Score the neighbours that an approximate index found by their exact distances (retomaton \
always does)."""
    min_knns: int = 1
    """retomaton: search when fewer pointers are alive; 1 saves most searches, 1000000000 none."""
    max_knns: int = 1024
    """retomaton: entries that pointers and their clusters bring to a step, at most."""
    multiplicity: float | Literal["set", "legacy"] = "set"
    """retomaton: "set": an entry counts once; "legacy": as often as it was reached; a number: \
once, with that much added to the score of entries that a pointer leads to."""
    clusters: Literal["auto", "none"] = "auto"
    """retomaton: "auto" (those made by `memlm cluster`, if any) or "none"."""

    def memory(self, model: "PreTrainedModel") -> "tuple[TokenMemory | None, Merge | None]":
        """The memory and its merge; two Nones if a store is needed and there is none.

        Args:
            model: that it is for.

        Raises:
            InputError: if the options do not go together, or one is out of range.
        """
        from memlm.core.merges import Mixture

        if self.also and (self.store is None or self.method not in (None, "knn")):
            raise InputError(
                "--also adds stores to one that is searched at every token, so it needs --store "
                f"and the method knn, got {self.store or 'no store'} and {self.method or 'knn'}"
            )
        if self.method in READ_TEXT:
            lm = self._reading(model)
            return lm.memory, lm.merge
        if self.long:
            raise InputError(
                f"a long-term memory belongs to --method trime or cache, got {self.method}; leave "
                "out --long"
            )
        merge = Mixture(self.lam)
        if self.store is None:
            return None, None
        if self.also:
            return self._several()
        if self.method == "knn":
            return self.searched(), merge
        from memlm.memory.automaton import AutomatonMemory
        from memlm.store.reader import Datastore

        memory = AutomatonMemory(
            Datastore.open(self.store),
            k=self.k,
            temperature=self.temperature,
            min_knns=self.min_knns,
            max_knns=self.max_knns,
            clusters=self.clusters,
            multiplicity=self.multiplicity,
            index=self.index,
        )
        return memory, merge

    def _several(self) -> "tuple[TokenMemory, Merge]":
        """The store and those of ``--also``, each with its weight."""
        from memlm.core.merges import Shares
        from memlm.memory.together import Together

        stores = [(self.store, self.lam), *self.also]
        members = [replace(self, store=store, also=()).searched() for store, _ in stores]
        return Together(*members, lams=[lam for _, lam in stores]), Shares()

    def _reading(self, model: "PreTrainedModel") -> "MemoryForCausalLM":
        """The model with what it remembers of the text, for the methods ``READ_TEXT``."""
        from memlm.methods.trime import continuous_cache, trime
        from memlm.store.reader import Datastore

        temperature = self.temperature
        if isinstance(temperature, str):
            raise InputError(
                f"the temperature of {self.method} must be a number, got {temperature!r}; 1.0 to "
                "1.3 is usual"
            )
        if self.method == "cache":
            if self.store is not None:
                raise InputError(
                    f"the continuous cache has no datastore, got {self.store}; leave out --store, "
                    "or choose --method trime"
                )
            return continuous_cache(model, long=self.long, lam=self.lam, temperature=temperature)
        return trime(
            model,
            None if self.store is None else Datastore.open(self.store),
            long=self.long,
            k=self.k,
            temperature=temperature,
            index=self.index,
            recompute=self.recompute,
        )

    def searched(self, index: "Index | None" = None) -> "KnnMemory":
        """The store searched at every token, whatever the method is.

        Args:
            index: to be used instead of opening the one that was asked for.

        Raises:
            InputError: without a store.
        """
        from memlm.memory.knn import KnnMemory
        from memlm.store.reader import Datastore

        if self.store is None:
            raise InputError("a memory needs a datastore, got none; give --store")
        return KnnMemory(
            Datastore.open(self.store),
            k=self.k,
            temperature=self.temperature,
            index=index or self.index,
            recompute=self.recompute,
        )


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(MemoryOptions):
    """A memory, and its datastore once more."""

    interpolate: Annotated[tuple[float, float] | None, arg(metavar="LAM TEMPERATURE")] = None
    """trime: mix the datastore into the result once more, with this weight and a temperature of \
its own, which divides the dot products."""

    def interpolated(self, memory: Any) -> "tuple[KnnMemory, Mixture] | None":
        """The datastore once more, and its weight; None if that was not asked for.

        Args:
            memory: from ``memory``.

        Raises:
            InputError: if there is no datastore under one softmax with the model.
        """
        from memlm.core.merges import Mixture

        if self.interpolate is None:
            return None
        self.check_interpolation()
        lam, temperature = self.interpolate
        external = memory.members[-1]  # with its index, which is not opened again
        return external.changed(external.k, temperature), Mixture(lam)

    def check_interpolation(self) -> None:
        """Raise InputError if something is to be mixed in once more that there is not."""
        if self.interpolate is not None and (self.method != "trime" or self.store is None):
            raise InputError(
                "--interpolate mixes TRIME's datastore in once more, so it needs --method trime "
                f"and --store, got {self.method or 'knn'} and {self.store or 'no store'}"
            )


def load_model(
    name: str, device: str = "auto", device_map: str | None = None, *, pairs: bool = False
) -> "PreTrainedModel":
    """A causal language model, or an encoder-decoder, in the precision of its checkpoint.

    Raises:
        InputError: if ``name`` is no model or the device is not there.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils.logging import disable_progress_bar

    import memlm.models.adaptive.decoder
    import memlm.models.attach
    import memlm.models.retro.causal_lm
    import memlm.models.retro.fit
    import memlm.models.tupe.heads  # noqa: F401  registers models of memlm's own
    from memlm.models.running import device_named

    disable_progress_bar()
    device = device_named(device)
    try:
        placed = {} if device_map is None else {"device_map": device_map}
        kind = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
        model: Any = kind.from_pretrained(name, dtype="auto", **placed)
        return (model if placed else model.to(device)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            "the model must be a folder or Hub id of "
            f"{'an encoder-decoder' if pairs else 'a causal language model'}, got {name!r}: "
            f"{first_line(error)}"
        ) from error


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to a model.

    Raises:
        InputError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the model's folder must hold a tokenizer, but {name!r} has none that loads "
            f"({first_line(error).rstrip(' :')}); save the model's own there"
        ) from error


def show(value: dict[str, Any], text: Any, *, as_json: bool) -> None:
    """Print a result: machine-readable on request, else for a person; once for all processes."""
    if rank_and_size()[0] > 0:
        return
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        return
    from rich.console import Console

    # A pipe has no width of its own; tables should not break in it.
    width = None if sys.stdout.isatty() else 140
    Console(highlight=False, width=width, soft_wrap=isinstance(text, str)).print(text)


def write_result(path: str | None, value: dict[str, Any]) -> None:
    """Keep a result as JSON if a path was given; once for all processes."""
    if path is not None and rank_and_size()[0] == 0:
        from memlm.core.files import write_json

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, value)
