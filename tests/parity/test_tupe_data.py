"""Masking, blocks, schedules and metrics of TUPE against the authors' code."""

import json

import numpy as np
import pytest

from memlm.data.masking import Masker, Masking
from memlm.data.sentence_blocks import cut_blocks
from memlm.evaluation.glue import Counts, accuracy, f1, matthews, pearson, spearman
from memlm.training.polynomial import PolynomialRate


def check_masking(folder):
    arrays = np.load(folder / "masking.npz")
    recorded = json.loads((folder / "runs.json").read_text())
    items = np.split(arrays["items_flat"], np.cumsum(arrays["lens"])[:-1])
    for name, run in recorded["runs"].items():
        given = run["args"]
        masking = Masking(
            mask_prob=given.get("mask_prob", 0.15),
            leave_prob=given.get("leave_unmasked_prob", 0.1),
            random_prob=given.get("random_token_prob", 0.1),
            whole_words=run["whole_word"],
            first_random=recorded["nspecial"],
            legacy_seeds=True,
        )
        weighted = given.get("freq_weighted_replacement", False)
        masker = Masker(
            recorded["vocab_len"],
            recorded["mask_idx"],
            masking,
            ends_word=arrays["word_end_table_uint8"].astype(bool),
            counts=np.array(recorded["vocab_count"]) if weighted else None,
        )
        found = [
            masker(item, seed=run["seed"], epoch=run["epoch"], number=number)
            for number, item in enumerate(items)
        ]
        source = np.concatenate([sample.tokens for sample in found])
        labels = np.concatenate([sample.labels for sample in found])
        np.testing.assert_array_equal(source, arrays[f"{name}_src"], err_msg=name)
        target = np.where(labels == -100, recorded["pad_idx"], labels)
        np.testing.assert_array_equal(target, arrays[f"{name}_tgt"], err_msg=name)


def test_masking(golden_tupe_masking):
    check_masking(golden_tupe_masking)


def test_masking_of_many(golden_tupe_masking_stats):
    check_masking(golden_tupe_masking_stats)


def test_blocks(golden_tupe_blocks):
    for case in json.loads((golden_tupe_blocks / "blocks.json").read_text()):
        blocks = cut_blocks(np.array(case["sizes"]), case["block_size"], case["mode"])
        assert blocks.slices.tolist() == case["slices"], case
        assert blocks.sentences.tolist() == case["block_to_dataset_index"], case


def test_schedule(golden_tupe_lr_schedule):
    for case in json.loads((golden_tupe_lr_schedule / "lr.json").read_text()):
        config, values = case["config"], case.get("values")
        if values is None:
            # the original divides by zero; here a share of a run is at least one step
            assert int(config["warmup_ratio"] * config["reinit_total"]) == 0
            continue
        ratio = config.get("warmup_ratio")
        steps = config.get("reinit_total", config.get("total_num_update"))
        if "reinit_total" in config:
            warmup = values["warmup_updates_after_reinit"]
            if ratio:
                assert warmup == int(steps * ratio)
            else:
                steps = config["total_num_update"]
        else:
            warmup = config["warmup_updates"]
        rate = PolynomialRate(
            config["lr"],
            steps,
            warmup,
            power=config.get("power", 1.0),
            end=config.get("end_lr", 0.0),
            first_moves=bool(ratio),
        )
        for step, expected in case["lr_after_step_update"]:
            assert rate(step) == pytest.approx(expected, rel=1e-12, abs=1e-20), (config, step)
        start = config.get("reinit_num_updates", 0)
        first = values.get("after_reinit", values["after_init_step_update_0"])
        assert rate(start) == pytest.approx(first, rel=1e-12)


def test_metrics(golden_tupe_metrics):
    functions = {"accuracy": accuracy, "f1": f1, "mcc": matthews}
    for case in json.loads((golden_tupe_metrics / "metrics.json").read_text()):
        if "batches_tp_fp_fn_tn" in case:
            batches = [Counts(*numbers) for numbers in case["batches_tp_fp_fn_tn"]]
            whole = Counts(*map(sum, zip(*batches, strict=True)))
            pooled = {name: metric(whole) for name, metric in functions.items()}
            means = {n: np.mean([metric(b) for b in batches]) for n, metric in functions.items()}
        else:
            pairs = list(zip(map(np.array, case["x"]), map(np.array, case["y"]), strict=True))
            x, y = (np.concatenate(side) for side in zip(*pairs, strict=True))
            pooled = {"pearson": pearson(x, y), "spearman": spearman(x, y)}
            means = {
                "pearson": np.mean([pearson(*pair) for pair in pairs]),
                "spearman": np.mean([spearman(*pair) for pair in pairs]),
            }
        for name, value in pooled.items():
            assert value == pytest.approx(case["pooled"][name], abs=1e-6)
            assert means[name] == pytest.approx(case["mean_of_batches"][name], abs=1e-6)
