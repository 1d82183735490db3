"""Pre-train an encoder on masked tokens (Devlin et al. 2019), on the training loop of every method.

Sentences are packed whole into blocks, ``<s>`` in front (`memlm.data.sentence_blocks`). Example i
belongs to epoch i // blocks; an epoch has its own order and its own masks, both functions of the
seed, the epoch and the block alone, so a resumed run goes on with the very inputs that come next.
Held-out blocks keep their masks, so their losses can be compared.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from memlm.core.config import check
from memlm.core.randomness import random_state_kept
from memlm.data.masking import Masker, collate_masked
from memlm.data.sentence_blocks import cut_blocks
from memlm.models.fingerprint import tokenizer_hash
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForMaskedLM
from memlm.training.loop import on_cpu, train
from memlm.training.masked_lm_config import MaskedLMConfig
from memlm.training.model_loss import ModelLoss
from memlm.training.order import InTurn

_HELD_OUT_EPOCH = 0  # training epochs count from 1


class Sentences(NamedTuple):
    """Tokenised sentences, one after another; each ends with the end token.

    Attributes:
        tokens: ``(n,)`` int32.
        lengths: ``(sentences,)`` int64.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]


def tokenize_sentences(sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Sentences:
    """Tokenise sentences and end each with ``</s>``.

    Raises:
        InputError: if there are none.
    """
    rows = [
        np.array([*tokenizer.encode(one, add_special_tokens=False), tokenizer.eos_token_id], "i4")
        for one in sentences
    ]
    check(bool(rows), "there must be sentences to train on, got none")
    return Sentences(np.concatenate(rows), np.array([len(row) for row in rows], np.int64))


class MaskedBlocks(Dataset):
    """Blocks of whole sentences, masked anew in every epoch.

    An example is ``{"input_ids", "labels"}``, each ``(time,)`` int64, ``time <= length``.

    Args:
        sentences: to pack; those longer than a block are left out.
        length: tokens of a block, ``<s>`` included.
        masker: masks them.
        begin: id of ``<s>``.
        seed: of order and masks.
        fixed: in order and with the same masks always (held-out text).
    """

    def __init__(
        self,
        sentences: Sentences,
        length: int,
        masker: Masker,
        *,
        begin: int,
        seed: int,
        fixed: bool = False,
    ):
        slices = cut_blocks(sentences.lengths, length - 1).slices
        self.slices = slices[np.diff(slices, axis=1)[:, 0] < length]
        check(
            len(self.slices) > 0,
            f"some sentence must fit into a block of {length} tokens, but none does; raise "
            "block_length",
        )
        self.sentences, self.masker, self.begin = sentences, masker, begin
        self.seed, self.fixed = seed, fixed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(item, len(self.slices))
        if self.fixed:
            if epoch:
                raise IndexError(item)
            number, epoch = place, _HELD_OUT_EPOCH
        else:
            number, epoch = int(self._shuffled(epoch)[place]), epoch + 1
        first, end = self.slices[number]
        tokens = np.concatenate([[self.begin], self.sentences.tokens[first:end]])
        masked = self.masker(tokens, seed=self.seed, epoch=epoch, number=number)
        return {
            "input_ids": torch.from_numpy(masked.tokens),
            "labels": torch.from_numpy(masked.labels),
        }

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._order = epoch, draw.permutation(len(self.slices))
        return self._order[1]


def train_masked_lm(
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerBase,
    config: MaskedLMConfig,
    out: str | Path,
    *,
    held_out: Sentences | None = None,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TupeForMaskedLM:
    """Train a new encoder and leave it, with its tokenizer and a summary, in a folder.

    Args:
        sentences: text to learn from.
        tokenizer: it was made with; has begin, end, padding and mask tokens.
        config: everything else.
        out: folder of the run; created.
        held_out: text to report the loss on.
        resume: continue from the last checkpoint in ``out``.
        quiet: no progress bar.
        callbacks: further callbacks of the Trainer.

    Returns:
        The trained model in evaluation mode.

    Raises:
        InputError: if the tokenizer lacks a token, nothing fits into a block, or ``out`` holds a
            run and ``resume`` is not set.
        FingerprintError: if the run to resume is another one.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"):
        check(
            getattr(tokenizer, name) is not None,
            f"the tokenizer must have a {name.removesuffix('_id')}; train one with "
            "memlm.training.sentence_tokenizer",
        )
    size, mask = len(tokenizer), _token(tokenizer.mask_token_id)
    ends = _ends_word(tokenizer) if config.whole_words else None
    masker = Masker(size, mask, config.masking(), ends_word=ends)
    begin, pad = _token(tokenizer.bos_token_id), _token(tokenizer.pad_token_id)
    length, seed = config.block_length, config.seed
    examples = MaskedBlocks(sentences, length, masker, begin=begin, seed=seed)
    evaluated = None
    if held_out is not None:
        evaluated = MaskedBlocks(held_out, length, masker, begin=begin, seed=seed, fixed=True)
    with random_state_kept():
        torch.manual_seed(config.seed)
        model = TupeForMaskedLM(model_config(config, tokenizer))
    trained = train(
        ModelLoss(model),
        examples,
        InTurn(config.rows, PartialState(cpu=on_cpu(config)).num_processes),
        config,
        out,
        collate=lambda samples: collate_masked(samples, pad_token=pad),
        identity={
            "text_hash": xxhash.xxh3_128_hexdigest(
                sentences.tokens.tobytes() + sentences.lengths.tobytes()
            ),
            "tokenizer_hash": tokenizer_hash(tokenizer),
        },
        held_out=evaluated,  # type: ignore[arg-type]
        save_beside=tokenizer.save_pretrained,
        resume=resume,
        quiet=quiet,
        callbacks=callbacks,
    )
    return trained  # type: ignore[return-value]


def model_config(config: MaskedLMConfig, tokenizer: PreTrainedTokenizerBase) -> TupeConfig:
    """The model of a run."""
    return TupeConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.block_length,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        scheme=config.scheme,
        bos_token_id=_token(tokenizer.bos_token_id),
        pad_token_id=_token(tokenizer.pad_token_id),
        eos_token_id=_token(tokenizer.eos_token_id),
    )


def _ends_word(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Tokens that no piece of the same word follows, as byte-pair codes write them."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    ends = np.array([word in special or word.endswith("</w>") for word in words])
    check(
        bool(ends[len(special) :].any()),
        "whole words must be told by tokens that end in </w>, but this tokenizer has none",
    )
    return ends


def _token(value: Any) -> int:
    return int(value)
