"""A tokenizer of a few words and an encoder that counts, made anew in every process."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlm.core.files import fingerprint

WORDS = "the cat sat on mat and dog log a story about memory it was told once more"


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


class CountingEncoder:
    """Embeds a chunk as how often it holds each token."""

    dim = 32
    fingerprint = fingerprint("counts")

    def encode(self, chunks):
        rows = [np.bincount(chunk, minlength=self.dim)[: self.dim] for chunk in chunks]
        return torch.from_numpy(np.stack(rows)).float()

    def describe(self):
        return {"encoder": "counts"}
