"""A learnt gate: how much to trust a memory, token by token, and whether to ask it at all.

A small network sees what the model knows before the memory is asked and says

    (log w_model, log w_memory) = gate(features)          w_model + w_memory = 1
    p(y) = w_model p_model(y) + w_memory p_memory(y)

Features are columns by name: ``ctxt``, the query itself, goes straight in; any other (entropy and
largest probability of the model, counts of the last words) first through a small network of its
own, all of one width. Then layers of Linear, Dropout, ReLU, and two outputs under a softmax.

Where w_model is large the search can be left out: `threshold_at` gives the w_model above which a
wanted share of tokens lies (`RetrievalGate.weigh` then gives them all to the model).

Source: AdaptRet (He, Neubig and Berg-Kirkpatrick 2021, section 4.2) and its code, whose checkpoints
have these names of weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memlm.core.config import Config, check
from memlm.core.errors import InputError

CONTEXT = "ctxt"
_OWN_WIDTH = 512


@dataclass(frozen=True)
class GateConfig(Config):
    """Shape of a gate; the defaults are those of the published script.

    Attributes:
        features: columns of each feature by name, in order; ``ctxt`` is the query.
        hidden: width of the layers.
        layers: how many.
        dropout: in the layers.
    """

    features: Mapping[str, int]
    hidden: int = 128
    layers: int = 5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check(len(self.features) > 0, "a gate needs at least one feature, got none")
        check(
            min((*self.features.values(), self.hidden, self.layers)) >= 1,
            "features, hidden and layers must be at least 1, got "
            f"{dict(self.features)}, {self.hidden} and {self.layers}",
        )
        check(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, got {self.dropout}")


class _OwnNetwork(nn.Module):
    """One feature, made as wide as the others."""

    def __init__(self, columns: int, width: int):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(columns, width), nn.LeakyReLU(), nn.Linear(width, width)
        )

    def forward(self, values: Tensor) -> Tensor:
        return self.model(values)


class RetrievalGate(nn.Module):
    """The gate.

    Args:
        config: its shape.
    """

    def __init__(self, config: GateConfig):
        super().__init__()
        self.config = config
        others = [name for name in config.features if name != CONTEXT]
        context = config.features.get(CONTEXT, 0)
        width = (context or _OWN_WIDTH) // max(len(others), 1)
        check(
            width >= 1 or not others,
            f"{len(others)} features beside {CONTEXT} need a query of at least as many columns, "
            f"got {context}",
        )
        self.input_layer = nn.ModuleDict(
            {name: _OwnNetwork(config.features[name], width) for name in others}
        )
        size, layers = context + width * len(others), []
        for _ in range(config.layers):
            layers += [nn.Linear(size, config.hidden), nn.Dropout(config.dropout), nn.ReLU()]
            size = config.hidden
        self.model = nn.Sequential(*layers, nn.Linear(size, 2), nn.LogSoftmax(dim=-1))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logarithms of the weights.

        Args:
            features: ``(queries, columns)`` by name, floating point.

        Returns:
            ``(queries, 2)``: log of the model's weight and of the memory's.

        Raises:
            InputError: if a feature is missing or has other columns.
        """
        for name, columns in self.config.features.items():
            shape = tuple(features[name].shape) if name in features else "none"
            if name not in features or features[name].shape[1:] != (columns,):
                raise InputError(
                    f"the gate's feature {name!r} must be (queries, {columns}), got {shape}"
                )
        parts = [features[CONTEXT]] if CONTEXT in self.config.features else []
        parts += [network(features[name]) for name, network in self.input_layer.items()]
        return self.model(torch.cat(parts, dim=-1))

    def weigh(self, features: Mapping[str, Tensor], threshold: float | None = None) -> Tensor:
        """The memory's weight, for ``lam`` of `memlm.ops.merge.mixture`.

        Args:
            features: as of ``forward``.
            threshold: from ``threshold_at``; None: the memory is always asked.

        Returns:
            ``(queries,)`` from 0 to 1; exactly 0 where the memory need not be asked.
        """
        log_model, log_memory = self(features).unbind(-1)
        lam = log_memory.exp()
        return lam if threshold is None else lam.masked_fill(log_model >= threshold, 0.0)


def threshold_at(log_weights: Tensor, share: float) -> float:
    """The log-weight of the model above which a share of the tokens lies.

    Args:
        log_weights: ``(queries, 2)`` of a gate, on held-out text.
        share: of the tokens for which the memory shall not be asked, 0 to 1.

    Raises:
        InputError: if the share is no fraction, or there are no queries.
    """
    check(0 <= share <= 1, f"a share must lie between 0 and 1, got {share}")
    check(len(log_weights) > 0, "a threshold needs at least one query, got none")
    ordered = log_weights[:, 0].detach().sort().values
    place = int(len(ordered) * (1 - share))
    return float(ordered[place]) if place < len(ordered) else float("inf")
