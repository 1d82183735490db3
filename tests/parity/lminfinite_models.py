"""Recorded models of LM-Infinite: the one that a case was made with."""

import json
import re

import torch
from conftest import sibling
from transformers import AutoModelForCausalLM


def load_model(folder, family, *, grouped=False):
    """The model that the README of a case names, else the one of a family of its root.

    ``grouped``: whether several heads of queries share one of keys.
    """
    path = _named(folder) or next(
        config.parent
        for config in sorted(sibling(folder, "models").glob("*/config.json"))
        if _is(json.loads(config.read_text()), family, grouped)
    )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _named(folder):
    names = re.findall(r"models/(\w+)", (folder / "README.md").read_text())
    paths = [sibling(folder, "models") / name for name in names]
    return next((path for path in paths if path.is_dir()), None)


def _is(config, family, grouped):
    heads = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads", heads) != heads
    return config["model_type"] == family and shared == grouped
