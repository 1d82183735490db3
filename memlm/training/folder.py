"""The folder of a run: what it is, where it stands, what came out.

run.json         what the run is: settings, hashes of the data; a resumed run must be the same
checkpoints/     what resuming needs, the last few
step-N/, best/   models kept on the way, each readable by ``from_pretrained``
(the model)      in the folder itself, when the run is over
training.json    what came out; written last, so a folder that has it is finished
"""

import json
from pathlib import Path
from typing import Any

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.core.files import read_json, remove_temporaries, write_json

RECORD, SUMMARY, CHECKPOINTS = "run.json", "training.json", "checkpoints"


def open_run(
    out: Path,
    identity: dict[str, Any],
    *,
    resume: bool,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Claim the folder: write what this run is, or compare it with what is there.

    Args:
        out: created if it is not there.
        identity: plain JSON values, ``config`` among them.
        resume: whether there may be a run already.
        defaults: of settings; a record that lacks one was written before there was such a setting.

    Raises:
        InputError: if the folder holds other files, or a run and ``resume`` is not set.
        FingerprintError: if the run there is another one.
    """
    identity = json.loads(json.dumps(identity))
    record = out / RECORD
    if out.is_dir():
        remove_temporaries(out)  # of a run killed before it wrote its first line
    if not record.exists():
        check(
            not out.exists() or (out.is_dir() and not any(out.iterdir())),
            f"{out} must be a new or empty folder, but holds other files; choose another",
        )
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, identity)
        return
    check(resume, f"{out} already holds a training; resume it or choose another folder")
    before = read_json(record)
    for name, value in json.loads(json.dumps(defaults or {})).items():
        if name in identity["config"]:
            before["config"].setdefault(name, value)
    if before != identity:
        old, new = (
            {**run.get("config", {}), **{key: run.get(key) for key in run if key != "config"}}
            for run in (before, identity)
        )
        changed = ", ".join(
            f"{name} ({old.get(name)} then, {new.get(name)} now)"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        )
        raise FingerprintError(
            f"{out} can only be resumed as it was begun, but these differ: {changed}; use the old "
            "settings or another folder"
        )


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint; one that a crash cut short has no readable state and is left."""
    found: list[tuple[int, Path]] = []
    for state in directory.glob("checkpoint-*/trainer_state.json"):
        try:
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        except (ValueError, KeyError):
            continue
        found.append((step, state.parent))
    return max(found)[1] if found else None
