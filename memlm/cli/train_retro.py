"""``memlm train --method retro``: a model that reads the neighbours of its chunks."""

from typing import TYPE_CHECKING, Any

from memlm.cli.options import load_model, load_tokenizer, show
from memlm.core.config import check

if TYPE_CHECKING:
    from memlm.cli.train import Train
    from memlm.training.retro_config import RetroTrainConfig

_FLAGS = ("max_steps", "max_seconds", "learning_rate", "save_every", "threads", "seed")
_UNUSED = ("recipe", "chain", "separator", "limit")
_STEPS = 1000  # without a limit


def train_with_neighbours(options: "Train") -> int:
    """Train on a database with its neighbours; the options are those of ``memlm train``.

    A model to continue that reads no neighbours yet learns to, its own weights frozen.

    With held-out text, also its bits per byte with retrieval on, off and shuffled.

    Raises:
        InputError: for an option that this method does not read.
    """
    from memlm.evaluation.retro import compare_retrieval, table
    from memlm.training.retro import RetroText, retro_sequences, train_retro

    for name in _UNUSED:
        check(
            getattr(options, name) is None, f"--method retro does not read --{name}; leave it out"
        )
    check(
        options.model is None or options.architecture is None,
        "a model is either continued or new: give --model or --architecture, not both",
    )
    config = _settings(options)
    source = RetroText.open(options.text)
    if options.plan:
        sequences = len(retro_sequences(source, config))
        value: dict[str, Any] = {"config": config.to_dict(), "sequences": sequences}
        value["step_tokens"] = config.step_tokens
        k = 0 if source.neighbours is None else config.k or source.neighbours.k
        text = (
            f"{sequences:,} sequences of {config.block_length} tokens with {k} neighbours per "
            f"chunk, {config.step_tokens:,} tokens per step"
        )
        show(value, text, as_json=options.json)
        return 0
    named = options.tokenizer or options.model
    check(named is not None, "the tokenizer of the database is needed, got none; give --tokenizer")
    tokenizer = load_tokenizer(named or "")
    held_out = None
    if options.evaluate_on is not None:
        held_out = RetroText.open(options.evaluate_on, source.text)
    model = train_retro(
        source,
        tokenizer,
        config,
        options.out,
        model=_model(options, config, tokenizer, source.text.chunk_size),
        held_out=held_out,
        resume=options.resume,
    )
    parameters = model.num_parameters()
    value = {"model": options.out, "parameters": parameters, "method": "retro"}
    text = f"{options.out}: retro, {parameters:,} parameters"
    if held_out is not None:
        figures = compare_retrieval(model, retro_sequences(held_out, config))
        value["retrieval"] = {mode: one.summary() for mode, one in figures.items()}
        text += f"\n{table(figures)}"
    show(value, text, as_json=options.json)
    return 0


def _settings(options: "Train") -> "RetroTrainConfig":
    from memlm.training.recipe import parse_changes
    from memlm.training.retro_config import RetroTrainConfig

    check(
        options.preset in (None, "tiny", "base"),
        f"--method retro has the presets tiny and base (the paper's 172m), got {options.preset}",
    )
    flags = {name: getattr(options, name) for name in _FLAGS if getattr(options, name) is not None}
    changes = parse_changes(options.set)
    base = options.preset == "base"
    published = RetroTrainConfig.published(changes.get("size", "172m")).to_dict() if base else {}
    settings: dict[str, Any] = {"max_steps": _STEPS, **published, **changes, **flags}
    if "max_seconds" in flags:
        settings.pop("max_steps")
    return RetroTrainConfig.from_dict(settings)


def _model(options: "Train", config: "RetroTrainConfig", tokenizer: Any, chunk_size: int) -> Any:
    """The model to continue or to fit, or one of a given architecture; None: a new small one."""
    from memlm.models.retro.generation import RetrievingGeneration

    if options.model is not None:
        from memlm.training.retro import fitted_model

        model = load_model(options.model, "cpu")
        reads = isinstance(model, RetrievingGeneration)
        return model if reads else fitted_model(model, config, chunk_size)
    if options.architecture is None:
        return None
    import memlm.models.retro.causal_lm  # noqa: F401  registers its family
    from memlm.training.architecture import model_of

    return model_of(options.architecture, tokenizer, seed=options.seed or 1)
