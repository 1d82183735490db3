"""``memlm positions``: where a model's heads look by position alone, as a picture."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import show


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Draw the position scores of every head of MODEL, named by what they do."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Folder or Hub id of a TUPE model (or BERT-R, BERT-A^d in this library's form)."""
    out: str | None = None
    """Picture to write (.png, .svg, .pdf); without it only the names are printed."""
    length: int = 64
    """Tokens."""
    json: bool = False
    """Print the names as JSON."""

    def run(self) -> int:
        """Draw, or name."""
        from memlm.cli.encoders import load_encoder
        from memlm.models.tupe.maps import draw_maps, position_maps

        maps = position_maps(load_encoder(self.model, "AutoModel"), self.length)
        if self.out is not None:
            draw_maps(maps, self.out)
        labels = {f"head {number}": label for number, label in enumerate(maps.labels)}
        value = {"model": self.model, "length": self.length, "labels": labels, "picture": self.out}
        lines = [f"{head}: {label}" for head, label in labels.items()]
        if self.out is not None:
            lines.append(f"drawn: {self.out}")
        show(value, "\n".join(lines), as_json=self.json)
        return 0
