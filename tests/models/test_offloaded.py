"""Models whose weights `accelerate` keeps in memory or on disk are read like any other."""

import pytest
import torch

from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.length import LengthConfig, measure_lengths
from memlm.evaluation.perplexity import evaluate
from memlm.extract.build import build_datastore
from memlm.models.fingerprint import model_hash
from memlm.testing.tiny import tiny_model, tiny_tokens

accelerate = pytest.importorskip("accelerate")
CORPUS = TokenCorpus.from_tokens(tiny_tokens(1, 60)[0].numpy())
WINDOWS = SlidingWindows(length=16, stride=8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_weights_give_the_same(family, where, tmp_path):
    plain, model = tiny_model(family), tiny_model(family)
    if where == "memory":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "weights", torch.device("cpu"))
    assert model.device.type == "meta"
    assert model_hash(model) == model_hash(plain)
    found, expected = (evaluate(x, CORPUS, WINDOWS, progress=False) for x in (model, plain))
    assert found.documents == expected.documents
    build_datastore(model, None, CORPUS, tmp_path / "store", windows=WINDOWS, progress=False)
    again = build_datastore(plain, None, CORPUS, tmp_path / "store", windows=WINDOWS)
    assert len(again) == 59
    if family == "llama":
        config = LengthConfig((24, 60), window=24, scored=8, methods=("vanilla", "lm-infinite"))
        curves = [measure_lengths(x, CORPUS.tokens, config, progress=False) for x in (model, plain)]
        nll = [[point.nll for point in curve.points] for curve in curves]
        assert nll[0] == pytest.approx(nll[1], abs=1e-5)
