"""``python -m tests.faults.table``: run all faults, write what was tried into the documentation.

The table in docs/datastore.md, between its two marks, counts the faults that were tried on each
builder; every one of them was survived, else nothing is written.
"""

import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "datastore.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


class Tally:
    """Counts what tests recorded as ``fault`` properties."""

    def __init__(self):
        self.counts: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "fault":
                    builder, kind, number = value
                    self.counts[builder, kind] += number


def table(counts: Counter[tuple[str, str]]) -> list[str]:
    """The counts as lines of Markdown, one row per builder."""
    builders = list(dict.fromkeys(builder for builder, _ in counts))
    kinds = list(dict.fromkeys(kind for _, kind in counts))
    rows = [["what is built", *kinds], ["---"] + ["---:"] * len(kinds)]
    for builder in builders:
        rows.append([builder, *(f"{counts[builder, kind] or '-'}" for kind in kinds)])
    total = {kind: sum(counts[builder, kind] for builder in builders) for kind in kinds}
    rows.append(["**together**", *(f"**{total[kind]:,}**" for kind in kinds)])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> int:
    tally = Tally()
    folder = str(Path(__file__).parent)
    code = pytest.main([folder, "-q", "-m", "faults or not faults", *sys.argv[1:]], [tally])
    if code == 0:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        command = shlex.join(["python", "-m", "tests.faults.table", *sys.argv[1:]])
        lines = "\n".join([f"Counts of `{command}`:", "", *table(tally.counts)])
        PAGE.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
