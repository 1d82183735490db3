"""Windows against the originals: run_clm's groups of tokens and fairseq's blocks with context."""

import json

import numpy as np

from memlm.data.batches import IGNORED, make_batch
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import BlockWindows, StrideWindows

EOS, PAD = 2, 1


def check_stride_windows(folder, tokens_name, block, stride):
    arrays = np.load(folder / "windows.npz")
    corpus = TokenCorpus.from_tokens(arrays[tokens_name])
    table = StrideWindows(block=block, stride=stride).table(corpus)
    assert table.windows == len(arrays["input_ids"])
    for row, (ids, labels) in enumerate(zip(arrays["input_ids"], arrays["labels"], strict=True)):
        begin, end, first = table.begin[row], table.end[row], table.first[row]
        assert corpus.tokens[begin:end].tolist() == ids[: end - begin].tolist()
        # labels[1:] are predicted; everything else of the row is padding or context
        asked = np.flatnonzero(labels[1:] != -100) + 1
        assert (begin + asked).tolist() == list(range(first, end))
        assert corpus.tokens[first:end].tolist() == labels[asked].tolist()
    return int(table.targets.sum())


def test_stride_windows_of_a_datastore(golden_retomaton_dstore_gpt2):
    folder = golden_retomaton_dstore_gpt2
    meta = json.loads((folder / "meta.json").read_text())
    assert check_stride_windows(folder, "train_ids", meta["block"], meta["stride"]) == meta["n"]


def test_stored_values_are_the_targets_in_window_order(golden_retomaton_dstore_gpt2):
    folder = golden_retomaton_dstore_gpt2
    meta = json.loads((folder / "meta.json").read_text())
    corpus = TokenCorpus.from_tokens(np.load(folder / "windows.npz")["train_ids"])
    table = StrideWindows(block=meta["block"], stride=meta["stride"]).table(corpus)
    batch = make_batch(corpus, table, np.arange(table.windows))
    values = np.fromfile(next(folder.glob("*_vals.npy")), dtype=np.int32)
    assert batch.targets[batch.targets != IGNORED].tolist() == values.tolist()


def test_stride_windows_of_an_evaluation(golden_retomaton_eval_gpt2):
    folder = golden_retomaton_eval_gpt2
    labels = np.load(folder / "windows.npz")["labels"]
    # the second window predicts as many tokens as windows move on by
    stride = int((labels[min(1, len(labels) - 1)] != -100).sum())
    scored = check_stride_windows(folder, "valid_ids", labels.shape[1], stride)
    assert scored == len(np.load(folder / "windows.npz")["base_logprob"])


UNITS = {"none": "stream", "complete": "lines", "eos": "line"}


def corpus_of_lines(lines):
    """The lines after the end-of-sentence token that fairseq puts before a corpus."""
    lines = [[EOS, *lines[0]], *lines[1:]]
    return TokenCorpus.from_tokens(
        np.concatenate(lines), np.cumsum([0, *(len(line) for line in lines)])
    )


def test_blocks(golden_trime_token_blocks):
    blocks = json.loads((golden_trime_token_blocks / "blocks.json").read_text())
    corpus = corpus_of_lines(blocks["lines"])
    checked = set()
    for case in blocks["cases"]:
        if case["break_mode"] not in UNITS:
            continue
        checked.add(case["break_mode"])
        windows = BlockWindows(block=case["block_size"] or 1, unit=UNITS[case["break_mode"]])
        table = windows.table(corpus)
        # our places count the leading eos, theirs do not
        assert (np.stack([table.first, table.end], axis=1) - 1).tolist() == case["slice_indices"]
        for row in range(table.windows):
            begin, end, first = table.begin[row], table.end[row], table.first[row]
            assert corpus.tokens[begin : end - 1].tolist() == case["source"][row]
            assert corpus.tokens[first:end].tolist() == case["target"][row]
    assert checked


def test_blocks_with_context(golden_trime_token_blocks):
    folder = golden_trime_token_blocks
    corpus = corpus_of_lines(json.loads((folder / "blocks.json").read_text())["lines"])
    for case in json.loads((folder / "context_window.json").read_text()):
        if case["break_mode"] not in UNITS:
            continue
        windows = BlockWindows(
            block=case["tokens_per_sample"],
            context=case["context_window"],
            unit=UNITS[case["break_mode"]],
        )
        table = windows.table(corpus)
        rows = 0
        for batch in case["batches"]:
            for row, number in enumerate(batch["id"]):
                begin, end, first = table.begin[number], table.end[number], table.first[number]
                start = batch["start_indices"][row]
                assert first - 1 - begin == start
                source, target = (np.array(batch[name][row]) for name in ("src_tokens", "target"))
                assert corpus.tokens[begin : end - 1].tolist() == source[: end - 1 - begin].tolist()
                assert corpus.tokens[first:end].tolist() == target[target != PAD].tolist()
                assert np.flatnonzero(target != PAD).tolist() == list(
                    range(start, start + end - first)
                )
                rows += 1
        assert rows == table.windows
