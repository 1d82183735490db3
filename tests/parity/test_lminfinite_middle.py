"""Middle tokens of the last query give the numbers of LM-Infinite's original code.

Golden kinds: top-k beside Lambda attention, in prefill and decoding; top-k in the slower path
without a Lambda mask, where the original masks the middle as well, so that it is the same thing.
"""

import json

import pytest
import torch
from lminfinite_models import load_model
from safetensors.torch import load_file
from torch.testing import assert_close

from memlm.models.extend import extended
from memlm.ops.middle_rule import MiddleConfig

TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


class Case:
    """One folder: its entries with top-k, arrays, and the original's model."""

    def __init__(self, folder):
        entries = json.loads((folder / "case.json").read_text())
        self.entries = [entry for entry in entries if entry["top_k_attention"]]
        self.arrays = load_file(folder / "data.safetensors")
        self.model = load_model(folder, "llama")

    def read(self, entry, pieces, *, use_cache=True, **changed):
        tokens = self.arrays["input_ids"][:, : entry["length"]]
        middle = {
            "k": entry["top_k_attention"],
            "block": 1,
            "distance": entry["top_k_insert_at"],
            "first_layer": entry["top_k_from_layer"],
            "end_layer": entry["top_k_to_layer"],
            "rule": "last",
        }
        settings = {
            "window": entry["local_branch"],
            "sinks": entry["global_branch"],
            "distance_limit": entry["limit_distance"],
            "middle": MiddleConfig(**{**middle, **changed}),
        }
        cache, rows = None, []
        with torch.inference_mode(), extended(self.model, **settings):
            for piece in tokens.split(pieces, dim=1):
                output = self.model(piece, past_key_values=cache, use_cache=use_cache)
                cache = output.past_key_values
                rows.append(output.logits)
        return torch.cat(rows, dim=1)


@pytest.mark.parametrize("where", ["device", "offload", "capacity"])
def test_top_k_beside_lambda_attention(golden_lminfinite_llama_topk, where):
    case = Case(golden_lminfinite_llama_topk)
    room = max(entry["length"] for entry in case.entries)
    where = {"device": {}, "offload": {"offload": True}, "capacity": {"capacity": room}}[where]
    modes = {entry["mode"] for entry in case.entries}
    assert modes == {"prefill", "decode"}
    for entry in case.entries:
        length, prompt = entry["length"], entry.get("prompt", entry["length"])
        pieces = [prompt] + [1] * (length - prompt)
        assert_close(case.read(entry, pieces, **where), case.arrays[entry["key"]], **TOLERANCE)
        if len(pieces) == 1:
            rows = case.read(entry, pieces, use_cache=False, **where)
            assert_close(rows, case.arrays[entry["key"]], **TOLERANCE)


def test_top_k_without_a_lambda_mask(golden_lminfinite_llama_dense):
    case = Case(golden_lminfinite_llama_dense)
    assert case.entries
    for entry in case.entries:
        rows = case.read(entry, [entry["length"]])
        assert_close(rows, case.arrays[entry["key"]], **TOLERANCE)
