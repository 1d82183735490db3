"""Questions about long texts: Qasper and NarrativeQA, as prompts with their true answers.

Qasper (Dasigi et al. 2021) asks about scientific articles, NarrativeQA (Kočiský et al. 2018) about
stories. The whole text stands in the prompt:

    instruction   Article: section names and paragraphs   Question: ...   instruction  <Answer>

Prompts of Qasper are those of LM-Infinite's scripts (Han et al. 2024, section 4.4), with the marks
of a Llama 2 chat (``"chat"``) or without (``"plain"``). Every annotator's answer is a reference:
yes or no, else "unanswerable", else the free answer, else the spans of the text. NarrativeQA has
the same frame around an instruction of ours.

Files are read as they were released, or as rows of a data set: .json, .jsonl or .parquet.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.data.documents import read_records

Style = Literal["chat", "plain"]
Rows = str | Path | Iterable[Mapping[str, Any]]

_ROWS_AT_ONCE = 64
_SYSTEM = "You are a helpful, concise and honest assistant."
_ARTICLE = (
    "You are given a scientific article and a question. Answer the question as concisely as you "
    "can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Article: '
)
_STORY = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer "
    "the question as concisely as you can, using a single phrase if possible. Story: "
)
_TAGS = (
    "Please highlight your final answer with a single pair of <Answer> </Answer> tags. Do not "
    "provide any explanation."
)


class Question(NamedTuple):
    """One question about one text.

    Attributes:
        prompt: ends with an opened answer tag.
        references: true answers, at least one.
        question: alone.
        document: id of the text.
    """

    prompt: str
    references: tuple[str, ...]
    question: str
    document: str


def read_qasper(source: Rows, *, style: Style = "plain") -> list[Question]:
    """The questions of Qasper, paper by paper.

    Args:
        source: the released .json file (papers by id), a .json, .jsonl or .parquet file of rows,
            or rows of the data set.
        style: of the prompts.

    Raises:
        InputError: if there is no question, or a paper has not the fields of Qasper.
    """
    return _questions(source, style, _qasper_paper, "Qasper")


def read_narrative_qa(source: Rows, *, style: Style = "plain") -> list[Question]:
    """The questions of NarrativeQA, in the order of the rows.

    Args:
        source: a .json, .jsonl or .parquet file of rows, or rows of the data set, with the whole
            story.
        style: of the prompts.

    Raises:
        InputError: if there is no question, or a row has not the fields of NarrativeQA.
    """
    return _questions(source, style, _narrative_row, "NarrativeQA")


def answer_in(text: str) -> str:
    """The answer in what a model wrote after an opened tag: up to the end of the tag or line."""
    answer = text.split("</Answer>")[0].split("<Answer>")[-1].strip()
    return answer.split("\n")[0].strip()


def _questions(source: Rows, style: Style, read: Any, name: str) -> list[Question]:
    check(style in ("chat", "plain"), f"style must be 'chat' or 'plain', got {style!r}")
    found: list[Question] = []
    for where, row in _rows(source):
        try:
            found.extend(read(row, style))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"{where} must have the fields of {name}, but reading them failed "
                f"({type(error).__name__}: {error}); convert it to the released format"
            ) from error
    check(len(found) > 0, f"there must be at least one question of {name}, got none")
    return found


def _rows(source: Rows) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | Path):
        yield from ((f"row {number}", row) for number, row in enumerate(source))
        return
    path = Path(source)
    if ".jsonl" in path.suffixes:
        yield from read_records(path)
        return
    if path.suffix == ".parquet":
        yield from ((f"row {n} of {path}", row) for n, row in enumerate(_parquet_rows(path)))
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} must be a file of JSON that can be read, but is not ({error})"
        ) from error
    check(
        isinstance(value, dict | list) and all(isinstance(row, dict) for row in _plain_rows(value)),
        f"{path} must hold papers by id or a list of rows; convert it to the released format",
    )
    if isinstance(value, dict):
        yield from ((f"paper {key} of {path}", {"id": key, **row}) for key, row in value.items())
    else:
        yield from ((f"row {number} of {path}", row) for number, row in enumerate(value))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A few rows at a time: a story is a whole book."""
    # comes with datasets, and needs a moment to load
    from pyarrow import ArrowException, parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise InputError(
            f"{path} must be a parquet file that can be read, but is not ({error})"
        ) from error


def _plain_rows(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _qasper_paper(paper: Mapping[str, Any], style: Style) -> Iterator[Question]:
    article = "".join(
        f"{section['section_name']} {' '.join(section['paragraphs'])} "
        for section in _each(paper["full_text"])
    )
    for asked in _each(paper["qas"]):
        annotations = asked["answers"]
        answers = (
            annotations["answer"]
            if isinstance(annotations, Mapping)
            else [annotation["answer"] for annotation in annotations]
        )
        references = tuple(_annotated(answer) for answer in answers)
        if references:
            prompt = _prompt(_ARTICLE, article, asked["question"], style)
            yield Question(prompt, references, asked["question"], str(paper["id"]))


def _narrative_row(row: Mapping[str, Any], style: Style) -> Iterator[Question]:
    document, question = row["document"], row["question"]["text"]
    prompt = _prompt(_STORY, document["text"], question, style)
    references = tuple(answer["text"] for answer in row["answers"])
    yield Question(prompt, references, question, str(document["id"]))


def _each(value: Any) -> list[Mapping[str, Any]]:
    """Rows, whether they came as such or as columns."""
    if not isinstance(value, Mapping):
        return list(value)
    columns = list(value)
    return [dict(zip(columns, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _annotated(answer: Mapping[str, Any]) -> str:
    if answer["yes_no"] is not None:
        return "yes" if answer["yes_no"] else "no"
    if answer["unanswerable"]:
        return "unanswerable"
    return answer["free_form_answer"] or " ".join(answer["extractive_spans"])


def _prompt(instruction: str, text: str, question: str, style: Style) -> str:
    asked = f"{instruction}{text} Question: {question} {_TAGS}"
    if style == "plain":
        return f"{_SYSTEM} {asked} <Answer>"
    return f"<s>[INST] <<SYS>> \n {_SYSTEM} <</SYS>> \n  {asked} [/INST] \n <Answer>"
