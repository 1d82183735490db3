"""Whole runs, checkpoints and binarised data of TUPE against the authors' code."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from memlm.cli.main import main
from memlm.core.errors import InputError
from memlm.formats.binarised import read_lines
from memlm.importers.tupe import read_state, read_tupe_checkpoint
from memlm.importers.tupe_data import read_glue_folder, read_sentences
from memlm.models.tupe.tokenizer import read_tupe_dictionary
from memlm.training.fairseq_adam import FairseqAdam
from memlm.training.polynomial import PolynomialRate

IGNORED = -100


def batches(folder, split):
    arrays = np.load(folder / f"{split}_batches.npz")
    numbers = sorted(
        name.removeprefix("src_tokens_") for name in arrays.files if "src_tokens" in name
    )
    for number in numbers:
        target = torch.from_numpy(arrays[f"target_{number}"])
        yield torch.from_numpy(arrays[f"src_tokens_{number}"]), target


def check_validation(model, folder, labels_of, updates):
    """The losses that were recorded after so many updates."""
    steps = json.loads((folder / "steps.json").read_text())["valid"]
    found = [
        (model.eval()(tokens, labels=labels_of(target), num_items_in_batch=1).loss, step["loss"])
        for (tokens, target), step in zip(batches(folder, "valid"), steps, strict=True)
        if step["after_updates"] == updates
    ]
    for loss, expected in found:
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    return len(found)


def replay(model, folder, labels_of, rates):
    """The recorded batches in order, by the stated update rule."""
    steps = json.loads((folder / "steps.json").read_text())["train"]
    optimizer = FairseqAdam(model.parameters(), lr=steps[0]["lr"], weight_decay=0.01)
    checked = 0
    for number, ((tokens, target), step) in enumerate(
        zip(batches(folder, "train"), steps, strict=True)
    ):
        model.train()
        optimizer.zero_grad()
        loss = model(tokens, labels=labels_of(target), num_items_in_batch=step["ss"]).loss
        assert loss.item() * step["ss"] == pytest.approx(step["loss"], rel=1e-4)
        loss.backward()
        found = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(found, 1.0)
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=1e-3)
        assert rates(number) == pytest.approx(step["lr"], rel=1e-12)
        optimizer.param_groups[0]["lr"] = rates(number)
        optimizer.step()
        checked += check_validation(model, folder, labels_of, number + 1)
    assert checked


def check_weights(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=2e-4, rtol=0, msg=lambda m, n=name: n + m
        )


def without_dropout(imported):
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        setattr(imported.config, name, 0.0)
    return imported


def rates_of(steps, warmup, first_moves):
    """The schedule, its length told from the first fall: a run may end before its schedule."""
    rates = [step["lr"] for step in steps]
    peak, total = max(rates), len(steps)
    if warmup + 1 < len(rates):
        total = warmup + round(peak / (peak - rates[warmup + 1]))
    return PolynomialRate(peak, total, warmup, first_moves=first_moves)


def warmup_of(steps):
    """The last update that has the highest rate."""
    rates = [step["lr"] for step in steps]
    return max(number for number, rate in enumerate(rates) if rate == max(rates))


def test_pretraining_run(golden_tupe_pretrain_run):
    folder = golden_tupe_pretrain_run
    steps = json.loads((folder / "steps.json").read_text())["train"]
    first = read_state(load_file(folder / "weights_init.safetensors"))
    model = without_dropout(first).masked_lm()
    rates = rates_of(steps, warmup_of(steps), first_moves=False)
    replay(model, folder, lambda t: t.masked_fill(t == 1, IGNORED), rates)
    last = read_state(load_file(folder / "weights_final.safetensors"))
    check_weights(model.state_dict(), last.state)


def test_finetuning_run(golden_tupe_finetune_run):
    folder = golden_tupe_finetune_run
    steps = json.loads((folder / "steps.json").read_text())["train"]
    first = read_state(load_file(folder / "weights_init.safetensors"))
    model = without_dropout(first).classifier()
    rates = rates_of(steps, warmup_of(steps), first_moves=True)
    replay(model, folder, lambda t: t, rates)
    last = read_state(load_file(folder / "weights_final.safetensors"))
    expected = {name: value for name, value in last.state.items() if name.startswith("tupe.")}
    check_weights(model.state_dict(), expected | last.heads["sentence_classification_head"])


def test_checkpoint(golden_tupe_checkpoint):
    expected = load_file(golden_tupe_checkpoint / "model.safetensors")
    imported = read_tupe_checkpoint(golden_tupe_checkpoint / "checkpoint_last.pt")
    assert {name for name, _ in imported.report} == set(expected)
    plain = read_state(expected, heads=imported.config.num_attention_heads)
    assert plain.state.keys() == imported.state.keys()
    for name, value in plain.state.items():
        assert torch.equal(imported.state[name], value), name
    arguments = json.loads((golden_tupe_checkpoint / "structure.json").read_text())
    arguments = arguments["structure"]["args"]["<Namespace>"]
    config = imported.config
    assert config.num_attention_heads == int(arguments["encoder_attention_heads"])
    assert config.num_hidden_layers == int(arguments["encoder_layers"])
    assert config.hidden_size == int(arguments["encoder_embed_dim"])
    assert config.hidden_dropout_prob == float(arguments["dropout"])
    assert imported.masked_lm().num_parameters() == sum(
        value.numel() for name, value in expected.items() if name != "decoder.lm_head.weight"
    )
    other = "tupe-a" if config.scheme == "tupe-r" else "tupe-r"
    with pytest.raises(InputError, match="import it as that"):
        read_tupe_checkpoint(golden_tupe_checkpoint / "checkpoint_last.pt", scheme=other)


def test_a_checkpoint_becomes_a_folder(golden_tupe_checkpoint, tmp_path, capsys):
    checkpoint = golden_tupe_checkpoint / "checkpoint_last.pt"
    command = ["import", str(checkpoint), "--kind", "fairseq-encoder", "--json", "--out"]
    assert main([*command, str(tmp_path)]) == 0
    imported = read_tupe_checkpoint(checkpoint)
    value = json.loads(capsys.readouterr().out)
    assert value["renamed"] == dict(imported.report)
    assert value["scheme"] == imported.config.scheme
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, weight in imported.masked_lm().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    words = [f"w{number} 1" for number in range(imported.config.vocab_size - 8)]
    (tmp_path / "dict.txt").write_text("\n".join(words))
    (tmp_path / "codes").write_text("a b</w> 2\n")
    files = ["--dictionary", str(tmp_path / "dict.txt"), "--codes", str(tmp_path / "codes")]
    assert main([*command, str(tmp_path / "whole"), *files]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert len(tokenizer) == tokenizer.mask_token_id + 1 == imported.config.vocab_size
    assert main([*command, str(tmp_path / "half"), *files[:2]]) == 2
    assert "needs both --dictionary and --codes" in capsys.readouterr().err
    (tmp_path / "dict.txt").write_text("word 1")
    assert main([*command, str(tmp_path / "other"), *files]) == 2
    assert "dict.txt has 9; give the one" in capsys.readouterr().err
    assert main([*command, str(tmp_path), "--classifier", "other"]) == 2
    assert "must have the head 'other'" in capsys.readouterr().err


def test_databin(golden_tupe_databin):
    folder = golden_tupe_databin
    decoded = json.loads((folder / "decoded.json").read_text())
    if (folder / "input0").is_dir():
        check_glue(folder, decoded)
        return
    dictionary = read_tupe_dictionary(folder)
    assert list(dictionary.words) == decoded["dictionary_symbols_after_adding_mask"]
    assert dictionary.counts[7:-1].tolist() == decoded["dictionary_counts"][7:-1]
    for split in ("train", "valid"):
        items = [item.tolist() for item in read_sentences(folder / split)]
        assert items == decoded[split]["items"]
        lines = read_lines(folder / split)
        assert lines.sizes.tolist() == decoded[split]["sizes"]
        assert str(lines.tokens.dtype) == decoded[split]["dtype"]
        text = (folder / f"{split}.bpe").read_text().splitlines()
        assert [dictionary.encode(line) for line in text] == items


def check_glue(folder, decoded):
    for name in ("input0", "input1"):
        if f"{name}/symbols" not in decoded:  # a task of single sentences
            continue
        words = read_tupe_dictionary(folder / name, mask=False).words
        assert list(words) == decoded[f"{name}/symbols"]
        for split in ("train", "valid"):
            items = [item.tolist() for item in read_sentences(folder / name / split)]
            assert items == decoded[f"{name}/{split}"]["items"]
    checked = 0
    for key, samples in decoded.items():
        if key.startswith("samples_max"):
            found = read_glue_folder(folder, max_length=int(key.removeprefix("samples_max")))
            assert [row.tolist() for row in found.tokens] == [sample["src"] for sample in samples]
            assert found.labels.tolist() == [sample["label"] for sample in samples]
            checked += 1
    assert checked
