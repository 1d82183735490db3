"""``memlm verify``: is a datastore what its manifest says?"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from memlm.cli.options import TextOptions, load_model, load_tokenizer, show
from memlm.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Verify(TextOptions):
    """Check a datastore: sizes, checksums, or keys computed again. Exit code 1 if it is damaged."""

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore."""
    text: str = ""
    """Deep only: the text the store was built from."""
    level: Literal["quick", "full", "deep"] = "full"
    """quick: sizes and counts; full: also every checksum; deep: also compute a sample of keys \
again, which needs --model and --text."""
    model: str | None = None
    """Deep only: the model the store was built with."""
    device: str = "auto"
    """Deep only: where the model runs."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> int:
        """Check, print, and say by the exit code whether all is well."""
        from memlm.store.verify import verify

        report = verify(self.store, level="quick" if self.level == "quick" else "full")
        if self.level == "deep":
            from memlm.extract.recompute import recompute_sample

            if self.model is None or not self.text:
                raise InputError(
                    "a deep check computes keys again, which needs the model and the text; "
                    "give --model and --text"
                )
            tokenizer = load_tokenizer(self.model)
            model = load_model(self.model, self.device)
            report = recompute_sample(report, model, tokenizer, self.corpus(tokenizer))
        text = "\n".join(
            [
                *(f"checked: {item}" for item in report.checked),
                *(f"note: {item}" for item in report.notes),
                *(f"PROBLEM: {item}" for item in report.problems),
                f"{report.path}: {'sound' if report.ok else 'damaged'}",
            ]
        )
        show(report.to_dict(), text, as_json=self.json)
        return 0 if report.ok else 1
