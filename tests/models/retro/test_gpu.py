"""RETRO on a CUDA device, in float32 and bfloat16: forward, learning, cached decoding."""

import pytest
import torch

from .small import Arithmetic, made_up, small_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_on_the_cpu(dtype):
    model = small_model().float()
    tokens, neighbours = made_up(2, 13)[:2]
    with torch.no_grad():
        wanted = model(tokens, neighbours=neighbours).logits
        found = model.to("cuda", dtype)(tokens.cuda(), neighbours=neighbours.cuda()).logits
    bound = 1e-3 if dtype == torch.float32 else 2e-2
    difference = (found.float().cpu() - wanted).abs().mean()
    assert difference < bound * max(1.0, float(wanted.abs().mean()))


def test_it_learns_in_bfloat16():
    model = small_model().float().cuda().train()
    tokens, neighbours = (part.cuda() for part in made_up(2, 13)[:2])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, neighbours=neighbours, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


class OnTheCpu(Arithmetic):
    """A retriever whose tokens are where its index is."""

    def retrieve(self, chunks):
        return super().retrieve([chunk.cpu() for chunk in chunks])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_generates_with_a_retriever_on_the_cpu(dtype):
    model = small_model().to("cuda", dtype)
    prompt = made_up(2, 6)[0].cuda()
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = {
        cached: model.generate(prompt, retriever=OnTheCpu(), use_cache=cached, **settings)
        for cached in (True, False)
    }
    assert made[True].shape == (2, 15)
    if dtype == torch.float32:
        assert torch.equal(made[True], made[False])
