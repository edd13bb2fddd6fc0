"""Time, memory and floating-point operations of a call."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


class Timer:
    """Seconds per call, including the work that the call leaves on the device.

    Args:
        steps: calls per timing.
        clock: "wall", or "cpu" for the processor time of this process.
    """

    def __init__(self, device: torch.device, steps: int, clock: str = "wall"):
        self.device = device
        self.steps = steps
        self.now = time.process_time if clock == "cpu" else time.perf_counter

    def __call__(self, call: Callable[[], object]) -> float:
        self.synchronize()
        start = self.now()
        for _ in range(self.steps):
            call()
        self.synchronize()
        return (self.now() - start) / self.steps

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(call: Callable, reference: Callable, timer: Timer, repeats: int) -> dict:
    """Time both alternately; ratios above 1 mean that `call` is faster than `reference`.

    The noise floor is the median of |ratio - 1| over pairs of two reference runs, timed in the same
    loop before and after `call`.
    """
    for warm_up in (call, reference):
        timer(warm_up)
    times, before, after = [], [], []
    for _ in range(repeats):
        before.append(timer(reference))
        times.append(timer(call))
        after.append(timer(reference))
    ratios = [b / a for a, b in zip(times, before, strict=True)]
    noise = [b / a for a, b in zip(after, before, strict=True)]
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(before + after) / min(times),
        "noise_floor": statistics.median(abs(x - 1) for x in noise),
        "seconds": statistics.median(times),
        "seconds_reference": statistics.median(before),
    }


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Peak of the bytes that `call` holds allocated at once."""
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
    """FLOPs of the matrix products and attention in `call`; 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a large matrix product of random values: an upper bound for the device."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer(device, steps=10)
    timer(lambda: a @ b)  # warm-up
    return 2 * size**3 / timer(lambda: a @ b)
