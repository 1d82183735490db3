"""A memory of your own: a class with a few methods, and every part of memlm can use it.

    python examples/own_memory.py

This one remembers pairs of neighbouring tokens: after token a, it proposes whatever followed a
earlier in the same text, the more often, the stronger. It has a state (what was seen so far), so
it shows the whole protocol; a memory without state leaves `observe`, `select_rows` and `crop`
empty and keeps None, as `memlm.KnnMemory` does. Nothing is downloaded; the model is random.
"""

import torch

import memlm
from memlm.core.types import Candidates
from memlm.ops.tokens import target_partial
from memlm.testing.tiny import tiny_model, tiny_tokens


class PairMemory:
    """What followed the current token earlier in this very text. State: ``(rows, length)``."""

    def init_state(self, rows):
        """Nothing seen yet."""
        return torch.empty(rows, 0, dtype=torch.int64)

    def observe(self, tokens, keys, state, valid=None):
        """Append the tokens that really came; padding becomes a token that never occurs."""
        if valid is not None:
            tokens = tokens.masked_fill(~valid, -1)
        return torch.cat([state, tokens.to(state.device)], dim=1)

    def read(self, query, state):
        """Every earlier occurrence of the current token proposes what followed it."""
        state = state.to(query.device)
        past, following = state[:, :-1], state[:, 1:]
        valid = (past == state[:, -1:]) & (past >= 0) & (following >= 0)
        scores = torch.zeros(valid.shape, device=query.device)  # each counts the same
        ids = torch.arange(past.shape[1], device=query.device).expand_as(valid)
        return Candidates(scores, following.clamp(min=0), ids, valid), state

    def score(self, query, targets, state):
        """The same for known next tokens: two numbers a row, no vocabulary."""
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    def select_rows(self, state, index):
        """Beams copy and drop rows."""
        return state[index.to(state.device)]

    def crop(self, state, length):
        """Assisted decoding takes tokens back."""
        return state[:, :length]

    def stats(self, state):
        """Figures to print."""
        return {"entries": state.shape[1], "off": state.shape[1] < 2}

    def describe(self):
        """What a protocol line says of it."""
        return {"memory": "pairs"}


def main() -> None:
    model = tiny_model("llama")
    lm = memlm.attach(model, PairMemory(), merge=memlm.Mixture(lam=0.9))

    # Generation: greedy, sampling and beams all carry the memory's state on the cache.
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6]])
    print("base     ", model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())
    print("memory   ", lm.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())
    print("beams    ", lm.generate(prompt, max_new_tokens=8, num_beams=3)[0].tolist())

    # Evaluation: a text that repeats itself.
    corpus = memlm.TokenCorpus.from_tokens(tiny_tokens(1, 20).repeat(1, 5)[0].numpy())
    windows = memlm.SlidingWindows(length=64, stride=32)
    base = memlm.evaluate(model, corpus, windows)
    memory = memlm.evaluate(model, corpus, windows, memory=PairMemory())
    print(f"perplexity: {base.perplexity:.1f} alone, {memory.perplexity:.1f} with memory")
    print(memory.describe())


if __name__ == "__main__":
    main()
