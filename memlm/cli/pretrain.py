"""``memlm train --method tupe``: an encoder on masked tokens."""

from typing import TYPE_CHECKING

from memlm.cli.options import load_tokenizer, show
from memlm.core.config import check

if TYPE_CHECKING:
    from memlm.cli.train import Train

_FLAGS = ("max_steps", "max_seconds", "learning_rate", "save_every", "threads", "seed")
_UNUSED = ("model", "recipe", "architecture", "evaluate_on", "chain")
_STEPS = 1000  # without a limit


def pretrain(options: "Train") -> int:
    """Clean the text, learn a vocabulary, pre-train; the options are those of ``memlm train``.

    Raises:
        InputError: for an option that this method does not read.
    """
    from memlm.data.cleaning import CorpusCounts
    from memlm.data.documents import read_documents
    from memlm.methods.tupe import pretrain_tupe
    from memlm.training.masked_lm_config import MaskedLMConfig
    from memlm.training.recipe import parse_changes

    for name in _UNUSED:
        flag = name.replace("_", "-")
        check(getattr(options, name) is None, f"--method tupe does not read --{flag}; leave it out")
    check(
        options.preset in (None, "tiny", "base"),
        f"--method tupe has the presets tiny and base (the published recipe), got {options.preset}",
    )
    flags = {name: getattr(options, name) for name in _FLAGS if getattr(options, name) is not None}
    published = options.preset == "base"
    settings = MaskedLMConfig.published().to_dict() if published else {"max_steps": _STEPS}
    if "max_seconds" in flags:
        settings.pop("max_steps")
    config = MaskedLMConfig.from_dict({**settings, **parse_changes(options.set), **flags})
    if options.plan:
        value = {"config": config.to_dict(), "step_tokens": config.step_tokens}
        text = f"{config.scheme}, {config.layers} layers of {config.hidden_size}, "
        show(value, f"{text}{config.step_tokens:,} tokens per step", as_json=options.json)
        return 0
    counts = CorpusCounts()
    documents = read_documents(
        options.text,
        text_field=options.field,
        separator=options.separator,
        limit=options.limit,
    )
    model = pretrain_tupe(
        documents,
        options.out,
        config,
        tokenizer=None if options.tokenizer is None else load_tokenizer(options.tokenizer),
        vocab_size=options.vocab_size,
        counts=counts,
        resume=options.resume,
    )
    parameters = model.num_parameters()
    value = {"model": options.out, "parameters": parameters, "lines": dict(counts.lines)}
    text = (
        f"{options.out}: {config.scheme}, {parameters:,} parameters\n{counts.describe()}\n"
        f"next: memlm finetune {options.out} --task cola --data GLUE --out RUNS"
    )
    show(value, text, as_json=options.json)
    return 0
