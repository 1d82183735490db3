"""Windows: every token predicted once, the promised context, and the drawings of the docstrings."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import (
    BlockWindows,
    SlidingWindows,
    StrideWindows,
    windows_from_dict,
)

several = settings(max_examples=60, deadline=None)


def corpus_of(lengths, begin_token=None):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenCorpus.from_tokens(np.arange(offsets[-1]), offsets, begin_token=begin_token)


def rows_of(table):
    return list(zip(table.begin.tolist(), table.first.tolist(), table.end.tolist(), strict=True))


def predicted(table):
    return [place for _, first, end in rows_of(table) for place in range(first, end)]


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda x: max(x) >= 2)


@several
@given(lengths=lengths, length=st.integers(1, 20), data=st.data(), begin=st.booleans())
def test_sliding_windows_predict_every_token_once_with_the_promised_context(
    lengths, length, data, begin
):
    stride = data.draw(st.integers(1, length))
    corpus = corpus_of(lengths, begin_token=0 if begin else None)
    table = SlidingWindows(length=length, stride=stride).table(corpus)
    beginnings = set(corpus.offsets[:-1].tolist())
    assert predicted(table) == [i for i in range(len(corpus)) if i not in beginnings]
    assert table.inputs.max() <= length
    for (first_input, first, end), document in zip(rows_of(table), table.document, strict=True):
        start, stop = corpus.offsets[document], corpus.offsets[document + 1]
        assert start <= first_input < first < end <= stop
        for target in (first, end - 1):
            assert target - first_input >= min(target - start, length - stride + 1)
    assert (table.targets == table.end - table.first).all()


@several
@given(lengths=lengths, length=st.integers(1, 20), data=st.data())
def test_sliding_windows_across_documents_see_one_text(lengths, length, data):
    stride = data.draw(st.integers(1, length))
    windows = SlidingWindows(length=length, stride=stride, cross_documents=True)
    joined = corpus_of([sum(lengths)])
    if len(joined) < 2:
        return
    assert rows_of(windows.table(corpus_of(lengths))) == rows_of(windows.table(joined))
    assert predicted(windows.table(joined)) == list(range(1, len(joined)))


def run_clm(lengths, block, stride, group):
    """The published rule, one token at a time: (visible tokens, target) of every scored label."""
    scored, start = [], 0
    for at in range(0, len(lengths), group):
        total = sum(lengths[at : at + group])
        kept = total // block * block if total >= block else total
        for i in range(0, kept, stride):
            begin, end = max(i + stride - block, 0), min(i + stride, kept)
            labelled = [place >= end - (end - i) for place in range(begin, end)]
            for place in range(begin + 1, end):
                if labelled[place - begin]:
                    scored.append((start + begin, start + place))
        start += total
    return scored


@several
@given(lengths=lengths, block=st.integers(2, 12), group=st.integers(1, 4), data=st.data())
def test_stride_windows_follow_the_published_loop(lengths, block, group, data):
    stride = data.draw(st.integers(1, block))
    expected = run_clm(lengths, block, stride, group)
    windows = StrideWindows(block=block, stride=stride, group=group)
    if not expected:
        with pytest.raises(InputError, match="at least one token"):
            windows.table(corpus_of(lengths))
        return
    table = windows.table(corpus_of(lengths))
    found = [(begin, place) for begin, first, end in rows_of(table) for place in range(first, end)]
    assert found == expected
    assert table.inputs.max() < block
    assert len(set(predicted(table))) == len(predicted(table))


def fairseq(sizes, windows):
    """Blocks of (source, target) places from a plain reading of the rule, with running context.

    The stream of targets is numbered from 1; place 0 is the leading eos.
    """
    total = sum(sizes)
    if windows.unit == "stream":
        cuts = [*range(0, total, windows.block), total]
    elif windows.unit == "line":
        cuts = [0, *np.cumsum(sizes).tolist()]
    else:
        cuts, current, end = [0], 0, 0
        for size in sizes:
            if current and current + size > windows.block:
                cuts.append(end)
                current = 0
            current, end = current + size, end + size
        cuts.append(end)
    rows, previous = [], []
    for low, high in pairwise(cuts):
        source = list(range(low, high))
        extra = len(previous) + len(source) - (windows.block + windows.context)
        if extra > 0:
            previous = previous[extra:]
        row = previous + source
        rows.append((row, list(range(low + 1, high + 1))))
        previous = row[len(row) - windows.context :] if windows.context else []
        previous = row if len(row) < windows.context else previous
    return rows


@several
@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=10),
    block=st.integers(1, 12),
    context=st.integers(0, 20),
    unit=st.sampled_from(["stream", "lines", "line"]),
)
def test_block_windows_follow_the_published_loop(sizes, block, context, unit):
    windows = BlockWindows(block=block, context=context, unit=unit)
    expected = fairseq(sizes, windows)
    table = windows.table(corpus_of([sizes[0] + 1, *sizes[1:]]))  # one leading eos
    assert predicted(table) == list(range(1, sum(sizes) + 1))
    assert [list(range(begin, end - 1)) for begin, _, end in rows_of(table)] == [
        row for row, _ in expected
    ]
    assert [list(range(first, end)) for _, first, end in rows_of(table)] == [
        targets for _, targets in expected
    ]


@pytest.mark.parametrize("unit", ["stream", "lines", "line"])
def test_the_leading_eos_of_fairseq_may_be_a_document_of_its_own(unit):
    windows = BlockWindows(block=5, context=2, unit=unit)
    joined, apart = corpus_of([1 + 4, 3, 6, 2]), corpus_of([1, 4, 3, 6, 2])
    assert rows_of(windows.table(apart)) == rows_of(windows.table(joined))
    assert (windows.table(apart).document == windows.table(joined).document + 1).all()


def test_the_drawings_of_the_docstrings():
    assert rows_of(SlidingWindows(length=6, stride=3).table(corpus_of([11]))) == [
        (0, 1, 7),
        (3, 7, 10),
        (4, 10, 11),
    ]
    assert rows_of(StrideWindows(block=6, stride=3).table(corpus_of([13]))) == [
        (0, 1, 3),
        (0, 3, 6),
        (3, 6, 9),
        (6, 9, 12),
    ]
    assert rows_of(BlockWindows(block=4, context=3).table(corpus_of([10]))) == [
        (0, 1, 5),
        (1, 5, 9),
        (5, 9, 10),
    ]


def test_lines_with_begin_tokens_are_scored_without_them():
    table = BlockWindows(block=8, unit="line").table(corpus_of([4, 0, 1, 3], begin_token=0))
    assert rows_of(table) == [(0, 1, 4), (5, 6, 8)]
    assert table.document.tolist() == [0, 3]


def test_documents_too_short_to_predict_anything_are_passed_over():
    table = SlidingWindows(length=4, stride=2).table(corpus_of([1, 0, 3, 1]))
    assert rows_of(table) == [(1, 2, 4)]
    assert table.document.tolist() == [2]


@pytest.mark.parametrize(
    "windows",
    [
        SlidingWindows(length=7, stride=3, cross_documents=True),
        StrideWindows(block=8, stride=2, group=5),
        BlockWindows(block=9, context=4, unit="lines"),
    ],
)
def test_rules_round_trip_and_describe_themselves(windows):
    assert windows_from_dict(windows.to_dict()) == windows
    for value in (3, 7) if isinstance(windows, SlidingWindows) else (8,):
        if not isinstance(windows, BlockWindows):
            assert str(value) in windows.describe()
    assert "documents" in windows.describe()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SlidingWindows(length=0), "length must be at least 1"),
        (lambda: SlidingWindows(length=4, stride=5), r"between 1 and length \(4\).*got 5"),
        (lambda: SlidingWindows(length=4, stride=0), "stride must lie"),
        (lambda: StrideWindows(block=1), "block must be at least 2"),
        (lambda: StrideWindows(block=8, stride=9), r"between 1 and block \(8\).*got 9"),
        (lambda: StrideWindows(group=0), "group must be at least 1"),
        (lambda: BlockWindows(block=0), "block must be at least 1"),
        (lambda: BlockWindows(context=-1), "context must not be negative, got -1"),
        (lambda: BlockWindows(unit="words"), "unit must be .*got 'words'"),  # type: ignore[arg-type]
        (lambda: windows_from_dict({"kind": "Round"}), "one of BlockWindows, .*got 'Round'"),
        (lambda: windows_from_dict({}), "got None"),
        (lambda: SlidingWindows().table(corpus_of([1, 1])), r"2 documents, 2 tokens.*more text"),
        (
            lambda: SlidingWindows(cross_documents=True).table(corpus_of([5], begin_token=0)),
            "would score the begin token",
        ),
        (lambda: StrideWindows().table(corpus_of([5], begin_token=3)), r"begin token \(3\)"),
        (lambda: BlockWindows().table(corpus_of([5], begin_token=0)), "begin=False"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
