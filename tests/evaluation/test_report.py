import dataclasses

import pytest

from evaluation.memories import FixedMemory
from evaluation.test_perplexity import corpus_of
from memlm.core.errors import InputError
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.report import plain, protocol_lines, report, tuning_report
from memlm.evaluation.tune import tune
from memlm.testing.tiny import tiny_model


def render(evaluations):
    return plain(report(evaluations))


@pytest.fixture(scope="module")
def evaluations():
    model, corpus, windows = tiny_model("llama"), corpus_of(), SlidingWindows(8, 3)
    return {
        "model alone": evaluate(model, corpus, windows),
        "with memory": evaluate(model, corpus, windows, memory=FixedMemory()),
    }


def test_numbers_and_protocol_stand_together(evaluations):
    text = render(evaluations)
    for evaluation in evaluations.values():
        assert f"{evaluation.perplexity:,.2f}" in text
    ratio = evaluations["with memory"].compare(evaluations["model alone"]).ratio
    assert f"x{ratio:.3f}" in text
    assert "sliding windows of 8 tokens, stride 3" in text
    assert "model alone: memory off" in text
    assert "with memory: memory fixed k=5 temperature=2, exact search, mixture lam=0.25" in text


def test_different_protocols_are_named(evaluations):
    other = evaluate(tiny_model("llama"), corpus_of(), SlidingWindows(5, 3))
    lines = protocol_lines({**evaluations, "short": other})
    assert lines[0].startswith("protocol (short): sliding windows of 5 tokens")
    assert lines[1].startswith("protocol (model alone, with memory): sliding windows of 8 tokens")


def test_another_corpus_is_not_compared(evaluations):
    other = evaluate(tiny_model("llama"), corpus_of(seed=1), SlidingWindows(8, 3))
    assert "other tokens" in render({**evaluations, "elsewhere": other})


def test_one_row_has_one_line(evaluations):
    only = {"model alone": evaluations["model alone"]}
    assert protocol_lines(only) == [f"protocol: {only['model alone'].describe()}"]


def test_one_document_has_no_interval(evaluations):
    alone = evaluate(tiny_model("llama"), corpus_of((20,)), SlidingWindows(8, 3))
    assert "one document" in render({"alone": alone})


def test_unknown_sizes_are_dashes(evaluations):
    row = next(line for line in render(evaluations).splitlines() if line.startswith("model alone "))
    assert row.split()[-3:-1] == ["-", "-"]
    known = dataclasses.replace(
        evaluations["model alone"].documents, bytes=(50, 1, 20, 60), words=(9, 1, 4, 12)
    )
    text = render({"x": dataclasses.replace(evaluations["model alone"], documents=known)})
    assert " - " not in text


def test_documents_scored_in_part_are_named(evaluations):
    alone = evaluations["model alone"]
    sums = dataclasses.replace(alone.documents, bytes=(9,) * 4, unscored=(5, 1, 1, 1))
    line = "bits per byte and per word over the 2 of 3 documents scored whole"
    only = {"alone": dataclasses.replace(alone, documents=sums)}
    assert protocol_lines(only)[1] == line
    assert protocol_lines({**only, "b": alone})[-1] == f"alone: {line}"


def test_tuning(evaluations):
    tuning = tune(tiny_model("llama"), corpus_of(), SlidingWindows(8, 3), FixedMemory())
    text = plain(tuning_report(tuning, best=3))
    assert len(text.splitlines()) >= 1 + 3 + 2
    first = text.splitlines()[1].split()
    assert float(first[0]) == tuning.best.lam
    assert first[3] == f"{tuning.best.perplexity:,.2f}"
    assert "chosen on this text" in text
    assert "exact search" in text
    with pytest.raises(InputError, match="at least 1 setting, got 0"):
        tuning_report(tuning, best=0)


def test_nothing_to_report():
    with pytest.raises(InputError, match="at least one evaluation"):
        render({})
