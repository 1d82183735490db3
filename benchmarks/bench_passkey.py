"""Passkey retrieval by a small model that can do it: accuracy by length, depth and way to read.

    python -m benchmarks.bench_passkey --work WORK

Perplexity does not show what a window forgets, and small models trained on stories cannot copy a
number. So this trains one that can: a Llama of 0.3 M parameters that never reads more than 256
tokens. What it learns is the task itself (`memlm.data.passkey`), with another key in every prompt:
first short prompts, then all lengths up to 256 tokens, always at any depth. Only digits that can be
copied are scored: the second mention of the key, and the answer.

Then keys are asked for at up to 16 times that length: by the model as it is, and by a plain window,
LM-Infinite, and LM-Infinite whose second layer also sees middle tokens: the 5 that score highest,
those by the paper's rule (for the last query of a forward pass alone), or blocks of 16. All have a
window of the trained length.

Training and measurements are kept in ``--work``, so the same command goes on where it was stopped.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import RESULTS, save
from memlm.core.files import read_json, write_json
from memlm.core.threads import torch_threads
from memlm.data.documents import read_documents
from memlm.data.passkey import INSTRUCTION, QUESTION, SENTENCES, exact_passkeys
from memlm.evaluation.passkey import PasskeyConfig, PasskeyPoint, PasskeyResult, measure_passkey
from memlm.evaluation.passkey import plot as plot_maps
from memlm.evaluation.report import plain
from memlm.models.extend import extended
from memlm.ops.middle_rule import MiddleConfig
from memlm.training.config import RunConfig
from memlm.training.folder import SUMMARY
from memlm.training.loop import train
from memlm.training.model_loss import ModelLoss
from memlm.training.order import InTurn
from memlm.training.tokenizer import train_tokenizer

TRAINED, SINKS, ANSWER = 256, 4, 8
LONGEST = TRAINED - ANSWER  # prompt that leaves room for its answer
METHODS: dict[str, dict[str, Any] | None] = {
    "vanilla": None,
    "window": {"sinks": 0},
    "lm-infinite": {"sinks": SINKS},
    "lm-infinite, top-5": {
        "sinks": SINKS,
        "middle": MiddleConfig(k=5, block=1, first_layer=1),
    },
    "lm-infinite, top-5, last query": {
        "sinks": SINKS,
        "middle": MiddleConfig(k=5, block=1, first_layer=1, rule="last"),
    },
    "lm-infinite, 1 block of 16": {
        "sinks": SINKS,
        "middle": MiddleConfig(k=16, block=16, first_layer=1),
    },
    "lm-infinite, 4 blocks of 16": {
        "sinks": SINKS,
        "middle": MiddleConfig(k=64, block=16, first_layer=1),
    },
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
IGNORED = -100


class Stage(NamedTuple):
    """One part of the curriculum: blocks of so many tokens, rows per step, steps."""

    name: str
    length: int
    rows: int
    steps: int


STAGES = (Stage("short", 96, 48, 250), Stage("long", TRAINED, 16, 250))


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Words of the task are tokens, and so is every digit."""
    words = [INSTRUCTION, QUESTION, *SENTENCES, "The pass key is. Remember it. is the pass key."]
    return train_tokenizer(read_documents([" ".join(words)] * 4), 512, exact=False)


class Passkeys(Dataset):
    """Prompts with their answers, of all lengths that fit into a block and at all depths."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int):
        self.tokenizer, self.length, self.seed = tokenizer, length, seed

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = np.random.default_rng([self.seed, number])
        length = int(draw.integers(self.length * 3 // 4, self.length - ANSWER))
        depth, seed = float(draw.random()), int(draw.integers(1, 2**31))
        (prompt,) = exact_passkeys(self.tokenizer, length, depth, 1, seed=seed)
        answer = self.tokenizer.encode(f" {prompt.key}.", add_special_tokens=False)
        inputs = torch.zeros(self.length, dtype=torch.long)
        inputs[: length + len(answer)] = torch.tensor([*prompt.tokens, *answer])
        labels = torch.full_like(inputs, IGNORED)
        digits = torch.tensor(self.tokenizer.encode(prompt.key, add_special_tokens=False))
        _, second, _ = torch.where((inputs.unfold(0, len(digits), 1) == digits).all(1))[0].tolist()
        for places in (slice(second, second + len(digits)), slice(length, length + len(answer))):
            labels[places] = inputs[places]
        return {"input_ids": inputs, "labels": labels}


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}


def trained(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model after all stages; those that are there already are loaded."""
    torch.manual_seed(options.seed)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TRAINED,
            tie_word_embeddings=True,
            **cast(Any, ids),
        )
    )
    for number, stage in enumerate(STAGES):
        config = RunConfig(
            block_length=stage.length,
            batch_tokens=stage.rows * stage.length,
            optimizer="muon",
            weight_decay=0.0,
            max_steps=stage.steps,
            warmup_steps=20,
            save_every=100,
            precision="float32",
            device="cpu",
            seed=options.seed,
        )
        model = train(
            ModelLoss(model),
            Passkeys(tokenizer, stage.length, 100 * options.seed + number),
            InTurn(config.rows, PartialState(cpu=True).num_processes),
            config,
            options.work / stage.name,
            collate=collate,
            identity={"stage": list(stage), "stages_before": [list(x) for x in STAGES[:number]]},
            save_beside=tokenizer.save_pretrained,
            resume=True,
        )
    return model


def way(model: PreTrainedModel, method: str) -> AbstractContextManager[PreTrainedModel]:
    settings = METHODS[method]
    return nullcontext(model) if settings is None else extended(model, window=TRAINED, **settings)


def measure(options: argparse.Namespace) -> dict[str, PasskeyResult]:
    tokenizer = make_tokenizer()
    model = trained(options, tokenizer)
    results = {}
    for method in options.methods:
        points = []
        for length in options.lengths:
            config = PasskeyConfig((length,), DEPTHS, options.samples, seed=0)
            place = options.work / f"{method}-{length}-{options.samples}.json"
            if not place.exists():
                with way(model, method) as ready:
                    found = measure_passkey(ready, tokenizer, config)
                write_json(place, found.to_dict())
            points += [
                PasskeyPoint(*(row[name] for name in PasskeyPoint._fields))
                for row in read_json(place)["points"]
            ]
        whole = PasskeyConfig(tuple(options.lengths), DEPTHS, options.samples, seed=0)
        results[method] = PasskeyResult(whole, tuple(points))
        print(method, plain(results[method].table()), sep="\n", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder to go on in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[LONGEST, *(TRAINED * n for n in (2, 4, 8, 16))]
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    with torch_threads(options.threads):
        results = measure(options)
    stages = [read_json(options.work / stage.name / SUMMARY) for stage in STAGES]
    save(
        "passkey",
        {
            "trained_length": TRAINED,
            "window": TRAINED,
            "sinks": SINKS,
            "training": {
                stage.name: {
                    "parameters": run["parameters"],
                    "steps": stage.steps,
                    "rows": stage.rows,
                    "length": stage.length,
                    "loss": run["curve"][-1]["loss"],
                    "seconds": run["seconds"],
                }
                for stage, run in zip(STAGES, stages, strict=True)
            },
            "methods": {method: result.to_dict() for method, result in results.items()},
        },
    )
    plot_maps(results, str(RESULTS / "passkey.svg"))


if __name__ == "__main__":
    main()
