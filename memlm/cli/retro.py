"""``memlm retro STAGE``: from a folder of text to a table of neighbours, stage by stage."""

import dataclasses
import os
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from memlm.cli.options import load_model, load_tokenizer, show
from memlm.cli.retriever import RetrieverOptions
from memlm.core.errors import InputError

Stage = Literal[
    "chunk", "append", "delete", "embed", "index", "neighbours", "inspect", "evaluate", "verify"
]


def _reprocess() -> bool:
    """Whether the environment asks to begin again, as retro-pytorch lets it."""
    return os.environ.get("REPROCESS", "").lower() in ("1", "t", "true")


@dataclass(frozen=True, kw_only=True)
class Retro(RetrieverOptions):
    """Make RETRO's database: chunk text, embed and index the chunks, look up neighbours.

    Every stage can be interrupted and continues when run again; one that is done says so.
    """

    stage: Annotated[Stage, Positional, arg(metavar="STAGE")]
    """chunk, append, delete: make and edit the database; embed, index: only for dense retrieval; \
neighbours: look up every chunk; inspect: show some; evaluate: a model with and without them; \
verify: compare checksums."""
    database: Annotated[str, Positional, arg(metavar="DATABASE")]
    """Directory of the database."""
    text: str | None = None
    """chunk, append: folder, text file or .jsonl file. neighbours, inspect, evaluate: another \
chunk database, whose chunks are looked up in this one (default: the database itself)."""
    field: str = "text"
    """chunk, append: field of a .jsonl line that holds the text."""
    separator: str | None = None
    """chunk, append: cut a text file into documents at this string."""
    limit: int | None = None
    """chunk, append: read only so many documents."""
    tokenizer: str | None = None
    """Folder or Hub id of the model's tokenizer; the same for every stage that needs it."""
    chunk_size: int = 64
    """chunk: tokens per chunk."""
    names: tuple[str, ...] = ()
    """delete: names of documents."""
    batch_size: int = 64
    """embed, neighbours: chunks at once."""
    index_type: Literal["auto", "ivfpq", "opq", "fastscan", "ivf", "hnsw", "flat", "exact"] = "auto"
    """index: auto is exact for small databases, else as `memlm index` chooses."""
    memory: float | None = None
    """index: gigabytes it may take; needs --index-type auto."""
    k: int = 2
    """neighbours, evaluate: of each chunk."""
    near_duplicates: float | None = None
    """neighbours: leave out those that hold this share of a chunk's 8-token sequences, e.g. 0.8."""
    chunks: tuple[int, ...] = (0,)
    """inspect: numbers of chunks."""
    html: str | None = None
    """inspect: write a page here instead of printing."""
    model: str | None = None
    """evaluate: folder of a model that reads neighbours."""
    chunks_per_sequence: int = 8
    """evaluate: chunks that are read at once."""
    plot: str | None = None
    """evaluate: draw bits per byte against the overlap of chunks with their neighbours."""
    device: str = "auto"
    """Where the encoder or the model runs."""
    plan: bool = False
    """chunk, embed, index, neighbours: only say what it would take."""
    rebuild: bool = dataclasses.field(default_factory=_reprocess)
    """Forget what is there and begin again; so does the environment variable REPROCESS=1."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Do one stage."""
        return getattr(self, f"_{self.stage}")()

    def _chunk(self) -> int:
        from memlm.retrieval.build import build_chunks, plan_chunks
        from memlm.retrieval.chunks import ChunkConfig

        config = ChunkConfig(chunk_size=self.chunk_size)
        tokenizer = self._tokenizer()
        if self._planned(plan_chunks(self._documents(), tokenizer, config)):
            return 0
        database = build_chunks(
            self._documents(), tokenizer, self.database, config, rebuild=self.rebuild
        )
        return self._tell(database)

    def _append(self) -> int:
        from memlm.retrieval.build import append_documents

        return self._tell(append_documents(self.database, self._documents(), self._tokenizer()))

    def _delete(self) -> int:
        from memlm.retrieval.build import delete_documents

        if not self.names:
            raise InputError("delete needs names of documents, got none; give --names")
        return self._tell(delete_documents(self.database, self.names))

    def _embed(self) -> int:
        from memlm.retrieval.embeddings import embed_chunks, plan_embeddings

        database = self._opened()
        encoder = self.load_encoder(self._tokenizer(), self.device)
        plan = plan_embeddings(database, encoder, batch_size=self.batch_size)
        if self._planned(plan):
            return 0
        made = embed_chunks(database, encoder, batch_size=self.batch_size, rebuild=self.rebuild)
        described = {"chunks": len(made), "dim": made.dim, "fingerprint": made.fingerprint}
        text = f"{made.path}: {len(made):,} embeddings of {made.dim} dimensions"
        show(described, text, as_json=self.json)
        return 0

    def _index(self) -> int:
        from memlm.index.plan import IndexConfig, plan_index
        from memlm.retrieval.embeddings import DIRECTORY, Embeddings
        from memlm.retrieval.index import index_chunks

        database = self._opened()
        embeddings = Embeddings.open(database.path / DIRECTORY, database)
        config = IndexConfig(
            type=self.index_type,
            memory=None if self.memory is None else int(self.memory * 1e9),
            recall_k=10,
        )
        plan = plan_index(len(embeddings), embeddings.dim, config)
        if self.plan:
            show(asdict(plan), "\n".join((plan.text, *plan.warnings)), as_json=self.json)
            return 0
        if not self.json:
            show({}, plan.text, as_json=False)
        described = index_chunks(database, config, rebuild=self.rebuild).describe()
        text = f"{database.path / 'index'}: {described.get('factory') or 'exact search'}"
        recall = described.get("recall")
        if recall and described["engine"] == "faiss":
            text += f", recall@{recall['k']} {recall['value']:.3f} ({recall['source']})"
        show(described, text, as_json=self.json)
        return 0

    def _neighbours(self) -> int:
        from memlm.retrieval.neighbours import build_neighbours, plan_neighbours

        database = self._opened()
        text = self._looked_up(database)
        tokenizer = None if self.retriever == "bm25" else self._tokenizer()
        retriever = self.retriever_of(database, tokenizer, self.device)
        if self._planned(plan_neighbours(text, retriever, k=self.k)):
            return 0
        table = build_neighbours(
            text,
            retriever,
            k=self.k,
            near_duplicates=self.near_duplicates,
            batch_size=self.batch_size,
            rebuild=self.rebuild,
        )
        described = table.describe()
        line = (
            f"{table.path}: {len(table):,} chunks with {table.k} neighbours each "
            f"({described['empty']:,} places empty)"
        )
        show(described, line, as_json=self.json)
        return 0

    def _inspect(self) -> int:
        from memlm.retrieval.inspect import as_text, inspect_chunk, write_html
        from memlm.retrieval.neighbours import DIRECTORY, NeighbourTable

        database, tokenizer = self._opened(), self._tokenizer()
        text = self._looked_up(database)
        table = NeighbourTable.open(text.path / DIRECTORY, text, database)
        seen = [inspect_chunk(text, table, database, tokenizer, chunk) for chunk in self.chunks]
        if self.html is not None:
            show({}, str(write_html(seen, self.html)), as_json=False)
        elif self.json:
            rows = [
                {**one._asdict(), "passages": [row._asdict() for row in one.passages]}
                for one in seen
            ]
            show({"chunks": rows}, None, as_json=True)
        else:
            sys.stdout.write("\n\n".join(as_text(one) for one in seen) + "\n")
        return 0

    def _evaluate(self) -> int:
        from memlm.data.fingerprint import tokenizer_hash
        from memlm.evaluation.leakage import leakage, leakage_table, plot_leakage
        from memlm.evaluation.retro import compare_retrieval, table
        from memlm.retrieval.chunks import ChunkDatabase
        from memlm.retrieval.dataset import RetroDataset
        from memlm.training.retro import RetroText, check_model

        if self.model is None:
            raise InputError("evaluate needs a model that reads neighbours; give --model")
        tokenizer, model = load_tokenizer(self.model), load_model(self.model, self.device)
        database = ChunkDatabase.open(self.database, tokenizer_hash=tokenizer_hash(tokenizer))
        check_model(model, database, tokenizer)
        source = RetroText.open(self.text or self.database, database if self.text else None)
        data = RetroDataset(*source, chunks_per_sequence=self.chunks_per_sequence, k=self.k)
        figures = compare_retrieval(model, data)
        rows = leakage(figures, data, k=self.k)
        text = f"{table(figures)}\n\n{leakage_table(rows)}"
        if self.plot is not None:
            text += f"\n{plot_leakage(rows, self.plot)}"
        overlap = [
            {"alpha": row.alpha, "share": row.share, **row.bits_per_byte}
            for row in rows
            if row.share
        ]
        summaries = {mode: one.summary() for mode, one in figures.items()}
        show({"retrieval": summaries, "overlap": overlap}, text, as_json=self.json)
        return 0

    def _verify(self) -> int:
        from memlm.retrieval.verify import verify_database

        problems = verify_database(self._opened())
        lines = [*(f"PROBLEM: {problem}" for problem in problems)]
        lines.append(f"{self.database}: {'damaged' if problems else 'sound'}")
        show({"problems": problems}, "\n".join(lines), as_json=self.json)
        return 1 if problems else 0

    def _documents(self):
        from memlm.data.documents import read_documents

        if self.text is None:
            raise InputError(f"{self.stage} needs text, got none; give --text")
        return read_documents(
            self.text, text_field=self.field, separator=self.separator, limit=self.limit
        )

    def _tokenizer(self):
        if self.tokenizer is None:
            raise InputError(
                f"{self.stage} needs the tokenizer of the model, got none; give --tokenizer"
            )
        return load_tokenizer(self.tokenizer)

    def _opened(self):
        from memlm.retrieval.chunks import ChunkDatabase

        return ChunkDatabase.open(self.database)

    def _looked_up(self, database):
        from memlm.retrieval.chunks import ChunkDatabase

        return database if self.text is None else ChunkDatabase.open(self.text)

    def _planned(self, plan: Any) -> bool:
        """Print a plan; whether that is all that was asked for."""
        if self.plan or not self.json:
            show(plan._asdict(), plan.text, as_json=self.json)
        return self.plan

    def _tell(self, database: Any) -> int:
        described = database.describe()
        text = (
            f"{database.path}: {described['documents'] - described['deleted']:,} documents, "
            f"{described['tokens']:,} tokens, {described['chunks']:,} chunks of "
            f"{described['chunk_size']}"
        )
        show(described, text, as_json=self.json)
        return 0
