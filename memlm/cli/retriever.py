"""Options of verbs that look chunks up: with which retriever, and in which database."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from memlm.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.retrieval.chunks import ChunkDatabase
    from memlm.retrieval.embeddings import ChunkEncoder
    from memlm.retrieval.retrievers import Retriever


@dataclass(frozen=True, kw_only=True)
class RetrieverOptions:
    """How similar chunks are found."""

    retriever: Literal["bm25", "dense", "reranked"] = "bm25"
    """How similar chunks are found: bm25 needs nothing; dense needs `memlm retro embed`; reranked \
puts what dense finds in the order of bm25."""
    encoder: str | None = None
    """Folder or Hub id of the text encoder of dense and reranked."""
    pooling: Literal["mean", "cls", "sentence"] = "mean"
    """How the encoder's states become one vector; sentence: as sentence-transformers does."""

    def load_encoder(self, tokenizer: "PreTrainedTokenizerBase", device: str) -> "ChunkEncoder":
        """The text encoder, for chunks of a tokenizer.

        Raises:
            InputError: if there is none, or it cannot be loaded.
        """
        from memlm.methods.retro import load_encoder

        if self.encoder is None:
            raise InputError("embeddings need the text encoder that makes them; give --encoder")
        return load_encoder(self.encoder, tokenizer, pooling=self.pooling, device=device)

    def retriever_of(
        self, database: "ChunkDatabase", tokenizer: "PreTrainedTokenizerBase | None", device: str
    ) -> "Retriever":
        """The retriever of a database; ``tokenizer`` is not needed for bm25.

        Raises:
            InputError: if there is no encoder, or it cannot be loaded.
            StoreError: if embeddings are missing.
            FingerprintError: if they were made by another encoder.
        """
        from memlm.methods.retro import make_retriever

        encoder = None
        if self.retriever != "bm25" and tokenizer is not None:
            encoder = self.load_encoder(tokenizer, device)
        return make_retriever(database, self.retriever, encoder)


@dataclass(frozen=True, kw_only=True)
class DatabaseOptions(RetrieverOptions):
    """In which database a model looks up its chunks while it writes."""

    database: str | None = None
    """RETRO: chunk database (`memlm retro chunk`) in which chunks are looked up as they end."""
    neighbours: int = 2
    """RETRO: neighbours that are read of each chunk."""
    align: Literal["left", "right"] = "left"
    """RETRO: left counts chunks from the first token, so a PROMPT shorter than a chunk retrieves \
nothing; right lets a chunk end with PROMPT."""
    retrieval_step: int | None = None
    """RETRO: tokens between look-ups (default: a chunk)."""

    def check_database(self) -> None:
        """Raise InputError if it is said how to look up, and not where."""
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(DatabaseOptions)
            if getattr(self, field.name) != field.default
        ]
        if self.database is None and given:
            raise InputError(
                f"{', '.join(given)} says how chunks are looked up; give --database too"
            )

    def lookup(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", device: str
    ) -> dict[str, Any]:
        """Arguments of ``generate``; none without a database.

        Raises:
            InputError: if the model reads no neighbours, or chunks of another size.
            FingerprintError: if the database is of another tokenizer.
        """
        from memlm.data.fingerprint import tokenizer_hash
        from memlm.retrieval.chunks import ChunkDatabase
        from memlm.retrieval.lookup import ChunkLookup
        from memlm.training.retro import check_model

        if self.database is None:
            return {}
        database = ChunkDatabase.open(self.database, tokenizer_hash=tokenizer_hash(tokenizer))
        check_model(model, database, tokenizer)
        found = self.retriever_of(database, tokenizer, device)
        return {
            "retriever": ChunkLookup(found, k=self.neighbours),
            "align": self.align,
            "retrieval_step": self.retrieval_step,
        }
