"""Several real processes on one machine, joined by gloo: for tests of what crosses processes."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["torch.distributed", "memlm.testing.tiny", "memlm.training.objectives.module"]


def run_processes(job: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call ``job(*args)`` in every process of a new process group.

    Args:
        job: a function of a module (it is sent by name); it learns its number from
            ``torch.distributed.get_rank()``.
        size: processes.
        args: for the job; sent by pickle.

    Returns:
        What each process returned, in their order.

    Raises:
        RuntimeError: if one fails, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)  # imported once, whatever the number of processes
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run, args=(job, rank, size, folder, ends[rank][1], args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        _wait([end for end, _ in ends], processes)
        return [torch.load(_answer(folder, rank), weights_only=False) for rank in range(size)]


def _wait(ends: Sequence[Any], processes: Sequence[Any]) -> None:
    try:
        for end in ends:
            failure = end.recv() if end.poll(120) else "no answer in 120 seconds"
            if failure:
                raise RuntimeError(f"a process failed:\n{failure}")
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _run(job, rank: int, size: int, folder: str, end, args) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # as torchrun sets them
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    try:
        place = (Path(folder) / "store").as_uri()
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
        torch.save(
            job(*args), _answer(folder, rank)
        )  # a file outlives the process, unlike a tensor
        dist.barrier()
        end.send("")
    except BaseException:
        end.send(traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _answer(folder: str, rank: int) -> Path:
    return Path(folder) / f"answer-{rank}"
