"""RETRO as a causal language model: loss, logits, and generation that retrieves as it writes."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from memlm.core.config import check
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.generation import RetrievingGeneration
from memlm.models.retro.model import RetroModel, RetroPreTrainedModel
from memlm.models.retro.retriever import ChunkRetriever


# transformers looks for its mixin among the direct bases
class RetroForCausalLM(RetroPreTrainedModel, RetrievingGeneration, GenerationMixin):  # type: ignore
    """A RETRO model with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.model = RetroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        neighbours: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        chunk_offset: Tensor | None = None,
        retrieval_step: int | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels: in training and evaluation, with and without
        neighbours.

        Args:
            labels: ``(batch, time)``, the tokens themselves; -100 is not scored. Those of the first
                token of a packed document must be -100, since the token before is another text's.
            shift_labels: ``(batch, time)`` instead: the token after each.
            logits_to_keep: only the last so many positions, or an index of positions; 0: all.
            loss_arguments: ``num_items_in_batch``, what the loss is divided by.
            input_ids: this and the other arguments: see `RetroModel.forward`.
            attention_mask: alike.
            neighbours: alike.
            neighbour_mask: alike.
            document_ids: alike.
            chunk_offset: alike.
            retrieval_step: alike.
            inputs_embeds: alike.
            past_key_values: alike.
            use_cache: alike.
            output_hidden_states: alike.

        Raises:
            InputError: for an unknown argument, and see `RetroModel.forward`.
        """
        unknown = set(loss_arguments) - {"num_items_in_batch"}
        check(not unknown, f"forward must get arguments it knows, got {', '.join(sorted(unknown))}")
        output = self.model(
            input_ids,
            attention_mask,
            neighbours=neighbours,
            neighbour_mask=neighbour_mask,
            document_ids=document_ids,
            chunk_offset=chunk_offset,
            retrieval_step=retrieval_step,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states = output.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[:, keep])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                **loss_arguments,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )

    def retrieval_arguments(self, prompt: Tensor | None, **given: Any) -> dict[str, Any]:
        """What every step of a generation must know."""
        known = super().retrieval_arguments(prompt, **given)
        config = self.config
        if (
            config.compatibility == "retro_pytorch"
            and not config.norm_first
            and given.get("retriever")
        ):
            # There the first neighbours change what earlier tokens were: nothing can be kept.
            known["use_cache"] = False
        return known

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        *,
        retriever: ChunkRetriever | None = None,
        retrieval_step: int | None = None,
        chunk_offset: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What one step reads, with the neighbours of the chunks that end in it."""
        check(inputs_embeds is None, "generation must start from input_ids, got inputs_embeds")
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        prepared: dict[str, Any] = {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "chunk_offset": chunk_offset,
            "retrieval_step": retrieval_step,
            **{name: others[name] for name in ("use_cache", "logits_to_keep") if name in others},
            **{name: others[name] for name in ("output_hidden_states",) if others.get(name)},
        }
        found = self.retrieved(
            retriever,
            input_ids,
            past_key_values,
            attention_mask,
            retrieval_step=retrieval_step,
            chunk_offset=chunk_offset,
        )
        return {**prepared, **found}

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **others: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            check(
                generation_config.cache_implementation is None,
                "a RETRO model must have its own cache, got cache_implementation="
                f"{generation_config.cache_implementation!r}; leave it out",
            )
            model_kwargs["past_key_values"] = RetroCache()


AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM, exist_ok=True)
