"""``memlm build``: text and a model become a datastore."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from memlm.cli.options import ModelOptions, TextOptions, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlm.index.plan import IndexConfig


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
    code_size: int = 0
    """Bytes of the code that is kept of each key instead of it (product codes, as in an index \
of type ivfpq); 0 keeps whole keys."""
    rotate: bool = False
    """With --code-size: rotate keys before they are coded (OPQ)."""
    lists: int = 4096
    """With --code-size: inverted lists; fewer for small stores."""
    nprobe: int = 32
    """With --code-size: lists visited per query."""
    train_size: int = 1_000_000
    """With --code-size: keys the codes are trained on, at most."""
    plan: bool = False
    """Only say how many entries and bytes the store would have."""
    workers: int = 1
    """Processes that share the work; the store's bytes do not depend on it."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Build or continue the store."""
        from memlm.extract.build import build_datastore
        from memlm.extract.config import ExtractionConfig

        model, tokenizer = self.load()
        corpus, windows = self.corpus(tokenizer), self.windows(model)
        if self.plan:
            text, value = self._planned(model, int(windows.table(corpus).targets.sum()))
            show(value, text, as_json=self.json)
            return 0
        store = build_datastore(
            model,
            tokenizer,
            corpus,
            self.out,
            windows=windows,
            codes=self._codes(),
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

    def _codes(self) -> "IndexConfig | None":
        """What codes are kept; None for whole keys."""
        from memlm.index.plan import IndexConfig

        if not self.code_size:
            return None
        return IndexConfig(
            type="opq" if self.rotate else "ivfpq",
            metric=self.metric,
            lists=self.lists,
            code_size=self.code_size,
            nprobe=self.nprobe,
            train_size=self.train_size,
        )

    def _planned(self, model: "PreTrainedModel", entries: int) -> tuple[str, dict[str, Any]]:
        """What would be written, in words and numbers."""
        from memlm.extract.build import key_dim
        from memlm.extract.coding import plan_codes
        from memlm.models.taps import find_tap
        from memlm.store.residency import plan_store

        dim = key_dim(model, find_tap(model, self.tap))
        codes = self._codes()
        if codes is not None:
            plan = plan_codes(entries, dim, codes)
            return plan.text, {"entries": entries, "dim": dim, "bytes": plan.bytes}
        width = 4 if self.dtype == "float32" else 2
        size = plan_store(entries, dim, width)
        text = f"store of {entries:,} entries of {dim} dimensions: {size / 1e6:,.1f} MB"
        return text, {"entries": entries, "dim": dim, "bytes": size}
