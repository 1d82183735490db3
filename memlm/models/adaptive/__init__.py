"""TRIME's decoder: frequent words get wide embeddings and cheap probabilities, rare words the rest.

    config.py     `AdaptiveConfig`: shape, bands, tying; the presets of the paper
    bands.py      how a vocabulary is cut into bands
    embedding.py  adaptive input: one table per band, projected to the model's width
    head.py       adaptive softmax: frequent words and one class per band first, then inside a band
    decoder.py    `AdaptiveModel` and `AdaptiveForCausalLM`: the transformer between the two

The same decoder without bands is fairseq's plain ``transformer_lm``. Importing
`memlm.models.adaptive.decoder` registers both with the Auto classes of transformers.
"""
