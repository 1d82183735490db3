"""``memlm <verb>``: choose the verb, run it, turn errors into one line and an exit code.

Exit codes: 0 done, 1 the check that was asked for found a problem, 2 a mistake in the command or
its inputs, 130 interrupted. Verbs import what they need when they run, so help answers at once.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from memlm.cli.build import Build
from memlm.cli.cluster import Cluster
from memlm.cli.demo import Demo
from memlm.cli.diagnose import Diagnose
from memlm.cli.doctor import Doctor
from memlm.cli.edits import Compact, Delete, Join, Prune
from memlm.cli.evaluate import Evaluate
from memlm.cli.explain import Explain
from memlm.cli.finetune import Finetune
from memlm.cli.generate import Generate
from memlm.cli.imports import Import, Push
from memlm.cli.index import BuildIndex
from memlm.cli.passkey import Passkey
from memlm.cli.positions import Positions
from memlm.cli.retro import Retro
from memlm.cli.stream import Stream
from memlm.cli.sweep import Sweep
from memlm.cli.train import Train
from memlm.cli.translate import Translate
from memlm.cli.verify import Verify
from memlm.core.errors import MemlmError

_VERBS: dict[str, Any] = {
    "demo": Demo,
    "train": Train,
    "finetune": Finetune,
    "build": Build,
    "index": BuildIndex,
    "cluster": Cluster,
    "retro": Retro,
    "evaluate": Evaluate,
    "sweep": Sweep,
    "generate": Generate,
    "explain": Explain,
    "translate": Translate,
    "passkey": Passkey,
    "positions": Positions,
    "diagnose": Diagnose,
    "delete": Delete,
    "compact": Compact,
    "prune": Prune,
    "join": Join,
    "stream": Stream,
    "import": Import,
    "push": Push,
    "verify": Verify,
    "doctor": Doctor,
}
_DESCRIPTION = (
    "Language models that remember: give a Hugging Face model a memory (kNN-LM, RetoMaton, TRIME, "
    "RETRO, LM-Infinite), or train one with it (TRIME, RETRO, TUPE); measure it, generate with it."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: without the program's name; None: the process's own.

    Returns:
        The exit code.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(None if arguments is None else list(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        verb = tyro.extras.subcommand_cli_from_dict(
            _VERBS,
            prog="memlm",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )
        return verb.run()
    except MemlmError as error:
        sys.stderr.write(f"memlm: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("memlm: interrupted; run the same command again to continue\n")
        return 130


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    sys.stderr.write(f"memlm: warning: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
