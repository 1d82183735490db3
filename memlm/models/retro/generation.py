"""Generation that retrieves as it writes, for every model that reads neighbours.

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
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

from memlm.core.config import check
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.grid import ChunkGrid, chunk_grid, right_offset
from memlm.models.retro.retriever import ChunkRetriever


class RetrievingGeneration(GenerationMixin):
    """``generate`` with a retriever. The model says with ``retro`` how it cuts chunks."""

    config: Any
    generation_config: Any

    @property
    def retro(self) -> RetroConfig:
        """The settings of what reads neighbours."""
        return self.config

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
            align: where chunks begin, see `memlm.models.retro.generation`.
            arguments: as of any Hugging Face model: ``max_new_tokens``, ``do_sample``,
                ``num_beams``, ...

        Returns:
            ``(batch, time)`` tokens, prompt included, or what ``return_dict_in_generate`` asks for.

        Raises:
            InputError: for an unknown alignment or a step out of range.
            UnsupportedModelError: for assisted decoding.
        """
        prompt = arguments.get("input_ids") if inputs is None else inputs
        arguments |= self.retrieval_arguments(
            prompt,
            retriever=retriever,
            retrieval_step=retrieval_step,
            align=align,
            mask=arguments.get("attention_mask"),
            padding=arguments.get("pad_token_id", self.generation_config.pad_token_id),
        )
        return super().generate(inputs, **arguments)  # type: ignore[misc]

    def retrieval_arguments(
        self,
        prompt: Tensor | None,
        *,
        retriever: ChunkRetriever | None = None,
        retrieval_step: int | None = None,
        align: str = "left",
        mask: Tensor | None = None,
        padding: int | None = None,
    ) -> dict[str, Any]:
        """What every step of a generation must know, from the arguments of `generate`.

        Raises:
            InputError: for an unknown alignment, or padding without a mask.
        """
        check(align in ("left", "right"), f"align must be 'left' or 'right', got {align!r}")
        known: dict[str, Any] = {"retriever": retriever, "retrieval_step": retrieval_step}
        if align == "right" and isinstance(prompt, Tensor):
            check(
                mask is not None or padding is None or not bool((prompt[:, 0] == padding).any()),
                "padded prompts that are aligned right must come with their attention_mask, got "
                "none; pass what the tokenizer returns",
            )
            whole = torch.ones_like(prompt) if mask is None else mask
            lengths = whole.sum(1).clamp(min=1)
            known["chunk_offset"] = right_offset(lengths, self.retro.chunk_size, retrieval_step)
        return known

    def retrieved(
        self,
        retriever: ChunkRetriever | None,
        input_ids: Tensor,
        past_key_values: Cache | None,
        attention_mask: Tensor | None,
        *,
        retrieval_step: int | None = None,
        chunk_offset: Tensor | None = None,
    ) -> dict[str, Any]:
        """The neighbours of the chunks that end in one step, as the forward pass takes them.

        Args:
            retriever: where they come from; None: there are none.
            input_ids: ``(batch, past and new time)``.
            past_key_values: says how much is past.
            attention_mask: ``(batch, past and new time)``.
            retrieval_step: see `generate`.
            chunk_offset: ``(batch,)``.
        """
        if retriever is None:
            return {}
        batch, total = input_ids.shape
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        grid = chunk_grid(
            batch,
            total - past,
            self.retro.chunk_size,
            step=retrieval_step,
            real=None if attention_mask is None else attention_mask.bool(),
            offset=chunk_offset,
            past=past,
            device=input_ids.device,
        )
        if not len(grid.rows):
            return {}
        tokens, mask = retrieve(retriever, chunks_of(input_ids, grid, past), grid)
        return {"neighbours": tokens, "neighbour_mask": mask}


def retrieve(
    retriever: ChunkRetriever, chunks: list[Tensor], grid: ChunkGrid
) -> tuple[Tensor, Tensor]:
    """Neighbours of the chunks of a grid, with their mask, each ``(batch, chunks, k, length)``.

    Raises:
        InputError: if the retriever does not answer every chunk.
    """
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
