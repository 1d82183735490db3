"""Building datastores: right entries, same bytes whoever builds, refusals, resumption."""

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memlm.core.errors import FingerprintError, InputError
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.models.taps import find_tap, forward_to_tap
from memlm.testing.tiny import VOCABULARY, tiny_model

WINDOWS = SlidingWindows(length=16, stride=8)
CONFIG = ExtractionConfig(dtype="float32", batch_tokens=64, shard_entries=50, threads=1)


def corpus_of(documents=(70, 1, 33, 16, 2, 90), seed=0) -> TokenCorpus:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *documents])
    return TokenCorpus.from_tokens(rng.integers(0, VOCABULARY, offsets[-1]), offsets)


def build(path, model=None, corpus=None, windows=WINDOWS, config=CONFIG, **rest):
    return build_datastore(
        model or tiny_model("llama"),
        None,
        corpus or corpus_of(),
        path,
        windows=windows,
        config=config,
        progress=False,
        **rest,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "build-log.jsonl"
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_entries_equal_one_token_at_a_time(family, tmp_path):
    model, corpus = tiny_model(family), corpus_of()
    store = build(tmp_path / "s", model, corpus)
    table, tap = WINDOWS.table(corpus), find_tap(model)
    entry = 0
    for window in range(table.windows):
        for place in range(table.first[window], table.end[window]):
            tokens = corpus.tokens[table.begin[window] : place].astype(np.int64)
            with torch.inference_mode():
                states = forward_to_tap(model, tap, torch.from_numpy(tokens)[None])
            torch.testing.assert_close(
                store.gather(torch.tensor(entry)), states[0, -1], atol=1e-5, rtol=1e-5
            )
            assert store.values[entry] == corpus.tokens[place]
            document = int(corpus.document_of(place))
            assert store.documents is not None
            assert store.positions is not None
            assert store.documents[entry] == document
            assert store.positions[entry] == place - corpus.offsets[document]
            entry += 1
    assert entry == len(store)


def test_three_workers_write_the_bytes_of_one(tmp_path):
    build(tmp_path / "one")
    build(tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_repeating_the_command_opens_the_finished_store(tmp_path):
    first = build(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.safetensors")}
    assert build(tmp_path / "s").fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "other weights"}, "model_hash"),
        ({"corpus": corpus_of(seed=1)}, "corpus_hash"),
        ({"windows": SlidingWindows(length=16, stride=4)}, "windows"),
        ({"config": replace(CONFIG, tap="final")}, "tap"),
        ({"config": replace(CONFIG, dtype="float16")}, "dtype"),
        ({"config": replace(CONFIG, batch_tokens=32)}, "batch_tokens"),
        ({"config": replace(CONFIG, threads=2)}, "threads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_identity_is_refused_with_both_fingerprints(change, field, tmp_path):
    build(tmp_path / "s")
    if change.get("model"):
        change = {"model": tiny_model("llama", seed=99)}
    with pytest.raises(FingerprintError, match=rf"xxh3_128:\w+.*xxh3_128:\w+(.|\n)*{field}"):
        build(tmp_path / "s", **change)


def test_thread_count_of_a_begun_build_is_kept(tmp_path):
    build(tmp_path / "s")
    assert (
        build(tmp_path / "s", config=replace(CONFIG, threads=None)).manifest.identity.threads == 1
    )


def test_text_is_read_and_tokenised(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log")
    model = tiny_model("llama")
    store = build_datastore(
        model, tokenizer, str(text), tmp_path / "s", config=CONFIG, progress=False
    )
    words = [tokenizer.decode([token]) for token in store.values.tolist()]
    assert words[:3] == ["the", "cat", "sat"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": SlidingWindows(length=512)}, "not be longer than the model's 128 positions"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"corpus": TokenCorpus.from_tokens([5])}, "at least one token"),
    ],
)
def test_bad_requests(arguments, message, tmp_path):
    long = corpus_of(documents=(700,))
    with pytest.raises(InputError, match=message):
        build(tmp_path / "s", **{"corpus": long, **arguments})


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="a tokenizer is needed to read text"):
        build_datastore(tiny_model("llama"), None, ["some text"], tmp_path / "s")


@pytest.mark.parametrize("changes", [{"batch_tokens": 0}, {"shard_entries": 0}, {"threads": 0}])
def test_bad_settings(changes):
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        ExtractionConfig(**changes)


def _child(out: str) -> None:
    build(out, corpus=LARGE, config=SMALL_SHARDS)


LARGE = corpus_of(documents=(4000, 300))
SMALL_SHARDS = replace(CONFIG, shard_entries=20)


def killed_builds(out: Path, kills: int, seed: int) -> int:
    """Start the build and kill it at random moments; how many kills hit a running build."""
    rng = np.random.default_rng(seed)
    # A server that has imported everything forks the children, so each starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memlm.extract.build", "memlm.testing.tiny"])
    hits = 0
    for _ in range(kills):
        child = context.Process(target=_child, args=(str(out),))
        child.start()
        while child.is_alive() and not (out / "manifest.json").exists():
            time.sleep(0.001)
        child.join(timeout=rng.uniform(0, 0.3))
        hits += child.is_alive()
        child.kill()
        child.join()
    return hits


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.faults)])
def test_a_killed_build_continues_to_the_same_bytes(kills, tmp_path):
    build(tmp_path / "whole", corpus=LARGE, config=SMALL_SHARDS)
    hits, rounds = 0, 0
    while hits < kills:
        out = tmp_path / f"killed-{rounds}"
        hits += killed_builds(out, kills=min(5, kills - hits), seed=rounds)
        build(out, corpus=LARGE, config=SMALL_SHARDS)
        assert contents(out) == contents(tmp_path / "whole")
        rounds += 1
        assert rounds < 4 * kills, "the build finishes before it can be killed"
