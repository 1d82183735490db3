"""Tune a memory on one text, report it on another: how a kNN-LM number should be made.

    python examples/tune_and_evaluate.py

Three texts that share no document: one fills the datastore (and trains the small model), one
chooses lam, temperature and k, one is reported. Nothing is downloaded; it takes a few seconds.
"""

import tempfile
from pathlib import Path

from rich.console import Console

import memlm
from memlm.data.python_library import python_library
from memlm.evaluation.report import report


def main(out: Path) -> None:
    # Documentation that every Python carries, split by document, without repeats between splits.
    library = python_library()
    tokenizer = memlm.train_tokenizer(library.train[100:180], vocab_size=1000)
    train, dev, test = (
        memlm.tokenize(documents, tokenizer)
        for documents in (library.train[100:180], library.dev[:12], library.test[:16])
    )
    config = memlm.TrainConfig(
        hidden_size=64,
        layers=2,
        intermediate_size=128,
        block_length=64,
        batch_tokens=512,
        max_steps=80,
    )
    model = memlm.train_causal_lm(train, tokenizer, config, out / "model")

    # The windows decide how much context a scored token has; they belong to every number.
    windows = memlm.SlidingWindows(length=64, stride=32)
    store = memlm.build_datastore(model, None, train, out / "store", windows=windows)
    memory = memlm.KnnMemory(store, k=64)

    # One pass keeps the neighbours of every dev token; the grid over them takes seconds.
    chosen = memlm.tune(model, dev, windows, memory)
    print(chosen.describe())
    best = memory.changed(chosen.best.k, chosen.best.temperature)

    base = memlm.evaluate(model, test, windows)
    with_memory = memlm.evaluate(model, test, windows, memory=best, merge=chosen.merge)
    Console().print(report({"model alone": base, "with memory": with_memory}))
    print(with_memory.compare(base).describe())
    with_memory.save(out / "with-memory.json")  # all that is needed to repeat it


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
