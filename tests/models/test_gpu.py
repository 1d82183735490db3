"""The same laws on a CUDA device: the memory may live on the CPU."""

import pytest
import torch

from memlm.core.merges import Mixture
from memlm.memory.local import LocalMemory
from memlm.models.attach import attach
from memlm.models.fingerprint import model_hash
from memlm.testing.tiny import tiny_model, tiny_tokens

from .memories import Counter, Fixed
from .test_forward import left_padded
from .test_generate import GREEDY, PROMPT, scores_of

pytestmark = pytest.mark.gpu
MEMORIES = [Fixed, Counter, LocalMemory]


@pytest.mark.parametrize("kind", MEMORIES)
def test_forward_agrees_with_the_cpu(kind):
    padded, mask = left_padded(tiny_tokens(3, 9), [9, 4, 6])
    lm = attach(tiny_model(), kind(), Mixture(0.4))
    with torch.no_grad():
        expected = lm(padded, attention_mask=mask, labels=padded)
        got = lm.cuda()(padded.cuda(), attention_mask=mask.cuda(), labels=padded.cuda())
    torch.testing.assert_close(got.logits.cpu(), expected.logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(got.loss.cpu(), expected.loss, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation(kind, dtype, extra):
    lm = attach(tiny_model(), kind(), Mixture(0.4)).to("cuda", dtype)
    tokens = tiny_tokens(2, PROMPT).cuda()
    made = lm.generate(
        tokens,
        **{**GREEDY, "min_new_tokens": None, "eos_token_id": None},
        **extra,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    along = getattr(made, "sequences_scores", None)
    if along is None:
        along = lm.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        along = along.sum(1)
    bound = 1e-3 if dtype == torch.float32 else 1.0
    torch.testing.assert_close(along, scores_of(lm, made.sequences), atol=bound, rtol=0)


def test_the_fingerprint_does_not_depend_on_the_device():
    model = tiny_model()
    before = model_hash(model)
    assert model_hash(model.cuda()) == before
