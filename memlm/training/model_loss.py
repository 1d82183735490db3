"""A model whose forward returns its own loss, as the training loop wants it.

Models such as RETRO and TUPE know their loss: ``model(**batch).loss`` is the mean over the targets
in ``labels``. The loop divides once, by the targets of a whole step, so here the mean becomes a sum
again. With equal weight for every target this is what one batch of the whole step would give.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.data.batches import IGNORED
from memlm.training.objectives.module import ObjectiveOutput


class ModelLoss(nn.Module):
    """Trains a model on the loss that its forward returns.

    Args:
        model: gives ``.loss``, a mean over the ``labels`` that are not -100. If it moves labels by
            one itself, as causal models of transformers do, the first of every row must be -100.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, batch: Mapping[str, Tensor], *, step: int = 0, micro: int = 0
    ) -> ObjectiveOutput:
        """The summed loss of a batch; ``step`` and ``micro`` change nothing."""
        count = (batch["labels"] != IGNORED).sum()
        loss = self.model(**batch).loss.float()
        # A mean over nothing is not a number; a batch without targets adds nothing.
        total = (loss * count).nan_to_num(0.0) if not count else loss * count
        return ObjectiveOutput(total, count, {})
