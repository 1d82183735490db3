"""Language models of fairseq become `AdaptiveForCausalLM`, and the other way.

``transformer_lm`` of any preset: the adaptive ones of TRIME, kNN-LM and Baevski and Auli (2019),
and the plain ones, tied or untied. Names of old versions (``in_proj_weight``, ``layer_norms.0``)
and of new ones (``output_projection``) are known. Every tensor is accounted for: it becomes one of
ours, is a copy of one that is tied (and must equal it), or is a buffer without meaning. Anything
left over or missing is an error, where fairseq loads what fits.

A projection into a band of the softmax is stored ``(dim, width)`` where it is the input's, and
``(width, dim)`` where it is not; with a factor of 1 only the setting says which.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.formats.checkpoints import read_checkpoint
from memlm.formats.dictionary import Dictionary, read_dictionary
from memlm.importers.adaptive_settings import PREFIX, config_of, settings_of
from memlm.models.adaptive.config import AdaptiveConfig
from memlm.models.adaptive.decoder import AdaptiveForCausalLM

_BUFFER = re.compile(r"(.*\.)?(_float_tensor|version)")
_FUSED = re.compile(r"(layers\.\d+\.self_attn\.)in_proj_(weight|bias)")
_LAYER = r"layers\.(\d+)\."
_NAMES = (
    (r"embed_tokens\.weight", "model.embed_tokens.weight"),
    (r"embed_tokens\.embeddings\.(\d+)\.0\.weight", r"model.embed_tokens.tables.\1.weight"),
    (r"embed_tokens\.embeddings\.(\d+)\.1\.weight", r"model.embed_tokens.projections.\1.weight"),
    (
        _LAYER + r"self_attn\.([qkv]|out)_proj\.(weight|bias)",
        r"model.layers.\1.self_attn.\2_proj.\3",
    ),
    (
        _LAYER + r"(?:self_attn_layer_norm|layer_norms\.0)\.(weight|bias)",
        r"model.layers.\1.self_attn_layer_norm.\2",
    ),
    (
        _LAYER + r"(?:final_layer_norm|layer_norms\.2)\.(weight|bias)",
        r"model.layers.\1.ffn_layer_norm.\2",
    ),
    (_LAYER + r"fc([12])\.(weight|bias)", r"model.layers.\1.fc\2.\3"),
    (r"layer_norm\.(weight|bias)", r"model.norm.\1"),
    (r"embed_out|output_projection\.weight", "lm_head.weight"),
    (r"adaptive_softmax\.head\.word_proj\.weight", "lm_head.tables.0.weight"),
    (r"adaptive_softmax\.head\.class_proj\.weight", "lm_head.classes.weight"),
    (r"adaptive_softmax\.tail\.(\d+)\.0\.weight", r"lm_head.projections.\1.weight"),
)
_TAIL_TABLE = re.compile(r"adaptive_softmax\.tail\.(\d+)\.2\.weight")


@dataclass(frozen=True)
class KeyReport:
    """What became of every tensor of a checkpoint.

    Attributes:
        renamed: fairseq's name to ours.
        tied: names of copies of tied tensors, all equal to what they copy.
        ignored: names of buffers without meaning.
    """

    renamed: dict[str, str]
    tied: list[str]
    ignored: list[str]

    def __str__(self) -> str:
        return (
            f"{len(self.renamed)} tensors taken over, {len(self.tied)} copies of tied ones, "
            f"{len(self.ignored)} buffers ignored"
        )


def convert(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[AdaptiveForCausalLM, KeyReport]:
    """Make a model of a checkpoint's settings and tensors.

    Args:
        settings: of the checkpoint.
        tensors: by fairseq's names; the model keeps the dtype that most of them have.

    Raises:
        InputError: if a tensor is left over, missing, of another shape, or differs from the one
            that it is tied to.
    """
    config = config_of(settings, tensors)
    dtype = next((t.dtype for name, t in tensors.items() if "fc1.weight" in name), torch.float32)
    with torch.random.fork_rng(devices=[]):
        model: AdaptiveForCausalLM = AdaptiveForCausalLM(config).to(dtype)  # type: ignore[call-arg]
    tied = dict(model.all_tied_weights_keys)
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    ignored, unknown = [], []
    for name, tensor in _split(tensors).items():
        own = _own_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if _BUFFER.fullmatch(name) or (not config.final_norm and own in _norm_names()):
            ignored.append(name)
        elif own == "lm_head.classes.weight" and not tensor.numel():
            ignored.append(name)  # one band has no classes
        elif own is None or own not in wanted:
            unknown.append(name)
        else:
            turned = own.startswith("lm_head.projections.") and own not in tied
            found[own] = tensor.T if turned else tensor
            renamed[name] = own
    missing = sorted(name for name in wanted if name not in found and name not in tied)
    _refuse(unknown, missing, found, wanted)
    copies = [name for name, own in renamed.items() if own in tied]
    for name in copies:
        own = renamed.pop(name)
        check(
            torch.equal(found[own], found[tied[own]]),
            f"{name} must equal the tensor that the settings tie it to, but differs; the settings "
            "do not belong to these weights",
        )
    model.load_state_dict(found, strict=False)
    model.tie_weights()
    return model.eval(), KeyReport(renamed, copies, ignored)


def import_model(
    path: str | Path, out: str | Path, *, dictionary: str | Path | None = None
) -> KeyReport:
    """Make a model folder of a fairseq checkpoint.

    Args:
        path: of the ``.pt`` file.
        out: folder to write: configuration, weights, and a tokenizer if there is a dictionary.
        dictionary: of the training; None: ``dict.txt`` beside the checkpoint, if it is there.

    Raises:
        InputError: if the checkpoint is of another kind of model, or the dictionary of another
            vocabulary.
        CorruptStoreError: if a file is missing or damaged.
    """
    checkpoint = read_checkpoint(path)
    model, report = convert(checkpoint.settings, checkpoint.tensors)
    words = _dictionary(checkpoint.path, dictionary)
    if words is not None:
        check(
            len(words) == model.config.vocab_size,
            f"the dictionary must have the model's {model.config.vocab_size} words, got "
            f"{len(words)}; give the one the model was trained with",
        )
        words.tokenizer().save_pretrained(out)
    model.save_pretrained(out)
    return report


def export_model(model: AdaptiveForCausalLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors under fairseq's names, tied tensors under each of theirs.

    Args:
        model: any of this class.

    Returns:
        ``args`` as a dictionary, and ``model`` of a checkpoint that fairseq 0.9 or later loads.
    """
    config = model.config
    tied = model.all_tied_weights_keys
    names = {own: name for name, own in _foreign_names(config).items()}
    tensors = {
        f"{PREFIX}version": torch.tensor([3.0]),
        f"{PREFIX}embed_positions._float_tensor": torch.zeros(1),
    }
    for own, tensor in model.state_dict().items():
        turned = own.startswith("lm_head.projections.") and own not in tied
        tensors[PREFIX + names[own]] = (tensor.T if turned else tensor).contiguous()
    if config.output_cutoffs is not None:
        tensors[f"{PREFIX}adaptive_softmax.version"] = torch.tensor([1])
        tensors[f"{PREFIX}adaptive_softmax.head._float_tensor"] = torch.zeros(1)
        empty = torch.zeros(0, config.hidden_size)
        tensors.setdefault(f"{PREFIX}adaptive_softmax.head.class_proj.weight", empty)
    elif config.tie_word_embeddings:
        del tensors[f"{PREFIX}{names['lm_head.weight']}"]
    if config.input_cutoffs is not None:
        tensors[f"{PREFIX}embed_tokens._float_tensor"] = torch.zeros(1)
    return settings_of(config), tensors


def _foreign_names(config: AdaptiveConfig) -> dict[str, str]:
    """Every name that a checkpoint of fairseq 0.9 has for this configuration, with ours."""
    names = [
        "embed_tokens.weight",
        "embed_out",
        "layer_norm.weight",
        "layer_norm.bias",
        "adaptive_softmax.head.word_proj.weight",
        "adaptive_softmax.head.class_proj.weight",
    ]
    for band in range(len(config.input_bands)):
        names += [f"embed_tokens.embeddings.{band}.{part}.weight" for part in (0, 1)]
    for band in range(len(config.output_bands) - 1):
        names += [f"adaptive_softmax.tail.{band}.{part}.weight" for part in (0, 2)]
    parts = [f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")]
    parts += ["self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    for layer in range(config.num_hidden_layers):
        names += [f"layers.{layer}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return {name: str(_own_name(name)) for name in names}


def _own_name(name: str) -> str | None:
    """Ours for a name without its prefix, None if there is none."""
    if table := _TAIL_TABLE.fullmatch(name):
        return f"lm_head.tables.{int(table[1]) + 1}.weight"
    for pattern, own in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, own, name)
    return None


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With fused projections of old versions cut into queries, keys and values."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name.removeprefix(PREFIX))
        if fused is None:
            split[name] = tensor
            continue
        check(
            len(tensor) % 3 == 0,
            f"{name} must hold queries, keys and values, got shape {tuple(tensor.shape)}",
        )
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            split[f"{PREFIX}{fused[1]}{part}_proj.{fused[2]}"] = piece
    return split


def _refuse(
    unknown: list[str], missing: list[str], found: dict[str, Tensor], wanted: dict[str, Tensor]
) -> None:
    if unknown or missing:
        raise InputError(
            "the tensors of a checkpoint must be those of the model that its settings describe, "
            f"but {len(unknown)} are left over {unknown[:5]} and {len(missing)} are missing "
            f"{missing[:5]}; the settings do not belong to these weights"
        )
    for name, tensor in found.items():
        check(
            tensor.shape == wanted[name].shape,
            f"{name} must have shape {tuple(wanted[name].shape)} by the settings, got "
            f"{tuple(tensor.shape)}; the settings do not belong to these weights",
        )


def _norm_names() -> tuple[str, str]:
    return ("model.norm.weight", "model.norm.bias")


def _dictionary(checkpoint: Path, given: str | Path | None) -> Dictionary | None:
    if given is not None:
        return read_dictionary(given)
    beside = checkpoint.with_name("dict.txt")
    return read_dictionary(beside) if beside.is_file() else None
