"""Checkpoints of the TUPE authors' code (and of RoBERTa in the same fairseq) become TUPE models.

What a checkpoint is, is read from its tensors: width, layers, vocabulary, positions, classes, the
relative part, the norms. The number of heads is the bucket table's width; without one it must be
known from the run's arguments or be given. Every name is accounted for in a report; a checkpoint of
another scheme than the one asked for is an error, where the authors' code loads what fits and stays
silent. fairseq's fused projections are split in three, its copy of the tied matrix is compared and
dropped, and rows 0 and 1 of a baseline's position table, which no token uses, are left out. The
vocabulary is not in a checkpoint: `TupeImport.tokenizer` makes it of the authors' two files.
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
from memlm.models.tupe.config import TupeConfig, with_labels
from memlm.models.tupe.heads import TupeForMaskedLM, TupeForSequenceClassification
from memlm.models.tupe.tokenizer import TupeTokenizer

_POSITIONS = "tupe.position_bias."
_LAYER = r"layers\.(\d+)\."
_BODY = (
    (r"embed_tokens\.weight", "tupe.embeddings.word_embeddings.weight"),
    (r"embed_positions\.weight", "tupe.embeddings.position_embeddings.weight"),
    (r"emb_layer_norm\.(weight|bias)", r"tupe.embeddings.layer_norm.\1"),
    (r"emb_out_layer_norm\.(weight|bias)", r"tupe.final_norm.\1"),
    (r"pos\.weight", _POSITIONS + "positions.weight"),
    (r"pos_ln\.(weight|bias)", _POSITIONS + r"layer_norm.\1"),
    (r"pos_q_linear\.(weight|bias)", _POSITIONS + r"query.\1"),
    (r"pos_k_linear\.(weight|bias)", _POSITIONS + r"key.\1"),
    (r"relative_attention_bias\.weight", _POSITIONS + "relative.weight"),
    (_LAYER + r"self_attn\.q_proj\.(weight|bias)", r"tupe.layers.\1.attention.query.\2"),
    (_LAYER + r"self_attn\.k_proj\.(weight|bias)", r"tupe.layers.\1.attention.key.\2"),
    (_LAYER + r"self_attn\.v_proj\.(weight|bias)", r"tupe.layers.\1.attention.value.\2"),
    (_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"tupe.layers.\1.attention.output.\2"),
    (_LAYER + r"self_attn_layer_norm\.(weight|bias)", r"tupe.layers.\1.attention_norm.\2"),
    (_LAYER + r"fc1\.(weight|bias)", r"tupe.layers.\1.expand.\2"),
    (_LAYER + r"fc2\.(weight|bias)", r"tupe.layers.\1.contract.\2"),
    (_LAYER + r"final_layer_norm\.(weight|bias)", r"tupe.layers.\1.output_norm.\2"),
)
_LM_HEAD = (
    (r"(dense|layer_norm)\.(weight|bias)", r"lm_head.\1.\2"),
    (r"bias", "lm_head.decoder.bias"),
)
_FUSED = re.compile(_LAYER + r"self_attn\.in_proj_(weight|bias)")
_HEAD = re.compile(r"classification_heads\.([^.]+)\.(dense|out_proj)\.(weight|bias)")
_ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "tanh": "tanh",
    "linear": "linear",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class TupeImport:
    """A checkpoint, read.

    Attributes:
        config: the model's shape.
        state: tensors under memlm's names; heads under ``classifier.``, keyed in ``heads``.
        heads: classification heads by name.
        report: every name of the checkpoint and what became of it, in order.
    """

    config: TupeConfig
    state: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    report: tuple[tuple[str, str], ...]

    def masked_lm(self) -> TupeForMaskedLM:
        """The model with its language-model head."""
        return _filled(TupeForMaskedLM(self.config), self.state)

    def classifier(
        self, head: str = "sentence_classification_head"
    ) -> TupeForSequenceClassification:
        """The model with one of its classification heads.

        Raises:
            InputError: if the checkpoint has no such head.
        """
        if head not in self.heads:
            found = ", ".join(self.heads) or "none"
            raise InputError(f"the checkpoint must have the head {head!r}, it has: {found}")
        tensors = self.heads[head]
        body = {name: value for name, value in self.state.items() if name.startswith("tupe.")}
        config = with_labels(self.config, len(tensors["classifier.out_proj.weight"]))
        return _filled(TupeForSequenceClassification(config), {**body, **tensors})

    def tokenizer(self, dictionary: str | Path, codes: str | Path) -> TupeTokenizer:
        """The checkpoint's tokenizer, of the files that its training was prepared with.

        Args:
            dictionary: ``dict.txt``.
            codes: ``bpe-code``, the codes of fastBPE.

        Raises:
            CorruptStoreError: if a file is missing or damaged.
            InputError: if the dictionary has another number of words than the checkpoint.
        """
        made = TupeTokenizer(
            str(dictionary), str(codes), model_max_length=self.config.max_position_embeddings
        )
        check(
            len(made.dictionary) == self.config.vocab_size,
            f"the dictionary must have the checkpoint's {self.config.vocab_size} words, special "
            f"ones and <mask> included, but {dictionary} has {len(made.dictionary)}; give the one "
            "that it was trained with",
        )
        return made

    def describe(self) -> str:
        """One line per name of the checkpoint."""
        width = max(len(source) for source, _ in self.report)
        return "\n".join(f"{source:<{width}}  {target}" for source, target in self.report)


def read_state(
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any] | None = None,
    *,
    scheme: str | None = None,
    heads: int | None = None,
) -> TupeImport:
    """Map a state dictionary of the authors' code.

    Args:
        state: names as in the checkpoint's ``model``.
        arguments: of the run that made it (``args``): heads, activation, dropout.
        scheme: that the checkpoint must be of; None takes what it is.
        heads: number of attention heads, if neither the tensors nor ``arguments`` tell.

    Raises:
        InputError: for an unknown or missing name, a scheme that is not the one asked for, or heads
            that cannot be known.
    """
    arguments = arguments or {}
    names = {name: name.removeprefix("decoder.") for name in state}
    plain = {short: state[name] for name, short in names.items()}
    config = _config(plain, arguments, heads)
    found = config.position_scheme.name
    check(
        scheme is None or scheme == found,
        f"the checkpoint must be of scheme {scheme!r} but is of {found!r}; import it as that",
    )
    mapped: dict[str, Tensor] = {}
    classifiers: dict[str, dict[str, Tensor]] = {}
    report = []
    for name, short in names.items():
        value = state[name].float() if state[name].is_floating_point() else state[name]
        if short == "lm_head.weight":
            check(
                torch.equal(state[name], plain["sentence_encoder.embed_tokens.weight"]),
                f"{name} must equal the word embeddings it is tied to, but differs",
            )
            mapped["lm_head.decoder.weight"] = value
            target = "tied to tupe.embeddings.word_embeddings.weight"
        elif head := _HEAD.fullmatch(short):
            target = f"classifier.{head[2]}.{head[3]}"
            classifiers.setdefault(head[1], {})[target] = value
        elif fused := _FUSED.fullmatch(short.removeprefix("sentence_encoder.")):
            target = f"tupe.layers.{fused[1]}.attention.{{query,key,value}}.{fused[2]}"
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                mapped[target.replace("{query,key,value}", part)] = chunk.contiguous()
        else:
            target = _target(name, short)
            mapped[target] = value[2:] if target.endswith("position_embeddings.weight") else value
        report.append((name, target))
    return TupeImport(config, mapped, classifiers, tuple(report))


def read_tupe_checkpoint(
    path: str | Path, *, scheme: str | None = None, heads: int | None = None
) -> TupeImport:
    """Read a checkpoint file of the authors' code; nothing in it is executed.

    Args:
        path: of the ``.pt`` file.
        scheme: that it must be of; None takes what it is.
        heads: number of attention heads, if the file does not tell.

    Raises:
        InputError: from `read_state`, or if the file names something that is not admitted.
        CorruptStoreError: if it is missing or damaged.
    """
    found = read_checkpoint(path)
    return read_state(found.tensors, found.settings, scheme=scheme, heads=heads)


def _target(name: str, short: str) -> str:
    for prefix, rules in (("sentence_encoder.", _BODY), ("lm_head.", _LM_HEAD)):
        for pattern, target in rules:
            if short.startswith(prefix) and (
                match := re.fullmatch(pattern, short.removeprefix(prefix))
            ):
                return match.expand(target)
    raise InputError(f"the checkpoint must hold a TUPE or RoBERTa encoder, got the tensor {name}")


def _config(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], heads: int | None
) -> TupeConfig:
    body = {
        name.removeprefix("sentence_encoder."): value
        for name, value in state.items()
        if name.startswith("sentence_encoder.")
    }
    for needed in ("embed_tokens.weight", "layers.0.fc1.weight"):
        check(needed in body, f"the checkpoint must hold sentence_encoder.{needed}, it does not")
    vocabulary, width = body["embed_tokens.weight"].shape
    relative = body.get("relative_attention_bias.weight")
    untied = "pos.weight" in body
    positions = "pos.weight" if untied else "embed_positions.weight"
    check(
        positions in body,
        "the checkpoint must hold positions, it has neither pos nor embed_positions",
    )
    given = heads or arguments.get("encoder_attention_heads")
    if relative is not None:
        known = relative.shape[1]
        check(
            given in (None, known),
            f"the number of heads must be the bucket table's {known}, got {given}",
        )
        given = known
    check(given is not None, "the number of attention heads is not in the checkpoint; pass heads=")
    activations = {
        "hidden_act": str(arguments.get("activation_fn", "gelu")),
        "classifier_act": str(arguments.get("pooler_activation_fn", "tanh")),
    }
    for one in activations.values():
        check(one in _ACTIVATIONS, f"activations must be known, got {one!r}")
    dropouts = {
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "activation_dropout": "activation_dropout",
        "classifier_dropout": "pooler_dropout",
    }
    settings: dict[str, Any] = {
        ours: float(arguments[theirs]) for ours, theirs in dropouts.items() if theirs in arguments
    }
    settings |= {name: _ACTIVATIONS[one] for name, one in activations.items()}
    return TupeConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=1 + max(int(m[1]) for n in body if (m := re.match(_LAYER, n))),
        num_attention_heads=int(given or 0),
        intermediate_size=len(body["layers.0.fc1.weight"]),
        max_position_embeddings=len(body[positions]) - (1 if untied else 2),
        scheme=("tupe-r" if relative is not None else "tupe-a") if untied else "bert-a",
        embedding_norm="emb_layer_norm.weight" in body,
        norm_first="emb_out_layer_norm.weight" in body,
        **settings,
    )


def _filled(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Load every tensor; both directions must fit."""
    missing, unknown = model.load_state_dict(dict(state), strict=False)
    check(
        not unknown and not missing,
        f"the checkpoint must fit the model; it lacks {missing or 'nothing'} and has "
        f"{unknown or 'nothing'} besides",
    )
    model.tie_weights()
    return model.eval()
