"""What training with neighbours is worth: RETRO on Wikipedia articles, by retriever.

    python -m benchmarks.bench_retro_training --data DATA --tokens 1500000

One shape for all (1.7 M parameters: width 128, four layers, one layer of encoder, chunks of 32
tokens, two neighbours with their continuations); every training reads the same sequences of the
same articles in the same order, and differs in its neighbours alone (Borgeaud et al. 2022):

    none        no neighbours: an ordinary language model, whose cross-attention is never used
    bm25        chunks that share rare tokens
    dense       nearest by the mean of their states in the model `none`, squared distance
    reranked    the dense search's best 100, in the order of BM25

The training articles are the database; a chunk of them never finds its own article. Test articles
are held out, cut to 6,000 characters each so that no long one decides, and looked up in the same
database. Each model is measured on them with its own neighbours, without, and with those of other
chunks: bits per byte and perplexity, with intervals over articles (paired bootstrap) against the
model `none` and against itself without neighbours. The leakage curve is the loss of chunks whose
longest common run of tokens with their neighbours is at most a share alpha of the chunk.

Database, tables, trainings and figures are kept in ``--work``, so the same command goes on where it
was stopped; ``--report`` only shows what there is.
"""

import argparse
import json
import lzma
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.bench_perplexity import upto
from benchmarks.common import RESULTS, save
from memlm.core.files import read_json, write_json
from memlm.core.threads import torch_threads
from memlm.data.documents import Document
from memlm.evaluation.bootstrap import ratio_interval
from memlm.evaluation.leakage import ALPHAS, LeakageRow, leakage, plot_leakage
from memlm.evaluation.retro import MODES, RetroEvaluation, compare_retrieval, evaluate_retro
from memlm.methods.retro import index_chunks, make_retriever
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.text_encoder import HuggingFaceEncoder
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig, ChunkDatabase
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.embeddings import embed_chunks
from memlm.retrieval.neighbours import NeighbourTable, build_neighbours
from memlm.training.retro import RetroText, train_retro
from memlm.training.retro_config import RetroTrainConfig
from memlm.training.tokenizer import train_tokenizer

ARMS = ("none", "bm25", "dense", "reranked")
VOCABULARY, CHUNK, CHUNKS, K, BATCH = 4096, 32, 8, 2, 1024
LONGEST = 6000  # characters of a measured article


class Run:
    """One experiment in its folder: texts, tables, trainings; made when first asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        # Other numbers are another experiment.
        sizes = (options.tokens, options.database_characters, options.test_characters)
        self.folder = options.work / "-".join(map(str, sizes))

    @cached_property
    def articles(self) -> dict[str, list[Document]]:
        """By split."""
        parts: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
        path = self.options.data / "wikipedia-2018" / "wikipedia.jsonl.xz"
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                parts[record["split"]].append(Document(record["id"], record["text"]))
        return parts

    @cached_property
    def tokenizer(self) -> Any:
        """Trained on the database."""
        kept = self.folder / "tokenizer"
        if not (kept / "tokenizer.json").exists():
            texts = upto(self.articles["train"], self.options.database_characters)
            train_tokenizer(texts, VOCABULARY, exact=False).save_pretrained(kept)
        return AutoTokenizer.from_pretrained(kept)

    @cached_property
    def database(self) -> ChunkDatabase:
        """The training articles."""
        texts = upto(self.articles["train"], self.options.database_characters)
        return self._chunks("database", texts)

    @cached_property
    def test(self) -> ChunkDatabase:
        """The measured articles."""
        short = [Document(name, text[:LONGEST]) for name, text, *_ in self.articles["test"]]
        return self._chunks("test", upto(short, self.options.test_characters))

    def _chunks(self, name: str, documents: list[Document]) -> ChunkDatabase:
        config = ChunkConfig(CHUNK)
        return build_chunks(documents, self.tokenizer, self.folder / name, config, quiet=True)

    def neighbours(self, arm: str) -> tuple[NeighbourTable | None, NeighbourTable | None]:
        """Tables of the training chunks and of the test chunks."""
        if arm == "none":
            return None, None
        encoder = None
        if arm != "bm25":  # the states of the first model that learnt without neighbours
            body = self.train("none", self.options.seeds[0]).model
            encoder = HuggingFaceEncoder(body)
            embed_chunks(self.database, encoder, quiet=True)
            index_chunks(self.database, quiet=True)
        retriever = make_retriever(self.database, cast(Any, arm), encoder)

        def table(name: str, text: ChunkDatabase) -> NeighbourTable:
            return build_neighbours(text, retriever, self.folder / f"{name}-{arm}", k=K, quiet=True)

        return table("train", self.database), table("test", self.test)

    def train(self, arm: str, seed: int) -> RetroForCausalLM:
        """The model of an arm, trained, continued or only loaded."""
        options = self.options
        steps = max(1, options.tokens // BATCH)
        config = RetroTrainConfig(
            block_length=CHUNKS * CHUNK,
            batch_tokens=BATCH,
            cross_attention_layers=(2, 4),
            optimizer="muon",
            learning_rate=3e-3,
            max_steps=steps,
            warmup_steps=min(50, steps // 4),
            save_every=50,
            threads=options.threads,
            seed=seed,
        )
        text = RetroText(self.database, self.neighbours(arm)[0])
        out = self.folder / f"{arm}-{seed}"
        return train_retro(text, self.tokenizer, config, out, resume=True, quiet=True)

    def measure(self, arm: str, seed: int) -> None:
        """Train and evaluate; whatever is there already is left as it is."""
        place = self.folder / f"{arm}-{seed}.json"
        if not place.exists():
            model = self.train(arm, seed)
            data = self.data(arm)
            write_json(place, {mode: kept(one) for mode, one in scores(model, data).items()})

    def data(self, arm: str) -> RetroDataset:
        """The measured articles with the neighbours of an arm."""
        table = self.neighbours(arm)[1]
        return RetroDataset(self.test, table, self.database, chunks_per_sequence=CHUNKS)

    def found(self, arm: str, seed: int) -> dict[str, RetroEvaluation] | None:
        """The evaluations of a finished arm, by mode."""
        place = self.folder / f"{arm}-{seed}.json"
        if not place.exists():
            return None
        return {
            mode: RetroEvaluation(mode, *(np.array(one[name]) for name in COLUMNS))
            for mode, one in read_json(place).items()
        }


COLUMNS = ("chunk_nats", "chunk_tokens", "chunk_bytes")


def kept(one: RetroEvaluation) -> dict[str, Any]:
    return {name: getattr(one, name).tolist() for name in COLUMNS}


def scores(model: PreTrainedModel, data: RetroDataset) -> dict[str, RetroEvaluation]:
    if data.neighbours is None:
        return {"off": evaluate_retro(model, data, mode="off", quiet=True)}
    return compare_retrieval(model, data, quiet=True)


def by_article(text: ChunkDatabase, values: NDArray[Any]) -> list[float]:
    documents = text.document_of(np.arange(len(text)))
    return np.bincount(documents, weights=values, minlength=text.documents).tolist()


def against(text: ChunkDatabase, one: RetroEvaluation, other: RetroEvaluation) -> dict[str, Any]:
    """Bits per byte of one evaluation less those of another, with an interval over articles."""
    sums = [by_article(text, values) for values in (one.chunk_nats, other.chunk_nats)]
    # nats per byte: the logarithm of what the interval calls a ratio of perplexities
    interval = ratio_interval(*sums, cast(Any, by_article(text, one.chunk_bytes)))
    difference = {"bits_per_byte": one.bits_per_byte - other.bits_per_byte}
    if interval is not None:
        difference["interval"] = np.log2([interval.low, interval.high]).tolist()
    return difference


def report(run: Run) -> dict[str, Any]:
    """Everything that is finished, by arm and seed, and the leakage curves of the first seed."""
    text, found = run.test, {}
    for seed in run.options.seeds:
        alone = run.found("none", seed)
        for arm in run.options.arms:
            evaluations = run.found(arm, seed)
            if evaluations is None:
                continue
            summary = read_json(run.folder / f"{arm}-{seed}" / "training.json")
            result: dict[str, Any] = {
                name: summary[name] for name in ("parameters", "tokens", "seconds", "precision")
            }
            for mode, one in evaluations.items():
                result[mode] = one.summary()
                if arm != "none" and alone is not None:
                    result[mode]["against_none"] = against(text, one, alone["off"])
                if mode != "off":
                    result[mode]["against_off"] = against(text, one, evaluations["off"])
            found[f"{arm}, seed {seed}"] = result
    curves = {
        arm: [
            {"alpha": row.alpha, "share": row.share, "bits_per_byte": row.bits_per_byte}
            for row in rows
            if row.share
        ]
        for arm in run.options.arms
        if (rows := curve(run, arm)) is not None
    }
    return {"protocol": protocol(run), "runs": found, "leakage": curves}


def curve(run: Run, arm: str) -> list[LeakageRow] | None:
    """Loss by overlap with an arm's neighbours: its model in all modes, and the model `none`."""
    seed = run.options.seeds[0]
    evaluations, alone = run.found(arm, seed), run.found("none", seed)
    if arm == "none" or evaluations is None or alone is None:
        return None
    both = {**{mode: evaluations[mode] for mode in MODES}, "trained without": alone["off"]}
    rows = leakage(both, run.data(arm), alphas=ALPHAS)
    plot_leakage(rows, RESULTS / f"retro_leakage_{arm}.svg")
    return rows


def protocol(run: Run) -> dict[str, Any]:
    options = run.options
    return {
        "tokens": options.tokens,
        "database_characters": options.database_characters,
        "database_chunks": len(run.database),
        "test_articles": run.test.documents,
        "test_characters": options.test_characters,
        "longest_measured_article": LONGEST,
        "vocabulary": VOCABULARY,
        "chunk_size": CHUNK,
        "sequence": CHUNK * CHUNKS,
        "k": K,
        "search": "exact",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpora")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_retro_training"))
    parser.add_argument("--tokens", type=int, default=3_000_000, help="read by every training")
    parser.add_argument("--database-characters", type=int, default=12_000_000)
    parser.add_argument("--test-characters", type=int, default=300_000)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only show what is finished")
    options = parser.parse_args()
    run = Run(options)
    if not options.report:
        with torch_threads(options.threads):
            torch.manual_seed(0)
            for seed in options.seeds:
                for arm in options.arms:
                    run.measure(arm, seed)
                    save("retro_training", report(run))
    save("retro_training", report(run))


if __name__ == "__main__":
    main()
