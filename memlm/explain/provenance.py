"""Why was this token predicted? What of it the model gave, what a memory, and which entries.

A merge leaves every token with probability

    p(y) = (1 - share) p_model(y) + sum over candidates j with token_j = y of mass_j
    mass_j = share exp(s_j - lse)                             lse = logsumexp_j s_j

whatever the merge is: share is lam for a mixture (kNN-LM, Khandelwal et al. 2020, eq. 3) and the
memory's part of the common partition for a union (TRIME, Zhong et al. 2022, eq. 4). So a token's
probability falls apart exactly into the model's part and one part for each candidate, and every
candidate stands for a place in a text: an entry of a datastore, or an earlier position.

What comes before that place is read off the store itself: entries follow each other as their text
does, so the values before an entry are the tokens before it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.merges import Merge
from memlm.core.types import Candidates, TargetPartial, TokenMemory
from memlm.memory.local import LocalMemory
from memlm.memory.together import Together
from memlm.models.attach import MemoryForCausalLM
from memlm.models.head import find_head
from memlm.models.running import check_length, device_of, frozen
from memlm.models.taps import capture, find_tap, reached
from memlm.ops.merge import merge_target
from memlm.ops.tokens import target_partial


class Source(NamedTuple):
    """A candidate that proposed the token.

    Attributes:
        memory: what kind of memory it is in, e.g. ``"knn"``.
        entry: its number there.
        mass: probability it gives to the token.
        document: number of its document; None where the memory does not know.
        position: of the proposed token in that document, or in this very text.
        before: the tokens before the proposed one; empty where the memory does not know them.
    """

    memory: str
    entry: int
    mass: float
    document: int | None
    position: int | None
    before: tuple[int, ...]


class Explanation(NamedTuple):
    """One token of a text.

    Attributes:
        place: in the text.
        token: that stands there.
        model: its probability without memory.
        merged: its probability with memory: ``(1 - share) model + proposed``.
        share: of the whole distribution that the memory has, from 0 to 1.
        proposed: the probability that candidates give to this token.
        sources: the candidates that give most of it, heaviest first.
        others: other tokens that the memory proposed and their probability, heaviest first.
    """

    place: int
    token: int
    model: float
    merged: float
    share: float
    proposed: float
    sources: tuple[Source, ...]
    others: tuple[tuple[int, float], ...]


def explain_tokens(
    lm: MemoryForCausalLM, tokens: Tensor, *, first: int = 1, top: int = 5, context: int = 12
) -> list[Explanation]:
    """Explain the tokens of a text, each from the ones before it.

    Args:
        lm: a model with its memory.
        tokens: ``(time,)`` int64.
        first: the first token to be explained; all before it are read.
        top: sources, and other tokens, of each.
        context: tokens before a source's token.

    Returns:
        One for each token from ``first`` on.

    Raises:
        InputError: if the text is too short for ``first`` or too long for the model, or a number
            is out of range.
    """
    check(
        tokens.ndim == 1 and len(tokens) >= 2,
        "tokens must be one text of at least 2 tokens, since the first is not predicted, got shape "
        f"{tuple(tokens.shape)}",
    )
    check(
        1 <= first < len(tokens),
        f"first must be one of the tokens 1 to {len(tokens) - 1}, got {first}",
    )
    check(top >= 1, f"top must be at least 1, got {top}")
    check(context >= 0, f"context must not be negative, got {context}")
    check_length(lm.base, len(tokens) - 1)
    head, final = find_head(lm.base), find_tap(lm.base, "final")
    with frozen(lm.base), capture(lm.base, final) as ends, capture(lm.base, lm.tap) as seen:
        read = tokens.to(device_of(lm.base))
        lm.base(input_ids=read[None, :-1], use_cache=False)
        keys, hidden = reached(seen, lm.tap), reached(ends, final)[0]
        # what is left to do is little: on the CPU, whatever devices model and memory are on
        tokens = tokens.cpu()
        words = [part.cpu().double() for part in head.target(hidden, read[1:].to(hidden.device))]
        stages = [_answers(lm.memory, read, keys, first)]
        merges: list[Merge] = [lm.merge]
        if lm.interpolate is not None:
            stages.append(_answers(lm.interpolate[0], read, keys, first))
            merges.append(lm.interpolate[1])
        found = []
        for place, answers in enumerate(zip(*stages, strict=True), start=first):
            own = TargetPartial(*(part[place - 1 : place] for part in words))
            asked = list(zip(merges, answers, strict=True))
            found.append(_explanation(tokens, place, own, asked, top, context))
    return found


class _Answer(NamedTuple):
    """Candidates ``(1, k)`` of one memory, on the CPU."""

    memory: TokenMemory
    candidates: Candidates


def _answers(
    memory: TokenMemory, tokens: Tensor, keys: Tensor, first: int
) -> Iterator[list[_Answer]]:
    """What each member of a memory says before every token from ``first`` on."""
    state = memory.init_state(1)
    must_read = state is not None and not getattr(memory, "reads_leave_state", False)
    for time in range(keys.shape[1]):
        if state is not None:
            state = memory.observe(tokens[None, time : time + 1], keys[:, time : time + 1], state)
        asked = time + 1 >= first
        if not (asked or must_read):
            continue
        if isinstance(memory, Together):
            parts, state = memory.read_each(keys[:, time], state)
            members = memory.members
        else:
            part, state = memory.read(keys[:, time], state)
            parts, members = [part], [memory]
        if asked:
            yield [
                _Answer(member, Candidates(*(column.cpu() for column in part)))
                for member, part in zip(members, parts, strict=True)
            ]


def _explanation(
    tokens: Tensor,
    place: int,
    model: TargetPartial,
    asked: list[tuple[Merge, list[_Answer]]],
    top: int,
    context: int,
) -> Explanation:
    target = tokens[place : place + 1]
    partial, left = model, 1.0
    masses: list[Tensor] = []
    answers = [answer for _, several in asked for answer in several]
    for merge, several in asked:
        joined = _joined([answer.candidates for answer in several])
        memory = target_partial(joined, target)
        share = _share(merge, partial, memory)
        scores = joined.scores.masked_fill(~joined.valid, -torch.inf)
        mass = torch.nan_to_num(share * (scores - memory.lse[:, None]).exp())[0]
        masses = [(1 - share) * before for before in masses] + [mass]
        left *= 1 - share
        partial = merge_target(merge, partial, memory)
    mass = torch.cat(masses)
    proposals = torch.cat([answer.candidates.tokens[0] for answer in answers])
    fits = proposals == target
    return Explanation(
        place=place,
        token=int(target),
        model=_probability(model),
        merged=_probability(partial),
        share=1 - left,
        proposed=float(mass[fits].sum()),
        sources=_sources(tokens, answers, mass * fits, top, context),
        others=_others(proposals[~fits], mass[~fits], top),
    )


def _share(merge: Merge, base: TargetPartial, memory: TargetPartial) -> float:
    """The memory's part: what a token loses on which the model is sure and the memory silent."""
    sure = base._replace(target_lse=base.lse)
    silent = memory._replace(target_lse=torch.full_like(memory.lse, -torch.inf))
    return 1 - _probability(merge_target(merge, sure, silent))


def _probability(partial: TargetPartial) -> float:
    return float((partial.target_lse - partial.lse).exp())


def _joined(parts: list[Candidates]) -> Candidates:
    """The candidates beside each other, in float64: their masses shall sum to the whole."""
    joined = Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    return joined._replace(scores=joined.scores.double())


def _sources(
    tokens: Tensor, answers: list[_Answer], mass: Tensor, top: int, context: int
) -> tuple[Source, ...]:
    owners = [
        (answer, column)
        for answer in answers
        for column in range(answer.candidates.tokens.shape[1])
    ]
    found = []
    for number in mass.argsort(descending=True, stable=True)[:top].tolist():
        if mass[number] > 0:
            answer, column = owners[number]
            entry = int(answer.candidates.ids[0, column])
            place = _origin(answer.memory, entry, tokens, context)
            kind = str(answer.memory.describe()["memory"])
            found.append(Source(kind, entry, float(mass[number]), *place))
    return tuple(found)


def _others(tokens: Tensor, mass: Tensor, top: int) -> tuple[tuple[int, float], ...]:
    distinct, places = tokens.unique(return_inverse=True)
    sums = mass.new_zeros(len(distinct)).index_add(0, places, mass)
    order = sums.argsort(descending=True, stable=True)[:top].tolist()
    return tuple((int(distinct[n]), float(sums[n])) for n in order if sums[n] > 0)


def _origin(
    memory: TokenMemory, entry: int, tokens: Tensor, context: int
) -> tuple[int | None, int | None, tuple[int, ...]]:
    """Document, position and the tokens before it, as far as the memory knows them."""
    if isinstance(memory, LocalMemory):  # entries are positions of this text
        before = tokens[max(0, entry + 1 - context) : entry + 1]
        return None, entry + 1, tuple(before.tolist())
    store: Any = getattr(memory, "store", None)
    if store is None or isinstance(memory, Together):  # inside another, its ids are of several
        return None, None, ()
    documents, positions = getattr(store, "documents", None), getattr(store, "positions", None)
    if documents is None or positions is None:
        return None, None, ()
    document, position = int(documents[entry]), int(positions[entry])
    run = slice(max(0, entry - context), entry)
    steps = torch.arange(run.start - entry, 0)
    # a pruned store has gaps, and a document's first token has nothing before it
    belong = (documents[run] == document) & (positions[run] - position == steps)
    begin = int(run.start + (~belong).nonzero().max() + 1) if not belong.all() else run.start
    return document, position, tuple(store.values[begin:entry].tolist())
