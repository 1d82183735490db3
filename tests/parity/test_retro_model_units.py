"""The parts of RETRO models, one by one, and DeepNet's initialisation, against retro-pytorch."""

import json

import pytest
import torch
from retro_models import stated
from safetensors.torch import load_file
from torch import nn

from memlm.importers.retro_checkpoint import target_name
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.decoder import CrossAttention
from memlm.models.retro.encoder import Encoded, SelfAttention
from memlm.models.retro.grid import chunk_grid
from memlm.models.retro.layers import (
    Residual,
    RetroAttention,
    RetroNorm,
    additive,
    rotate,
    rotation,
)
from memlm.models.retro.model import RetroModel

LINEARS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "output"}


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def fill(module, data, prefix):
    """Load an attention of the package: its linear layers, and the null slot if it has one."""
    state = {}
    for name, value in data.items():
        head, _, tail = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and head in LINEARS:
            state[f"{LINEARS[head]}.{tail}"] = value
        elif name in (prefix + "null_k", prefix + "null_v"):
            full = "null_key" if name.endswith("k") else "null_value"
            state[full] = value
    module.load_state_dict(state)
    return module.eval()


def shape_of(folder, data, prefix):
    inner, width = data[f"{prefix}to_q.weight"].shape
    heads = int(*stated(folder, r"heads=(\d+)"))
    return width, data[f"{prefix}to_k.weight"].shape[1], heads, inner // heads


def layers_of(names, side, part):
    """Numbers, from 1, of the layers of a side that have a part: 0 attention, 1 cross-attention."""
    split = [name.split(".") for name in names if name.startswith(f"{side}.layers.")]
    return sorted({int(each[2]) + 1 for each in split if each[3] == part})


def turned(positions, width=32):
    return rotation(
        positions, RetroConfig(head_dim=max(width, 64), rotary_dim=width), torch.float32
    )


def test_rotary(golden_retro_unit_rotary):
    data = load_file(golden_retro_unit_rotary / "data.safetensors")
    width = 2 * len(data["inv_freq"])
    for name, expected in data.items():
        if name.startswith("t_rotated_offset"):
            offset = int(name.removeprefix("t_rotated_offset"))
            turn = turned(offset + torch.arange(data["t"].shape[2]), width)
            close(rotate(data["t"], turn), expected, 1e-6)
            angles = data[f"freqs_len{data['t'].shape[2]}" + (f"_offset{offset}" if offset else "")]
            close(turn.cosine, angles[0, 0, :, : width // 2].cos(), 1e-6)


def test_norms(golden_retro_unit_norms):
    data = load_file(golden_retro_unit_norms / "data.safetensors")
    x = data["x"]
    width = x.shape[-1]
    rms, gated = RetroNorm(width), RetroNorm(width, gated=True)
    rms.load_state_dict({"weight": data["rms.gamma"]})
    close(rms(x), data["rms.out"])
    gated.load_state_dict({"weight": data["gated.gamma"], "gate": data["gated.weight"]})
    close(gated(x), data["gated.out"])
    linear, norm = nn.Linear(width, width), nn.LayerNorm(width)
    linear.load_state_dict({"weight": data["fn.weight"], "bias": data["fn.bias"]})
    rms.load_state_dict({"weight": data["pre.gamma"]})
    close(Residual(linear, rms, norm_first=True, scale=1.0)(x), data["pre.out"])
    norm.load_state_dict({"weight": data["post.norm.weight"], "bias": data["post.norm.bias"]})
    (scale,) = stated(golden_retro_unit_norms, r"scale_residual=([\d.]+)")
    close(Residual(linear, norm, norm_first=False, scale=scale)(x), data["post.out"])


def test_attention(golden_retro_unit_attention):
    folder = golden_retro_unit_attention
    data = load_file(folder / "data.safetensors")
    x, context = data["x"], data["context"]
    turn = turned(torch.arange(x.shape[1]))
    causal = fill(RetroAttention(*shape_of(folder, data, "causal."), 0.0), data, "causal.")
    own = causal.attend(causal.queries(x, turn), *causal.keys_values(x, turn), causal=True)
    close(own, data["causal.out"])
    alone = fill(SelfAttention(*shape_of(folder, data, "self."), 0.0), data, "self.")
    mask = additive(data["self.mask"], x.dtype)[:, None, None]
    found = alone.attend(alone.queries(x, None), *alone.keys_values(x, None), mask)
    close(found, data["self.out_row1_all_masked"])
    width, wide, heads, dim = shape_of(folder, data, "cross.")
    cross = RetroAttention(width, wide, heads, dim, 0.0)
    fill(cross, {k: v for k, v in data.items() if "null" not in k}, "cross.")
    nulls = [
        data[f"cross.null_{n}"].view(1, heads, 1, dim).expand(len(x), -1, -1, -1) for n in "kv"
    ]
    seen = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), data["mask"]], dim=1)
    for name, query_turn, key_turn, visible in (
        (
            "cross.out",
            turned(int(*stated(folder, r"queries offset (\d+)")) + torch.arange(x.shape[1])),
            turned(torch.arange(context.shape[1])),
            seen,
        ),
        ("cross.out_nomask_nopos", None, None, torch.ones_like(seen)),
    ):
        parts = cross.keys_values(context, key_turn)
        key, value = (torch.cat(pair, dim=2) for pair in zip(nulls, parts, strict=True))
        mask = additive(visible, x.dtype)[:, None, None]
        close(cross.attend(cross.queries(x, query_turn), key, value, mask), data[name])


@pytest.mark.parametrize("compatibility", ["none", "retro_pytorch"])
def test_chunked_cross_attention(golden_retro_unit_cca, compatibility):
    data = load_file(golden_retro_unit_cca / "data.safetensors")
    x, context, mask = data["x"], data["context"], data["context_mask"]
    width, _, heads, dim = shape_of(golden_retro_unit_cca, data, "cross_attn.")
    size = len(data["query_positions_paper"])
    config = RetroConfig(
        hidden_size=width,
        num_attention_heads=heads,
        head_dim=dim,
        rotary_dim=min(dim, 32),
        chunk_size=size,
        compatibility=compatibility,
    )
    cross = fill(CrossAttention(config, 0), data, "cross_attn.")
    flat = context.flatten(0, 1)
    pick = torch.arange(flat.shape[0] * flat.shape[1]).view(flat.shape[:2])
    encoded = Encoded(flat.flatten(0, 1), pick, mask.flatten(0, 1))
    found = cross(x, chunk_grid(*x.shape[:2], size), encoded, None)
    close(found, data["out_paper_positions" if compatibility == "none" else "out_original"])
    assert not found[:, : size - 1].any()


def test_encoder_and_decoder(golden_retro_unit_encoder_decoder):
    folder = golden_retro_unit_encoder_decoder
    data = load_file(folder / "data.safetensors")
    x, retrieved, mask = data["x"], data["retrieved_embedded"], data["mask"]
    norm_first = "decoder.norm_out.gamma" in data
    width, _, heads, dim = shape_of(folder, data, "decoder.layers.0.0.fn.")
    scales = (None, None) if norm_first else stated(folder, r"scales ([\d.]+) / ([\d.]+)")
    config = RetroConfig(
        vocab_size=8,
        hidden_size=width,
        encoder_hidden_size=retrieved.shape[-1],
        num_hidden_layers=len(layers_of(data, "decoder", "0")),
        encoder_num_layers=len(layers_of(data, "encoder", "0")),
        num_attention_heads=heads,
        head_dim=dim,
        rotary_dim=2 * len(data["decoder.rotary_pos_emb.inv_freq"]),
        chunk_size=data["encoder_only.chunked_seq"].shape[1],
        cross_attention_layers=layers_of(data, "decoder", "1"),
        encoder_cross_attention_layers=layers_of(data, "encoder", "1"),
        norm="rms" if norm_first else "layer",
        norm_first=norm_first,
        encoder_residual_scale=scales[0],
        decoder_residual_scale=scales[1],
        compatibility="retro_pytorch",
    )
    model = RetroModel(config).eval()
    wanted = model.state_dict()
    state = {n: v for n, v in wanted.items() if n.startswith("embed")}
    for name, value in data.items():
        target = target_name(name, gated=False).removeprefix("model.")
        if target in wanted:
            state[target] = value.reshape(wanted[target].shape)
    model.load_state_dict(state)

    chunks = data["encoder_only.chunked_seq"]  # one per neighbour
    pairs = torch.arange(len(chunks))
    found = model.encoder.encode(
        retrieved.flatten(0, 2), mask.flatten(0, 2), chunks, None, text=pairs, chunk=pairs
    )
    visible = mask.flatten(0, 2)
    close(found[visible], data["encoder_only.out"][visible], 2e-5)

    # Neighbours are embedded already here: token i of the batch has row i of a table.
    table = nn.Embedding.from_pretrained(retrieved.flatten(0, 3))
    model.embed_neighbours = table
    model.config.vocab_size = table.num_embeddings
    ids = torch.arange(table.num_embeddings).view(mask.shape)
    for arguments, name in (
        ({"neighbours": ids, "neighbour_mask": mask}, "decoder_out"),
        ({}, "decoder_out_no_retrieval"),
    ):
        output = model(inputs_embeds=x, **arguments).last_hidden_state
        close(output, data[name], 2e-5)


def test_deepnet_constants(golden_retro_deepnet_init):
    for case in json.loads((golden_retro_deepnet_init / "constants.json").read_text()):
        config = RetroConfig(
            num_hidden_layers=case["dec_depth"],
            encoder_num_layers=case["enc_depth"],
            norm_first=False,
            deepnet=True,
            cross_attention_layers=(),
        )
        expected = case["enc_scale_residual"], case["dec_scale_residual"]
        assert config.residual_scales == pytest.approx(expected, abs=1e-12)
        assert config.gains == pytest.approx((case["enc_beta"], case["dec_beta"]), abs=1e-12)


@pytest.mark.parametrize("deepnet", [True, False])
def test_initialisation(golden_retro_deepnet_init, deepnet):
    name = "init_stats.json" if deepnet else "default_init_stats.json"
    cases = json.loads((golden_retro_deepnet_init / name).read_text())
    shapes = {case["name"]: case["shape"] for case in cases}
    torch.manual_seed(0)
    vocabulary, narrow = shapes["token_emb.weight"]
    inner, width = shapes["decoder.layers.0.0.fn.to_q.weight"]
    config = RetroConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=narrow,
        num_hidden_layers=len(layers_of(shapes, "decoder", "0")),
        encoder_num_layers=len(layers_of(shapes, "encoder", "0")),
        num_attention_heads=8,
        head_dim=inner // 8,
        cross_attention_layers=layers_of(shapes, "decoder", "1"),
        encoder_cross_attention_layers=layers_of(shapes, "encoder", "1"),
        shared_embeddings=True,
        learned_positions=True,
        max_position_embeddings=shapes["pos_emb.weight"][0],
        norm="layer" if deepnet else "rms",
        norm_first=not deepnet,
        deepnet=deepnet,
        head_bias=True,
        initializer="torch",
        compatibility="retro_pytorch",
    )
    state = RetroForCausalLM(config).state_dict()
    for case in cases:
        value = state[target_name(case["name"], gated=False)]
        if "std" in case and value.numel() > 1000:
            expected = pytest.approx(case["std"], rel=4 / value.numel() ** 0.5)
            assert float(value.std()) == expected, case["name"]
        if case.get("absmax") == 0.0:
            assert not value.any(), case["name"]
