"""The protocol of an evaluation: how a number was made, as data and as one line.

Perplexities are only comparable under the same windows, boundaries and units, and a perplexity with
an approximate memory only with that memory's recall beside it. So each result carries

    windows     kind, length and stride, settings and one line
    scored      counts of scored tokens, begin tokens (context only) and tokens left out
    boundaries  what context a token may see
    memory      its settings and measured recall, or None: then the line says "memory off"
    merge       how the memory joins the model
    interpolated  memory and merge that were mixed in once more, if any
    carry       how far the memory carries state: "document", "window", or None without state
    state       the same in words
    units       nats, natural logarithm; bits are base 2
"""

from collections.abc import Mapping
from typing import Any

OFF = "memory off"
EXACT = "exact search"
_SETTINGS = ("k", "size", "temperature", "min_knns", "max_knns", "share")


def protocol_line(protocol: Mapping[str, Any], stats: Mapping[str, Any] | None = None) -> str:
    """The protocol in one line, to print with every number.

    Args:
        protocol: as `memlm.evaluation.perplexity.evaluate` makes it.
        stats: what the memory's steps cost, None if they were not counted.
    """
    scored = protocol["scored"]
    begin = protocol["begin_token"]
    first = (
        "no begin token"
        if begin is None
        else f"begin token {begin} before each document as context only"
    )
    left_out = f", {scored['left_out']:,} left out" if scored["left_out"] else ""
    return "; ".join(
        (
            protocol["windows_line"],
            f"{scored['tokens']:,} tokens of {scored['documents']:,} "
            f"{'document' if scored['documents'] == 1 else 'documents'} scored once"
            f"{left_out}, {first}",
            "token-weighted, natural log",
            memory_line(protocol, stats),
        )
    )


def memory_line(protocol: Mapping[str, Any], stats: Mapping[str, Any] | None = None) -> str:
    """The memory and its merge: ``"memory knn k=8 temperature=1, exact search, mixture lam=0.25"``.

    Args:
        protocol: as `memlm.evaluation.perplexity.evaluate` makes it.
        stats: what the memory's steps cost, None if they were not counted.
    """
    memory, merge, state = (protocol[name] for name in ("memory", "merge", "state"))
    if memory is None or merge is None:
        return OFF
    parts = [_memory_words(memory), merge_words(merge)]
    if again := protocol.get("interpolated"):
        words = _memory_words(again["memory"])
        parts.append(f"interpolated with {words}, {merge_words(again['merge'])}")
    parts += [state] if state else []
    parts += [saved_words(stats)] if stats else []
    own, sure = protocol.get("left_out_of_memory", "nothing"), protocol.get("skip_above")
    parts += [] if own == "nothing" else [f"a token's own {own} left out"]
    parts += [] if sure is None else [f"not asked where the model is surer than {sure:g}"]
    return ", ".join(parts)


def _memory_words(memory: Mapping[str, Any]) -> str:
    """Kind, settings and recall; of several memories, those of each."""
    members = memory.get("members", [memory])
    words = [_member_words(member) for member in members]
    if lams := memory.get("lams"):
        words = [f"{word}, lam={lam:g}" for word, lam in zip(words, lams, strict=True)]
    return "memory " + " + ".join(words)


def _member_words(memory: Mapping[str, Any]) -> str:
    words = [str(memory.get("memory", "of unknown kind"))]
    words += [f"{name}={memory[name]:g}" for name in _SETTINGS if _number(memory, name)]
    words += ["recomputed"] if memory.get("recompute") else []
    parts = [" ".join(words)]
    clusters = memory.get("clusters", False)
    if clusters is not False:
        parts.append(f"{clusters['clusters']:,} clusters" if clusters else "no clusters")
    parts += [recall_words(memory)] if "index" in memory else []
    return ", ".join(parts)


def saved_words(stats: Mapping[str, Any]) -> str:
    """``"saved 0.46 of 1,234 searches"``."""
    return f"saved {stats['saved']:.2f} of {stats['steps']:,} searches"


def merge_words(merge: Mapping[str, Any]) -> str:
    """``"mixture lam=0.25"``, ``"union"``, ``"gate slope=0.9 bias=-1"``.

    A weight of zero says that the memory is off.
    """
    if "lam" not in merge:
        numbers = [f"{name}={merge[name]:g}" for name in ("slope", "bias") if name in merge]
        return " ".join([str(merge.get("kind", "merge")).lower(), *numbers])
    words = f"{str(merge.get('kind', 'mixture')).lower()} lam={merge['lam']:g}"
    return f"{words} ({OFF})" if merge["lam"] == 0 else words


def recall_words(memory: Mapping[str, Any]) -> str:
    """How well the memory finds the nearest keys, in words; what was not measured says so.

    Args:
        memory: what the memory's ``describe`` says, with its index's under ``"index"``.
    """
    index = memory.get("index")
    if not isinstance(index, Mapping):
        return "no index"
    if index.get("engine") == "exact":
        return EXACT
    name = index.get("factory") or index.get("engine") or "index"
    if isinstance(index.get("nprobe"), int):
        name = f"{name} nprobe={index['nprobe']}"
    recall = index.get("recall")
    if not isinstance(recall, Mapping) or "value" not in recall:
        return f"{name} recall not measured"
    at = f"@{recall['k']}" if "k" in recall else ""
    on = f" on {recall['queries']:,} queries" if isinstance(recall.get("queries"), int) else ""
    return f"{name} recall{at} {recall['value']:.3f}{on}"


def _number(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int | float)
