"""DeepNet's scales and initialisation carry a model of 200 layers."""

import pytest
import torch

from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig
from memlm.training.retro_groups import retro_groups


@pytest.mark.slow
def test_a_narrow_model_of_200_layers_trains():
    torch.manual_seed(0)
    config = RetroConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=200,
        num_attention_heads=2,
        head_dim=16,
        encoder_hidden_size=32,
        chunk_size=8,
        cross_attention_layers=range(6, 201, 20),
        norm="layer",
        norm_first=False,
        deepnet=True,
    )
    model = RetroForCausalLM(config).train()
    optimizer = torch.optim.AdamW(retro_groups(model, weight_decay=0.1), lr=1e-3)
    losses = []
    for _ in range(50):
        start = torch.randint(0, 40, (4, 1))
        tokens = (start + 3 * torch.arange(33)) % 40
        neighbours = tokens[:, :32].view(4, 4, 1, 8).repeat(1, 1, 2, 2)
        loss = model(tokens, labels=tokens, neighbours=neighbours).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert max(losses) < 1.2 * losses[0]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
