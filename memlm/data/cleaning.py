"""Text for pre-training, made in stages that can be counted: the preprocessing of TUPE in Python.

    clean        tabs and runs of spaces, dots, quotes
    join, keep   lines that a line break cut in two; only lines that are mostly letters
    punctuate    lower case, marks at the ends of words stand apart
    replace      addresses and file names become <url>, <email>, <file>; hyphens stand apart
    once         exact repetitions of a line are dropped

(Ke et al. 2021, appendix; the authors' scripts.) The stages are functions of strings, so any of
them can be left out. What is known of the scripts are recorded outputs, which tests compare with:
an address that ends in .com, .net, .org, .edu or .gov is ``<url>`` even if it has an @. Beyond
those their purpose is known and the rest is assumed: which endings but .pdf make a file name, and
that the letters that are counted, or that a line is joined after, are ASCII ones.

Differs from them: Moses' Perl scripts are not here; sentences are split by a plain rule instead of
spaCy's model, after . ! ? and closing quotes; `merge_short` keeps a last paragraph without an end
and takes several blank lines, where theirs loses text or stops (``legacy=True`` does as they do);
rare words stay (theirs keeps the most frequent 21 %, `frequent_words` and `keep_words`).
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from memlm.core.errors import InputError

SHORT, LONG = 5, 250  # words of a sentence that wants company, and of the longest merged one
_MARKS = string.punctuation
_ENDS = (".", '"', "!", "?")
_SPACES = re.compile(r"[ \t]+")
_DOTS = re.compile(r"\.{4,}")
_STAR = re.compile(r"(^|(?<=\s))\*+(?=\w)")
_URL = re.compile(r"(https?://\S+|www\.\S+|\S+\.(com|net|org|edu|gov))")
_EMAIL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+")
_FILE = re.compile(
    r"[^\s.][^\s]*\.(txt|pdf|docx?|xlsx?|pptx?|html?|xml|csv|json|zip|gz|tar|exe|jpe?g|png|gif|mp[34]"
    r"|py|cpp|java|js|css|php)"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[.!?] [\"'])\s+(?=\S)")


@dataclass
class CorpusCounts:
    """Lines that every stage let through, in order.

    Attributes:
        lines: stage to number of lines after it.
        words: white-space separated, at the end.
    """

    lines: Counter[str] = field(default_factory=Counter)
    words: int = 0

    def describe(self) -> str:
        """One line to print."""
        stages = ", ".join(f"{stage} {count:,}" for stage, count in self.lines.items())
        return f"lines: {stages}; {self.words:,} words"


def clean(line: str) -> str:
    """White space, dots, quotes and list marks of one line made uniform."""
    line = _SPACES.sub(" ", line)
    line = _DOTS.sub("...", line)
    line = line.replace("<<", "«").replace(">>", "»")
    line = line.replace(",,", ",").replace(",.", ",")
    return _STAR.sub("", line)


def join_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lower-case lines; one that goes on in the next is joined with it.

    It does if it ends in a letter, a digit or a comma and the next begins with a letter.
    """
    held: str | None = None
    for raw in lines:
        line = raw.strip().lower()
        if held is not None and re.search(r"[a-z0-9,]$", held) and re.match(r"[a-z]", line):
            held = f"{held} {line}"
            continue
        if held is not None:
            yield held
        held = line
    if held is not None:
        yield held


def is_prose(line: str) -> bool:
    """Whether a line is text: 50 characters or more, 70 % letters, hardly any markup."""
    length = len(line)
    if not 50 <= length <= 1_000_000 or line.startswith("|"):
        return False
    letters = sum(character in string.ascii_letters for character in line)
    marked = max(line.count("\\"), line.count("|"))
    return letters >= 50 and letters >= 0.7 * length and marked <= 0.05 * length


def detach_marks(line: str) -> str:
    """Punctuation at the ends of words stands apart, mark by mark; inside a word it stays."""
    words = []
    for word in line.split():
        core = word.strip(_MARKS)
        begin = word.index(core) if core else len(word)
        words += [*word[:begin], *([core] if core else []), *word[begin + len(core) :]]
    return " ".join(words)


def cleaned_lines(lines: Iterable[str]) -> Iterator[str]:
    """Joined, kept and punctuated lines: the filter of pre-training text."""
    for line in join_lines(lines):
        if is_prose(line):
            yield detach_marks(line.replace("\\", ""))


def glue_line(line: str) -> str:
    """A line of a GLUE task: like pre-training text, but never joined or dropped."""
    line = line.strip().lower()
    return line if line.startswith("|") else detach_marks(line.replace("\\", ""))


def replace_patterns(line: str) -> str:
    """Addresses and file names as one special word each; hyphens apart."""
    words: list[str] = []
    for word in line.split():
        if _URL.fullmatch(word):
            words.append("<url>")
        elif _EMAIL.fullmatch(word):
            words.append("<email>")
        elif _FILE.fullmatch(word):
            words.append("<file>")
        else:
            words += word.replace("-", " - ").split()
    return " ".join(words)


def frequent_words(lines: Iterable[str], share: float) -> tuple[list[tuple[str, int]], set[str]]:
    """Words by falling count (equal ones by spelling), and the most frequent share of them."""
    counted = Counter(word for line in lines for word in line.split())
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    return ranked, {word for word, _ in ranked[: int(len(ranked) * share)]}


def keep_words(line: str, kept: set[str]) -> str:
    """A line with every other word as ``<unk>``."""
    return " ".join(word if word in kept else "<unk>" for word in line.split())


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, those without a word dropped."""
    found = _SENTENCE.split(paragraph)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def paragraphs(lines: Iterable[str], *, legacy: bool = False) -> Iterator[list[str]]:
    """Lines between blank ones.

    Args:
        lines: sentences, a blank line after every paragraph.
        legacy: drop a last paragraph without a blank line, refuse two blank lines in a row.

    Raises:
        InputError: for two blank lines in a row, with ``legacy``.
    """
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line.strip())
            continue
        if not held and legacy:
            raise InputError("a paragraph must have sentences, got two blank lines in a row")
        if held:
            yield held
        held = []
    if held and not legacy:
        yield held


def merge_short(sentences: list[str]) -> list[str]:
    """Merge neighbours while a sentence has fewer than 5 words.

    The pair with the fewest words goes first, 5 being added where the first ends a sentence; no
    merged sentence has more than 250.
    """
    sentences = list(sentences)
    while len(sentences) > 1 and min(len(one.split()) for one in sentences) < SHORT:
        costs = [
            len(left.split()) + len(right.split()) + (SHORT if left.endswith(_ENDS) else 0)
            for left, right in pairwise(sentences)
        ]
        place = costs.index(min(costs))
        if costs[place] > LONG:
            break
        sentences[place : place + 2] = [f"{sentences[place]} {sentences[place + 1]}"]
    return sentences


def keep_length(
    lines: Iterable[str], shortest: int = 20, longest: int = 1_000_000
) -> Iterator[str]:
    """Lines of so many characters, the line break counted."""
    return (line for line in lines if shortest <= len(line) + 1 <= longest)


def is_held_out(number: int) -> bool:
    """Whether a line is kept for validation: one in 200."""
    return number % 200 == 199


def prepare(texts: Iterable[str], counts: CorpusCounts | None = None) -> Iterator[list[str]]:
    """All stages: from texts to paragraphs of sentences.

    Args:
        texts: documents, a paragraph per line.
        counts: filled in while the paragraphs are read.

    Yields:
        Sentences of one paragraph, lower-cased, marks apart.
    """
    counts = CorpusCounts() if counts is None else counts
    seen: set[int] = set()
    for text in texts:
        lines = [clean(line) for line in text.splitlines()]
        counts.lines["read"] += len(lines)
        for line in cleaned_lines(lines):
            counts.lines["prose"] += 1
            line = replace_patterns(line)
            mark = hash(line)
            if mark in seen:
                continue
            seen.add(mark)
            counts.lines["once"] += 1
            found = list(keep_length(merge_short(split_sentences(line))))
            counts.lines["sentences"] += len(found)
            counts.words += sum(len(sentence.split()) for sentence in found)
            if found:
                yield found
