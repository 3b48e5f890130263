"""What counting costs: time and memory, measured apart from accuracy, on pictures that are in memory already."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from counting_zoo.counter import Counter
from counting_zoo.errors import InputError

MEBI = 2**20


class Costs(TypedDict):
    """What :func:`measure_costs` finds."""

    pictures_per_second: float
    seconds_per_picture: float
    peak_memory_mib: float | None  # beyond what was in use before; None where the system does not tell
    parameters: int
    pictures: int
    megapixels: float  # of a picture, on average
    device: str
    threads: int


def measure_costs(model: Counter, pictures: Sequence[Tensor], names: Sequence[list[str]], *, repeats: int = 3) -> Costs:
    """Count the same pictures several times, one by one as evaluation does, after a first round that is not timed.

    Args:
        model: in evaluation mode, on its device.
        pictures: ``(3, H_i, W_i)``, as the model's ``preprocess`` leaves them.
        names: what each is asked about.
        repeats: timed rounds; their median is given.

    Returns:
        Pictures each second without reading and resizing; the most memory that counting took: of the device where it
        is CUDA, else of the process.

    Raises:
        InputError: there is no picture.
    """
    if not pictures:
        raise InputError("no picture to measure the cost of counting on")
    device = torch.device(model.device)
    seconds: list[float] = []
    with torch.inference_mode(), _peak_memory(device) as peak:
        for round_ in range(repeats + 1):
            start = time.perf_counter()
            for picture, asked in zip(pictures, names, strict=True):
                model.count_batch([picture], [asked])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                seconds.append(time.perf_counter() - start)
    each = statistics.median(seconds) / len(pictures)
    return {
        "pictures_per_second": 1 / each,
        "seconds_per_picture": each,
        "peak_memory_mib": None if not peak else peak[0] / MEBI,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": len(pictures),
        "megapixels": sum(p.shape[1] * p.shape[2] for p in pictures) / len(pictures) / 1e6,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, at the end, the bytes taken at most beyond those in use at the start; empty if unknown."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    before_resident = _resident("VmRSS:") if _forget_peak() else None
    yield found
    after = _resident("VmHWM:")
    if before_resident is not None and after is not None:
        found.append(max(0, after - before_resident))


def _forget_peak() -> bool:
    """Give unused memory back and let the process's high-water mark begin anew, as Linux and glibc can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


__all__ = ["Costs", "measure_costs"]
