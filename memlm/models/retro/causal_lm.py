"""RETRO as a causal language model: loss, logits, and generation that retrieves as it writes.

While text is generated, every time a chunk ends its neighbours are looked up, encoded once, and
read by the tokens up to the next end (Borgeaud et al. 2022, section 2.5). The last token of a
chunk already reads them, so they matter from the first token of the next chunk on. ``generate``
is Hugging Face's: sampling, beams, batches and stopping are its own; this file only finds the
chunks that end in the tokens a step reads, asks the retriever, and hands the neighbours to the
forward pass.

    align="left"    chunks count from a text's first token; a prompt shorter than a chunk
                    retrieves nothing
    align="right"   a chunk ends with the prompt's last token, so every prompt retrieves ("left
                    padding rule" of Wang et al. 2023); its first chunk may be short
    retrieval_step  tokens between look-ups, each for the latest chunk's worth of tokens (alike)

Cached decoding gives what reading the whole text at every step would.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from memlm.core.config import check
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.grid import ChunkGrid, chunk_grid, right_offset
from memlm.models.retro.model import RetroModel, RetroPreTrainedModel
from memlm.models.retro.retriever import ChunkRetriever


class RetroForCausalLM(RetroPreTrainedModel, GenerationMixin):
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

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *,
        retriever: ChunkRetriever | None = None,
        retrieval_step: int | None = None,
        align: Literal["left", "right"] = "left",
        **arguments: Any,
    ) -> Any:
        """Generate text, looking up neighbours as chunks end.

        Args:
            inputs: ``(batch, time)`` prompt; with padding on the left and its ``attention_mask``,
                prompts of different lengths.
            retriever: where neighbours come from; None: no retrieval.
            retrieval_step: tokens between look-ups, at most the chunk size; default the chunk size.
            align: where chunks begin, see `memlm.models.retro.causal_lm`.
            arguments: as of any Hugging Face model: ``max_new_tokens``, ``do_sample``,
                ``num_beams``, ...

        Returns:
            ``(batch, time)`` tokens, prompt included, or what ``return_dict_in_generate`` asks for.

        Raises:
            InputError: for an unknown alignment or a step out of range.
            UnsupportedModelError: for assisted decoding.
        """
        check(align in ("left", "right"), f"align must be 'left' or 'right', got {align!r}")
        prompt = arguments.get("input_ids") if inputs is None else inputs
        config = self.config
        if align == "right" and isinstance(prompt, Tensor):
            mask = arguments.get("attention_mask")
            padding = arguments.get("pad_token_id", self.generation_config.pad_token_id)
            check(
                mask is not None or padding is None or not bool((prompt[:, 0] == padding).any()),
                "padded prompts that are aligned right must come with their attention_mask, got "
                "none; pass what the tokenizer returns",
            )
            whole = torch.ones_like(prompt) if mask is None else mask
            lengths = whole.sum(1).clamp(min=1)
            arguments["chunk_offset"] = right_offset(lengths, config.chunk_size, retrieval_step)
        if config.compatibility == "retro_pytorch" and not config.norm_first and retriever:
            # There the first neighbours change what earlier tokens were: nothing can be kept.
            arguments["use_cache"] = False
        return super().generate(  # type: ignore[misc]
            inputs, retriever=retriever, retrieval_step=retrieval_step, **arguments
        )

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
        if retriever is None:
            return prepared
        batch, total = input_ids.shape
        grid = chunk_grid(
            batch,
            total - past,
            self.config.chunk_size,
            step=retrieval_step,
            real=None if attention_mask is None else attention_mask.bool(),
            offset=chunk_offset,
            past=past,
            device=input_ids.device,
        )
        if len(grid.rows):
            tokens, mask = self._retrieve(retriever, chunks_of(input_ids, grid, past), grid)
            prepared["neighbours"], prepared["neighbour_mask"] = tokens, mask
        return prepared

    def _retrieve(
        self, retriever: ChunkRetriever, chunks: list[Tensor], grid: ChunkGrid
    ) -> tuple[Tensor, Tensor]:
        """Neighbours of the chunks of a grid, as the forward pass takes them."""
        tokens, mask = (part.to(grid.rows.device) for part in retriever.retrieve(chunks))
        check(
            tokens.dim() == 3 and len(tokens) == len(chunks) and mask.shape == tokens.shape,
            f"a retriever must give ({len(chunks)}, k, length) tokens and a mask for "
            f"{len(chunks)} chunks, got {tuple(tokens.shape)} and {tuple(mask.shape)}",
        )
        shape = (len(grid.per_row), int(grid.per_row.max()), *tokens.shape[1:])
        neighbours = tokens.new_zeros(shape)
        seen = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
        neighbours[grid.rows, grid.numbers] = tokens
        seen[grid.rows, grid.numbers] = mask.bool()
        return neighbours, seen

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


def chunks_of(input_ids: Tensor, grid: ChunkGrid, past: int = 0) -> list[Tensor]:
    """The tokens of the chunks that end in a grid's columns.

    Args:
        input_ids: ``(batch, past and new time)``.
        grid: over the new columns.
        past: columns before them.
    """
    columns = grid.columns() + past
    rows = input_ids[grid.rows[:, None], columns.clamp(min=0)]
    return [row[own] for row, own in zip(rows, grid.own, strict=True)]


AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM, exist_ok=True)
