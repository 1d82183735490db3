from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_build import CONFIG, build, corpus_of

from memlm.core.errors import FingerprintError
from memlm.extract.recompute import recompute_sample
from memlm.store.verify import verify
from memlm.testing.tiny import tiny_model


def test_a_sound_store_is_equal_to_the_bit(tmp_path):
    build(tmp_path / "s")
    report = recompute_sample(verify(tmp_path / "s"), tiny_model("llama"), None, corpus_of())
    assert report.ok
    assert "206 entries computed again: 206 keys equal to the bit" in report.checked[-1]


def test_altered_keys_are_found_although_sizes_agree(tmp_path):
    build(tmp_path / "s", config=replace(CONFIG, shard_entries=1000))
    file = tmp_path / "s" / "keys-00000.safetensors"
    keys = load_file(file)["keys"]
    keys[3] = -keys[3]
    save_file({"keys": keys}, file)
    quick = verify(tmp_path / "s", "quick")
    assert quick.ok
    report = recompute_sample(quick, tiny_model("llama"), None, corpus_of())
    assert not report.ok
    assert "differ from those computed again" in report.problems[0]


def test_other_model_or_text_is_refused(tmp_path):
    build(tmp_path / "s")
    report = verify(tmp_path / "s")
    with pytest.raises(FingerprintError, match="the model must be the one"):
        recompute_sample(report, tiny_model("llama", seed=5), None, corpus_of())
    with pytest.raises(FingerprintError, match="the text must be the one"):
        recompute_sample(report, tiny_model("llama"), None, corpus_of(seed=3))


def test_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    build(tmp_path / "s", config=replace(CONFIG, threads=before + 1))
    assert torch.get_num_threads() == before
