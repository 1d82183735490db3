"""Is this machine ready? Small experiments, not version lists: search, store, threads, disk."""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from memlm.core.errors import MemlmError
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.plan import IndexConfig
from memlm.store.arrays import save_arrays
from memlm.store.verify import verify

_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "faiss-cpu", "numpy")


class Finding(NamedTuple):
    """One thing looked at."""

    name: str
    ok: bool
    detail: str


def checkup() -> list[Finding]:
    """Look at everything; a failing experiment is a finding, not an error."""
    examinations: dict[str, Callable[[], str]] = {
        "packages": _packages,
        "threads": _threads,
        "accelerator": _accelerator,
        "disk": _disk,
        "store": _store,
        "index": _index,
    }
    return [_examine(name, examination) for name, examination in examinations.items()]


def _examine(name: str, examination: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, examination())
    except (MemlmError, OSError, RuntimeError, ImportError) as error:
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _packages() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)


def _threads() -> str:
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if free is not None and threads > free:
        raise RuntimeError(
            f"torch uses {threads} threads on {free} cores, which slows everything down; "
            f"set OMP_NUM_THREADS={free} or pass --threads {free}"
        )
    return f"{threads} torch threads on {free} cores"


def _accelerator() -> str:
    if not torch.cuda.is_available():
        return "none; everything runs on the CPU"
    return f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < 1e9:
        raise RuntimeError(f"{free / 1e6:.0f} MB free here; a datastore needs gigabytes")
    return f"{free / 1e9:,.0f} GB free here"


def _store() -> str:
    with tempfile.TemporaryDirectory() as folder:
        store = save_arrays(Path(folder) / "store", torch.randn(100, 8), torch.arange(100))
        report = verify(store.path, "full", progress=False)
        if not report.ok:
            raise RuntimeError("; ".join(report.problems))
    return "written, read and verified"


def _index() -> str:
    """FAISS must find what exact search finds: a wrong build answers, but wrongly."""
    keys = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    config = IndexConfig(type="flat", recall_queries=0)
    found = build_index(keys, config, quiet=True).search(keys[:50], 10).ids
    truth = ExactIndex(keys, "l2").search(keys[:50], 10).ids
    share = (found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-1).float().mean().item()
    if share < 0.999:
        raise RuntimeError(f"FAISS finds {share:.0%} of the true neighbours; reinstall faiss-cpu")
    return "FAISS and exact search agree"
