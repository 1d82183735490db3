"""Lambda attention and extended models give the numbers of LM-Infinite's original code.

Golden kinds: the bare attention in its four modes, prefill of Llama (also with grouped keys, and
Qwen 2), other distance limits, decoding token by token, streaming in chunks, and generation.
"""

import json
from functools import partial

import pytest
import torch
from lminfinite_models import load_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from memlm.models.extend import extend_context
from memlm.ops.window_attention import Keys, LambdaConfig, first_keys, window_attention

TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


class Case:
    """One folder: its entries, arrays, and the original's model."""

    def __init__(self, folder, family="llama", *, grouped=False):
        self.entries = json.loads((folder / "case.json").read_text())
        assert self.entries
        self.arrays = load_file(folder / "data.safetensors")
        self.load = partial(load_model, folder, family, grouped=grouped)

    def model(self, entry, **settings):
        model = self.load()
        limit = entry.get("limit_distance", entry["local_branch"])
        settings = {"distance_limit": limit, **settings}
        return extend_context(
            model, window=entry["local_branch"], sinks=entry["global_branch"], **settings
        )

    def vanilla(self):
        """The model as it is, where its logits were recorded as well."""
        tokens = self.arrays["input_ids"]
        with torch.inference_mode():
            assert_close(self.load()(tokens).logits, self.arrays["vanilla_logits"], **TOLERANCE)

    def prefill(self, entry, **settings):
        tokens = self.arrays["input_ids"][:, : entry["length"]]
        with torch.inference_mode():
            logits = self.model(entry, **settings)(tokens).logits
        assert_close(logits, self.arrays[entry["key"]], **TOLERANCE)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_attention(golden_lminfinite_lambda_attention_unit, impl):
    """The original's scores of near and far keys come from unrelated tensors.

    They are laid side by side, and "rotating" a query leaves the half that its distance calls for.
    A last column tells queries (1) from keys (0). A query at the limit is one that asks sinks:
    distances inside the window are below `window` (reference), positions relative to the block are
    not (blocked).
    """
    folder = golden_lminfinite_lambda_attention_unit
    arrays = load_file(folder / "data.safetensors")
    for entry in json.loads((folder / "case.json").read_text()):
        part = {
            name: arrays[f"{entry['name']}.{name}"]
            for name in ("query_rot", "query_stationary", "key_rot", "key_stationary", "value")
        }
        window, dim = entry["local_branch"], part["value"].shape[-1]
        limit = window if impl == "reference" else window - 1
        ones = torch.ones_like(part["query_rot"][..., :1])
        zeros = torch.zeros_like(part["key_rot"][..., :1])
        query = torch.cat([part["query_rot"], part["query_stationary"], ones], dim=-1)
        key = torch.cat([part["key_rot"], part["key_stationary"], zeros], dim=-1)
        places = torch.arange(key.shape[2])[None]
        keys = Keys(key, part["value"], places)
        output = window_attention(
            query,
            places[:, -query.shape[2] :],
            keys,
            first_keys(keys, entry["global_branch"]),
            LambdaConfig(window=window, sinks=entry["global_branch"], distance_limit=limit),
            rotate=halves(limit),
            scale=dim**-0.5,
            impl=impl,
        )
        assert_close(output, arrays[f"{entry['name']}.output"], rtol=0, atol=1e-5)


def halves(limit):
    def rotate(x, positions):
        if not x[..., -1].any():
            return x
        near, far = x[..., :-1].chunk(2, dim=-1)
        is_far = (positions == limit)[:, None, :, None]
        return torch.cat([near * ~is_far, far * is_far, x[..., -1:]], dim=-1)

    return rotate


def test_vanilla_models_inside_the_window(golden_lminfinite_models):
    """Recorded models load as they were, and a window that holds the text changes nothing."""
    checked = 0
    for recorded in golden_lminfinite_models.glob("*/base_check.safetensors"):
        arrays = load_file(recorded)
        tokens, expected = arrays.pop("input_ids"), *arrays.values()
        model = AutoModelForCausalLM.from_pretrained(recorded.parent, dtype=torch.float32).eval()
        with torch.inference_mode():
            assert_close(model(tokens).logits, expected, **TOLERANCE)
            extend_context(model, window=tokens.shape[1], sinks=1)
            assert_close(model(tokens).logits, expected, **TOLERANCE)
        checked += 1
    assert checked


def test_llama_prefill(golden_lminfinite_llama_prefill):
    case = Case(golden_lminfinite_llama_prefill)
    for entry in case.entries:
        case.prefill(entry)


def test_llama_grouped_keys(golden_lminfinite_llama_gqa_prefill):
    case = Case(golden_lminfinite_llama_gqa_prefill, grouped=True)
    case.vanilla()
    for entry in case.entries:
        case.prefill(entry)


def test_qwen2_grouped_keys(golden_lminfinite_qwen2_gqa_prefill):
    case = Case(golden_lminfinite_qwen2_gqa_prefill, "qwen2", grouped=True)
    case.vanilla()
    for entry in case.entries:
        case.prefill(entry)


def test_distance_limits(golden_lminfinite_llama_limit_distance):
    case = Case(golden_lminfinite_llama_limit_distance)
    for entry in case.entries:
        limit = entry["limit_distance"]
        case.prefill(entry, distance_limit=limit, clamp="original")
        if limit is None or limit <= entry["local_branch"]:
            case.prefill(entry, distance_limit=limit)


def test_decoding(golden_lminfinite_llama_decode):
    case = Case(golden_lminfinite_llama_decode)
    for entry in case.entries:
        tokens = case.arrays["input_ids"][:, : entry["length"]]
        pieces = [entry["prompt"]] + [1] * (entry["length"] - entry["prompt"])
        logits = in_pieces(case.model(entry), tokens, pieces)
        assert_close(logits, case.arrays[entry["key"]], **TOLERANCE)


def test_streaming(golden_lminfinite_llama_streaming):
    case = Case(golden_lminfinite_llama_streaming)
    for entry in case.entries:
        tokens = case.arrays["input_ids"][:, : entry["total"]]
        logits = in_pieces(case.model(entry), tokens, entry["chunks"])
        assert_close(logits, case.arrays[f"{entry['name']}.logits"], **TOLERANCE)


def in_pieces(model, tokens, pieces):
    cache, rows = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for piece in tokens.split(pieces, dim=1):
            rows.append(model(piece, past_key_values=cache).logits)
    return torch.cat(rows, dim=1)


def test_generation(golden_lminfinite_llama_generate):
    case = Case(golden_lminfinite_llama_generate)
    for entry in case.entries:
        expected = case.arrays[entry["key"]]
        generated = case.model(entry).generate(
            expected[:, : entry["prompt"]],
            max_new_tokens=entry["new"],
            min_new_tokens=entry["new"],
            do_sample=False,
        )
        assert torch.equal(generated, expected)
