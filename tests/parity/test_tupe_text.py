"""Text preparation of TUPE against the authors' scripts."""

import json

import pytest

from memlm.core.errors import InputError
from memlm.data import cleaning
from memlm.data.bpe_codes import learn_codes, read_codes


def merge(text):
    return "".join(
        "".join(f"{line}\n" for line in cleaning.merge_short(paragraph)) + "\n"
        for paragraph in cleaning.paragraphs(text.splitlines(), legacy=True)
    )


def by_line(function):
    return lambda text, *_: "".join(f"{function(line)}\n" for line in text.splitlines())


def lines_of(function):
    return lambda text, *given: "".join(f"{line}\n" for line in function(text.splitlines(), *given))


STAGES = {
    "common/precleanup_english.py": by_line(cleaning.clean),
    "pretrain/filter_and_cleanup_lines.py": lines_of(cleaning.cleaned_lines),
    "pretrain/replace_patterns.py": by_line(cleaning.replace_patterns),
    "glue/cleanup.py": by_line(cleaning.glue_line),
    "pretrain/concat_short_sentences.py": lambda text: merge(text),
    "common/length_filter_by_char.py": lines_of(
        lambda lines, low, high: cleaning.keep_length(lines, int(low), int(high))
    ),
}


def test_stages(golden_tupe_text_pipeline):
    recorded = json.loads((golden_tupe_text_pipeline / "text.json").read_text())
    checked = set()
    for stage in recorded["stages"]:
        run = STAGES.get(stage["script"])
        if run is None:
            continue
        if stage["returncode"]:
            with pytest.raises(InputError, match="two blank lines"):
                run(stage["stdin"])
            continue
        assert run(stage["stdin"], *stage["args"]) == stage["stdout"], stage["script"]
        checked.add(stage["script"])
    assert checked == {one["script"] for one in recorded["stages"]} & set(STAGES)


def test_word_frequencies(golden_tupe_text_pipeline):
    recorded = json.loads((golden_tupe_text_pipeline / "text.json").read_text())
    for case in recorded["calc_wordfreq"]:
        lines = case["input"].splitlines()
        ranked, kept = cleaning.frequent_words(lines, float(case["cutoff"]))
        assert "".join(f"{word} {count}\n" for word, count in ranked) == case["unigram_file"]
        filtered = "".join(f"{cleaning.keep_words(line, kept)}\n" for line in lines if line.split())
        assert filtered == case["filtered"]


def test_codes(golden_tupe_text_pipeline, tmp_path):
    recorded = json.loads((golden_tupe_text_pipeline / "text.json").read_text())
    for case in recorded["fastbpe"]:
        (tmp_path / "codes").write_text(case["codes_file"])
        codes = read_codes(tmp_path / "codes")
        applied = "".join(f"{codes.apply(line)}\n" for line in case["apply_input"].splitlines())
        assert applied == case["apply_output"]
        learnt = learn_codes(case["train_text"].splitlines(), case["n_codes"])
        counts = [int(line.split()[2]) for line in case["codes_file"].splitlines()]
        assert [count for *_, count in learnt] == counts


def test_held_out_lines(golden_tupe_text_pipeline):
    split = json.loads((golden_tupe_text_pipeline / "text.json").read_text())["split"]
    assert [n for n in range(split["n_lines"]) if cleaning.is_held_out(n)] == split["valid"]
