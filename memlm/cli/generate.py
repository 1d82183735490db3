"""``memlm generate``: continue a prompt, with or without memory."""

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import METHODS, MemoryOptions, ModelOptions, show
from memlm.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Generate(MemoryOptions, ModelOptions):
    """Continue PROMPT with MODEL, with --store also from its memory."""

    prompt: Annotated[str | None, Positional, arg(metavar="PROMPT")] = None
    """Text to continue; without it, read from standard input."""
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
    """Also show what the model continues without its memory."""
    json: bool = False
    """Print the texts as JSON."""

    def run(self) -> int:
        """Generate once per variant."""
        import torch

        from memlm.core.threads import torch_threads
        from memlm.models.attach import attach

        prompt = sys.stdin.read() if self.prompt is None else self.prompt
        if not prompt:
            raise InputError("the prompt must not be empty; give some text to continue")
        model, tokenizer = self.load()
        memory, merge = self.memory()
        variants = {}
        if memory is None or self.compare:
            variants["base"] = model
        if memory is not None:
            variants[METHODS[self.method]] = attach(model, memory, merge=merge)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        texts = {}
        with torch_threads(self.threads):
            for name, variant in variants.items():
                if self.seed is not None:
                    torch.manual_seed(self.seed)
                choice = (
                    {"temperature": self.sampling_temperature, "top_p": self.top_p, "top_k": 0}
                    if self.sample
                    else {}
                )
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
