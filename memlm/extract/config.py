"""The settings of an extraction: which hidden states are kept, and how."""

from dataclasses import dataclass
from typing import Literal

from memlm.core.config import Config, check

KeyType = Literal["auto", "float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class ExtractionConfig(Config):
    """How keys are read and written.

    Attributes:
        tap: which hidden state is the key: "ffn_input" (the papers'), "ffn_output", "final", or
            "auto" (ffn_input where the model family is known, else final).
        dtype: of the stored keys; "auto" is bfloat16 for a bfloat16 model, else float16.
        metric: distance the store is meant for: "l2" (the papers'), "ip" or "cosine".
        batch_tokens: padded tokens in one forward pass.
        shard_entries: most entries of one shard file; what a killed worker loses at most.
        threads: CPU threads of a forward pass; None: what torch is set to. Part of the store's
            identity, because the low bits of a matrix product depend on it.
    """

    tap: str = "auto"
    dtype: KeyType = "auto"
    metric: Literal["l2", "ip", "cosine"] = "l2"
    batch_tokens: int = 8192
    shard_entries: int = 65536
    threads: int | None = None

    def __post_init__(self):
        check(self.batch_tokens >= 1, f"batch_tokens must be at least 1, got {self.batch_tokens}")
        check(
            self.shard_entries >= 1, f"shard_entries must be at least 1, got {self.shard_entries}"
        )
        check(
            self.threads is None or self.threads >= 1,
            f"threads must be at least 1, got {self.threads}",
        )
