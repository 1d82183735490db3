"""The parameter groups RETRO is trained with: weight decay for tables and matrices only.

    decayed         weights of linear layers, all embeddings
    not decayed     biases, gains of norms, null keys and values

The published package sorts by the number of dimensions, and so does this; there the order of
parameters changes from run to run, so that an optimiser's state cannot be loaded again. Here it
is the model's. `memlm.training.learning.make_optimizer` makes the same two groups for AdamW; these
are for loops of one's own, and for embeddings without decay.
"""

from typing import Any

from torch import nn


def retro_groups(
    model: nn.Module, *, weight_decay: float, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Two groups for ``torch.optim.AdamW``, in the model's order; frozen parameters are in neither.

    Args:
        model: a RETRO model, or one that has parts of one.
        weight_decay: of the first group.
        decay_embeddings: whether embeddings belong to it, as in the package.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or (id(parameter) in tables and not decay_embeddings)
            (plain if spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
