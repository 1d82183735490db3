"""Text encoders: chunks of tokens become vectors, by any encoder there is.

    HuggingFaceEncoder     a model of transformers; the masked mean of its last states, or [CLS]
    SentenceEncoder        a model of sentence-transformers, with the pooling it was trained with

The chunks of a language model are in its own tokens. An encoder with a tokenizer of its own gets
their text (`source_tokenizer` decodes it); one that shares the tokenizer gets the tokens, with its
own first token before them.

The published code (retro-pytorch) embeds [CLS] + chunk with BERT and averages all positions but the
first: ``HuggingFaceEncoder(bert, prefix=(101,), skip_first=True)``. There, a chunk that is looked
up while generating also gets [SEP] behind it, which the database does not have; here both are
encoded alike.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.files import fingerprint
from memlm.core.optional import require
from memlm.data.fingerprint import tokenizer_hash
from memlm.models.fingerprint import model_hash
from memlm.models.running import frozen
from memlm.models.trained_length import readable_length

Chunks = Sequence[NDArray[np.integer]]
Pooling = Literal["mean", "cls"]
_EPSILON = 1e-8


def masked_mean(states: Tensor, mask: Tensor, *, skip_first: bool = False) -> Tensor:
    """The mean of the states that the mask keeps; zero where it keeps none.

    Args:
        states: ``(batch, time, dim)``.
        mask: ``(batch, time)``, true where there is a token.
        skip_first: leave out position 0, which holds [CLS] (retro-pytorch).

    Returns:
        ``(batch, dim)``.
    """
    weights = mask.to(states.dtype).clone()
    if skip_first:
        weights[:, 0] = 0
    total = torch.einsum("btd,bt->bd", states, weights)
    return total / (weights.sum(1, keepdim=True) + _EPSILON)


class HuggingFaceEncoder:
    """An encoder of transformers, e.g. ``AutoModel.from_pretrained(...)``.

    Args:
        model: whose output has ``last_hidden_state`` ``(batch, time, dim)``.
        tokenizer: the encoder's own, if chunks are to be given to it as text.
        source_tokenizer: of the chunks; needed with ``tokenizer`` and only there.
        pooling: "mean" over tokens, or "cls", the first position.
        skip_first: leave position 0 out of the mean.
        prefix: ids before every chunk, without ``tokenizer``.
        max_length: tokens of a text that are read, with ``tokenizer``; None: all the model can.

    Raises:
        InputError: if the tokenizers do not come together, or pooling is unknown.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        pooling: Pooling = "mean",
        skip_first: bool = False,
        prefix: Sequence[int] = (),
        max_length: int | None = None,
    ):
        check(pooling in ("mean", "cls"), f"pooling must be 'mean' or 'cls', got {pooling!r}")
        check(
            (tokenizer is None) == (source_tokenizer is None),
            "an encoder that reads text needs its own tokenizer and the one of the chunks, got "
            "one of them; give both or neither",
        )
        check(
            tokenizer is None or not prefix,
            "a prefix of ids is for an encoder that reads the chunks' own tokens, got one beside a "
            "tokenizer; leave it out",
        )
        self.model, self.tokenizer, self.source_tokenizer = model, tokenizer, source_tokenizer
        self.pooling: Pooling = pooling
        self.skip_first, self.prefix = skip_first, tuple(prefix)
        self._fingerprint: str | None = None
        self.max_length = max_length or readable_length(model)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Of what embeddings depend on: weights, tokenizers, pooling."""
        if self._fingerprint is None:
            tokenizers = [
                tokenizer and tokenizer_hash(tokenizer)
                for tokenizer in (self.tokenizer, self.source_tokenizer)
            ]
            self._fingerprint = fingerprint([model_hash(self.model), tokenizers, self.describe()])
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """Settings as plain JSON values."""
        return {
            "encoder": self.model.config.model_type,
            "pooling": self.pooling,
            "skip_first": self.skip_first,
            "prefix": list(self.prefix),
            "max_length": self.max_length,
        }

    def encode(self, chunks: Chunks) -> Tensor:
        """Embed chunks as one batch.

        Args:
            chunks: their tokens.

        Returns:
            ``(chunks, dim)`` float32 on the CPU.
        """
        ids, mask = self._inputs(chunks)
        device = self.model.device
        with frozen(self.model):
            states = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device)
            ).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0].float().cpu()
        return masked_mean(states.float(), mask.to(device), skip_first=self.skip_first).cpu()

    def _inputs(self, chunks: Chunks) -> tuple[Tensor, Tensor]:
        if self.tokenizer is not None and self.source_tokenizer is not None:
            encoded: Any = self.tokenizer(
                decode(self.source_tokenizer, chunks),
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_tensors="pt",
            )
            return encoded["input_ids"], encoded["attention_mask"]
        rows = [[*self.prefix, *(int(token) for token in chunk)] for chunk in chunks]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return ids, mask


class SentenceEncoder:
    """An encoder of sentence-transformers, by name or folder.

    Args:
        name: e.g. ``"sentence-transformers/all-MiniLM-L6-v2"``.
        source_tokenizer: of the chunks.
        device: where it runs; None: as sentence-transformers chooses.

    Raises:
        MissingExtraError: without the package.
    """

    def __init__(
        self, name: str, source_tokenizer: PreTrainedTokenizerBase, *, device: str | None = None
    ):
        package = require("sentence_transformers", extra="dense", purpose=f"embed text with {name}")
        self.model = package.SentenceTransformer(name, device=device)
        self.name, self.source_tokenizer = name, source_tokenizer
        self._fingerprint: str | None = None

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        renamed = getattr(self.model, "get_embedding_dimension", None)  # the newer name
        return int((renamed or self.model.get_sentence_embedding_dimension)())

    @property
    def fingerprint(self) -> str:
        """Of what embeddings depend on: weights and the tokenizer of the chunks."""
        if self._fingerprint is None:
            body = model_hash(self.model[0].auto_model)
            source = tokenizer_hash(self.source_tokenizer)
            self._fingerprint = fingerprint([body, source, str(self.model)])
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """Settings as plain JSON values."""
        return {"encoder": "sentence-transformers", "name": self.name}

    def encode(self, chunks: Chunks) -> Tensor:
        """Embed chunks as one batch, ``(chunks, dim)`` float32 on the CPU."""
        texts = decode(self.source_tokenizer, chunks)
        return (
            self.model.encode(
                texts, convert_to_tensor=True, show_progress_bar=False, batch_size=len(texts)
            )
            .float()
            .cpu()
        )


def decode(tokenizer: PreTrainedTokenizerBase, chunks: Chunks) -> list[str]:
    """The text of chunks, without special tokens."""
    rows = [[int(token) for token in chunk] for chunk in chunks]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
