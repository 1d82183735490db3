"""The memory of translation is the k best positions of other sentences."""

import pytest
import torch

from memlm.core.errors import InputError
from memlm.training.objectives import translation as room
from memlm.training.objectives.memory import Positions
from memlm.training.objectives.translation import translation_memory


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [1, 3, None])
def test_against_loops(metric, k, monkeypatch):
    monkeypatch.setattr(room, "_SCORES", 40)
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 3, (3, 4), generator=generator)
    targets[1, 2:] = -100
    partial = translation_memory(Positions(keys, targets), metric=metric, temperature=2.0, k=k)
    for row in range(3):
        for place in range(4):
            pairs = []
            for other in range(3):
                for there in range(4):
                    if other == row or targets[other, there] == -100:
                        continue
                    q, key = keys[row, place], keys[other, there]
                    score = q @ key if metric == "ip" else -(q - key).square().sum()
                    same = bool(targets[other, there] == targets[row, place])
                    pairs.append((float(score) / 5**0.5 / 2.0, same))
            pairs = sorted(pairs, reverse=True)[:k]
            every = torch.tensor([score for score, _ in pairs], dtype=torch.float64)
            right = torch.tensor([score for score, same in pairs if same], dtype=torch.float64)
            assert partial.lse[row, place] == pytest.approx(float(every.logsumexp(0)))
            if targets[row, place] != -100:
                assert partial.target_lse[row, place].item() == pytest.approx(
                    float(right.logsumexp(0)) if len(right) else -float("inf")
                )


def test_one_sentence_has_no_memory():
    batch = Positions(torch.randn(1, 3, 2, requires_grad=True), torch.zeros(1, 3).long())
    partial = translation_memory(batch)
    assert torch.isneginf(partial.lse).all()
    torch.nan_to_num(partial.lse, neginf=0.0).sum().backward()
    assert not batch.keys.grad.any()


def test_another_metric_is_refused():
    with pytest.raises(InputError, match="metric must be one of"):
        translation_memory(Positions(torch.randn(1, 3, 2), torch.zeros(1, 3).long()), metric="cos")
