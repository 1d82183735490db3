"""The part of ``memlm evaluate`` that measures perplexity against length."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from memlm.cli.middle import MiddleOptions
from memlm.cli.options import show, write_result
from memlm.cli.parts import PartOptions
from memlm.core.processes import rank_and_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlm.data.tokens import TokenCorpus

Method = Literal[
    "vanilla",
    "truncation",
    "window",
    "streaming-llm",
    "lm-infinite",
    "lm-infinite-middle",
    "linear",
    "dynamic",
    "yarn",
]


@dataclass(frozen=True, kw_only=True)
class LengthOptions(MiddleOptions, PartOptions):
    """What is compared when --length names several lengths."""

    methods: tuple[Method, ...] = (
        "vanilla",
        "truncation",
        "window",
        "streaming-llm",
        "lm-infinite",
        "dynamic",
        "yarn",
    )
    """Several lengths: ways to read a long text; lm-infinite-middle needs --middle, the last \
three names are rotary scalings."""
    window: int | None = None
    """Several lengths: tokens seen at their true distance (default: the length the model was \
trained on)."""
    sinks: int = 10
    """Several lengths: first tokens that stay visible."""
    pieces: int = 8
    """Several lengths: pieces of the text that are read."""
    scored: int = 128
    """Several lengths: tokens at the end of each piece, the same at every length."""
    full_limit: int | None = None
    """Several lengths: longest piece for the methods of full attention, whose time grows with its \
square (default: all)."""
    plot: str | None = None
    """Several lengths: draw the curves into this file."""

    def measure(
        self,
        model: "PreTrainedModel",
        corpus: "TokenCorpus",
        lengths: tuple[int, ...],
        *,
        threads: int | None,
        save: str | None,
        as_json: bool,
    ) -> int:
        """Measure, print, keep and draw."""
        from memlm.core.threads import torch_threads
        from memlm.evaluation.length import LengthConfig, measure_lengths, plot
        from memlm.models.trained_length import trained_length

        side: Any = self.truncation_side or "left"
        config = LengthConfig(
            lengths=lengths,
            window=self.window or trained_length(model),
            sinks=self.sinks,
            middle=self.middle_tokens(),
            methods=self.methods,
            pieces=self.pieces,
            scored=self.scored,
            full_limit=self.full_limit,
            side=side,
        )
        with torch_threads(threads):
            curve = measure_lengths(model, corpus.tokens, config)
        write_result(save, curve.to_dict())
        if self.plot is not None and rank_and_size()[0] == 0:
            plot({str(model.config.name_or_path): curve}, self.plot)
        show(curve.to_dict(), curve.table(), as_json=as_json)
        return 0
