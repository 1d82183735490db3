"""Per-token scores of TRIME's evaluation command: local, long and external memory, and mixtures.

Compared with the recorded scores without the defect of band-relative padding ("fixed"). The runs
with a quantised index are answered from the recorded searches.
"""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trime_models import UNITS, load_model, options_of, read_args

from memlm.core.merges import Mixture, Union
from memlm.core.types import SearchResult
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import BlockWindows
from memlm.evaluation.perplexity import evaluate
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.store.arrays import save_arrays

EOS = 2


def corpus_of(recorded, samples):
    """The text behind the scored tokens, after the end-of-sentence token fairseq begins with."""
    tokens = torch.cat([recorded[f"{n}.0.tokens"] for n in range(samples)]).numpy()
    ends = np.flatnonzero(tokens == EOS) + 2
    tokens = np.concatenate([[EOS], tokens])
    ends = ends[ends < len(tokens)]
    return TokenCorpus.from_tokens(tokens, np.array([0, *ends, len(tokens)]))


class Replay:
    """An index that answers with the searches that were recorded, in their order."""

    metric = "ip"

    def __init__(self, entries, recorded, samples):
        self.entries = entries
        self.answers = [
            [self._scored(recorded, number, part) for number in range(samples)]
            for part in ("dists", "ids")
        ]
        self.place = 0

    @staticmethod
    def _scored(recorded, number, part):
        """Of the scored positions: recorded for the interpolation, else the end of all."""
        found = recorded.get(f"{number}.knn1.{part}", recorded[f"{number}.knn0.{part}"])
        return found[-len(recorded[f"{number}.0.tokens"]) :]

    def __len__(self):
        return self.entries

    def search(self, queries, k):
        scores, ids = (torch.cat(part) for part in self.answers)
        here = slice(self.place, self.place + len(queries))
        self.place += len(queries)
        return SearchResult(scores[here, :k], ids[here, :k].long())

    def describe(self):
        return {"engine": "recorded"}


def memories(options, dim, external):
    """The union of the memories that a run uses."""
    temperature = float(options["softmax-temp"]) * dim**0.5
    members = []
    if "use-local" in options:
        members.append(LocalMemory(size=1 << 20, temperature=temperature))
    # with size 0 it says nothing, but has windows read in the order of the text, as recorded
    size = int(options["mem-size"]) if "use-long" in options else 0
    members.append(LongMemory(size=size, temperature=temperature, overlap="twice"))
    if "use-external" in options:
        members.append(external(temperature))
    return Together(*members)


def score(folder, name, run, tmp_path):
    """Our scores of a run's tokens."""
    args, options = read_args(folder), options_of(run["argv"])
    recorded, samples = load_file(folder / f"{name}.safetensors"), len(run["samples"])
    context = int(options["context-window"])
    windows = BlockWindows(
        block=args["tokens_per_sample"] - context,
        context=context,
        unit=UNITS[options["sample-break-mode"]],
    )
    model, settings = load_model(folder), {}
    if options["mode"] != "lm":
        dim, stored = args["decoder_embed_dim"], np.load(folder / "dstore.npz")
        keys, values = (torch.from_numpy(stored[part]) for part in ("keys", "vals"))
        store = save_arrays(tmp_path / name, keys, values.flatten(), metric="ip")

        def external(temperature):
            flat = "flat" in str(options["indexfile"])
            index = "exact" if flat else Replay(len(store), recorded, samples)
            return KnnMemory(store, k=int(options["k"]), temperature=temperature, index=index)

        settings = {"memory": memories(options, dim, external), "merge": Union()}
        if "use-interp" in options:
            second = external(float(options["interp-temp"]))
            settings["interpolate"] = (second, Mixture(float(options["lmbda"])))
        if options["mode"] == "li":
            lam = re.search(r"cache_lmbda ([\d.]+\d)", (folder / "README.md").read_text())
            settings["merge"] = Mixture(float(lam[1]))
    return evaluate(
        model,
        corpus_of(recorded, samples),
        windows,
        carry="window",
        keep_tokens=True,
        progress=False,
        **settings,
    )


def test_every_run(golden_trime_e2e_eval, tmp_path):
    folder = golden_trime_e2e_eval
    for name, run in json.loads((folder / "summary.json").read_text())["runs"].items():
        if not (folder / f"{name}.safetensors").exists():
            continue
        result = score(folder, name, run, tmp_path)
        recorded, ending = load_file(folder / f"{name}.safetensors"), ".0.scores"
        if (fixed := folder / f"{name}.fixed_scores.safetensors").exists():
            recorded, ending = load_file(fixed), ".0"
        samples = range(len(run["samples"]))
        expected = torch.cat([recorded[f"{n}{ending}"] for n in samples])
        # a cache without past says nothing; the original then looks at the future
        skipped = 1 if options_of(run["argv"])["mode"] == "li" else 0
        found = torch.from_numpy(result.token_log_probabilities).float()
        torch.testing.assert_close(
            found[skipped:], expected[skipped:], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n} {m}"
        )
        assert sum(result.documents.tokens) == run["count"]
        if not skipped:
            wanted = run.get("perplexity_fixed", run["perplexity"])
            assert result.perplexity == pytest.approx(wanted, rel=1e-4)
