"""Attention modules for families that ignore transformers' attention interface.

GPT-J, CodeGen, MPT, Bloom, Falcon and RETRO compute their attention in the module itself, and a
registered attention function is silently not called. Here the whole attention module of a block is
replaced by one with the same weights and Lambda attention inside; nothing of the original is
changed, and the identical object comes back.
"""

from torch import nn

from memlm.models.adapters.alibi import BloomLambda, MptLambda
from memlm.models.adapters.attention import AdaptedAttention
from memlm.models.adapters.falcon import FalconLambda
from memlm.models.adapters.interleaved import CodeGenLambda, GptjLambda
from memlm.models.adapters.retro import RetroLambda

# model_type -> (name of its attention module in a block, what replaces it)
ADAPTERS: dict[str, tuple[str, type[AdaptedAttention]]] = {
    "bloom": ("self_attention", BloomLambda),
    "codegen": ("attn", CodeGenLambda),
    "falcon": ("self_attention", FalconLambda),
    "gptj": ("attn", GptjLambda),
    "memlm_retro": ("inner", RetroLambda),
    "mpt": ("attn", MptLambda),
}


def adapt(inner: nn.Module, family: str) -> list[tuple[nn.Module, str, AdaptedAttention]]:
    """Replace the attention in every block of a body.

    Returns:
        What ``give_back`` needs: the blocks, the name in them, and the adapters.
    """
    name, kind = ADAPTERS[family]
    blocks = [
        module for module in inner.modules() if hasattr(getattr(module, name, None), "layer_idx")
    ]
    places = [(block, name, kind(getattr(block, name))) for block in blocks]
    for block, _, adapter in places:
        setattr(block, name, adapter)
    return places


def give_back(places: list[tuple[nn.Module, str, AdaptedAttention]]) -> None:
    """Put the original modules back."""
    for block, name, adapter in places:
        adapter.real.training = adapter.training
        setattr(block, name, adapter.real)
