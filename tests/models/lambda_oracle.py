"""Lambda attention of a whole model by its definition, in float64: an oracle.

Every pair of query and key is scored at its own distance. Rotations, slopes and layers without
positions are taken from the configuration alone, family by family, so nothing of what is tested is
used but the projections.
"""

import torch

INTERLEAVED = ("codegen", "cohere", "cohere2", "glm", "gptj")
ALIBI = ("bloom", "mpt")


def install(
    monkeypatch, extension_class, *, window, sinks, limit, streaming=False, pinned=(), middle=None
):
    """Let every extended model compute attention by definition until the test ends.

    ``middle``: a ``MiddleConfig`` with rule "every", for layers that do not slide.
    """

    def attend(extension, layer, query, key, value, *, scale, softcap=None, **_):
        config, index = extension.model.config, layer.layer_idx
        sliding = layer_type(config, index) == "sliding_attention"
        seen, distance = pairs(
            query.shape[2],
            window=min(window, config.sliding_window) if sliding else window,
            sinks=0 if sliding else sinks,
            limit=limit,
            streaming=streaming,
            pinned=() if sliding else pinned,
        )
        groups = query.shape[1] // key.shape[1]
        dtype = query.dtype
        query, key, value = (x.double() for x in (query, key, value))
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if middle is not None and not sliding and index in middle.layers(len(extension.layers)):
            between = (distance >= window) & ~seen
            at = window // 2 if middle.distance is None else middle.distance
            distance = torch.where(between, at, distance)
            one = rotated(query, torch.full((query.shape[2], 1), at), config, index)[..., 0, :]
            seen = seen | (between & selected(one, key, window, sinks, middle))
        turned = rotated(query, distance, config, index)
        scores = (turned * key[:, :, None]).sum(-1) * scale
        scores = scores - slopes(config, query.shape[1])[:, None, None] * distance
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).to(dtype)

    monkeypatch.setattr(extension_class, "attend", attend)


def pairs(length, *, window, sinks, limit, streaming, pinned=()):
    """Which pairs ``(length, length)`` are seen, and at which distance."""
    places = torch.arange(length)
    distance = places[:, None] - places
    fixed = places < sinks
    for begin, end in pinned:
        fixed = fixed | ((places >= begin) & (places < end))
    far = (distance >= window) & fixed
    seen = ((distance >= 0) & (distance < window)) | far
    if streaming:
        fixed = places.clamp(max=sinks + window - 1)[:, None] - places
    else:
        fixed = distance.clamp(max=limit or length)
    return seen, torch.where(far, fixed, distance)


def selected(query, key, window, sinks, middle):
    """``(batch, heads, length, length)``: tokens of the blocks that each query selects."""
    length, size = query.shape[2], middle.block
    chosen = torch.zeros(*query.shape[:3], length, dtype=torch.bool)
    for i in range(length):
        begins = [b for b in range(sinks, length, size) if b <= i - window]
        if middle.capacity is not None:
            begins = [b for b in begins if i - b < window + middle.capacity]
        if not begins:
            continue
        blocks = [key[:, :, b : b + size] for b in begins]
        products = [(query[:, :, i, None] * x.amax(2, keepdim=True),
                     query[:, :, i, None] * x.amin(2, keepdim=True)) for x in blocks]  # fmt: skip
        bounds = torch.cat([torch.maximum(*pair).sum(-1) for pair in products], dim=-1)
        best = bounds.topk(min(middle.k // size, len(begins))).indices
        for slot, b in enumerate(begins):
            chosen[:, :, i, b : b + size] = (best == slot).any(-1)[..., None]
    return chosen


def layer_type(config, index):
    types = getattr(config, "layer_types", None)
    return types[index] if types else "full_attention"


def rotated(query, distance, config, index):
    """``(batch, heads, queries, keys, dim)``: every query at its distance from every key."""
    wide = query[:, :, :, None].expand(*query.shape[:3], distance.shape[1], -1)
    steps = frequencies(config, index, query.shape[-1])
    if steps is None:
        return wide
    angles = distance[..., None] * steps
    turned = wide[..., : 2 * len(steps)]
    if config.model_type in INTERLEAVED:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    parts = [first * cos - second * sin, second * cos + first * sin]
    if config.model_type in INTERLEAVED:
        turned = torch.stack(parts, dim=-1).flatten(-2)
    else:
        turned = torch.cat(parts, dim=-1)
    return torch.cat([turned, wide[..., 2 * len(steps) :]], dim=-1)


def frequencies(config, index, dim):
    """Radians per step of every pair of dimensions; None without rotation."""
    family = config.model_type
    if family in ALIBI or (family == "falcon" and config.alibi):
        return None
    if family == "cohere2" and layer_type(config, index) == "full_attention":
        return None
    if family == "smollm3" and not config.no_rope_layers[index]:
        return None
    if family == "memlm_retro":
        return base_frequencies(config.rope_theta, config.rotary_dim)
    if family in ("gptj", "codegen"):
        return base_frequencies(10000.0, config.rotary_dim)
    settings = config.rope_parameters
    settings = settings.get(layer_type(config, index), settings)
    turned = int(dim * settings.get("partial_rotary_factor", 1.0))
    factor = settings["factor"] if settings["rope_type"] == "linear" else 1.0
    return base_frequencies(settings["rope_theta"], turned) / factor


def base_frequencies(base, dim):
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def slopes(config, heads):
    """ALiBi (Press et al. 2022) for a power of two of heads."""
    one = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    if config.model_type in ALIBI:
        return one
    if config.model_type == "falcon" and config.alibi:
        return one * (config.hidden_size // heads) ** -0.5
    return torch.zeros_like(one)
