"""Long prompts in chunks: a forward pass that keeps only the last logits reads its text in pieces.

``generate`` asks the model for the logits of its prompt's last token (``logits_to_keep``). Nobody
looks at the hidden states of the others, but all of them would be held in every layer, and the
feed-forward layers make several times as much. With a cache of constant size nothing speaks against
reading the prompt piece by piece: a hook on the model lets its body read all chunks but the last,
and the forward pass goes on with that one. What comes back is the same, to rounding.

A pass is left as it is if it keeps logits of more than a chunk, computes a loss or gradients,
returns anything else of every token, has no cache, or if somebody else looks into the body.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

CHUNK = 4096
_KNOWN = {
    "attention_mask",
    "input_ids",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}


class ChunkedReading:
    """The hook on one extended model.

    Attributes:
        size: tokens of a chunk.
    """

    def __init__(self, extension: Any, size: int):
        self.extension, self.size = extension, size

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model runs: read all but the last chunk, and leave that one to it."""
        if args or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        tokens = kwargs.get(name)
        if tokens is None or tokens.shape[1] <= self.size or not self._applies(kwargs):
            return None
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = Cache(layers=self.extension.new_layers())
        past, count = int(cache.get_seq_length()), tokens.shape[1]
        mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
        begin, end = 0, count % self.size or self.size
        while end < count:
            piece = {name: tokens[:, begin:end], "past_key_values": cache, "use_cache": True}
            if mask is not None:
                piece["attention_mask"] = mask[:, : past + end]
            if places is not None:
                piece["position_ids"] = places[:, begin:end]
            cache = self.extension.inner(**piece).past_key_values
            begin, end = end, end + self.size
        rest = {**kwargs, name: tokens[:, begin:], "past_key_values": cache}
        return (), rest if places is None else {**rest, "position_ids": places[:, begin:]}

    def _applies(self, given: dict[str, Any]) -> bool:
        """Whether reading in chunks gives all that is asked for."""
        extension, kept = self.extension, given.get("logits_to_keep")
        others = (given[name] for name in set(given) - _KNOWN)
        mask = given.get("attention_mask")
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = extension.inner.config.use_cache
        return (
            isinstance(kept, int)
            and 1 <= kept <= self.size
            and (given.get("past_key_values") is not None or bool(use_cache))
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2))
            and all(other is None or other is False for other in others)
            and not getattr(extension.inner.config, "output_router_logits", False)
            and extension.is_piecewise
            # such as the tap of a memory, or what reads neighbours in front of a layer
            and len(extension.inner._forward_pre_hooks) == 1
            and len(extension.inner._forward_hooks) == 1
            and not any(part._forward_pre_hooks for part in list(extension.inner.modules())[1:])
        )
