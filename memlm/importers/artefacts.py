"""What the papers published, and the command that imports it.

Sizes of raw arrays follow from the published counts (entries x width x bytes per number); where a
count is contested, both are said. Addresses and checksums are listed where they are known: whoever
publishes a file may move it.
"""

from typing import NamedTuple

from memlm.core.config import check
from memlm.core.errors import InputError


class Artefact(NamedTuple):
    """Something published.

    Attributes:
        name: for ``memlm import NAME``.
        what: in words.
        where: who publishes it.
        command: that makes it usable here.
        url: of the file; None: not known.
        bytes: of it; None: not known.
        sha256: of it; None: not known.
        kind: as ``memlm import --kind`` names it.
    """

    name: str
    what: str
    where: str
    command: str
    url: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    kind: str = "datastore"


_FAIRSEQ = "https://dl.fbaipublicfiles.com/fairseq/models/lm"
_RETOMATON, _HUB = "the RetoMaton authors", "the Hugging Face Hub, organisation neulab"
_WIKI, _GPT2, _LAW = 103_225_485, 116_988_150, 19_068_709

ARTEFACTS: tuple[Artefact, ...] = (
    Artefact(
        "adaptive-lm-wiki103",
        "Transformer of Baevski and Auli, 247M, WikiText-103",
        "fairseq",
        "memlm import adaptive-lm-wiki103 --out wiki103",
        url=f"{_FAIRSEQ}/adaptive_lm_wiki103.v2.tar.bz2",
        kind="fairseq-lm",
    ),
    Artefact(
        "wt103-checkpoint",
        "the same architecture, the checkpoint of kNN-LM and RetoMaton",
        "the kNN-LM authors",
        "memlm import wt103_checkpoint_best.pt --dictionary dict.txt --out wt103",
        kind="fairseq-lm",
    ),
    Artefact(
        "trime-wiki103-247m",
        "TRIME models of WikiText-103 (247M, 150M) and enwik8",
        "the TRIME authors",
        "memlm import checkpoint_best.pt --dictionary dict.txt --out trime",
        kind="fairseq-lm",
    ),
    Artefact(
        "wt103-keys",
        f"keys of WikiText-103, {_WIKI:,} x 1024 float16 (dstore16_keys.npy)",
        _RETOMATON,
        "memlm import dstore16_keys.npy --dim 1024 --dtype float16 --out stores/wt103",
        bytes=_WIKI * 1024 * 2,
    ),
    Artefact(
        "wt103-values",
        "their values, int64 (dstore16_vals.npy); fetched with the keys",
        _RETOMATON,
        "(beside the keys)",
        bytes=_WIKI * 8,
    ),
    Artefact(
        "wt103-index",
        "FAISS index of these keys, IVF4096,PQ64 (knn16.index)",
        _RETOMATON,
        "memlm import dstore16_keys.npy --index knn16.index --out stores/wt103",
    ),
    Artefact(
        "wt103-clusters",
        "a million clusters (clusters_s40000000_k1000000_members.pkl); also 500,000, and merged",
        _RETOMATON,
        "memlm import dstore16_keys.npy --members clusters_s40000000_k1000000_members.pkl "
        "--out stores/wt103",
    ),
    Artefact(
        "gpt2-keys",
        f"GPT-2 keys of WikiText-103, {_GPT2:,} x 768 float16 (dstore_gpt2_116988150_768_keys.npy)",
        "the knn-transformers authors",
        "memlm import dstore_gpt2_116988150_768_keys.npy "
        "--members members_gpt2_116988150_768_20000000_500000.pkl --out stores/gpt2",
        bytes=_GPT2 * 768 * 2,
    ),
    Artefact(
        "gpt2-values",
        "their values, int32; fetched with the keys",
        "the knn-transformers authors",
        "(beside the keys)",
        bytes=_GPT2 * 4,
    ),
    Artefact(
        "law-keys",
        f"Law-MT, {_LAW:,} x 1536 float16 (dstore16_finetuned_size19068709_embed1536_fp16); the "
        "other published index says 19,048,862: sizes are taken from the files",
        _RETOMATON,
        "memlm import dstore16_finetuned_size19068709_embed1536_fp16_keys.npy --out stores/law",
        bytes=_LAW * 1536 * 2,
    ),
    *(
        Artefact(
            f"{name}-wikitext103",
            f"{name}, fine-tuned on WikiText-103",
            _HUB,
            f"memlm build neulab/{name}-finetuned-wikitext103 TEXT --out stores/{name}",
            kind="model",
        )
        for name in ("distilgpt2", "gpt2", "gpt2-med", "gpt2-large")
    ),
)


def find_artefact(name: str) -> Artefact | None:
    """The artefact of that name, None if it is none.

    Raises:
        InputError: if the artefact is a model of the Hub, which needs no import.
    """
    artefact = next((one for one in ARTEFACTS if one.name == name), None)
    if artefact is not None and artefact.kind == "model":
        raise InputError(
            f"{name} is a model on the Hub and needs no import; use it by its name: "
            f"{artefact.command}"
        )
    return artefact


def table() -> list[str]:
    """All of them, as lines of Markdown."""
    rows = ["| name | what | published by | bytes | command |", "|---|---|---|---:|---|"]
    for one in ARTEFACTS:
        where = f"[{one.where}]({one.url})" if one.url else one.where
        size = "" if one.bytes is None else f"{one.bytes:,}"
        command = one.command if one.command.startswith("(") else f"`{one.command}`"
        rows.append(f"| {one.name} | {one.what} | {where} | {size} | {command} |")
    check(len(rows) == len(ARTEFACTS) + 2, "there must be one row for each artefact")
    return rows
