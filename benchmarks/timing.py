"""Times of calls and peaks of memory, on a device that works behind the host's back as on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

WARMUP = 5
MIN_TIMINGS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of many runs: median, 10th and 90th percentile, their number, and all of them."""

    median: float
    low: float
    high: float
    n: int
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        return cls(
            statistics.median(ordered), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered), tuple(samples)
        )

    def per(self, amount: float) -> tuple[float, float, float]:
        """Median, low and high of `amount` per second."""
        return tuple(1e3 * amount / ms for ms in (self.median, self.high, self.low))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Value below which `share` of the ordered numbers lie, interpolated."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(
    run: Callable[[int], object],
    device: torch.device,
    *,
    seconds: float,
    warmup: int = WARMUP,
    most: int = 200,
    least: int = MIN_TIMINGS,
    before: Callable[[], object] | None = None,
) -> Timing:
    """Time run(0), run(1), … by device events (on a CPU by the clock).

    Args:
        run: takes the number of the call, by which it rotates its buffers.
        seconds: about how long all timings may take together.
        warmup: calls before them.
        least, most: bounds of their number.
        before: called before each timing, not timed itself (gradients to zero, say).
    """
    prepare = before or (lambda: None)
    for i in range(warmup):
        prepare()
        run(i)
    synchronize(device)
    started = time.perf_counter()
    prepare()
    run(warmup)
    synchronize(device)
    once = time.perf_counter() - started
    count = max(least, min(most, int(seconds / max(once, 1e-6))))
    if device.type != "cuda":
        samples = []
        for i in range(count):
            prepare()
            started = time.perf_counter()
            run(i)
            samples.append(1e3 * (time.perf_counter() - started))
        return Timing.of(samples)
    begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    for i in range(count):
        prepare()
        begin[i].record()
        run(i)
        end[i].record()
    synchronize(device)
    return Timing.of([a.elapsed_time(b) for a, b in zip(begin, end, strict=True)])


def replayed(run: Callable[[int], object], calls: int, device: torch.device) -> Callable[[int], object]:
    """run(0), …, run(calls - 1) in turn as CUDA graphs: their time is the device's alone, without the launching.

    On a CPU, which has no graphs, it is `run` itself.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(2 * calls):  # compile and tune, outside of any capture
            run(i % calls)
    torch.cuda.current_stream(device).wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(calls)]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            run(i)
    return lambda i: graphs[i % calls].replay()


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from the start of a run to the end of all its work, by the clock."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Most bytes allocated at a time inside, beyond those allocated before; None on a CPU, which doesn't count."""
    if device.type != "cuda":
        yield lambda: None
        return
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes: what memory can do."""
    size = 2**30 if device.type == "cuda" else 2**24
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    timing = measure(lambda i: target.copy_(source), device, seconds=0.5)
    return 2 * size / (timing.median / 1e3)
