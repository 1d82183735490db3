"""``memlm build``: text and a model become a datastore."""

from dataclasses import dataclass
from typing import Literal

from memlm.cli.options import ModelOptions, TextOptions, show


@dataclass(frozen=True, kw_only=True)
class Build(TextOptions, ModelOptions):
    """Read TEXT with MODEL and keep every (hidden state, next token) pair in a datastore.

    Interrupted builds continue when the same command is run again; several machines that share the
    directory may run it at the same time.
    """

    out: str
    """Directory of the datastore."""
    tap: Literal["auto", "ffn_input", "ffn_output", "final"] = "auto"
    """Hidden state to keep: input of the last feed-forward ("ffn_input", the papers'), output of \
the last block, or the head's input ("final"). "auto": ffn_input where the family is known."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Precision of the stored keys; "auto" is bfloat16 for a bfloat16 model, else float16."""
    metric: Literal["l2", "ip", "cosine"] = "l2"
    """Distance the store is searched by."""
    batch_tokens: int = 8192
    """Tokens per forward pass."""
    shard_entries: int = 65536
    """Entries per shard file, about; a killed worker loses at most one shard."""
    workers: int = 1
    """Processes that share the work; the store's bytes do not depend on it."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Build or continue the store."""
        from memlm.extract.build import build_datastore
        from memlm.extract.config import ExtractionConfig

        model, tokenizer = self.load()
        store = build_datastore(
            model,
            tokenizer,
            self.corpus(tokenizer),
            self.out,
            windows=self.windows(model),
            config=ExtractionConfig(
                tap=self.tap,
                dtype=self.dtype,
                metric=self.metric,
                batch_tokens=self.batch_tokens,
                shard_entries=self.shard_entries,
                threads=self.threads,
            ),
            workers=self.workers,
        )
        size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        value = {
            "store": str(store.path),
            "entries": len(store),
            "dim": store.dim,
            "dtype": store.manifest.identity.dtype,
            "metric": store.metric,
            "tap": store.manifest.identity.tap,
            "bytes": size,
            "fingerprint": store.fingerprint,
        }
        text = (
            f"{store.path}: {len(store):,} entries of {store.dim} dimensions "
            f"({store.manifest.identity.dtype}, tap {value['tap']}), {size / 1e6:,.1f} MB\n"
            f"next: memlm index {store.path}   or   "
            f"memlm evaluate {self.model} TEXT --store {store.path}"
        )
        show(value, text, as_json=self.json)
        return 0
