"""What middle tokens cost: decoding steps over plain Lambda attention's, and memory by place.

A random Llama of two layers of 4 heads x 64, window 1024, 10 sinks. At every position the same
tokens are written with and without middle tokens, in turn, 50 steps a round. Memory is counted from
the tensors of the cache: those that stay on the model's device, and those that an offloaded store
keeps in the memory of the CPU.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import paired, save, seconds
from memlm.core.threads import torch_threads
from memlm.models.extend import extend_context
from memlm.models.middle_cache import MiddleLayer
from memlm.ops.middle_rule import MiddleConfig

WINDOW, SINKS, STEPS = 1024, 10, 50
CASES = {
    "8 blocks of 16": MiddleConfig(k=128, first_layer=0),
    "8 blocks of 16, offloaded": MiddleConfig(k=128, first_layer=0, offload=True),
    "8 blocks of 16 of the latest 8192": MiddleConfig(k=128, first_layer=0, capacity=8192),
    "5 single tokens": MiddleConfig(k=5, block=1, first_layer=0),
}


class Reader:
    """A copy of the model with its own settings and cache."""

    def __init__(self, model: LlamaForCausalLM, middle: Any):
        twin = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
        twin.load_state_dict(model.state_dict())
        self.model = extend_context(twin, window=WINDOW, sinks=SINKS, middle=middle)
        self.cache: Any = None

    def read(self, tokens: torch.Tensor) -> None:
        """Read tokens ``(1, new)`` behind those that were read."""
        output = self.model.model(tokens, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values

    def steps(self) -> None:
        """Write one round, a token at a time."""
        token = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(STEPS):
            self.read(token)

    def bytes(self) -> dict[str, int]:
        """Of the whole cache, by where it is."""
        found = {"device": 0, "cpu": 0}
        for layer in self.cache.layers:
            found["device"] += size(layer.keys, layer.values, layer.positions)
            if isinstance(layer, MiddleLayer):
                place = "cpu" if layer.middle.offload else "device"
                found[place] += size(*layer.store.held().values())
        return found


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reading(reader: Reader, tokens: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        for piece in tokens.split(4096, dim=1):
            reader.read(piece)

    return work


def measure(model: LlamaForCausalLM, positions: list[int], rounds: int) -> list[dict[str, Any]]:
    rows = []
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (1, max(positions)), generator=draw)
    for name, middle in CASES.items():
        plain, back, at = Reader(model, "dropped"), Reader(model, middle), 0
        for position in positions:
            piece = tokens[:, at:position]
            spent = [seconds(reading(each, piece)) for each in (back, plain)]
            cost = paired(back.steps, plain.steps, rounds=rounds)
            at = position
            rows.append(
                {
                    "case": name,
                    "position": position,
                    "milliseconds": 1000 * cost["first_seconds"] / STEPS,
                    "plain_milliseconds": 1000 * cost["second_seconds"] / STEPS,
                    "ratio": cost["ratio"],
                    "ratio_range": cost["ratio_range"],
                    "reading": {"tokens": piece.shape[1], "seconds": spent[0], "plain": spent[1]},
                    "bytes": back.bytes(),
                    "plain_bytes": plain.bytes(),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 8192, 32_768])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch_threads(options.threads), torch.inference_mode():
        rows = measure(model, options.positions, options.rounds)
        about = {"layers": 2, "heads": 4, "head_dim": 64, "window": WINDOW, "sinks": SINKS}
        save("lminfinite_middle", {**about, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
