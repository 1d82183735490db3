"""Options that take a part of a text: some documents, cut to a length, some of their tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from memlm.data.tokens import TokenCorpus


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """Which part of the text; --limit counts documents from the first one that is taken."""

    start_document: int = 0
    """Leave out so many documents at the beginning."""
    document_tokens: int | None = None
    """Tokens kept of each document."""
    truncation_side: Literal["left", "right", "center"] | None = None
    """What is cut off: of documents longer than --document-tokens (default: right), and, with \
several lengths, by the method truncation (left, the default, or center)."""
    start_token: int = 0
    """Leave out so many tokens at the beginning of what is left."""
    tokens: int | None = None
    """Tokens of text to take."""

    def is_part(self) -> bool:
        """Whether anything is left out, beyond --limit."""
        return bool(self.start_document or self.document_tokens or self.start_token or self.tokens)

    def part(self, corpus: "TokenCorpus") -> "TokenCorpus":
        """What was asked for of a corpus."""
        from memlm.data.slices import slice_corpus

        return slice_corpus(
            corpus,
            start=self.start_document,
            length=self.document_tokens,
            side=self.truncation_side or "right",
            first=self.start_token,
            tokens=self.tokens,
        )
