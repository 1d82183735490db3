"""Attaching a memory to a language model: any causal LM becomes a Hugging Face model with memory.

    hidden state at the tap --query--> memory --candidates--> merge with the logits --> next token

`MemoryForCausalLM` is an ordinary ``PreTrainedModel`` with ``GenerationMixin``: ``forward`` with
labels, greedy search, sampling, beams, assisted decoding, key-value caches and ``save_pretrained``
work as on any model. The base model is a submodule and is not touched: a hook reads the tap during
a forward pass and is gone after it, so ``detach`` has nothing to undo and returns the same object.

Logits of merged rows are unnormalised log-scores of the merged distribution. With ``lam = 0``, or
where the memory proposes nothing, they are the base model's, bit for bit.

Padding: left or right, masked by ``attention_mask``; the memory neither sees nor answers padding.
Absolute position embeddings need ``position_ids`` under left padding, as they do on the base model
(``generate`` makes them). ``generate`` moves right padding to the left, where decoders need it.

A memory with state (an automaton, a local memory) walks the text position by position and keeps
its state on the cache (see ``models.cache``), so it needs one: ``use_cache=False`` is refused.
"""

import inspect
import os
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.core.merges import Merge, Mixture, merge_from_dict
from memlm.core.types import TokenMemory
from memlm.models.cache import MemoryCache, carry, state_before
from memlm.models.config import MemoryConfig, speak_for
from memlm.models.match import check_match, stored_tap
from memlm.models.rows import keep, merge_rows, places, valid_positions, walk_rows
from memlm.models.saved import load_base, load_memory, write_base, write_memory
from memlm.models.taps import Tap, capture, find_tap, reached


def attach(
    model: PreTrainedModel,
    memory: TokenMemory,
    merge: Merge | None = None,
    *,
    interpolate: tuple[TokenMemory, Mixture] | None = None,
    tap: str | None = None,
    tokenizer: Any = None,
    verify: bool = True,
) -> "MemoryForCausalLM":
    """Give a language model a memory.

    Args:
        model: a causal language model with a key-value cache; used as it is, never changed.
        memory: what it shall remember with.
        merge: how the two are joined; default ``Mixture()``.
        interpolate: a second memory, without state, and the weight at which its distribution is
            mixed into the merged one (TRIME, eq. 7: the datastore, once more).
        tap: where queries are read; default: where the memory's store says its keys were read,
            else ``"auto"`` (see ``models.taps``).
        tokenizer: checked against the store's, if given.
        verify: compare the model's fingerprint (a pass over its weights at memory speed) with the
            one its store was made by.

    Raises:
        FingerprintError: if the memory's store was made with another model, tokenizer or tap.
        UnsupportedModelError: if the model offers no tap, or no cache of the usual kind.
        InputError: if the model already has a memory, or the second one has a state.
    """
    if isinstance(model, MemoryForCausalLM):
        raise InputError(
            "the model must not have a memory yet, got a MemoryForCausalLM; attach to "
            "`model.detach()` instead"
        )
    accepted = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or "past_key_values" not in accepted:
        raise UnsupportedModelError(
            f"a memory needs a decoder-only model with `past_key_values`, got "
            f"{type(model).__name__}; use a causal language model with a key-value cache"
        )
    found = find_tap(model, tap or stored_tap(memory) or "auto")
    for part in (memory,) if interpolate is None else (memory, interpolate[0]):
        check_match(model, part, found, tokenizer=tokenizer, verify=verify)
    if interpolate is not None and interpolate[0].init_state(1) is not None:
        raise InputError(
            "a memory that is mixed in once more must have no state, got "
            f"{interpolate[0].describe()}; make one memory of them with Together"
        )
    merge = Mixture() if merge is None else merge
    return MemoryForCausalLM.around(model, memory, merge, found, interpolate)


class MemoryForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model and its memory. Make one with `attach` or ``from_pretrained``.

    Attributes:
        base: the language model.
        memory: the memory.
        merge: how they are joined; may be replaced at any time.
        interpolate: a memory without state that is mixed in after it, and its weight; or None.
        tap: where queries are read.
    """

    config_class = MemoryConfig
    base_model_prefix = "base"
    # the base model decides; these let its choice through
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    base: Any  # a PreTrainedModel; nn.Module's own annotations would hide its methods
    memory: TokenMemory
    merge: Merge
    interpolate: tuple[TokenMemory, Mixture] | None
    tap: Tap

    @classmethod
    def around(
        cls,
        base: PreTrainedModel,
        memory: TokenMemory,
        merge: Merge,
        tap: Tap,
        interpolate: tuple[TokenMemory, Mixture] | None = None,
    ) -> Self:
        """The parts as one model, unchecked; `attach` checks that they belong together."""
        config = MemoryConfig(
            text_config=base.config,
            merge=merge.to_dict(),
            tap=tap.to_dict(),
            dtype=base.dtype,
            attn_implementation=base.config._attn_implementation,
        )
        model = cls(config)
        model.base = base
        model.memory, model.merge, model.tap = memory, merge, tap
        model.interpolate = interpolate
        model.training = base.training
        speak_for(model, base)
        model.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        model._is_stateful = base._is_stateful
        return model

    def detach(self) -> PreTrainedModel:
        """The base model: the identical object that was attached, unchanged."""
        return self.base

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        valid: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass of the base model, its logits merged with what the memory says.

        Args:
            input_ids: ``(batch, time)`` int64.
            attention_mask: ``(batch, past + time)``, 0 for padding; other forms go to the base
                model as they are and then ``valid`` says what padding is.
            position_ids: as of the base model.
            past_key_values: a cache. A memory with state needs a fresh one or the one that an
                earlier call returned.
            inputs_embeds: instead of ``input_ids``, for memories without state.
            token_type_ids: as of the base model.
            labels: ``(batch, time)`` int64, -100 where there is no loss; shifted inside.
            use_cache: return a cache; False is refused by memories with state.
            logits_to_keep: logits of the last so many positions only (0: all), or of the
                positions in a tensor, as of the base model.
            valid: ``(batch, time)`` bool, False for padding; read off a 2-D ``attention_mask``.
            return_dict: False for a tuple.
            kwargs: for the base model; ``num_items_in_batch`` and ``shift_labels`` for the loss.

        Returns:
            The base model's own kind of output, with ``logits`` ``(batch, kept, vocab)`` merged
            (at least float32 where the memory spoke), ``loss`` on the merged logits (mean over
            labels, natural log) and ``past_key_values``.

        Raises:
            InputError: if a memory with state has no tokens, no cache, or a cache without its
                state.
        """
        for_loss = {
            name: kwargs.pop(name)
            for name in ("num_items_in_batch", "shift_labels")
            if name in kwargs
        }
        optional = {
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
        }
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        accepted = inspect.signature(self.base.forward).parameters
        if "position_ids" not in accepted:  # `generate` makes them because this method takes them
            kwargs.pop("position_ids", None)
        slices = "logits_to_keep" in accepted
        if slices:
            kwargs["logits_to_keep"] = logits_to_keep
        state, walks = None, False
        if not self._off:
            state, walks = state_before(self.memory, input_ids, past_key_values, use_cache)
        kept = places(logits_to_keep, input_ids.shape[1]) if walks else []  # type: ignore[union-attr]
        # the base model may carry something of its own on the cache inside
        carried = isinstance(past_key_values, MemoryCache)

        with capture(self.base, self.tap) as seen:
            output = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values.inner if carried else past_key_values,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        logits = output.logits if slices else keep(output.logits, logits_to_keep)
        values = dict(output)
        if not self._off:
            states = reached(seen, self.tap)
            valid = valid_positions(valid, attention_mask, states)
            if walks:
                logits, state = walk_rows(
                    self.merge,
                    self.memory,
                    logits,
                    input_ids,  # type: ignore[arg-type]  # _state saw to it
                    states,
                    valid,
                    kept,
                    state,
                )
                cache = past_key_values if carried else output.past_key_values
                values["past_key_values"] = carry(cache, self.memory, state, len(states))
            else:
                logits = self._merge_all(
                    self.merge, self.memory, logits, states, valid, logits_to_keep
                )
            if self.interpolate is not None:
                second, weight = self.interpolate
                logits = self._merge_all(weight, second, logits, states, valid, logits_to_keep)
        values["logits"] = logits
        if labels is not None or "shift_labels" in for_loss:
            values["loss"] = self._loss(logits, labels, logits_to_keep, values, for_loss)
        output = type(output)(**values)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    @property
    def _off(self) -> bool:
        nothing = isinstance(self.merge, Mixture) and self.merge.lam == 0
        return nothing and self.interpolate is None

    def _merge_all(
        self,
        merge: Merge,
        memory: TokenMemory,
        logits: Tensor,
        states: Tensor,
        valid: Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        queries = keep(states, logits_to_keep)
        kept = None if valid is None else keep(valid[..., None], logits_to_keep).flatten()
        merged = merge_rows(
            merge,
            memory,
            logits.flatten(0, -2),
            queries.reshape(-1, queries.shape[-1]),
            kept,
        )
        return merged.view(logits.shape)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        values: dict[str, Any],
        for_loss: dict[str, Any],
    ) -> Tensor:
        if for_loss.get("shift_labels") is None and labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
            kept = keep(shifted[..., None], logits_to_keep)[..., 0]
            for_loss["shift_labels"] = kept.contiguous()
        targets = for_loss["shift_labels"]
        if for_loss.get("num_items_in_batch") is None and not bool((targets != -100).any()):
            raise InputError(
                "labels must mark at least one token to predict, got -100 everywhere (the first "
                "position has nothing before it); give longer rows or other labels"
            )
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], **for_loss
        )
        if (balance := values.get("aux_loss")) is not None:  # mixtures of experts
            loss = loss + self.config.router_aux_loss_coef * balance.to(loss.device)
        return loss

    # -- generation --------------------------------------------------------------------------

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        retriever: Any = None,
        retrieval_step: int | None = None,
        chunk_offset: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base model's own, plus what padding is where it turns the mask into another form.

        The three arguments before the last are for base models that read neighbours.
        """
        if retriever is not None:
            kwargs |= {"retriever": retriever, "retrieval_step": retrieval_step}
            kwargs["chunk_offset"] = chunk_offset
        inputs = self.base.prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        passed = inputs.get("attention_mask")
        if attention_mask is not None and not (isinstance(passed, Tensor) and passed.ndim == 2):
            given = inputs.get("input_ids")
            time = (inputs["inputs_embeds"] if given is None else given).shape[1]
            inputs["valid"] = attention_mask[:, -time:].bool()
        return inputs

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As on any model; right padding is moved to the left first, where decoders need it.

        A row then comes back as padding, prompt, continuation. A base model that reads neighbours
        also takes what its own ``generate`` takes for them.
        """
        tokens = kwargs.pop("input_ids", None) if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        if (
            isinstance(tokens, Tensor)
            and isinstance(mask, Tensor)
            and tokens.shape == mask.shape
            and kwargs.get("past_key_values") is None
            and bool((mask[:, -1] == 0).any())
        ):
            mask, order = mask.sort(dim=1, stable=True)
            tokens = tokens.gather(1, order.to(tokens.device))
            kwargs["attention_mask"] = mask
        if (arguments := getattr(self.base, "retrieval_arguments", None)) is not None:
            names = ("retriever", "retrieval_step", "align")
            asked = {name: kwargs.pop(name) for name in names if name in kwargs}
            padding = kwargs.get("pad_token_id", self.generation_config.pad_token_id)
            kwargs |= arguments(tokens, **asked, mask=mask, padding=padding)
        generate = super().generate  # type: ignore[misc]
        return generate(tokens, *args, **kwargs)

    # -- the base model's parts --------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the base model's."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The base model's."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the base model's."""
        self.base.set_output_embeddings(new_embeddings)

    # -- saving ------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        base: Literal["copy", "reference"] = "copy",
        **kwargs: Any,
    ) -> None:
        """Write the model so that ``from_pretrained`` finds every part again.

        The memory is saved by reference: where its store is, its fingerprint and its settings.

        Args:
            save_directory: the directory; made if missing.
            base: ``"copy"`` writes the base model's weights into ``base/``; ``"reference"`` writes
                only the name or path it was loaded from, and its fingerprint.
            kwargs: for the base model's ``save_pretrained``.

        Raises:
            InputError: if ``base="reference"`` but the base model was not loaded from anywhere.
        """
        directory = os.fspath(save_directory)
        self.config.base = write_base(self.base, directory, base, **kwargs)
        self.config.memory = write_memory(self.memory, directory)
        self.config.merge = self.merge.to_dict()
        self.config.tap = self.tap.to_dict()
        if self.interpolate is not None:
            second, weight = self.interpolate
            self.config.memory["interpolate"] = {
                "memory": write_memory(second, directory),
                "merge": weight.to_dict(),
            }
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        memory: TokenMemory | None = None,
        store: str | os.PathLike[str] | None = None,
        base: PreTrainedModel | str | None = None,
        verify: bool = True,
        config: MemoryConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load what ``save_pretrained`` wrote, and check that the parts are the ones saved.

        ``AutoModelForCausalLM.from_pretrained`` does the same once this module was imported.

        Args:
            pretrained_model_name_or_path: the directory.
            memory: a memory to use instead of loading the saved one; needed for memories that are
                not made of a store and settings.
            store: where the datastore is now, if it was moved.
            base: the base model, or where it is now, if it was moved.
            verify: compare fingerprints; False skips it, e.g. to load in another dtype.
            config: the configuration, already loaded (by ``AutoModelForCausalLM``).
            kwargs: for loading the base model, e.g. ``dtype`` or ``device_map``.

        Raises:
            FingerprintError: if the base model or the store is not the one that was saved.
            StoreError: if the store is not where it was.
            InputError: if the memory cannot be loaded from the saved settings.
        """
        directory = os.fspath(pretrained_model_name_or_path)
        if config is None:
            config = MemoryConfig.from_pretrained(directory)
        for name in ("_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)
        model = load_base(config.base, directory, base, verify=verify, **kwargs)
        if memory is None:
            memory = load_memory(config.memory, directory, store)
        again = None
        if saved := config.memory.get("interpolate"):
            second = load_memory(saved["memory"], directory, store)
            again = second, Mixture.from_dict(saved["merge"])
        attached = attach(
            model,
            memory,
            merge_from_dict(config.merge),
            interpolate=again,
            tap=Tap.from_dict(config.tap).name,
            verify=verify,
        )
        attached.generation_config = GenerationConfig.from_pretrained(directory)
        return attached  # type: ignore[return-value]


AutoModelForCausalLM.register(MemoryConfig, MemoryForCausalLM, exist_ok=True)
