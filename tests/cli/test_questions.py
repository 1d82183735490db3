"""``memlm evaluate --task``: questions from a file, whole or cut, extended or not."""

import json

import pytest

from memlm.cli.main import main
from memlm.testing.tiny import tiny_model

ANSWER = {"yes_no": True, "unanswerable": False, "free_form_answer": "", "extractive_spans": []}
PAPER = {
    "full_text": [{"section_name": "the cat", "paragraphs": ["the cat sat on the mat"]}],
    "qas": [{"question": "the dog ?", "answers": [{"answer": ANSWER}]}] * 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("questions")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "qasper.json").write_text(json.dumps({"1": PAPER}))
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_questions_are_asked(place, capsys):
    command = ("evaluate", place / "model", place / "qasper.json", "--task", "qasper")
    assert run(*command, "--answer-tokens", 4, "--save", place / "kept.json") == 0
    shown = capsys.readouterr().out
    assert "of 3 greedy answers, prompts whole; always answering 'yes': 100.00" in shown
    assert len(json.loads((place / "kept.json").read_text())["answers"]) == 3
    more = ("--length", 20, "--window", 8, "--sinks", 2, "--limit", 2, "--json")
    assert run(*command, *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reading"] == "window 8, 2 sinks"
    assert (len(found["answers"]), found["truncated"], found["length"]) == (2, 2, 20)


def test_what_makes_no_sense_is_refused(place, capsys):
    command = ("evaluate", place / "model", place / "qasper.json", "--task", "qasper")
    assert run(*command, "--length", 20, 30) == 2
    assert "cut to one --length, got 2" in capsys.readouterr().err
    assert run(*command, "--method", "trime") == 2
    assert "asks the model alone" in capsys.readouterr().err
    narrative = (*command[:-1], "narrative-qa")
    assert run(*narrative) == 2
    assert "must have the fields of NarrativeQA" in capsys.readouterr().err
