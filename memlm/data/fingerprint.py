"""The fingerprint of a tokenizer: equal where two tokenizers cut every text alike.

Whatever is made of tokens (datastores, chunk databases, models) carries it and refuses tokens of
another tokenizer, whose ids would be valid and mean something else.
"""

import json

from transformers import PreTrainedTokenizerBase

from memlm.core.files import fingerprint


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of how a tokenizer cuts text, as ``"xxh3_128:<hex>"``.

    Covers the whole pipeline of a fast tokenizer (normaliser, pieces, merges, added tokens) and the
    tokens that begin and end documents; not padding or truncation, which are states of use.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        pipeline.pop("padding", None)
        pipeline.pop("truncation", None)
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return fingerprint(
        {"pipeline": pipeline, "begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id}
    )
