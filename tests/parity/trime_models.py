"""TRIME's recorded models and runs as ours, and what its criteria make of some targets."""

import json

import torch
from safetensors.torch import load_file

from memlm.core.types import TargetPartial
from memlm.importers.adaptive import convert

PAD = 1


UNITS = {"none": "stream", "complete": "lines", "eos": "line"}
# of the evaluation command, where a run does not say otherwise
DEFAULTS = {
    "context-window": "0",
    "sample-break-mode": "none",
    "mode": "gn",
    "softmax-temp": "1.0",
    "mem-size": "0",
    "k": "1024",
    "interp-temp": "1.0",
    "lmbda": "0.0",
}


def options_of(argv):
    """``--name value`` and ``--flag`` of an evaluation as a dictionary."""
    found, name = dict(DEFAULTS), None
    for word in argv:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = True
        elif name is not None:
            found[name] = word
    return found


def read_args(folder):
    return json.loads((folder / "args.json").read_text())


def load_model(folder):
    """The model of a case, in evaluation mode."""
    return load_named(folder)[0]


def load_named(folder):
    """The model of a case, and the name in it of every tensor that was recorded."""
    model, report = convert(read_args(folder), load_file(folder / "model.safetensors"))
    return model, report.renamed


class OriginalHead:
    """A head as TRIME's criteria read it: two kinds of targets cost nothing.

    Padding, and in every band after the first the word whose number *in the band* is that of
    padding: its probability inside the band is left out.
    """

    def __init__(self, head):
        self.head, self.bands = head, head.projection.bands

    def target(self, hidden, targets):
        said = self.head.target(hidden, targets)
        own = torch.where(targets == PAD, said.lse, said.target_lse)
        for number, band in enumerate(self.bands[1:]):
            classes = self.head.projection.classes(hidden)[:, number]
            own = torch.where(targets == band.begin + PAD, classes, own)
        return TargetPartial(said.lse, own)
