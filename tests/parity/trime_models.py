"""TRIME's recorded models as ours, and what its criteria make of some targets."""

import json
import re

import torch
from safetensors.torch import load_file

from memlm.core.types import TargetPartial
from memlm.models.adaptive.config import AdaptiveConfig
from memlm.models.adaptive.decoder import AdaptiveForCausalLM

PAD = 1
_NAMES = (
    (r"embed_tokens\.embeddings\.(\d)\.0\.", r"model.embed_tokens.tables.\1."),
    (r"embed_tokens\.embeddings\.(\d)\.1\.", r"model.embed_tokens.projections.\1."),
    (r"layers\.(\d+)\.final_layer_norm\.", r"model.layers.\1.ffn_layer_norm."),
    (r"layers\.", "model.layers."),
    (r"layer_norm\.", "model.norm."),
    (r"adaptive_softmax\.head\.word_proj\.", "lm_head.tables.0."),
    (r"adaptive_softmax\.head\.class_proj\.", "lm_head.classes."),
)


def read_args(folder):
    return json.loads((folder / "args.json").read_text())


def our_name(name):
    """The name of a parameter of fairseq's decoder in ours; None for what ours has not."""
    name = name.removeprefix("decoder.")
    if "_float_tensor" in name or name.endswith("version"):
        return None
    if tail := re.match(r"adaptive_softmax\.tail\.(\d+)\.([02])\.weight", name):
        number = int(tail[1])
        if tail[2] == "0":
            return f"lm_head.projections.{number}.weight"
        return f"lm_head.tables.{number + 1}.weight"
    for pattern, ours in _NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", ours, name, count=1)
    raise AssertionError(f"{name} is no parameter of a decoder")


def load_model(folder):
    """The model of a case, in evaluation mode."""
    args, weights = read_args(folder), load_file(folder / "model.safetensors")
    tables = [w for n, w in weights.items() if re.search(r"embeddings\.\d\.0\.weight", n)]
    config = AdaptiveConfig(
        vocab_size=sum(len(table) for table in tables),
        hidden_size=args["decoder_embed_dim"],
        intermediate_size=args["decoder_ffn_embed_dim"],
        num_hidden_layers=args["decoder_layers"],
        num_attention_heads=args["decoder_attention_heads"],
        max_position_embeddings=args["tokens_per_sample"],
        input_cutoffs=[int(cut) for cut in args["adaptive_input_cutoff"].split(",")],
        output_cutoffs=[int(cut) for cut in args["adaptive_softmax_cutoff"].split(",")],
        input_factor=args["adaptive_input_factor"],
        output_factor=args["adaptive_softmax_factor"],
        tie_word_embeddings=args["tie_adaptive_weights"],
        tie_projections=args["tie_adaptive_proj"],
        final_norm=not args["no_decoder_final_norm"],
    )
    model = AdaptiveForCausalLM(config).eval()
    state = {}
    for name, weight in weights.items():
        if (ours := our_name(name)) is None or weight.numel() == 0:
            continue
        own_projection = ours.startswith("lm_head.projections") and not args["tie_adaptive_proj"]
        state[ours] = weight.T.contiguous() if own_projection else weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model


class OriginalHead:
    """A head as TRIME's criteria read it: two kinds of targets cost nothing.

    Padding, and in every band after the first the word whose number *in the band* is that of
    padding: its probability inside the band is left out.
    """

    def __init__(self, head):
        self.head, self.bands = head, head.projection.bands

    def target(self, hidden, targets):
        said = self.head.target(hidden, targets)
        own = torch.where(targets == PAD, said.lse, said.target_lse)
        for number, band in enumerate(self.bands[1:]):
            classes = self.head.projection.classes(hidden)[:, number]
            own = torch.where(targets == band.begin + PAD, classes, own)
        return TargetPartial(said.lse, own)
