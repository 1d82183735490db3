"""The model behind the whole pipeline of retro-pytorch: losses of its items, text it generates."""

import json

import numpy as np
import torch
from retro_models import read_model, run, stated
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from memlm.models.retro.sampling import generate_as_original
from memlm.models.text_encoder import masked_mean
from memlm.retrieval.original import retrieved_tokens


class Live:
    """Nearest recorded embeddings of ``[101] chunk [102]``."""

    def __init__(self, case, k):
        assets = case.parent / "assets"
        self.model = BertModel(
            BertConfig(**json.loads((assets / "bert_config.json").read_text())),
            add_pooling_layer=False,
        )
        self.model.load_state_dict(load_file(assets / "bert.safetensors"))
        self.model.eval()
        expected = np.load(case / "expected.npz")
        self.chunks, self.k = expected["chunks"], k
        self.keys = torch.from_numpy(expected["embeddings"])

    def retrieve(self, chunks):
        asked = torch.nn.functional.pad(torch.stack(list(chunks)), (1, 1))
        asked[:, 0], asked[:, -1] = 101, 102
        states = self.model(asked, attention_mask=(asked != 0).long()).last_hidden_state
        queries = masked_mean(states, asked != 0, skip_first=True)
        ids = torch.cdist(queries, self.keys).topk(self.k, largest=False).indices.numpy()
        tokens = torch.from_numpy(retrieved_tokens(ids, self.chunks)).long()
        return tokens, tokens != 0


def test_losses_and_text(golden_retro_e2e_training_wrapper):
    case = golden_retro_e2e_training_wrapper
    model, _ = read_model(case)
    expected = np.load(case / "expected.npz")
    batches = (torch.from_numpy(expected[f"item_{name}"])[:, None] for name in ("seq", "retrieved"))
    items = zip(*batches, strict=True)
    with torch.no_grad():
        losses = [
            run(model, dict(zip(("seq", "retrieved"), item, strict=True)), loss=True).loss
            for item in items
        ]
    torch.testing.assert_close(
        torch.stack(losses),
        torch.from_numpy(expected["item_losses"]),
        atol=1e-4,
        rtol=0,
    )
    k = json.loads((case / "params.json").read_text())["knn"]
    names = [name.removeprefix("gen.") for name in expected.files if name.startswith("gen.")]
    assert names
    (threshold,) = stated(case, r"filter_thres=(0\.\d+)")
    for name in names:
        start = expected.get(f"prompt.{name}")
        text = generate_as_original(
            model,
            None if start is None else torch.from_numpy(start),
            retriever=Live(case, k),
            threshold=threshold,
        )
        assert torch.equal(text, torch.from_numpy(expected[f"gen.{name}"])), name
