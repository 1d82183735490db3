"""Folders of these tests lie in memory where there is a file system for it: they sync a lot."""

import shutil
import tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path):
    if not MEMORY.is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="memlm-faults-", dir=MEMORY))
    yield path
    shutil.rmtree(path)
