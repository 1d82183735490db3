"""Where the parts of a datastore live: on disk, in memory, on a GPU, or nowhere.

    keys      disk (memory-mapped, read as they are asked for), ram, or absent (a store of codes)
    values    ram, from first use: 4 bytes an entry; documents and positions alike, if asked for
    index     ram, disk (inverted lists are mapped, and read as a search visits them), or gpu

`Datastore.open(path, keys="ram")` and `memlm.index.build.load_index(..., residency=...)` decide;
this file says what each choice costs before it is made.
"""

from typing import Literal, NamedTuple

KeyResidency = Literal["disk", "ram"]
KEY_RESIDENCIES = ("disk", "ram")
_COLUMN = 4  # bytes of a token, document or position


class Part(NamedTuple):
    """One part of a store.

    Attributes:
        name: "keys", "values", "places" or "index".
        where: "disk", "ram", "gpu" or "absent".
        disk: bytes on disk.
        memory: bytes in memory (of the GPU, if it is there).
    """

    name: str
    where: str
    disk: int
    memory: int


def plan_store(entries: int, dim: int, width: int, *, places: bool = True) -> int:
    """Bytes on disk of a store of whole keys.

    Args:
        entries: how many.
        dim: of a key.
        width: bytes of a number of a key.
        places: whether entries have a document and a position.
    """
    return entries * (dim * width + _COLUMN * (3 if places else 1))


def plan_residency(
    entries: int,
    dim: int,
    width: int,
    *,
    keys: str = "disk",
    code_size: int | None = None,
    index: str = "ram",
    index_bytes: int = 0,
    places: bool = True,
) -> list[Part]:
    """Where each part lives and what it takes there.

    Args:
        entries: how many.
        dim: of a key.
        width: bytes of a number of a key.
        keys: "disk" or "ram".
        code_size: bytes of a code; None: keys are whole.
        index: "ram", "disk", "gpu", or "absent".
        index_bytes: of the index.
        places: whether entries have a document and a position.
    """
    held = entries * (dim * width if code_size is None else code_size)
    where = "absent" if code_size is not None else keys
    column = _COLUMN * entries
    on_disk = 0 if index == "absent" or code_size is not None else index_bytes
    return [
        Part("keys", where, 0 if where == "absent" else held, held if keys == "ram" else 0),
        *([] if code_size is None else [Part("codes", "disk", held, 0)]),
        Part("values", "ram", column, column),
        *([Part("places", "disk", 2 * column, 0)] if places else []),
        Part("index", index, on_disk, 0 if index in ("disk", "absent") else index_bytes),
    ]


def residency_lines(parts: list[Part]) -> list[str]:
    """The parts as text, one line each, and their sums."""
    lines = [
        f"{part.name:8} {part.where:7} {part.disk / 1e6:12,.1f} MB on disk "
        f"{part.memory / 1e6:12,.1f} MB in memory"
        for part in parts
    ]
    disk, memory = (sum(getattr(part, name) for part in parts) for name in ("disk", "memory"))
    lines.append(
        f"{'together':16} {disk / 1e6:12,.1f} MB on disk {memory / 1e6:12,.1f} MB in memory"
    )
    return lines
