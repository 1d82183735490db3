"""A table of evaluations, each with the protocol its numbers were made under.

Rows that share everything but the memory are compared with the first row, which is usually the
model alone: the ratio of perplexities with its paired interval. Memories that count their searches
bring a column "saved": the fraction of saved searches. Below the table stands one line of protocol
for every row, so that no number is seen without what it means.
"""

from collections.abc import Mapping

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.evaluation.protocol import memory_line, protocol_line
from memlm.evaluation.result import Evaluation
from memlm.evaluation.tune import Tuning

_SETTINGS = ("lam", "slope", "bias", "temperature", "k", "size", "flat")
_COLUMNS = ("", "perplexity", "95% interval", "against first", "bits/byte", "per word", "tok/s")


def report(evaluations: Mapping[str, Evaluation]) -> Group:
    """The table and its protocol lines, to print with rich.

    Args:
        evaluations: by the name of their row, in order; the first is what others are compared with.

    Raises:
        InputError: if there are none.
    """
    check(len(evaluations) > 0, "a report needs at least one evaluation, got none")
    table = Table(box=None, pad_edge=False, header_style="bold")
    counted = any(evaluation.saved is not None for evaluation in evaluations.values())
    for name in (*_COLUMNS, "saved") if counted else _COLUMNS:
        justify = "left" if name in ("", "against first") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    first = next(iter(evaluations.values()))
    for name, evaluation in evaluations.items():
        interval = evaluation.interval()
        table.add_row(
            name,
            _number(evaluation.perplexity),
            "one document"
            if interval is None
            else f"{_number(interval.low)}-{_number(interval.high)}",
            "" if evaluation is first else _against(evaluation, first),
            _number(evaluation.bits_per_byte, 3),
            _number(evaluation.word_perplexity, 0),
            f"{evaluation.tokens_per_second:,.0f}",
            *([_number(evaluation.saved)] if counted else []),
        )
    return Group(table, *(Text(line, style="dim") for line in protocol_lines(evaluations)))


def protocol_lines(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """One line per shared protocol, then one per row for its memory; a single row gets one line."""
    if len(evaluations) == 1:
        (evaluation,) = evaluations.values()
        parts = _parts_line(evaluation)
        return [f"protocol: {evaluation.describe()}", *([parts] if parts else [])]
    shared: dict[str, list[str]] = {}
    lines = []
    for name, evaluation in evaluations.items():
        memory = memory_line(evaluation.protocol, evaluation.memory_stats)
        shared.setdefault(evaluation.describe().removesuffix(f"; {memory}"), []).append(name)
        lines.append(f"{name}: {memory}")
    for name, evaluation in evaluations.items():
        if line := _parts_line(evaluation):
            lines.append(f"{name}: {line}")
    for line, names in shared.items():
        everyone = "all" if len(names) == len(evaluations) else ", ".join(names)
        lines.insert(0, f"protocol ({everyone}): {line}")
    return lines


def plain(shown: Group, width: int = 120) -> str:
    """A report as plain text of at most ``width`` columns."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as text:
        console.print(shown)
    return text.get()


def tuning_report(tuning: Tuning, best: int = 10) -> Group:
    """The best settings of a tuning with its protocol, to print with rich.

    Args:
        tuning: the result of `memlm.evaluation.tune.tune`.
        best: how many settings to list.

    Raises:
        InputError: if ``best`` is below 1.
    """
    check(best >= 1, f"best must be at least 1 setting, got {best}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    used = [name for name in _SETTINGS if any(getattr(trial, name) for trial in tuning.trials)]
    for name in (*used, "perplexity", "against model alone"):
        table.add_column("interpolated" if name == "flat" else name, justify="right")
    for trial in sorted(tuning.trials, key=lambda trial: trial.perplexity)[:best]:
        table.add_row(
            *(_setting(getattr(trial, name)) for name in used),
            _number(trial.perplexity),
            f"x{trial.perplexity / tuning.base_perplexity:.4f}",
        )
    lines = (tuning.describe(), f"protocol: {protocol_line(tuning.protocol)}")
    return Group(table, *(Text(line, style="dim") for line in lines))


def _parts_line(evaluation: Evaluation) -> str:
    """Which documents count per byte and per word, if not all that were scored."""
    if evaluation.bits_per_byte is None and evaluation.word_perplexity is None:
        return ""
    scored, whole = evaluation.protocol["scored"]["documents"], evaluation.whole_documents
    if whole == scored:
        return ""
    return f"bits per byte and per word over the {whole:,} of {scored:,} documents scored whole"


def _against(evaluation: Evaluation, first: Evaluation) -> str:
    try:
        compared = evaluation.compare(first)
    except InputError:
        return "other tokens"
    if compared.low is None or compared.high is None:
        return f"x{compared.ratio:.3f}"
    return f"x{compared.ratio:.3f} ({compared.low:.3f}-{compared.high:.3f})"


def _setting(value: float | tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return f"{value[0]:g} at {value[1]:g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
