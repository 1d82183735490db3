"""LM-Infinite's other original paths: GPT-J, MPT, and attention without the window.

Golden kinds: prefill of GPT-J and MPT (both paths), Llama without the window (limit and triangle
offset), and of the top-k kinds every row that top-k tokens of the middle do not touch.
"""

import json

import torch
from lminfinite_models import load_model
from safetensors.torch import load_file
from torch.testing import assert_close

from memlm.models.extend import extended

TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


class Case:
    """One folder: its entries, arrays, and the original's model."""

    def __init__(self, folder, family="llama"):
        self.entries = json.loads((folder / "case.json").read_text())
        self.arrays = load_file(folder / "data.safetensors")
        self.model = load_model(folder, family)

    def compare(self, entry, rows=slice(None), **settings):
        tokens = self.arrays["input_ids"][:, : entry["length"]]
        settings |= {"window": entry["local_branch"], "sinks": entry["global_branch"]}
        settings |= {"distance_limit": entry["limit_distance"]}
        with torch.inference_mode(), extended(self.model, **settings):
            logits = self.model(tokens, use_cache=False).logits
        assert_close(logits[:, rows], self.arrays[entry["key"]][:, rows], **TOLERANCE)


def path(entry):
    """The original's two paths, under the names they have here."""
    return {"middle": "dropped" if entry["use_lambda_mask"] else "kept"}


def test_gptj_prefill(golden_lminfinite_gptj_prefill):
    case = Case(golden_lminfinite_gptj_prefill, "gptj")
    assert case.entries
    for entry in case.entries:
        case.compare(entry, **path(entry))


def test_mpt_prefill(golden_lminfinite_mpt_prefill):
    case = Case(golden_lminfinite_mpt_prefill, "mpt")
    assert case.entries["ok"]
    for entry in case.entries["ok"]:
        case.compare(entry, **path(entry), clamp="original")
        if entry["use_lambda_mask"] or entry["limit_distance"] is None:
            case.compare(entry, **path(entry))


def test_mpt_where_the_original_raises(golden_lminfinite_mpt_prefill):
    """At any length, rows are those of the longest forward that the original managed."""
    case = Case(golden_lminfinite_mpt_prefill, "mpt")
    kinds = {key.split(".len")[0] for key, *_ in case.entries["original_raises"]}
    assert kinds
    for kind in kinds:
        managed = [e for e in case.entries["ok"] if e["key"].split(".len")[0] == kind]
        longest = max(managed, key=lambda entry: entry["length"])
        settings = {"window": longest["local_branch"], "sinks": longest["global_branch"],
                    "distance_limit": longest["limit_distance"]}  # fmt: skip
        for length in range(1, longest["length"]):
            tokens = case.arrays["input_ids"][:, :length]
            with torch.inference_mode(), extended(case.model, **settings, **path(longest)):
                logits = case.model(tokens).logits
            assert_close(logits, case.arrays[longest["key"]][:, :length], **TOLERANCE)


def test_llama_without_the_window(golden_lminfinite_llama_dense):
    case = Case(golden_lminfinite_llama_dense)
    plain = [entry for entry in case.entries if entry["top_k_attention"] is None]
    assert plain
    for entry in plain:
        settings = {"middle": "kept", "triangle_offset": entry["triangle_offset"]}
        case.compare(entry, **settings, clamp="original")
        if entry["limit_distance"] in (None, entry["local_branch"]):
            case.compare(entry, **settings)


def test_llama_rows_without_top_k(golden_lminfinite_llama_topk):
    """Top-k acts on the last row of a forward, and only where the middle holds k tokens."""
    case = Case(golden_lminfinite_llama_topk)
    prefill = [entry for entry in case.entries if entry["mode"] == "prefill"]
    assert prefill
    for entry in prefill:
        middle = entry["length"] - entry["local_branch"] - entry["global_branch"]
        active = middle >= entry["top_k_attention"]
        case.compare(entry, slice(None, -1 if active else None))
