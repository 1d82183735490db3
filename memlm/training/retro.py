"""Train a RETRO model (Borgeaud et al. 2022) on chunks and their neighbours, on the common loop.

The model is new, continued, or a trained language model that learns to read neighbours while its
own weights stay (`memlm.models.retro.fit`).

A text is a chunk database with a finished table of neighbours, or without one: the same model then
learns without retrieval. `memlm.retrieval.dataset` makes sequences of it. An epoch reads every
sequence once, in an order of its own. With AdamW tables and matrices are decayed, vectors (biases,
gains of norms, null keys and values) are not: the groups of `memlm.training.retro_groups`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import default_collate
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.core.randomness import random_state_kept
from memlm.data.streams import pack
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.fit import RetroFitForCausalLM, retro_fit
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.neighbours import DIRECTORY, NeighbourTable
from memlm.training.loop import on_cpu, train
from memlm.training.model_loss import ModelLoss
from memlm.training.order import Dealt
from memlm.training.retro_config import RetroTrainConfig

Reader = TypeVar("Reader", RetroForCausalLM, RetroFitForCausalLM)
"""A model that reads neighbours."""


class RetroText(NamedTuple):
    """A text whose chunks have neighbours.

    Attributes:
        text: its chunks.
        neighbours: their table; None: they have none.
        database: where the neighbours are from; None: the text itself.
    """

    text: ChunkDatabase
    neighbours: NeighbourTable | None = None
    database: ChunkDatabase | None = None

    @classmethod
    def open(cls, path: str | Path, database: ChunkDatabase | None = None) -> "RetroText":
        """The chunk database in the directory ``path``, with the table that stands in it.

        Raises:
            StoreError: if either is missing or not finished.
            FingerprintError: if the table is of another text or database.
        """
        text = ChunkDatabase.open(path)
        table = NeighbourTable.open(text.path / DIRECTORY, text, database or text)
        return cls(text, table, database)


def retro_sequences(source: RetroText, config: RetroTrainConfig) -> RetroDataset:
    """The sequences of a text as a run reads them.

    Raises:
        InputError: if a sequence is no whole number of chunks, or the table has too few neighbours.
        FingerprintError: if text, table and database do not belong together.
    """
    size = source.text.chunk_size
    check(
        config.block_length % size == 0,
        f"block_length must be a whole number of chunks of {size} tokens, got "
        f"{config.block_length}",
    )
    return RetroDataset(
        source.text,
        source.neighbours,
        source.database,
        chunks_per_sequence=config.block_length // size,
        k=config.k,
        packed=config.packed,
    )


def train_retro(
    source: RetroText,
    tokenizer: PreTrainedTokenizerBase,
    config: RetroTrainConfig,
    out: str | Path,
    *,
    model: Reader | None = None,
    held_out: RetroText | None = None,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Reader:
    """Train a model and leave it, with its tokenizer and a summary, in a folder.

    With ``max_steps`` the result depends only on texts, tables, settings, number of processes,
    threads and machine type: killed anywhere and resumed, it is the same.

    Args:
        source: text to learn from.
        tokenizer: that made its tokens; saved beside the model.
        config: everything else.
        out: folder of the run; created.
        model: to continue, trained in place, in float32 (of a fitted model, the new weights); None:
            a new one of the configured shape.
        held_out: text to report the loss on.
        resume: continue from the last checkpoint in ``out`` (from the start if there is none; a
            finished run is only loaded).
        quiet: no progress bar.
        callbacks: further callbacks of the Trainer.

    Returns:
        The trained model in evaluation mode.

    Raises:
        InputError: if model, chunks and settings do not fit together, or ``out`` holds a run and
            ``resume`` is not set.
        FingerprintError: for another tokenizer than the text's, or if the run to resume is
            another one.
    """
    expected, there = source.text.tokenizer_hash, tokenizer_hash(tokenizer)
    if there != expected:
        raise FingerprintError(
            f"the tokenizer must be the one that made {source.text.path}, {expected}, got {there}; "
            "use that one or chunk the text again"
        )
    data = retro_sequences(source, config)
    evaluated = None if held_out is None else retro_sequences(held_out, config)
    identity: dict[str, Any] = {
        "text": source.text.fingerprint,
        "neighbours": None if source.neighbours is None else source.neighbours.record,
        "tokenizer_hash": there,
    }
    learner: Any = model
    if model is None:
        with random_state_kept():
            torch.manual_seed(config.seed)
            learner = RetroForCausalLM(model_config(config, tokenizer, source.text.chunk_size))
    else:
        check_model(model, source.text, tokenizer)
        check(
            source.neighbours is not None or isinstance(model, RetroForCausalLM),
            f"a frozen model learns from neighbours only, but {source.text.path} has no table of "
            "them; make one (`memlm retro neighbours`)",
        )
        identity["model_hash"] = model_hash(model)
        if isinstance(model, RetroForCausalLM):
            learner = model.float()
    order = np.random.default_rng(config.seed).permutation(len(data))
    batches = pack([config.block_length] * len(data), order, max_rows=config.rows)
    processes = PartialState(cpu=on_cpu(config)).num_processes
    trained = train(
        ModelLoss(learner),
        data,
        Dealt(batches, processes=processes, seed=config.seed),
        config,
        out,
        collate=default_collate,
        identity=identity,
        held_out=cast("Sequence[Any] | None", evaluated),
        save_beside=tokenizer.save_pretrained,
        resume=resume,
        quiet=quiet,
        callbacks=callbacks,
    )
    return cast(Reader, trained)


def model_config(
    config: RetroTrainConfig, tokenizer: PreTrainedTokenizerBase, chunk_size: int
) -> RetroConfig:
    """The shape of a run's new model."""
    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "chunk_size": chunk_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.size is not None:
        return RetroConfig.preset(config.size, **tokens)
    return RetroConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        encoder_hidden_size=config.hidden_size,
        encoder_num_layers=config.encoder_layers,
        cross_attention_layers=config.cross_attention_layers,
        shared_embeddings=True,
        tie_word_embeddings=True,
        **tokens,
    )


def fitted_model(
    base: PreTrainedModel, config: RetroTrainConfig, chunk_size: int
) -> RetroFitForCausalLM:
    """A language model with new parts that read neighbours, for a run of these settings.

    Of the shape, ``encoder_layers`` and ``cross_attention_layers`` count; widths are the model's.
    """
    with random_state_kept():
        torch.manual_seed(config.seed)
        return retro_fit(
            base,
            chunk_size=chunk_size,
            encoder_num_layers=config.encoder_layers,
            cross_attention_layers=config.cross_attention_layers,
        )


def check_model(
    model: PreTrainedModel,
    text: ChunkDatabase,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse a model for other chunks or fewer words.

    Raises:
        InputError: if it is no RETRO model, or its chunk size or vocabulary do not fit.
    """
    check(
        isinstance(model, RetroForCausalLM | RetroFitForCausalLM),
        "the model must be a RetroForCausalLM or one that retro_fit made, got a "
        f"{type(model).__name__}; train one (`memlm train --method retro`)",
    )
    shape: Any = model.retro
    check(
        shape.chunk_size == text.chunk_size,
        f"the model must have the chunk size of {text.path}, {text.chunk_size} tokens, got "
        f"{shape.chunk_size}; chunk the text again",
    )
    check(
        shape.vocab_size >= len(tokenizer),
        f"the model must have a word for each of the tokenizer's {len(tokenizer)}, got "
        f"{shape.vocab_size}",
    )
