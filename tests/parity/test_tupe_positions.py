"""Buckets and position scores of TUPE against the authors' code."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memlm.ops.untied_attention import position_scores
from memlm.positions.buckets import relative_buckets
from memlm.positions.scheme import PositionScheme
from memlm.positions.untied import UntiedPositions

NAMES = {
    "pos.": "positions.",
    "pos_ln.": "layer_norm.",
    "pos_q_linear.": "query.",
    "pos_k_linear.": "key.",
    "relative_attention_bias.": "relative.",
}


def test_buckets(golden_tupe_buckets):
    arrays = np.load(golden_tupe_buckets / "buckets.npz")
    offsets = torch.from_numpy(arrays["offsets"])
    checked = 0
    for name in arrays.files:
        if match := re.fullmatch(r"bucket_bi(\d)_nb(\d+)_md(\d+)", name):
            both, buckets, distance = map(int, match.groups())
            found = relative_buckets(
                offsets, bidirectional=bool(both), num_buckets=buckets, max_distance=distance
            )
        elif match := re.fullmatch(r"rp_bucket_len(\d+)_nb(\d+)_md(\d+)", name):
            length, buckets, distance = map(int, match.groups())
            found = buckets_with_reset(length, buckets, distance)
        else:
            continue
        np.testing.assert_array_equal(found.numpy(), arrays[name])
        checked += 1
    assert checked >= 2


def buckets_with_reset(length: int, num_buckets: int, max_distance: int) -> torch.Tensor:
    """The table of buckets, read from the terms of a model whose bucket b weighs b."""
    positions = UntiedPositions(
        8,
        1,
        PositionScheme("none", relative=True, reset=True),
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    with torch.no_grad():
        positions.relative.weight.copy_(torch.arange(num_buckets + 1.0)[:, None])
        return position_scores(positions(length), length, positions.scale)[0, 0].long()


def test_position_scores(golden_tupe_bias):
    weights = load_file(golden_tupe_bias / "weights.safetensors")
    config = json.loads((golden_tupe_bias / "config.json").read_text())
    expected = load_file(golden_tupe_bias / "bias.safetensors")
    state = {}
    for name, value in weights.items():
        prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
        state[NAMES[prefix] + name.removeprefix(prefix)] = value
    rows, dim = weights["pos.weight"].shape
    relative = "relative_attention_bias.weight" in weights
    heads = config.get("encoder_attention_heads") or next(iter(expected.values())).shape[0]
    scheme = PositionScheme.named("tupe-r" if relative else "tupe-a")
    positions = UntiedPositions(dim, heads, scheme, max_positions=rows - 1).eval()
    positions.load_state_dict(state)
    for name, table in expected.items():
        length = int(name.removeprefix("bias_T"))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = position_scores(positions(length), length, positions.scale)[0]
            torch.testing.assert_close(found, table, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("distance", "bucket"), [(7, 7), (8, 8), (16, 10), (32, 12), (91, 15)])
def test_boundaries(distance, bucket):
    assert relative_buckets(torch.tensor([-distance, distance])).tolist() == [bucket, bucket + 16]
