"""A stream that dies anywhere goes on, and ends with the numbers it would have had anyway."""

import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch

from memlm.evaluation.streaming import read_points, shuffled_epochs, stream_perplexity
from memlm.models.extend import extend_context
from memlm.testing.tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
UNTIL, EVERY = 600, 100
CALLS = {"fsync": os.fsync, "replace": os.replace}


def read_on(out):
    model = extend_context(tiny_model("llama"), window=16, sinks=3)
    texts = [tiny_tokens(1, length, seed=length)[0].tolist() for length in (30, 50, 7)]
    list(
        stream_perplexity(
            model, shuffled_epochs(texts), until=UNTIL, chunk=32, every=EVERY, out=out, text="t"
        )
    )


def read_and_die(out, name, number, after):
    """The process dies around the n-th call, as by a power cut: no handler runs."""
    torch.set_num_threads(1)
    calls = 0

    def dying(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os._exit(9)
        result = CALLS[name](*arguments, **options)
        if calls == number:
            os._exit(9)
        return result

    setattr(os, name, dying)
    read_on(out)


def numbers(out):
    return [(x.tokens, x.scored, x.nll, x.recent_nll) for x in read_points(out)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    read_on(out)
    assert len(numbers(out)) == UNTIL / EVERY
    return numbers(out)


def start(job, *arguments):
    process = multiprocessing.get_context("fork").Process(target=job, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CALLS)
def test_a_stream_may_die_around_every_call(name, after, reference, tmp_path):
    for number in (1, 2, 4, 7):
        out = tmp_path / str(number)
        process = start(read_and_die, out, name, number, after)
        process.join(60)
        assert process.exitcode == 9
        read_on(out)
        assert numbers(out) == reference, f"after a death at call {number} of {name}"


def begin(out):
    torch.set_num_threads(1)
    read_on(out)


@pytest.fixture(scope="module")
def whole_seconds(tmp_path_factory):
    """How long a run takes here that nobody kills."""
    begun = time.perf_counter()
    start(begin, tmp_path_factory.mktemp("timed")).join(60)
    return time.perf_counter() - begun


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10))
def test_many_kills(seed, reference, whole_seconds, tmp_path):
    draw, killed = random.Random(seed), 0
    for _ in range(50):
        process = start(begin, tmp_path)
        time.sleep(draw.uniform(0, whole_seconds / 2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        if process.exitcode == 0:
            break
        killed += 1
    assert killed
    read_on(tmp_path)
    assert numbers(tmp_path) == reference
