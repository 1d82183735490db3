"""Tiny random language models: a few thousand weights, every family quirk, no download.

A freshly initialised model has nearly constant logits, so bugs in alignment, padding or soft-caps
stay below any tolerance. Here every weight is drawn at the scale that keeps activations of order
one, norms and biases included, so that each position's prediction is different and sharp.
"""

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import memlm.models.adaptive.decoder
import memlm.models.retro.causal_lm  # noqa: F401  registers families of memlm's own
from memlm.core.errors import InputError

VOCABULARY = 61
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_GQA, "head_dim": 4, "tie_word_embeddings": False}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

# model_type -> configuration; the comments say what each one is here for
FAMILIES: dict[str, dict[str, Any]] = {
    "adaptive_lm": {  # bands of words, sinusoids from position 2
        **_COMMON,
        "bos_token_id": 2,
        "pad_token_id": 1,
        "input_cutoffs": [20, 50],
        "output_cutoffs": [20, 50],
        "input_factor": 2.0,
        "output_factor": 2.0,
        "final_norm": True,
    },
    "bloom": {  # ALiBi; the feed-forward takes the residual as a second argument
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "cohere": {**_GQA, "logit_scale": 0.25, "tie_word_embeddings": False},  # a factor on the logits
    "cohere2": {  # sliding layers with rotary positions, full ones without any
        **_GQA,
        "logit_scale": 0.25,
        "tie_word_embeddings": False,
        **_MIXED,
    },
    "codegen": {**_GPT, "rotary_dim": 2},  # queries, values and keys in four blocks
    "falcon": {
        **_COMMON,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "ffn_hidden_size": 24,
    },
    "gemma": _GEMMA,
    "gemma2": {  # logit soft-cap, norms on both sides of the feed-forward, sliding windows
        **_GEMMA,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 20.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 4,
    },
    "gemma3_text": {  # sliding and full layers, each kind with its own rotary base
        **_GEMMA,
        **_MIXED,
        "query_pre_attn_scalar": 4,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    },
    "glm": {**_GQA, "head_dim": 4, "pad_token_id": 0},  # interleaved rotary of half of each head
    "mpt": {  # no entry in the tap table: the fallback to the head's input
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt2": _GPT,  # learnt positions, tied head
    "gpt_neo": {
        **_COMMON,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5, "use_parallel_residual": True},
    "gptj": {**_GPT, "rotary_dim": 2},
    "granite": {**_GQA, "logits_scaling": 4.0, "embedding_multiplier": 2.0},  # a divisor
    "llama": _GQA,  # rotary, grouped keys and values
    "memlm_retro": {  # reads neighbours where there are any; its own rotary positions
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 4,
        "encoder_hidden_size": 12,
        "encoder_num_layers": 1,
        "cross_attention_layers": [2],
        "chunk_size": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "mistral": {**_GQA, "sliding_window": None},
    "mixtral": {**_GQA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "olmo": _GQA,
    "olmo2": _GQA,
    "opt": {
        **_COMMON,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
    "persimmon": {**_COMMON, "qk_layernorm": True},  # norms of queries and keys; half-rotary
    "phi": _COMMON,
    "phi3": {**_GQA, "pad_token_id": 0},
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 4},
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},  # the second layer has no positions
    "stablelm": {  # rotary of half of each head
        **_GQA,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "starcoder2": {**_GQA, "sliding_window": None},
}


def tiny_model(family: str = "llama", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal language model of a family, in evaluation mode, float32, on the CPU.

    Args:
        family: a ``model_type`` of Hugging Face, one of ``FAMILIES``.
        seed: of the weights; the caller's random state is left alone.
        settings: overrides of the configuration.

    Raises:
        InputError: for a family that is not in ``FAMILIES``.
    """
    if family not in FAMILIES:
        raise InputError(f"family must be one of {', '.join(sorted(FAMILIES))}, got {family!r}")
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread(model)
    return model.eval()


# encoder-decoders: model_type -> configuration
PAIR_FAMILIES: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    for name in ("bart", "marian")
} | {
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
}


def tiny_translator(family: str = "marian", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random encoder-decoder of a family, in evaluation mode, float32, on the CPU.

    Args:
        family: one of ``PAIR_FAMILIES``.
        seed: of the weights; the caller's random state is left alone.
        settings: overrides of the configuration.

    Raises:
        InputError: for another family.
    """
    if family not in PAIR_FAMILIES:
        raise InputError(f"family must be one of {', '.join(PAIR_FAMILIES)}, got {family!r}")
    config = AutoConfig.for_model(family, **{**PAIR_FAMILIES[family], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        _spread(model)
    return model.eval()


def tiny_tokens(
    rows: int, length: int, *, vocab_size: int = VOCABULARY, seed: int = 0
) -> torch.Tensor:
    """Random tokens ``(rows, length)`` int64, none of them special (3 and up)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            embedding = weight.shape[0] == model.config.vocab_size or "embed" in name
            weight.normal_(std=1.0 if embedding else 1.5 / math.sqrt(weight.shape[-1]))
        elif name.endswith("bias"):
            weight.normal_(std=0.1)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
