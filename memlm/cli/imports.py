"""``memlm import``: what others wrote becomes a model folder or a datastore; ``memlm push``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from memlm.cli.options import show
from memlm.core.config import check

Kind = Literal["auto", "fairseq-lm", "fairseq-encoder", "datastore"]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a model folder of a fairseq model, or a datastore of raw key and value files.

    Nothing in a file is executed; every tensor of a checkpoint is accounted for. Addresses are
    fetched, continued where they were cut, and compared with --sha256.
    """

    path: Annotated[str, Positional, arg(metavar="PATH")]
    """Checkpoint (.pt), file of keys (..._keys.npy), or what comes before _keys.npy: a path or an \
address; the name of a published artefact; or hf://USER/NAME, a store on the Hub."""
    out: str
    """Folder to write."""
    kind: Kind = "auto"
    """What PATH is; "auto": by its name. An encoder (TUPE, RoBERTa) must be said to be one."""
    dictionary: str | None = None
    """The dict.txt of the training; fairseq-lm: default: the one beside the checkpoint; \
fairseq-encoder: given with --codes, a tokenizer is made of the two."""
    codes: str | None = None
    """fairseq-encoder: codes of fastBPE that its text was split with."""
    scheme: str | None = None
    """fairseq-encoder: position scheme that it must be of; default: what it is."""
    heads: int | None = None
    """fairseq-encoder: attention heads, where the checkpoint does not say it."""
    classifier: str | None = None
    """fairseq-encoder: classification head to take instead of the one for masked tokens."""
    index: str | None = None
    """datastore: FAISS file of the same keys, to come along."""
    members: str | None = None
    """datastore: pickled clusters of the same entries, to come along."""
    entries: int | None = None
    """datastore: rows, where names and sizes do not say it."""
    dim: int | None = None
    """datastore: width of a key, likewise."""
    dtype: Literal["auto", "float16", "float32"] = "auto"
    """datastore: number format of the keys, likewise."""
    metric: Literal["l2", "ip", "cosine"] = "l2"
    """datastore: distance the keys are meant to be compared by."""
    sha256: str | None = None
    """Of the file at the address PATH."""
    downloads: str | None = None
    """Folder for what is fetched (default: memlm/downloads in the user's cache)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Fetch, read, convert, write, and say what became of it."""
        from memlm.importers.hub import fetch_store, hub_name

        if (named := hub_name(self.path)) is not None:
            store = fetch_store(named[0], revision=named[1], out=self.out)
            show(store.describe(), f"{self.out}: {store}", as_json=self.json)
            return 0
        return self._located()._convert()

    def _located(self) -> "Import":
        """The same import, with everything on this machine."""
        from memlm.importers.artefacts import find_artefact
        from memlm.importers.fetching import locate

        artefact = None if Path(self.path).exists() else find_artefact(self.path)
        here = {
            name: None if source is None else str(locate(source, self.downloads))
            for name, source in (
                ("dictionary", self.dictionary),
                ("index", self.index),
                ("members", self.members),
            )
        }
        kind = artefact.kind if artefact is not None and self.kind == "auto" else self.kind
        path = str(locate(self.path, self.downloads, sha256=self.sha256))
        return replace(self, path=path, kind=kind, **here)

    def _convert(self) -> int:
        kind = self._kind()
        if kind == "fairseq-lm":
            value, text = self._model()
        elif kind == "fairseq-encoder":
            value, text = self._encoder()
        else:
            value, text = self._datastore()
        show({"out": self.out, **value}, f"{self.out}: {text}", as_json=self.json)
        return 0

    def _kind(self) -> str:
        """What the path is."""
        if self.kind != "auto":
            return self.kind
        path = Path(self.path)
        if path.suffix == ".pt":
            return "fairseq-lm"
        raw = path if path.name.endswith("keys.npy") else path.with_name(f"{path.name}_keys.npy")
        check(
            raw.is_file() or (path.is_dir() and any(path.glob("*keys.npy"))),
            f"what to import must be a checkpoint (.pt) or raw keys (..._keys.npy), got {path}; "
            "if it is one of them under another name, say which with --kind",
        )
        return "datastore"

    def _model(self) -> tuple[dict[str, Any], str]:
        from memlm.importers.adaptive import import_model

        report = import_model(self.path, self.out, dictionary=self.dictionary)
        value = {"renamed": report.renamed, "tied": report.tied, "ignored": report.ignored}
        return value, f"a language model; {report}"

    def _encoder(self) -> tuple[dict[str, Any], str]:
        from memlm.importers.tupe import read_tupe_checkpoint

        check(
            (self.dictionary is None) == (self.codes is None),
            "a tokenizer needs both --dictionary and --codes, got one of them; give both or none",
        )
        found = read_tupe_checkpoint(self.path, scheme=self.scheme, heads=self.heads)
        model = found.masked_lm() if self.classifier is None else found.classifier(self.classifier)
        model.save_pretrained(self.out)
        scheme = found.config.position_scheme.name
        value = {"scheme": scheme, "renamed": dict(found.report), "heads": list(found.heads)}
        words = "no tokenizer: give --dictionary (dict.txt) and --codes (bpe-code) to have one"
        if self.dictionary is not None and self.codes is not None:
            found.tokenizer(self.dictionary, self.codes).save_pretrained(self.out)
            words = f"a tokenizer of {found.config.vocab_size:,} words"
        return value, f"an encoder of scheme {scheme}, {words}\n{found.describe()}"

    def _datastore(self) -> tuple[dict[str, Any], str]:
        from memlm.importers.datastore import import_datastore

        store = import_datastore(
            self.path,
            self.out,
            index=self.index,
            members=self.members,
            entries=self.entries,
            dim=self.dim,
            dtype=None if self.dtype == "auto" else self.dtype,
            metric=self.metric,
        )
        return {"entries": len(store), "dim": store.dim}, (
            f"a datastore of {len(store):,} entries, {store.dim} dimensions"
        )


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a datastore, with its index and clusters, to a dataset repository of the Hub."""

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore."""
    name: Annotated[str, Positional, arg(metavar="USER/NAME")]
    """Repository; created if it is not there."""
    public: bool = False
    """A new repository can be read by everyone (default: by you alone)."""
    revision: str | None = None
    """Branch (default: the main one)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Check and upload."""
        from memlm.importers.hub import push_store
        from memlm.store.reader import Datastore

        store = Datastore.open(self.store)
        commit = push_store(store, self.name, private=not self.public, revision=self.revision)
        text = f"{commit}\nnext: memlm import hf://{self.name} --out STORE"
        show({"repository": self.name, "commit": commit}, text, as_json=self.json)
        return 0
