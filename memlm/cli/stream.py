"""``memlm stream``: perplexity of a model over a text without end, at constant memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from memlm.cli.middle import MiddleOptions
from memlm.cli.options import ModelOptions, show, write_result

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memlm.evaluation.streaming import StreamPoint

_HEAD = (
    f"{'tokens':>14}  {'perplexity':>10}  {'recent':>8}  {'ms/token':>8}  {'cache MB':>8}"
    f"  {'peak MB':>8}"
)


@dataclass(frozen=True, kw_only=True)
class Stream(MiddleOptions, ModelOptions):
    """Read TEXT again and again with MODEL and a rolling window (LM-Infinite): running perplexity,
    latency and memory. With --out the same command goes on where it was interrupted.
    """

    text: Annotated[str, Positional, arg(metavar="TEXT")]
    """Folder, text file or .jsonl file (also .gz, .xz, .zst)."""
    tokens: int = 1_000_000
    """How many tokens to read in all."""
    window: int | None = None
    """Tokens seen at their true distance (default: the length the model was trained on)."""
    sinks: int = 10
    """First tokens that stay visible."""
    positions: Literal["lm-infinite", "streaming"] = "lm-infinite"
    """Where the first tokens seem to be: at the window's edge, or as StreamingLLM puts them."""
    chunk: int = 4096
    """Tokens that the model reads at once; 1: token by token."""
    every: int = 65_536
    """Tokens between reports."""
    seed: int = 0
    """Of the order of documents, a new one in each round."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    separator: str | None = None
    """Cut a text file into documents at this string."""
    out: str | None = None
    """Folder for log.jsonl and the state to go on from."""
    save: str | None = None
    """At the end, write all reports of the run with its settings to this JSON file."""
    plot: str | None = None
    """At the end, draw the run into this file."""
    json: bool = False
    """Print every report as one line of JSON."""

    def run(self) -> int:
        """Extend the model, read, report."""
        import json
        import sys
        from dataclasses import asdict

        from memlm.core.processes import refuse_several
        from memlm.core.threads import torch_threads
        from memlm.evaluation.streaming import plot_points, read_points
        from memlm.models.extend import extend_context
        from memlm.models.trained_length import trained_length

        refuse_several("memlm stream")
        model, tokenizer = self.load()
        window = trained_length(model) if self.window is None else self.window
        clamp = "streaming" if self.positions == "streaming" else "causal"
        middle = self.middle_tokens()
        extend_context(
            model, window=window, sinks=self.sinks, clamp=clamp, middle=middle or "dropped"
        )
        protocol = (
            f"window {window}, {self.sinks} sinks ({self.positions})"
            + (f", {middle.describe()}" if middle else "")
            + "; every token but the first is scored; natural log"
        )
        if not self.json:
            show({}, f"{protocol}\n{_HEAD}", as_json=False)
        points = []
        with torch_threads(self.threads):
            for point in self._points(model, tokenizer):
                points.append(point)
                if self.json:
                    sys.stdout.write(json.dumps(asdict(point)) + "\n")
                    sys.stdout.flush()
                    continue
                show(
                    {},
                    f"{point.tokens:>14,}  {point.perplexity:>10.3f}  "
                    f"{point.recent_perplexity:>8.3f}  {point.milliseconds_per_token:>8.3f}  "
                    f"{point.cache_bytes / 1e6:>8.1f}  {point.process_bytes / 1e6:>8.0f}",
                    as_json=False,
                )
        if self.out is not None:
            points = read_points(self.out)
        told = {"protocol": protocol, "chunk": self.chunk, "threads": self.threads}
        write_result(self.save, {**told, "points": [asdict(point) for point in points]})
        if self.plot is not None:
            plot_points(points, self.plot)
        return 0

    def _points(self, model: Any, tokenizer: Any) -> "Iterator[StreamPoint]":
        """The run itself."""
        from itertools import pairwise

        from memlm.data.documents import read_documents
        from memlm.data.tokens import tokenize
        from memlm.evaluation.streaming import shuffled_epochs, stream_perplexity

        documents = read_documents(self.text, text_field=self.field, separator=self.separator)
        corpus = tokenize(documents, tokenizer, begin=False)
        texts = [corpus.tokens[a:b].tolist() for a, b in pairwise(corpus.offsets.tolist())]
        return stream_perplexity(
            model,
            shuffled_epochs(texts, self.seed, begin_token=tokenizer.bos_token_id),
            until=self.tokens,
            chunk=self.chunk,
            every=self.every,
            out=self.out,
            text=f"{corpus.hash}, seed {self.seed}",
            progress=not self.json,
        )
