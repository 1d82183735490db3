"""The tokenizer of a dictionary and byte-pair codes gives what the authors' programs give."""

import pytest
from transformers import AutoTokenizer

from memlm.core.errors import CorruptStoreError
from memlm.data.bpe_codes import learn_codes, read_codes
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForMaskedLM
from memlm.models.tupe.tokenizer import TupeTokenizer

TEXT = ["the cat sat on the mat - hat , there .", "a hat <url> is on the cat ."]


@pytest.fixture
def files(tmp_path):
    """A dictionary that lacks some pieces, and codes."""
    codes = "".join(f"{a} {b} {n}\n" for a, b, n in learn_codes(TEXT, 12))
    (tmp_path / "bpe-code").write_text(codes)
    pieces = dict.fromkeys(" ".join(map(read_codes(tmp_path / "bpe-code").apply, TEXT)).split())
    words = [piece for piece in pieces if piece not in ("<url>", "sat", "s@@")]
    (tmp_path / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    return tmp_path / "dict.txt", tmp_path / "bpe-code"


def test_text_goes_through_cleaning_codes_and_dictionary(files):
    tokenizer = TupeTokenizer(*map(str, files))
    pieces = read_codes(files[1]).apply("the cat sat on the mat - hat . <url>").split()
    expected = [tokenizer.dictionary.ids.get(piece, 3) for piece in pieces]
    assert 3 in expected  # made by the codes, not in the dictionary
    found = tokenizer("The Cat sat on the mat-hat. https://example.org/a")["input_ids"]
    assert found == [0, *expected, 2]
    assert tokenizer.decode(found[1:3], skip_special_tokens=True) == "the cat"
    prepared = TupeTokenizer(*map(str, files), prepared=True)
    assert prepared("the cat .")["input_ids"] == tokenizer("The cat.")["input_ids"]
    assert prepared("cat.")["input_ids"] != tokenizer("cat.")["input_ids"]


def test_marks_pairs_and_masks(files):
    tokenizer = TupeTokenizer(*map(str, files))
    assert tokenizer.all_special_ids == [0, 2, 3, 1, len(tokenizer) - 1]
    assert tokenizer.mask_token_id == len(tokenizer.dictionary) - 1
    cat, hat = (tokenizer.dictionary.ids[word] for word in ("cat", "hat"))
    mask = tokenizer.mask_token_id
    assert tokenizer("the <mask> cat")["input_ids"][2:] == [mask, cat, 2]
    pair = tokenizer("cat", "hat", return_special_tokens_mask=True)
    assert pair["input_ids"] == [0, cat, 2, 2, hat, 2]
    assert pair["special_tokens_mask"] == [1, 0, 1, 1, 0, 1]
    padded = tokenizer(["cat", "cat hat"], padding=True)["input_ids"]
    assert padded == [[0, cat, 2, 1], [0, cat, hat, 2]]


def test_it_is_saved_beside_a_model(files, tmp_path):
    tokenizer = TupeTokenizer(*map(str, files), prepared=True)
    config = TupeConfig.preset("tiny", vocab_size=len(tokenizer))
    TupeForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for path in files:
        path.unlink()
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(again, TupeTokenizer)
    assert again.prepared
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("the cat sat .")["input_ids"] == tokenizer("the cat sat .")["input_ids"]
    again.save_pretrained(tmp_path / "model")  # onto itself
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        TupeTokenizer(*map(str, files))
