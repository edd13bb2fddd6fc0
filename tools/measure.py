"""Time, memory and operations of a call."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


class Clock:
    """Seconds of a call, the device's work included."""

    def __init__(self, device: torch.device, steps: int, kind: str = "wall"):
        self.device = device
        self.steps = steps
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        self.wait()
        start = self.now()
        for _ in range(self.steps):
            call()
        self.wait()
        return (self.now() - start) / self.steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(ours: Callable, textbook: Callable, clock: Clock, repeats: int) -> dict:
    """Time both in turn: ratios above 1 mean that ours is faster.

    The noise floor is the median deviation from 1 of the ratios of two textbook runs, measured in
    the same loop on both sides of ours.
    """
    for call in (ours, textbook):  # warm-up
        clock(call)
    times = {"ours": [], "textbook": [], "again": []}
    for _ in range(repeats):
        times["textbook"].append(clock(textbook))
        times["ours"].append(clock(ours))
        times["again"].append(clock(textbook))
    paired = [b / a for a, b in zip(times["ours"], times["textbook"], strict=True)]
    noise = [b / a for a, b in zip(times["again"], times["textbook"], strict=True)]
    return {
        "ratio_median": statistics.median(paired),
        "ratio_min": min(times["textbook"] + times["again"]) / min(times["ours"]),
        "noise_floor": statistics.median(abs(x - 1) for x in noise),
        "seconds": statistics.median(times["ours"]),
        "seconds_textbook": statistics.median(times["textbook"]),
    }


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes alive at once that `call` allocates."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products and attention in `call`; 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations per second of a large matrix product of random numbers: what the device can do."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(device, steps=10)
    clock(lambda: a @ b)
    return 2 * size**3 / clock(lambda: a @ b)
