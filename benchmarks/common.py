"""What every benchmark shares: paired timing, the machine's description, and results as JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(
    first: Callable[[], Any], second: Callable[[], Any], *, rounds: int, warm_up: int = 1
) -> dict[str, Any]:
    """Time two pieces of work in turn, A B A B ..., so that a drift of the machine hits both.

    Returns:
        Median seconds of each and the median, lowest and highest ratio first / second.
    """
    for _ in range(warm_up):
        first()
        second()
    times = [(seconds(first), seconds(second)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in times)
    return {
        "first_seconds": statistics.median(a for a, _ in times),
        "second_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "rounds": rounds,
    }


def matmul_flops(threads: int, size: int = 1536) -> float:
    """Measured float32 operations per second of a large matrix product: the arithmetic floor."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.set_num_threads(threads)
    for _ in range(2):
        a @ b
    best = min(seconds(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / best


def copy_bandwidth(megabytes: int = 256) -> float:
    """Measured bytes per second read from memory by a sum over a large float32 array."""
    data = torch.ones(megabytes << 18)
    data.sum()
    return data.numel() * 4 / min(seconds(data.sum) for _ in range(5))


def peak_megabytes() -> float:
    """The most memory this process has held (Linux).

    Not ``ru_maxrss``: that begins with what the parent held when it started the process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    raise OSError("this system does not say how much memory a process has held")


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write ``results/<name>.json`` and show it."""
    RESULTS.mkdir(exist_ok=True)
    value = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        **result,
    }
    text = json.dumps(value, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def save_picture(figure: Any, path: Path, title: str, description: str) -> None:
    """Write a figure of matplotlib; an SVG says to readers of its text what it shows."""
    figure.savefig(path)
    if path.suffix == ".svg":
        text = path.read_text(encoding="utf-8")
        begin = text.index(">", text.index("<svg")) + 1
        words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        path.write_text(text[:begin] + words + text[begin:], encoding="utf-8")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
