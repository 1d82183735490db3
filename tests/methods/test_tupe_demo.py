"""The demonstration of TUPE, small, and what it refuses."""

import json

import pytest

from memlm.core.errors import InputError
from memlm.data.documents import Document
from memlm.methods.tupe_demo import FRESH, SCHEMES, demo, shuffled

SMALL = {
    "layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 16, "batch_tokens": 256,
    "precision": "float32",
}  # fmt: skip
COLOURS = ("red", "blue", "green", "white", "black", "brown", "golden", "silver", "grey", "pink")


def document(part, number, colours=COLOURS):
    thing = {"sea": "ships and sailors on the wide and stormy ocean", "land": "farmers and horses"}
    lines = [
        f"The {one} and {two} {thing[part]} were seen by travellers number {number} near the hill."
        for one in colours for two in colours[:3]
    ]  # fmt: skip
    return Document(f"{part}.{number}", "\n".join(lines))


TRAIN = [document(part, number) for part in ("sea", "land") for number in ("one", "two", "three")]
TEST = [document(part, "four", COLOURS[:5]) for part in ("sea", "land")]


def run(out, prompt=None, test=TEST):
    return demo(out, TRAIN, test, seconds=0.3, prompt=prompt, threads=1, **SMALL)


def test_the_whole_way(tmp_path):
    found = run(tmp_path, "the <mask> ships were seen")
    assert set(found.models) == set(found.losses) == set(found.labels) == set(SCHEMES)
    runs = [json.loads((tmp_path / one / "training.json").read_text()) for one in SCHEMES]
    assert found.steps == runs[0]["steps"] == runs[1]["steps"]
    assert found.blanks[0].sentence == "the <mask> ships were seen"
    assert all(len(words) == 3 for words in found.blanks[0].guesses.values())
    assert all(blank.word and blank.word not in blank.sentence for blank in found.blanks[1:2])
    assert set(found.accuracies) == {*SCHEMES, FRESH}
    assert all(0 <= value <= 1 for value in found.accuracies.values())
    assert (tmp_path / "tupe-r.png").stat().st_size > 1000
    text = found.describe()
    assert f"{found.tokens:,} masked tokens in {found.steps:,} steps" in text
    assert "words shuffled" in text
    assert json.loads((tmp_path / "results.json").read_text())["losses"] == found.losses
    again = run(tmp_path)
    assert (again.losses, again.accuracies) == (found.losses, found.accuracies)


def test_short_sentences_are_not_shuffled(tmp_path):
    word = "tremendously" * 3
    found = run(tmp_path, test=[Document("short", f"{word} {word} {word}.")])
    assert found.accuracies == {}
    assert "shuffled" not in found.describe()


def test_every_second_sentence_is_shuffled():
    texts = [f"one two three four five six seven eight n{number} ." for number in range(20)]
    rows = shuffled(texts, 10)
    assert [row["label"] for row in rows] == ["as it was", "shuffled"] * 5
    for row in rows:
        assert (row["sentence"] in texts) == (row["label"] == "as it was")
        assert sorted(row["sentence"].split()) in [sorted(text.split()) for text in texts]
        assert row["sentence"].endswith(" .")
    assert shuffled(["too few words"], 10) == []


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="the prompt must hold <mask> once"):
        run(tmp_path, "no blank at all")
    with pytest.raises(InputError, match="must have sentences to learn and to hold out"):
        run(tmp_path, test=TRAIN)
