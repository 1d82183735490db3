"""Training of a gate between a model and its memory (`memlm.models.retrieval_gate`).

The loss of a token y is that of the mixture, and a small price on using the memory:

    loss = - mean log( w_model p_model(y) + w_memory p_memory(y) )  +  l1 mean w_memory

Everything but the gate is fixed, so features and the two log-probabilities are computed once
(`memlm.evaluation.gate_data`). A part of the text is held out to choose the best epoch.

Source: AdaptRet (He, Neubig and Berg-Kirkpatrick 2021, section 4.2) and its script: Adam at 5e-4,
64 tokens at a time, 10 epochs, l1 = 0.05, a tenth held out.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.evaluation.gate_data import GateData
from memlm.models.retrieval_gate import GateConfig, RetrievalGate, threshold_at
from memlm.ops.logsumexp import safe_logaddexp


@dataclass(frozen=True)
class GateTraining(Config):
    """How a gate is trained; the defaults are those of the published script.

    Attributes:
        epochs: passes over the tokens.
        batch: tokens of a step.
        learning_rate: of Adam.
        l1: price on the memory's weight.
        held_out: share of the tokens, the last ones, that choose the best epoch.
        skipped: share of searches left out when epochs are compared; 0: by the loss alone.
        seed: of weights, dropout and order.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 5e-4
    l1: float = 0.05
    held_out: float = 0.1
    skipped: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        check(self.batch >= 1, f"batch must be at least 1, got {self.batch}")
        check(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        check(self.l1 >= 0, f"l1 must not be negative, got {self.l1}")
        check(0 < self.held_out < 1, f"held_out must lie between 0 and 1, got {self.held_out}")
        check(0 <= self.skipped < 1, f"skipped must be at least 0, below 1, got {self.skipped}")


def gate_loss(
    log_weights: Tensor, model: Tensor, memory: Tensor, *, l1: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of a gate.

    Args:
        log_weights: ``(queries, 2)`` of a gate.
        model: ``(queries,)`` log-probabilities of the tokens that came.
        memory: alike, -inf where the memory does not propose the token.
        l1: price on the memory's weight.

    Returns:
        The scalar loss, and ``(queries,)`` the negative log-likelihoods in it, nats.
    """
    log_model, log_memory = log_weights.unbind(-1)
    nll = -safe_logaddexp(log_model + model, log_memory + memory)
    return nll.mean() + l1 * log_memory.exp().mean(), nll


def train_gate(
    data: GateData, config: GateConfig | None = None, training: GateTraining | None = None
) -> RetrievalGate:
    """Learn a gate from a text that neither the model nor the store was made of.

    Args:
        data: features and log-probabilities of the text's tokens, in its order.
        config: shape of the gate; default: the published one for these features.
        training: how.

    Returns:
        The gate of the best epoch, in evaluation mode.

    Raises:
        InputError: if there are too few tokens to hold any out.
    """
    training = training or GateTraining()
    config = config or GateConfig({name: part.shape[1] for name, part in data.features.items()})
    cut = len(data) - max(1, int(len(data) * training.held_out))
    check(cut >= 1, f"a gate needs at least 2 tokens to learn from, got {len(data)}")
    learnt, held = data.select(slice(0, cut)), data.select(slice(cut, None))
    best, state = math.inf, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        gate = RetrievalGate(config)
        optimizer = torch.optim.Adam(gate.parameters(), lr=training.learning_rate)
        for _ in range(training.epochs):
            gate.train()
            for rows in torch.randperm(cut).split(training.batch):
                batch = learnt.select(rows)
                optimizer.zero_grad()
                log_weights = gate(batch.features)
                gate_loss(log_weights, batch.model, batch.memory, l1=training.l1)[0].backward()
                optimizer.step()
            loss = _held_out_loss(gate.eval(), held, training.skipped)
            if loss < best:
                best, state = loss, copy.deepcopy(gate.state_dict())
    if state is not None:
        gate.load_state_dict(state)
    return gate.eval()


@torch.no_grad()
def _held_out_loss(gate: RetrievalGate, held: GateData, skipped: float) -> float:
    log_weights = gate(held.features)
    return float(held.nll(log_weights, threshold_at(log_weights, skipped)).mean())
