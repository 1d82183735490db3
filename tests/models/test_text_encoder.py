import importlib.util

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from memlm.core.errors import InputError, MissingExtraError
from memlm.models.text_encoder import HuggingFaceEncoder, SentenceEncoder, masked_mean


def bert(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
    )
    return BertModel(config, add_pooling_layer=False).eval()


CHUNKS = [np.array([3, 4, 5, 6]), np.array([7]), np.array([8, 9, 10, 11, 12, 13])]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_chunk_is_embedded_alike_in_any_batch(pooling, tokenizer):
    for settings in (
        {"prefix": (1,), "skip_first": True},
        {"tokenizer": tokenizer, "source_tokenizer": tokenizer},
    ):
        encoder = HuggingFaceEncoder(bert(), pooling=pooling, **settings)
        together = encoder.encode(CHUNKS)
        assert together.shape == (3, encoder.dim)
        for row, chunk in zip(together, CHUNKS, strict=True):
            torch.testing.assert_close(encoder.encode([chunk])[0], row, atol=1e-5, rtol=1e-5)


def test_a_text_is_cut_where_the_encoder_has_no_positions_left(tokenizer):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=40, max_position_embeddings=20, pad_token_id=1, intermediate_size=16, **settings
    )
    model = RobertaModel(config, add_pooling_layer=False).eval()
    encoder = HuggingFaceEncoder(model, tokenizer, tokenizer)
    assert encoder.max_length == 18  # positions begin behind that of the padding
    assert encoder.encode([np.full(50, 3)]).isfinite().all()
    assert HuggingFaceEncoder(bert(), tokenizer, tokenizer).max_length == 20


def test_mean_over_nothing_is_zero():
    states = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    mean = masked_mean(states, mask, skip_first=True)
    assert not mean[0].any()
    torch.testing.assert_close(mean[1], states[1, 1:].mean(0))


def test_fingerprints_tell_encoders_apart():
    plain = HuggingFaceEncoder(bert())
    assert plain.fingerprint == HuggingFaceEncoder(bert()).fingerprint
    others = [
        HuggingFaceEncoder(bert(1)),
        HuggingFaceEncoder(bert(), pooling="cls"),
        HuggingFaceEncoder(bert(), prefix=(1,)),
    ]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_model_is_given_back_as_it_was():
    model = bert().train()
    HuggingFaceEncoder(model).encode(CHUNKS)
    assert model.training


def test_bad_encoders(tokenizer):
    with pytest.raises(InputError, match="pooling must be 'mean' or 'cls', got 'max'"):
        HuggingFaceEncoder(bert(), pooling="max")  # pyright: ignore
    with pytest.raises(InputError, match="give both or neither"):
        HuggingFaceEncoder(bert(), tokenizer)
    with pytest.raises(InputError, match="leave it out"):
        HuggingFaceEncoder(bert(), tokenizer, tokenizer, prefix=(1,))


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed"
)
def test_a_missing_package_is_named(tokenizer):
    with pytest.raises(MissingExtraError, match=r"memlm\[dense\]"):
        SentenceEncoder("any", tokenizer)
