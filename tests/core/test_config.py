import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from memlm.core.config import Config, check
from memlm.core.errors import InputError, MissingExtraError
from memlm.core.optional import require


@dataclass(frozen=True)
class Example(Config):
    """A configuration."""

    size: int = 3
    names: tuple[str, ...] = ("a", "b")

    def __post_init__(self):
        check(self.size > 0, f"size must be positive, got {self.size}")


def test_round_trip_through_json():
    config = Example(size=5)
    assert Example.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be positive, got 0"),
        ({"kind": "Other"}, "expected the settings of a Example, got those of a Other"),
        ({"format_version": 99}, "newer than this memlm reads"),
        ({"sise": 4}, "has no setting named sise; it has names, size"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Example.from_dict({**Example().to_dict(), **change})


def test_missing_extra_gives_the_pip_command():
    with pytest.raises(MissingExtraError, match=r"pip install 'memlm\[zstd\]'"):
        require("surely_not_installed", extra="zstd", purpose="read .zst files")


def test_import_pulls_in_no_heavy_module():
    code = (
        "import sys, memlm; "
        "heavy = {'torch', 'transformers', 'faiss', 'datasets'} & set(sys.modules); "
        "sys.exit(len(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
