"""``memlm diagnose``: why a model fails beyond its trained length, and what window would help."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import ModelOptions, show, write_result

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Diagnose(ModelOptions):
    """Look at MODEL's attention on TEXT, within and beyond its trained length: scores against
    distance, entropy against length, first tokens, and the sinks and window that it needs.
    """

    text: Annotated[str, Positional, arg(metavar="TEXT")]
    """Folder, text file or .jsonl file (also .gz, .xz, .zst)."""
    length: int | None = None
    """Tokens of each piece (default: four times the trained length)."""
    trained: int | None = None
    """Length that the model was trained on (default: as its configuration says)."""
    pieces: int = 4
    """Pieces of the text that are read."""
    first: int = 10
    """First tokens that are looked at one by one."""
    features: int = 256
    """Positions of each piece whose hidden states are kept."""
    windows: tuple[int, ...] | None = None
    """Windows that are tried (default: 1/8, 1/4, 1/2 and all of the trained length)."""
    sinks: tuple[int, ...] = (0, 1, 4, 10)
    """Numbers of sinks that are tried with each."""
    scored: int = 128
    """Tokens at the end of each piece whose loss is compared."""
    tolerance: float = 0.01
    """Nats of loss that a smaller window or fewer sinks may cost."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    separator: str | None = None
    """Cut a text file into documents at this string."""
    limit: int | None = None
    """Read only so many documents."""
    save: str | None = None
    """Write everything as JSON to this file."""
    plot: str | None = None
    """Draw everything into this file."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        """Look, try, print, keep and draw."""
        from rich.console import Group
        from rich.text import Text

        from memlm.core.threads import torch_threads
        from memlm.evaluation.diagnosis import DiagnosisConfig, diagnose
        from memlm.evaluation.recommend import RecommendConfig, recommend
        from memlm.models.trained_length import trained_length

        model, tokenizer = self.load()
        trained = self.trained or trained_length(model)
        config = DiagnosisConfig(
            length=self.length or 4 * trained,
            trained=trained,
            pieces=self.pieces,
            first=self.first,
            features=self.features,
        )
        tried = RecommendConfig(
            windows=self.windows or tuple(trained // n for n in (8, 4, 2, 1)),
            sinks=self.sinks,
            scored=self.scored,
            tolerance=self.tolerance,
        )
        pieces = self._pieces(tokenizer, config.length)
        with torch_threads(self.threads):
            found = diagnose(model, pieces, config)
            chosen = recommend(model, pieces, tried)
        values = {"diagnosis": found.to_dict(), "recommendation": chosen.to_dict()}
        write_result(self.save, values)
        if self.plot is not None:
            from memlm.evaluation.diagnosis_plot import draw_diagnosis

            draw_diagnosis(found, chosen).savefig(self.plot)
        show(values, Group(found.table(), Text(), chosen.table()), as_json=self.json)
        return 0

    def _pieces(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> "Tensor":
        from memlm.data.documents import read_documents
        from memlm.data.tokens import tokenize
        from memlm.evaluation.diagnosis import cut_pieces

        documents = read_documents(
            self.text, text_field=self.field, separator=self.separator, limit=self.limit
        )
        corpus = tokenize(documents, tokenizer)
        return cut_pieces(corpus.tokens, length, self.pieces, begin_token=corpus.begin_token)
