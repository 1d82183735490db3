"""kNN-LM and RetoMaton on a language model of fairseq: text, store, and every trace of every run.

The original begins anew in every window and walks its scored tokens only. A step whose target is no
candidate has log-probability -10000 there and -inf here, which no mixture tells apart. With
``--min-knns 0`` nothing is ever proposed and the original still takes lam from the model; here the
model's word stands, and the test takes the same from it.
"""

import argparse
import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from walking import Walk, ragged

from memlm.core.types import TargetPartial
from memlm.data.windows import BlockWindows
from memlm.evaluation.passes import Rows, Stopwatch, plan_pass
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.formats.dictionary import read_dictionary
from memlm.formats.members import read_members
from memlm.importers.adaptive import convert
from memlm.importers.datastore import import_datastore
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex
from memlm.index.partition import Clusters
from memlm.memory.automaton import AutomatonMemory
from memlm.models.running import frozen
from memlm.ops.merge import mixture

UNITS = {"none": "stream", "complete": "lines", "eos": "line"}


def options_of(run):
    parser = argparse.ArgumentParser()
    numbers = {"k": 1024, "lmbda": 0.0, "probe": 8, "min-knns": 1, "context-window": 0}
    for name, default in numbers.items():  # the original's defaults
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--max-knns", type=int)
    parser.add_argument("--sample-break-mode", default="none")
    for name in ("indexfile", "members", "knn-sim-func"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--no-pointer", action="store_true")
    parser.add_argument("--remove-bpe", action="store_true")
    return parser.parse_known_args(run["args"])[0]


class Golden:
    """The files of one case folder as memlm objects."""

    def __init__(self, folder, scratch):
        self.folder = folder
        self.summary = json.loads((folder / "summary.json").read_text())
        self.runs = {
            name: run
            for name, run in self.summary.items()
            if isinstance(run, dict) and (folder / f"{name}.npz").exists() and "args" in run
        }
        tensors = load_file(folder / "model.safetensors")
        layers = {name.split(".")[2] for name in tensors if name.startswith("decoder.layers.")}
        heads = re.search(r"(\d+) heads", (folder / "README.md").read_text())
        assert heads, "only the README says how many heads there are"
        self.model, _ = convert(
            {
                "decoder_embed_dim": tensors["decoder.embed_tokens.weight"].shape[1],
                "decoder_ffn_embed_dim": len(tensors["decoder.layers.0.fc1.weight"]),
                "decoder_layers": len(layers),
                "decoder_attention_heads": int(heads[1]),
                "share_decoder_input_output_embed": "decoder.embed_out" not in tensors,
                "tokens_per_sample": self.summary["tokens_per_sample_model"],
            },
            tensors,
        )
        words = read_dictionary(folder)
        assert len(words) == self.model.config.vocab_size
        self.words = words.words
        self.corpora = {
            split: words.corpus((folder / f"{split}.txt").read_text().splitlines())
            for split in ("train", "valid")
        }
        self.store = import_datastore(
            folder,
            scratch / "store",
            entries=self.summary["dstore_size"],
            dim=self.model.config.hidden_size,
        )
        self.exact = ExactIndex(self.store.load_keys())

    def windows(self, options):
        context = options.context_window
        block = self.model.config.max_position_embeddings - context
        return BlockWindows(block, context, UNITS[options.sample_break_mode])

    def rows(self, windows):
        """The scored tokens of the validation text, in the order of the text."""
        with frozen(self.model):
            plan = plan_pass(
                self.model, self.corpora["valid"], windows, tap="ffn_input", batch_tokens=512
            )
            return Rows.join([scored.rows for scored in plan.run(Stopwatch(self.model.device))])

    def memory(self, options):
        flat = "flat" in options.indexfile
        index = self.exact
        if not flat:
            file = self.folder / options.indexfile.split("/")[-1]
            index = FaissIndex.from_file(file, nprobe=options.probe)
        clusters = None
        if options.members:
            name = options.members.split("/")[-1]
            members = read_members(self.folder / name)
            clusters = Clusters.from_members(members.offsets, members.members, len(self.store))
        none = torch.full((len(self.store),), -1)
        recomputed = options.knn_sim_func != "do_not_recomp_l2"
        return AutomatonMemory(
            self.store,
            k=options.k,
            min_knns=options.min_knns,
            max_knns=options.max_knns or options.k,
            clusters=clusters,
            multiplicity="legacy",
            successors=none if options.no_pointer else "all",
            scores="exact" if flat or recomputed else "index",
            index=index,
        )


class Visits:
    """The windows of a run in the order in which the original visited them."""

    def __init__(self, golden, rows, arrays):
        order = np.lexsort((rows.places, np.argsort(arrays["sample_id"])[rows.windows]))
        sizes = np.diff(arrays["tokens_off"])
        assert np.bincount(rows.windows)[arrays["sample_id"]].tolist() == sizes.tolist()
        chosen = torch.from_numpy(order)
        self.base = TargetPartial(*(part[chosen] for part in rows.base))
        self.queries, self.targets = rows.queries[chosen], rows.targets[chosen]
        self.begins = arrays["tokens_off"][:-1].tolist()
        assert self.targets.tolist() == arrays["tokens"].tolist()


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    made = {}

    def golden(folder):
        if folder not in made:
            made[folder] = Golden(folder, tmp_path_factory.mktemp("store"))
        return made[folder]

    return golden


@pytest.fixture
def golden(golden_retomaton_fairseq_lm, goldens):
    return goldens(golden_retomaton_fairseq_lm)


def test_text(golden):
    saved = np.load(golden.folder / "save_dstore.npz")
    for split, corpus in golden.corpora.items():
        assert corpus.tokens[1:].tolist() == saved[f"{split}_tokens"].tolist()
        lengths = np.diff(np.maximum(corpus.offsets, 1))
        assert lengths.tolist() == saved[f"{split}_lens"].tolist()


def test_the_datastore(golden, tmp_path):
    summary = golden.summary
    context = summary["context_window"]
    block = golden.model.config.max_position_embeddings - context
    built = build_datastore(
        golden.model,
        None,
        golden.corpora["train"],
        tmp_path / "built",
        windows=BlockWindows(block, context, "stream"),
        config=ExtractionConfig(tap="ffn_input", dtype="float16"),
    )
    skipped = len(built) - len(golden.store)
    assert skipped == -(-context // block) * block
    assert torch.equal(built.values[skipped:], golden.store.values)
    keys = built.load_keys()[skipped:].float()
    torch.testing.assert_close(keys, golden.store.load_keys().float(), atol=2e-3, rtol=0)


def test_the_datastore_of_single_lines(golden, tmp_path):
    """A line per window, as law-domain stores were made; there sorted by length, here in order."""
    file = golden.folder / "save_dstore_eos.npz"
    expected = np.load(file)
    built = build_datastore(
        golden.model,
        None,
        golden.corpora["train"],
        tmp_path / "lines",
        windows=BlockWindows(golden.model.config.max_position_embeddings, 0, "line"),
        config=ExtractionConfig(tap="ffn_input", dtype="float16"),
    )
    offsets = np.maximum(golden.corpora["train"].offsets, 1) - 1
    order = np.concatenate(
        [np.arange(offsets[line], offsets[line + 1]) for line in expected["sample_id"]]
    )
    np.testing.assert_array_equal(built.values.numpy()[order], expected["vals"])
    keys = built.load_keys().float().numpy()[order]
    np.testing.assert_allclose(keys, expected["keys"].astype(np.float32), atol=2e-3)


def test_the_model_alone_and_every_trace(golden):
    checked = 0
    for name, run in golden.runs.items():
        arrays, options = np.load(golden.folder / f"{name}.npz"), options_of(run)
        if name.startswith("save"):
            continue
        visits = Visits(golden, golden.rows(golden.windows(options)), arrays)
        base = TargetPartial(
            torch.zeros(len(visits.targets)), visits.base.target_lse - visits.base.lse
        )
        alone = arrays["lm_logprob" if "lm_logprob" in arrays else "positional_logprob"]
        np.testing.assert_allclose(base.target_lse, alone, atol=1e-4, err_msg=name)
        if "searched" in arrays:
            check_trace(golden.memory(options), visits, base, options, arrays, name)
            checked += 1
        check_printed(golden, run, arrays["positional_logprob"], options, name)
    assert checked


def check_printed(golden, run, log_probabilities, options, name):
    """What the program printed: perplexity per token, or per word where pieces are joined."""
    words = golden.words
    tokens = golden.corpora["valid"].tokens[1:]
    count = sum(not options.remove_bpe or not words[token].endswith("@@") for token in tokens)
    perplexity = math.exp(-log_probabilities.astype(np.float64).sum() / count)
    printed = re.search(r"Perplexity: ([\d.]+)", run["log_ppl"])
    assert printed, name
    assert perplexity == pytest.approx(float(printed[1]), abs=0.006, rel=3e-5), name


def check_trace(memory, visits, base, options, arrays, name):
    walk = Walk(memory, visits.queries, visits.targets, visits.begins)
    np.testing.assert_array_equal(walk.searched, arrays["searched"], name)
    differing = 0
    for kind, got in (("extended", walk.extended), ("knns", walk.knns)):
        for mine, expected in zip(got, ragged(arrays, kind), strict=True):
            # an entry may be left unfilled by the search; the original then keeps -1
            present = np.sort(expected[expected >= 0])
            assert len(mine) == len(present), name
            differing += not np.array_equal(np.sort(mine), present)
    # equal product codes may be cut in another order
    assert differing <= 0.01 * 2 * len(walk.knns), f"{name}: {differing} steps differ"
    followed, searches = int(arrays["lookup_history"].sum()), len(arrays["lookup_history"])
    assert walk.stats["searches"] == int(arrays["searched"].sum()), name
    if searches:
        expected = followed / (followed + searches)
        assert walk.stats["foss_legacy"] == pytest.approx(expected, abs=1e-12), name
    mixed = mixture(options.lmbda, base, walk.partial)
    got = mixed.target_lse - mixed.lse
    silent = torch.isneginf(walk.partial.lse)
    got = torch.where(silent, got + math.log1p(-options.lmbda), got).numpy()
    off = np.abs(got - arrays["positional_logprob"]) > 1e-4
    assert off.sum() <= differing, f"{name}: {np.flatnonzero(off)}"
    perplexity = float(np.exp(-got.astype(np.float64).mean()))
    assert perplexity == pytest.approx(
        float(np.exp(-arrays["positional_logprob"].astype(np.float64).mean())), rel=1e-4
    ), name
