"""RETRO's body: tokens and the neighbours of their chunks to hidden states.

    x = embedding (+ positions)
    for each layer:
        x = self-attention                                 (Borgeaud et al. 2022, algorithm 1)
        before the first cross-attention, once:
            neighbours = encoder(neighbours, states of their chunks)
        x = cross-attention to the neighbours, in some layers
        x = feed-forward

Position t depends on tokens up to t and on neighbours of chunks that ended at or before t,
whatever the length; a row may hold any number of documents, each with chunks of its own
(`memlm.models.retro.grid`). Without neighbours the model is an ordinary language model. With a
cache, a step reads only its own tokens (`memlm.models.retro.cache`) and gives what the whole text
would.

Differs from the published package: a loss in any mode and without retrieval, lengths below a chunk,
one neighbour without its own dimension, attention masks, packing; with norms behind the sub-layers,
cross-attention's norm is applied also where nothing is retrieved, as it is in training.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from memlm.core.config import check
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.decoder import CrossAttention, DecoderLayer, Sight
from memlm.models.retro.encoder import RetroEncoder
from memlm.models.retro.grid import ChunkGrid, chunk_grid
from memlm.models.retro.layers import BodyLinear, RetroNorm, additive, make_norm, rotation
from memlm.models.retro.reading import Reading, check_tokens, neighbours_of
from memlm.models.running import EXTENDED


class RetroPreTrainedModel(PreTrainedModel):
    """What all RETRO models share: loading, saving and initialisation."""

    config: RetroConfig
    config_class = RetroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer", "EncoderLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module, self.config):
            super()._init_weights(module)


def initialize(module: nn.Module, config: RetroConfig) -> bool:
    """Draw the weights of one module of RETRO; whether it is one of those drawn here."""
    as_torch = config.initializer == "torch"
    std = 1.0 if as_torch else config.initializer_range
    if config.deepnet and isinstance(module, BodyLinear):
        init.xavier_normal_(module.weight, gain=module.gain)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif as_torch and isinstance(module, nn.Linear):
        init.kaiming_uniform_(module.weight, a=5**0.5)
        if module.bias is not None:
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=std)
    elif isinstance(module, CrossAttention):
        init.normal_(module.null_key, std=std)
        init.normal_(module.null_value, std=std)
    elif isinstance(module, RetroNorm):
        init.ones_(module.weight)
        if module.gate is not None:
            init.ones_(module.gate)
    else:
        return False
    return True


class RetroModel(RetroPreTrainedModel):
    """Decoder and encoder of a RETRO model."""

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        narrow, width = config.encoder_hidden_size, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.table_size)
        if not config.shared_embeddings:
            self.embed_neighbours = nn.Embedding(config.vocab_size, narrow)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.table_size)
        if config.table_size != width:
            self.project = nn.Linear(config.table_size, width)
        self.encoder = RetroEncoder(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, width) if config.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embeddings."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's word embeddings."""
        self.embed_tokens = value  # type: ignore[assignment]

    @property
    def neighbour_table(self) -> nn.Module:
        """The encoder's word embeddings."""
        return self.embed_tokens if self.config.shared_embeddings else self.embed_neighbours

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        neighbours: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        chunk_offset: Tensor | None = None,
        retrieval_step: int | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Read tokens, with neighbours of their chunks or without.

        Args:
            input_ids: ``(batch, time)``.
            attention_mask: ``(batch, past and new time)``, 0 for padding at either end of a row.
            neighbours: ``(batch, chunks, k, length)`` int64: for every chunk that ends in these
                columns its neighbours with their continuations, in order, at least a chunk long;
                rows with fewer chunks are filled up with anything. ``(batch, chunks, length)`` is
                one neighbour. None: no retrieval.
            neighbour_mask: alike, 0 where there is no token; default: what is not
                ``config.neighbour_padding``.
            document_ids: ``(batch, time)``: documents packed into a row, each with its own
                positions and chunks, blind to the others.
            chunk_offset: ``(batch,)`` places missing in front of the first chunk
                (`memlm.models.retro.grid`); default 0.
            retrieval_step: tokens between chunk ends; default the chunk size.
            inputs_embeds: ``(batch, time, width of the table)`` instead of ``input_ids``.
            past_key_values: a `RetroCache`, or an empty cache.
            use_cache: make one, outside training.
            output_hidden_states: also return the input of every layer and the final states.

        Raises:
            InputError: for a token outside the vocabulary, more tokens than positions, neighbours
                that do not fit the chunks, or a mask with gaps.
        """
        x = self._embed(input_ids, inputs_embeds)
        batch, time = x.shape[:2]
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and bool(real.all()) and real.shape == (batch, past + time):
            real = None
        grid = chunk_grid(
            batch,
            time,
            self.config.chunk_size,
            step=retrieval_step,
            real=real,
            document_ids=document_ids,
            offset=chunk_offset,
            past=past,
            device=x.device,
        )
        x = self._place(x, grid.positions)
        sight = Sight(
            rotation(grid.positions[:, None], self.config, x.dtype),
            None if hasattr(self, EXTENDED) else sight_mask(grid, real, past, time, x.dtype),
            causal=past == 0 and real is None and grid.documents is None,
            cache=cache,
        )
        found = None
        if neighbours is not None:
            found = neighbours_of(
                neighbours, neighbour_mask, grid, self.config, aligned=real is None
            )
        reading = Reading(
            self.config,
            self.encoder,
            self.neighbour_table,
            grid,
            found,
            cache,
            asked=neighbours is not None,
        )
        states = [x] if output_hidden_states else []
        for layer in self.layers:
            x = layer(x, sight, reading)
            states.append(x)
        reading.finish()
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,  # type: ignore
        )

    def _embed(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        check(
            (input_ids is None) != (embeds is None),
            "exactly one of input_ids and inputs_embeds must be given",
        )
        if input_ids is None:
            return embeds  # type: ignore[return-value]
        check(input_ids.numel() > 0, f"the batch must hold tokens, got {tuple(input_ids.shape)}")
        check_tokens(input_ids, self.config.vocab_size, "token ids")
        return self.embed_tokens(input_ids)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> RetroCache | None:
        if given is not None and not isinstance(given, RetroCache):
            check(
                not given.get_seq_length(),
                "past_key_values must be a RetroCache or empty, got a "
                f"{type(given).__name__} of {given.get_seq_length()} positions",
            )
            return RetroCache(given)
        wanted = self.config.use_cache if use_cache is None else use_cache
        if given is None and wanted and not self.training:
            return RetroCache()
        return given  # type: ignore[return-value]

    def _place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Absolute positions and the decoder's width."""
        if self.config.learned_positions:
            longest, rows = int(positions.max()) + 1, self.config.max_position_embeddings
            check(
                longest <= rows,
                f"a text must have at most max_position_embeddings = {rows} tokens, got {longest}; "
                "cut it",
            )
            x = x + self.embed_positions(positions)
        return self.project(x) if hasattr(self, "project") else x


def sight_mask(
    grid: ChunkGrid, real: Tensor | None, past: int, time: int, dtype: torch.dtype
) -> Tensor | None:
    """What each new token sees, to add: ``(batch, 1, time, past + time)``.

    None where causality says it all, or all is seen.
    """
    if real is None and grid.documents is None and (past == 0 or time == 1):
        return None
    device = grid.positions.device
    new = torch.arange(past, past + time, device=device)
    seen = (torch.arange(past + time, device=device) <= new[:, None])[None]
    if real is not None:
        seen = seen & real[:, None]
    if grid.documents is not None:
        seen = seen & (grid.documents[:, None] == grid.documents[:, :, None])
    return additive(seen, dtype)[:, None]


AutoModel.register(RetroConfig, RetroModel, exist_ok=True)
