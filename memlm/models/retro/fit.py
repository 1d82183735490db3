"""RETRO-fit: any causal language model learns to read neighbours, its own weights frozen.

    in front of layer l, for l in P:   x = x + tanh(gate) * cross-attention(norm x, neighbours)
    gate = 0 at first

(Borgeaud et al. 2022, section 4.2: only the encoder and the cross-attention are trained, so that
the model without retrieval stays what it was.) The gate is that of Flamingo (Alayrac et al. 2022,
section 2.2): training starts at the base model exactly, and the gate can be set by hand
(`RetroFitForCausalLM.gates`). The encoder reads neighbours through the base model's own table of
words, as the paper's retrofitted model does.

Differs from the paper: cross-attention stands in front of a layer, not between its attention and
its feed-forward, since that place differs from family to family (and parallel layers have none).

As with a memory (`memlm.models.attach`), the base model is a submodule and is not touched: hooks in
front of its layers live during one forward pass. Without neighbours the pass is the base model's
own, bit for bit. Everything else is RETRO's: chunks, encoder, cache and generation.
"""

import inspect
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, UnsupportedModelError
from memlm.core.files import write_atomic
from memlm.models.config import speak_for
from memlm.models.fingerprint import model_hash
from memlm.models.retro.blocks import find_blocks, in_front
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.decoder import CrossAttention
from memlm.models.retro.encoder import RetroEncoder
from memlm.models.retro.fit_config import RetroFitConfig, fit_settings
from memlm.models.retro.generation import RetrievingGeneration
from memlm.models.retro.grid import chunk_grid
from memlm.models.retro.layers import Residual, make_norm
from memlm.models.retro.model import initialize
from memlm.models.retro.packing import check_window, is_packed, packed_arguments, prove_packing
from memlm.models.retro.reading import Reading, neighbours_of
from memlm.models.retro.retriever import ChunkRetriever
from memlm.models.saved import load_base, write_base

WEIGHTS = "model.safetensors"


def retro_fit(model: PreTrainedModel, **settings: Any) -> "RetroFitForCausalLM":
    """Give a language model an encoder of neighbours and cross-attention to them, still closed.

    The new weights are drawn from torch's generator; they are float32, or wider if the model is.
    The model's own stop asking for gradients until ``detach``.

    Args:
        model: a causal language model whose layers can be reached; used as it is, never changed.
        settings: fields of `RetroConfig` for the new parts, such as ``chunk_size`` (64),
            ``cross_attention_layers`` (counted from 1; every third from 6, in small models the
            middle one), ``encoder_num_layers`` (2), ``encoder_hidden_size`` (the model's width).

    Raises:
        InputError: for a setting that the model decides, or one out of range.
        UnsupportedModelError: if the model has no ordinary layers or no cache of the usual kind.
    """
    check(
        not isinstance(model, RetrievingGeneration),
        f"the model must not read neighbours yet, got a {type(model).__name__}; train it as it is",
    )
    accepted = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or "past_key_values" not in accepted:
        raise UnsupportedModelError(
            f"RETRO-fit needs a decoder-only model with `past_key_values`, got "
            f"{type(model).__name__}; use a causal transformer language model"
        )
    retro = fit_settings(model.config.get_text_config(), **settings)
    return RetroFitForCausalLM.around(model, retro)


class Gated(nn.Module):
    """A sub-layer times ``tanh(gate)``; closed at first."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """As the sub-layer."""
        return torch.tanh(self.gate) * self.inner(x, *arguments)


class RetroFitForCausalLM(PreTrainedModel, RetrievingGeneration, GenerationMixin):  # type: ignore
    """A causal language model that reads neighbours. Make one with `retro_fit`.

    Attributes:
        base: the language model, frozen and always in evaluation mode.
        encoder: of neighbours.
        cross: cross-attention by number of layer, counted from 1.
    """

    config_class = RetroFitConfig
    base_model_prefix = "base"
    # the base model decides; these let its choice through
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    base: Any  # a PreTrainedModel; nn.Module's own annotations would hide its methods

    def __init__(self, config: RetroFitConfig):
        super().__init__(config)
        retro = self.retro
        self.encoder = RetroEncoder(retro)
        layers = retro.cross_attention_layers or ()
        self.cross = nn.ModuleDict({str(layer): _cross(retro, layer) for layer in layers})
        self.project: nn.Module = nn.Identity()
        self._blocks: list[nn.Module] = []
        self._packs = False
        self._asked_for_gradients: list[nn.Parameter] = []
        self.post_init()

    @property
    def retro(self) -> RetroConfig:
        """The settings of the new parts."""
        return self.config.retro  # type: ignore[return-value]

    @classmethod
    def around(cls, base: PreTrainedModel, retro: RetroConfig) -> Self:
        """New parts around a base model; `retro_fit` makes their settings.

        Raises:
            UnsupportedModelError: if the base model's layers cannot be reached.
        """
        reached = [layer - 1 for layer in retro.cross_attention_layers or ()]
        blocks = find_blocks(base, reached)
        model = cls(
            RetroFitConfig(
                text_config=base.config,
                retro=retro,
                dtype=base.dtype,
                attn_implementation=base.config._attn_implementation,
            )
        )
        with torch.no_grad():
            first = torch.zeros(1, 1, dtype=torch.long, device=base.device)
            width = int(base.get_input_embeddings()(first).shape[-1])  # type: ignore[operator]
        if width != retro.encoder_hidden_size:
            model.project = nn.Linear(width, retro.encoder_hidden_size, bias=False)
            nn.init.normal_(model.project.weight, std=retro.initializer_range)  # type: ignore
        wide = torch.promote_types(base.dtype, torch.float32)
        cast(nn.Module, model).to(device=base.device, dtype=wide)
        model.base = base
        model._asked_for_gradients = [one for one in base.parameters() if one.requires_grad]
        base.requires_grad_(False)
        # a plain list: as submodules they would have two names each
        object.__setattr__(model, "_blocks", [blocks[number] for number in reached])
        model.train(base.training)
        speak_for(model, base)
        model._is_stateful = base._is_stateful
        return model

    def detach(self) -> PreTrainedModel:
        """The base model: the identical object, asking for gradients where it did."""
        for parameter in self._asked_for_gradients:
            parameter.requires_grad_(True)
        return self.base

    @property
    def gates(self) -> dict[int, nn.Parameter]:
        """The gate ``(1,)`` in front of each layer, before its tanh; 0: closed."""
        return {int(layer): cross.inner.gate for layer, cross in self.cross.items()}  # type: ignore

    def train(self, mode: bool = True) -> Self:
        """Training mode for the new parts; what is frozen stays in evaluation mode."""
        super().train(mode)
        if "base" in self._modules:
            self.base.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gated):
            nn.init.zeros_(module.gate)
        elif not initialize(module, self.retro):
            super()._init_weights(module)

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        neighbours: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        chunk_offset: Tensor | None = None,
        retrieval_step: int | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **arguments: Any,
    ) -> Any:
        """One pass of the base model, with neighbours of the text's chunks or without.

        Args:
            input_ids: ``(batch, time)``.
            attention_mask: ``(batch, past and new time)``, 0 for padding at either end of a row.
            position_ids: as of the base model.
            past_key_values: a cache; with neighbours a fresh one, or what an earlier call returned.
            inputs_embeds: instead of ``input_ids``.
            neighbours: see `memlm.models.retro.model.RetroModel.forward`, as the four that follow.
            neighbour_mask: alike.
            document_ids: alike; several documents in a row only where the base model can read them
                apart.
            chunk_offset: alike.
            retrieval_step: alike.
            use_cache: return a cache, outside training.
            labels: ``(batch, time)``, shifted inside; -100 where there is no loss.
            logits_to_keep: as of the base model.
            arguments: for the base model.

        Returns:
            The base model's own kind of output.

        Raises:
            InputError: if neighbours or cache do not fit the text.
            UnsupportedModelError: for documents that the base model cannot read apart.
        """
        given: dict[str, Any] = {
            **arguments,
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            given["logits_to_keep"] = logits_to_keep
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        cache = self._cache(past_key_values, past, use_cache, neighbours)
        given["use_cache"] = cache is not None or past > 0
        if past_key_values is not None:
            given["past_key_values"] = getattr(past_key_values, "inner", past_key_values)
        if neighbours is None and cache is None and document_ids is None:
            return self.base(**given)

        words = input_ids if inputs_embeds is None else inputs_embeds
        batch, time = words.shape[:2]  # type: ignore[union-attr]
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and bool(real.all()) and real.shape == (batch, past + time):
            real = None
        grid = chunk_grid(
            batch,
            time,
            self.retro.chunk_size,
            step=retrieval_step,
            real=real,
            document_ids=document_ids,
            offset=chunk_offset,
            past=past,
            device=words.device,  # type: ignore[union-attr]
        )
        if is_packed(grid, real):
            check_window(self.base, time)
            if not self._packs:
                prove_packing(self.base)
                self._packs = True
            given |= packed_arguments(self.base, grid, real)
        found = None
        if neighbours is not None:
            found = neighbours_of(
                neighbours, neighbour_mask, grid, self.retro, aligned=real is None
            )
        reading = Reading(
            self.retro,
            self.encoder,
            self._embed,
            grid,
            found,
            cache,
            asked=neighbours is not None,
        )
        with ExitStack() as hooks:
            if neighbours is not None or cache is not None:
                for block, cross in zip(self._blocks, self.cross.values(), strict=True):
                    hooks.enter_context(in_front(block, partial(_widened, reading, cross)))  # type: ignore
            output = self.base(**given)
        reading.finish()
        if cache is not None and output.past_key_values is not None:
            carried = cache is past_key_values
            output.past_key_values = cache if carried else cache.around(output.past_key_values)
        return output

    def _embed(self, tokens: Tensor) -> Tensor:
        """Tokens of neighbours as the encoder reads them, in the new parts' type."""
        words = self.base.get_input_embeddings()(tokens)
        return self.project(words.to(self.encoder.output.weight.dtype))

    def _cache(
        self,
        given: Cache | None,
        past: int,
        use_cache: bool | None,
        neighbours: Tensor | None,
    ) -> RetroCache | None:
        """What this pass carries on its cache; None: nothing."""
        if isinstance(given, RetroCache):
            return given
        if past:
            check(
                neighbours is None,
                f"the cache holds {past} positions that were read without neighbours; pass the "
                "past_key_values of this model's own output, or a fresh cache",
            )
            return None
        wanted = self.config.use_cache if use_cache is None else use_cache
        return RetroCache() if wanted and not self.training else None

    # -- generation --------------------------------------------------------------------------

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        retriever: ChunkRetriever | None = None,
        retrieval_step: int | None = None,
        chunk_offset: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """What the base model reads in one step, with the neighbours of chunks that end in it."""
        inputs = self.base.prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **others
        )
        if attention_mask is not None:  # some families make another form of it, which they need not
            inputs["attention_mask"] = attention_mask
        found = self.retrieved(
            retriever,
            input_ids,
            past_key_values,
            attention_mask,
            retrieval_step=retrieval_step,
            chunk_offset=chunk_offset,
        )
        return {
            **inputs,
            "chunk_offset": chunk_offset,
            "retrieval_step": retrieval_step,
            **found,
        }

    # -- the base model's parts --------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The base model's."""
        return self.base.get_output_embeddings()

    # -- saving ------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        base: Literal["copy", "reference"] = "reference",
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the new weights, and which base model they belong to.

        Args:
            save_directory: the directory; made if missing.
            base: ``"reference"`` notes the base model's fingerprint and the name or path that it
                was loaded from, if any; ``"copy"`` writes its weights too, into ``base/``.
            state_dict: of the whole, if it was gathered from several devices.
            kwargs: for the base model's ``save_pretrained``.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        if base == "copy" or self.base.config.name_or_path:
            self.config.base = write_base(self.base, os.fspath(directory), base, **kwargs)
        else:
            self.config.base = {"path": "", "fingerprint": model_hash(self.base)}
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        own = {
            name: value.detach().cpu().contiguous()
            for name, value in state.items()
            if not name.startswith("base.")
        }
        write_atomic(directory / WEIGHTS, lambda file: file.write(save(own, {"format": "pt"})))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base: PreTrainedModel | str | None = None,
        verify: bool = True,
        config: RetroFitConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load what ``save_pretrained`` wrote, around the base model it belongs to.

        Args:
            pretrained_model_name_or_path: the directory.
            base: the base model, or where it is now; needed if it was never loaded by name.
            verify: compare the base model's fingerprint; False e.g. to load it in another dtype.
            config: the configuration, already loaded (by ``AutoModelForCausalLM``).
            kwargs: for loading the base model, e.g. ``dtype`` or ``device_map``.

        Raises:
            FingerprintError: if the base model is not the one that was saved.
            InputError: if the base model is needed and was not given.
            CorruptStoreError: if weights are missing or do not fit.
        """
        directory = os.fspath(pretrained_model_name_or_path)
        if config is None:
            config = RetroFitConfig.from_pretrained(directory)
        for name in ("_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)
        check(
            base is not None or config.base.get("path") != "",
            f"{directory} belongs to a base model without a name, so it must be given; pass it as "
            "`base`",
        )
        found = load_base(config.base, directory, base, verify=verify, **kwargs)
        model = cls.around(found, config.retro)  # type: ignore[arg-type]
        weights = load_file(Path(directory, WEIGHTS))
        own = {name for name in model.state_dict() if not name.startswith("base.")}
        if set(weights) != own:
            raise CorruptStoreError(
                f"{Path(directory, WEIGHTS)} must hold the weights {sorted(own)[:3]}..., but "
                f"{sorted(own ^ set(weights))[:3]} are missing or too many; save the model again"
            )
        model.load_state_dict(weights, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(directory)
        return model.eval()


def _cross(retro: RetroConfig, layer: int) -> Residual:
    """Cross-attention in front of a layer, counted from 1."""
    inner = Gated(CrossAttention(retro, layer - 1))
    return Residual(inner, make_norm(retro, retro.hidden_size), norm_first=True, scale=1.0)


def _widened(reading: Reading, cross: Residual, x: Tensor) -> Tensor:
    """Cross-attention in the type of its weights, which holds the base model's exactly."""
    wide = x.to(cross.norm.weight.dtype)  # type: ignore[arg-type]
    return reading.attend(cross, wide).to(x.dtype)


AutoModelForCausalLM.register(RetroFitConfig, RetroFitForCausalLM, exist_ok=True)
