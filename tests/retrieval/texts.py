"""Texts, databases and encoders for the tests of retrieval."""

import random

import numpy as np
import torch

from memlm.core.files import fingerprint
from memlm.data.documents import Document
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig

WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "log", "a", "story", "memory", "told"]


def documents(count=6, seed=1, longest=60):
    draw = random.Random(seed)
    return [
        Document(f"doc-{number}", " ".join(draw.choices(WORDS, k=draw.randint(1, longest))))
        for number in range(count)
    ]


def database(path, tokenizer, texts=None, chunk_size=8, **settings):
    texts = documents() if texts is None else texts
    return build_chunks(texts, tokenizer, path, ChunkConfig(chunk_size), quiet=True, **settings)


class CountingEncoder:
    """Embeds a chunk as how often it holds each token; counts its batches, and can fail."""

    dim = 32

    def __init__(self, name="counts", fail_at=None):
        self.fingerprint = fingerprint(name)
        self.batches, self.fail_at = 0, fail_at
        self.embedded = 0

    def encode(self, chunks):
        if self.batches == self.fail_at:
            raise KeyboardInterrupt
        self.batches += 1
        self.embedded += len(chunks)
        rows = [np.bincount(chunk, minlength=self.dim)[: self.dim] for chunk in chunks]
        return torch.from_numpy(np.stack(rows)).float()

    def describe(self):
        return {"encoder": "counts"}
