"""Questions about texts: released files, rows and columns give the same; bad files are named."""

import json

import datasets
import pytest

from memlm.core.errors import InputError
from memlm.data.qasper import answer_in, read_narrative_qa, read_qasper


def answer(**given):
    fields = {"yes_no": None, "unanswerable": False, "free_form_answer": "", "extractive_spans": []}
    return {**fields, **given}


ANSWERS = [
    [answer(free_form_answer="a list"), answer(extractive_spans=["one", "two"])],
    [answer(yes_no=False)],
    [answer(unanswerable=True, free_form_answer="no idea")],
    [],
]
SECTIONS = [{"section_name": "Start", "paragraphs": ["First.", ""]}]
PAPER = {
    "full_text": SECTIONS,
    "qas": [
        {"question": f"What {number}?", "answers": [{"answer": one} for one in answers]}
        for number, answers in enumerate(ANSWERS)
    ],
}
COLUMNS = {
    "id": "7",
    "full_text": {"section_name": ["Start"], "paragraphs": [["First.", ""]]},
    "qas": {
        "question": [f"What {number}?" for number in range(4)],
        "answers": [{"answer": answers} for answers in ANSWERS],
    },
}
STORY = {
    "document": {"id": "s", "text": "Once upon a time."},
    "question": {"text": "When?"},
    "answers": [{"text": "once"}, {"text": "upon a time"}],
}


def test_released_files_and_rows_are_the_same(tmp_path):
    (tmp_path / "released.json").write_text(json.dumps({"7": PAPER}))
    (tmp_path / "rows.jsonl").write_text(json.dumps(COLUMNS) + "\n")
    (tmp_path / "rows.json").write_text(json.dumps([COLUMNS]))
    found = read_qasper(tmp_path / "released.json")
    assert [row.references for row in found] == [("a list", "one two"), ("no",), ("unanswerable",)]
    assert [row.question for row in found] == ["What 0?", "What 1?", "What 2?"]
    assert "Article: Start First.   Question: What 0? Please" in found[0].prompt
    datasets.Dataset.from_list([COLUMNS]).to_parquet(tmp_path / "rows.parquet")
    paths = [tmp_path / f"rows.{ending}" for ending in ("jsonl", "json", "parquet")]
    for source in (*paths, [COLUMNS]):
        assert read_qasper(source) == found


def test_stories(tmp_path):
    (row,) = read_narrative_qa([STORY], style="chat")
    assert row.references == ("once", "upon a time")
    assert "Story: Once upon a time. Question: When?" in row.prompt
    assert row.prompt.startswith("<s>[INST]")


def test_answers_end_with_their_tag_or_line():
    assert answer_in(" seed lexicon </Answer> because") == "seed lexicon"
    assert answer_in("well <Answer>yes</Answer>") == "yes"
    assert answer_in("\nno\nand more") == "no"
    assert answer_in("") == ""


def test_bad_files_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(InputError, match="must hold papers by id or a list of rows"):
        read_qasper(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="must be a file of JSON that can be read"):
        read_qasper(tmp_path / "bad.json")
    (tmp_path / "bad.parquet").write_text("no parquet")
    for name in ("bad.parquet", "missing.parquet"):
        with pytest.raises(InputError, match=r"must be a parquet file that can be read"):
            read_qasper(tmp_path / name)
    datasets.Dataset.from_list([STORY]).to_parquet(tmp_path / "stories.parquet")
    with pytest.raises(InputError, match=r"row 0 of .*stories.parquet must have the fields of Qas"):
        read_qasper(tmp_path / "stories.parquet")
    with pytest.raises(InputError, match="row 0 must have the fields of Qasper"):
        read_qasper([STORY])
    with pytest.raises(InputError, match="row 0 must have the fields of NarrativeQA"):
        read_narrative_qa([COLUMNS])
    with pytest.raises(InputError, match="at least one question of Qasper"):
        read_qasper([])
    with pytest.raises(InputError, match="style must be 'chat' or 'plain', got 'free'"):
        read_qasper([COLUMNS], style="free")  # type: ignore[arg-type]
