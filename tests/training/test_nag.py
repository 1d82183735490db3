"""NAG is Nesterov's SGD with the decay apart."""

import pytest
import torch

from memlm.core.errors import InputError
from memlm.training.nag import Nag


def test_without_decay_it_is_torch_s_own():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    nag = Nag([ours], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(4):
        ours.grad = torch.randn(3)
        theirs.grad = ours.grad.clone()
        nag.step()
        sgd.step()
    assert torch.equal(ours, theirs)


def test_decay_shrinks_weights_and_leaves_the_momentum():
    parameter = torch.nn.Parameter(torch.full((2,), 4.0))
    nag = Nag([parameter], lr=0.5, momentum=0.9, decay=0.1)
    parameter.grad = torch.zeros(2)
    nag.step()
    assert parameter.tolist() == pytest.approx([4.0 * (1 - 0.05)] * 2)
    assert not nag.state[parameter]["momentum_buffer"].any()


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"momentum": 0.0}, {"decay": -1.0}])
def test_bad_settings(settings):
    with pytest.raises(InputError, match="must"):
        Nag([torch.nn.Parameter(torch.ones(1))], lr=0.1, **settings)
