"""What flows through the house: candidates, target partials, banks, and the two protocols.

A memory answers a query with scored candidates; candidates merge under a log-sum-exp. Scores are
natural-log, unnormalised, higher is better. A masked candidate has ``valid = False``; its score,
token and id are then meaningless and never read.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Candidates(NamedTuple):
    """Scored tokens, the answer of a token memory to a batch of queries.

    Attributes:
        scores: ``(queries, k)`` floating point, natural-log, temperature already applied.
        tokens: ``(queries, k)`` int64, the token each candidate proposes. May repeat.
        ids: ``(queries, k)`` int64, the entry of the store behind each candidate.
        valid: ``(queries, k)`` bool, False where there is no candidate.
    """

    scores: Tensor
    tokens: Tensor
    ids: Tensor
    valid: Tensor


class TargetPartial(NamedTuple):
    """What one memory says about a known token: enough to score it, no vocabulary row.

    The model's own head is one of them: ``lse`` of its logits and the target's logit.

    Attributes:
        lse: ``(queries,)`` log of the total unnormalised mass, -inf where the memory is empty.
        target_lse: ``(queries,)`` log of the mass on the target, -inf where it is no candidate.
    """

    lse: Tensor
    target_lse: Tensor


class Bank(NamedTuple):
    """A dense set of keys held in tensors, with what is needed to say who may see them.

    Attributes:
        keys: ``(entries, dim)``.
        tokens: ``(entries,)`` int64, the token that followed each key.
        stream: ``(entries,)`` int64, keys of one stream form one text.
        document: ``(entries,)`` int64, the document inside the stream.
        position: ``(entries,)`` int64, the place in the stream, increasing with time.
    """

    keys: Tensor
    tokens: Tensor
    stream: Tensor
    document: Tensor
    position: Tensor


class SearchResult(NamedTuple):
    """What an index found.

    Attributes:
        scores: ``(queries, k)`` float32, higher is nearer: minus the *squared* distance for "l2",
            the dot product for "ip", the cosine for "cosine". Descending, ties by lower id.
        ids: ``(queries, k)`` int64, -1 (and score -inf) where fewer than k were found.
    """

    scores: Tensor
    ids: Tensor


@runtime_checkable
class Index(Protocol):
    """Nearest keys of a store. Implementations: exact torch, FAISS."""

    metric: str

    def __len__(self) -> int:
        """How many keys are indexed."""
        ...

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The k nearest keys of every query; ``queries`` is ``(queries, dim)``, any float dtype."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind, settings and measured recall, as plain JSON values, to print with results."""
        ...

    def save(self, directory: Path) -> None:
        """Write the index so that it can be loaded beside its store."""
        ...


@runtime_checkable
class TokenMemory(Protocol):
    """A memory at the output site: hidden state in, scored next tokens out.

    State is explicit: every method takes it and returns the next one. A memory without state has
    ``None``. Rows are sequences of a batch; ``valid`` marks real (not padding) positions.
    """

    def init_state(self, rows: int) -> Any:
        """The state before anything was read, for ``rows`` sequences; None if there is none."""
        ...

    def read(self, query: Tensor, state: Any) -> tuple[Candidates, Any]:
        """Candidates for the next token of every row.

        Args:
            query: ``(rows, dim)`` hidden states at one position of every sequence. A memory
                without state accepts any number of rows, so whole windows may be flattened.
            state: from ``init_state`` or an earlier call.
        """
        ...

    def score(self, query: Tensor, targets: Tensor, state: Any) -> tuple[TargetPartial, Any]:
        """What the memory says about known next tokens, without vocabulary rows.

        Args:
            query: ``(rows, dim)``, as in ``read``.
            targets: ``(rows,)`` int64 the true next tokens.
            state: as in ``read``.
        """
        ...

    def observe(self, tokens: Tensor, keys: Tensor, state: Any, valid: Tensor | None = None) -> Any:
        """Tell the memory which tokens really came, before ``read`` at their positions.

        Args:
            tokens: ``(rows, time)`` int64 input tokens; ``tokens[:, 0]`` is what followed the
                position read last.
            keys: ``(rows, time, dim)`` hidden states at those tokens.
            state: as in ``read``.
            valid: ``(rows, time)`` bool, False for padding: such rows stay as they are, and so
                they do in the ``read`` that follows. None: all real. ``crop`` counts padding too.
        """
        ...

    def select_rows(self, state: Any, index: Tensor) -> Any:
        """The state of the rows ``index`` ``(rows,)``: beam search reorders and copies rows."""
        ...

    def crop(self, state: Any, length: int) -> Any:
        """The state after only the first ``length`` positions (assisted decoding takes back)."""
        ...

    def stats(self, state: Any) -> dict[str, Any]:
        """Figures to print: entries, searches, and whether the memory was off."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind, settings, store fingerprint and index recall as plain JSON values."""
        ...
