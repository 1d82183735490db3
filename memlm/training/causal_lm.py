"""Train a causal language model on text, from scratch or from where another training ended.

The model from scratch is a Llama with its embedding matrix tied to the head; any causal language
model can be continued. What is lowered is plain cross-entropy or one of TRIME's objectives; each
reads the text in its own order:

    ce, trime     blocks of the whole text, shuffled, cut at another token in every epoch
    trime_long    blocks in the order of the text, one stream per group of processes
    trime_ext     blocks in a chain of similar ones, batch by batch (`memlm.data.lexical`)

The folder of a run holds the model and its tokenizer (``AutoModelForCausalLM.from_pretrained``
reads it) and a record of what it is and what came out (`memlm.training.folder`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import ArrayLike, NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from memlm.core.config import check
from memlm.core.files import fingerprint
from memlm.core.randomness import random_state_kept
from memlm.data.lexical import find_neighbours, greedy_chain, overlap
from memlm.data.streams import pack as pack_batches
from memlm.data.tokens import TokenCorpus
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.training.blocks import HeldOutBlocks, Stream, TrainingBlocks, collate, pack
from memlm.training.config import SHAPE, TrainConfig
from memlm.training.loop import UNLIMITED_STEPS, on_cpu, train
from memlm.training.objectives.module import ObjectiveModule
from memlm.training.order import Dealt, InTurn, Order


def train_causal_lm(
    corpus: TokenCorpus,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    out: str | Path,
    *,
    model: PreTrainedModel | None = None,
    chain: ArrayLike | None = None,
    held_out: TokenCorpus | None = None,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreTrainedModel:
    """Train a model and leave it, with its tokenizer and a summary, in a folder.

    With ``max_steps`` the result depends only on corpus, tokenizer, settings, number of processes,
    threads and machine type. The state of the global random generators is the same after the call
    as before.

    Args:
        corpus: text to learn from, tokenised with ``tokenizer``.
        tokenizer: decides the size of the vocabulary; saved beside the model.
        config: everything else.
        out: folder of the run; created.
        model: to continue, trained in place, in float32; None: a new one of the configured shape.
        chain: for trime_ext, the numbers of the text's blocks in the order in which they are
            grouped; None: by BM25 if ``config.group_by`` says so, else in the text's order.
        held_out: text to report the loss on, in packed blocks like the training text.
        resume: continue from the last checkpoint in ``out`` (from the start if there is none; a
            finished run is only loaded).
        quiet: no progress bar.
        callbacks: further callbacks of the Trainer.

    Returns:
        The trained model in evaluation mode.

    Raises:
        InputError: if the corpus does not fill a block, its tokens are not the tokenizer's, ``out``
            already holds a run and ``resume`` is not set, or the loss stops being a number.
        FingerprintError: if the run to resume has other settings, another corpus or tokenizer.
    """
    out = Path(out)
    identity = {"corpus_hash": corpus.hash, "tokenizer_hash": tokenizer_hash(tokenizer)}
    vocab_size = len(tokenizer)
    if model is not None:
        _check_continued(model, config)
        vocab_size = max(vocab_size, model.config.get_text_config().vocab_size)
        identity["model_hash"] = model_hash(model)
        model = cast(PreTrainedModel, model.float())
    for text in (corpus, held_out):
        if text is not None:
            _check_vocabulary(text, vocab_size)
    processes = PartialState(cpu=on_cpu(config)).num_processes
    examples, order = read_in_order(pack(corpus), config, processes, chain=chain)
    dealt = order if isinstance(order, Dealt) and config.method == "trime_ext" else None
    if dealt is not None:
        identity["chain_hash"] = fingerprint([list(batch) for batch in dealt.batches])
    evaluated = None if held_out is None else HeldOutBlocks(pack(held_out), config.block_length)
    if model is None:
        with random_state_kept():
            torch.manual_seed(config.seed)
            model = new_model(config, tokenizer)

    return train(
        ObjectiveModule(model, config.objective()),
        examples,
        order,
        config,
        out,
        collate=collate,
        identity=identity,
        held_out=cast(Sequence[Any], evaluated),
        save_beside=tokenizer.save_pretrained,
        complete=lambda summary: _complete(
            summary | ({} if dealt is None else _shared_text(corpus, config, dealt)),
            corpus,
            held_out,
            evaluated,
            continued="model_hash" in identity,
        ),
        resume=resume,
        quiet=quiet,
        callbacks=callbacks,
    )


def read_in_order(
    stream: Stream, config: TrainConfig, processes: int, *, chain: ArrayLike | None = None
) -> tuple[Any, Order]:
    """The blocks of a text and the order in which the method reads them.

    Args:
        stream: the text.
        config: method, block length and budget.
        processes: how many there are.
        chain: for trime_ext, see `train_causal_lm`.

    Returns:
        Examples, and which of them a micro-batch holds.

    Raises:
        InputError: if the text does not fill a block or a batch.
    """
    check(
        chain is None or config.method == "trime_ext",
        f"a chain of blocks is what trime_ext reads, but the method is {config.method}",
    )
    if config.method in ("ce", "trime"):
        items = (config.max_steps or UNLIMITED_STEPS) * config.accumulate * config.rows * processes
        examples = TrainingBlocks(stream, config.block_length, items=items, seed=config.seed)
        return examples, InTurn(config.rows, processes)
    examples = HeldOutBlocks(stream, config.block_length)
    numbers = np.arange(len(examples))
    if config.method == "trime_long":
        batches = pack_batches([config.block_length] * len(examples), numbers, max_rows=config.rows)
        dealt = Dealt(
            batches, by="streams", processes=processes, ranks_per_stream=config.ranks_per_stream
        )
        return examples, dealt
    if chain is None and config.group_by == "bm25":
        chain = greedy_chain(find_neighbours(_blocks(stream, config)), seed=config.seed)
    order = numbers if chain is None else np.asarray(chain)
    check(
        np.array_equal(np.sort(order), numbers),
        f"a chain must hold every block from 0 to {len(numbers) - 1} once, but does not; was the "
        "text cut into other blocks?",
    )
    batches = pack_batches([config.block_length] * len(examples), order, max_rows=config.rows)
    return examples, Dealt(batches, by="grouped", processes=processes, seed=config.seed)


def _blocks(stream: Stream, config: TrainConfig) -> list[NDArray[np.integer]]:
    """The tokens of each block that trime_ext reads."""
    length = config.block_length
    count = len(HeldOutBlocks(stream, length))
    return [stream.tokens[number * length :][:length] for number in range(count)]


def _shared_text(corpus: TokenCorpus, config: TrainConfig, order: Dealt) -> dict[str, Any]:
    """What a batch's blocks have in common (`memlm.data.lexical.overlap`), as dealt and without."""
    if config.rows < 2:
        return {}
    blocks = _blocks(pack(corpus), config)
    orders = {"as_written": np.arange(len(blocks)), "as_read": np.concatenate(order.batches)}
    return {
        "overlap": {name: overlap(blocks, numbers, config.rows) for name, numbers in orders.items()}
    }


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of the configured shape with random weights (from torch's global generator)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.block_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        )
    )


def _check_continued(model: PreTrainedModel, config: TrainConfig) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check(
        longest is None or config.block_length <= longest,
        f"block_length must not exceed the {longest} positions of the model, got "
        f"{config.block_length}",
    )


def _check_vocabulary(corpus: TokenCorpus, vocab_size: int) -> None:
    largest = int(corpus.tokens.max(initial=0))
    check(
        largest < vocab_size,
        f"the corpus must be made with this tokenizer, but has token {largest} where the tokenizer "
        f"has {vocab_size} tokens; tokenise the text again",
    )


def _complete(
    summary: dict[str, Any],
    corpus: TokenCorpus,
    held_out: TokenCorpus | None,
    evaluated: HeldOutBlocks | None,
    *,
    continued: bool,
) -> dict[str, Any]:
    """Add what only text has: epochs, perplexities, bits per byte."""
    config = {
        name: value
        for name, value in summary["config"].items()
        if not (continued and name in SHAPE)
    }
    targets = max(1, int(pack(corpus).scored[1:].sum()))
    summary |= {
        "config": config,
        "corpus": corpus.describe(),
        "epochs": summary["tokens"] / targets,
    }
    if held_out is not None and evaluated is not None:
        loss, sizes = summary["held_out"]["loss"], held_out.text_bytes
        bits = loss * evaluated.targets / math.log(2)
        summary["held_out"] |= {
            "protocol": f"packed blocks of {config['block_length']} tokens, documents end to end",
            "targets": evaluated.targets,
            "perplexity": math.exp(loss),
            "bits_per_byte": None if sizes is None else bits / int(sizes.sum()),
        }
    return summary
