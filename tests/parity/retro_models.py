"""Recorded models of retro-pytorch, and how they were run."""

import json
import re

from safetensors.torch import load_file

from memlm.importers.retro_checkpoint import import_retro


def stated(folder, pattern):
    """Numbers that only a case's README states."""
    found = re.search(pattern, (folder / "README.md").read_text())
    assert found, f"{folder.name} must state {pattern}"
    return tuple(map(float, found.groups()))


def read_model(folder, weights="weights.safetensors", **changes):
    config = json.loads((folder / "config.json").read_text())
    for ours, theirs in (
        ("encoder_residual_scale", "enc_scale_residual"),
        ("decoder_residual_scale", "dec_scale_residual"),
    ):
        if config.get(theirs) is not None:
            changes[ours] = config[theirs]
    if "holds the CORRECTED (paper) positions" in (folder / "README.md").read_text():
        changes["compatibility"] = "none"
    model = import_retro(load_file(folder / weights), chunk_size=config["chunk_size"], **changes)
    return model, config


def run(model, data, *, loss=False):
    seq = data["seq"]
    arguments = {"neighbours": data.get("retrieved")}
    if not loss:
        return model(seq, **arguments)
    labels = seq[:, 1:].masked_fill(seq[:, 1:] == 0, -100)
    return model(seq[:, :-1], shift_labels=labels, **arguments)
