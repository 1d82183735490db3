"""``memlm generate``: continue a prompt, with or without memory."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from memlm.cli.middle import MiddleOptions
from memlm.cli.options import METHODS, READ_TEXT, InterpolationOptions, ModelOptions, show
from memlm.cli.retriever import DatabaseOptions
from memlm.core.config import check
from memlm.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.models.attach import MemoryForCausalLM
    from memlm.models.cache import MemoryCache


@dataclass(frozen=True, kw_only=True)
class Generate(DatabaseOptions, MiddleOptions, InterpolationOptions, ModelOptions):
    """Continue PROMPT with MODEL, with --store or --method trime also from its memory; with
    --database a RETRO model reads the neighbours of its chunks.
    """

    prompt: Annotated[str | None, Positional, arg(metavar="PROMPT")] = None
    """Text to continue; without it, read from standard input."""
    remember: str | None = None
    """trime, cache with --long: text that is read into the long-term memory before PROMPT (a \
folder, text file or .jsonl file)."""
    window: int | None = None
    """Read a PROMPT of any length (LM-Infinite): tokens seen at their true distance, at most what \
the model was trained on (default: the model as it is)."""
    sinks: int = 10
    """With --window: first tokens that stay visible."""
    max_new_tokens: int = 64
    """Tokens to generate at most."""
    sample: bool = False
    """Sample from the distribution instead of taking the likeliest token."""
    sampling_temperature: float = 1.0
    """With --sample: divides the log-scores of the merged distribution."""
    top_p: float = 1.0
    """With --sample: keep the likeliest tokens up to this probability."""
    beams: int = 1
    """Beams of a beam search."""
    seed: int | None = None
    """With --sample: of the random numbers."""
    compare: bool = False
    """Also show what the model continues without its memory and neighbours."""
    json: bool = False
    """Print the texts as JSON."""

    def run(self) -> int:
        """Generate once per variant."""
        import torch

        from memlm.core.threads import torch_threads
        from memlm.models.attach import MemoryForCausalLM, attach

        prompt = sys.stdin.read() if self.prompt is None else self.prompt
        if not prompt:
            raise InputError("the prompt must not be empty; give some text to continue")
        self._check_numbers()
        self._check_long()
        self.check_interpolation()
        self.check_database()
        model, tokenizer = self.load()
        lookup = self.lookup(model, tokenizer, self.device)
        self._extend(model)
        memory, merge = self.memory(model)
        whole, parts = model, ["RETRO"] if lookup else []
        if memory is not None:
            whole = attach(model, memory, merge=merge, interpolate=self.interpolated(memory))
            parts.append(METHODS[self.method])
        variants: dict[str, Any] = {"base": model} if self.compare or not parts else {}
        if parts:
            variants[" + ".join(parts)] = whole
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        texts = {}
        with torch_threads(self.threads):
            for name, variant in variants.items():
                if self.seed is not None:
                    torch.manual_seed(self.seed)
                choice: dict[str, Any] = (
                    {"temperature": self.sampling_temperature, "top_p": self.top_p, "top_k": 0}
                    if self.sample
                    else {}
                )
                if name != "base":
                    choice |= lookup
                if self.remember is not None and isinstance(variant, MemoryForCausalLM):
                    choice["past_key_values"] = self._read_before(self.remember, variant, tokenizer)
                tokens = variant.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=self.max_new_tokens,
                    do_sample=self.sample,
                    num_beams=self.beams,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                    **choice,
                )
                texts[name] = tokenizer.decode(tokens[0], skip_special_tokens=True)
        if len(texts) == 1:
            text = next(iter(texts.values()))
        else:
            text = "\n\n".join(f"--- {name} ---\n{text}" for name, text in texts.items())
        from rich.text import Text

        show({"prompt": prompt, "texts": texts}, Text(text), as_json=self.json)
        return 0

    def _extend(self, model: "PreTrainedModel") -> None:
        """Lambda attention, if --window asks for it."""
        from memlm.models.extend import extend_context

        middle = self.middle_tokens()
        if self.window is not None:
            extend_context(model, window=self.window, sinks=self.sinks, middle=middle or "dropped")
        elif middle is not None:
            raise InputError("--middle needs a model that is extended; give --window")

    def _check_numbers(self) -> None:
        for option, number in (("--max-new-tokens", self.max_new_tokens), ("--beams", self.beams)):
            check(number >= 1, f"{option} must be at least 1, got {number}")
        check(
            self.sampling_temperature > 0,
            f"--sampling-temperature must be above 0, got {self.sampling_temperature}",
        )
        check(0 < self.top_p <= 1, f"--top-p must be above 0 and at most 1, got {self.top_p}")

    def _check_long(self) -> None:
        if self.remember is not None and not (self.method in READ_TEXT and self.long):
            raise InputError(
                "--remember reads into a long-term memory, so it needs --method trime or cache and "
                f"--long above 0, got {self.method} and {self.long}"
            )
        if self.long and self.remember is None:
            raise InputError(
                f"a long-term memory of {self.long} positions is empty when nothing was read "
                "before; give --remember TEXT, or leave out --long"
            )

    def _read_before(
        self, source: str, lm: "MemoryForCausalLM", tokenizer: "PreTrainedTokenizerBase"
    ) -> "MemoryCache":
        """A cache of the model whose long-term memory holds a text."""
        import torch

        from memlm.data.documents import read_documents
        from memlm.data.tokens import tokenize
        from memlm.methods.trime import begin_with, remember

        text = tokenize(read_documents(source), tokenizer).tokens
        tokens = torch.from_numpy(text.astype("int64"))[None].to(lm.device)
        return begin_with(lm, remember(lm, tokens), copies=self.beams)
