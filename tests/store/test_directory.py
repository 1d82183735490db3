"""Locks of a store that is being built: whoever waits gets in, also when they are taken away."""

import shutil
import threading

import pytest

from memlm.core.errors import StoreError
from memlm.store.directory import LOCKS, lock, waiting


def test_one_who_waits_gets_in_when_the_locks_are_taken_away(tmp_path):
    held = lock(tmp_path, "part")
    held.acquire()
    entered = threading.Event()

    def wait():
        with waiting(tmp_path, "part"):
            entered.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert not entered.wait(0.2)
    shutil.rmtree(tmp_path / LOCKS)  # as the last step of a build does
    assert entered.wait(20)
    waiter.join(20)
    held.release()


def test_a_folder_that_is_not_there_is_said(tmp_path):
    message = "must be a directory that can be written"
    with pytest.raises(StoreError, match=message), waiting(tmp_path / "gone", "part"):
        pass
