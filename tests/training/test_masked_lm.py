"""Pre-training on masked tokens: examples, resuming, the recipe."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from memlm.core.errors import FingerprintError, InputError
from memlm.data.cleaning import CorpusCounts
from memlm.data.documents import Document
from memlm.data.masking import Masker, Masking
from memlm.methods.tupe import pretrain_tupe
from memlm.models.fingerprint import tokenizer_hash
from memlm.models.tupe.heads import TupeForMaskedLM
from memlm.testing.processes import run_processes
from memlm.training.learning import make_schedule
from memlm.training.masked_lm import MaskedBlocks, tokenize_sentences, train_masked_lm
from memlm.training.masked_lm_config import MaskedLMConfig
from memlm.training.polynomial import PolynomialRate, warmup_steps_of
from memlm.training.sentence_tokenizer import train_sentence_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
SENTENCES = [
    f"the {one} cat of {two} sat on the {one} mat and looked at {three} for the whole evening ."
    for one in WORDS
    for two in WORDS
    for three in WORDS[:2]
]
SMALL = {
    "block_length": 48, "batch_tokens": 192, "hidden_size": 32, "layers": 1, "heads": 2,
    "intermediate_size": 48, "warmup_steps": 2, "log_every": 1, "precision": "float32",
    "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentence_tokenizer(SENTENCES, 96)


@pytest.fixture(scope="module")
def sentences(tokenizer):
    return tokenize_sentences(SENTENCES, tokenizer)


def test_tokenizer(tokenizer):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<file>", "<email>", "<url>"]
    assert tokenizer.convert_ids_to_tokens(range(7)) == special
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    ids = tokenizer("The cat.", "the <url> mat")["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == "<s>"
    assert [word for word in words if word == "</s>"] == ["</s>"] * 3
    assert ".</w>" in words
    assert "<url>" in words
    with pytest.raises(InputError, match="at least 64 tokens"):
        train_sentence_tokenizer(SENTENCES, 20)


def test_a_tokenizer_is_a_function_of_its_sentences(tokenizer):
    hashes = {tokenizer_hash(train_sentence_tokenizer(SENTENCES, 96)) for _ in range(4)}
    assert hashes == {tokenizer_hash(tokenizer)}


def test_learnt_pieces(tokenizer):
    text = "the theta cat sat on the mat ."
    tokens = tokenizer.tokenize(text)
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens)) == text
    assert tokens.count("the</w>") == 2  # frequent words are whole
    learnt = tokenizer.convert_ids_to_tokens(range(7, len(tokenizer) - 1))
    assert len(tokenizer) <= 96
    assert max(map(max, learnt)) <= "z"  # no private character is left
    private = train_sentence_tokenizer([*SENTENCES, "\U000f0003at <url> the\U000f0001"], 96)
    assert tokenizer_hash(private) == tokenizer_hash(tokenizer)


def test_an_epoch_reads_every_block_once(tokenizer, sentences):
    masker = Masker(len(tokenizer), tokenizer.mask_token_id, Masking())
    blocks = MaskedBlocks(sentences, 48, masker, begin=0, seed=3)
    for epoch in range(2):
        seen = set()
        for item in range(epoch * len(blocks), (epoch + 1) * len(blocks)):
            example = blocks[item]
            original = torch.where(
                example["labels"] == -100, example["input_ids"], example["labels"]
            )
            seen.add(tuple(original.tolist()))
            assert len(original) <= 48
            assert original[0] == 0
        assert len(seen) == len(blocks)
    again = MaskedBlocks(sentences, 48, masker, begin=0, seed=3)
    assert torch.equal(again[5]["input_ids"], blocks[5]["input_ids"])
    held = MaskedBlocks(sentences, 48, masker, begin=0, seed=3, fixed=True)
    assert len(list(held)) == len(held)
    with pytest.raises(InputError, match="raise block_length"):
        MaskedBlocks(sentences, 4, masker, begin=0, seed=3)


def test_a_resumed_run_goes_on_identically(tokenizer, sentences, tmp_path):
    config = MaskedLMConfig(**SMALL, max_steps=6, save_every=3, optimizer="fairseq_adam")
    whole = train_masked_lm(sentences, tokenizer, config, tmp_path / "whole", quiet=True)

    class StopError(RuntimeError):
        pass

    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 4:
                raise StopError

    with pytest.raises(StopError):
        train_masked_lm(
            sentences, tokenizer, config, tmp_path / "cut", quiet=True, callbacks=[Kill()]
        )
    resumed = train_masked_lm(
        sentences, tokenizer, config, tmp_path / "cut", quiet=True, resume=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_setting_that_came_later_had_its_default(tokenizer, sentences, tmp_path):
    """Runs that were begun before there was the setting go on."""
    config = MaskedLMConfig(**SMALL, max_steps=1)
    train_masked_lm(sentences, tokenizer, config, tmp_path, quiet=True)
    record = tmp_path / "run.json"
    before = json.loads(record.read_text())
    for name in ("legacy_seeds", "warmup_ratio"):
        del before["config"][name]
    record.write_text(json.dumps(before))
    train_masked_lm(sentences, tokenizer, config, tmp_path, quiet=True, resume=True)
    other = replace(config, legacy_seeds=True)
    with pytest.raises(FingerprintError, match="legacy_seeds \\(False then, True now\\)"):
        train_masked_lm(sentences, tokenizer, other, tmp_path, quiet=True, resume=True)


def test_pretraining_learns(tmp_path):
    documents = [Document(str(n), "\n".join(SENTENCES[n::4])) for n in range(4)]
    counts = CorpusCounts()
    config = MaskedLMConfig(
        **SMALL, max_steps=30, learning_rate=3e-3, whole_words=True, dropout=0.0
    )
    model = pretrain_tupe(documents, tmp_path, config, vocab_size=96, counts=counts, quiet=True)
    assert isinstance(TupeForMaskedLM.from_pretrained(tmp_path), TupeForMaskedLM)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["curve"][-1]["loss"] < summary["curve"][0]["loss"] - 0.5
    assert counts.lines["read"] == counts.lines["prose"] == len(SENTENCES)
    assert counts.lines["once"] == len(set(SENTENCES))
    assert "words" in counts.describe()
    assert model.config.scheme == "tupe-r"


def test_pretraining_in_bfloat16(tokenizer, sentences, tmp_path):
    config = MaskedLMConfig(
        **{**SMALL, "precision": "bfloat16"}, max_steps=12, learning_rate=3e-3, dropout=0.0
    )
    model = train_masked_lm(sentences, tokenizer, config, tmp_path, quiet=True)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["precision"] == "bfloat16"
    assert summary["curve"][-1]["loss"] < summary["curve"][0]["loss"] - 0.1


def test_masks_of_the_authors_streams(tokenizer, sentences):
    config = MaskedLMConfig(**SMALL, max_steps=1, legacy_seeds=True)
    masker = Masker(len(tokenizer), tokenizer.mask_token_id, config.masking())
    blocks = MaskedBlocks(sentences, 48, masker, begin=0, seed=3)
    found = blocks[len(blocks)]  # the first one of the second epoch
    first, end = blocks.slices[blocks._shuffled(1)[0]]
    draw = np.random.RandomState(int(hash((3, 2, int(blocks._shuffled(1)[0]))) % 1e6))
    length = end - first + 1
    chosen = draw.choice(length, int(0.15 * length + draw.rand()), replace=False)
    assert sorted(chosen) == (found["labels"] != -100).nonzero()[:, 0].tolist()


def test_warm_up_as_a_share_of_the_steps():
    config = MaskedLMConfig(max_steps=200, warmup_ratio=0.06, schedule="polynomial")
    assert config.warmup_steps == 12
    assert make_schedule(config)(12) == 1
    assert MaskedLMConfig.from_dict(config.to_dict()) == config
    assert config.with_limit(max_steps=50).warmup_steps == 3
    with pytest.raises(InputError, match="give max_steps, not max_seconds"):
        MaskedLMConfig(max_seconds=5, warmup_ratio=0.06)


def pretrain(accumulate, out):
    documents = [Document(str(n), "\n".join(SENTENCES[n::4])) for n in range(4)]
    config = MaskedLMConfig(**SMALL, max_steps=4, accumulate=accumulate, dropout=0.0, device="cpu")
    pretrain_tupe(documents, out, config, vocab_size=96, quiet=True)


def test_two_processes_are_one_with_twice_the_batches(tmp_path):
    pretrain(2, tmp_path / "one")
    run_processes(pretrain, 2, 1, tmp_path / "two")
    summaries = [json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two")]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    for a, b in zip(*(summary["curve"] for summary in summaries), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, two = (TupeForMaskedLM.from_pretrained(tmp_path / n) for n in ("one", "two"))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_an_interrupted_pretraining_learns_the_same_tokenizer_again(tmp_path):
    pretrain(1, tmp_path / "run")
    (tmp_path / "run" / "training.json").unlink()
    documents = [Document(str(n), "\n".join(SENTENCES[n::4])) for n in range(4)]
    config = MaskedLMConfig(**SMALL, max_steps=4, dropout=0.0, device="cpu")
    pretrain_tupe(documents, tmp_path / "run", config, vocab_size=96, resume=True, quiet=True)


def test_published_recipe():
    config = MaskedLMConfig.published()
    assert (config.max_steps, config.warmup_steps, config.optimizer) == (
        1_000_000,
        10_000,
        "fairseq_adam",
    )
    schedule = make_schedule(config)
    assert [schedule(n) for n in (0, 5_000, 10_000, 505_000, 1_000_000)] == [0, 0.5, 1, 0.5, 0]
    with pytest.raises(InputError, match="warmup must lie between 0 and 100 steps"):
        make_schedule(MaskedLMConfig.published(max_steps=100))
    rate = PolynomialRate(1e-4, 100, 10)
    assert [rate(0), rate(10), rate(100)] == [0.0, 1e-4, 0.0]
    assert [warmup_steps_of(r, 10) for r in (0.0, 0.06, 0.5)] == [0, 1, 5]


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: warmup_steps_of(1.0, 10), r"warmup_ratio must lie in \[0, 1\), got 1.0"),
        (lambda: PolynomialRate(0.0, 10), "peak must be above zero"),
        (lambda: PolynomialRate(1.0, 10, 11), "warmup must lie between 0 and 10"),
        (lambda: MaskedLMConfig(max_steps=1, scheme="rope"), "scheme must be one of"),
        (lambda: MaskedLMConfig(max_steps=1, dropout=1.0), "dropout must lie"),
        (lambda: MaskedLMConfig(max_steps=1, heads=0), "heads must be at least 1, got 0"),
        (lambda: MaskedLMConfig(max_steps=1, mask_prob=0.0), "mask_prob must lie"),
        (lambda: Masking(leave_prob=0.6, random_prob=0.6), "must not exceed 1 together"),
        (lambda: Masker(10, 10, Masking()), r"mask_token must be in \[0, 10\)"),
        (lambda: Masker(20, 10, Masking(whole_words=True)), "pass ends_word"),
        (lambda: Masker(7, 6, Masking()), "tokens to replace with from 7 on"),
    ],
)
def test_bad_inputs(make_it, message):
    with pytest.raises(InputError, match=message):
        make_it()
