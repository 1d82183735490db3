"""Attaching a memory to an encoder-decoder: the twin of `memlm.models.attach`.

    decoder state at the tap --query--> memory --candidates--> merge with the logits --> next token

`MemoryForSeq2SeqLM` is an ordinary ``PreTrainedModel`` with ``GenerationMixin``: ``forward`` with
labels, greedy search, sampling and beams work as on the model itself, which is a submodule and is
not touched. Only memories without state: beams reorder them for nothing.

Source: kNN-MT (Khandelwal et al. 2021, section 2). Differs from the code of knn-transformers: where
a family adds a bias to its logits (Marian, BART), it belongs to the model's distribution, which is
mixed with the memory's; there it is added to the logarithm of the mixture (``bias="outside"``).
"""

from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.core.merges import Merge, Mixture
from memlm.core.types import TokenMemory
from memlm.data.batches import IGNORED
from memlm.models.config import AroundConfig, speak_for
from memlm.models.match import check_match, stored_tap
from memlm.models.pairs import check_encoder_decoder
from memlm.models.rows import merge_rows
from memlm.models.taps import Tap, capture, find_tap, reached


class Seq2SeqMemoryConfig(AroundConfig):
    """The configuration of a ``MemoryForSeq2SeqLM``."""

    model_type = "memlm_seq2seq"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(text_config, base, **kwargs)


def attach_seq2seq(
    model: PreTrainedModel,
    memory: TokenMemory,
    merge: Merge | None = None,
    *,
    tap: str | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    bias: Literal["inside", "outside"] = "inside",
) -> "MemoryForSeq2SeqLM":
    """Give an encoder-decoder a memory.

    Args:
        model: used as it is, never changed.
        memory: without state, e.g. a `KnnMemory` over a store of `build_pair_datastore`.
        merge: how the two are joined; default ``Mixture()``.
        tap: where queries are read in the decoder; default: as the memory's store was made.
        tokenizer: checked against the store's, if given.
        verify: compare the model's fingerprint with the store's.
        bias: a family's bias on the logits is part of the model, or added to what was merged.

    Raises:
        FingerprintError: if the memory's store was made with another model, tokenizer or tap.
        UnsupportedModelError: if the model is no encoder-decoder or offers no tap.
        InputError: for a memory with state.
    """
    check_encoder_decoder(model)
    if bias not in ("inside", "outside"):
        raise InputError(f"bias must be 'inside' or 'outside', got {bias!r}")
    if memory.init_state(1) is not None:
        raise InputError(
            f"the memory of an encoder-decoder must have no state, got a {type(memory).__name__}; "
            "use a KnnMemory"
        )
    found = find_tap(model, tap or stored_tap(memory) or "auto")
    check_match(model, memory, found, tokenizer=tokenizer, verify=verify)
    return MemoryForSeq2SeqLM.around(model, memory, merge or Mixture(), found, bias)


class MemoryForSeq2SeqLM(PreTrainedModel, GenerationMixin):
    """An encoder-decoder and its memory. Make one with `attach_seq2seq`.

    Attributes:
        base: the model.
        memory: the memory.
        merge: how they are joined; may be replaced at any time.
        tap: where queries are read.
        bias: see `attach_seq2seq`.
    """

    config_class = Seq2SeqMemoryConfig
    base_model_prefix = "base"
    # the base model decides; these let its choice through
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    base: Any
    memory: TokenMemory
    merge: Merge
    tap: Tap
    bias: str

    @classmethod
    def around(
        cls, base: PreTrainedModel, memory: TokenMemory, merge: Merge, tap: Tap, bias: str
    ) -> Self:
        """The parts as one model, unchecked."""
        config = Seq2SeqMemoryConfig(
            text_config=base.config,
            is_encoder_decoder=True,
            dtype=base.dtype,
            attn_implementation=base.config._attn_implementation,
        )
        model = cls(config)
        model.base = base
        model.memory, model.merge, model.tap, model.bias = memory, merge, tap, bias
        model.training = base.training
        speak_for(model, base)
        return model

    def detach(self) -> PreTrainedModel:
        """The base model: the identical object that was attached, unchanged."""
        return self.base

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass of the model, its logits merged with what the memory says.

        Args:
            input_ids: ``(batch, source)`` int64.
            attention_mask: ``(batch, source)``, 0 for padding.
            decoder_input_ids: ``(batch, target)`` int64; made of ``labels`` if left out.
            decoder_attention_mask: as of the base model.
            encoder_outputs: of an earlier pass.
            past_key_values: alike.
            labels: ``(batch, target)`` int64, -100 where there is no loss.
            use_cache: return a cache.
            return_dict: False for a tuple.
            kwargs: for the base model.

        Returns:
            The base model's own kind of output, with merged ``logits`` ``(batch, target, vocab)``
            and, with labels, their mean ``loss`` in nats.
        """
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        with capture(self.base, self.tap) as seen:
            output = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                past_key_values=past_key_values,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        values = dict(output)
        if not (isinstance(self.merge, Mixture) and self.merge.lam == 0):
            values["logits"] = self._merged(output.logits, reached(seen, self.tap))
        if labels is not None:
            rows = values["logits"].flatten(0, 1)
            values["loss"] = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED)
        output = type(output)(**values)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _merged(self, logits: Tensor, states: Tensor) -> Tensor:
        added = getattr(self.base, "final_logits_bias", None) if self.bias == "outside" else None
        rows = logits if added is None else logits - added
        queries = states.reshape(-1, states.shape[-1])
        merged = merge_rows(self.merge, self.memory, rows.flatten(0, 1), queries, None)
        merged = merged.view(logits.shape)
        return merged if added is None else merged + added

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's."""
        return self.base.get_encoder(*args, **kwargs)

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's."""
        return self.base.get_decoder(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """The base model's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The base model's."""
        return self.base.get_output_embeddings()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The base model's."""
        return self.base.prepare_inputs_for_generation(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The base model's."""
        return self.base.prepare_decoder_input_ids_from_labels(labels=labels)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Refused.

        Raises:
            UnsupportedModelError: always; model and store are kept by themselves.
        """
        raise UnsupportedModelError(
            "an encoder-decoder with memory is not saved as one; save model.detach() and keep the "
            "store, and attach them again"
        )
