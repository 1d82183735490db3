"""The whole journey on one page: text, model, datastore, index, clusters, numbers, words.

Without arguments it needs nothing from outside: the text is the documentation that every Python
installation carries, split by document, and a small Llama is trained on the spot, with the memory
that it will be read with (TRIME, Zhong et al. 2022). With a model and a folder of text it does the
same for those, without the training.

The datastore is built from the text the model was trained on (kNN-LM's first experiment,
Khandelwal et al. 2020, section 4.1): what is measured is what explicit memory adds to the same
data. lam and the temperature are chosen on development text, numbers are reported on test text:
the model alone, kNN-LM with exact and approximate search, and RetoMaton, which follows the same
store and searches its index where it loses the thread, or always (Alon et al. 2022, section 5).
Then what needs no store, the text that is being read: its window (local), the windows before
(long), and both with the store mixed in once more (TRIME, eq. 4 and 7); under one softmax with the
model or as a mixture, whichever development text prefers. A model that was trained with memory
leaves to it what it can look up, so alone it is worse than one that was not.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.errors import MemlmError
from memlm.core.files import write_json
from memlm.core.merges import Mixture
from memlm.core.threads import torch_threads
from memlm.core.types import Index, TokenMemory
from memlm.data.documents import Document
from memlm.data.python_library import python_library
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.data.windows import SlidingWindows
from memlm.evaluation.length import LengthConfig, measure_lengths
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.result import Evaluation
from memlm.evaluation.tune import Tuning, tune
from memlm.extract.build import build_datastore, default_windows
from memlm.extract.config import ExtractionConfig
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.index.partition import Clusters
from memlm.index.plan import IndexConfig
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.methods.knn_lm import index_store
from memlm.models.attach import attach
from memlm.models.trained_length import trained_length
from memlm.store.reader import Datastore
from memlm.training.causal_lm import train_causal_lm
from memlm.training.config import TrainConfig
from memlm.training.tokenizer import train_tokenizer

NEIGHBOURS = 1024
LONG = 4096  # positions of earlier windows
MEMORY_AFTER = 40  # steps of plain cross-entropy first
VOCABULARY = 4096
LIBRARY_PROMPT = "Return True if the"
# What five minutes on two cores have room for; both are samples of whole documents.
DEV_CHARACTERS, TEST_CHARACTERS = 30_000, 75_000
ENTRIES_PER_CLUSTER, CLUSTER_ITERATIONS = 400, 5
# enough for a trend in a few seconds
LENGTH_PIECES, LENGTH_SCORED = 2, 128
ALWAYS = 10**9  # more pointers than there ever are: search at every step

Say = Callable[[str], None]


class Splits(NamedTuple):
    """Documents by what they are for; no document is in two."""

    train: list[Document]
    dev: list[Document]
    test: list[Document]


class Journey(NamedTuple):
    """What the demo made and measured.

    Attributes:
        evaluations: by row name, on the test split.
        completions: the prompt continued, by variant.
        prompt: what was continued.
        seconds: per stage.
        out: directory with model, store, index and ``results.json``.
    """

    evaluations: dict[str, Evaluation]
    completions: dict[str, str]
    prompt: str
    seconds: dict[str, float]
    out: Path


def split_documents(documents: Iterable[Document]) -> Splits:
    """Split a user's documents by a hash of their name: 5 % dev, 10 % test, the rest train.

    With fewer than three documents of their own kind a split may be empty; then the last
    documents are moved there.
    """
    splits = Splits([], [], [])
    for document in documents:
        place = _number(document.name) % 100
        splits[1 if place < 5 else 2 if place < 15 else 0].append(document)
    for needy in (splits.test, splits.dev):
        donor = max(splits, key=len)
        if not needy and len(donor) > 1:
            needy.append(donor.pop())
    return splits


def train_small_model(
    splits: Splits, out: Path, seconds: float, threads: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tokenizer and a small Llama, trained with local memory, within a time budget."""
    tokenizer = train_tokenizer(splits.train, VOCABULARY, exact=False)
    config = TrainConfig.preset(
        "demo", method="trime", memory_after=MEMORY_AFTER, max_seconds=seconds, threads=threads
    )
    model = train_causal_lm(tokenize(splits.train, tokenizer), tokenizer, config, out / "model")
    return model, tokenizer


def journey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    out: Path,
    *,
    prompt: str,
    threads: int | None = None,
    say: Say = lambda line: None,
) -> Journey:
    """Build the store, index it, tune on dev, measure on test, continue a prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        splits: the store is made from ``train``; settings are chosen on a sample of ``dev`` and
            reported on a sample of ``test``.
        out: where store and results go.
        prompt: to continue with and without memory.
        threads: CPU threads.
        say: told what happens, line by line.
    """
    seconds: dict[str, float] = {}
    dev_part, test_part = sample(splits.dev, DEV_CHARACTERS), sample(splits.test, TEST_CHARACTERS)
    train, dev, test = (tokenize(part, tokenizer) for part in (splits.train, dev_part, test_part))
    windows = default_windows(model)

    with _timed(seconds, "store"):
        store = build_datastore(
            model,
            None,
            train,
            out / "store",
            windows=windows,
            config=ExtractionConfig(threads=threads),
        )
    say(f"datastore: {len(store):,} entries of {store.dim} dimensions in {seconds['store']:.0f} s")

    with _timed(seconds, "index"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the demo states the index it built
        approximate = index_store(store, index_config(store), threads=threads)
    described = approximate.describe()
    say(
        f"index: {described['factory']}, recall@{described['recall']['k']} "
        f"{described['recall']['value']:.2f}, in {seconds['index']:.0f} s"
    )

    with _timed(seconds, "cluster"):
        clusters = cluster_store(store, cluster_config(store), threads=threads)
    say(f"clusters: {len(clusters):,} in {seconds['cluster']:.0f} s")

    exact = KnnMemory(store, k=min(NEIGHBOURS, len(store)), index="exact")
    with _timed(seconds, "tune"):
        chosen = tune(model, dev, windows, exact, threads=threads)
    say(chosen.describe())
    best = exact.changed(chosen.best.k, chosen.best.temperature)
    with _timed(seconds, "evaluate"):
        evaluations = {"base": evaluate(model, test, windows, threads=threads)}
        for name, memory in memories_of(best, approximate, clusters).items():
            evaluations[name] = evaluate(
                model, test, windows, memory=memory, merge=chosen.merge, threads=threads
            )

    searched = KnnMemory(store, k=best.k, temperature=best.temperature, index=approximate)
    again = searched, Mixture(chosen.best.lam or 0.0)
    with _timed(seconds, "read"):
        read, rows = evaluate_reading(model, dev, test, windows, again, threads=threads)
    evaluations |= rows
    say(f"the text read before: {read.describe()}")

    with _timed(seconds, "lengths"):
        say(length_line(model, test, threads))

    with _timed(seconds, "generate"):
        completions = {"without memory": complete(model, tokenizer, prompt)}
        lm = attach(model, best, merge=chosen.merge)
        completions["with memory"] = complete(lm, tokenizer, prompt)
        lm.detach()

    write_json(
        out / "results.json",
        {
            "evaluations": {name: result.to_dict() for name, result in evaluations.items()},
            "tuning": chosen.to_dict(),
            "tuning_of_what_was_read": read.to_dict(),
            "completions": completions,
            "prompt": prompt,
            "seconds": seconds,
        },
    )
    return Journey(evaluations, completions, prompt, seconds, out)


def length_line(model: PreTrainedModel, corpus: TokenCorpus, threads: int | None) -> str:
    """Held-out perplexity at 1, 4 and 16 times the trained length, as it is and extended.

    LM-Infinite (Han et al. 2024); see `memlm.evaluation.length`. Says so if the text is too short
    or the model cannot be extended.
    """
    try:
        trained = trained_length(model)
        lengths = tuple(trained * times for times in (1, 4, 16) if trained * times <= len(corpus))
        config = LengthConfig(
            lengths=lengths or (trained,),
            window=trained,
            methods=("vanilla", "lm-infinite"),
            pieces=LENGTH_PIECES,
            scored=min(LENGTH_SCORED, trained - 1),
        )
        with torch_threads(threads):
            curve = measure_lengths(model, corpus.tokens, config, progress=False)
    except MemlmError as error:
        return f"lengths: not measured: {error}"
    rows = [
        f"{method} " + " ".join(f"{x.perplexity:.0f}" for x in curve.points if x.method == method)
        for method in config.methods
    ]
    return f"perplexity after {', '.join(map(str, lengths))} tokens: {'; '.join(rows)}"


def evaluate_reading(
    model: PreTrainedModel,
    dev: TokenCorpus,
    test: TokenCorpus,
    windows: SlidingWindows,
    external: tuple[TokenMemory, Mixture],
    *,
    threads: int | None,
) -> tuple[Tuning, dict[str, Evaluation]]:
    """The text that is read as memory: its window, the windows before, and the store once more.

    Args:
        model: the language model.
        dev: where temperature, size and merge are chosen.
        test: where they are reported.
        windows: the rule that cuts both.
        external: a store's memory and the weight at which it is mixed in.
        threads: CPU threads.

    Returns:
        What was chosen for both memories, and the evaluations by row name.
    """
    scale = model.config.get_text_config().hidden_size ** 0.5
    local = LocalMemory(windows.length, temperature=scale)
    both = Together(local, LongMemory(LONG, temperature=scale))
    shared: dict[str, Any] = {"threads": threads}

    def tuned(memory: TokenMemory) -> Tuning:
        return tune(model, dev, windows, memory, merges=("union", "mixture"), **shared)

    def row(found: Tuning, memory: TokenMemory, again: Any = None) -> Evaluation:
        return evaluate(
            model,
            test,
            windows,
            memory=found.apply(memory),
            merge=found.merge,
            interpolate=again,
            carry="window",
            **shared,
        )

    found = tuned(both)
    return found, {
        "local": row(tuned(local), local),
        "local + long": row(found, both),
        "local + long + external": row(found, both, external),
    }


def memories_of(best: KnnMemory, approximate: Index, clusters: Clusters) -> dict[str, TokenMemory]:
    """The memories to compare, by the names of their rows.

    Args:
        best: the settings that were chosen, with exact search.
        approximate: an index of the same store.
        clusters: of the same store.
    """
    settings: dict[str, Any] = {"k": best.k, "temperature": best.temperature}
    walking = AutomatonMemory(best.store, **settings, index=approximate, clusters=clusters)
    return {
        "kNN-LM, exact": best,
        f"kNN-LM, {approximate.describe()['factory']}": KnnMemory(
            best.store, **settings, index=approximate
        ),
        "RetoMaton": walking,
        "RetoMaton, always searching": walking.changed(**settings, min_knns=ALWAYS),
    }


def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int = 40) -> str:
    """The likeliest continuation of ``prompt``, token by token."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def library_splits() -> Splits:
    """The documentation of this Python's standard library, split by document."""
    return Splits(*python_library())


def index_config(store: Datastore) -> IndexConfig:
    """The paper's preset scaled down: sqrt(N) lists, 32 of them visited, a byte per 4 numbers."""
    lists = max(1, round(len(store) ** 0.5))
    return IndexConfig(
        type="ivfpq",
        metric=store.metric,
        lists=lists,
        code_size=max(1, store.dim // 4),
        nprobe=32,
        train_size=max(64 * lists, 16_384),
        recall_queries=200,
    )


def cluster_config(store: Datastore) -> ClusterConfig:
    """Quickly: a cluster per 400 entries, a few iterations (the paper: per 100 to 200, twenty)."""
    clusters = max(1, len(store) // ENTRIES_PER_CLUSTER)
    return ClusterConfig(clusters=clusters, iterations=CLUSTER_ITERATIONS)


def sample(documents: list[Document], characters: int) -> list[Document]:
    """Whole documents, in an order that only their names decide, until they hold ``characters``."""
    chosen, held = [], 0
    for document in sorted(documents, key=lambda document: _number(document.name)):
        if held < characters:
            chosen.append(document)
            held += len(document.text)
    return chosen


def _number(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
