"""``memlm translate``: an encoder-decoder on pairs of texts, alone and with a datastore."""

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from memlm.cli.options import load_tokenizer, show, write_result
from memlm.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Translate:
    """Perplexity and BLEU of MODEL on PAIRS, alone and (with --store) with its memory (kNN-MT).

    With --remember those pairs are put into the store first; interrupted, the same command goes on.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Folder or Hub id of a Hugging Face encoder-decoder (Marian, T5, BART, ...)."""
    pairs: Annotated[str, Positional, arg(metavar="PAIRS")]
    """Lines of source, tab, target; or a .jsonl file (also .gz, .xz, .zst)."""
    source: str = "source"
    """Field of a .jsonl record, or of its "translation", that holds the source."""
    target: str = "target"
    """Field that holds the target."""
    limit: int | None = None
    """Read only so many pairs of PAIRS."""
    store: str | None = None
    """Directory of a datastore; without it the model stands alone."""
    remember: str | None = None
    """Pairs that --store is made of."""
    k: int = 32
    """Neighbours per search."""
    temperature: float = 50.0
    """Divides the squared distances; larger is flatter (the paper: 10 to 100)."""
    lam: float = 0.25
    """Weight of the memory in the mixture, from 0 to 1 (the paper: 0.4 to 0.8)."""
    beams: int = 5
    """Of the search; 1 is greedy."""
    new_tokens: int = 128
    """Tokens of a translation at most."""
    write: bool = True
    """Also translate and give BLEU (--no-write: perplexity alone)."""
    batch_tokens: int = 8192
    """Tokens per forward pass."""
    device: str = "auto"
    """Where it runs: "auto" takes the GPU if there is one, else the CPU."""
    threads: int | None = None
    """CPU threads (default: as torch chooses)."""
    save: str | None = None
    """Write figures and translations to this JSON file."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Build the store if asked to, then measure the model, alone and with it."""
        from memlm.cli.options import load_model
        from memlm.core.threads import torch_threads
        from memlm.data.pairs import read_pairs, tokenize_pairs
        from memlm.extract.config import ExtractionConfig
        from memlm.extract.pairs import build_pair_datastore
        from memlm.methods.knn_mt import knn_mt
        from memlm.store.reader import Datastore

        if self.remember is not None and self.store is None:
            raise InputError("--remember needs the directory of a datastore; give --store")
        model = load_model(self.model, self.device, pairs=True)
        tokenizer = load_tokenizer(self.model)
        names: dict[str, Any] = {"source": self.source, "target": self.target}
        held = read_pairs(self.pairs, limit=self.limit, **names)
        variants: dict[str, Any] = {"base": model}
        with torch_threads(self.threads):
            if self.remember is not None:
                known = tokenize_pairs(read_pairs(self.remember, **names), tokenizer)
                config = ExtractionConfig(batch_tokens=self.batch_tokens, threads=self.threads)
                build_pair_datastore(model, tokenizer, known, str(self.store), config=config)
            if self.store is not None:
                variants["kNN-MT"] = knn_mt(
                    model,
                    Datastore.open(self.store),
                    k=self.k,
                    lam=self.lam,
                    temperature=self.temperature,
                )
            corpus = tokenize_pairs(held, tokenizer)
            results = {
                name: self._measure(variant, tokenizer, held, corpus)
                for name, variant in variants.items()
            }
        value = {**results, "settings": {"k": self.k, "temperature": self.temperature,
                 "lam": self.lam, "beams": self.beams}}  # fmt: skip
        write_result(self.save, value)
        lines = [
            f"{name:<8} perplexity {found['perplexity']:.3f}"
            + (f"  BLEU {found['bleu']:.2f}" if self.write else "")
            for name, found in results.items()
        ]
        lines.append(
            f"{len(held)} pairs, {results['base']['tokens']} target tokens, end tokens included; "
            f"per token; BLEU by sacrebleu, {self.beams} beams; memory: k {self.k}, temperature "
            f"{self.temperature}, lam {self.lam}"
        )
        show(value, "\n".join(lines), as_json=self.json)
        return 0

    def _measure(self, model: Any, tokenizer: Any, held: Any, corpus: Any) -> dict[str, Any]:
        from memlm.evaluation.pairs import bleu, evaluate_pairs, translate

        figures = evaluate_pairs(model, corpus, batch_tokens=self.batch_tokens)
        found = {**figures._asdict(), "perplexity": figures.perplexity}
        if self.write:
            sources = [pair.source for pair in held]
            written = translate(
                model, tokenizer, sources, beams=self.beams, new_tokens=self.new_tokens
            )
            found["bleu"] = bleu(written, [pair.target for pair in held])
            found["translations"] = written
        return found
