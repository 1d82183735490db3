"""Explanations for a person: a table for the terminal, or one static page that loads nothing.

On the page the text is coloured by what the memory changed, ``log p with - log p without``; under a
token that is pointed at or clicked stands where it came from.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memlm.core.files import make_folder, write_atomic
from memlm.explain.provenance import Explanation, Source

_STRONGEST = 3.0  # nats at which a colour is full
_STYLE = """
body { font: 16px/1.7 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
main { white-space: pre-wrap; position: relative; }
.token { border-radius: 3px; cursor: pointer; }
.token:focus { outline: 2px solid #555; }
aside { display: none; position: absolute; left: 0; right: 0; z-index: 1; white-space: normal;
  border: 1px solid #bbb; border-radius: 6px; padding: .4em .8em; background: #fafafa;
  font-size: 14px; line-height: 1.5; }
.token:hover + aside, .token:focus + aside, aside:hover { display: block; }
table { border-collapse: collapse; } td { padding: 0 .8em 0 0; vertical-align: top; }
small { color: #555; } mark { background: #ffe08a; }
"""


def table(explanations: Sequence[Explanation], tokenizer: PreTrainedTokenizerBase) -> Table:
    """One line a token: its probability without and with memory, and where it comes from."""
    shown = Table(
        "token", "model", "with memory", "memory's share", "from memory", "heaviest source"
    )
    for one in explanations:
        source = _in_words(one.sources[0], one.token, tokenizer) if one.sources else ""
        shown.add_row(
            Text(repr(_text(tokenizer, [one.token]))),  # plain: a text may look like rich's markup
            _percent(one.model),
            _percent(one.merged),
            _percent(one.share),
            _percent(one.proposed),
            Text(source),
        )
    return shown


def write_page(
    explanations: Sequence[Explanation],
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
) -> Path:
    """Write the page.

    Args:
        explanations: of consecutive tokens.
        tokens: ``(time,)`` int64, the whole text; what was read before is shown plain.
        tokenizer: of the model.
        path: of the page.

    Raises:
        StoreError: if it cannot be written.
    """
    path = Path(path)
    pieces = _pieces(tokenizer, tokens.tolist())
    mean = sum(map(_gain, explanations)) / len(explanations)
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            f"<title>Where tokens come from</title><style>{_STYLE}</style>",
            "<h1>Where tokens come from</h1>",
            "<p><small>Green: likelier with memory than without; red: less likely; full colour at "
            f"{_STRONGEST:g} nats. {len(explanations)} tokens, {mean:+.3f} nats a token on "
            "average. Point at a token, or click it, for what the memory found.</small></p>",
            f"<main>{html.escape(''.join(pieces[: explanations[0].place]))}"
            + "".join(_token(one, pieces[one.place], tokenizer) for one in explanations)
            + "</main></html>\n",
        ]
    )
    make_folder(path.parent)
    write_atomic(path, lambda file: file.write(page.encode()))
    return path


def to_values(
    explanations: Sequence[Explanation], tokenizer: PreTrainedTokenizerBase
) -> list[dict]:
    """Plain JSON values, tokens beside their text."""
    return [
        {
            **one._asdict(),
            "text": _text(tokenizer, [one.token]),
            "sources": [
                {**source._asdict(), "text_before": _text(tokenizer, source.before)}
                for source in one.sources
            ],
            "others": [
                {"token": token, "text": _text(tokenizer, [token]), "mass": mass}
                for token, mass in one.others
            ],
        }
        for one in explanations
    ]


def _token(one: Explanation, piece: str, tokenizer: PreTrainedTokenizerBase) -> str:
    gain = _gain(one)
    colour = "0, 150, 60" if gain > 0 else "210, 40, 40"
    strength = 0.55 * min(1.0, abs(gain) / _STRONGEST)
    rows = ""
    for source in one.sources:
        before, proposed = map(html.escape, _quoted(source, one.token, tokenizer))
        rows += (
            f"<tr><td>{_percent(source.mass)}</td><td>{_place(source)}</td>"
            f"<td>{before}<mark>{proposed}</mark></td></tr>"
        )
    others = ", ".join(
        f"{html.escape(repr(_text(tokenizer, [token])))} {_percent(mass)}"
        for token, mass in one.others
    )
    return (
        f"<span class='token' tabindex='0' style='background: rgba({colour}, {strength:.2f})'>"
        f"{html.escape(piece)}</span><aside>"
        f"{_percent(one.model)} without memory, {_percent(one.merged)} with it; the memory has "
        f"{_percent(one.share)} of all and gives {_percent(one.proposed)} to this token."
        f"<table>{rows}</table>"
        + (f"<small>It also proposed {others}.</small>" if others else "")
        + "</aside>"
    )


def _in_words(source: Source, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    before, proposed = _quoted(source, token, tokenizer)
    text = f"{before}⟦{proposed}⟧".replace("\n", " ")
    return f"{text} ({_place(source)}, {_percent(source.mass)})"


def _quoted(source: Source, token: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text before a source's token, and what the token adds to it."""
    before = _text(tokenizer, source.before)
    return before, _text(tokenizer, [*source.before, token])[len(before) :]


def _place(source: Source) -> str:
    if source.position is None:
        return f"{source.memory} {source.entry}"
    if source.document is None:
        return f"{source.memory}, this text, token {source.position}"
    return f"{source.memory} {source.entry}: document {source.document}, token {source.position}"


def _gain(one: Explanation) -> float:
    return math.log(one.merged / one.model) if one.merged > 0 and one.model > 0 else 0.0


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens)))


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """What each token adds to the text: alone, many lose the space before them."""
    pieces, shown = [], 0
    for end in range(1, len(tokens) + 1):
        # a character that is still incomplete is shown with the token that completes it
        text = _text(tokenizer, tokens[:end]).rstrip("\ufffd")
        pieces.append(text[shown:])
        shown = max(shown, len(text))
    return pieces


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
