"""Decoders of fairseq's checkpoints: every state, score and probability, and the way back."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from memlm.importers.adaptive import convert, export_model
from memlm.models.head import find_head
from memlm.models.taps import capture, find_tap

PAD = 1


class Case(NamedTuple):
    settings: dict
    tensors: dict
    model: torch.nn.Module


def load_case(folder: Path) -> Case:
    args = folder / "args.json"
    meta = json.loads((args if args.exists() else folder / "meta.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    settings = meta.get("args", meta)
    model, report = convert(settings, tensors)
    names = {*report.renamed, *report.tied, *report.ignored}
    assert names == set(tensors), "every tensor must be accounted for"
    return Case(settings, tensors, model)


def close(mine, expected, real, tolerance):
    torch.testing.assert_close(mine[real], expected[real], atol=tolerance, rtol=0)


@torch.no_grad()
def test_states_keys_and_scores(golden_trime_model):
    case = load_case(golden_trime_model)
    model, expected = case.model, load_file(golden_trime_model / "io.safetensors")
    tokens, real = expected["src_tokens"], expected["src_tokens"] != PAD
    body = model.model
    close(body.embed_tokens(tokens), expected["embed"], real, 1e-6)
    with capture(model, find_tap(model, "ffn_input")) as seen:
        output = body(input_ids=tokens, output_hidden_states=True)
    states = output.hidden_states
    count = sum(name.startswith("inner_state_") for name in expected)
    for number in range(count):
        # transformers puts the final norm's output last, which is not a state of fairseq
        last = number == count - 1 and model.config.final_norm
        if not last:
            close(states[number], expected[f"inner_state_{number}"], real, 1e-5)
    close(output.last_hidden_state, expected["features"], real, 1e-5)
    close(seen.states, expected["last_ffn_input"], real, 1e-5)

    logits = model(input_ids=tokens).logits
    close(torch.log_softmax(logits, -1), expected["full_log_probs"], real, 2e-5)
    close(torch.logsumexp(logits, -1), expected["norm_t"], real, 1e-5)
    close(logits, expected["vocab_logits"], real, 2e-5)
    scored = expected["target"] != PAD
    head = find_head(model)
    said = head.target(output.last_hidden_state[scored], expected["target"][scored])
    torch.testing.assert_close(said.lse, expected["norm_t"][scored], atol=1e-5, rtol=0)
    nll = said.lse - said.target_lse
    torch.testing.assert_close(nll, expected["token_nll"][scored], atol=2e-5, rtol=0)


@torch.no_grad()
def test_forward_of_the_other_program(golden_retomaton_fairseq_adaptive_forward):
    folder = golden_retomaton_fairseq_adaptive_forward
    model = load_case(folder).model
    arrays = {name: torch.from_numpy(a) for name, a in np.load(folder / "arrays.npz").items()}
    real = arrays["src"] != PAD
    with capture(model, find_tap(model, "ffn_input")) as seen:
        features = model.model(input_ids=arrays["src"]).last_hidden_state
    close(features, arrays["features"], real, 2e-5)
    close(seen.states, arrays["last_ffn_input_TBC"].transpose(0, 1), real, 2e-5)
    scores = torch.log_softmax(model.lm_head(features), -1)
    close(scores, arrays["logprob_full"], real, 2e-5)


def check_the_way_back(case):
    settings, tensors = export_model(case.model)
    assert set(tensors) == set(case.tensors)
    for name, tensor in case.tensors.items():
        if not name.endswith(("_float_tensor", "version")):
            assert torch.equal(tensors[name], tensor), name
    for name, value in settings.items():
        if name in case.settings and name not in ("arch", "task"):
            expected = case.settings[name]
            assert value == expected or not (value or expected), name
    again, _ = convert(settings, tensors)
    assert again.config.to_dict() == case.model.config.to_dict()
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_way_back(golden_trime_model):
    check_the_way_back(load_case(golden_trime_model))


def test_the_way_back_of_the_other_program(golden_retomaton_fairseq_adaptive_forward):
    check_the_way_back(load_case(golden_retomaton_fairseq_adaptive_forward))
