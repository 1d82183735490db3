"""``memlm explain``: which entries of a memory spoke for a token."""

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import InterpolationOptions, ModelOptions, show, write_result
from memlm.core.config import check
from memlm.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Explain(InterpolationOptions, ModelOptions):
    """Say of every token of PROMPT, or of what follows it, how likely it is with and without a
    memory, and which entries of the memory made it so.
    """

    prompt: Annotated[str | None, Positional, arg(metavar="PROMPT")] = None
    """Text; without it, read from standard input."""
    max_new_tokens: int = 0
    """Continue PROMPT by so many tokens, the likeliest ones, and explain these instead of it."""
    top: int = 5
    """Sources of each token."""
    source_tokens: int = 12
    """Tokens shown before a source's token."""
    html: str | None = None
    """Write a page on which every token shows its sources."""
    save: str | None = None
    """Write everything as JSON to this file."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        """Attach, continue if asked to, explain, show."""
        import torch

        from memlm.core.threads import torch_threads
        from memlm.explain.provenance import explain_tokens
        from memlm.explain.report import table, to_values, write_page
        from memlm.models.attach import MemoryForCausalLM, attach

        check(
            self.max_new_tokens >= 0,
            f"--max-new-tokens must not be negative, got {self.max_new_tokens}",
        )
        check(
            self.long == 0,
            f"a long-term memory of {self.long} positions is empty when nothing was read before "
            "the text; leave out --long",
        )
        self.check_interpolation()
        prompt = sys.stdin.read() if self.prompt is None else self.prompt
        model, tokenizer = self.load()
        memory, merge = self.memory(model)
        if memory is not None:
            lm = attach(model, memory, merge=merge, interpolate=self.interpolated(memory))
        elif isinstance(model, MemoryForCausalLM):  # saved with its memory
            lm = model
        else:
            raise InputError(
                "only a memory can be explained, and there is none; give --store, or --method "
                "trime or cache"
            )
        tokens = tokenizer(prompt, return_tensors="pt").input_ids[0].to(model.device)
        if not len(tokens):
            raise InputError("the prompt must not be empty; give some text")
        first = 1
        with torch_threads(self.threads):
            if self.max_new_tokens:
                first = len(tokens)
                tokens = lm.generate(
                    input_ids=tokens[None],
                    attention_mask=torch.ones_like(tokens)[None],
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                )[0]
            found = explain_tokens(
                lm, tokens, first=first, top=self.top, context=self.source_tokens
            )
        values = {"memory": lm.memory.describe(), "tokens": to_values(found, tokenizer)}
        write_result(self.save, values)
        if self.html is not None:
            write_page(found, tokens, tokenizer, self.html)
        show(values, table(found, tokenizer), as_json=self.json)
        return 0
