"""``memlm passkey``: does a model find a number that it was told long ago?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from memlm.cli.middle import MiddleOptions
from memlm.cli.options import ModelOptions, show, write_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["vanilla", "window", "streaming-llm", "lm-infinite", "lm-infinite-middle"]


@dataclass(frozen=True, kw_only=True)
class Passkey(MiddleOptions, ModelOptions):
    """Hide numbers in long filler texts and ask MODEL for them: accuracy by length and depth."""

    lengths: tuple[int, ...]
    """Tokens of the prompts, question included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the filler before the key, from 0 to 1."""
    samples: int = 10
    """Prompts per length and depth."""
    seed: int = 0
    """Of the keys, which are the same at every length and depth."""
    methods: tuple[Method, ...] = ("vanilla",)
    """Ways to read a long text, to be compared; the last one needs --middle."""
    window: int | None = None
    """Tokens seen at their true distance by all methods but vanilla (default: the length the \
model was trained on)."""
    sinks: int = 10
    """First tokens that stay visible, for streaming-llm and both lm-infinite."""
    batch_tokens: int = 32_768
    """Most tokens that are read side by side."""
    save: str | None = None
    """Write the result as JSON to this file."""
    plot: str | None = None
    """Draw a map of length and depth into this file."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Measure by every method, print, keep and draw."""
        from rich.console import Group
        from rich.text import Text

        from memlm.core.threads import torch_threads
        from memlm.evaluation.passkey import PasskeyConfig, measure_passkey, plot
        from memlm.evaluation.ways import reading

        config = PasskeyConfig(
            self.lengths, self.depths, self.samples, seed=self.seed, batch_tokens=self.batch_tokens
        )
        middle = self.middle_tokens()
        model, tokenizer = self.load()
        window = 0 if self.methods == ("vanilla",) else self._window(model)
        results = {}
        for method in self.methods:
            way = reading(model, method, window=window, sinks=self.sinks, middle=middle)
            with torch_threads(self.threads), way as ready:
                results[method] = measure_passkey(ready, tokenizer, config)
        values = {
            "window": window or None,
            "sinks": self.sinks,
            "middle": None if middle is None else middle.to_dict(),
            "methods": {method: result.to_dict() for method, result in results.items()},
        }
        write_result(self.save, values)
        if self.plot is not None:
            plot(results, self.plot)
        tables = [
            part
            for method, result in results.items()
            for part in (Text(method, style="bold"), result.table(), Text())
        ]
        show(values, Group(*tables[:-1]), as_json=self.json)
        return 0

    def _window(self, model: "PreTrainedModel") -> int:
        from memlm.models.trained_length import trained_length

        return self.window or trained_length(model)
